"""The states of a mail: which there are, which follows which, and BECOME, the one place where a mail's state changes.

    queued -> sending -> sent | failed | unknown (in doubt and held) | suppressed | delayed -> sending ...
    queued, delayed, failed, unknown, suppressed -> canceled
    unknown -> sent | failed, when it is found out that it arrived
    sent -> bounced | complained, when a report says so

Every script that changes a state is BECOME and a body: accept, claim, settle, cancel, sweep (mail.store puts them
together). Anything that must happen whenever a mail fails, is sent, ... (a webhook, a suppression list) is added to
BECOME and to nothing else. Pure.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Set
from enum import Enum


class State(str, Enum):
    QUEUED = "queued"
    SENDING = "sending"
    DELAYED = "delayed"
    SENT = "sent"
    FAILED = "failed"
    UNKNOWN = "unknown"  # the relay may have accepted it, and it is held
    CANCELED = "canceled"
    SUPPRESSED = "suppressed"  # each recipient is on the suppression list
    BOUNCED = "bounced"  # it was sent, and has come back: from a recipient at least, all that is told by mail.bounces
    COMPLAINED = "complained"  # it was sent, and a recipient calls it spam

    __str__ = str.__str__


class Status(str, Enum):
    """A recipient's part in the mail."""

    PENDING = "pending"
    IN_DOUBT = "in_doubt"
    ACCEPTED = "accepted"
    REFUSED = "refused"
    SUPPRESSED = "suppressed"  # on the suppression list at the last attempt
    BOUNCED = "bounced"  # accepted, and come back
    COMPLAINED = "complained"

    __str__ = str.__str__


