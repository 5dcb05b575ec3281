"""Says who works on what, for people; stops all workers from taking jobs, and lets them go on.

Reads with commands that change nothing, as queues.health does: RQ's own listing of workers cleans up on the way, and
un-pickles the jobs in hand. A worker of which Redis keeps nothing but the name is gone, and left out.
RQ: https://python-rq.org/docs/workers/#suspend--resume
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from datetime import datetime
from typing import Any, NamedTuple

from rq import Worker, suspension
from rq.executions import WORKER_EXECUTIONS_KEY_TEMPLATE

from queues import keys
from queues.connection import Redis, is_wrong_type, translating_errors
from queues.heartbeat import HEARTBEAT_SECONDS, LEASE_SECONDS

SILENT = LEASE_SECONDS + HEARTBEAT_SECONDS  # seconds without a heartbeat


class Running(NamedTuple):
    """A job that a worker has in hand, and since when, in seconds since 1970."""

    id: str
    task: str
    since: float


class Seen(NamedTuple):
    """A worker as Redis knows it; moments in seconds since 1970, 0 for none."""

    name: str
    host: str
    pid: str
    queues: str
    since: float
    heartbeat: float
    jobs: tuple[Running, ...]
    done: int
    failed: int

    @property
    def is_silent(self) -> bool:
        return time.time() - self.heartbeat > SILENT


def pause(redis: Redis) -> None:
    """Lets no worker of any queue take another job, as `rq suspend` does. What is in hand is finished."""
    with translating_errors():
        suspension.suspend(redis)


def resume(redis: Redis) -> None:
    with translating_errors():
        suspension.resume(redis)


def is_paused(redis: Redis) -> bool:
    with translating_errors():
        return bool(redis.exists(keys.SUSPENDED))


def workers(redis: Redis) -> list[Seen]:
    """Returns all workers, in the order of their queues, hosts and processes. Raises `Unavailable`."""
    with translating_errors():
        known: Any = redis.smembers(Worker.redis_workers_keys)
        prefix = Worker.redis_worker_namespace_prefix.encode()
        names = sorted(key.removeprefix(prefix) for key in known if key.startswith(prefix))
        read = [_text(name) for name in names if _text(name).encode() == name]
        found = _ask(redis, [("HGETALL", Worker.redis_worker_namespace_prefix + name) for name in read])
        in_hand = _ask(redis, [("SMEMBERS", WORKER_EXECUTIONS_KEY_TEMPLATE.format(name)) for name in read])
        jobs = _jobs(redis, [entry for entries in in_hand for entry in entries or ()])
    seen = []
    for name, values, entries in zip(read, found, in_hand, strict=True):
        if values:
            running = tuple(sorted(jobs[entry] for entry in entries or () if entry in jobs))
            seen.append(_seen(name, {_text(field): _text(value) for field, value in values.items()}, running))
    return sorted(seen, key=lambda one: (one.queues, one.host, one.pid, one.name))


def _ask(redis: Redis, commands: Sequence[tuple[str, ...]]) -> list[Any]:
    """Returns what Redis answers, None where there is something of another type."""
    with redis.pipeline(transaction=False) as pipe:
        for command in commands:
            pipe.execute_command(*command)  # type: ignore[no-untyped-call]
        answers: list[Any] = pipe.execute(raise_on_error=False)
    for error in answers:
        if isinstance(error, Exception) and not is_wrong_type(error):
            raise error
    return [None if isinstance(one, Exception) else one for one in answers]


def _jobs(redis: Redis, entries: list[bytes]) -> dict[bytes, Running]:
    """Returns the jobs of workers' executions, each written `<job>:<execution>`."""
    ids = [_text(entry).partition(":")[0] for entry in entries]
    executions = _ask(redis, [("HGETALL", f"{keys.EXECUTION}{_text(entry)}") for entry in entries])
    described = _ask(redis, [("HGET", keys.job(job_id), "description") for job_id in ids])
    return {
        entry: Running(job_id, task_of(text or b""), _number((execution or {}).get(b"created_at", b"")))
        for entry, job_id, execution, text in zip(entries, ids, executions, described, strict=True)
    }


def task_of(description: bytes) -> str:
    """Returns the name of a job's function, with which its description begins: `tasks.deliver <id>`."""
    found = re.match(r"tasks\.(\w{1,80})", _text(description))
    return found[1] if found else ""


def _seen(name: str, said: Mapping[str, str], jobs: tuple[Running, ...]) -> Seen:
    return Seen(
        name=name,
        host=said.get("hostname", ""),
        pid=said.get("pid", ""),
        queues=said.get("queues", ""),
        since=moment_of(said.get("birth", "")),
        heartbeat=moment_of(said.get("last_heartbeat", "")),
        jobs=jobs,
        done=int(_number(said.get("successful_job_count", "").encode())),
        failed=int(_number(said.get("failed_job_count", "").encode())),
    )


def _text(written: bytes) -> str:
    return written.decode(errors="replace")


def _number(written: bytes) -> float:
    with suppress(ValueError):
        if math.isfinite(number := float(written)):
            return number
    return 0.0


def moment_of(written: str) -> float:
    """Returns a moment as RQ writes it, in seconds since 1970; 0 for what is none."""
    with suppress(ValueError, OverflowError):
        return datetime.fromisoformat(written.replace("Z", "+00:00")).timestamp()
    return 0.0
