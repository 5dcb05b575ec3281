"""What is counted for ever: mails accepted and what became of them, attempts, and how long SMTP and accepting took.

All of it is one hash in Redis, `mail:totals`, so that any process of any machine tells the same; web.metrics shows it
to Prometheus. Totals are counted by the scripts that make them true (accept, settle, cancel, sweep), behind the place
where a second run after a lost reply turns back: they cost no round trip and are counted once. What the API took for
its answers is gathered in the process and handed over every 15 seconds, so that no request waits for it; a kill loses
the last of these figures, and of nothing else.

Fields: `accepted`, RESULTS, `delayed`, `in_doubt`, `attempt:<verdict>`, and of a histogram `<name>:<bound in seconds>`
(each observation in the first that holds it) and `<name>:us` (their sum in microseconds).
"""

from __future__ import annotations

import threading
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple

from mail.states import EXPIRED, FINAL
from mail.store import TOTALS
from queues.connection import Redis, RedisError, translating_errors
from queues.heartbeat import on_heartbeat

RESULTS = (*FINAL, EXPIRED)  # what became of a mail; sent again, it has two
VERDICTS = ("accepted", "try_again", "refused", "trouble", "in_doubt", "interrupted")  # what came of an attempt


class Histogram(NamedTuple):
    """`bounds` are in seconds; whatever is longer than the last is in one more, `inf`."""

    name: str
    bounds: tuple[float, ...]

    @property
    def sum_field(self) -> str:
        return f"{self.name}:us"

    @property
    def fields(self) -> list[str]:
        return [f"{self.name}:{bound:g}" for bound in (*self.bounds, float("inf"))]

    def note(self, seconds: float, counts: Counter[str]) -> None:
        counts[f"{self.name}:{(*self.bounds, float('inf'))[bisect_left(self.bounds, seconds)]:g}"] += 1
        counts[self.sum_field] += round(seconds * 1_000_000)


SMTP = Histogram("smtp", (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120))
ACCEPT = Histogram("accept", (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5))


def totals(redis: Redis) -> Counter[str]:
    """Returns every total, by its field. Raises `Unavailable`."""
    with translating_errors():
        stored: Any = redis.hgetall(TOTALS)
    return Counter({field.decode(): int(number) for field, number in stored.items()})


class Gathered:
    """What a histogram has seen in this process and Redis has not been told yet."""

    def __init__(self, redis: Redis, histogram: Histogram) -> None:
        self.redis = redis
        self.histogram = histogram
        self.counts: Counter[str] = Counter()
        self.lock = threading.Lock()

    def add(self, seconds: float) -> None:
        with self.lock:
            self.histogram.note(seconds, self.counts)

    def hand_over(self) -> None:
        """Raises redis-py's errors; then it is tried again with the next."""
        with self.lock:
            counts, self.counts = self.counts, Counter()
        if not counts:
            return
        try:
            with self.redis.pipeline(transaction=False) as commands:
                for field, number in counts.items():
                    commands.hincrby(TOTALS, field, number)
                commands.execute()
        except RedisError:
            with self.lock:
                self.counts += counts
            raise

    @contextmanager
    def handed_over(self) -> Iterator[None]:
        """Now and then while the body runs, and at its end."""
        try:
            with on_heartbeat(self.hand_over):
                yield
        finally:
            with suppress(RedisError):
                self.hand_over()
