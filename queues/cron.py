"""Queues the tasks with `cron` when their time comes: once, however many ask, and late rather than never.

The process that runs RQ's scheduler for the queue asks once a second; RQ's lock lets one do so on all machines. RQ's
CronScheduler alone would keep in memory what it has queued: a time that comes during a restart would be lost, and one
that comes for two of them queued twice. Here it stands in Redis, in RQ's registry of cron jobs, and the time is part of
an idempotency key. What came due while nobody asked is queued when somebody does, once.

Times are those of the machine's time zone. RQ: https://python-rq.org/docs/cron/
"""

from __future__ import annotations

import re
import time
import uuid
from collections.abc import Mapping
from datetime import datetime, timezone
from typing import Any, NamedTuple

from rq import cron_job_registry
from rq.cron import CronJob, CronScheduler
from rq.exceptions import SchedulerNotFound
from rq.utils import now

from process.log import emit
from queues.connection import Redis
from queues.jobs import Beside, Call, Idempotency, Jobs, Policy, flatten

PUBLISH_EVERY = 15  # seconds; RQ forgets a cron scheduler that has been silent for 120
ALSO = "local function beside(at) run(at, #ARGV + 1) end\n"


def next_time(line: str) -> datetime:
    """Returns when a cron line is due next. Raises `ValueError` if it is none, or never."""
    if len(line.split()) != 5 or re.search(r"\b[hr]", line, re.IGNORECASE):  # R is at random: in each process another
        raise ValueError
    due = CronJob("", func_name="-", cron=line).next_enqueue_time
    assert due
    return due


class Timing(NamedTuple):
    """A task with `cron`: when it was last queued, or first seen, and when it will be next."""

    task: str
    line: str
    last: datetime | None
    next: datetime | None


def timetable(redis: Redis, queue: str) -> list[Timing]:
    """Returns the tasks of a queue that are queued by themselves, as its scheduler has written them down."""
    try:
        jobs = CronScheduler.fetch(queue, redis).get_jobs()
    except SchedulerNotFound:
        return []
    key = cron_job_registry.get_registry_key()
    written: Any = [redis.zscore(key, job.name) for job in jobs]
    lasts = [datetime.fromtimestamp(at, timezone.utc) if at else None for at in written]
    return [
        Timing(job.func_name.removeprefix("tasks."), job.cron or "", last, job.next_enqueue_time)
        for job, last in zip(jobs, lasts, strict=True)
    ]


def planned(redis: Redis, queue: str) -> dict[str, datetime]:
    """Returns when each task of a queue will be queued next."""
    return {one.task: one.next for one in timetable(redis, queue) if one.next}


class CronTask(CronJob):
    """A task with `cron`. Its name has the cron line in it: a changed one has missed nothing."""

    def __init__(self, jobs: Jobs, queue: str, function: str, line: str, policy: Policy) -> None:
        super().__init__(queue, func_name=function, cron=line, name=f"{function} {line}")
        self.jobs = jobs
        self.policy = policy

    def should_run(self) -> bool:
        """Asks Redis when it was last queued, at first and whenever it seems due: another may have done it."""
        if self.latest_enqueue_time and not super().should_run():
            return False
        key, since = cron_job_registry.get_registry_key(), self.latest_enqueue_time or now()
        self.jobs.redis.zadd(key, {self.name: since.timestamp()}, nx=True)
        written: Any = self.jobs.redis.zscore(key, self.name)
        last = datetime.fromtimestamp(written, timezone.utc)
        self.set_enqueue_time(last if last <= now() else since)  # the clock was ahead then
        return super().should_run()

    def enqueue(self, connection: Redis) -> None:  # type: ignore[override]  # RQ's returns the job, and needs it not
        """Queues a job for the time that has come, unless there is one, and writes down when."""
        assert self.next_enqueue_time
        job_id, due = str(uuid.uuid4()), self.next_enqueue_time.isoformat()
        commands = connection.pipeline()
        cron_job_registry.add(self.name, commands, now().timestamp())
        acceptance = self.jobs.acceptance(
            self.queue_name,
            self.func_name,
            {job_id: Call((), {})},
            self.policy,
            beside=Beside(ALSO, flatten(commands)),
            idempotency=Idempotency.of("cron", self.name, due, None),
        )
        queued = self.jobs.accept(acceptance)
        if not queued.replayed:
            emit("cron_queued", id=job_id, task=self.func_name.removeprefix("tasks."), due=due)


class Cron(CronScheduler):
    """The tasks of a queue that have a `cron` line. It is named after the queue, so that RQ knows one, the last."""

    def __init__(self, redis: Redis, queue: str, tasks: Mapping[str, tuple[str, Policy]]) -> None:
        super().__init__(redis, name=queue)
        jobs = Jobs(redis)
        self._cron_jobs = [CronTask(jobs, queue, function, *task) for function, task in tasks.items()]
        self.published_at = -float(PUBLISH_EVERY)

    def tick(self) -> None:
        """Queues what is due, and tells RQ what will be next."""
        queued = self.enqueue_jobs()
        if self._cron_jobs and (queued or time.monotonic() - self.published_at >= PUBLISH_EVERY):
            self.save()
            self.heartbeat()
            self.published_at = time.monotonic()
