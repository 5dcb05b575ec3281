"""How many sessions all workers have with the relay: each process writes its own down, and who looks adds them up.

`relay:sessions` is a hash: `<host>:<pid>` -> how many are busy with a mail, how many are kept for the next, and when
that was so, in seconds since 1970. What is older than FRESH is of a process that has ended.
"""

from __future__ import annotations

import os
import re
import socket
import time
from typing import TYPE_CHECKING, Any, NamedTuple

from queues.connection import Redis, translating_errors

if TYPE_CHECKING:  # the dashboard reads the tally, and has no pool
    from smtp.pool import SessionPool

SESSIONS = "relay:sessions"
EVERY = 15  # seconds; sooner where the figures have changed
FRESH = 60  # seconds


class Sessions(NamedTuple):
    busy: int
    idle: int


class Tally:
    """Writes down how many sessions this process has."""

    def __init__(self, pool: SessionPool) -> None:
        self.pool = pool
        self.name = f"{socket.gethostname()}:{os.getpid()}"
        self.written: tuple[object, float] = (None, 0)  # the figures, and when, of time.monotonic()

    def write(self, redis: Redis) -> None:
        """Writes the figures, or adds that to a pipeline, if it is due: a full Redis is not asked more than need be."""
        figures = Sessions(*self.pool.counts())
        if self.written[0] != figures or time.monotonic() - self.written[1] >= EVERY:
            self.written = (figures, time.monotonic())
            redis.hset(SESSIONS, self.name, f"{figures.busy} {figures.idle} {time.time():.0f}")

    def erase(self, redis: Redis) -> None:
        redis.hdel(SESSIONS, self.name)

    def forget_ended(self, redis: Redis) -> None:
        """Drops the figures of processes that have ended without a word."""
        ended = [name for name, figures in _stored(redis).items() if not figures]
        if ended:
            redis.hdel(SESSIONS, *ended)


def sessions(redis: Redis) -> Sessions:
    """Returns how many sessions all workers have. Raises `Unavailable`."""
    with translating_errors():
        found = [one for one in _stored(redis).values() if one]
    return Sessions(sum(one.busy for one in found), sum(one.idle for one in found))


def _stored(redis: Redis) -> dict[Any, Sessions | None]:
    """Returns the figures of each process, None where they are stale."""
    stored: Any = redis.hgetall(SESSIONS)
    found = {name: re.fullmatch(rb"(\d{1,9}) (\d{1,9}) (\d{1,12})", value) for name, value in stored.items()}
    now = time.time()  # behind which a clock that was set back may have left them
    return {
        name: Sessions(int(one[1]), int(one[2])) if one and abs(now - int(one[3])) <= FRESH else None
        for name, one in found.items()
    }
