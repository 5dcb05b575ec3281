"""RQ's keys in Redis, by RQ's own names: they follow its RQ_KEY_PREFIX.

What is here is read by our scripts and by monitoring, which must not use RQ's own counting and listing: these clean up
on the way, and can queue a job a second time.
"""

from __future__ import annotations

from rq.job import Job
from rq.queue import Queue
from rq.registry import (
    BaseRegistry,
    CanceledJobRegistry,
    DeferredJobRegistry,
    FailedJobRegistry,
    ReadyJobRegistry,
    ScheduledJobRegistry,
    StartedJobRegistry,
)
from rq.scheduler import SCHEDULER_LOCKING_KEY_TEMPLATE
from rq.suspension import WORKERS_SUSPENDED
from rq.worker_registration import WORKERS_BY_QUEUE_KEY

SUSPENDED = WORKERS_SUSPENDED  # exists while `rq suspend` holds


def job(job_id: str) -> str:
    return str(Job.key_for(job_id))


def queue(name: str) -> str:
    return Queue.redis_queue_namespace_prefix + name


def intermediate(name: str) -> str:
    """Returns the list that holds a job between its queue and the registry of those started."""
    return f"{queue(name)}:intermediate"


def workers(name: str) -> str:
    return WORKERS_BY_QUEUE_KEY % name


def scheduler_lock(name: str) -> str:
    return SCHEDULER_LOCKING_KEY_TEMPLATE % name


def _registry(kind: type[BaseRegistry], name: str) -> str:
    return kind.key_template.format(name)


def scheduled(name: str) -> str:
    return _registry(ScheduledJobRegistry, name)


def started(name: str) -> str:
    return _registry(StartedJobRegistry, name)


def ready(name: str) -> str:
    return _registry(ReadyJobRegistry, name)


def failed(name: str) -> str:
    return _registry(FailedJobRegistry, name)


def deferred(name: str) -> str:
    return _registry(DeferredJobRegistry, name)


def canceled(name: str) -> str:
    return _registry(CanceledJobRegistry, name)
