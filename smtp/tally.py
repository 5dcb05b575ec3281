"""How many sessions all workers have with a relay: each process writes its own down, and who looks adds them up.

`relay:sessions`, or `relay:<name>:sessions`, is a hash: `<host>:<pid>` -> how many are busy with a mail, how many are
kept for the next, and when that was so, in seconds since 1970. What is older than FRESH is of a process that has ended.
"""

from __future__ import annotations

import os
import re
import socket
import time
from collections.abc import Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple

from process.relays import ONLY
from queues.connection import Redis, translating_errors
from smtp.pacing import key_prefix

if TYPE_CHECKING:  # the dashboard reads the tally, and has no pool
    from smtp.pool import SessionPool
    from smtp.relay import Relay

EVERY = 15  # seconds; sooner where the figures have changed
FRESH = 60  # seconds


class Sessions(NamedTuple):
    busy: int
    idle: int


def key_of(name: str) -> str:
    return f"{key_prefix(name)}:sessions"


class Tally:
    """Writes down how many sessions this process has, with each of the relays by name; None stands for any."""

    def __init__(self, pool: SessionPool, relays: Mapping[str, Relay | None] = MappingProxyType({ONLY: None})) -> None:
        self.pool = pool
        self.relays = relays
        self.name = f"{socket.gethostname()}:{os.getpid()}"
        self.written: dict[str, tuple[Sessions, float]] = {}  # the figures, and when, of time.monotonic()

    def write(self, redis: Redis) -> None:
        """Writes the figures, or adds that to a pipeline, if it is due: a full Redis is not asked more than need be."""
        for name, relay in self.relays.items():
            figures, (last, at) = Sessions(*self.pool.counts(relay)), self.written.get(name, (None, 0))
            if last != figures or time.monotonic() - at >= EVERY:
                self.written[name] = (figures, time.monotonic())
                redis.hset(key_of(name), self.name, f"{figures.busy} {figures.idle} {time.time():.0f}")

    def erase(self, redis: Redis) -> None:
        for name in self.relays:
            redis.hdel(key_of(name), self.name)

    def forget_ended(self, redis: Redis) -> None:
        """Drops the figures of processes that have ended without a word."""
        for name in self.relays:
            ended = [process for process, figures in _stored(redis, name).items() if not figures]
            if ended:
                redis.hdel(key_of(name), *ended)


def sessions(redis: Redis, name: str = ONLY) -> Sessions:
    """Returns how many sessions all workers have with a relay. Raises `Unavailable`."""
    with translating_errors():
        found = [one for one in _stored(redis, name).values() if one]
    return Sessions(sum(one.busy for one in found), sum(one.idle for one in found))


def _stored(redis: Redis, name: str) -> dict[Any, Sessions | None]:
    """Returns the figures of each process, None where they are stale."""
    stored: Any = redis.hgetall(key_of(name))
    found = {name: re.fullmatch(rb"(\d{1,9}) (\d{1,9}) (\d{1,12})", value) for name, value in stored.items()}
    now = time.time()  # behind which a clock that was set back may have left them
    return {
        name: Sessions(int(one[1]), int(one[2])) if one and abs(now - int(one[3])) <= FRESH else None
        for name, one in found.items()
    }
