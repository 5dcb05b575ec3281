"""RQ and Redis as this project uses them: one connection, two queues, one atomic accept, and a look at any job.

A job is accepted by one Lua script that does everything (the job, its place in the queue, its idempotency key,
whatever the caller wants stored beside it) or nothing. The commands are RQ's own: it writes them once, into a pipeline
that is never executed but filled in for each job and handed to the script. The script recognises a job that it has
already stored, so a call whose reply was lost can be repeated; and it recognises a client's repeat by its idempotency
key.

Refuses to hang: Redis that is away, full or read-only gives `Unavailable` within three seconds. Knows no HTTP, no mail.
The only home of `redis` and of `rq.Queue`.  RQ: https://python-rq.org/docs/  Lua: https://redis.io/docs/latest/develop/programmability/
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import datetime, timezone
from functools import lru_cache
from operator import itemgetter
from typing import Any, NamedTuple

import hiredis
import rq.job
from redis import Redis
from redis._parsers import Encoder
from redis.backoff import ExponentialWithJitterBackoff, NoBackoff
from redis.client import Pipeline
from redis.connection import HiredisRespSerializer, PythonRespSerializer
from redis.exceptions import (
    AuthenticationError,
    ConnectionError,
    InvalidResponse,
    NoScriptError,
    RedisError,
    ResponseError,
    TimeoutError,
    WatchError,
)
from redis.maint_notifications import MaintNotificationsConfig
from redis.retry import Retry as RedisRetry
from rq import Queue, Retry
from rq.exceptions import DeserializationError, InvalidJobOperation, NoSuchJobError, TimeoutFormatError
from rq.job import JOB_ID_PATTERN, parse_job_id
from rq.serializers import JSONSerializer
from rq.utils import now, utcformat

from events import emit

LOST_AFTER = 45  # seconds without a sign of life after which a worker, and its claim on a mail, count as dead
BEAT = 15  # seconds between signs of life
EMAIL, JOBS = "email", "jobs"  # the queues. One queue per worker, always: on two, RQ loses what a killed worker popped

# KEYS: the (first) job's key, the idempotency key ("" for none). ARGV: job ids with commas, fingerprint, lifetime of
# the idempotency key in seconds, then the commands, each as the number of its words and the words.
ACCEPT = """
if redis.call('EXISTS', KEYS[1]) == 1 then return {'accepted', ARGV[1]} end
if KEYS[2] ~= '' then
  local known = redis.call('GET', KEYS[2])
  if known then
    local fingerprint, ids = string.match(known, '^(%w+) (.+)$')
    return {fingerprint == ARGV[2] and 'replayed' or 'conflict', ids}
  end
end
local at = 4
while at <= #ARGV do
  local words = tonumber(ARGV[at])
  redis.call(unpack(ARGV, at + 1, at + words))
  at = at + words + 1
end
if KEYS[2] ~= '' then redis.call('SET', KEYS[2], ARGV[2] .. ' ' .. ARGV[1], 'EX', ARGV[3]) end
return {'accepted', ARGV[1]}
"""


class Script:
    """A Lua script, called by its digest. Where Redis does not know it (any more), the call brings the source:
    redis-py's own way, to load it and call it again, fails if it is forgotten in between."""

    def __init__(self, redis: Redis, source: str) -> None:
        self.redis = redis
        self.source = source
        self.digest = hashlib.sha1(source.encode()).hexdigest()

    def __call__(self, keys: Sequence[str], args: Sequence[Any] = ()) -> Any:
        try:
            return self.redis.evalsha(self.digest, len(keys), *keys, *args)
        except NoScriptError:
            return self.redis.eval(self.source, len(keys), *keys, *args)


class Unavailable(Exception):
    """Redis cannot store or read now. Nothing was half-stored; the same request may be sent again later."""


class IdempotencyConflict(Exception):
    """The idempotency key was used before, for another request."""


