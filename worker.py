"""The process that takes jobs from one queue: `python worker.py [email|jobs]`.

`email` is a crew: WORKER_CONCURRENCY RQ workers as threads of this process, each with its own Redis connection and SMTP
session, for a mail is nearly all waiting. The main thread looks after them: signals, signs of life, RQ's scheduler for
mail that was put off, RQ's maintenance and our sweep. `jobs` is RQ's own worker, which forks for each job, so that a
task that hangs or crashes can be killed.

Promises: only functions of tasks.py run. RQ imports whatever a job names, so without this anybody who can write to
Redis could run `os.system`. A job that names anything else fails at once; callbacks and webhooks in a job are ignored.
SIGTERM lets the jobs in hand finish.  RQ: https://python-rq.org/docs/workers/
"""

from __future__ import annotations

import logging
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from functools import cached_property
from types import FrameType
from typing import Any

import rq
import rq.intermediate_queue
import rq.job
from redis import Redis
from redis.client import Pipeline
from redis.exceptions import RedisError
from rq import SimpleWorker, Worker, worker_registration
from rq.exceptions import StopRequested
from rq.executions import Execution
from rq.job import JobStatus
from rq.registry import StartedJobRegistry
from rq.scheduler import RQScheduler
from rq.serializers import JSONSerializer
from rq.suspension import WORKERS_SUSPENDED
from rq.timeouts import BaseDeathPenalty
from rq.utils import now, utcformat
from rq.worker.base import BaseWorker, WorkerStatus

import events
import jobs
import settings
import sieve
import supervisor
import tasks

# One email worker makes one attempt at a time, so what it may run is `deliver` alone.
ALLOWED: dict[str, dict[str, Callable[..., Any]]] = {
    jobs.EMAIL: {"tasks.deliver": tasks.deliver},
    jobs.JOBS: {f"tasks.{name}": offered.function for name, offered in tasks.OFFERED.items()},
}
WORKER_TTL = 35  # seconds; less 15, RQ waits so long for a job
LOCKED_FOR = 15  # seconds for which a dead worker goes on keeping others from its duties
STUCK_AFTER = 120  # seconds beyond its timeout after which an attempt is taken for stuck
MAINTENANCE_EVERY = 20  # seconds: what a killed worker left is looked for within a minute; by default after up to 27


class RefusedTask(Exception):
    """The job names a function that this worker's queue does not offer."""


class Job(jobs.Job):
    """An RQ job that can only be one of ours."""

    @classmethod
    def fetch(cls, id: str, connection: Redis | None = None, serializer: Any = None) -> jobs.Job:
        """Sets aside what cannot be read, wherever RQ comes upon it: it would end the worker, or the maintenance for
        all others."""
        try:
            return super().fetch(id, connection, serializer)
        except jobs.Unreadable as error:
            assert connection
            jobs.set_aside(connection, id, error)
            raise

    @property
    def func(self) -> Callable[..., Any]:
        function = ALLOWED.get(self.origin, {}).get(str(self.func_name))
        if function is None or self.instance is not None:
            self.retries_left = 0
            raise RefusedTask("the job names a function that tasks.py does not offer on this queue")
        return function

    def set_status(self, status: JobStatus, pipeline: Any = None) -> None:
        """RQ says `scheduled` before the transaction that schedules. A worker killed in between would leave a job that
        is in no registry and that maintenance passes over; the transaction writes the status anyway."""
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
    """Where a job is for the moment between its queue and the registry of those started. RQ takes it for stuck after a
    minute; a worker that stood still longer than this and goes on finds its mail claimed."""

    def should_be_cleaned_up(self, job_id: str) -> bool:
        first_seen = self.get_first_seen(job_id)
        return first_seen is not None and (now() - first_seen).total_seconds() > LOCKED_FOR


class Queue(rq.Queue):
    """RQ's queue. A worker killed while it does maintenance takes the lock along for seconds, not for a quarter of an
    hour; two at once do no harm."""

    @property
    def intermediate_queue(self) -> IntermediateQueue:
        return IntermediateQueue(self.key, connection=self.connection)

    def acquire_maintenance_lock(self) -> bool:
        return bool(self.connection.set(self.registry_cleaning_key, 1, nx=True, ex=LOCKED_FOR))


def register_again(worker: BaseWorker) -> None:
    """RQ registers a worker at its birth alone. One that Redis has forgotten since (FLUSHALL; it stood still for
    minutes) would work on, and whoever watches would see none."""
    worker.last_heartbeat = now()
    with worker.connection.pipeline() as pipeline:
        pipeline.hset(worker.key, mapping=worker.serialize() | {"state": worker._state})
        pipeline.expire(worker.key, worker.worker_ttl + 60)
        worker_registration.register(worker, pipeline)
        pipeline.execute()


