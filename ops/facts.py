"""Gathers what the sentence about the service is judged from (condition.py): what Redis knows, its disk, the clocks.

Reads only, in a dozen round trips whose time does not grow with the queue. While Redis cannot be asked, the reason is
the only fact, beside those of this machine.
"""

from __future__ import annotations

import shutil
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from mail import figures
from mail.counters import number
from mail.outbox import Outbox
from mail.states import LETTERS, State
from mail.store import INDEX, LAST_SENT, OPEN
from ops.checks import store
from ops.checks.target import Target
from process.relays import ONLY
from queues import health, keys
from queues.connection import Redis, Unavailable, translating_errors
from queues.health import QueueState, Replicas
from queues.table import EMAIL
from settings import Settings
from smtp.pacing import BREAKER, Standing, key_prefix, read_standing
from smtp.published import NAMES, Published, read
from webhooks.queue import Standing as Endpoint
from webhooks.queue import standings

ROOT = Path(__file__).parent.parent
RECENT, HOUR = 10, 60  # minutes of which figures are looked at
STEP = 2.0  # seconds by which a clock is off or was set


class At(NamedTuple):
    """Holds how one of several relays stands, and its last turn that was given to a mail that is not bulk."""

    relay: Published
    standing: Standing | None = None
    rate_until: float = 0


@dataclass(frozen=True)
class Facts:
    """Holds what is known at `now`. Moments are in seconds since 1970, and 0 where there is none."""

    now: float
    settings: Settings
    target: Target = field(default_factory=lambda: Target(ROOT))
    unavailable: str = ""  # why Redis cannot be asked
    info: Mapping[str, Any] = field(default_factory=dict)  # Redis' own
    disk_free: int | None = None  # bytes where its file is, if that can be seen from here
    skew: float = 0  # seconds that Redis' clock is ahead of ours
    clock_set: tuple[float, float] = (0, 0)  # by how many seconds ours was set, and when
    queues: Mapping[str, QueueState] = field(default_factory=dict)
    replicas: Replicas | None = None  # of Redis, where it has some, or Sentinels
    standing: Standing | None = None  # of the relay of SMTP_HOST
    relays: tuple[At, ...] = ()  # those of RELAYS
    suspended: bool = False
    has_scheduler: bool = True
    overdue: int = 0  # mails that the scheduler should have queued
    in_hand: int = 0  # mails that a living worker has
    waiting: int = 0  # mails, wherever they wait, but for those that are scheduled
    in_doubt: int = 0  # mails that are held
    rate_until: float = 0  # the last turn under SMTP_RATE that was given to a mail that is not bulk
    last_sent: float = 0
    to_sweep: float = 0  # since when the sweep should have looked at a mail
    recent: Counter[str] = field(default_factory=Counter)  # the figures of the last minutes
    today: Counter[str] = field(default_factory=Counter)
    webhooks: Sequence[Endpoint] = ()  # the endpoints that are told what becomes of mails
    longest: float = 0  # seconds that a mail has waited in the queue, in the last hour


class Clock:
    """Notices that this machine's clock was set: between two looks it has gone on for longer, or shorter, than time
    has."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.offset = self._offset()
        self.set = (0.0, 0.0)

    @staticmethod
    def _offset() -> float:
        steady = getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)  # goes on while a laptop sleeps
        return time.time() - time.clock_gettime(steady)

    def look(self) -> tuple[float, float]:
        """Returns by how many seconds it was last set, and when."""
        with self.lock:
            offset = self._offset()
            if abs(offset - self.offset) > STEP:
                self.set = (offset - self.offset, time.time())
            self.offset = offset
            return self.set


CLOCK = Clock()  # of this process


def gather(outbox: Outbox, target: Target | None = None) -> Facts:
    """Returns the facts of this moment. Raises redis-py's error if Redis answers what nobody expects."""
    redis, settings, target = outbox.jobs.redis, outbox.settings, target or Target(ROOT)
    clock_set, known = CLOCK.look(), {}
    try:
        with translating_errors():
            known = _from_redis(redis) | {"disk_free": _disk_free(redis, settings, target)}
            known["webhooks"] = standings(redis)
        known["queues"] = health.queue_states(outbox.jobs)
        known["replicas"] = health.replicas(outbox.jobs, known["info"])
        known |= _from_figures(redis, known["queues"][EMAIL])
    except Unavailable as why:
        known = {"unavailable": str(why)}
    return Facts(time.time(), settings, target, clock_set=clock_set, **known)