class QueueState(NamedTuple):
    """A queue in numbers. `jobs` counts them by state; `workers` are those that gave a sign of life lately; of the
    times in seconds, the first is the age of the job that waits longest, the second how late the scheduler is."""

    jobs: dict[str, int]
    workers: int
    oldest_queued: float
    overdue: float


class NotFound(Exception):
    """There is no such job, or it is no longer kept."""


class NotPossible(Exception):
    """The job is in a state in which this cannot be done. The text says which."""


class Idempotency(NamedTuple):
    """What makes two requests the same: who sent which key to which endpoint, and the body."""

    key: str
    fingerprint: str

    @classmethod
    def of(cls, caller: str, endpoint: str, key: str, body: object) -> Idempotency:
        """`body` is parsed JSON, so that the order of its members does not matter."""
        canonical = json.dumps(body, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
        digest = hashlib.sha256(f"{caller}\n{endpoint}\n{key}".encode()).hexdigest()
        return cls(f"idempotency:{digest}", hashlib.sha256(canonical.encode()).hexdigest())


def spelled_out(commands: Pipeline) -> list[Any]:
    """As ACCEPT reads them: each as the number of its words and the words."""
    return [word for command, _ in commands.command_stack for word in (len(command), *command)]


class Form:
    """What RQ writes to queue a job, recorded once, with blanks for what differs from job to job: its id, its call and
    the time. To have RQ make each job anew takes a fifth of the CPU of an accepted mail. Raises `KeyError` where RQ
    does not write what this knows how to fill."""

    ID = "00000000-0000-0000-0000-000000000000"

    def __init__(self, function: str, words: list[Any]) -> None:
        self.function = function
        self.words = words
        names = {name: place for place, name in enumerate(words) if name in ("data", "created_at", "enqueued_at")}
        self.data = names["data"] + 1
        self.times = (names["created_at"] + 1, names["enqueued_at"] + 1)
        self.ids = [place for place, word in enumerate(words) if isinstance(word, str) and self.ID in word]

    def filled(self, job_id: str, args: Sequence[str], kwargs: dict[str, Any]) -> list[Any]:
        words, moment = self.words.copy(), utcformat(now())
        for place in self.ids:
            words[place] = words[place].replace(self.ID, job_id)
        for place in self.times:
            words[place] = moment
        words[self.data] = json.dumps((self.function, None, args, kwargs))  # RQ packs it, and reads it unpacked as well
        return words


class Accepted(NamedTuple):
    """The jobs of a request, in its order. `replayed`: those of an earlier request with the same idempotency key."""

    ids: tuple[str, ...]
    replayed: bool

    @property
    def id(self) -> str:
        """Of a request for one."""
        return self.ids[0]


class Packer:
    """Writes a command as Redis reads it. hiredis is the quickest, but copies everything three times: an attachment is
    left to redis-py's own, which copies nothing large. Most of redis-py's time before hiredis goes into looking for
    kinds of words that we do not use."""

    LARGE = 64 * 1024  # bytes

    def __init__(self) -> None:
        self.careful = HiredisRespSerializer()
        self.sparing = PythonRespSerializer(6000, Encoder("utf-8", "strict", False).encode)  # type: ignore[no-untyped-call]

    def pack(self, *words: Any) -> Any:
        if any(type(word) is bytes and len(word) > self.LARGE for word in words):
            return self.sparing.pack(*words)  # type: ignore[no-untyped-call]
        if type(words[0]) is str and " " not in words[0]:
            return [hiredis.pack_command(words)]
        return self.careful.pack(*words)  # CLIENT SETNAME is two words


def connect(url: str, *, patient: bool = False) -> Redis:
    """A Redis client. The API's gives up within three seconds; a `patient` one (the workers') outlasts a restart.

    The API's never repeats a command by itself: redis-py would send a transaction again whose reply was lost, and so
    queue a mail twice. The workers' scripts may be repeated, each says why.
    """
    return Redis.from_url(
        url,
        socket_connect_timeout=5 if patient else 1,
        # Twice this fits into three seconds: a request may first have to wait for a thread that waits for Redis.
        socket_timeout=10 if patient else 1.2,
        **({} if url.startswith("unix:") else {"socket_keepalive": True}),
        retry=RedisRetry(ExponentialWithJitterBackoff(base=0.05, cap=2), 40) if patient else RedisRetry(NoBackoff(), 0),
        command_packer=Packer(),
        # A feature of Redis' cloud, asked for on each connection in a round trip that every other server refuses.
        maint_notifications_config=MaintNotificationsConfig(enabled=False),
    )


def impatient(redis: Redis) -> Redis:
    """The same Redis for signs of life, which are worth nothing late. A patient client that finds its connection dead
    waits for up to a quarter of a minute before it takes another, and all the other signs would wait behind it."""
    pool = redis.connection_pool
    hurry = {"socket_connect_timeout": 1, "socket_timeout": 1.2, "retry": RedisRetry(NoBackoff(), 0)}
    return Redis(connection_pool=type(pool)(pool.connection_class, **(pool.connection_kwargs | hurry)))


CANNOT_NOW = {  # a word of Redis' error -> what is the matter
    "OOM": "Redis is out of memory (maxmemory is reached)",
    "READONLY": "Redis is a read-only replica",
    "MISCONF": "Redis cannot write to its disk, so it refuses writes",
    "NOREPLICAS": "Redis misses replicas, so it refuses writes",
    "MASTERDOWN": "Redis is a replica without its master",
    "NOPERM": "Redis' ACL does not let us do this",
    "The user executing the script": "Redis' ACL does not let us do this",  # Redis 7
    "ACL failure in script": "Redis' ACL does not let us do this",  # Valkey 9
    "BUSY": "Redis is busy with a script",
}


_silent = threading.Event()
_scout = threading.RLock()


def is_silent() -> bool:
    """Whether Redis did not answer when it was last asked, so that asking it may take long."""
    return _silent.is_set()


@contextmanager
def scouting() -> Iterator[None]:
    """Once Redis is silent, one caller at a time finds out whether it is back; the others are refused at once.

    If each waited for the time-out, a request that waits for a thread of Waitress would wait for one after another.
    """
    silent = _silent.is_set()
    if silent and not _scout.acquire(blocking=False):
        raise ConnectionError
    try:
        yield
        _silent.clear()
    except (ConnectionError, TimeoutError):
        _silent.set()
        raise
    except Exception:  # it answered, if not as hoped
        _silent.clear()
        raise
    finally:
        if silent:
            _scout.release()


@contextmanager
def unavailable() -> Iterator[None]:
    """Turns what Redis says when it cannot work now into `Unavailable`; a mistake of ours stays what it is."""
    try:
        with scouting():
            yield
    except RedisError as error:
        if reason := why_unavailable(error):
            raise Unavailable(reason) from None
        raise


def why_unavailable(error: Exception) -> str | None:
    """Returns why Redis cannot work now, if that is what the exception says."""
    match error:
        case AuthenticationError():
            return "Redis does not accept our password"
        case ConnectionError() | TimeoutError():
            return "Redis does not answer"
        case InvalidResponse():
            return "what answers at REDIS_URL is not Redis"
        case ResponseError():
            # redis-py takes the word off if it knows it; before version 7, Redis put it into the middle for a script.
            said = re.search(rf"\b({'|'.join(CANNOT_NOW)})\b", f"{error.status_code} {error}")
            return CANNOT_NOW[said[1]] if said else None
    return None


UNREADABLE = "jobs:unreadable"  # sorted set: ids of jobs that were set aside, by when; the hashes are at <this>:<id>
UNREADABLE_KEPT = 14 * 86400  # seconds
TEN_YEARS = 10 * 365 * 86400  # seconds; what is longer, Redis or Python may refuse

# KEYS: job, where it is put, UNREADABLE. ARGV: job id, now, lifetime in seconds, how many ids are kept. 0: another was
# quicker.
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
    """What is stored under a job's key is no job that RQ can work with. To RQ, this says that there is no such job."""


# What reading a damaged job raises. Nothing else is taken for damage: an exception may also come out of a signal.
DAMAGED = (
    *(ValueError, TypeError, LookupError, AttributeError, AssertionError, ArithmeticError, RecursionError),
    TimeoutFormatError,
)


class Job(rq.job.Job):
    """RQ's job, read strictly: what RQ would take and then fail at, outside of the job's own attempt, is refused."""

    @classmethod
    def fetch(cls, id: str, connection: Redis | None = None, serializer: Any = None) -> Job:
        """Raises `NoSuchJobError`, and its kind `Unreadable`."""
        if not JOB_ID_PATTERN.fullmatch(parse_job_id(id)):
            raise NoSuchJobError
        return super().fetch(id, connection, serializer)  # type: ignore[return-value]

    def refresh(self) -> None:
        try:
            super().refresh()  # type: ignore[no-untyped-call]
        except ResponseError as error:
            if "WRONGTYPE" not in f"{error.status_code} {error}":
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
        if not all(number is None or -1 <= number <= TEN_YEARS for number in numbers):
            raise ValueError
        if not pauses or not isinstance(self._dependency_ids, list):
            raise ValueError
        with suppress(DeserializationError):  # such a job fails in its own attempt, where a person sees it
            if not isinstance(self.func_name, str):
                raise ValueError


def set_aside(redis: Redis, job_id: str, error: Unreadable) -> None:
    """Moves an unreadable job out of RQ's sight, so that it stops nobody's recovery, and says so. What refers to it
    finds that it is gone: RQ forgets it, and its mail fails and can be queued again."""
    keys = [Job.key_for(job_id), f"{UNREADABLE}:{job_id}", UNREADABLE]
    if Script(redis, SET_ASIDE)(keys, [job_id, time.time(), UNREADABLE_KEPT, 1000]):
        emit("unreadable", logging.ERROR, id=job_id, reason=type(error.__cause__).__name__)


class _Heart:
    """Gives all the signs of life of this process, from one thread: one each would cost more than the mail. Each in its
    turn; one that could not be given is tried again a second later, after those that are due."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.due: dict[int, tuple[float, Callable[[], object]]] = {}  # when, and what
        self.thread: threading.Thread | None = None

    def take(self, sign_of_life: Callable[[], object]) -> int:
        with self.lock:
            self.due[id(sign_of_life)] = (time.monotonic() + BEAT, sign_of_life)
            if not self.thread or not self.thread.is_alive():
                self.thread = threading.Thread(target=self._beat, name="heart", daemon=True)
                self.thread.start()
        return id(sign_of_life)

    def _beat(self) -> None:
        while True:
            time.sleep(min(1, BEAT))
            while self._beat_once():
                pass

    def _beat_once(self) -> bool:
        """False where nothing is due, or it could not be given."""
        with self.lock:
            moment, sign_of_life = min(self.due.values(), key=itemgetter(0), default=(math.inf, None))
        if sign_of_life is None or moment > time.monotonic():
            return False
        try:
            sign_of_life()
            pause = BEAT
        except Exception:  # whatever it was, the other signs must not end with it
            pause = 1
        with self.lock:
            if id(sign_of_life) in self.due:
                self.due[id(sign_of_life)] = (time.monotonic() + pause, sign_of_life)
        return pause == BEAT


_heart = _Heart()


@contextmanager
def beating(sign_of_life: Callable[[], object]) -> Iterator[None]:
    """Gives the sign every `BEAT` seconds, from a thread, for as long as the body runs. One that Redis does not take is
    tried again; if none comes through, that is what `LOST_AFTER` is for. It should use an `impatient` client."""
    taken = _heart.take(sign_of_life)
    try:
        yield
    finally:
        with _heart.lock:
            del _heart.due[taken]


class Jobs:
    """The two queues, seen from the side that submits and looks."""

    def __init__(self, redis: Redis) -> None:
        self.redis = redis
        self.queues = {name: Queue(name, connection=redis, serializer=JSONSerializer) for name in (EMAIL, JOBS)}
        self._accept = Script(redis, ACCEPT)

    def accept(
        self,
        queue: str,
        function: str,
        job_id: str,
        *,
        args: Sequence[str] = (),
        kwargs: dict[str, Any] | None = None,
        **how: Any,
    ) -> Accepted:
        """One job, as `accept_all`."""
        return self.accept_all(queue, function, {job_id: (args, kwargs or {})}, **how)

    def accept_all(
        self,
        queue: str,
        function: str,
        calls: Mapping[str, tuple[Sequence[str], dict[str, Any]]],
        *,
        timeout: int,
        retry_in: Sequence[int],
        result_ttl: int,
        failure_ttl: int,
        beside: Callable[[Pipeline], None] | None = None,
        idempotency: Idempotency | None = None,
        idempotency_ttl: int = 86400,
    ) -> Accepted:
        """Stores jobs and queues them, in one step, with the commands that `beside` adds. All times are in seconds.

        `calls` has the arguments and keyword arguments of each, by its id; `retry_in` lists the pauses before each
        further attempt. Returns the ids; where the idempotency key was seen before with the same fingerprint, those of
        then. Raises `IdempotencyConflict` where it was seen with another, `Unavailable` if Redis cannot store them:
        then nothing is stored, or all of it (a reply that got lost).
        """
        with unavailable():
            form = self._form(queue, function, timeout, tuple(retry_in), result_ttl, failure_ttl)
            words = [word for job_id, (args, kwargs) in calls.items() for word in form.filled(job_id, args, kwargs)]
            if beside:
                commands = self.redis.pipeline()
                beside(commands)
                words += spelled_out(commands)
            verdict, known = self._run_accept(list(calls), words, idempotency, idempotency_ttl)
        if verdict == "conflict":
            raise IdempotencyConflict
        return Accepted(tuple(known.split(",")), verdict == "replayed")

    @lru_cache(maxsize=64)  # noqa: B019, there is one Jobs in a process
    def _form(
        self, queue: str, function: str, timeout: int, retry_in: tuple[int, ...], result_ttl: int, failure_ttl: int
    ) -> Form:
        job = Job.create(
            function,
            id=Form.ID,
            origin=queue,
            description=f"{function} {Form.ID}",  # RQ's default repeats the arguments
            timeout=timeout,
            retry=Retry(max=len(retry_in), interval=list(retry_in)) if retry_in else None,
            result_ttl=result_ttl,
            failure_ttl=failure_ttl,
            connection=self.redis,
            serializer=JSONSerializer,
        )
        commands = self.redis.pipeline()
        self.queues[queue].enqueue_job(job, pipeline=commands)
        return Form(function, spelled_out(commands))

    def _run_accept(
        self, ids: Sequence[str], commands: list[Any], idempotency: Idempotency | None, ttl: int
    ) -> tuple[str, str]:
        keys = [Job.key_for(ids[0]), idempotency.key if idempotency else ""]
        words = [",".join(ids), idempotency.fingerprint if idempotency else "", ttl, *commands]
        try:
            reply = self._accept(keys=keys, args=words)
        except ConnectionError:
            # A connection that died while it lay in the pool, or the reply that was lost. The script knows its own
            # jobs, so a second call stores nothing twice. A time-out is not repeated: the three seconds are spent.
            reply = self._accept(keys=keys, args=words)
        return reply[0].decode(), reply[1].decode()

    def recall(self, idempotency: Idempotency) -> Accepted | None:
        """What an earlier request with this key was answered. Raises `IdempotencyConflict` as `accept` does."""
        with unavailable():
            known: Any = self.redis.get(idempotency.key)
        if not known:
            return None
        fingerprint, ids = known.decode().split(" ")
        if fingerprint != idempotency.fingerprint:
            raise IdempotencyConflict
        return Accepted(tuple(ids.split(",")), replayed=True)

    def fetch(self, job_id: str, *, to_change: bool = False) -> Job:
        """Raises `NotFound`. What cannot be read and is `to_change` is set aside: a new job may then take its place."""
        try:
            with unavailable():
                job = Job.fetch(job_id, connection=self.redis, serializer=JSONSerializer)
        except Unreadable as error:
            if to_change and self._is_of_no_other(job_id):
                with unavailable():
                    set_aside(self.redis, job_id, error)
            raise NotFound("what is stored under this id cannot be read as a job") from None
        except NoSuchJobError:
            raise NotFound from None
        if job.origin not in self.queues:  # another program's, in the same Redis
            raise NotFound
        return job

    def _is_of_no_other(self, job_id: str) -> bool:
        """Whether an unreadable job is of our queues, or no hash, which no program could use."""
        key = Job.key_for(job_id)
        with unavailable():
            if self.redis.type(key) != b"hash":
                return True
            origin: Any = self.redis.hget(key, "origin")
        return (origin or b"").decode(errors="replace") in self.queues

    def read(self, job_id: str) -> dict[str, Any]:
        """What became of a job. `result` is what the function returned, `error` the last line of its traceback."""
        job = self.fetch(job_id)
        with unavailable():
            latest = job.latest_result()
        seen: dict[str, Any] = {
            "job_id": job.id,
            "task": _task(job),
            "status": job.get_status(False).value,
        }
        seen |= {name: _iso(getattr(job, name)) for name in ("created_at", "enqueued_at", "started_at", "ended_at")}
        if latest and latest.type == latest.Type.SUCCESSFUL:
            seen["result"] = latest.return_value
        elif latest and latest.exc_string:
            seen["error"] = latest.exc_string.strip().splitlines()[-1]
        return seen

    def requeue(self, job_id: str) -> None:
        """Puts a failed job back into its queue with all its attempts. Raises `NotFound` or `NotPossible`."""
        job = self.fetch(job_id, to_change=True)
        job._dependency_ids = []  # a person asks, so it waits for nobody
        with unavailable(), self._watching(job) as pipe:
            status = job.get_status()
            if status not in ("failed", "stopped", "canceled"):
                raise NotPossible(f"only a failed job can be queued again; this one is {status.value}")
            job.retries_left = len(job.retry_intervals) if job.retry_intervals else None
            job.started_at = job.ended_at = None
            pipe.multi()
            pipe.zrem(job.failed_job_registry.key, job.id)
            pipe.zrem(f"rq:canceled:{job.origin}", job.id)
            pipe.persist(job.key)  # it was to expire; now it must wait for a worker as long as it takes
            self.queues[job.origin].enqueue_job(job, pipeline=pipe)
            pipe.execute()

    def cancel(self, job_id: str, beside: Callable[[Pipeline], None] | None = None) -> None:
        """Removes a job that has not run, or has failed, with the commands that `beside` adds, in one step."""
        job = self.fetch(job_id, to_change=True)
        with unavailable(), self._watching(job) as pipe:
            status = job.get_status()
            if status not in ("queued", "scheduled", "failed", "stopped", "canceled"):
                raise NotPossible(f"a job that is {status.value} cannot be canceled any more")
            self._forget_lost_executions(job)
            pipe.multi()
            if beside:
                beside(pipe)
            job.delete(pipeline=pipe)
            pipe.execute()

    def _forget_lost_executions(self, job: Job) -> None:
        """Drops the attempts whose worker has died: their records expire a minute before the job's list of them, and
        RQ's `Job.delete` raises for each that it finds in the list alone."""
        listed = job.execution_registry
        for execution_id in listed.get_execution_ids():
            if not self.redis.hexists(f"rq:execution:{job.id}:{execution_id}", "created_at"):
                self.redis.zrem(listed.key, execution_id)

    @contextmanager
    def _watching(self, job: Job) -> Iterator[Pipeline]:
        """A transaction that fails if a worker takes the job meanwhile."""
        with self.redis.pipeline() as pipe:
            pipe.watch(job.key)  # type: ignore[no-untyped-call]
            try:
                yield pipe
            except WatchError as error:
                if isinstance(error.__context__, (ConnectionError, TimeoutError)):  # redis-py calls these so, too
                    raise error.__context__ from None
                raise NotPossible("the job was taken by a worker at this moment; look again") from None
            except InvalidJobOperation:  # its hash vanished between the fetch and now
                raise NotFound from None

    def state(self) -> dict[str, Any]:
        """How the store and the mail queue do. Reads only, in time that does not grow with the queue."""
        with unavailable():
            queue = self.queues[EMAIL]
            pipe = self.redis.pipeline(transaction=False)
            pipe.info()
            pipe.lindex(queue.key, 0)
            pipe.llen(queue.key)
            pipe.scard(f"rq:workers:{EMAIL}")
            pipe.zrange(f"rq:scheduled:{EMAIL}", 0, 0, withscores=True)
            info, head, queued, workers, scheduled = pipe.execute()
            enqueued_at = self.redis.hget(f"rq:job:{head.decode()}", "enqueued_at") if head else None
        return {
            "info": info,
            "queued": queued,
            "workers": workers,
            "oldest_queued_seconds": _age(enqueued_at),
            "overdue_seconds": round(max(0.0, time.time() - scheduled[0][1]), 3) if scheduled else 0,
        }

    def queue_states(self) -> dict[str, QueueState]:
        """Of both queues, for who watches them. Reads only, in time that does not grow with the queues."""
        with unavailable():
            return {name: self._queue_state(name) for name in self.queues}

    def _queue_state(self, name: str) -> QueueState:
        pipe = self.redis.pipeline(transaction=False)
        pipe.llen(f"rq:queue:{name}")
        for state in ("scheduled", "wip", "failed", "deferred"):
            pipe.zcard(f"rq:{state}:{name}")
        pipe.lindex(f"rq:queue:{name}", 0)
        pipe.zrange(f"rq:scheduled:{name}", 0, 0, withscores=True)
        pipe.smembers(f"rq:workers:{name}")
        queued, scheduled, started, failed, deferred, head, first, workers = pipe.execute()
        pipe.hget(f"rq:job:{head.decode() if head else ''}", "enqueued_at")
        for worker in workers:
            pipe.hget(worker, "last_heartbeat")
        enqueued_at, *beats = pipe.execute()
        ages = [_age(beat) for beat in beats]
        return QueueState(
            {"queued": queued, "scheduled": scheduled, "started": started, "failed": failed, "deferred": deferred},
            sum(age is not None and age < LOST_AFTER + BEAT for age in ages),
            _age(enqueued_at) or 0.0,
            max(0.0, time.time() - first[0][1]) if first else 0.0,
        )


def _task(job: Job) -> str:
    try:
        return str(job.func_name or "").removeprefix("tasks.")
    except DeserializationError:  # pickled by another program; our workers refuse it
        return ""


def _iso(moment: datetime | None) -> str | None:
    return moment.astimezone(timezone.utc).isoformat(timespec="milliseconds") if moment else None


def _age(enqueued_at: Any) -> float | None:
    try:
        moment = datetime.fromisoformat((enqueued_at or b"").decode().replace("Z", "+00:00"))
    except ValueError:
        return None
    return round(max(0.0, time.time() - moment.timestamp()), 3)
