"""systemd's units: there, enabled, running, and from the release that is current; and what the exit code of one that
is not running says. Asks `systemctl show` and /proc, and starts nothing.
systemd.exec(5), "Process exit codes"; systemd.service(5), Result=
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from ops.checks import store
from ops.checks.findings import Finding, Findings, Place, fault, note, ok, run, warn

PREFIX = "async-email"
UNITS = (
    f"{PREFIX}.target",
    f"{PREFIX}-api.socket",
    f"{PREFIX}-api.service",
    f"{PREFIX}-worker@email.service",
    f"{PREFIX}-worker@jobs.service",
    f"{PREFIX}-dashboard.service",
)
REDIS, NGINX = "redis-server@async-email.service", "nginx.service"
ASKED = (
    "Id,LoadState,ActiveState,SubState,UnitFileState,Result,NRestarts,ExecMainStatus,KillMode,MainPID,NeedDaemonReload"
)
OFTEN = 3  # restarts since it was started by hand or at boot

EXITS = {  # exit code -> what it means, what mends it
    "1": ("it gave up while it started, most often because of Redis", "see the line about Redis here"),
    "2": ("it refuses its settings", "see the lines about settings here"),
    "200": ("200/CHDIR: it cannot enter its WorkingDirectory", "sudo bin/install, in your clone"),
    "203": (
        "203/EXEC: its program is not there or cannot be run, as with a .venv under /home, which the unit cannot see",
        "sudo bin/install, in your clone: it puts the code and its .venv under /opt/async-email",
    ),
    "216": ("216/GROUP: its group does not exist", "sudo bin/install, in your clone: it makes user and group"),
    "217": ("217/USER: its user does not exist", "sudo bin/install, in your clone: it makes the user"),
    "226": (
        "226/NAMESPACE: a folder that its sandbox names does not exist, or this container forbids sandboxes",
        "journalctl -u {unit} -n 20 names the folder; in a container, allow nesting",
    ),
    "228": ("228/SECCOMP: this kernel lacks the system call filter", "sudo systemctl edit {unit}: SystemCallFilter="),
    "243": (
        "243/CREDENTIALS: a file that its LoadCredential= names is missing",
        "sudo ls -l /etc/async-email /etc/async-email/credentials; sudo bin/install makes what is missing",
    ),
}
RESULTS = {  # Result= of a unit that was not ended by an exit code
    "start-limit-hit": ("it failed so often that systemd gave up", "sudo systemctl reset-failed {unit}, then start it"),
    "oom-kill": ("the machine ran out of memory", "lower WORKER_CONCURRENCY, or take a larger machine"),
    "watchdog": ("it stood still and was ended by the watchdog", "journalctl -u {unit} -n 50"),
    "timeout": ("it did not start or stop in time", "journalctl -u {unit} -n 50"),
    "signal": ("it was killed by a signal", "journalctl -u {unit} -n 50"),
    "core-dump": ("it crashed", "journalctl -u {unit} -n 50"),
    "resources": ("systemd could not give it what it asks for", "journalctl -u {unit} -n 20"),
}

Unit = dict[str, str]


def show(*names: str) -> list[Unit] | None:
    """A block of `Key=value` lines for each. None where systemctl does not answer."""
    shown = run("systemctl", "show", "-p", ASKED, *names)
    if not shown or shown.returncode:
        return None
    blocks = [block for block in shown.stdout.split("\n\n") if block.strip()]
    return [dict(line.split("=", 1) for line in block.strip().splitlines() if "=" in line) for block in blocks]


def running(place: Place) -> Findings:
    if not place.systemd.is_dir():
        yield note("no systemd here, skipped")
        return
    found = show(*expected(place))
    if found is None:
        yield note("systemctl does not answer, skipped")
        return
    if not place.installed and all(unit.get("LoadState") == "not-found" for unit in found if ours(unit)):
        yield note("not installed as services here, skipped")
        return
    wrong = [finding for unit in found for finding in about(unit, place)]
    yield from wrong or [ok(f"{len(found)} units are enabled and running, from the current release")]


def expected(place: Place) -> list[str]:
    at = store.where(place) if place.settings else None
    redis = [REDIS] if at and at.path.startswith("/run/redis-async-email") else []
    return [*UNITS, *redis, *([NGINX] if place.nginx.is_dir() else [])]


def ours(unit: Unit) -> bool:
    return unit.get("Id", "").startswith(PREFIX)


def about(unit: Unit, place: Place) -> Findings:
    name, state = unit.get("Id", "?"), unit.get("ActiveState", "?")
    if unit.get("LoadState") == "not-found":
        yield fault(f"{name} is not installed", "sudo bin/install, in your clone")
        return
    if unit.get("LoadState") not in ("loaded", None):
        yield fault(f"{name} cannot be loaded ({unit['LoadState']})", f"systemd-analyze verify {name}")
        return
    if state != "active":
        yield why_not(unit)
    elif int(unit.get("NRestarts") or 0) >= OFTEN:
        yield warn(f"{name} runs, after {unit['NRestarts']} restarts", f"journalctl -u {name} -p warning -n 50")
    yield from how_it_is_set_up(unit)
    yield from from_another_release(unit, place)


def why_not(unit: Unit) -> Finding:
    name, code, result = unit["Id"], unit.get("ExecMainStatus", "0"), unit.get("Result", "success")
    state = f"{name} is {unit.get('ActiveState')} ({unit.get('SubState')})"
    causes = []
    if result in RESULTS:
        causes.append(RESULTS[result])
    if code in EXITS and result not in ("signal", "oom-kill", "watchdog", "core-dump"):
        causes.append(EXITS[code])
    if causes:
        mends = "; ".join(mend.format(unit=name) for _, mend in reversed(causes))
        return fault(f"{state}: {', and '.join(meaning for meaning, _ in causes)}", mends)
    if code != "0":
        return fault(f"{state}: its last exit code was {code}", f"journalctl -u {name} -n 50")
    return fault(state, f"sudo systemctl start {name}; journalctl -u {name} -n 50 says why it stopped")


def how_it_is_set_up(unit: Unit) -> Findings:
    name = unit["Id"]
    if unit.get("UnitFileState") == "disabled" and not name.endswith("-api.service"):  # its socket starts that one
        yield warn(f"{name} is not enabled: it is gone after the next reboot", f"sudo systemctl enable {name}")
    if "-worker@" in name and unit.get("KillMode") != "mixed":
        found = f"{name} has KillMode={unit.get('KillMode')}: a restart kills the jobs that it has in hand"
        yield fault(found, f"sudo systemctl edit {name}: [Service] KillMode=mixed")
    if unit.get("NeedDaemonReload") == "yes":
        yield warn(f"{name} has changed on disk since systemd read it", "sudo systemctl daemon-reload")


def from_another_release(unit: Unit, place: Place) -> Findings:
    """After an upgrade or a rollback, until it is restarted."""
    if not ours(unit) or unit.get("MainPID", "0") == "0":
        return
    try:
        folder = Path(re.sub(r" \(deleted\)$", "", os.readlink(f"/proc/{unit['MainPID']}/cwd")))
    except OSError:  # not root, or it has just ended
        return
    current = (place.opt / "current").resolve()
    if (place.opt.resolve() / "releases") in folder.parents and folder != current:
        found = f"{unit['Id']} still runs release {folder.name}, and the current one is {current.name}"
        yield warn(found, f"sudo systemctl restart {unit['Id']}")
