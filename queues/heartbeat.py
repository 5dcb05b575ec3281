"""Leases, and the one thread of a process that renews them: the recovery budget of everything that can die.

A lease that is not renewed for LOST_AFTER seconds belongs to a dead worker. Heartbeats come every BEAT seconds, so two
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
LOST_AFTER = 45  # without a heartbeat, a worker and its claim on a mail count as dead
BEAT = 15  # between heartbeats
WORKER_TTL = 35  # less 15, RQ waits so long for a job
LOCKED_FOR = 15  # for which a dead worker goes on keeping others from its duties
MAINTENANCE_EVERY = 20  # what a killed worker left is looked for


class _Heart:
    """Gives all the signs of life of this process, from one thread: one each would cost more than the mail. Each in its
    turn; one that could not be given is tried again a second later, after those that are due."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.due: dict[int, tuple[float, Callable[[], object]]] = {}  # when, and what
        self.thread: threading.Thread | None = None

    def take(self, sign_of_life: Callable[[], object]) -> int:
        with self.lock:
            self.due[id(sign_of_life)] = (time.monotonic() + BEAT, sign_of_life)
            if not self.thread or not self.thread.is_alive():
                self.thread = threading.Thread(target=self._beat, name="heart", daemon=True)
                self.thread.start()
        return id(sign_of_life)

    def _beat(self) -> None:
        while True:
            time.sleep(min(1, BEAT))
            while self._beat_once():
                pass

    def _beat_once(self) -> bool:
        """False where nothing is due, or it could not be given."""
        with self.lock:
            moment, sign_of_life = min(self.due.values(), key=itemgetter(0), default=(math.inf, None))
        if sign_of_life is None or moment > time.monotonic():
            return False
        try:
            sign_of_life()
            pause = BEAT
        except Exception:  # whatever it was, the other signs must not end with it
            pause = 1
        with self.lock:
            if id(sign_of_life) in self.due:
                self.due[id(sign_of_life)] = (time.monotonic() + pause, sign_of_life)
        return pause == BEAT


_heart = _Heart()


@contextmanager
def beating(sign_of_life: Callable[[], object]) -> Iterator[None]:
    """Gives the sign every `BEAT` seconds, from a thread, for as long as the body runs. One that Redis does not take is
    tried again; if none comes through, that is what `LOST_AFTER` is for. It should use an `impatient` client."""
    taken = _heart.take(sign_of_life)
    try:
        yield
    finally:
        with _heart.lock:
            del _heart.due[taken]
