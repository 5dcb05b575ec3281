"""The mails that neither a worker nor RQ's own maintenance would ever touch again: found, and repaired or given up.

RQ looks after jobs in its lists and registries. It cannot see a job whose id is in none of them (popped by a program
that died, cut off with the end of an append-only file), a mail whose job was deleted, or one whose job has failed with
its last worker. `mail:open` holds every mail that is not final by the moment at which it should have moved on; whoever
is overdue is looked at, in one atomic script each:

    waits where its job says it does, or an attempt holds it     looked at again later
    its job waits, and is in no list; or is finished without it  queued again: a claim makes a second run harmless
    its job failed, or is gone                                   failed, or unknown if it is in doubt, with a reason

Looks at a bounded number of mails at a time. What it did is counted in `mail:swept` (hash: at, repaired, given_up).
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from datetime import datetime, timezone
from typing import Any, NamedTuple

from rq.utils import utcformat

from mail.counters import TOTALS
from mail.outbox import LOST, Outbox
from mail.store import FINAL, OPEN
from queues.connection import Script, unavailable
from queues.jobs import EMAIL

AT_ONCE = 1000  # mails looked at in one go
LOOK_AGAIN = 300  # seconds
SWEPT = "mail:swept"

# KEYS: mail, claim, RQ's job, open, queue, intermediate queue, scheduled, started, swept, totals. ARGV: mail id, now,
# when to look again, now as RQ writes it, when the first in the queue was put there, lifetime of a failed mail in
# seconds, then final states and "" and status, reason, ... of jobs that are over.
# A queue is searched only for a job that is older than its first: in a queue of a million, nearly none.
SWEEP = """
local final, reasons, at = {}, {}, 7
while ARGV[at] ~= '' do final[ARGV[at]] = true; at = at + 1 end
for i = at + 1, #ARGV, 2 do reasons[ARGV[i]] = ARGV[i + 1] end

local state = redis.call('HGET', KEYS[1], 'state')
if not state or final[state] then
  redis.call('ZREM', KEYS[4], ARGV[1])
  return {'closed'}
end
redis.call('ZADD', KEYS[4], ARGV[3], ARGV[1])
if redis.call('EXISTS', KEYS[2]) == 1 then return {'held'} end

local status = redis.call('HGET', KEYS[3], 'status') or ''
if reasons[status] then
  local doubt = string.find(redis.call('HGET', KEYS[1], 'recipients'), '"status": "in_doubt"', 1, true)
  state = doubt and 'unknown' or 'failed'
  redis.call('HSET', KEYS[1], 'state', state, 'reason', reasons[status], 'settled_at', ARGV[2], 'next_attempt_at', '')
  redis.call('EXPIRE', KEYS[1], ARGV[6])
  redis.call('ZREM', KEYS[4], ARGV[1])
  redis.call('HINCRBY', KEYS[9], 'given_up', 1)
  redis.call('HINCRBY', KEYS[10], state, 1)
  return {state, reasons[status]}
end

local waits = false
if status == 'queued' then
  waits = ARGV[5] ~= '' and (redis.call('HGET', KEYS[3], 'enqueued_at') or '') >= ARGV[5]
    or redis.call('LPOS', KEYS[5], ARGV[1]) or redis.call('LPOS', KEYS[6], ARGV[1])
elseif status == 'scheduled' then
  waits = redis.call('ZSCORE', KEYS[7], ARGV[1])
elseif status == 'started' then
  for _, entry in ipairs(redis.call('ZRANGE', KEYS[8], 0, -1)) do
    if string.sub(entry, 1, #ARGV[1] + 1) == ARGV[1] .. ':' then waits = true end
  end
end
if waits then return {'waits'} end
redis.call('HSET', KEYS[3], 'status', 'queued', 'enqueued_at', ARGV[4])
redis.call('PERSIST', KEYS[3])
redis.call('RPUSH', KEYS[5], ARGV[1])
redis.call('HINCRBY', KEYS[9], 'repaired', 1)
return {'repaired', status}
"""


class Finding(NamedTuple):
    """`outcome` is `repaired`, `failed` or `unknown`; `why` says what was wrong."""

    mail_id: str
    outcome: str
    why: str


class Swept(NamedTuple):
    """What the sweeps have done so far. `last_sweep_seconds_ago` is None if there was none."""

    last_sweep_seconds_ago: float | None
    mails_repaired: int
    mails_given_up: int


def sweep(outbox: Outbox) -> Iterator[Finding]:
    """Looks at the mails that are overdue and tells of those that were stuck."""
    redis, now = outbox.jobs.redis, time.time()
    overdue: list[Any] = redis.zrangebyscore(OPEN, 0, now, start=0, num=AT_ONCE)
    head: Any = redis.lindex(f"rq:queue:{EMAIL}", 0)
    first_since: Any = redis.hget(f"rq:job:{head.decode()}", "enqueued_at") if head else None
    written = utcformat(datetime.now(timezone.utc))
    args = [now, now + LOOK_AGAIN, written, first_since or "", outbox.store.kept_for("failed"), *FINAL, ""]
    args += [word for pair in LOST.items() for word in pair]
    script = Script(redis, SWEEP)
    for mail_id in (one.decode() for one in overdue):
        keys = [f"mail:{mail_id}", f"mail:{mail_id}:claim", f"rq:job:{mail_id}", OPEN, f"rq:queue:{EMAIL}"]
        keys += [f"rq:queue:{EMAIL}:intermediate", f"rq:scheduled:{EMAIL}", f"rq:wip:{EMAIL}", SWEPT, TOTALS]
        outcome, *why = (word.decode() for word in script(keys=keys, args=[mail_id, *args]))
        if why:
            yield Finding(mail_id, outcome, f"its job was {why[0]} and in no list" if outcome == "repaired" else why[0])
    redis.hset(SWEPT, "at", now)


def swept(outbox: Outbox) -> Swept:
    """Raises `Unavailable`."""
    with unavailable():
        at, repaired, given_up = outbox.jobs.redis.hmget(SWEPT, ["at", "repaired", "given_up"])
    ago = round(max(0.0, time.time() - float(at)), 3) if at else None
    return Swept(ago, int(repaired or 0), int(given_up or 0))
