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
from queues.connection import Redis, Script, translating_errors
from queues.overview import moment_of, task_of

LONGEST = 256 * 1024  # bytes of a traceback
SHOWN = 300  # characters of what an exception says
RAISED = re.compile(r"([\w.]{1,200})(?:: (.*))?")  # at the end of a traceback
FRAME = re.compile(r'  File "[^"]*", line \d')
DUE_TO = re.compile(r"due to (\w{1,80})")
# KEYS: registry of those that failed. ARGV: how many, what the keys of jobs and of results begin with. Returns of each
# job its id, description, when it ended, and the packed traceback of its latest result.
FIND = """
local found = {}
for _, id in ipairs(redis.call('ZREVRANGE', KEYS[1], 0, ARGV[1] - 1)) do
  local job, results = redis.pcall('HMGET', ARGV[2] .. id, 'description', 'ended_at'), nil
  if not job.err and (job[1] or job[2]) then
    results = redis.pcall('XREVRANGE', ARGV[3] .. id, '+', '-', 'COUNT', 1)
    local packed, fields = '', not results.err and results[1] and results[1][2] or {}
    for i = 1, #fields, 2 do
      if fields[i] == 'exc_string' then packed = fields[i + 1] end
    end
    found[#found + 1] = {id, job[1] or '', job[2] or '', packed}
  end
end
return found
"""


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
        found: Any = Script(redis, FIND)([keys.failed(queue)], [most, keys.job(""), keys.results("")])
    raised = {packed: _raised(packed) for packed in {one[3] for one in found}}  # many failed alike
    return [
        Failure(_text(job_id), task_of(description), *raised[packed], moment_of(_text(ended_at)))
        for job_id, description, ended_at, packed in found
    ]


def _text(written: bytes) -> str:
    return written.decode(errors="replace")


def _raised(packed: bytes) -> tuple[str, str]:
    """Returns the class of an exception, and what it says. RQ writes a sentence of its own where a worker has died."""
    with suppress(ValueError, IndexError, zlib.error):
        lines = _text(zlib.decompressobj().decompress(b64decode(packed), LONGEST)).splitlines()
        last_frame = max((at for at, line in enumerate(lines) if FRAME.match(line)), default=-1)
        for line in lines[last_frame + 1 :]:
            if found := RAISED.fullmatch(line):
                return found[1].rpartition(".")[2], (found[2] or "")[:SHOWN]
        died = DUE_TO.search(lines[0])
        return died[1] if died else "", lines[0][:SHOWN]
    return "", ""
