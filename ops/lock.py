"""Locks the data folder of bin/dev: two Redis servers that append to one file would send mail twice.

The lock is flock(2) on a file in the folder, taken by bin/dev and inherited by its Redis, so it lasts until both have
ended. The file says whose it is. `python -m ops.lock` prints who holds a folder of this checkout; standard library
only, since bin/venv asks before there are packages.
"""

from __future__ import annotations

import fcntl
import os
import time
from pathlib import Path
from typing import NamedTuple, TextIO

ROOT = Path(__file__).parent.parent
DATA = Path("var", "dev")  # in a checkout
FOLDERS = ("catcher", "relay")  # a queue for the catcher and one for a real relay, so that test mail is never sent
PATIENCE = 20  # seconds; what a killed bin/dev has left takes as long to end, at most (guard.py)


class Held(Exception):
    """Raised if another process holds the folder. The text names it."""


class Holder(NamedTuple):
    dev: int = 0  # process ids
    redis: int = 0
    port: int = 0  # of Redis

    def __str__(self) -> str:
        if is_alive(self.dev):
            return f"bin/dev (process {self.dev})"
        return f"the Redis of an earlier bin/dev (process {self.redis or 'unknown'})"


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except OSError as error:
        return isinstance(error, PermissionError)  # another user's
    return pid > 0


def take(folder: Path) -> TextIO:
    """Locks the folder until the file that it returns is closed in every process that has it. Raises `Held`."""
    file, deadline = (folder / "lock").open("a+"), time.monotonic() + PATIENCE
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = holder_of(folder)
            if holder and (is_alive(holder.dev) or time.monotonic() > deadline):
                file.close()
                raise Held(f"{folder} is in use by {holder}: only one may write there, so end that one first") from None
            time.sleep(0.1)
        else:
            write(file, Holder(os.getpid()))
            return file


def write(file: TextIO, holder: Holder) -> None:
    file.seek(0)
    file.truncate()
    file.write(" ".join(map(str, holder)))
    file.flush()


def holder_of(folder: Path) -> Holder | None:
    """Returns who holds the folder; None if nobody does."""
    try:
        with (folder / "lock").open() as file:
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                return Holder(*map(int, file.read().split()))
    except OSError:  # there is none, or it is another user's
        pass
    return None


def holders(first: str = "", checkout: Path = ROOT) -> list[Holder]:
    """Returns who holds the folders of a checkout, that of the folder `first` before others."""
    found = [holder_of(checkout / DATA / name) for name in sorted(FOLDERS, key=lambda name: name != first)]
    return [holder for holder in found if holder]


if __name__ == "__main__":
    print(*holders(), sep=" and ")
