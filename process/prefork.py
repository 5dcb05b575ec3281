"""Runs one process that watches, and several that work: serve on the sockets it has opened, or send mail.

A Python process uses one core, so one process alone would leave the other cores idle. The
children are forked when everything is loaded and share that memory. One that ends is replaced within a second, one
without progress for `STUCK_AFTER` is killed first; all end with the parent, however it ends.
"""

from __future__ import annotations

import ctypes
import gc
import logging
import mmap
import os
import signal
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from queue import SimpleQueue

from process.log import emit, where
from process.sd_daemon import STOP, on_stop, tell

PR_SET_PDEATHSIG = 1  # prctl(2)
STUCK_AFTER = 15  # seconds without progress, unless told otherwise
PAUSE = 1.0  # seconds, before a child that ended is replaced

Alive = Callable[[], None]
Work = Callable[[Alive, int], None]


def run(count: int, work: Work, stuck_after: float | None = None) -> None:
    """Runs `work` in `count` processes, until SIGTERM or its like; then passes SIGTERM on and waits for them to end. So
    does each further signal.

    `work` must return on SIGTERM, and call its first argument at least every `stuck_after` seconds (STUCK_AFTER), after
    progress. The second is the process's place: 0 for the first.
    """
    patience = stuck_after or STUCK_AFTER
    stopping, signals = threading.Event(), SimpleQueue[int]()

    def stop(number: int, _: object) -> None:
        signals.put(number)
        stopping.set()

    on_stop(stop)
    seen = memoryview(mmap.mmap(-1, 8 * count)).cast("d")  # shared with the children: when each last made progress
    children: dict[int, int] = {}  # process id -> its place
    gc.collect()
    gc.freeze()  # else the first collection in a child would touch, and so copy, all that it shares
    while not stopping.is_set():
        for place in set(range(count)) - set(children.values()):
            seen[place] = time.monotonic()
            children[_fork(work, seen, place)] = place
        tell("READY=1\nWATCHDOG=1")
        turned = time.monotonic()
        stopping.wait(PAUSE)
        if time.monotonic() - turned > patience:  # this process was stopped, and its children with it
            for place in range(count):
                seen[place] = time.monotonic()
        _reap(children, seen, patience)
    tell("STOPPING=1")
    while children:
        while not signals.empty():
            signals.get()
            for child in children:
                os.kill(child, signal.SIGTERM)
        time.sleep(0.05)
        _reap(children, seen, patience)


def _fork(work: Work, seen: memoryview[float], place: int) -> int:
    parent = os.getpid()
    signal.pthread_sigmask(signal.SIG_BLOCK, STOP)  # until the child no longer has its parent's handlers
    child = os.fork()
    if not child:
        for number in STOP:
            signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP)
    if child:
        return child

    def alive() -> None:
        seen[place] = time.monotonic()

    code = 1
    try:
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() == parent:  # else it died before that, and no signal comes
            work(alive, place)
            code = 0
    except Exception as error:
        emit("crashed", logging.ERROR, where=where(error))
    finally:
        os._exit(code)


def _reap(children: dict[int, int], seen: memoryview[float], patience: float) -> None:
    """Kills the children without progress, and forgets those that have ended."""
    for child, place in children.items():
        if time.monotonic() - seen[place] > patience:
            emit("stuck", logging.ERROR, process=child)
            os.kill(child, signal.SIGKILL)
    with suppress(ChildProcessError):
        while child := os.waitpid(-1, os.WNOHANG)[0]:
            children.pop(child, None)
