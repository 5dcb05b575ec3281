"""systemd's units: there, enabled, running, and from the release that is current; and what the exit code of one that
is not running says. Asks `systemctl show` and /proc, and starts nothing.
systemd.exec(5), "Process exit codes"; systemd.service(5), Result=
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable
from pathlib import Path

from ops.checks import store
from ops.checks.findings import FAULT, WARN, Finding, Findings, Place, fault, lasting, note, ok, run, warn

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
    "Id,LoadState,UnitFileState,NeedDaemonReload,ActiveState,SubState,Result,ExecMainStatus,MainPID,NRestarts,"
    "ActiveEnterTimestampMonotonic,Restart,KillMode"
)
OFTEN = 3  # restarts since it was started by hand or at boot
LATELY = 3600  # seconds; what it got over long ago is no news

EXITS = {  # exit code -> what it means, what mends it
    "1": ("it gave up while it started, most often because of Redis", "see the line about Redis here"),
    "2": ("it refuses its settings", "see the lines about settings here"),
    "127": ("127: its program is not there; the release has no .venv", "sudo bin/install, in your clone"),
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
    "start-limit-hit": (
        "it failed too often: systemd gave up",
        "sudo systemctl reset-failed {unit}, and start it",
    ),
    "oom-kill": ("the machine ran out of memory", "lower WORKER_CONCURRENCY, or take a larger machine"),
    "watchdog": ("it stood still and was ended by the watchdog", "journalctl -u {unit} -n 50"),
    "timeout": ("it did not start or stop in time", "journalctl -u {unit} -n 50"),
    "protocol": ("it ended before it said that it was ready", "journalctl -u {unit} -n 50"),
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
    wrong = [*all_together(found), *(finding for unit in found for finding in about(unit, place))]
    yield from wrong or [ok(f"{len(found)} units are enabled and running, from the current release")]


TOGETHER: tuple[tuple[Callable[[Unit], bool], str, str, str], ...] = (  # when, how bad, what, what mends it
    (
        lambda unit: unit.get("LoadState") == "not-found",
        *(FAULT, "not installed: {units}", "sudo bin/install, in your clone"),
    ),
    (
        lambda unit: unit.get("LoadState") == "masked",
        *(
            FAULT,
            "masked, so nothing can start it: {units}",
            "sudo systemctl unmask {units} && sudo systemctl start {units}",
        ),
    ),
    (
        lambda unit: unit.get("LoadState") == "loaded" and unit.get("ActiveState") == "inactive",
        *(FAULT, "not started, or stopped by hand: {units}", "sudo systemctl start {units}"),
    ),
    (
        lambda unit: unit.get("UnitFileState") == "disabled",
        *(WARN, "not enabled, so gone after the next reboot: {units}", "sudo systemctl enable {units}"),
    ),
    (
        lambda unit: unit.get("NeedDaemonReload") == "yes",
        *(WARN, "changed on disk since systemd read it: {units}", "sudo systemctl daemon-reload"),
    ),
)


def all_together(found: list[Unit]) -> Findings:
    """What is often true of several units is one line."""
    for is_so, level, told, mend in TOGETHER:
        units = " ".join(unit.get("Id", "?") for unit in found if is_so(unit))
        if units:
            yield Finding(level, told.format(units=units), mend.format(units=units))


def expected(place: Place) -> list[str]:
    at = store.where(place) if place.settings else None
    redis = [REDIS] if at and at.path.startswith("/run/redis-async-email") else []
    return [*UNITS, *redis, *([NGINX] if place.nginx.is_dir() else [])]


def ours(unit: Unit) -> bool:
    return unit.get("Id", "").startswith(PREFIX)


def about(unit: Unit, place: Place) -> Findings:
    name, state = unit.get("Id", "?"), unit.get("ActiveState", "?")
    if unit.get("LoadState") == "masked":  # told above, and nothing else that is said of it means anything
        return
    if unit.get("LoadState") not in ("loaded", "not-found"):
        yield fault(f"{name} cannot be loaded ({unit.get('LoadState')})", f"systemd-analyze verify {name}")
    elif unit.get("SubState") == "start":
        yield warn(f"{name} is just starting", f"look again in a minute; journalctl -u {name} -n 50")
    elif state not in ("active", "inactive"):
        yield why_not(unit)
    elif int(unit.get("NRestarts") or 0) >= OFTEN and up_for(unit) < LATELY:
        found = f"{name} runs for {lasting(up_for(unit))} now, after {unit['NRestarts']} restarts"
        yield warn(found, f"journalctl -u {name} -n 500 | grep -E 'WARNING|ERROR'")
    if "-worker@" in name and unit.get("KillMode", "mixed") != "mixed":
        found = f"{name} has KillMode={unit['KillMode']}: a restart kills the jobs that it has in hand"
        yield fault(found, f"sudo systemctl edit {name}: [Service] KillMode=mixed")
    yield from from_another_release(unit, place)


def up_for(unit: Unit) -> float:
    """Seconds."""
    return time.monotonic() - int(unit.get("ActiveEnterTimestampMonotonic") or 0) / 1e6


def why_not(unit: Unit) -> Finding:
    name, code, result = unit["Id"], unit.get("ExecMainStatus", "0"), unit.get("Result", "success")
    state = f"{name} is {unit.get('ActiveState')} ({unit.get('SubState')})"
    causes = []
    if result == "exit-code" and unit.get("ActiveState") == "failed" and unit.get("Restart") == "always":
        result = "start-limit-hit"  # systemd 252 goes on naming the last exit
    if result in RESULTS:
        causes.append(RESULTS[result])
    if code in EXITS and result not in ("signal", "oom-kill", "watchdog", "core-dump"):
        causes.append(EXITS[code])
    if causes:
        mends = "; ".join(mend.format(unit=name) for _, mend in reversed(causes))
        return fault(f"{state}: {', and '.join(meaning for meaning, _ in causes)}", mends)
    return fault(f"{state}: its last exit code was {code}", f"journalctl -u {name} -n 50")


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
