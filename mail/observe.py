"""Looks now and then at what no script counts, for the charts: how much mail waits, and that Redis was restarted, this
machine's clock has stepped, or another release runs. Each e-mail worker process looks, with its sweep.
"""

from __future__ import annotations

import time
from pathlib import Path

from mail import figures
from mail.store import HOUR, RELEASE
from queues import health
from queues.jobs import Jobs

HERE = Path(__file__).resolve().parent.parent
INSTALLED = HERE.name if HERE.parent.name == "releases" else ""  # as bin/install has named it; not a checkout
STEP = 2  # seconds; what is less may be a correction by NTP


def offset() -> float:
    """Returns how far this machine's clock is from one that nobody sets."""
    return time.time() - time.monotonic()


class Observer:
    def __init__(self, jobs: Jobs) -> None:
        self.jobs = jobs
        self.offset = offset()

    def look(self) -> None:
        """Notes how much waits and what has happened since the last look. Raises `Unavailable`, redis-py's errors."""
        redis, seen = self.jobs.redis, health.state(self.jobs)
        figures.sample(redis, seen["queued"], seen["oldest_queued_seconds"] or 0)
        info = seen["info"]
        version, uptime = info.get("valkey_version") or info["redis_version"], info["uptime_in_seconds"]
        if uptime < HOUR.kept:  # the same moment at each look, and so the same mark
            figures.mark(redis, "redis_restarted", version, info["server_time_usec"] // 10**6 - uptime)
        was, self.offset = self.offset, offset()
        if abs(self.offset - was) > STEP:
            figures.mark(redis, "clock", f"{self.offset - was:+.0f} s")
        if INSTALLED and redis.set(RELEASE, INSTALLED, get=True) != INSTALLED.encode():
            figures.mark(redis, "release", INSTALLED)
