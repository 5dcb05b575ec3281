"""The mails that neither a worker nor RQ's own maintenance would ever touch again: found, and repaired or given up.

RQ looks after jobs in its lists and registries. It cannot see a job whose id is in none of them (popped by a program
that died, cut off with the end of an append-only file), a mail whose job was deleted, or one whose job has failed with
its last worker; nor does it know that a mail has expired. `mail:open` holds every mail that is not final by the moment
at which it should have moved on, or expires; each that is overdue is looked at, in one atomic script:

    waits where its job says it does, or an attempt holds it     looked at again later
    its `expires_at` has passed and no attempt is on its way     failed, or unknown if it is in doubt: expired
    it waits in the queue for TROUBLE_FOR, and the relay is in trouble                          the same, and says so
      (bulk mail, which may wait for its turn for weeks: only if the relay took no mail for so long)
    its job waits for a later time than its `scheduled_at`       queued at that one
    its job failed, or is gone                                   failed, or unknown if it is in doubt, with a reason
    its job waits, and is in no list; or is finished without it  queued again: a claim makes a second run harmless

Looks at a bounded number of mails at a time. What it did with mails that were stuck is counted in `mail:swept`.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

from mail import index
from mail.claim import iso, timestamp
from mail.counters import number
from mail.outbox import Outbox
from mail.store import (
    ACTIONS,
    INDEX,
    KEY_NAMES,
    LAST_SENT,
    MAILBOX,
    MARKS,
    OPEN,
    SECRET,
    SUPPRESSED,
    SUPPRESSIONS,
    SWEPT,
    TOTALS,
    WATCH,
    WEBHOOK_TOTALS,
    WEBHOOK_WANTED,
    claim_key,
    look_at,
    mail_key,
)
from queues import keys
from queues.connection import Redis, ResponseError, translating_errors, why_unavailable
from queues.health import PLACES
from queues.jobs import rq_now
from queues.quarantine import put_aside
from queues.table import BULK, EMAIL
from smtp import pacing
from smtp.published import NAMES

AT_ONCE = 1000  # mails looked at in one go
OURS = {OPEN: "zset", TOTALS: "hash", SWEPT: "hash", LAST_SENT: "string"}
OURS |= {INDEX: "zset", KEY_NAMES: "set", SECRET: "string", MARKS: "zset", ACTIONS: "list", WATCH: "hash"}
OURS |= {keys.queue(BULK): "list", SUPPRESSED: "hash", SUPPRESSIONS: "zset"}
OURS |= {WEBHOOK_WANTED: "hash", WEBHOOK_TOTALS: "hash", MAILBOX: "hash"}
KINDS = OURS | {NAMES: "hash"} | pacing.kinds()  # of the keys that all mails share
LOOK_AGAIN = 300  # seconds
MAIL_ID = re.compile(rb"[\w-]+")

# KEYS: mail, claim, RQ's job, queue, intermediate queue, scheduled, started, failed, bulk. ARGV: mail id, now, when to
# look again, now as RQ writes it, when one at the head of the queue was put there, whether the mail has expired ("" or
# "1"), since when a mail must not have waited ("" while the relay is not in trouble), until when RQ keeps a failed job,
# when one at the head of bulk was put there, whether bulk mail is kept by that trouble, too ("" or "1").
# One that has waited too long keeps its place in the queue, where a claim makes it harmless: a search takes long.
# A queue is searched only for a job that is older than those at its head: in a queue of a million, nearly none.
SWEEP = """
local id = ARGV[1]
local kind = redis.call('TYPE', KEYS[1]).ok
if kind ~= 'hash' and kind ~= 'none' then
  redis.call('ZREM', OPEN, id)
  return {'unreadable', 'its record is a ' .. kind}
end
local state = redis.call('HGET', KEYS[1], 'state')
if not state or KEPT[state] then
  redis.call('ZREM', OPEN, id)
  return {'closed'}
end
redis.call('ZADD', OPEN, ARGV[3], id)
if redis.call('EXISTS', KEYS[2]) == 1 then return {'held'} end

local readable = redis.call('TYPE', KEYS[3]).ok == 'hash'
local status = readable and redis.call('HGET', KEYS[3], 'status') or ''
local expired = ARGV[6] ~= '' and state ~= 'sending'
local since = redis.call('HGET', KEYS[1], 'since') or redis.call('HGET', KEYS[1], 'created_at') or ''
local bulk = redis.call('HGET', KEYS[1], 'priority') == 'bulk'
local late = ARGV[7] ~= '' and state ~= 'sending' and status == 'queued' and since < ARGV[7]
  and (not bulk or ARGV[10] ~= '')
local reason = expired and EXPIRED or late and TROUBLE_TOO_LONG or LOST[status]
if reason then
  local over = 'failed'
  for _, one in ipairs(cjson.decode(redis.call('HGET', KEYS[1], 'recipients') or '[]')) do
    if one.status == 'in_doubt' then over = 'unknown' end
  end
  become(id, over, ARGV[2], nil, {'reason', reason, 'settled_at', ARGV[2], 'lapsed', expired and '1' or ''})
  if late then
    redis.call('HSET', KEYS[3], 'status', 'failed')
    redis.call('ZADD', KEYS[8], ARGV[8], id)
  end
  if expired or late then return {over, reason} end
  redis.call('HINCRBY', SWEPT, 'given_up', 1)
  return {'given_up', reason}
