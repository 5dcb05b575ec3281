"""Accepts, requeues, cancels and reads jobs in RQ's queues.

One Lua script accepts a job: it stores everything (the job, its place in the queue, its idempotency key, what the
caller wants stored beside it) or nothing. The commands are RQ's own: RQ writes them once into a pipeline that is never
executed, and the blanks are filled for each job. The script recognises a job that it has already stored, so a call
whose reply was lost can be repeated, and a client's repeat by its idempotency key. Knows no HTTP and no mail.
RQ: https://python-rq.org/docs/
"""

from __future__ import annotations

import json
import time
import zlib
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from functools import lru_cache
from typing import Any, NamedTuple

from redis.client import Pipeline
from redis.exceptions import ConnectionError, TimeoutError, WatchError
from rq import Queue, Retry
from rq.exceptions import DeserializationError, InvalidJobOperation, NoSuchJobError
from rq.job import Job
from rq.rate_limit import ACQUIRE_AND_ENQUEUE_SCRIPT
from rq.serializers import JSONSerializer
from rq.utils import now, utcformat

from queues import keys
from queues.acceptance import Acceptance as Acceptance
from queues.acceptance import Accepted as Accepted
from queues.acceptance import Idempotency as Idempotency
from queues.acceptance import IdempotencyConflict as IdempotencyConflict
from queues.acceptance import replies
from queues.connection import ROOM, Redis, Script, translating_errors
from queues.quarantine import DAMAGED, StrictJob, Unreadable, set_aside
from queues.replication import Replication
from queues.table import QUEUES

# Runs the commands from ARGV[at] to before ARGV[stop], each as the number of its words and the words. A script cannot
# call another one: `promote` is the one that RQ calls, the last step of queueing a job of a task with `concurrency`.
RUN = f"""
local function promote(KEYS, ARGV) {ACQUIRE_AND_ENQUEUE_SCRIPT} end
local function run(at, stop)
  while at < stop do
    local words = tonumber(ARGV[at])
    if ARGV[at + 1] == 'EVALSHA' then
      promote({{unpack(ARGV, at + 4, at + 5)}}, {{unpack(ARGV, at + 6, at + words)}})
    else
      redis.call(unpack(ARGV, at + 1, at + words))
    end
    at = at + words + 1
  end
end
"""
# KEYS: the (first) job's key, the idempotency key if there is one. ARGV: job ids with commas, fingerprint, lifetime of
# the idempotency key in seconds, how many words of commands follow, these, then what is for `beside`.
ACCEPT = """
if redis.call('EXISTS', KEYS[1]) == 1 then return {'accepted', ARGV[1]} end
if KEYS[2] then
  local known = redis.call('GET', KEYS[2])
  if known then
    local fingerprint, ids = string.match(known, '^(%w+) (.+)$')
    return {fingerprint == ARGV[2] and 'replayed' or 'conflict', ids or ''}
  end
end
if not room() then return redis.error_reply('OOM what is left of maxmemory is for mail that goes out') end
run(5, 5 + ARGV[4])
beside(5 + ARGV[4])
if KEYS[2] then redis.call('SET', KEYS[2], ARGV[2] .. ' ' .. ARGV[1], 'EX', ARGV[3]) end
return {'accepted', ARGV[1]}
"""
CANCELABLE = ("queued", "rate_limited", "scheduled", "failed", "stopped", "canceled")
# ARGV[at] and on is what `Jobs.removal` returns, or nothing. Returns the job's status ("": it is gone) if it is not the
# one in which the job may be removed.
REMOVE_JOB = f"""{RUN}
local function remove_job(at)
  if not ARGV[at] then return end
  local status = redis.call('HGET', ARGV[at], 'status') or ''
  if status ~= ARGV[at + 1] then return status end
  run(at + 2, #ARGV + 1)
end
"""


class NotFound(Exception):
    """There is no such job, or it is no longer kept."""


class JobFailed(Exception):
    """Raised by a job to fail in an ordinary way. The text is the reason, and all that RQ keeps and logs of it."""


class NotPossible(Exception):
    """The job is in a state in which this cannot be done. The text says which."""


class Beside(NamedTuple):
    """Adds to the same step: Lua that defines `beside(at)`, and its words, which are in ARGV[at] and on."""

    source: str = "local function beside() end\n"
    words: Sequence[Any] = ()


