"""The totals, counted for ever: mails accepted, how they ended, attempts, and how long SMTP, accepting and all took.

All of it is one hash in Redis, `mail:totals`, the same for every process of every machine; web.metrics shows it to
Prometheus. Totals are counted by the scripts that make them true (accept, settle, cancel, sweep), behind the place
where a second run after a lost reply turns back: they cost no round trip and are counted once. The time that the API
takes for its answers is gathered in the process and handed over every 15 seconds, so that no request waits for it; a
kill loses the last of these figures, and of nothing else.

Fields: `accepted`, RESULTS, `delayed`, `in_doubt`, `attempt:<verdict>`, of each of several relays
`relay:<name>:<verdict>`, and of a histogram `<name>:<bound in seconds>` (each observation in the first that holds it)
and `<name>:us` (their sum in microseconds).
"""

from __future__ import annotations

import math
import threading
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple

from mail.states import EXPIRED, FINAL, TEST
from mail.store import TOTALS
from queues.connection import Redis, RedisError, translating_errors
from queues.heartbeat import on_heartbeat
from smtp.policy import Verdict

RESULTS = (*FINAL, EXPIRED, TEST)  # how a mail ended; sent again, it has two
# How an attempt ended; `interrupted`: with its worker.
VERDICTS = (*(verdict.value.replace(" ", "_") for verdict in Verdict), "interrupted")


class Histogram(NamedTuple):
    """Names the fields of a histogram. `bounds` are in seconds; one more field, `inf`, has what exceeds the last."""

    name: str
    bounds: tuple[float, ...]

    @property
    def sum_field(self) -> str:
        return f"{self.name}:us"

    @property
    def fields(self) -> list[str]:
        return [f"{self.name}:{bound:g}" for bound in (*self.bounds, float("inf"))]

    def note(self, seconds: float, counts: Counter[str]) -> None:
        bound = (*self.bounds, float("inf"))[bisect_left(self.bounds, seconds)]
        counts[f"{self.name}:{bound:g}"] += 1
        counts[self.sum_field] += round(seconds * 1_000_000)


SMTP = Histogram("smtp", (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120))
# fmt: off
DELIVERED = Histogram("delivered", (  # from accept, or its scheduled_at, or asking again, until the relay has taken it
    0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 900, 1800, 3600, 3 * 3600, 6 * 3600, 12 * 3600, 86400,
))
# fmt: on
ACCEPT = Histogram("accept", (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5))


def totals(redis: Redis) -> Counter[str]:
    """Returns every total, by its field. Raises `Unavailable`."""
    with translating_errors():
        stored: Any = redis.hgetall(TOTALS)
    return Counter({field.decode(errors="replace"): int(number(count)) for field, count in stored.items()})


def number(stored: bytes | str | None) -> float:
    """Returns a figure that Redis holds; 0 for what is none."""
    with suppress(ValueError):
        if math.isfinite(found := float(stored or 0)):
            return found
    return 0.0


class Gathered:
    """Gathers a histogram's observations in this process until Redis has them."""

    def __init__(self, redis: Redis, histogram: Histogram) -> None:
        self.redis = redis
        self.histogram = histogram
        self.counts: Counter[str] = Counter()
        self.lock = threading.Lock()

    def add(self, seconds: float) -> None:
        with self.lock:
            self.histogram.note(seconds, self.counts)

    def hand_over(self) -> None:
        """Adds them to the totals. Raises redis-py's errors, and then keeps them for the next time."""
        with self.lock:
            counts, self.counts = self.counts, Counter()
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
        """Hands over now and then while the body runs, and at its end."""
        try:
            with on_heartbeat(self.hand_over):
                yield
        finally:
            with suppress(RedisError):
                self.hand_over()
