"""Connects to Redis, runs Lua scripts, and says what Redis' errors mean to a caller.

Never hangs: if Redis is away, full or read-only, `Unavailable` is raised within three seconds, except with a worker's
retrying client, which outlasts a restart.
Lua: https://redis.io/docs/latest/develop/programmability/
"""

from __future__ import annotations

import hashlib
import logging
import re
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import hiredis
from redis import Redis as Redis  # a type for those who are handed a client; they import neither redis nor rq
from redis._parsers import Encoder
from redis.backoff import ExponentialWithJitterBackoff, NoBackoff
from redis.connection import PythonRespSerializer
from redis.exceptions import (
    AuthenticationError,
    BusyLoadingError,
    ConnectionError,
    InvalidResponse,
    NoScriptError,
    TimeoutError,
)
from redis.exceptions import RedisError as RedisError
from redis.exceptions import ResponseError as ResponseError
from redis.maint_notifications import MaintNotificationsConfig
from redis.retry import Retry as RedisRetry

from process.log import emit
from process.redis_url import RedisUrl
from queues.keys import TAG
from queues.primary import BEING_REPLACED, KEEPALIVE, NO_MAJORITY, ToPrimary, ToPrimaryByTLS, primary_of
from settings import SettingsError


class Script:
    """Calls a Lua script by its digest, or by its source if Redis does not know it (any more). redis-py would load it
    and call it again, which fails if Redis forgets it in between."""

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


class Packer:
    """Encodes a command with hiredis, the quickest. It copies everything three times, so a command with an attachment
    is left to redis-py's own encoder, which copies nothing large."""

    LARGE = 64 * 1024  # bytes

    def __init__(self) -> None:
        self.for_large = PythonRespSerializer(6000, Encoder("utf-8", "strict", False).encode)  # type: ignore[no-untyped-call]

    def pack(self, name: str, *words: Any) -> Any:
        if any(type(word) is bytes and len(word) > self.LARGE for word in words):
            return self.for_large.pack(name, *words)  # type: ignore[no-untyped-call]
        return [hiredis.pack_command((*name.split(), *words))]  # CLIENT SETNAME is two words


# Twice the time-out fits into three seconds: a request may first have to wait for a thread that waits for Redis.
FAIL_FAST = {"socket_connect_timeout": 1, "socket_timeout": 1.2, "retry": RedisRetry(NoBackoff(), 0)}
RETRYING = {
    "socket_connect_timeout": 5,
    "socket_timeout": 10,
    "retry": RedisRetry(ExponentialWithJitterBackoff(base=0.05, cap=2), 40),
}


def connect(url: str, *, retrying: bool = False, kind: type[Redis] = Redis) -> Redis:
    """Returns a client that gives up within three seconds, or a `retrying` one (the workers') that outlasts a restart.

    The first never repeats a command by itself: redis-py would send a transaction again whose reply was lost, and so
    queue a mail twice. The workers' scripts may be repeated, each says why. Raises `SettingsError` for a URL that can
    never work.
    """
    try:
        plain, sentinels = RedisUrl.parse(url)
        by_tcp: dict[str, Any] = {}
        if not plain.startswith("unix:"):
            kind_of_connection = ToPrimaryByTLS if plain.startswith("rediss:") else ToPrimary
            by_tcp = {"socket_keepalive_options": KEEPALIVE, "connection_class": kind_of_connection}
        if sentinels:
            given = kind.from_url(plain).connection_pool.connection_kwargs.items()
            by_tcp["primary"] = primary_of(sentinels, tuple((name, one) for name, one in given if name[:4] == "ssl_"))
        client = kind.from_url(
            plain,
            **(RETRYING if retrying else FAIL_FAST),
            **by_tcp,
            command_packer=Packer(),
            # A feature of Redis' cloud, asked for on each connection in a round trip that every other server refuses.
            maint_notifications_config=MaintNotificationsConfig(enabled=False),
        )
        pool = client.connection_pool
        pool.connection_class(**pool.connection_kwargs)  # which connects not yet, but takes the parameters
    except (TypeError, ValueError, RedisError) as error:
        name = re.search(r"argument '(\w+)'", str(error))
        what = name[1] if name else "ssl_cert_reqs" if "Certificate" in str(error) else "one of its parameters"
        raise SettingsError([f"REDIS_URL: {what} must be a parameter, and a value, that redis-py knows"]) from None
    return client


def address(redis: Redis) -> str:
    """Returns where the Redis is, without a login: `127.0.0.1:6379, database 0`."""
    at = redis.connection_pool.connection_kwargs
    if primary := at.get("primary"):
        known_to = ", ".join(map(str, primary.sentinels.places))
        return f"{primary.sentinels.name} of the Sentinels {known_to}, database {at.get('db') or 0}"
    place = at.get("path") or f"{at.get('host', 'localhost')}:{at.get('port', 6379)}"
    return f"{place}, database {at.get('db') or 0}"


