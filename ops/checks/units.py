"""Checks systemd's units: installed, enabled, running, from the current release, and with the files that are there now;
explains why one does not run.

Asks `systemctl show` and /proc, and starts nothing. systemd.exec(5), "Process exit codes"; systemd.service(5), Result=
"""

from __future__ import annotations

import os
import re
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from ops.checks import configuration, store
from ops.checks.findings import FAULT, WARN, Finding, Findings, fault, lasting, note, ok, warn
from ops.checks.system import run
from ops.checks.target import Target
from ops.machines import SENTINEL
from ops.services import TARGET, role_of

UNITS = (TARGET, "async-email-api.socket", *configuration.SERVICES)
PROPERTIES = (
    "Id,LoadState,UnitFileState,NeedDaemonReload,ActiveState,SubState,Result,ExecMainStatus,MainPID,NRestarts,"
    "ActiveEnterTimestampMonotonic,ExecMainStartTimestampMonotonic,Restart,KillMode,LimitNOFILE"
)
OFTEN = 3  # restarts since it was started by hand or at boot
LATELY = 3600  # seconds; an older trouble is over
FEW_FILES = 512  # open files and connections; the API's processes take 400 connections each

# fmt: off
EXITS = {  # exit code -> its meaning, its fix
    "1": ("it gave up while it started, most often because of Redis", "see the line about Redis here"),
    "2": ("it refuses its settings", "see the lines about settings here"),
    "127": ("127: its program is not there; the release has no .venv", "sudo bin/install, in your clone"),
    "200": ("200/CHDIR: it cannot enter its WorkingDirectory", "sudo bin/install, in your clone"),
    "203": ("203/EXEC: its program is missing or cannot be run, as with a .venv under /home, which the unit cannot see",
            "sudo bin/install, in your clone: it puts the code and its .venv under /opt/async-email"),
    "216": ("216/GROUP: its group does not exist", "sudo bin/install, in your clone: it makes user and group"),
    "217": ("217/USER: its user does not exist", "sudo bin/install, in your clone: it makes the user"),
    "226": ("226/NAMESPACE: a folder that its sandbox names does not exist, or this container forbids sandboxes",
            "sudo journalctl -u {unit} -n 20 names the folder; in a container, allow nesting"),
    "228": ("228/SECCOMP: this kernel lacks the system call filter", "sudo systemctl edit {unit}: SystemCallFilter="),
    "243": ("243/CREDENTIALS: a file that its LoadCredential= names is missing",
            "sudo ls -l /etc/async-email /etc/async-email/credentials; sudo bin/install makes what is missing"),
}
# fmt: on
RESULTS = {  # Result= of a unit that did not end by an exit code
    "start-limit-hit": ("it failed too often: systemd gave up", "sudo systemctl reset-failed {unit}, and start it"),
    "oom-kill": ("the machine ran out of memory", "lower WORKER_CONCURRENCY, or take a larger machine"),
    "watchdog": ("it hung and was ended by the watchdog", "sudo journalctl -u {unit} -n 50"),
    "timeout": ("it did not start or stop in time", "sudo journalctl -u {unit} -n 50"),
    "protocol": ("it ended before it said that it was ready", "sudo journalctl -u {unit} -n 50"),
    "signal": ("it was killed by a signal", "sudo journalctl -u {unit} -n 50"),
    "core-dump": ("it crashed", "sudo journalctl -u {unit} -n 50"),
    "resources": ("systemd could not give it what it asks for", "sudo journalctl -u {unit} -n 20"),
}

Unit = dict[str, str]


def show(*names: str) -> list[Unit]:
    """Returns the properties of each unit, and nothing if systemctl does not answer."""
    shown = run("systemctl", "show", "-p", PROPERTIES, *names)
    blocks = shown.stdout.split("\n\n") if not shown.returncode else []
    return [dict(line.split("=", 1) for line in block.splitlines() if "=" in line) for block in blocks if "=" in block]


