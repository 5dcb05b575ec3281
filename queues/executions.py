"""Takes jobs from a queue and ends them, in RQ's own form, with one script: for a worker with many jobs in hand.

RQ's worker makes some fifteen round trips for a job. Here the next job is taken in the same step in which the last one
ends: it goes from its queue to the registry of those started without a moment in between in which it is in neither.
tests/test_executions.py compares what this writes, key by key, with what RQ's own worker writes.
RQ: https://python-rq.org/docs/workers/
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple
from uuid import uuid4

from rq.exceptions import NoSuchJobError
from rq.executions import Execution
from rq.job import Job, JobStatus
from rq.utils import now, utcformat
from rq.worker.base import BaseWorker

from queues import keys
from queues.connection import Script
from queues.heartbeat import LEASE_SECONDS
from queues.jobs import NOTHING, rq_now
from queues.quarantine import Unreadable, set_aside

# What RQ needs of a job only as long as it may run again.
TO_RUN = (
    *("success_callback_name", "failure_callback_name", "stopped_callback_name", "group_id", "worker_name"),
    *("retries_left", "retry_intervals", "timeout", "result_ttl", "failure_ttl", "last_heartbeat"),
)
# KEYS: queue, its list of jobs on their way, registry of those started, of those finished, worker, its executions.
# ARGV: worker's name, now (seconds), now as RQ writes it, the lease; of a job that has ended its id ("": none), its
# execution, when, its result as JSON, for how many seconds both are kept, how many it took; the execution of the job to
# take ("": none), and its id, if it is on its way already; then the words for `beside`.
# Leaves of a finished job what people look at. RQ keeps its result in a stream, which takes 4.7 KB for one word; a
# field of the job takes ten bytes. What became of the mail is in the mail.
# Returns nothing if the queue is empty, the id alone of a job that is gone or unreadable, or the id and the job's hash
# and what `beside(id)` returns, if it does not fail: the job will, and is dealt with then.
NEXT = f"""
local JOB, RESULTS = '{keys.job("")}', '{keys.results("")}'
local EXECUTION, EXECUTIONS = '{keys.EXECUTION}', '{keys.executions("")}'
local function end_job(id, execution, ended_at, result, kept, took)
  local job = JOB .. id
  redis.call('HDEL', job, {", ".join(map(repr, TO_RUN))})
  redis.call('HSET', job, 'status', 'finished', 'ended_at', ended_at, 'result', result)
  redis.call('EXPIRE', job, kept)
  redis.call('DEL', RESULTS .. id, EXECUTION .. id .. ':' .. execution)
  redis.call('ZADD', KEYS[4], math.floor(ARGV[2]) + kept, id)
  redis.call('ZREM', KEYS[3], id .. ':' .. execution)
  redis.call('ZREM', EXECUTIONS .. id, execution)
  redis.call('SREM', KEYS[6], id .. ':' .. execution)
  redis.call('HINCRBY', KEYS[5], 'successful_job_count', 1)
  redis.call('HINCRBYFLOAT', KEYS[5], 'total_working_time', took)
end

