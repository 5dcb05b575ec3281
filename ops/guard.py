"""Stops the parts of bin/dev when that ends, however it ends: Ctrl-C, a closed terminal, kill -9.

bin/dev writes `NAME PID` lines into its standard input, whose end is the sign. A process of its own, in a session of
its own, since nothing runs in one that was killed. It inherits the lock on the data, too (lock.py), so no other bin/dev
starts before it is done. Standard library only.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from contextlib import suppress

from ops.lock import is_alive

TIMEOUT = 15  # seconds for each part to finish its work
NEEDED = ("catcher", "redis")  # by the others while they finish, so stopped after them, in this order


def stop(parts: dict[str, int]) -> None:
    """Stops all parts together, but those that others need. Without Redis nothing can finish its work."""
    timeout = TIMEOUT if is_alive(parts.get("redis", 0)) else 1
    for group in (parts.keys() - set(NEEDED), *({name} for name in NEEDED)):
        pids = {name: pid for name, pid in parts.items() if name in group}
        for pid in pids.values():
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGTERM)
        deadline = time.monotonic() + timeout
        while any(map(is_alive, pids.values())) and time.monotonic() < deadline:
            time.sleep(0.02)
        for name, pid in pids.items():
            if is_alive(pid):
                with suppress(OSError):  # nobody reads it any more
                    print(f"{name} did not finish within {timeout} seconds and was killed.", file=sys.stderr)
            with suppress(ProcessLookupError):
                os.killpg(pid, signal.SIGKILL)  # also what it may have left: its scheduler, a task


if __name__ == "__main__":
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    stop({name: int(pid) for name, pid in map(str.split, sys.stdin)})