def reach(url: str) -> None:
    """Tries the Redis once. Raises `Unavailable` with its address and the reason, within three seconds."""
    with connect(url) as client:
        try:
            with translating_errors():
                client.ping()
                with suppress(ResponseError):  # an ACL may forbid it
                    _check_kind(client)
        except Unavailable as error:
            raise Unavailable(f"{error} ({address(client)})") from None


def _check_kind(client: Redis) -> None:
    server: Any = client.info("server")
    if "cluster" in (server.get("redis_mode"), server.get("server_mode")):  # Redis', Valkey's name for it
        size = client.execute_command("CLUSTER INFO")["cluster_size"]  # type: ignore[no-untyped-call]
        if not TAG or size != "1":
            raise Unavailable(CLUSTER)
    if tuple(map(int, server["redis_version"].split(".")[:2])) < OLDEST:
        raise Unavailable(TOO_OLD)


def fail_fast(redis: Redis) -> Redis:
    """Returns a client of the same Redis for what is worth nothing late: heartbeats, and what a worker says at its end.
    A retrying one that finds Redis away tries for over a minute, and all that comes after would wait for it."""
    pool = redis.connection_pool
    return Redis(connection_pool=type(pool)(pool.connection_class, **(pool.connection_kwargs | FAIL_FAST)))


CLUSTER = "Redis is a cluster: it must have one shard, and RQ_KEY_PREFIX a hash tag, such as {ae}:rq"
OLDEST = (6, 2)  # below it, RQ loses the job of a worker that is killed
TOO_OLD = "Redis is too old: it must be 6.2 or later"
NO_ANSWER = "Redis does not answer"
NOT_CONFIRMED = "Redis' replicas have not confirmed it"
SOMETHING_ELSE = "Redis holds something else at one of our keys; the workers put it aside"
NEVER = {  # a word of an error that only another setting ends -> the reason
    "DB index is out of range": "Redis has no database of the number in REDIS_URL",
    "CERTIFICATE_VERIFY_FAILED": "Redis' certificate is not trusted: name its authority with ?ssl_ca_certs=FILE",
    "WRONG_VERSION_NUMBER": "Redis does not speak TLS at this port: REDIS_URL must begin with redis://",
    "record layer failure": "Redis does not speak TLS at this port: REDIS_URL must begin with redis://",
    "CROSSSLOT": CLUSTER,
    **({} if TAG else {"MOVED": CLUSTER, "CLUSTERDOWN": CLUSTER}),
    "SELECT is not allowed": "Redis is a cluster, which has database 0 alone: REDIS_URL must end in /0",
}
CANNOT_NOW = {  # a word of Redis' error -> the reason that a caller is told
    "OOM": "Redis is out of memory (maxmemory is reached)",
    "READONLY": "Redis is a read-only replica",
    "MISCONF": "Redis cannot write to its disk, so it refuses writes",
    "NOREPLICAS": "Redis lacks replicas, so it refuses writes",
    "MASTERDOWN": "Redis is a replica without its master",
    "MOVED": "Redis is a read-only replica",  # of a cluster's one shard
    "non local key": "Redis is a read-only replica",  # the same, in a script
    "WAIT cannot be used": "Redis is a read-only replica",  # where it has been demoted
    **dict.fromkeys(("CLUSTERDOWN", "cluster is down", "slot not served"), "Redis' cluster has no primary"),
    "NOPERM": "Redis' ACL does not let us do this",
    "The user executing the script": "Redis' ACL does not let us do this",  # Redis 7
    "ACL failure in script": "Redis' ACL does not let us do this",  # Valkey 9
    "BUSY": "Redis is busy with a script",
    "LOADING": "Redis is still loading its data",
    "UNBLOCKED": "Redis has become a read-only replica",
    NO_MAJORITY: NO_MAJORITY,
    BEING_REPLACED: BEING_REPLACED,
    "max number of clients reached": "Redis has no connection left: raise its maxclients",
    **NEVER,
}
REFUSES_WRITES = {CANNOT_NOW[word] for word in ("OOM", "READONLY", "MISCONF", "NOREPLICAS", "NOPERM")} | {NOT_CONFIRMED}
WRONG_PASSWORD = "Redis does not accept our password"
WORDS = re.compile(rf"\b({'|'.join(CANNOT_NOW)})\b")
_silent = threading.Event()
is_silent = _silent.is_set  # Redis did not answer its last command, so the next may take long
_probing = threading.RLock()


@contextmanager
def translating_errors() -> Iterator[None]:
    """Raises `Unavailable` for an error that says that Redis cannot work now, or holds something else where we look; a
    fault of ours stays what it is.

    Lets one caller at a time ask a Redis that is silent, and refuses the others at once: if each waited for the
    time-out, a request in the queue for a thread of Waitress would wait for one after another.
    """
    silent = is_silent()
    if silent and not _probing.acquire(blocking=False):
        raise Unavailable(NO_ANSWER)
    try:
        yield
        _silent.clear()
        announcements.note(None)
    except Exception as error:
        if isinstance(error, (ConnectionError, TimeoutError)) or str(error) == NOT_CONFIRMED:
            _silent.set()
        else:  # an error is an answer, too
            _silent.clear()
        if reason := why_unavailable(error):
            announcements.note(reason)
            raise Unavailable(reason) from None
        if is_wrong_type(error):  # a worker puts it aside soon
            raise Unavailable(SOMETHING_ELSE) from None
        raise
    finally:
        if silent:
            _probing.release()