class JobsWorker(Worker):
    job_class = Job
    queue_class = Queue

    def run_maintenance_tasks(self) -> None:
        """RQ's worker quits where its maintenance fails. This one goes on running jobs."""
        try:
            sieve.sift(self.queues[0])
            super().run_maintenance_tasks()  # type: ignore[no-untyped-call]
        except StopRequested:
            raise
        except Exception as error:
            if jobs.why_unavailable(error):
                raise
            events.emit("crashed", logging.ERROR, where=events.where(error))

    def heartbeat(self, timeout: int | None = None, pipeline: Pipeline | None = None) -> None:
        """RQ calls this around each job and each wait for one, and twice a minute while a job runs."""
        super().heartbeat(timeout, pipeline)
        if pipeline is None and not self.connection.sismember(self.redis_workers_keys, self.key):
            register_again(self)
        supervisor.tell("WATCHDOG=1")


class NoTimeout(BaseDeathPenalty):
    """RQ's is an exception out of nowhere: between the relay's 250 and the mark it would make a mail of doubt. An
    attempt at a mail ends by itself, as `mail.relay` sees to."""

    def setup_death_penalty(self) -> None: ...

    def cancel_death_penalty(self) -> None: ...


class EmailWorker(SimpleWorker):
    """One of a crew: an RQ worker that runs its jobs in its own thread.

    What RQ's worker does beside its job in some fifteen round trips, several of them to say that it is alive, is done
    here in three, or by the crew's main thread. tests/test_worker.py notices when RQ changes what this leans on.
    """

    job_class = Job
    queue_class = Queue
    death_penalty_class = NoTimeout
    suspended = False  # `rq suspend`; asked by the main thread for all
    stopping = False
    forgotten = False  # by Redis, as the main thread has seen
    told: tuple[str, float] = ("", 0)  # the state that Redis was told last, and when
    busy_since: float | None = None  # time.monotonic(), while it makes an attempt

    @cached_property
    def in_a_hurry(self) -> Redis:
        return jobs.impatient(self.connection)

    def check_for_suspension(self, burst: bool) -> None:
        """Beside `rq suspend` there is another reason not to take a job: the relay is in trouble. A mail taken now
        would only be put off, and a long queue would go round and round."""
        while not self.stopping and (self.suspended or tasks.relay_closed_for()):
            time.sleep(0.5)

    @property
    def should_run_maintenance_tasks(self) -> bool:
        return False  # the main thread does, and is never busy with a mail

    def _install_signal_handlers(self) -> None:
        """The main thread has them."""

    def subscribe(self) -> None:
        """To RQ's remote commands: a thread and a connection more, to stop a work horse that there is not."""

    def procline(self, message: str) -> None:
        """The process has one title and many threads."""

    def set_state(self, state: str, pipeline: Pipeline | None = None) -> None:
        self._state = state  # `tell` writes it

    def heartbeat(self, timeout: int | None = None, pipeline: Pipeline | None = None) -> None:
        """RQ calls this around each job and each wait for one, and nothing else there could end the loop."""
        if self.stopping and not self.executions:
            raise StopRequested
        if self.forgotten:  # done in this thread, which alone knows that it is not about to end
            self.forgotten = False
            register_again(self)

    def tell(self, pipeline: Pipeline) -> None:
        """That this worker is alive, and its state, if that is news."""
        if self.told[0] != self._state or time.monotonic() - self.told[1] >= jobs.BEAT:
            self.told = (self._state, time.monotonic())
            pipeline.hset(self.key, mapping={"last_heartbeat": utcformat(now()), "state": self._state})
            pipeline.expire(self.key, self.worker_ttl + 60)
            pipeline.expire(self.executions_key, self.worker_ttl + 60)

    def get_heartbeat_ttl(self, job: rq.job.Job, working_time: float = 0.0) -> int:
        return jobs.LOST_AFTER

    def prepare_execution(self, job: rq.job.Job) -> Execution:
        """RQ's and `prepare_job_execution`, in one transaction."""
        with self.connection.pipeline() as pipeline:
            execution = Execution.create(job, jobs.LOST_AFTER, pipeline=pipeline, worker_name=self.name)
            self.executions[execution.id] = execution
            job.prepare_for_execution(self.name, pipeline=pipeline)
            pipeline.persist(job.key)
            pipeline.lrem(self.queues[0].intermediate_queue_key, 1, job.id)
            pipeline.execute()
        return execution

    def prepare_job_execution(self, job: rq.job.Job, remove_from_intermediate_queue: bool = False) -> None:
        """Done in `prepare_execution`."""

    def execute_job(self, job: rq.job.Job, queue: rq.Queue) -> None:
        self._state, self.busy_since = WorkerStatus.BUSY, time.monotonic()
        execution = self.prepare_execution(job)
        with jobs.beating(lambda: self.show_life(job, execution)):
            self.perform_job(job, queue, execution)
        self._state, self.busy_since = WorkerStatus.IDLE, None

    def show_life(self, job: rq.job.Job, execution: Execution) -> None:
        with self.in_a_hurry.pipeline() as pipeline:
            execution.heartbeat(job.started_job_registry, jobs.LOST_AFTER, pipeline=pipeline)
            pipeline.execute()

    def handle_execution_ended(self, job: rq.job.Job, queue: rq.Queue, heartbeat_ttl: int) -> None:
        job.ended_at = now()  # without another sign of life: the outcome is written next

    def handle_job_success(
        self, job: rq.job.Job, queue: rq.Queue, started_job_registry: StartedJobRegistry, execution: Execution
    ) -> None:
        """RQ's, without the jobs that depend on this one or repeat it: our jobs have none."""
        result_ttl = job.get_result_ttl(self.default_result_ttl)
        assert job.started_at
        assert job.ended_at
        with self.connection.pipeline() as pipeline:
            self.increment_successful_job_count(pipeline=pipeline)
            self.increment_total_working_time(job.ended_at - job.started_at, pipeline)
            job._handle_success(
                result_ttl,
                pipeline=pipeline,
                worker_name=self.name,
                execution_id=execution.id,
                execution_started_at=execution.created_at,
                execution_ended_at=job.ended_at,
            )
            job.cleanup(result_ttl, pipeline=pipeline, remove_from_queue=False)
            self.cleanup_execution(job, pipeline=pipeline, execution=execution)
            pipeline.execute()


