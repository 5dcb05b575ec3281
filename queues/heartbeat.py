"""Renews leases: the recovery budget of everything that can die.

A lease that is not renewed for LEASE_SECONDS belongs to a dead worker. Heartbeats come every HEARTBEAT_SECONDS, so two
may be lost in a row.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from operator import attrgetter

# The recovery budget, in seconds: a killed worker's mail goes out within 120. RQ's defaults add up to 27 minutes.
LEASE_SECONDS = 45  # without a heartbeat, a worker and its claim on a mail count as dead
HEARTBEAT_SECONDS = 15  # between heartbeats
WORKER_TTL = 35  # RQ waits 15 less for a job
LOCKED_FOR = 15  # a dead worker's locks keep others from its duties
MAINTENANCE_EVERY = 20  # between searches for what a killed worker left


@dataclass(eq=False)
class Heartbeat:
    """A call that is due every `HEARTBEAT_SECONDS`; `due` is of time.monotonic()."""

    publish: Callable[[], object]
    due: float


class Heartbeats:
    """Publishes all heartbeats of this process from one thread: one each would cost more than the mail."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.all: set[Heartbeat] = set()
        self.thread: threading.Thread | None = None

    @contextmanager
    def on_heartbeat(self, publish: Callable[[], object]) -> Iterator[None]:
        """Calls `publish` every `HEARTBEAT_SECONDS`, from a thread, while the body runs. One that raises is tried again
        a second later; if none comes through, the lease ends. It should use a `fail_fast` client."""
        heartbeat = Heartbeat(publish, time.monotonic() + HEARTBEAT_SECONDS)
        with self.lock:
            self.all.add(heartbeat)
            if not self.thread or not self.thread.is_alive():
                self.thread = threading.Thread(target=self._run, name="heartbeats", daemon=True)
                self.thread.start()
        try:
            yield
        finally:
            with self.lock:
                self.all.remove(heartbeat)

    def _run(self) -> None:
        while True:
            time.sleep(min(1, HEARTBEAT_SECONDS))
            with self.lock:
                due = sorted(self.all, key=attrgetter("due"))
            for one in due:
                if one.due <= time.monotonic() and one in self.all:
                    one.due = time.monotonic() + HEARTBEAT_SECONDS
                    try:
                        one.publish()
                    except Exception:  # whatever it was, the other heartbeats must not end with it
                        one.due = time.monotonic() + 1


on_heartbeat = Heartbeats().on_heartbeat
