"""Changes RQ's workers. Expect an hour of careful reading here for each release of RQ.

RQ imports whatever a job names, so without `Job` here anybody who can write to Redis could run `os.system`. A job that
names a function which its queue does not offer fails at once; callbacks and webhooks in a job are ignored.
tests/test_worker.py has a digest of each piece of RQ that this file overrides or calls.
RQ: https://python-rq.org/docs/workers/
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

import rq
import rq.intermediate_queue
import rq.job
from redis.client import Pipeline
from rq import SimpleWorker, Worker, worker_registration
from rq.exceptions import DequeueTimeout, StopRequested
from rq.executions import Execution
from rq.job import JobStatus
from rq.registry import StartedJobRegistry
from rq.scheduler import RQScheduler
from rq.serializers import JSONSerializer
from rq.timeouts import BaseDeathPenalty
from rq.utils import now, utcformat
from rq.worker.base import BaseWorker, WorkerStatus

from process import sd_daemon
from process.log import emit, where
from process.redis_url import Place
from queues.connection import REFUSES_WRITES, Redis, Script, announcements, fail_fast, is_hopeless, why_unavailable
from queues.executions import Taken, Turns
from queues.heartbeat import LEASE_SECONDS, LOCKED_FOR, MAINTENANCE_EVERY, WORKER_TTL, on_heartbeat
from queues.jobs import JobFailed, Policy
from queues.quarantine import StrictJob, Unreadable, set_aside, sift
from queues.replication import Replication

if TYPE_CHECKING:
    from queues.cron import Cron

Functions = Mapping[str, Callable[..., Any]]
# KEYS: the list of jobs on their way, the queue. ARGV: a job's id. On another primary it is in the queue already.
GIVE_BACK = """
if redis.call('LREM', KEYS[1], 1, ARGV[1]) == 1 then redis.call('LPUSH', KEYS[2], ARGV[1]) end
"""


class RefusedTask(Exception):
    """The job names a function that this worker's queue does not offer."""


class Job(StrictJob):
    """An RQ job that can only call what its worker allows; see `make_worker`."""

    allowed: ClassVar[Functions] = {}
    beside: Any = None  # what was done in the step that took it; see queues.executions
    take_next: Callable[[], tuple[str, Any]] | None = None  # see queues.senders

    @classmethod
    def fetch(cls, id: str, connection: Redis | None = None, serializer: Any = None) -> StrictJob:
        """Sets an unreadable job aside, wherever RQ comes upon it: it would end the worker, or maintenance for all."""
        try:
            return super().fetch(id, connection, serializer)
        except Unreadable as error:
            if connection:
                set_aside(connection, id, error)
            raise

    @property
    def func(self) -> Callable[..., Any]:
        function = self.allowed.get(str(self.func_name))
        if function is None or self.instance is not None:
            self.retries_left = 0
            raise RefusedTask("the job names a function that tasks.py does not offer on this queue")
        return function

    def set_status(self, status: JobStatus, pipeline: Any = None) -> None:
        """Keeps `scheduled` out of Redis until the transaction that schedules, which writes it anyway. RQ writes it
        before: a worker killed in between would leave a job that is in no registry and that maintenance ignores."""
        if status == JobStatus.SCHEDULED and pipeline is None:
            self._status = status
        else:
            super().set_status(status, pipeline)

    def restore(self, raw_data: Any) -> None:
        super().restore(raw_data)
        # RQ would import and call these, and send the job's failure to any URL.
        self._success_callback_name = self._failure_callback_name = self._stopped_callback_name = None
        self.webhooks = []


class IntermediateQueue(rq.intermediate_queue.IntermediateQueue):
    """Holds a job between its queue and the registry of those started. RQ takes it for stuck after a minute. A worker
    that stood still for longer than ours and goes on finds its mail claimed."""

    def should_be_cleaned_up(self, job_id: str) -> bool:
        first_seen = self.get_first_seen(job_id)
        return first_seen is not None and (now() - first_seen).total_seconds() > LOCKED_FOR


class Queue(rq.Queue):
    """RQ's queue. A worker killed in its maintenance holds the lock for seconds, not for a quarter of an hour; two at
    once do no harm."""

    @property
    def intermediate_queue(self) -> IntermediateQueue:
        return IntermediateQueue(self.key, connection=self.connection)

    def acquire_maintenance_lock(self) -> bool:
        return bool(self.connection.set(self.registry_cleaning_key, 1, nx=True, ex=LOCKED_FOR))

    @classmethod
    def dequeue_any(cls, *args: Any, **options: Any) -> Any:
        """Waits a second for a Redis that is full or takes no writes, where RQ's worker would quit."""
        with unless_unavailable():
            return super().dequeue_any(*args, **options)
        time.sleep(1)
        raise DequeueTimeout(1, "Redis")


