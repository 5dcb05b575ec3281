"""Cuts an unfinished transaction off the end of Redis' append-only file, before each start: `aof.py SERVER DIRECTORY`.

A crash may cut the file in the middle of MULTI ... EXEC. Redis, at least up to 8.2, removes the one command that is not
whole, and leaves the half before it: the second start then runs that half together with the next transaction. Valkey 9
removes all of it, and so does this; it prints what it cut.

It also removes the temporary files of a run that was killed.

It never cuts where the file is wrong elsewhere than at its end, and leaves to Redis what is not in a transaction. How
far the file is whole, the server's own redis-check-aof says: redis-server and valkey-server are that if called so.
bin/install copies this file out of the release, for the system's Python: it may import nothing of ours.
https://redis.io/docs/latest/operate/oss_and_stack/management/persistence/
"""

from __future__ import annotations

import mmap
import os
import re
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

MULTI, EXEC = b"*1\r\n$5\r\nMULTI\r\n", b"*1\r\n$4\r\nEXEC\r\n"
WORDS, BYTES = re.compile(rb"\*(\d+)\r\n"), re.compile(rb"\$(\d+)\r\n")
PART_OF_LINE = re.compile(rb"[*$]?\d{0,20}\r?")


class Damaged(Exception):
    """Raised if the file is not as Redis writes it, elsewhere than at its end."""


def last_file(directory: Path) -> Path:
    """Returns the file to which Redis appends: one of several since 7.0, and the last in the manifest."""
    manifest = directory / "appendonlydir" / "appendonly.aof.manifest"
    if not manifest.exists():
        return directory / "appendonly.aof"
    return manifest.with_name(re.findall(r"^file (\S+)", manifest.read_text(), re.MULTILINE)[-1])


def whole_up_to(server: str, path: Path) -> int:
    """Returns the size of what Redis can read, without a transaction that is not whole."""
    name = Path(server).name.replace("server", "check-aof")
    ran = subprocess.run([name, path], executable=server, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE)
    found = re.search(rb"\bsize=\d+, ok_up_to=(\d+)", ran.stdout)
    if not found:
        raise Damaged(f"{name} cannot read it")
    return int(found[1])


def number(data: mmap.mmap, at: int, line: re.Pattern[bytes]) -> tuple[int, int]:
    """Reads a line such as `*3` or `$5`. Returns its number, and where the next line begins."""
    found = line.match(data, at)
    if found:
        return int(found[1]), found.end()
    if PART_OF_LINE.fullmatch(data, at):
        raise EOFError
    raise Damaged(f"no command at byte {at}")


def end_of_command(data: mmap.mmap, at: int) -> int:
    """Raises `EOFError` if the file ends within the command."""
    words, at = number(data, at, WORDS)
    for _ in range(words):
        length, at = number(data, at, BYTES)
        at += length + 2
        if at > len(data):
            raise EOFError
        if data[at - 2 : at] != b"\r\n":
            raise Damaged(f"no end of line at byte {at - 2}")
    return at


def is_unfinished(data: mmap.mmap, at: int) -> bool:
    """Returns whether the file ends within the transaction that begins here, and nothing else is wrong with it."""
    if data[at : at + len(MULTI)] != MULTI:
        return False
    with suppress(EOFError):
        while at < len(data):
            if data[at : at + len(EXEC)] == EXEC:
                raise Damaged(f"the transaction that ends at byte {at} began within another")
            at = end_of_command(data, at)
    return True


def cut_unfinished(server: str, directory: Path) -> str:
    """Cuts, and returns a line for the log if there is anything to say."""
    path = last_file(directory)
    if not path.exists() or path.stat().st_size == 0:
        return ""
    try:
        whole = whole_up_to(server, path)
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            if not is_unfinished(data, whole):
                return ""
            lost = len(data) - whole
    except Damaged as damage:
        return f"{path} is damaged and stays as it is: {damage}"
    with path.open("r+b") as log:
        log.truncate(whole)
        os.fsync(log.fileno())
    return f"{path}: cut off the last transaction, which is not finished: {lost} bytes, from byte {whole} on"


def remove_leftovers(directory: Path) -> str:
    """Removes what a Redis that was killed while it wrote a file anew has left; nobody else does. Returns a line for
    the log if there was anything."""
    left = [path for path in directory.glob("temp-*") if re.fullmatch(r"temp-[\w-]+\.(?:aof|rdb)", path.name)]
    for path in left:
        path.unlink()
    return f"{directory}: removed {len(left)} unfinished files of an earlier run" if left else ""


if __name__ == "__main__":
    server, directory = sys.argv[1:]
    if said := remove_leftovers(Path(directory)):
        print(said, flush=True)
    if said := cut_unfinished(server, Path(directory)):
        print(said, flush=True)
