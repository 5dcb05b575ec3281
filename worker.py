"""The process that takes jobs from one queue: `python worker.py [email|jobs]`.

Both are RQ workers with RQ's scheduler beside them, for mail that was put off. `email` runs its jobs in this process
(RQ's SimpleWorker), `jobs` forks for each (RQ's Worker), so that a task that hangs or crashes can be killed.

Promises: only functions of tasks.py run. RQ imports whatever a job names, so without this anybody who can write to
Redis could run `os.system`. A job that names anything else fails at once; callbacks and webhooks in a job are ignored.
SIGTERM lets the job in hand finish.  RQ: https://python-rq.org/docs/workers/
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import rq.job
from rq import SimpleWorker, Worker
from rq.serializers import JSONSerializer
from rq.worker.base import BaseWorker

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

    def restore(self, raw_data: Any) -> None:
        super().restore(raw_data)
        # RQ would import and call these, and send the job's failure to any URL.
        self._success_callback_name = self._failure_callback_name = self._stopped_callback_name = None
        self.webhooks = []


class EmailWorker(SimpleWorker):
    job_class = Job


class JobsWorker(Worker):
    job_class = Job


WORKERS: dict[str, type[BaseWorker]] = {jobs.EMAIL: EmailWorker, jobs.JOBS: JobsWorker}


def make_worker(queue: str, current: settings.Settings) -> BaseWorker:
    """worker_ttl 75 and maintenance every 60 s: what a killed worker left is looked for within minutes, not twenty."""
    return WORKERS[queue](
        [queue],
        connection=jobs.connect(current.redis_url.get_secret_value(), patient=True),
        serializer=JSONSerializer,
        worker_ttl=75,
        maintenance_interval=60,
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
