"""Leases, and the one thread of a process that renews them: the recovery budget of everything that can die.

A lease that is not renewed for LEASE_SECONDS belongs to a dead worker. Heartbeats come every HEARTBEAT_SECONDS, so two
may be lost in a row.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from operator import itemgetter

# The recovery budget, in seconds: a killed worker's mail goes out within 120. RQ's defaults add up to 27 minutes.
LEASE_SECONDS = 45  # without a heartbeat, a worker and its claim on a mail count as dead
HEARTBEAT_SECONDS = 15  # between heartbeats
WORKER_TTL = 35  # less 15, RQ waits so long for a job
LOCKED_FOR = 15  # for which a dead worker goes on keeping others from its duties
MAINTENANCE_EVERY = 20  # what a killed worker left is looked for


class Heartbeats:
    """Publishes all heartbeats of this process, one after the other, from one thread: one each would cost more than the
    mail. One that fails is tried again a second later, after those that are due."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.due: dict[int, tuple[float, Callable[[], object]]] = {}  # when, and what
        self.thread: threading.Thread | None = None

    def take(self, publish: Callable[[], object]) -> int:
        with self.lock:
            self.due[id(publish)] = (time.monotonic() + HEARTBEAT_SECONDS, publish)
            if not self.thread or not self.thread.is_alive():
                self.thread = threading.Thread(target=self._beat, name="heart", daemon=True)
                self.thread.start()
        return id(publish)

    def _beat(self) -> None:
        while True:
            time.sleep(min(1, HEARTBEAT_SECONDS))
            while self._beat_once():
                pass

    def _beat_once(self) -> bool:
        """False where nothing is due, or it could not be given."""
        with self.lock:
            moment, publish = min(self.due.values(), key=itemgetter(0), default=(math.inf, None))
        if publish is None or moment > time.monotonic():
            return False
        try:
            publish()
            pause = HEARTBEAT_SECONDS
        except Exception:  # whatever it was, the other signs must not end with it
            pause = 1
        with self.lock:
            if id(publish) in self.due:
                self.due[id(publish)] = (time.monotonic() + pause, publish)
        return pause == HEARTBEAT_SECONDS


_heartbeats = Heartbeats()


@contextmanager
def on_heartbeat(publish: Callable[[], object]) -> Iterator[None]:
    """Calls `publish` every `HEARTBEAT_SECONDS`, from a thread, while the body runs. One that raises is tried again; if
    none comes through, the lease ends. It should use a `fail_fast` client."""
    taken = _heartbeats.take(publish)
    try:
        yield
    finally:
        with _heartbeats.lock:
            del _heartbeats.due[taken]
