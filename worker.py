"""The process that takes jobs from one queue: `python worker.py [email|jobs]`.

Both are RQ workers with RQ's scheduler beside them, for mail that was put off. `email` runs its jobs in this process
(RQ's SimpleWorker), `jobs` forks for each (RQ's Worker), so that a task that hangs or crashes can be killed.

Promises: only functions of tasks.py run. RQ imports whatever a job names, so without this anybody who can write to
Redis could run `os.system`. A job that names anything else fails at once; callbacks and webhooks in a job are ignored.
SIGTERM lets the job in hand finish.  RQ: https://python-rq.org/docs/workers/
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from types import FrameType
from typing import Any

import rq
import rq.job
from rq import SimpleWorker, Worker
from rq.job import JobStatus
from rq.serializers import JSONSerializer
from rq.worker.base import BaseWorker, WorkerStatus

import events
import jobs
import settings
import tasks

# One email worker makes one attempt at a time, so what it may run is `deliver` alone.
ALLOWED: dict[str, dict[str, Callable[..., Any]]] = {
    jobs.EMAIL: {"tasks.deliver": tasks.deliver},
    jobs.JOBS: {f"tasks.{name}": offered.function for name, offered in tasks.OFFERED.items()},
}


class RefusedTask(Exception):
    """The job names a function that this worker's queue does not offer."""


class Job(rq.job.Job):
    """An RQ job that can only be one of ours."""

    @property
    def func(self) -> Callable[..., Any]:
        function = ALLOWED.get(self.origin, {}).get(self.func_name or "")
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


class Queue(rq.Queue):
    """RQ's queue. A worker killed while it does maintenance takes the lock along for a minute, not for fifteen."""

    def acquire_maintenance_lock(self) -> bool:
        return bool(self.connection.set(self.registry_cleaning_key, 1, nx=True, ex=60))


class EmailWorker(SimpleWorker):
    """RQ's SimpleWorker promises to be alive until its job's time is up; this one says so as it goes, so that what a
    killed worker held is found out within a minute."""

    job_class = Job
    queue_class = Queue

    def get_heartbeat_ttl(self, job: rq.job.Job, working_time: float = 0.0) -> int:
        return jobs.LOST_AFTER

    def check_for_suspension(self, burst: bool) -> None:
        """Beside RQ's own reason not to take a job: the relay is in trouble. A mail taken now would only be put off,
        and a long queue would go round and round."""
        super().check_for_suspension(burst)
        while not self._stop_requested and (seconds := tasks.relay_closed_for()):
            self.heartbeat()
            time.sleep(min(1, seconds))

    def request_force_stop(self, signum: int, frame: FrameType | None) -> None:
        """The second signal breaks an attempt off. Not while its final dot is unanswered, which would leave a mail in
        doubt: this worker stops after the attempt anyway."""
        if not tasks.at_the_dot:
            super().request_force_stop(signum, frame)

    def clean_registries(self) -> None:
        super().clean_registries()  # type: ignore[no-untyped-call]
        tasks.sweep()

    def execute_job(self, job: rq.job.Job, queue: rq.Queue) -> None:
        execution = self.prepare_execution(job)
        with jobs.beating(lambda: self.maintain_heartbeats(job, execution)):
            self.perform_job(job, queue, execution)
        self.set_state(WorkerStatus.IDLE)


class JobsWorker(Worker):
    job_class = Job
    queue_class = Queue


WORKERS: dict[str, type[BaseWorker]] = {jobs.EMAIL: EmailWorker, jobs.JOBS: JobsWorker}


def make_worker(queue: str, current: settings.Settings) -> BaseWorker:
    """Maintenance every 20 s, idle or not (worker_ttl less 15 s is how long RQ waits for a job): what a killed worker
    left is looked for within a minute; RQ's defaults would take up to 27."""
    return WORKERS[queue](
        [queue],
        connection=jobs.connect(current.redis_url.get_secret_value(), patient=True),
        serializer=JSONSerializer,
        worker_ttl=35,
        maintenance_interval=20,
        log_job_description=False,
    )


def main() -> int:
    queue = sys.argv[1] if len(sys.argv) > 1 else jobs.EMAIL
    if queue not in WORKERS or len(sys.argv) > 2:
        print(f"usage: worker.py [{'|'.join(WORKERS)}]", file=sys.stderr)
        return 2
    try:
        current = settings.load(*(["smtp_host"] if queue == jobs.EMAIL else []))
    except settings.SettingsError as error:
        print(error, file=sys.stderr)
        return 2
    events.set_up(current.log_level)
    try:
        with jobs.unavailable():
            worker = make_worker(queue, current)
    except jobs.Unavailable as error:
        print(f"REDIS_URL: {error}", file=sys.stderr)
        return 1
    events.emit("worker_started", queue=queue, name=worker.name)
    worker.work(with_scheduler=True, logging_level=None)
    return 0


if __name__ == "__main__":
    sys.exit(main())