local function taken_by(execution)
  for _, both in ipairs(redis.call('SMEMBERS', KEYS[6])) do  -- a few for each thread
    if string.sub(both, -#execution) == execution then return string.sub(both, 1, -#execution - 2) end
  end
end

local function take(execution, id)
  local remove = {{'LREM', KEYS[2], 1, id}}
  if id == '' then
    id, remove = taken_by(execution), nil
    if not id then id, remove = redis.call('LINDEX', KEYS[1], 0), {{'LPOP', KEYS[1]}} end
  end
  if not id then return end
  local job, both, now, lease = JOB .. id, id .. ':' .. execution, ARGV[2], ARGV[4]
  if redis.call('TYPE', job).ok ~= 'hash' or redis.call('HEXISTS', job, 'data') == 0 then
    if remove then redis.call(unpack(remove)) end
    return {{id}}
  end
  redis.call('PERSIST', job)  -- first, since a full Redis lets a script write whose first write takes no memory
  local stored = redis.call('HGETALL', job)
  redis.call('HSET', job, 'status', 'started', 'started_at', ARGV[3], 'last_heartbeat', ARGV[3], 'worker_name', ARGV[1])
  redis.call('HSET', EXECUTION .. both, 'id', execution, 'job_id', id, 'created_at', now, 'last_heartbeat', now,
    'worker_name', ARGV[1])
  redis.call('EXPIRE', EXECUTION .. both, lease)
  redis.call('ZADD', EXECUTIONS .. id, math.floor(now) + lease + 60, execution)
  redis.call('EXPIRE', EXECUTIONS .. id, lease + 60)
  redis.call('ZADD', KEYS[3], math.floor(now) + lease, both)
  redis.call('SADD', KEYS[6], both)
  redis.call('EXPIRE', KEYS[6], lease + 60)
  if remove then redis.call(unpack(remove)) end  -- last: if a key holds something else, the job is still where it was
  local done, said = pcall(beside, id, 13)
  return {{id, stored, done and said or nil}}
end

if ARGV[5] ~= '' then end_job(unpack(ARGV, 5, 10)) end
if ARGV[11] ~= '' then return take(ARGV[11], ARGV[12]) end
"""


Words = Callable[[str], list[Any]]


class Taken(NamedTuple):
    """A job that is this worker's now, of its job class. `job.beside` is what `beside` has returned with it."""

    job: Any
    execution: Execution


class Turns:
    """Takes jobs for one worker and ends them. The script may be run again after a lost reply: it finds the job that it
    took under the same execution."""

    def __init__(self, worker: BaseWorker, beside: str = NOTHING.source, words: Words = lambda _: []) -> None:
        """`beside` is Lua that defines `beside(id, at)`, done in the same step for the job that is taken; `words` makes
        the words that are in ARGV[at] and on, of the execution's id."""
        self.worker, self.queue, self._words = worker, worker.queues[0], words
        self._next = Script(worker.connection, beside + NEXT)
        name = self.queue.name
        self._keys = [keys.queue(name), keys.intermediate(name), keys.started(name), keys.finished(name)]
        self._keys += [worker.key, worker.executions_key]

    def take(self, ended: Sequence[Any] = (), job_id: str = "") -> Taken | None:
        """Ends the job of which `ended` tells, and takes the next one of the queue, or the one of this id, which is on
        its way already. Returns None where there is none. Passes over jobs that are gone, and sets unreadable ones
        aside."""
        while found := self._run(ended, execution_id := uuid4().hex, job_id):
            ended, job_id, taken_id = (), "", found[0].decode(errors="replace")
            job: Any = self.worker.job_class(taken_id, connection=self.worker.connection)
            # Set here, for RQ takes as long to find out that it is one as for all else of a job.
            job.serializer, job.origin = self.worker.serializer, self.queue.name
            execution = Execution(execution_id, taken_id, self.worker.connection, self.worker.name)
            try:
                if len(found) == 1:
                    job.refresh()  # which says why
                    continue
                job.restore(dict(zip(found[1][::2], found[1][1::2], strict=True)))
            except Unreadable as error:
                self._set_aside(job, execution, error)
            except NoSuchJobError:
                continue
            else:
                self.worker.executions[execution_id] = execution
                job.worker_name, job.started_at, job._status = self.worker.name, now(), JobStatus.STARTED
                job.beside = found[2] if len(found) > 2 else None
                return Taken(job, execution)
        return None

    def _set_aside(self, job: Job, execution: Execution, error: Unreadable) -> None:
        set_aside(self.worker.connection, job.id, error)
        with self.worker.connection.pipeline() as pipeline:
            execution.delete(job, pipeline)
            pipeline.execute()

    def end(self, ended: Sequence[Any]) -> None:
        """Ends a job, and takes no other."""
        self._run(ended, "", "")

    def _run(self, ended: Sequence[Any], execution_id: str, job_id: str) -> Any:
        words = [self.worker.name, time.time(), rq_now(), LEASE_SECONDS, *(ended or [""] * 6), execution_id, job_id]
        return self._next(self._keys, [*words, *(self._words(execution_id) if execution_id else [])])

    def ending(self, job: Job, execution: Execution) -> list[Any]:
        """Returns what `take` and `end` write of a job that has ended well."""
        began, over = job.started_at or now(), job.ended_at or now()
        took = (over - began).total_seconds()
        kept = job.get_result_ttl(self.worker.default_result_ttl)
        return [job.id, execution.id, utcformat(over), job.serializer.dumps(job._result), kept, took]