NOTHING = Beside()


def flatten(commands: Pipeline) -> list[Any]:
    """Returns a pipeline's commands as RUN reads them: each as the number of its words and the words."""
    return [word for command, _ in commands.command_stack for word in (len(command), *command)]


class Place(NamedTuple):
    """Where a job waits: at the end of its queue or at its `front`; in the list of another name, `aside`; or in RQ's
    scheduled registry until `at` (seconds since 1970)."""

    at: int = 0
    front: bool = False
    aside: str = ""


class Call(NamedTuple):
    """What a job calls its function with, and where it waits."""

    args: Sequence[str]
    kwargs: dict[str, Any]
    place: Place = Place()


BLANKS = ("data", "created_at", "enqueued_at", "ZADD", "EVALSHA")


class JobTemplate:
    """Records what RQ writes to queue a job, with blanks for what differs between jobs: id, call and time. RQ itself
    would take a fifth of the CPU of an accepted mail. Raises `KeyError` if RQ does not write these blanks."""

    ID = "00000000-0000-0000-0000-000000000000"
    AT = 2**37  # in the place of `Place.at`

    def __init__(self, function: str, words: list[Any]) -> None:
        self.function = function
        self.words = words
        places = {name: place for place, name in enumerate(words) if name in BLANKS}
        self.data = places["data"] + 1
        # Behind EVALSHA: script, 2, two keys, limit, time in seconds, time as RQ writes it, what keys begin with.
        limited = places.get("EVALSHA")
        queued_at = limited + 7 if limited else places.get("enqueued_at", -1) + 1  # a scheduled job has none
        self.times = [place for place in (places["created_at"] + 1, queued_at) if place]
        self.seconds = (limited + 6, places["ZADD"] + 2) if limited else ()
        self.ids = [place for place, word in enumerate(words) if isinstance(word, str) and self.ID in word]
        self.at = [place for place, word in enumerate(words) if word == self.AT]

    def render(self, job_id: str, call: Call) -> list[Any]:
        words, moment = self.words.copy(), rq_now()
        for place in self.ids:
            words[place] = words[place].replace(self.ID, job_id)
        for place in self.times:
            words[place] = moment
        for place in self.at:
            words[place] = call.place.at
        for place in self.seconds:
            words[place] = time.time()  # a fraction, too: those that wait go in this order
        # RQ packs it, and reads it unpacked as well
        words[self.data] = json.dumps((self.function, None, call.args, call.kwargs))
        return words


class Policy(NamedTuple):
    """How a job is run and kept; times in seconds. `retry_in` lists the pauses before each further attempt. No more
    than `concurrency` jobs of its function run at the same time; 0: any number."""

    timeout: int
    retry_in: tuple[int, ...]
    result_ttl: int
    failure_ttl: int
    concurrency: int = 0