class Crew:
    """The e-mail workers of one process, and what their main thread does for all of them, once a second.

    A worker whose thread ends is replaced, so the process outlives whatever made it quit: a Redis that was away for
    minutes, a fault of ours.
    """

    def __init__(self, current: settings.Settings) -> None:
        self.settings = current
        # Here nobody waits for Redis to come back: the next second is the next try.
        self.redis = jobs.connect(current.redis_url.get_secret_value())
        self.caretaker = email_worker(self.redis)  # RQ's maintenance is a worker's; this one takes no jobs
        self.queue = self.caretaker.queues[0]
        # RQ keeps the lock of a scheduler that is dead for interval + 60 s; we keep it alive once a second.
        self.scheduler = RQScheduler([jobs.EMAIL], self.redis, interval=LOCKED_FOR - 60, serializer=JSONSerializer)
        self.workers: dict[threading.Thread, EmailWorker] = {}
        self.asked_to_stop = threading.Event()
        self.signalled_at = 0.0
        self.maintained_at = -float(MAINTENANCE_EVERY)  # at once

    def work(self) -> None:
        """Until SIGTERM or its like, and until every mail in hand has been dealt with."""
        supervisor.on_stop(self.handle_signal)
        while not self.asked_to_stop.is_set() or self.workers:
            self.look_after()
            self.asked_to_stop.wait(1)
            if self.asked_to_stop.is_set():
                supervisor.tell("STOPPING=1")
                self.dismiss()
        with suppress(RedisError):
            self.scheduler.stop()  # type: ignore[no-untyped-call]

    def look_after(self) -> None:
        """One duty after the other. What goes wrong in one keeps from no other, and ends nothing."""
        duties: list[Callable[[], object]] = [self.show_life, self.watch, self.schedule]
        if time.monotonic() - self.maintained_at >= MAINTENANCE_EVERY:
            self.maintained_at = time.monotonic()
            duties += [self.pull_in, lambda: sieve.sift(self.queue), self.caretaker.run_maintenance_tasks, tasks.sweep]
        for duty in (*duties, self.man):
            try:
                duty()
            except Exception as error:
                if jobs.why_unavailable(error):
                    supervisor.tell("WATCHDOG=1")  # it is away, or full: who waits for it is not stuck
                    return
                events.emit("crashed", logging.ERROR, where=events.where(error))

    def man(self) -> None:
        """Sees to it that there are as many workers as asked for."""
        self.workers = {thread: worker for thread, worker in self.workers.items() if thread.is_alive()}
        while len(self.workers) < self.settings.worker_concurrency and not self.asked_to_stop.is_set():
            worker = email_worker(jobs.connect(self.settings.redis_url.get_secret_value(), patient=True))
            thread = threading.Thread(target=worker.work, kwargs={"logging_level": None}, name=worker.name)
            self.workers[thread] = worker
            thread.start()

    def dismiss(self) -> None:
        for worker in self.workers.values():
            worker.stopping = True
        with suppress(RedisError):
            self.wake()
        for thread in list(self.workers):
            thread.join(0.1 / len(self.workers))
        self.workers = {thread: worker for thread, worker in self.workers.items() if thread.is_alive()}

    def show_life(self) -> None:
        """Of all workers, and looks for `rq suspend` and for those that Redis has forgotten."""
        workers = list(self.workers.values())
        with self.redis.pipeline(transaction=False) as pipeline:
            for worker in workers:
                worker.tell(pipeline)
            for worker in workers:
                pipeline.sismember(worker.redis_workers_keys, worker.key)
            pipeline.exists(WORKERS_SUSPENDED)
            *_, suspended = seen = pipeline.execute()
        EmailWorker.suspended = bool(suspended)
        for worker, known in zip(workers, seen[-1 - len(workers) : -1], strict=True):
            worker.forgotten = not known

    def watch(self) -> None:
        """Feeds systemd's watchdog, unless an attempt at a mail has outlasted all that could keep it."""
        busy = [worker.busy_since for worker in self.workers.values() if worker.busy_since]
        if not busy or time.monotonic() - min(busy) < self.settings.job_timeout + STUCK_AFTER:
            supervisor.tell("READY=1\nWATCHDOG=1")

    def schedule(self) -> None:
        """Queues mail that was put off and is due, if no other process does."""
        if self.scheduler.acquired_locks or self.scheduler.acquire_locks():  # type: ignore[no-untyped-call]
            self.scheduler.heartbeat()  # type: ignore[no-untyped-call]
            try:
                self.scheduler.enqueue_scheduled_jobs()  # type: ignore[no-untyped-call]
            except Exception as error:
                if jobs.why_unavailable(error) or not sieve.sift(self.queue):
                    raise

    def pull_in(self) -> None:
        """A clock that was set back an hour leaves signs of life that would hold for an hour."""
        wip, moment = self.queue.started_job_registry.key, time.time()
        ahead: list[Any] = self.redis.zrangebyscore(wip, moment + 2 * jobs.LOST_AFTER, "+inf")
        for entry in ahead:
            self.redis.zadd(wip, {entry: moment + jobs.LOST_AFTER}, xx=True)

    def wake(self) -> None:
        """Those who wait for a job, so that they notice. Whoever else is woken waits on."""
        for client in self.redis.client_list(_type="normal"):
            if client["cmd"] == "blmove":
                self.redis.client_unblock(int(client["id"]))

    def handle_signal(self, number: int, frame: FrameType | None) -> None:
        """The first lets the mail in hand finish. A second one breaks off what nobody will be in doubt about: it waits
        for the answers to final dots that are out, and lets no other dot go out."""
        if not self.asked_to_stop.is_set():
            self.signalled_at = time.monotonic()
            self.asked_to_stop.set()
        elif time.monotonic() - self.signalled_at > 1:  # sooner, it is the echo of the first: a group, a terminal
            threading.Thread(target=tasks.break_off).start()


