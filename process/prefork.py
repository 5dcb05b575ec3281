"""One process that watches, and several that serve on the sockets it has opened.

Python runs on one core a process, and a request is nearly all work, so one process would leave the other core idle. The
children are forked when everything is loaded and share that memory. One that ends is replaced within a second; all end
with the parent, however it ends. systemd's watchdog is fed only while every child does its work.
"""

from __future__ import annotations

import ctypes
import gc
import logging
import mmap
import os
import signal
import struct
import threading
import time
from collections.abc import Callable
from contextlib import suppress

from process.log import emit, where
from process.sd_daemon import tell

PR_SET_PDEATHSIG = 1  # prctl(2)
STUCK_AFTER = 15  # seconds without a sign of progress
PAUSE = 1.0  # seconds, before a child that ended is replaced

Alive = Callable[[], None]


def run(count: int, work: Callable[[Alive], None]) -> None:
    """Runs `work` in so many processes, until SIGTERM or SIGINT; then passes SIGTERM on and waits for them to end.

    `work` is to return on SIGTERM, and to call what it is given at least once in `STUCK_AFTER` seconds, when it has
    seen itself do its work.
    """
    stopping = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stopping.set())
    seen = mmap.mmap(-1, 8 * count)  # shared with the children: when each has last done its work
    children: dict[int, int] = {}  # process id -> its place
    gc.collect()
    gc.freeze()  # else the first collection in a child would touch, and so copy, all that it shares
    while not stopping.is_set():
        for place in set(range(count)) - set(children.values()):
            _alive(seen, place)
            children[_fork(work, seen, place)] = place
        tell("READY=1")
        if all(time.monotonic() - moment < STUCK_AFTER for moment in struct.unpack(f"{count}d", seen)):
            tell("WATCHDOG=1")
        stopping.wait(PAUSE)
        _bury(children, os.WNOHANG)
    tell("STOPPING=1")
    for child in children:
        os.kill(child, signal.SIGTERM)
    while children:
        _bury(children, 0)


def _fork(work: Callable[[Alive], None], seen: mmap.mmap, place: int) -> int:
    parent, asked_to_stop = os.getpid(), {signal.SIGTERM, signal.SIGINT}
    signal.pthread_sigmask(signal.SIG_BLOCK, asked_to_stop)  # until the child no longer has its parent's handlers
    child = os.fork()
    if not child:
        for number in asked_to_stop:
            signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, asked_to_stop)
    if child:
        return child
    code = 1
    try:
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() == parent:  # it did not die before that
            work(lambda: _alive(seen, place))
            code = 0
    except Exception as error:
        emit("crashed", logging.ERROR, where=where(error))
    finally:
        os._exit(code)


def _alive(seen: mmap.mmap, place: int) -> None:
    struct.pack_into("d", seen, 8 * place, time.monotonic())


def _bury(children: dict[int, int], how: int) -> None:
    with suppress(ChildProcessError):
        while children:
            child, _ = os.waitpid(-1, how)
            if not child:
                return
            children.pop(child, None)
