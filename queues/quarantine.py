"""Sets aside jobs that RQ cannot read, and entries of its registries that name no job, so that the others go on.

RQ reads the jobs of a registry one after the other, and an unreadable one ends its scheduler, maintenance or worker
each time, for as long as it is there. `StrictJob` finds them where RQ reads with the worker's own job class; `sift`
looks where RQ uses a class of its own.

All of it is logged (`unreadable`); a job is kept at `jobs:unreadable:<id>` for two weeks.
"""

from __future__ import annotations

import logging
import math
import re
import time
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import rq
import rq.job
from redis import Redis
from redis.exceptions import ResponseError
from rq.exceptions import DeserializationError, NoSuchJobError, TimeoutFormatError
from rq.job import JOB_ID_PATTERN, parse_job_id

from process.log import emit
from process.values import LONGEST_DURATION
from queues import keys
from queues.connection import Script, is_wrong_type
from queues.keys import TAG

UNREADABLE = f"{TAG}jobs:unreadable"  # sorted set: ids of jobs set aside, by when; the hashes are at <this>:<id>
UNREADABLE_KEPT = 14 * 86400  # seconds

# KEYS: job, its new key, UNREADABLE. ARGV: job id, now, lifetime in seconds, how many ids are kept. Returns 0 if
# another was quicker.
SET_ASIDE = """
if redis.call('EXISTS', KEYS[1]) == 0 then return 0 end
redis.call('RENAME', KEYS[1], KEYS[2])
redis.call('EXPIRE', KEYS[2], ARGV[3])
redis.call('ZADD', KEYS[3], ARGV[2], ARGV[1])
redis.call('ZREMRANGEBYSCORE', KEYS[3], '-inf', ARGV[2] - ARGV[3])
redis.call('ZREMRANGEBYRANK', KEYS[3], 0, -1 - ARGV[4])
return 1
"""


class Unreadable(NoSuchJobError):
    """A job's key holds no job that RQ can work with. RQ takes this for a job that does not exist."""


# What reading a damaged job raises. Nothing else is taken for damage: an exception may also come out of a signal.
DAMAGED = (
    *(ValueError, TypeError, LookupError, AttributeError, AssertionError, ArithmeticError, RecursionError),
    TimeoutFormatError,
)


class StrictJob(rq.job.Job):
    """Refuses what RQ would read and then fail at, outside of the job's own attempt."""

    @classmethod
    def fetch(cls, id: str, connection: Redis | None = None, serializer: Any = None) -> StrictJob:
        """Returns a job. Raises `NoSuchJobError` and its subclass `Unreadable`."""
        if not JOB_ID_PATTERN.fullmatch(parse_job_id(id)):
            raise NoSuchJobError
        return super().fetch(id, connection, serializer)  # type: ignore[return-value]

    def refresh(self) -> None:
        try:
            super().refresh()  # type: ignore[no-untyped-call]
        except ResponseError as error:
            if not is_wrong_type(error):
                raise
            raise Unreadable from error

    def restore(self, raw_data: Any) -> None:
        try:
            if b"data" not in raw_data:  # RQ says of it that there is no such job
                raise ValueError
            super().restore(raw_data)
            self._refuse_what_rq_fails_at()
        except DAMAGED as error:
            raise Unreadable from error
        self.group_id = None  # RQ cannot delete a job whose group is gone; ours are in none

    def _refuse_what_rq_fails_at(self) -> None:
        pauses = [0] if self.retry_intervals is None else self.retry_intervals
        numbers = (self.timeout, self.result_ttl, self.failure_ttl, self.ttl, *pauses)
        if not all(number is None or -1 <= number <= LONGEST_DURATION for number in numbers):
            raise ValueError
        if not pauses or not isinstance(self._dependency_ids, list):
            raise ValueError
        with suppress(DeserializationError):  # such a job fails in its own attempt, where a person sees it
            if not isinstance(self.func_name, str):
                raise ValueError


def set_aside(redis: Redis, job_id: str, error: Unreadable) -> None:
    """Moves an unreadable job out of RQ's way and logs it. To all who refer to it, it is gone: RQ forgets it, and its
    mail fails and can be queued again."""
    touched = [keys.job(job_id), f"{UNREADABLE}:{job_id}", UNREADABLE]
    if Script(redis, SET_ASIDE)(touched, [job_id, time.time(), UNREADABLE_KEPT, 1000]):
        emit("unreadable", logging.ERROR, id=job_id, reason=type(error.__cause__).__name__)


def put_aside(redis: Redis, kinds: Mapping[str, str]) -> list[str]:
    """Renames each key that holds another type than its own, and returns their names: whoever needs it makes a new one,
    and what was there is kept as long as an unreadable job."""
    with redis.pipeline(transaction=False) as commands:
        for key in kinds:
            commands.type(key)
        held = [one.decode() for one in commands.execute()]
    others = [key for key, is_held in zip(kinds, held, strict=True) if is_held not in (kinds[key], "none")]
    for key in others:
        redis.rename(key, f"{UNREADABLE}:{key}")
        redis.expire(f"{UNREADABLE}:{key}", UNREADABLE_KEPT)
        emit("unreadable", logging.ERROR, reason=f"another type than {kinds[key]} at {key}")
    return others


AT_ONCE = 1000  # entries of a registry that are read together, as many as RQ's scheduler takes
JOB, EXECUTION = re.compile(rb"[\w-]+"), re.compile(rb"[\w-]+:[\w-]+")  # what RQ writes into a registry


def sift(queue: rq.Queue) -> bool:
    """Removes what would stop RQ from the lists and registries that it reads next. Returns whether there was any."""
    redis, name, now = queue.connection, queue.name, time.time()
    others = put_aside(redis, keys.kinds(name))
    popped: list[Any] = redis.lrange(queue.intermediate_queue_key, 0, -1)
    taken_out = sum(int(redis.lrem(queue.intermediate_queue_key, 0, one)) for one in _foreign(popped, JOB))
    for key, until, shape in (
        (keys.started(name), math.inf, EXECUTION),
        (keys.scheduled(name), now, JOB),
        (keys.ready(name), now, JOB),
    ):
        entries: list[Any] = redis.zrangebyscore(key, 0, until, start=0, num=AT_ONCE)
        foreign = _foreign(entries, shape)
        taken_out += sum(int(redis.zrem(key, one)) for one in foreign)
        ids = [one.split(b":")[0].decode() for one in entries if one not in foreign]
        taken_out += _unreadable(queue, ids)
    return taken_out > 0 or bool(others)


def _foreign(entries: list[Any], shape: re.Pattern[bytes]) -> list[Any]:
    foreign = [one for one in entries if not shape.fullmatch(one)]
    for _ in foreign:
        emit("unreadable", logging.ERROR, reason="an entry of a registry that names no job")
    return foreign


def _unreadable(queue: rq.Queue, ids: list[str]) -> int:
    """Returns how many of the jobs cannot be read; `fetch` of the worker's class has set them aside."""
    found = 0
    try:  # in one round trip: nearly always, all is well
        queue.job_class.fetch_many(ids, queue.connection, queue.serializer)
    except (Unreadable, ResponseError):  # no hash, or Redis cannot answer now and will say so again
        for job_id in ids:
            try:
                queue.job_class.fetch(job_id, queue.connection, queue.serializer)
            except NoSuchJobError as error:
                found += isinstance(error, Unreadable)
    return found
