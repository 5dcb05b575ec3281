"""The operating system, asked and never changed: commands that only look, users, and who may read what.

Standard library only, so that the doctor runs when everything else is missing.
"""

from __future__ import annotations

import os
import pwd
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