SERVED = (Status.ACCEPTED, Status.BOUNCED, Status.COMPLAINED)  # the relay has taken the mail for them
SCHEDULED = "scheduled"  # what a mail with `scheduled_at` is called that is queued and that no attempt has taken yet
RETURNED = (State.BOUNCED, State.COMPLAINED)  # a report has come about a mail that was sent
ENDS = (State.SENT, State.FAILED, State.UNKNOWN, State.CANCELED, State.SUPPRESSED)  # of an attempt, or before one
FINAL = (*ENDS, *RETURNED)  # nothing more happens unless a person asks, or a report comes
AGAIN = frozenset({State.FAILED, State.UNKNOWN, State.SUPPRESSED})  # a person may have it queued again
TROUBLE_TOO_LONG = "the relay was in trouble for too long"  # why a mail failed that waited TROUBLE_FOR
TEST = "test"  # what a mail that a key of scope `test` submitted is counted as once it is `sent`
UNSAYABLE = "it cannot leave by HTTP"  # why a mail failed that no other relay takes; what JSON cannot say follows
NOT_ADMITTED = "MAIL_ALLOWLIST or MAIL_REDIRECT_TO keeps it from a recipient"  # why a mail failed
ALL_SUPPRESSED = "each recipient is on the suppression list"  # why a mail is suppressed
EXPIRED = "expired"  # why a mail failed whose `expires_at` has passed; counted under this name
# `sent` follows all that is stored: an attempt that lost its claim may have sent the mail, and then it is the truth.
FOLLOWS: Mapping[State | None, Set[State]] = {
    None: {State.QUEUED},
    State.QUEUED: {State.SENDING, State.FAILED, State.CANCELED, State.SENT},
    State.SENDING: {*ENDS, State.SENDING, State.DELAYED},  # sending: another attempt takes it over
    State.DELAYED: {*ENDS, State.SENDING},
    State.FAILED: {State.SENDING, State.CANCELED, State.SENT},
    State.UNKNOWN: {State.SENDING, State.CANCELED, State.SENT, State.FAILED},
    State.CANCELED: {State.CANCELED, State.SENT},
    State.SUPPRESSED: {State.SENDING, State.CANCELED, State.SENT},
    State.SENT: {State.SENT, *RETURNED},
    State.BOUNCED: {*RETURNED},
    State.COMPLAINED: {*RETURNED},
}
# Fields that a mail loses as it comes into a state. Once it is sent or canceled, nobody needs its content.
DROPS: Mapping[State, tuple[str, ...]] = {
    **dict.fromkeys(State, ("next_attempt_at",)),
    State.SENDING: ("next_attempt_at", "reason"),
    State.SENT: ("next_attempt_at", "content"),
    State.CANCELED: ("next_attempt_at", "content"),
}
# What mail.counters counts a state as, but for a test, and a mail that has failed because it expired.
COUNTED = {state: state.value for state in (*FINAL, State.DELAYED)}  # and `accepted` by accept, all mails at once
OVER_TIME = "^delivered:[^u]"  # Lua's pattern of the totals that mail.figures has by minute and hour, beside COUNTED
CAUSED = frozenset({State.FAILED, State.UNKNOWN, State.DELAYED})  # in mail.index by their `reason`, too: mail.causes
# What webhooks are told as a mail comes into a state: Resend's words, and ours where it has none.
EVENTS: Mapping[State, str] = {
    State.SENT: "email.sent",
    State.DELAYED: "email.delivery_delayed",
    State.FAILED: "email.failed",
    State.UNKNOWN: "email.in_doubt",
    State.CANCELED: "email.canceled",
    State.SUPPRESSED: "email.suppressed",
    State.BOUNCED: "email.bounced",
    State.COMPLAINED: "email.complained",
}
MOST_WAITING = 250_000  # mails whose events wait for one endpoint: some 70 MB of Redis
LETTERS = {  # in mail.index
    **{state.value: state.value[0] for state in State},
    State.SENDING.value: "n",
    State.SENT.value: "t",
    State.CANCELED.value: "x",
    SCHEDULED: "a",
}
# note(field, number): adds to this minute and this hour, by Redis' own clock, which is asked once and only if need be.
# A new field gives its bucket the whole lifetime. In pcall, for a key may hold something else.
NOTE = """
local moment
local function redis_time()
  moment = moment or redis.call('TIME')
  return moment
end

local buckets
local function current()
  if buckets then return buckets end
  local now = redis_time()[1]
  buckets = {}
  for at, period in ipairs(PERIODS) do
    buckets[at] = {period[1] .. math.floor(now / period[2]), period[3]}
  end
  return buckets
end

local function note(field, number)
  for _, bucket in ipairs(current()) do
    local sum = redis.pcall('HINCRBY', bucket[1], field, number)
    if sum == tonumber(number) then redis.pcall('EXPIRE', bucket[1], bucket[2]) end
  end
end
"""
COUNT = """
local function count(name, number)
  redis.pcall('HINCRBY', TOTALS, name, number)
  note(name == EXPIRED and 'failed' or name, number)
end
"""
# Moves the one member in mail.index that a mail has by its state, and the one that it may have by its reason. In pcall,
# for INDEX may hold something else, which mail.sweep puts aside.
REINDEX = """
local function raw(hex)
  return (string.gsub(hex, '%x%x', function(two) return string.char(tonumber(two, 16)) end))
end

local function digest(text, factor)
  local sum = 0
  for at = 1, #text do sum = (sum * factor + string.byte(text, at)) % 2^32 end
  return raw(string.format('%08x', sum))
end

local function letter(state, scheduled_at)
  return LETTERS[state == 'queued' and scheduled_at and SCHEDULED or state]
end

local digests = {}
local function by_cause(own, state, reason)  -- the member of a mail whose id is `own` in bytes; of most mails, nothing
  if not CAUSED[state] or not reason or reason == '' then return end
  digests[reason] = digests[reason] or digest(reason, 31) .. digest(reason, 65599)
  return 'r' .. LETTERS[state] .. digests[reason] .. own
end

local function reindex(id, was, reason_was, state, reason)
  if string.sub(id, 15, 15) ~= '7' then return end  -- accepted before there was an index
  local key, scheduled_at = unpack(redis.call('HMGET', MAIL .. id, 'key', 'scheduled_at'))
  local own = raw((string.gsub(id, '-', '')))
  local rest, cause = digest(key or '', 31) .. own, by_cause(own, state, reason)
  redis.pcall('ZREM', INDEX, 's' .. letter(was, scheduled_at) .. rest, by_cause(own, was, reason_was))
  redis.pcall('ZADD', INDEX, 0, 's' .. letter(state, scheduled_at) .. rest)
  if cause then redis.pcall('ZADD', INDEX, 0, cause) end
end
"""
# await(endpoint, id, line): adds an event to those of a mail that wait for an endpoint, in one field: a line with the
# attempts that the first event has had, and since when it is the first, and a line for each event: its type, its moment
# in microseconds, its reason. In WEBHOOK_DUE is when the first is to be posted; 0: now, the oldest mail's first.
# A mail that waits to be told as delayed is not told as delayed again, or a relay away for days would fill Redis.
# announce(id, event, reason): the same for each endpoint that wants it, of which webhooks.queue writes WEBHOOK_WANTED.
# In pcall, for a key may hold something else.
ANNOUNCE = """
local function await(endpoint, id, line)
  local waiting = WEBHOOK_WAITING .. endpoint
  local was = redis.pcall('HGET', waiting, id)
  if type(was) == 'table' then return end
  if not was and redis.call('HLEN', waiting) >= MOST_WAITING then
    redis.pcall('HINCRBY', WEBHOOK_TOTALS, 'dropped:' .. endpoint, 1)
    return
  end
  if was and string.find(was, '\\n' .. EVENTS.delayed .. '[^\\n]*$') and string.find(line, EVENTS.delayed, 1, true) then
    return
  end
  redis.call('HSET', waiting, id, (was or '0 ' .. redis_time()[1]) .. '\\n' .. line)
  redis.pcall('ZADD', WEBHOOK_DUE .. endpoint, 'NX', 0, id)
end

local function announce(id, event, reason)
  local wanted = redis.pcall('HGETALL', WEBHOOK_WANTED)
  for at = 1, #wanted, 2 do
    if string.find(wanted[at + 1], ' ' .. event .. ' ', 1, true) then
      local now = redis_time()
      local line = event .. ' ' .. now[1] .. string.format('%06d', now[2])
      await(wanted[at], id, line .. ' ' .. string.gsub(reason or '', '%c', ' '))
    end
  end
end
"""
# suppress(digest, entry): adds an address to the suppression list (mail.suppression), if it is not on it. Returns the
# id of its entry, in bytes. In pcall, for a key may hold something else, which mail.sweep puts aside.
SUPPRESS = """
local function suppress(digest, entry)
  local known = redis.pcall('HGET', SUPPRESSED, digest)
  if type(known) == 'string' then return string.sub(known, 1, 16) end
  redis.pcall('HSET', SUPPRESSED, digest, entry)
  redis.pcall('ZADD', SUPPRESSIONS, 0, string.sub(entry, 1, 16) .. digest)
  return string.sub(entry, 1, 16)
end
"""
# Uses the tables of this file and, from mail.store, MAIL (prefix), OPEN, TOTALS, LAST_SENT, SWEPT, INDEX, SUPPRESSED,
# SUPPRESSIONS (keys), those of WEBHOOKS, PERIODS (of which mail.figures has figures) and KEPT (the lifetimes of final
# states, in seconds).
#
# become(id, state, now, look_at, fields): false where the state cannot follow the mail's. `now` is needed where a relay
# has taken the mail just now; `look_at` is when mail.sweep looks at one that is not final; `fields` are written with
# the state.
# But for a new mail, it begins with a command that frees memory: Redis looks for memory before a script's first write
# only, and a mail that was sent must be written down on a full Redis, too. And if TOTALS or OPEN hold something else
# (pcall), which mail.sweep puts aside.
BECOME = """
local function may(was, state) return (FOLLOWS[was or ''] or {})[state] end

local function become(id, state, now, look_at, fields)
  local mail = MAIL .. id
  local was = redis.call('HGET', mail, 'state')
  if not may(was, state) then return false end
  local reason_was = CAUSED[was] and redis.call('HGET', mail, 'reason')
  if was then redis.call('HDEL', mail, unpack(DROPS[state])) end
  redis.call('HSET', mail, 'state', state, unpack(fields))
  local counted = COUNTED[state]
  local reason = (CAUSED[state] or AGAIN[state] or RETURNED[state]) and redis.call('HGET', mail, 'reason')
  if state == 'failed' and reason == EXPIRED then counted = EXPIRED end
  local test = state == 'sent' and redis.call('HEXISTS', mail, 'test') == 1
  if test then counted = TEST end
  if counted and was ~= state then count(counted, 1) end  -- sent twice is one mail
  if KEPT[state] then
    redis.call('EXPIRE', mail, KEPT[state])
    redis.pcall('ZREM', OPEN, id)
  else
    if was then redis.call('PERSIST', mail) end
    redis.pcall('ZADD', OPEN, look_at, id)
  end
  if state == 'sent' and now and not test then redis.call('SET', LAST_SENT, now) end
  if was and was ~= state then reindex(id, was, reason_was, state, reason) end  -- accept writes the first members
  if EVENTS[state] and was ~= state then announce(id, EVENTS[state], reason) end
  return true
end
"""
LOST = {  # the status of a mail's job in RQ -> why the mail will not be sent although no attempt has settled it
    "failed": "its worker died in every attempt",
    "stopped": "its job was stopped",
    "canceled": "its job was canceled",
    "": "its job was deleted",
}


