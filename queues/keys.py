"""Names RQ's keys in Redis, by RQ's own constants, which follow its RQ_KEY_PREFIX.

Our scripts and our monitoring read these keys directly: RQ's own counting and listing clean up on the way, and can
queue a job a second time.
"""

from __future__ import annotations

import re

from rq import Worker, registry
from rq.cron_job_registry import get_registry_key as cron_jobs
from rq.cron_scheduler_registry import get_registry_key as cron_schedulers
from rq.defaults import FORMAT_KEY_PREFIX, RQ_KEY_PREFIX
from rq.executions import ExecutionRegistry
from rq.job import Job
from rq.queue import Queue
from rq.rate_limit import RateLimitRegistry
from rq.results import Result
from rq.scheduler import SCHEDULER_LOCKING_KEY_TEMPLATE
from rq.suspension import WORKERS_SUSPENDED
from rq.worker_registration import WORKERS_BY_QUEUE_KEY

# What keys of our own begin with. `{ae}:rq` as RQ_KEY_PREFIX has a hash tag: all keys with it are in one slot of a
# cluster, and so must ours be. https://redis.io/docs/latest/operate/oss_and_stack/reference/cluster-spec/#hash-tags
TAG = f"{tagged[0]}:" if (tagged := re.match(r"[^{]*\{[^}]+\}", RQ_KEY_PREFIX)) else ""
SUSPENDED = WORKERS_SUSPENDED  # exists while `rq suspend` holds
CRON_SCHEDULER = f"{FORMAT_KEY_PREFIX}:cron_scheduler:{{}}"
EXECUTION = f"{RQ_KEY_PREFIX}:execution:"  # and <job>:<execution>
LIMITS = RateLimitRegistry.rl_keys_key  # the names of tasks with `concurrency` that have jobs: <queue>:tasks.<task>


def job(job_id: str) -> str:
    return str(Job.key_for(job_id))


def results(job_id: str) -> str:
    """Returns the stream with what the job's attempts returned or raised."""
    return str(Result.get_key(job_id))  # type: ignore[no-untyped-call]


def queue(name: str) -> str:
    return Queue.redis_queue_namespace_prefix + name


def intermediate(name: str) -> str:
    """Returns the list that holds a job between its queue and the registry of those started."""
    return f"{queue(name)}:intermediate"


def workers(name: str) -> str:
    return WORKERS_BY_QUEUE_KEY % name


def scheduler_lock(name: str) -> str:
    return SCHEDULER_LOCKING_KEY_TEMPLATE % name


def waiting(limit: str) -> str:
    """Returns the sorted set of jobs that wait for others of their task to end."""
    return f"{RQ_KEY_PREFIX}:rl:{limit}:rate_limited"


# Each returns the key of a queue's registry.
scheduled = registry.ScheduledJobRegistry.key_template.format
started = registry.StartedJobRegistry.key_template.format
ready = registry.ReadyJobRegistry.key_template.format
finished = registry.FinishedJobRegistry.key_template.format
failed = registry.FailedJobRegistry.key_template.format
deferred = registry.DeferredJobRegistry.key_template.format
canceled = registry.CanceledJobRegistry.key_template.format

executions = ExecutionRegistry.key_template.format  # by a job's id: those of its executions


def kinds(name: str) -> dict[str, str]:
    """Returns the keys that a queue shares with all its workers, and the type of each."""
    lists = dict.fromkeys((queue(name), intermediate(name)), "list")
    sets = dict.fromkeys((workers(name), Queue.redis_queues_keys, Worker.redis_workers_keys, LIMITS), "set")
    registries = (scheduled, started, ready, failed, deferred, canceled)
    cron = {cron_jobs(): "zset", cron_schedulers(): "zset", CRON_SCHEDULER.format(name): "hash"}
    return lists | sets | {registry(name): "zset" for registry in registries} | cron