def running(target: Target) -> Findings:
    if not target.systemd.is_dir():
        yield note("no systemd here, skipped")
    elif not (found := show(*expected(target))):
        yield note("systemctl does not answer, skipped")
    elif not target.installed and all(unit.get("LoadState") == "not-found" for unit in found if ours(unit)):
        yield note("not installed as services here, skipped")
    else:
        wrong = [*all_together(found), *(finding for unit in found for finding in about(unit, target))]
        wrong += with_old_files(found, target)
        yield from wrong or [ok(f"{len(found)} units are enabled and running, from the current release")]


# What is often true of several units, and then is one finding: properties, level, found, fix.
# fmt: off
OFTEN_SHARED = (
    ({"LoadState": "not-found"}, FAULT, "not installed: {units}", "sudo bin/install, in your clone"),
    ({"LoadState": "masked"}, FAULT, "masked, so nothing can start it: {units}",
     "sudo systemctl unmask {units} && sudo systemctl start {units}"),
    ({"LoadState": "loaded", "ActiveState": "inactive"}, FAULT, "not started, or stopped by hand: {units}",
     "sudo systemctl start {units}"),
    ({"UnitFileState": "disabled"}, WARN, "not enabled, so gone after the next reboot: {units}",
     "sudo systemctl enable {units}"),
    ({"NeedDaemonReload": "yes"}, WARN, "changed on disk since systemd read it: {units}",
     "sudo systemctl daemon-reload"),
)
# fmt: on


def all_together(found: list[Unit]) -> Findings:
    for properties, level, text, fix in OFTEN_SHARED:
        units = " ".join(unit.get("Id", "?") for unit in found if properties.items() <= unit.items())
        if units:
            yield Finding(level, text.format(units=units), fix.format(units=units))


def expected(target: Target) -> list[str]:
    settings = configuration.load(target)
    ours = [unit for unit in UNITS if unit == TARGET or target.has_role(role_of(unit))]
    is_here = "redis" in target.roles or bool(settings and store.address(settings).is_our_own)
    beside = {store.OUR_UNIT: is_here, SENTINEL: "sentinel" in target.roles}
    beside["nginx.service"] = target.nginx.is_dir() and target.has_role("api")
    return [*ours, *(unit for unit, is_expected in beside.items() if is_expected)]


def ours(unit: Unit) -> bool:
    return unit.get("Id", "").startswith("async-email")


def about(unit: Unit, target: Target) -> Findings:
    name, state = unit.get("Id", "?"), unit.get("ActiveState", "?")
    if unit.get("LoadState") == "masked":  # reported above, and its other properties mean nothing
        return
    if unit.get("LoadState") not in ("loaded", "not-found"):
        yield fault(f"{name} cannot be loaded ({unit.get('LoadState')})", f"systemd-analyze verify {name}")
    elif unit.get("SubState") == "start":
        yield warn(f"{name} is just starting", f"look again in a minute; sudo journalctl -u {name} -n 50")
    elif state not in ("active", "inactive"):
        yield why_not(unit)
    elif int(unit.get("NRestarts") or 0) >= OFTEN and up_for(unit) < LATELY:
        found = f"{name} has run for {lasting(up_for(unit))}, after {unit['NRestarts']} restarts"
        yield warn(found, f"sudo journalctl -u {name} -p warning -n 50; sudo journalctl -k -g 'Killed process'")
    if "-worker@" in name and unit.get("KillMode", "mixed") != "mixed":
        found = f"{name} has KillMode={unit['KillMode']}: a restart kills the jobs in progress"
        yield fault(found, f"sudo systemctl edit {name}: [Service] KillMode=mixed")
    if ours(unit) and 0 < int(unit.get("LimitNOFILE") or 0) < FEW_FILES:
        found = f"{name} may open {unit['LimitNOFILE']} files and connections, which is too few"
        yield fault(found, f"sudo systemctl edit {name}: [Service] LimitNOFILE=4096; then restart it")
    yield from from_another_release(unit, target)
    yield from from_another_program(unit)