def why_unavailable(error: Exception) -> str | None:
    """Returns why Redis cannot work now, None if the exception says something else."""
    match error:
        case Unavailable():
            return str(error)
        case AuthenticationError():
            return WRONG_PASSWORD
        case BusyLoadingError():
            return CANNOT_NOW["LOADING"]
        case InvalidResponse():
            return "what answers at REDIS_URL is not Redis"
        case ResponseError() | ConnectionError() | TimeoutError():
            # redis-py removes a word that it knows; before version 7, Redis put it into the middle of a script's error.
            said = WORDS.search(f"{getattr(error, 'status_code', '')} {error}")
            return CANNOT_NOW[said[1]] if said else None if isinstance(error, ResponseError) else NO_ANSWER
    return None


def is_wrong_type(error: Exception) -> bool:
    """Returns whether a key holds another type than the command is for."""
    return isinstance(error, ResponseError) and "WRONGTYPE" in f"{error.status_code} {error}"


def is_hopeless(reason: str) -> bool:
    """Returns whether only another setting, and no waiting, helps against what `why_unavailable` returned."""
    return reason == WRONG_PASSWORD or reason in NEVER.values()


class Announcements:
    """Logs once when Redis becomes unusable for this process, with the reason, and once when it is back."""

    def __init__(self) -> None:
        self.place, self.heard_at = "", 0.0
        self.reason: str | None = None
        self.lock = threading.Lock()

    def begin(self, redis: Redis) -> None:
        """Logs from now on. A program that people run by hand does not call this, and says it in its own way."""
        self.place = address(redis)

    def note(self, reason: str | None) -> None:
        """Takes notice of why Redis cannot be used now; None if it can."""
        self.heard_at = time.monotonic() if reason else self.heard_at
        still = reason is None and self.reason in REFUSES_WRITES and time.monotonic() - self.heard_at < 60
        if reason == self.reason or still or not self.place:  # what only reads goes well meanwhile
            return
        with self.lock:
            changed, self.reason = reason != self.reason, reason
        if changed and reason:
            emit("redis_unavailable", logging.WARNING, reason=reason, at=self.place)
        elif changed:
            emit("redis_back", at=self.place)


announcements = Announcements()


SPARE = 32 * 2**20  # bytes
# Tells whether something may be accepted: not in the last twentieth of maxmemory, or the last 32 MB (of little, the
# last quarter). Beyond maxmemory Redis would not let a worker take a mail from the queue, for ever; and mails in hand
# are in its memory twice. Where INFO is forbidden, Redis itself refuses, at maxmemory. (A pattern that is tried at each
# of INFO's three thousand octets would take a third of the script's time.)
ROOM = f"""
local function room()
  local info = redis.pcall('INFO', 'memory')
  if type(info) ~= 'string' then return true end
  local function figure(name)
    local _, stop = string.find(info, '\\n' .. name .. ':', 1, true)
    return stop and tonumber(string.match(info, '^%d+', stop + 1)) or 0
  end
  local most, used = figure('maxmemory'), figure('used_memory') - figure('mem_not_counted_for_evict')
  return most == 0 or most - used > math.max(most / 20, math.min(most / 4, {SPARE}))
end
"""


def is_full(limit: int, used: int) -> bool:
    """Returns whether nothing more may be accepted, by the rule of `ROOM`. Takes bytes: `maxmemory`, and used."""
    return limit > 0 and limit - used <= max(limit / 20, min(limit / 4, SPARE))


def weaknesses(info: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Returns the (name, sentence) of each reason, found in Redis' INFO, why it may lose or refuse a mail. Pure."""
    limit = info.get("maxmemory", 0)
    used = info.get("used_memory", 0) - info.get("mem_not_counted_for_evict", 0)
    evicts = limit > 0 and info.get("maxmemory_policy") != "noeviction"
    # fmt: off
    reasons = [
        (not info.get("aof_enabled"), "no_aof",
         "Redis keeps no append-only file, so a crash loses accepted mail: CONFIG SET appendonly yes"),
        (info.get("aof_last_write_status", "ok") != "ok", "aof_failing",
         "Redis cannot write its append-only file; see its log and the disk"),
        (evicts, "evicting", "Redis evicts mail when memory is short: CONFIG SET maxmemory-policy noeviction"),
        (is_full(limit, used), "full", "Redis is out of memory: raise maxmemory, or let the workers drain the queue"),
        (info.get("rdb_last_bgsave_status", "ok") != "ok", "snapshot_failing",
         "Redis cannot write its snapshot and may refuse writes; see its log and the disk"),
        (info.get("role", "master") != "master", "replica", "Redis is a replica and takes no writes"),
    ]
    # fmt: on
    return [(name, sentence) for is_so, name, sentence in reasons if is_so]
