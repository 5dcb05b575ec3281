"""What would end RQ's walk over a queue's registries is taken out of them, so that the walk goes on for all the others.

RQ reads the jobs of a registry one after the other, and one that it cannot read ends its scheduler, its maintenance or
its worker: each time, for as long as it is there. `jobs.Job` says which these are. Where RQ reads them with the
worker's own class of job, they are set aside then; here is the rest: RQ's scheduler, which has a class of its own, and
entries that name no job.

What was taken out is said in the log (`unreadable`).
"""

from __future__ import annotations

import logging
import math
import re
import time
from typing import Any

import rq
from redis.exceptions import ResponseError
from rq.exceptions import NoSuchJobError

import events
import jobs

AT_ONCE = 1000  # entries of a registry that are looked at in one go, as many as RQ's scheduler takes
JOB, EXECUTION = re.compile(rb"[\w-]+"), re.compile(rb"[\w-]+:[\w-]+")  # what RQ writes into a registry


def sift(queue: rq.Queue) -> bool:
    """Looks where RQ is about to walk. Returns whether there was anything to take out."""
    redis, name, now = queue.connection, queue.name, time.time()
    popped: list[Any] = redis.lrange(queue.intermediate_queue_key, 0, -1)
    taken_out = sum(int(redis.lrem(queue.intermediate_queue_key, 0, one)) for one in _foreign(popped, JOB))
    for key, until, shape in (
        (f"rq:wip:{name}", math.inf, EXECUTION),
        (f"rq:scheduled:{name}", now, JOB),
        (f"rq:ready:{name}", now, JOB),
    ):
        entries: list[Any] = redis.zrangebyscore(key, 0, until, start=0, num=AT_ONCE)
        foreign = _foreign(entries, shape)
        taken_out += sum(int(redis.zrem(key, one)) for one in foreign)
        ids = [one.split(b":")[0].decode() for one in entries if one not in foreign]
        taken_out += len(_unreadable(queue, ids))
    return taken_out > 0


def _foreign(entries: list[Any], shape: re.Pattern[bytes]) -> list[Any]:
    foreign = [one for one in entries if not shape.fullmatch(one)]
    for _ in foreign:
        events.emit("unreadable", logging.ERROR, reason="an entry of a registry that names no job")
    return foreign


def _unreadable(queue: rq.Queue, ids: list[str]) -> list[str]:
    """Those of the jobs that cannot be read, which `fetch` of the worker's class has set aside."""
    try:
        queue.job_class.fetch_many(
            ids, queue.connection, queue.serializer
        )  # one round trip: nearly always, all is well
        return []
    except (jobs.Unreadable, ResponseError):  # no hash, or Redis cannot answer now and will say so again
        return [job_id for job_id in ids if _is_unreadable(queue, job_id)]


def _is_unreadable(queue: rq.Queue, job_id: str) -> bool:
    try:
        queue.job_class.fetch(job_id, queue.connection, queue.serializer)
    except NoSuchJobError as error:
        return isinstance(error, jobs.Unreadable)
    return False
