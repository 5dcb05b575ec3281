"""Fills our queue without HTTP: by our own code or, for a million mails, by copies made inside Redis.

A copy has an id of its own and everything else of the mail it was made from, so it weighs the same and stands in the
same sets. It names another mail in its job, and must never be run: what is to be sent stands in front of it.
"""

from __future__ import annotations

from typing import Any

from redis import Redis

from bench.rig import NotMeasured
from mail.address import Mailbox
from mail.draft import prepare
from mail.message import Draft
from mail.outbox import Outbox
from queues.connection import connect
from queues.jobs import Jobs
from settings import Settings

SENDER = Mailbox("Acme", "hello@example.com")
AT_ONCE = 2000
# ARGV: id of the mail to copy, number of the first copy, of the last. In the index each has a recipient of its own.
COPY = """
local function raw(hex)
  return (string.gsub(hex, '%x%x', function(two) return string.char(tonumber(two, 16)) end))
end
local mail, job = redis.call('HGETALL', 'mail:' .. ARGV[1]), redis.call('HGETALL', 'rq:job:' .. ARGV[1])
local look_at = redis.call('ZSCORE', 'mail:open', ARGV[1])
for number = tonumber(ARGV[2]), tonumber(ARGV[3]) do
  local id = string.format('%08x', number) .. string.sub(ARGV[1], 9)
  redis.call('HSET', 'mail:' .. id, unpack(mail))
  redis.call('HSET', 'rq:job:' .. id, unpack(job))
  redis.call('ZADD', 'mail:open', look_at, id)
  redis.call('RPUSH', 'rq:queue:email', id)
  local own = raw((string.gsub(id, '-', '')))
  redis.call('ZADD', 'mail:index', 0, 'sq' .. raw('00000000') .. own)
  redis.call('ZADD', 'mail:index', 0, 't' .. raw(string.format('%016x', number)) .. own)
end
"""


def outbox_at(redis_url: str) -> Outbox:
    return Outbox(Jobs(connect(redis_url, retrying=True)), Settings())


def drafted(body: dict[str, Any]) -> Draft:
    return prepare(body, default_sender=SENDER, max_recipients=50)


def fill(redis_url: str, mails: int) -> None:
    """Fills the queue with the mails that `POST /start-job` would store."""
    outbox = outbox_at(redis_url)
    for number in range(mails):
        asked = {"to": f"m{number}@example.com", "template": {"id": "welcome", "variables": {"name": "Ada"}}}
        outbox.accept([drafted(asked)])


def copy(redis: Redis, mail_id: str, copies: int) -> float:
    """Makes copies. Returns Redis' bytes for each. Raises `NotMeasured` where a copy is not all of a mail."""
    script = redis.register_script(COPY)
    before, keys = _memory(redis), len(_keys(redis, mail_id))
    size = _size(redis)
    for first in range(0, copies, AT_ONCE):
        script(args=[mail_id, first, min(first + AT_ONCE, copies) - 1])
    if _size(redis) - size != copies * keys:
        raise NotMeasured(f"a mail has {keys} keys and its copies have others: bench/backlog.py must learn of them")
    return (_memory(redis) - before) / copies


def _memory(redis: Redis) -> float:
    return float(redis.info("memory")["used_memory"])


def _size(redis: Redis) -> int:
    return int(redis.dbsize())


def _keys(redis: Redis, mail_id: str) -> list[bytes]:
    return list(redis.scan_iter(f"*{mail_id}*", count=10_000))