@contextmanager
def unless_unavailable() -> Iterator[None]:
    """Notes that Redis cannot work now, where that is no reason to end: the same is asked again soon."""
    try:
        yield
        announcements.note(None)
    except Exception as error:
        if not (reason := why_unavailable(error)):
            raise
        announcements.note(reason)


def register(worker: BaseWorker, redis: Redis) -> None:
    """Registers a worker, also one that Redis has forgotten (FLUSHALL; it stood still for minutes). RQ does this at its
    birth alone: it would work on, unseen by monitoring."""
    worker.last_heartbeat = now()
    worker.birth_date = worker.birth_date or worker.last_heartbeat
    with redis.pipeline() as pipeline:
        pipeline.hset(worker.key, mapping=worker.serialize() | {"state": worker._state})
        pipeline.expire(worker.key, worker.worker_ttl + 60)
        worker_registration.register(worker, pipeline)
        pipeline.execute()


class PlainFailures(BaseWorker):
    """Tells of a job that failed in an ordinary way by the reason alone: whoever raised `JobFailed` has logged it. Ends
    quietly, also while Redis cannot work."""

    def register_death(self) -> None:
        self.connection = fail_fast(self.connection)  # it would try for over a minute to say that it is gone
        with unless_unavailable():
            super().register_death()  # type: ignore[no-untyped-call]

    def _finalize_failure(self, job: rq.job.Job, queue: rq.Queue, execution: Execution, exc_info: Any) -> None:
        if isinstance(exc_info[1], JobFailed):
            exc_info = (*exc_info[:2], None)
        super()._finalize_failure(job, queue, execution, exc_info)

    def handle_exception(self, job: rq.job.Job, *exc_info: Any) -> None:
        if not isinstance(exc_info[1], JobFailed):
            super().handle_exception(job, *exc_info)


class JobsWorker(PlainFailures, Worker):
    queue_class = Queue
    cron: Mapping[str, tuple[str, Policy]] = {}  # the functions that are queued by themselves
    replicas = 0  # REDIS_REPLICAS
    primary_before: Place | None = None  # where the primary was as it began to wait for a job

    def check_for_suspension(self, burst: bool) -> None:
        """Takes no job also while replicas confirm nothing: a worker that is cut off together with an old primary would
        run what the new one's workers run."""
        super().check_for_suspension(burst)
        while not self._stop_requested:
            with unless_unavailable():
                self.replication.confirm()
                self.primary_before = self.replication.at
                return
            self.heartbeat()
            time.sleep(1)

    def execute_job(self, job: rq.job.Job, queue: rq.Queue) -> None:
        """Gives a job back that it may have taken from a primary that was replaced while it waited."""
        is_ours = False
        with unless_unavailable():
            self.replication.confirm(self.primary_before)
            is_ours = True
        if is_ours:
            super().execute_job(job, queue)
            return
        with unless_unavailable():
            places = [queue.intermediate_queue_key, queue.key]
            Script(self.replication.redis, GIVE_BACK)(places, [job.id])

    @cached_property
    def replication(self) -> Replication:
        return Replication(fail_fast(self.connection), self.replicas)

    def run_maintenance_tasks(self) -> None:
        """Goes on running jobs if maintenance fails, or Redis takes no writes now, where RQ's worker quits."""
        try:
            sift(self.queues[0])
            super().run_maintenance_tasks()  # type: ignore[no-untyped-call]
        except StopRequested:
            raise
        except Exception as error:
            reason = why_unavailable(error)
            if reason in REFUSES_WRITES:
                announcements.note(reason)
            elif reason:
                raise
            else:
                emit("crashed", logging.ERROR, where=where(error))

    def heartbeat(self, timeout: int | None = None, pipeline: Pipeline | None = None) -> None:
        """Registers again if need be, and feeds the watchdog. RQ calls this around each job and each wait for one, and
        twice a minute while a job runs."""
        with unless_unavailable():
            super().heartbeat(timeout, pipeline)
            if pipeline is None and not self.connection.sismember(self.redis_workers_keys, self.key):
                register(self, self.connection)
        if not is_hopeless(announcements.reason or ""):
            sd_daemon.tell("WATCHDOG=1")

    def set_state(self, state: str, pipeline: Pipeline | None = None) -> None:
        with unless_unavailable():
            super().set_state(state, pipeline)

    def _start_scheduler(self, *_: object, **__: object) -> None:
        self.scheduler = PatientScheduler(self.queues, fail_fast(self.connection), serializer=self.serializer)
        self.scheduler.tasks = self.cron
        if self.scheduler.acquire_locks():  # type: ignore[no-untyped-call]
            self.scheduler.start()  # type: ignore[no-untyped-call]


class NoTimeout(BaseDeathPenalty):
    """Disables RQ's time-out, an exception at any line: between the relay's 250 and its record it would leave the mail
    in doubt. `smtp.session` ends an attempt in time."""

    def setup_death_penalty(self) -> None: ...

    def cancel_death_penalty(self) -> None: ...


