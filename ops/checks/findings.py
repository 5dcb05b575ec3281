"""What a check of the doctor is: a function that looks at one thing in a `Place` and yields `Finding`s.

A finding is one line: how bad it is, what was found, and for all that is not fine the command or edit that mends it.

    ok     as it should be
    note   nothing to mend: not here, not looked at, or good to know
    warn   works today; will not after the next reboot, in a month, or for some recipients
    fault  does not work, or is not safe

It never holds a secret, an address or a word of a relay, and a check never changes anything. Standard library only, so
that the doctor can say so when everything else is missing.
"""

from __future__ import annotations

import grp
import os
import pwd
import shutil
import stat
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from settings import Settings

OK, NOTE, WARN, FAULT = "ok", "note", "warn", "fault"


class Finding(NamedTuple):
    level: str
    found: str
    mend: str = ""


Findings = Iterator[Finding]
Look = Callable[["Place"], Findings]


def ok(found: str) -> Finding:
    return Finding(OK, found)


def note(found: str, mend: str = "") -> Finding:
    return Finding(NOTE, found, mend)


def warn(found: str, mend: str) -> Finding:
    return Finding(WARN, found, mend)


def fault(found: str, mend: str) -> Finding:
    return Finding(FAULT, found, mend)


@dataclass
class Place:
    """Where the doctor looks: the service that bin/install has put on this machine or, where there is none, the
    checkout in which the doctor lies."""

    code: Path
    etc: Path = Path("/etc/async-email")
    opt: Path = Path("/opt/async-email")
    nginx: Path = Path("/etc/nginx")
    redis_data: Path = Path("/var/lib/redis-async-email")
    systemd: Path = Path("/run/systemd/system")
    selinux: Path = Path("/sys/fs/selinux/enforce")
    user: str = "async-email"
    owner: int = 0  # whose the configuration must be: root's
    http_port: int = 80
    smtp_ports: tuple[int, ...] = (25, 465, 587, 2525, 2587, 2465)
    name_server: tuple[str, int] | None = None  # instead of the system's
    patience: float = 5  # seconds for one thing on the network to answer
    send_to: str = ""  # where the canary flies
    settings: Settings | None = None  # None: they cannot be read

    @property
    def installed(self) -> bool:
        return self.etc.is_dir()

    @property
    def file(self) -> Path:
        """The one that the operator edits."""
        return self.etc / "async-email.env" if self.installed else self.code / ".env"

    @property
    def edit(self) -> str:
        if self.installed:
            return f"sudoedit {self.file}, then: sudo systemctl restart async-email.target"
        return f"edit {self.file} (.env.example shows the names)"

    def restart(self, part: str) -> str:
        """The command for `api`, `worker@email`, `worker@jobs` or `dashboard`."""
        if self.installed:
            return f"sudo systemctl restart async-email-{part}"
        by_hand = {"api": "service.py", "dashboard": "-m ops.dashboard"}
        return f"bin/dev, or .venv/bin/python {by_hand.get(part, part.replace('worker@', 'worker.py '))}"


def run(*command: str, seconds: float = 20) -> subprocess.CompletedProcess[str] | None:
    """A command that only looks. None where there is no such program, or it hangs."""
    program = shutil.which(command[0]) or shutil.which(command[0], path="/usr/sbin:/sbin")
    if not program:
        return None
    try:
        return subprocess.run([program, *command[1:]], capture_output=True, text=True, timeout=seconds, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None


def who_is(user: str) -> tuple[int, set[int]] | None:
    """Number and groups of a user, or None."""
    try:
        entry = pwd.getpwnam(user)
    except KeyError:
        return None
    return entry.pw_uid, {entry.pw_gid, *(group.gr_gid for group in grp.getgrall() if user in group.gr_mem)}


def may(user: tuple[int, set[int]], path: Path, bits: int) -> Path | None:
    """The first of `path` and the folders above it that keeps this user from it, or None. `bits` as in a mode's last
    digit: 4 to read, 2 to write, 1 to enter."""
    real = path.resolve()
    for place in (*reversed(real.parents), real):
        wanted = bits if place == real else 1
        try:
            seen = place.stat()
        except OSError:
            return place
        shift = 6 if seen.st_uid == user[0] else 3 if seen.st_gid in user[1] else 0
        if (stat.S_IMODE(seen.st_mode) >> shift) & wanted != wanted:
            return place
    return None


def is_root() -> bool:
    return os.geteuid() == 0


def counted(number: int, thing: str) -> str:
    return f"{number} {thing}" if number == 1 else f"{number} {thing}s"


def lasting(seconds: float) -> str:
    """`7 s`, `12 min`, `3 h`, `2 days`"""
    for size, unit in ((2 * 86400, "days"), (2 * 3600, "h"), (120, "min")):
        if seconds >= size:
            return f"{seconds / {'days': 86400, 'h': 3600, 'min': 60}[unit]:.0f} {unit}"
    return f"{seconds:.0f} s"


def sized(octets: float) -> str:
    """`3.5 GB`, `120 MB`, `7 KB`"""
    for size, unit, digits in ((2**30, "GB", 1), (2**20, "MB", 0)):
        if octets >= size:
            return f"{octets / size:.{digits}f} {unit}"
    return f"{octets / 1024:.0f} KB"
