"""Says which jobs of a queue have failed, and of what, for people.

Reads neither arguments nor results, and un-pickles nothing: the exception is the last line of the traceback, which RQ
keeps as text. Changes nothing.
"""

from __future__ import annotations

import re
import zlib
from base64 import b64decode
from contextlib import suppress
from typing import Any, NamedTuple

from queues import keys
from queues.connection import Redis, translating_errors
from queues.overview import ask, moment_of, task_of

LONGEST = 256 * 1024  # bytes of a traceback
SHOWN = 300  # characters of what an exception says
RAISED = re.compile(r"([\w.]{1,200})(?:: (.*))?")  # at the end of a traceback
FRAME = re.compile(r'  File "[^"]*", line \d')
DUE_TO = re.compile(r"due to (\w{1,80})")


class Failure(NamedTuple):
    """A job of `task` that raised `error`, a class, at a moment in seconds since 1970 (0: not known)."""

    id: str
    task: str
    error: str
    said: str
    at: float


def failures(redis: Redis, queue: str, most: int) -> list[Failure]:
    """Returns the jobs that failed last, up to `most`. Raises `Unavailable`."""
    with translating_errors():
        listed: Any = redis.zrevrange(keys.failed(queue), 0, most - 1)
        ids = [one.decode(errors="replace") for one in listed]
        jobs = ask(redis, [("HMGET", keys.job(one), "description", "ended_at") for one in ids])
        results = ask(redis, [("XREVRANGE", keys.results(one), "+", "-", "COUNT", "1") for one in ids])
    return [
        Failure(job_id, task_of(job[0] or b""), *_raised(result), moment_of((job[1] or b"").decode(errors="replace")))
        for job_id, job, result in zip(ids, jobs, results, strict=True)
        if job and any(job)
    ]


def _raised(result: Any) -> tuple[str, str]:
    """Returns the class of the exception in a job's latest result, and what it says. RQ writes a sentence of its own
    where a worker has died."""
    with suppress(ValueError, TypeError, LookupError, zlib.error):
        packed = b64decode(result[0][1][b"exc_string"])
        lines = zlib.decompressobj().decompress(packed, LONGEST).decode(errors="replace").splitlines()
        last_frame = max((at for at, line in enumerate(lines) if FRAME.match(line)), default=-1)
        for line in lines[last_frame + 1 :]:
            if found := RAISED.fullmatch(line):
                return found[1].rpartition(".")[2], (found[2] or "")[:SHOWN]
        died = DUE_TO.search(lines[0])
        return died[1] if died else "", lines[0][:SHOWN]
    return "", ""
