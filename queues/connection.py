"""Redis, as every process here uses it: the client, Lua scripts, and what its errors mean to a caller.

Refuses to hang: Redis that is away, full or read-only gives `Unavailable` within three seconds, except to a worker's
retrying client, which outlasts a restart.
Lua: https://redis.io/docs/latest/develop/programmability/
"""

from __future__ import annotations

import hashlib
import re
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import hiredis
from redis import Redis
from redis._parsers import Encoder
from redis.backoff import ExponentialWithJitterBackoff, NoBackoff
from redis.connection import PythonRespSerializer
from redis.exceptions import (
    AuthenticationError,
    ConnectionError,
    InvalidResponse,
    NoScriptError,
    RedisError,
    ResponseError,
    TimeoutError,
)
from redis.maint_notifications import MaintNotificationsConfig
from redis.retry import Retry as RedisRetry


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


class Packer:
    """Writes a command as Redis reads it. hiredis is the quickest, but copies everything three times; a command with an
    attachment is left to redis-py's own writer, which copies nothing large."""

    LARGE = 64 * 1024  # bytes

    def __init__(self) -> None:
        self.sparing = PythonRespSerializer(6000, Encoder("utf-8", "strict", False).encode)  # type: ignore[no-untyped-call]

    def pack(self, name: str, *words: Any) -> Any:
        if any(type(word) is bytes and len(word) > self.LARGE for word in words):
            return self.sparing.pack(name, *words)  # type: ignore[no-untyped-call]
        return [hiredis.pack_command((*name.split(), *words))]  # CLIENT SETNAME is two words


def connect(url: str, *, retrying: bool = False) -> Redis:
    """A Redis client. The API's gives up within three seconds; a `retrying` one (the workers') outlasts a restart.

    The API's never repeats a command by itself: redis-py would send a transaction again whose reply was lost, and so
    queue a mail twice. The workers' scripts may be repeated, each says why.
    """
    return Redis.from_url(
        url,
        socket_connect_timeout=5 if retrying else 1,
        # Twice this fits into three seconds: a request may first have to wait for a thread that waits for Redis.
        socket_timeout=10 if retrying else 1.2,
        **({} if url.startswith("unix:") else {"socket_keepalive": True}),
        retry=RedisRetry(*((ExponentialWithJitterBackoff(base=0.05, cap=2), 40) if retrying else (NoBackoff(), 0))),
        command_packer=Packer(),
        # A feature of Redis' cloud, asked for on each connection in a round trip that every other server refuses.
        maint_notifications_config=MaintNotificationsConfig(enabled=False),
    )


def fail_fast(redis: Redis) -> Redis:
    """The same Redis for heartbeats, which are worth nothing late. A retrying client that finds its connection dead
    waits for up to a quarter of a minute before it takes another, and all other heartbeats would wait behind it."""
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
_probing = threading.RLock()


def is_silent() -> bool:
    """Whether Redis did not answer when it was last asked, so that asking it may take long."""
    return _silent.is_set()


@contextmanager
def single_flight_probe() -> Iterator[None]:
    """Once Redis is silent, one caller at a time finds out whether it is back; the others are refused at once.

    If each waited for the time-out, a request that waits for a thread of Waitress would wait for one after another.
    """
    silent = _silent.is_set()
    if silent and not _probing.acquire(blocking=False):
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
            _probing.release()


@contextmanager
def translating_errors() -> Iterator[None]:
    """Turns what Redis says when it cannot work now into `Unavailable`; a mistake of ours stays what it is."""
    try:
        with single_flight_probe():
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


def weaknesses(info: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Returns the (name, sentence) of each reason, found in Redis' INFO, why it may lose or refuse a mail. Pure."""
    limit, used = info.get("maxmemory", 0), info.get("used_memory", 0)
    evicts = limit > 0 and info.get("maxmemory_policy") != "noeviction"
    aof_fails = info.get("aof_last_write_status", "ok") != "ok"
    snapshot_fails = info.get("rdb_last_bgsave_status", "ok") != "ok"
    # fmt: off
    reasons = [
        (not info.get("aof_enabled"), "no_aof",
         "Redis keeps no append-only file, so a crash loses accepted mail: CONFIG SET appendonly yes"),
        (aof_fails, "aof_failing", "Redis cannot write its append-only file; see its log and the disk"),
        (evicts, "evicting", "Redis evicts mail when memory is short: CONFIG SET maxmemory-policy noeviction"),
        (0 < limit <= used, "full", "Redis is out of memory: raise maxmemory, or let the workers drain the queue"),
        (snapshot_fails, "snapshot_failing",
         "Redis cannot write its snapshot and may refuse writes; see its log and the disk"),
        (info.get("role", "master") != "master", "replica", "Redis is a replica and takes no writes"),
    ]
    # fmt: on
    return [(name, sentence) for is_so, name, sentence in reasons if is_so]