def up_for(unit: Unit) -> float:
    """Returns seconds."""
    return time.monotonic() - int(unit.get("ActiveEnterTimestampMonotonic") or 0) / 1e6


def why_not(unit: Unit) -> Finding:
    name, code, result = unit["Id"], unit.get("ExecMainStatus", "0"), unit.get("Result", "success")
    state = f"{name} is {unit.get('ActiveState')} ({unit.get('SubState')})"
    if result == "exit-code" and unit.get("ActiveState") == "failed" and unit.get("Restart") == "always":
        result = "start-limit-hit"  # systemd 252 still names the last exit
    causes = [RESULTS[result]] if result in RESULTS else []
    if code in EXITS and result not in ("signal", "oom-kill", "watchdog", "core-dump"):
        causes.append(EXITS[code])
    causes = causes or [(f"its last exit code was {code}", "sudo journalctl -u {unit} -n 50")]
    fixes = "; ".join(fix.format(unit=name) for _, fix in reversed(causes))
    return fault(f"{state}: {', and '.join(meaning for meaning, _ in causes)}", fixes)


def with_old_files(found: list[Unit], target: Target) -> Findings:
    """Finds services that were not restarted after an edit: they read their files when they start, and only then."""
    if not target.installed or not configuration.is_readable(target):
        return
    old: dict[Path, list[str]] = defaultdict(list)
    for unit in found:
        for path in changed_since_start(unit, target) if unit.get("ActiveState") == "active" else ():
            old[path].append(unit["Id"])
    for path, names in old.items():
        mail_runs_on = set(names) != {"async-email-dashboard.service"}  # which is up before the first edit
        text = f"{path} was changed after it was read by {' and '.join(names)}, so the change has no effect yet"
        yield (warn if mail_runs_on else note)(text, f"sudo systemctl restart {' '.join(names)}")


def changed_since_start(unit: Unit, target: Target) -> Iterator[Path]:
    """Yields the files that are not what the unit has read: by their content, where systemd's copy can be seen, which
    also tells of a file that came back with an old date; else by their date."""
    name, started = unit.get("Id", ""), int(unit.get("ExecMainStartTimestampMonotonic") or 0) / 1e6
    if name in configuration.SERVICES:
        files = configuration.passed_to(name, target)
    else:
        is_alone = name == store.OUR_UNIT and not target.roles  # else Redis itself changes it, as Sentinel says
        files = {"": Path(store.OUR_CONF)} if is_alone else {}
    for credential, path in files.items():
        with suppress(OSError):  # that it is missing is said elsewhere
            copy = target.credentials / name / (credential or "none")
            changed = path.stat().st_mtime > time.time() - time.monotonic() + started
            if path.read_bytes() != copy.read_bytes() if copy.is_file() else started and changed:
                yield path


def from_another_program(unit: Unit) -> Findings:
    """Finds a unit whose program was replaced while it ran, as by an upgrade of the system."""
    try:
        program = os.readlink(f"/proc/{unit.get('MainPID', '0')}/exe")
    except OSError:  # not root, or it does not run
        return
    if program.endswith(" (deleted)"):
        found = f"{unit.get('Id')} still runs a program that was replaced since, as by an upgrade of the system"
        yield warn(found, f"sudo systemctl restart {unit.get('Id')}")


def from_another_release(unit: Unit, target: Target) -> Findings:
    """Finds a unit that was not restarted after an upgrade or a rollback."""
    if not ours(unit) or unit.get("MainPID", "0") == "0":
        return
    try:
        folder = Path(re.sub(r" \(deleted\)$", "", os.readlink(f"/proc/{unit['MainPID']}/cwd")))
    except OSError:  # not root, or it has just ended
        return
    current = (target.opt / "current").resolve()
    if (target.opt.resolve() / "releases") in folder.parents and folder != current:
        found = f"{unit['Id']} still runs release {folder.name}, and the current one is {current.name}"
        yield warn(found, f"sudo systemctl restart {unit['Id']}")