def transition(**constants: object) -> str:
    """Returns BECOME behind all that it uses, as local variables of the script."""
    tables = {"FOLLOWS": FOLLOWS, "DROPS": DROPS, "COUNTED": COUNTED, "LOST": LOST, "EXPIRED": EXPIRED, "TEST": TEST}
    tables |= {"TROUBLE_TOO_LONG": TROUBLE_TOO_LONG, "LETTERS": LETTERS, "SCHEDULED": SCHEDULED, "OVER_TIME": OVER_TIME}
    tables |= {
        "CAUSED": CAUSED,
        "AGAIN": AGAIN,
        "RETURNED": frozenset(RETURNED),
        "EVENTS": EVENTS,
        "MOST_WAITING": MOST_WAITING,
    }
    return named(**constants, **tables) + NOTE + COUNT + REINDEX + ANNOUNCE + BECOME + SUPPRESS


def named(**constants: object) -> str:
    """Returns Lua that makes constants local variables of a script."""
    return "".join(f"local {name} = {_literal(value)}\n" for name, value in constants.items())


def _literal(value: object) -> str:
    match value:
        case Mapping():
            return "{" + ", ".join(f"[{_literal(key or '')}] = {_literal(one)}" for key, one in value.items()) + "}"
        case Set():
            return _literal(dict.fromkeys(sorted(value), True))
        case tuple():
            return "{" + ", ".join(map(_literal, value)) + "}"
    return json.dumps(value)


def effective_state(
    state: str, job_status: str, reason: str, expired: bool = False, scheduled: bool = False
) -> tuple[str, str]:
    """Returns the (state, reason) that a mail is about to have, for those who read it: that a failed mail was queued
    again is written by its next claim; that one has expired while it waited, or its job is gone, by the sweep."""
    over = expired and reason == EXPIRED
    queued_again = job_status in ("queued", "scheduled", "started") and not over
    if state in AGAIN and queued_again:
        return State.QUEUED, ""
    if state in FINAL:
        return state, reason
    if expired and state != State.SENDING:
        return State.FAILED, EXPIRED
    if state == State.SENDING and job_status in ("queued", "scheduled"):
        return State.DELAYED, "its worker died in the last attempt"
    if job_status in LOST:
        return State.FAILED, LOST[job_status]
    return (SCHEDULED, "") if scheduled and state == State.QUEUED else (state, reason)