def email_worker(redis: Redis) -> EmailWorker:
    return EmailWorker(
        [jobs.EMAIL], connection=redis, serializer=JSONSerializer, worker_ttl=WORKER_TTL, log_job_description=False
    )


def jobs_worker(current: settings.Settings) -> JobsWorker:
    return JobsWorker(
        [jobs.JOBS],
        connection=jobs.connect(current.redis_url.get_secret_value(), patient=True),
        serializer=JSONSerializer,
        worker_ttl=WORKER_TTL,
        maintenance_interval=MAINTENANCE_EVERY,
        log_job_description=False,
    )


def main() -> int:
    queue = sys.argv[1] if len(sys.argv) > 1 else jobs.EMAIL
    if queue not in ALLOWED or len(sys.argv) > 2:
        print(f"usage: worker.py [{'|'.join(ALLOWED)}]", file=sys.stderr)
        return 2
    try:
        current = settings.load(*(["smtp_host"] if queue == jobs.EMAIL else []))
    except settings.SettingsError as error:
        print(error, file=sys.stderr)
        return 2
    events.set_up(current.log_level, current.log_format)
    try:
        with jobs.unavailable():
            worker = Crew(current) if queue == jobs.EMAIL else jobs_worker(current)
    except jobs.Unavailable as error:
        print(f"REDIS_URL: {error}", file=sys.stderr)
        return 1
    events.emit("worker_started", queue=queue)
    if isinstance(worker, Crew):
        worker.work()
        tasks.leave_relay()
    else:
        supervisor.on_stop(worker.request_stop)
        supervisor.tell("READY=1")
        worker.work(with_scheduler=True, logging_level=None)
    return 0


if __name__ == "__main__":
    sys.exit(main())