def _from_redis(redis: Redis) -> dict[str, Any]:
    before = time.time()
    pipe: Any = redis.pipeline(transaction=False)  # a full Redis refuses a transaction, even to read
    pipe.info().time().hgetall(BREAKER).exists(keys.SUSPENDED).exists(keys.scheduler_lock(EMAIL))
    pipe.zcount(keys.scheduled(EMAIL), "-inf", before).zcount(keys.started(EMAIL), before, "+inf")
    for state in (State.QUEUED, State.DELAYED, State.UNKNOWN):
        letter = LETTERS[state].encode()
        pipe.zlexcount(INDEX, b"[s" + letter, b"(s" + bytes([letter[0] + 1]))
    for told in ("told", "told_again"):
        pipe.lindex(f"{key_prefix(ONLY)}:{told}", 0)
    pipe.get(LAST_SENT).zrange(OPEN, 0, 0, withscores=True).hgetall(NAMES)
    seen: list[Any] = pipe.execute(raise_on_error=False)
    middle = (before + time.time()) / 2
    for error in seen[1:]:  # INFO may be forbidden
        if isinstance(error, Exception):
            raise error
    info, (seconds, micros), breaker, suspended, lock, overdue, in_hand, queued, delayed, in_doubt, *rest = seen
    *turns, last_sent, to_sweep, names = rest
    relays = read(names)
    return {
        "info": info if isinstance(info, dict) else {},
        "skew": seconds + micros / 1e6 - middle,
        "standing": read_standing(breaker) if relays[0].is_only else None,
        "relays": () if relays[0].is_only else tuple(at(redis, relays)),
        "suspended": bool(suspended),
        "has_scheduler": bool(lock),
        "overdue": overdue,
        "in_hand": in_hand,
        "waiting": queued + delayed,
        "in_doubt": in_doubt,
        "rate_until": max(map(number, turns)) / 1000 if relays[0].is_only else 0,
        "last_sent": number(last_sent),
        "to_sweep": to_sweep[0][1] if to_sweep else 0,
    }


def at(redis: Redis, relays: Sequence[Published]) -> Iterator[At]:
    """Yields how each of the relays stands. Raises redis-py's errors."""
    pipe: Any = redis.pipeline(transaction=False)
    for one in relays:
        key = key_prefix(one.name)
        pipe.hgetall(f"{key}:breaker").lindex(f"{key}:told", 0).lindex(f"{key}:told_again", 0)
    seen = pipe.execute()
    for place, one in enumerate(relays):
        breaker, *turns = seen[3 * place : 3 * place + 3]
        yield At(one, read_standing(breaker), max(map(number, turns)) / 1000)


def _disk_free(redis: Redis, settings: Settings, target: Target) -> int | None:
    """Returns the bytes that are free where Redis has its file; None if that is elsewhere or cannot be seen."""
    at = store.address(settings)
    if not at.is_here:
        return None
    folder = target.redis_data if at.is_our_own else store.folder(redis, target)
    try:
        return shutil.disk_usage(folder).free if folder else None
    except OSError:
        return None


def _from_figures(redis: Redis, queue: QueueState) -> dict[str, Any]:
    minutes = figures.minutes(redis, HOUR)
    today, _ = figures.days(redis)
    longest = max([queue.oldest_queued or 0, *(one.counts["oldest"] for one in minutes)])
    recent = sum((one.counts for one in minutes[-RECENT:]), Counter[str]())
    return {"recent": recent, "today": today, "longest": longest}