end

local waits = false
if status == 'queued' then
  local queued_at = redis.call('HGET', KEYS[3], 'enqueued_at') or ''
  waits = ARGV[5] ~= '' and queued_at >= ARGV[5] or bulk and ARGV[9] ~= '' and queued_at >= ARGV[9]
    or redis.call('LPOS', KEYS[4], id) or redis.call('LPOS', KEYS[5], id) or bulk and redis.call('LPOS', KEYS[9], id)
elseif status == 'scheduled' then
  waits = redis.call('ZSCORE', KEYS[6], id)
  local at = tonumber(redis.call('HGET', KEYS[1], 'scheduled_at'))
  if state == 'queued' and at and waits and tonumber(waits) > at + 1 then
    redis.call('ZADD', KEYS[6], 'XX', math.ceil(at), id)  -- it was made sooner while RQ put its job back for later
  end
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


def sweep(outbox: Outbox) -> Iterator[Finding]:
    """Looks at the mails that are overdue. Yields those that were stuck or have expired, and what is no mail."""
    redis, now = outbox.jobs.redis, time.time()
    named = {key: kind for one in outbox.settings.relays for key, kind in pacing.kinds(one.name).items()}
    put_aside(redis, KINDS | named)  # each mail comes into a new OPEN with its next attempt
    overdue: list[Any] = redis.zrangebyscore(OPEN, 0, now, start=0, num=AT_ONCE)
    trouble_since = iso(now - outbox.settings.trouble_for) if overdue and outbox.relay_in_trouble() else ""
    heads = [_first_since(redis, queue) for queue in (EMAIL, BULK)] if overdue else []
    silent = "1" if trouble_since and (outbox.last_sent() or 0) < now - outbox.settings.trouble_for else ""
    for entry in overdue:
        if MAIL_ID.fullmatch(entry):
            yield from _look_at(outbox, entry.decode(), now, trouble_since, [*heads, silent])
        else:
            redis.zrem(OPEN, entry)
            yield Finding("", "unreadable", f"an entry of {OPEN} that names no mail")
    index.trim(outbox.store, now - outbox.settings.retain_sent)
    redis.hset(SWEPT, "at", now)


def _look_at(outbox: Outbox, mail_id: str, now: float, trouble_since: str, common: list[Any]) -> Iterator[Finding]:
    redis = outbox.jobs.redis
    touched = [mail_key(mail_id), claim_key(mail_id), keys.job(mail_id), keys.queue(EMAIL), keys.intermediate(EMAIL)]
    touched += [keys.scheduled(EMAIL), keys.started(EMAIL), keys.failed(EMAIL), keys.queue(BULK)]
    try:
        expires_at = _expires_at(redis, mail_id)
        expired = 0 < expires_at <= now
        again = now + LOOK_AGAIN if expired else look_at(now + LOOK_AGAIN, expires_at)
        args = [mail_id, now, again, rq_now(), common[0], "1" if expired else "", trouble_since]
        args += [now + outbox.settings.retain_failed, *common[1:]]
        event, *why = (word.decode() for word in outbox.store.run(SWEEP, touched, args))
    except ResponseError as error:
        if why_unavailable(error):
            raise
        redis.zadd(OPEN, {mail_id: now + LOOK_AGAIN})  # for later, and on to the others
        yield Finding(mail_id, "unreadable", type(error).__name__)
        return
    if why:
        yield Finding(mail_id, event, f"its job was {why[0]} and in no list" if event == "repaired" else why[0])


def _expires_at(redis: Redis, mail_id: str) -> float:
    """Returns a mail's `expires_at` in seconds since 1970; 0 for never, or if the script will say what is wrong."""
    try:
        stored: Any = redis.hget(mail_key(mail_id), "expires_at")
        return timestamp((stored or b"").decode())
    except (ResponseError, ValueError):
        return 0


def _first_since(redis: Redis, queue: str) -> Any:
    """Returns when the one that has waited longest of some at the head of a queue was put there, or "" if there is
    none. The first may be in a hurry and new, or no job: a worker that takes it sets it aside."""
    pipe = redis.pipeline(transaction=False)
    for place in PLACES:
        pipe.lindex(keys.queue(queue), place)
    for head in pipe.execute(raise_on_error=False):
        pipe.hget(keys.job(head.decode(errors="replace") if isinstance(head, bytes) else ""), "enqueued_at")
    return min((one for one in pipe.execute(raise_on_error=False) if isinstance(one, bytes)), default="")


def swept(redis: Redis) -> dict[str, Any]:
    """Returns what the sweeps have done so far, as `GET /readyz` shows it. Raises `Unavailable`."""
    with translating_errors():
        at, repaired, given_up = redis.hmget(SWEPT, ["at", "repaired", "given_up"])
    ago = round(max(0.0, time.time() - number(at)), 3) if at else None
    counts = {"mails_repaired": int(number(repaired)), "mails_given_up": int(number(given_up))}
    return {"last_sweep_seconds_ago": ago, **counts}
