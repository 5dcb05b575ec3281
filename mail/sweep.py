"""The mails that neither a worker nor RQ's own maintenance would ever touch again: found, and repaired or given up.

RQ looks after jobs in its lists and registries. It cannot see a job whose id is in none of them (popped by a program
that died, cut off with the end of an append-only file), a mail whose job was deleted, or one whose job has failed with
its last worker; nor does it know that a mail has expired. `mail:open` holds every mail that is not final by the moment
at which it should have moved on, or expires; each that is overdue is looked at, in one atomic script:

    waits where its job says it does, or an attempt holds it     looked at again later
    its `expires_at` has passed and no attempt is on its way     failed, or unknown if it is in doubt: expired
    its job failed, or is gone                                   failed, or unknown if it is in doubt, with a reason
    its job waits, and is in no list; or is finished without it  queued again: a claim makes a second run harmless

Looks at a bounded number of mails at a time. What it did with mails that were stuck is counted in `mail:swept`.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from datetime import datetime, timezone
from typing import Any, NamedTuple

from rq.utils import utcformat

from mail.claim import timestamp
from mail.outbox import Outbox
from mail.store import OPEN, SWEPT, claim_key, look_at, mail_key
from queues.connection import unavailable
from queues.jobs import EMAIL

AT_ONCE = 1000  # mails looked at in one go
LOOK_AGAIN = 300  # seconds

# KEYS: mail, claim, RQ's job, queue, intermediate queue, scheduled, started. ARGV: mail id, now, when to look again,
# now as RQ writes it, when the first in the queue was put there, whether the mail has expired ("" or "1").
# A queue is searched only for a job that is older than its first: in a queue of a million, nearly none.
SWEEP = """
local id = ARGV[1]
local state = redis.call('HGET', KEYS[1], 'state')
if not state or KEPT[state] then
  redis.call('ZREM', OPEN, id)
  return {'closed'}
end
redis.call('ZADD', OPEN, ARGV[3], id)
if redis.call('EXISTS', KEYS[2]) == 1 then return {'held'} end

local status = redis.call('HGET', KEYS[3], 'status') or ''
local expired = ARGV[6] ~= '' and state ~= 'sending'
local reason = expired and EXPIRED or LOST[status]
if reason then
  local over = 'failed'
  for _, one in ipairs(cjson.decode(redis.call('HGET', KEYS[1], 'recipients'))) do
    if one.status == 'in_doubt' then over = 'unknown' end
  end
  local counted = expired and over == 'failed' and EXPIRED or nil
  become(id, over, ARGV[2], nil, {'reason', reason, 'settled_at', ARGV[2]}, counted)
  if expired then return {over, reason} end
  redis.call('HINCRBY', SWEPT, 'given_up', 1)
  return {'given_up', reason}
end

local waits = false
if status == 'queued' then
  waits = ARGV[5] ~= '' and (redis.call('HGET', KEYS[3], 'enqueued_at') or '') >= ARGV[5]
    or redis.call('LPOS', KEYS[4], id) or redis.call('LPOS', KEYS[5], id)
elseif status == 'scheduled' then
  waits = redis.call('ZSCORE', KEYS[6], id)
elseif status == 'started' then
  for _, entry in ipairs(redis.call('ZRANGE', KEYS[7], 0, -1)) do
    if string.sub(entry, 1, #id + 1) == id .. ':' then waits = true end
  end
end
if waits then return {'waits'} end
redis.call('HSET', KEYS[3], 'status', 'queued', 'enqueued_at', ARGV[4])
redis.call('PERSIST', KEYS[3])
redis.call('RPUSH', KEYS[4], id)
redis.call('HINCRBY', SWEPT, 'repaired', 1)
return {'repaired', status}
"""


class Finding(NamedTuple):
    """What was done about a mail, in the log's word for it, and why."""

    mail_id: str
    event: str
    why: str


class Swept(NamedTuple):
    """What the sweeps have done so far. `last_sweep_seconds_ago` is None if there was none."""

    last_sweep_seconds_ago: float | None
    mails_repaired: int
    mails_given_up: int


def sweep(outbox: Outbox) -> Iterator[Finding]:
    """Looks at the mails that are overdue. Yields those that were stuck, or have expired."""
    redis, now = outbox.jobs.redis, time.time()
    overdue: list[Any] = redis.zrangebyscore(OPEN, 0, now, start=0, num=AT_ONCE)
    head: Any = redis.lindex(f"rq:queue:{EMAIL}", 0)
    first_since: Any = redis.hget(f"rq:job:{head.decode()}", "enqueued_at") if head else None
    written = utcformat(datetime.now(timezone.utc))
    for mail_id, expires_at in _with_expiry(outbox, [one.decode() for one in overdue]):
        expired = 0 < expires_at <= now
        again = now + LOOK_AGAIN if expired else look_at(now + LOOK_AGAIN, expires_at)
        keys = [mail_key(mail_id), claim_key(mail_id), f"rq:job:{mail_id}", f"rq:queue:{EMAIL}"]
        keys += [f"rq:queue:{EMAIL}:intermediate", f"rq:scheduled:{EMAIL}", f"rq:wip:{EMAIL}"]
        args = [mail_id, now, again, written, first_since or "", "1" if expired else ""]
        event, *why = (word.decode() for word in outbox.store.run(SWEEP, keys, args))
        if why:
            yield Finding(mail_id, event, f"its job was {why[0]} and in no list" if event == "repaired" else why[0])
    redis.hset(SWEPT, "at", now)


def _with_expiry(outbox: Outbox, ids: list[str]) -> Iterator[tuple[str, float]]:
    """Yields each mail with its `expires_at` in seconds since 1970, 0 for never."""
    pipe = outbox.jobs.redis.pipeline(transaction=False)
    for mail_id in ids:
        pipe.hget(mail_key(mail_id), "expires_at")
    for mail_id, moment in zip(ids, pipe.execute(), strict=True):
        yield mail_id, timestamp((moment or b"").decode())


def swept(outbox: Outbox) -> Swept:
    """Raises `Unavailable`."""
    with unavailable():
        at, repaired, given_up = outbox.jobs.redis.hmget(SWEPT, ["at", "repaired", "given_up"])
    ago = round(max(0.0, time.time() - float(at)), 3) if at else None
    return Swept(ago, int(repaired or 0), int(given_up or 0))
