"""The operating system, asked and never changed: commands that only look, users, and who may read what.

Standard library only, so that the doctor runs when everything else is missing.
"""

from __future__ import annotations

import os
import pwd
import re
import shutil
import stat
import subprocess
from pathlib import Path
from typing import NamedTuple

NOT_RUN = 127


class User(NamedTuple):
    uid: int
    gids: list[int]


def run(*command: str) -> subprocess.CompletedProcess[str]:
    """Runs a command that changes nothing. If there is no such program, or if it hangs, its exit code is NOT_RUN."""
    program = shutil.which(command[0]) or shutil.which(command[0], path="/usr/sbin:/sbin") or command[0]
    try:
        return subprocess.run([program, *command[1:]], capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return subprocess.CompletedProcess(command, NOT_RUN, "", "")


def memory(under: Path = Path("/")) -> int:
    """Returns the bytes of memory of this machine or, in a container, those that it may use: the least of what the
    kernel has, what /proc/meminfo says (LXC) and the limits of the control groups above the first process."""
    found = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    found += [
        int(kib) << 10 for kib in re.findall(r"^MemTotal: +(\d+) kB", text_of(under / "proc/meminfo"), re.MULTILINE)
    ]
    for controllers, path in re.findall(r"^\d+:([^:]*):(/.*)$", text_of(under / "proc/1/cgroup"), re.MULTILINE):
        # Version 2 has one tree, without a name; version 1 one for each controller.
        tree, file = ("", "memory.max") if not controllers else ("memory", "memory.limit_in_bytes")
        if controllers and "memory" not in controllers.split(","):
            continue
        group = Path(path)
        for one in (group, *group.parents):
            limit = text_of(under / "sys/fs/cgroup" / tree / str(one).lstrip("/") / file).strip()
            found += [int(limit)] if limit.isdigit() else []
    return min(found)


def text_of(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""


def find_user(name: str) -> User | None:
    try:
        entry = pwd.getpwnam(name)
    except KeyError:
        return None
    return User(entry.pw_uid, os.getgrouplist(name, entry.pw_gid))


def denied_at(user: User, path: Path, bits: int) -> Path | None:
    """Returns the first of `path` and the folders above it that denies this user access, or None.

    `bits` are those of a mode's last digit: 4 to read, 2 to write, 1 to enter.
    """
    real = path.resolve()
    for step in (*reversed(real.parents), real):
        wanted = bits if step == real else 1
        try:
            seen = step.stat()
        except OSError:
            return step
        shift = 6 if seen.st_uid == user.uid else 3 if seen.st_gid in user.gids else 0
        if (stat.S_IMODE(seen.st_mode) >> shift) & wanted != wanted:
            return step
    return None