class EmailWorker(PlainFailures, SimpleWorker):
    """An RQ worker with many jobs in hand: each of its senders, a thread, calls `take` and `perform` in turn.

    Does without RQ's loop: `Turns` takes and ends jobs. RQ's own code deals with all that does not end well.
    """

    queue_class = Queue
    death_penalty_class = NoTimeout

    turns: Turns

    @cached_property
    def fail_fast_redis(self) -> Redis:
        return fail_fast(self.connection)

    @cached_property
    def ended(self) -> dict[str, list[Any]]:
        """Returns what is still to be written of executions that ended well, by their ids."""
        return {}

    def add_heartbeat(self, pipeline: Pipeline, is_busy: bool) -> None:
        self._state = WorkerStatus.BUSY if is_busy else WorkerStatus.IDLE
        pipeline.hset(self.key, mapping={"last_heartbeat": utcformat(now()), "state": self._state})
        pipeline.expire(self.key, self.worker_ttl + 60)
        pipeline.expire(self.executions_key, self.worker_ttl + 60)

    def perform(self, taken: Taken) -> list[Any]:
        """Runs a job. Returns what is still to be written of it, with `Turns.take` or `Turns.end`; nothing if it did
        not end well: then it is written already."""
        self.perform_job(taken.job, self.queues[0], taken.execution)
        return self.ended.pop(taken.execution.id, [])

    def held(self, taken: Taken) -> AbstractContextManager[None]:
        """Renews the lease of a job that was taken, while the body runs."""
        return on_heartbeat(lambda: self.publish_heartbeat(*taken))

    def publish_heartbeat(self, job: rq.job.Job, execution: Execution) -> None:
        with self.fail_fast_redis.pipeline() as pipeline:
            execution.heartbeat(job.started_job_registry, LEASE_SECONDS, pipeline=pipeline)
            pipeline.execute()

    def prepare_job_execution(self, job: rq.job.Job, remove_from_intermediate_queue: bool = False) -> None:
        """Does nothing: the script that takes a job did it."""

    def handle_execution_ended(self, job: rq.job.Job, queue: rq.Queue, heartbeat_ttl: int) -> None:
        job.ended_at = now()  # and no heartbeat: the outcome is written next

    def handle_job_success(
        self, job: rq.job.Job, queue: rq.Queue, started_job_registry: StartedJobRegistry, execution: Execution
    ) -> None:
        """Leaves the writing to the script that takes the next job. Our jobs have no others that depend on them, and
        do not repeat."""
        self.ended[execution.id] = self.turns.ending(job, execution)
        self.executions.pop(execution.id, None)


AnyWorker = TypeVar("AnyWorker", EmailWorker, JobsWorker)


def make_worker(kind: type[AnyWorker], queue: str, redis: Redis, allowed: Functions) -> AnyWorker:
    """Returns a worker for one queue that may run the `allowed` functions, by name, and no others."""
    return kind(
        [queue],
        connection=redis,
        job_class=type("Job", (Job,), {"allowed": allowed}),
        serializer=JSONSerializer,
        worker_ttl=WORKER_TTL,
        maintenance_interval=MAINTENANCE_EVERY,
        log_job_description=False,
    )


class PatientScheduler(RQScheduler):
    """Runs RQ's scheduler in a process of its own, and the queue's cron with it: asks a Redis that cannot work now
    again a second later, and ends without it."""

    tasks: Mapping[str, tuple[str, Policy]]

    @cached_property
    def cron(self) -> Cron:
        from queues.cron import Cron  # here, since the process that sends mail has no cron

        [queue] = self._queue_names
        return Cron(self.connection, queue, self.tasks)

    def stop(self) -> None:
        with unless_unavailable():
            super().stop()  # type: ignore[no-untyped-call]

    def heartbeat(self) -> None:
        with unless_unavailable():
            super().heartbeat()  # type: ignore[no-untyped-call]

    def enqueue_scheduled_jobs(self) -> None:
        with unless_unavailable():
            super().enqueue_scheduled_jobs()  # type: ignore[no-untyped-call]
            if self.acquired_locks and self.tasks:  # without the locks it is another's
                self.cron.tick()


class Scheduler(RQScheduler):
    """RQ's scheduler for one queue, run by its owner once a second rather than in a process of its own."""

    def __init__(self, queue: str, redis: Redis) -> None:
        # A dead scheduler's lock lasts for `interval` + 60 seconds, and `interval` has no other effect here.
        super().__init__([queue], redis, interval=LOCKED_FOR - 60, serializer=JSONSerializer)

    def tick(self) -> None:
        """Queues the jobs whose time has come, unless another process has the lock."""
        if self.acquired_locks or self.acquire_locks():  # type: ignore[no-untyped-call]
            self.heartbeat()  # type: ignore[no-untyped-call]
            self.enqueue_scheduled_jobs()  # type: ignore[no-untyped-call]
