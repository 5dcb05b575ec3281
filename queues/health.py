"""Reads the state of the queues for readyz, metrics and the doctor.

Uses commands that change nothing and whose time does not grow with the queue: RQ's own counting and listing run
cleanups, which can queue a job a second time.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from datetime import datetime
from typing import Any, NamedTuple

from queues import keys
from queues.connection import Unavailable, translating_errors
from queues.heartbeat import HEARTBEAT_SECONDS, LEASE_SECONDS
from queues.jobs import Jobs
from queues.replication import Replication
from queues.table import BULK, EMAIL

IN_STEP = 3  # seconds since the primary last heard of a replica what it has
# Where in a queue to look for the job that waits longest. The first is it, but for mails of priority `high`, of which
# the newest is the first; so more are looked at, the more the further back.
PLACES = (*(2**n - 1 for n in range(18)), -1)


class QueueState(NamedTuple):
    """A queue in numbers: its jobs by state and the workers with a recent heartbeat; in seconds the age of the job that
    waits longest, how late the scheduler is, and how far the last heartbeat is in the future."""

    jobs: dict[str, int]
    workers: int
    oldest_queued: float | None
    overdue: float
    ahead: float = 0


class Replicas(NamedTuple):
    """Says whether what is written outlives the primary: the `role` of who answers; how many replicas must confirm, are
    in step, and are known; how many of so many Sentinels answer; `why` nothing is confirmed now, "" if it is."""

    role: str
    needed: int
    in_step: int
    known: int
    sentinels: int
    of_sentinels: int
    why: str = ""

    @property
    def shown(self) -> dict[str, Any]:
        """Returns what the API shows."""
        return {name: one for name, one in self._asdict().items() if name != "why"} | {"confirms": not self.why}

    @property
    def trouble(self) -> str:
        """Returns why nothing is confirmed, as a sentence; "" if it is."""
        if not self.why:
            return ""
        if self.in_step < self.needed:
            return f"of the replicas that must confirm what is written ({self.needed}), {self.in_step} are in step"
        if self.of_sentinels and self.sentinels <= self.of_sentinels // 2:
            return f"only {self.sentinels} of {self.of_sentinels} Sentinels answer, so what is written is not confirmed"
        return f"nothing is confirmed ({self.why})"


def replicas(jobs: Jobs, info: Mapping[str, Any]) -> Replicas | None:
    """Returns None where neither REDIS_REPLICAS nor Sentinels are used, and asks nothing then. Else writes nothing that
    is kept, and takes a second where a replica or a Sentinel is away. `info` is Redis' INFO."""
    needed, primary = jobs.replication.replicas, jobs.replication.primary
    if not (needed or primary):
        return None
    each = [one for name, one in info.items() if name[:5] == "slave" and isinstance(one, dict) and "lag" in one]
    in_step = sum(one.get("state") == "online" and int(one["lag"]) <= IN_STEP for one in each)
    said = primary.survey() if primary else []
    known = max((int(one.get("num-slaves", 0)) for one in said), default=needed)
    of_sentinels = len(primary.clients) if primary else 0
    role = "primary" if info.get("role", "master") == "master" else "replica"
    return Replicas(role, needed, in_step, known, len(said), of_sentinels, why_unconfirmed(jobs.replication))


def why_unconfirmed(replication: Replication) -> str:
    """Returns why what is written now would not be confirmed; "" if it would."""
    try:
        with translating_errors():
            replication.confirm()
    except Unavailable as error:
        return str(error)
    return ""


def state(jobs: Jobs) -> dict[str, Any]:
    """Returns Redis' INFO and the state of the mail queue."""
    with translating_errors():
        info, seen = jobs.redis.info(), _queue_state(jobs, EMAIL)
    return {
        "info": info,
        "queued": seen.jobs["queued"] + seen.jobs["bulk"],
        "workers": seen.workers,
        "oldest_queued_seconds": seen.oldest_queued,
        "overdue_seconds": seen.overdue,
    }


def queue_states(jobs: Jobs) -> dict[str, QueueState]:
    with translating_errors():
        return {name: _queue_state(jobs, name) for name in jobs.queues}


def _queue_state(jobs: Jobs, name: str) -> QueueState:
    pipe = jobs.redis.pipeline(transaction=False)
    pipe.llen(keys.queue(name))
    for registry in (keys.scheduled, keys.started, keys.failed, keys.deferred):
        pipe.zcard(registry(name))
    pipe.llen(keys.queue(BULK))
    for place in PLACES:
        pipe.lindex(keys.queue(name), place)
    pipe.zrange(keys.scheduled(name), 0, 0, withscores=True)
    pipe.smembers(keys.workers(name))
    pipe.smembers(keys.LIMITS)
    *counts, bulk = (seen := pipe.execute())[:6]
    *heads, first, workers, limits = seen[6:]
    for head in heads:
        pipe.hget(keys.job(head.decode(errors="replace") if head else ""), "enqueued_at")
    for worker in workers:
        pipe.hget(worker, "last_heartbeat")
    for limit in limits:
        if limit.startswith(f"{name}:".encode()):
            pipe.zcard(keys.waiting(limit.decode(errors="replace")))
    seen = pipe.execute()
    queued = map(age, seen[: len(heads)])
    beats = [one for beat in seen[len(heads) : len(heads) + len(workers)] if (one := seconds_since(beat)) is not None]
    counts.append(sum(seen[len(heads) + len(workers) :]))
    states = ("queued", "scheduled", "started", "failed", "deferred", "rate_limited")
    return QueueState(
        jobs=dict(zip(states, counts, strict=True)) | ({"bulk": bulk} if name == EMAIL else {}),
        workers=sum(one < LEASE_SECONDS + HEARTBEAT_SECONDS for one in beats),
        oldest_queued=max((one for one in queued if one is not None), default=None),
        overdue=round(max(0.0, time.time() - first[0][1]), 3) if first else 0,
        ahead=max(0.0, -min(beats, default=0.0)),
    )


def age(moment: bytes | None) -> float | None:
    """Returns the seconds since a moment that RQ has written, 0 if that is to come; None if it is none."""
    seconds = seconds_since(moment)
    return None if seconds is None else max(0.0, seconds)


def seconds_since(moment: bytes | None) -> float | None:
    try:
        written = datetime.fromisoformat((moment or b"").decode().replace("Z", "+00:00"))
    except ValueError:
        return None
    return round(time.time() - written.timestamp(), 3)