class Jobs:
    """Holds all queues, for those who submit jobs and look at them."""

    def __init__(self, redis: Redis, replicas: int = 0) -> None:
        """`replicas` is REDIS_REPLICAS: how many must have what is accepted."""
        self.redis = redis
        self.replication = Replication(redis, replicas)
        self.queues = {name: Queue(name, connection=redis, serializer=JSONSerializer) for name in QUEUES}
        self._accept = lru_cache(lambda beside: Script(redis, RUN + ROOM + beside + ACCEPT))
        self._remove = Script(redis, REMOVE_JOB + "return remove_job(1)")
        self._template = lru_cache(self._record)

    def accept(self, acceptance: Acceptance) -> Accepted:
        """Stores and queues jobs in one step.

        Returns the ids, or those of an earlier request with the same idempotency key and fingerprint. Raises
        `IdempotencyConflict` if the fingerprint was another, `Unavailable` if Redis cannot store them: then nothing is
        stored, or all of it (a lost reply).
        """
        [reply] = replies(self.replication, [acceptance])
        return acceptance.result(reply)

    def acceptance(
        self,
        queue: str,
        function: str,
        calls: Mapping[str, Call],
        policy: Policy,
        *,
        beside: Beside = NOTHING,
        idempotency: Idempotency | None = None,
        idempotency_ttl: int = 86400,
    ) -> Acceptance:
        """Returns the acceptance of jobs, and of what is `beside` in the same step. `calls` has each job's call by its
        id."""
        key, fingerprint = ([idempotency.key], idempotency.fingerprint) if idempotency else ([], "")
        commands = list[Any]()
        for job_id, call in calls.items():
            place = call.place._replace(at=JobTemplate.AT if call.place.at else 0)
            commands += self._template(queue, function, policy, place).render(job_id, call)
        words = [",".join(calls), fingerprint, idempotency_ttl, len(commands), *commands, *beside.words]
        return Acceptance(self._accept(beside.source), [keys.job(next(iter(calls))), *key], words)

    def _record(self, queue: str, function: str, policy: Policy, place: Place) -> JobTemplate:
        job = Job.create(
            function,
            id=JobTemplate.ID,
            origin=queue,
            description=f"{function} {JobTemplate.ID}",  # RQ's default repeats the arguments
            timeout=policy.timeout,
            retry=Retry(max=len(policy.retry_in), interval=list(policy.retry_in)) if policy.retry_in else None,
            result_ttl=policy.result_ttl,
            failure_ttl=policy.failure_ttl,
            connection=self.redis,
            serializer=JSONSerializer,
        )
        if policy.concurrency:
            job.rate_limit_key, job.rate_limit_concurrency = f"{queue}:{function}", policy.concurrency
        job.enqueue_at_front = place.front
        commands = self.redis.pipeline()
        with translating_errors():  # RQ asks once which Redis it is
            if place.at:
                self.queues[queue].schedule_job(job, datetime.fromtimestamp(place.at, timezone.utc), pipeline=commands)
            else:
                self._enqueue(job, commands)
        aside = {keys.queue(queue): keys.queue(place.aside)} if place.aside else {}
        return JobTemplate(function, [aside.get(word, word) for word in flatten(commands)])

    def _enqueue(self, job: Job, pipeline: Pipeline) -> None:
        """Does what RQ does to queue a job. It refuses a pipeline for one with a limit, since who saves the job again
        in the same pipeline would undo its promotion; we do not."""
        queue = self.queues[job.origin]
        if job.has_rate_limit:
            pipeline.sadd(queue.redis_queues_keys, queue.key)
            queue._enqueue_rate_limited_job(job, pipeline=pipeline)
        else:
            queue.enqueue_job(job, pipeline=pipeline, at_front=bool(job.enqueue_at_front))

    def recall(self, idempotency: Idempotency) -> Accepted | None:
        """Returns what an earlier request with this key was answered. Raises `IdempotencyConflict` as `accept` does."""
        with translating_errors():
            known: Any = self.replication.execute("GET", idempotency.key)
        if not known:
            return None
        fingerprint, _, ids = known.decode(errors="replace").partition(" ")
        if fingerprint != idempotency.fingerprint:
            raise IdempotencyConflict
        return Accepted(tuple(ids.split(",")), replayed=True)

    def fetch(self, job_id: str, *, to_change: bool = False) -> Job:
        """Returns a job. Raises `NotFound`. Sets an unreadable one `to_change` aside: a new one may take its place."""
        try:
            with translating_errors():
                job = StrictJob.fetch(job_id, connection=self.redis, serializer=JSONSerializer)
        except Unreadable as error:
            if to_change and self._is_of_no_other(job_id):
                with translating_errors():
                    set_aside(self.redis, job_id, error)
            raise NotFound("what is stored under this id cannot be read as a job") from None
        except NoSuchJobError:
            raise NotFound from None
        if job.origin not in self.queues:  # another program's, in the same Redis
            raise NotFound
        return job

    def _is_of_no_other(self, job_id: str) -> bool:
        """Returns whether an unreadable job is of our queues, or no hash, which no program could use."""
        key = keys.job(job_id)
        with translating_errors():
            if self.redis.type(key) != b"hash":
                return True
            origin: Any = self.redis.hget(key, "origin")
        return (origin or b"").decode(errors="replace") in self.queues

    def read(self, job_id: str) -> dict[str, Any]:
        """Returns a job's state. `result` is what its function returned, `error` the last line of its traceback."""
        job = self.fetch(job_id)
        try:
            with translating_errors():
                latest = job.latest_result()
        except (*DAMAGED, zlib.error):
            latest = None
        seen: dict[str, Any] = {"job_id": job.id, "task": _task(job), "status": job.get_status(False).value}
        seen |= {name: _iso(getattr(job, name)) for name in ("created_at", "enqueued_at", "started_at", "ended_at")}
        if latest and latest.type == latest.Type.SUCCESSFUL:
            seen["result"] = latest.return_value
        elif not latest and job.is_finished:
            seen["result"] = job._result  # see queues.workers.shrink
        elif latest and latest.exc_string:
            seen["error"] = latest.exc_string.strip().splitlines()[-1]
        return seen

    def requeue(self, job_id: str) -> None:
        """Puts a failed job back into its queue with all its attempts. Raises `NotFound` or `NotPossible`."""
        at = self.replication.at
        job = self.fetch(job_id, to_change=True)
        job._dependency_ids = []  # a person asks, so it waits for nobody
        with translating_errors(), self.redis.pipeline() as pipe:
            pipe.watch(job.key)  # type: ignore[no-untyped-call]  # a worker may take it meanwhile
            try:
                status = job.get_status()
                if status not in ("failed", "stopped", "canceled"):
                    raise NotPossible(f"only a failed job can be queued again; this one is {status.value}")
                job.retries_left = len(job.retry_intervals) if job.retry_intervals else None
                job.started_at = job.ended_at = None
                pipe.multi()
                pipe.zrem(keys.failed(job.origin), job.id)
                pipe.zrem(keys.canceled(job.origin), job.id)
                pipe.persist(job.key)  # else it expires while it waits for a worker
                self._enqueue(job, pipe)
                pipe.execute()
                self.replication.confirm(at)
            except WatchError as error:
                if isinstance(error.__context__, (ConnectionError, TimeoutError)):  # redis-py calls these so, too
                    raise error.__context__ from None
                raise NotPossible("the job was taken by a worker at this moment; look again") from None
            except InvalidJobOperation:  # its hash vanished between the fetch and now
                raise NotFound from None

    def cancel(self, job_id: str) -> None:
        """Removes a job that has not run, or has failed. Raises `NotFound`, `NotPossible`."""
        words = self.removal(job_id)
        with translating_errors():
            status = self.replication.call(self._remove, [], words)
        if status is not None:
            raise not_removed(status.decode())

    def removal(self, job_id: str) -> list[Any]:
        """Returns what `remove_job` needs: the job's key, the status in which it may be removed, and the commands by
        which RQ removes it. Raises `NotFound`."""
        job = self.fetch(job_id, to_change=True)
        with translating_errors():
            self._forget_lost_executions(job)
            commands = self.redis.pipeline()
            try:
                job.delete(pipeline=commands)
            except InvalidJobOperation:  # its hash vanished between the fetch and now
                raise NotFound from None
            except ValueError:  # an attempt ended between the look at its executions and now
                return [job.key, "none"]
        status = job.get_status(False).value
        return [job.key, status if status in CANCELABLE else "none", *flatten(commands)]

    def _forget_lost_executions(self, job: Job) -> None:
        """Drops the attempts whose worker has died: their records expire a minute before the job's list of them, and
        RQ's `Job.delete` raises for each that it finds in the list alone."""
        listed = job.execution_registry
        for execution_id in listed.get_execution_ids():
            if not self.redis.hexists(f"{keys.EXECUTION}{job.id}:{execution_id}", "created_at"):
                self.redis.zrem(listed.key, execution_id)


def not_removed(status: str) -> Exception:
    """Returns the exception for a job that `remove_job` found in this status."""
    if not status:
        return NotFound()
    if status in CANCELABLE:
        return NotPossible("the job moved on at this moment; look again")
    return NotPossible(f"a job that is {status} cannot be canceled any more")


def _task(job: Job) -> str:
    try:
        return str(job.func_name or "").removeprefix("tasks.")
    except DeserializationError:  # pickled by another program; our workers refuse it
        return ""


def _iso(moment: datetime | None) -> str | None:
    return moment.astimezone(timezone.utc).isoformat(timespec="milliseconds") if moment else None


def rq_now() -> str:
    """Returns the time as RQ writes it into a job."""
    return utcformat(now())
