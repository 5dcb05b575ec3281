"""The events of one endpoint in Redis, in order for each mail; each is posted at least once, and kept if it never was.

mail.states adds them (ANNOUNCE). A mail's first event is taken by one thread at a time, for LEASE seconds; its later
ones wait until that is delivered or given up. An event that fails is tried again after SCHEDULE. If TROUBLES fail in a
row, or the endpoint asks for a pause, it counts as down: then one event at a time is tried, at most a minute apart,
the others wait and lose no attempt, and the first that arrives lets all of them through.

Keys, each followed by the endpoint's name: `webhook:waiting:` and `webhook:due:` (mail.states), `webhook:state:` (a
hash: how it answers), `webhook:log:` (a list: the last posts, latest first), `webhook:given_up:` (a list). All of it
is forgotten a month after the last process that delivers, or an hour after the endpoint has gone from its settings.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import suppress
from typing import Any, NamedTuple

from mail.index import new_id
from mail.states import ANNOUNCE, EVENTS, MOST_WAITING, named
from mail.store import WEBHOOK_DUE, WEBHOOK_TOTALS, WEBHOOK_WAITING, WEBHOOK_WANTED, WEBHOOKS
from queues import keys
from queues.connection import Redis, Script, translating_errors

STATE, LOG, GIVEN_UP = (f"{keys.TAG}webhook:{kind}:" for kind in ("state", "log", "given_up"))
KINDS = {WEBHOOK_WAITING: "hash", WEBHOOK_DUE: "zset", STATE: "hash", LOG: "list", GIVEN_UP: "list"}
TEST = "webhook.test"  # the type of an event that a person asks for
SCHEDULE = (5, 5 * 60, 30 * 60, 2 * 3600, 5 * 3600, 10 * 3600, 10 * 3600)  # seconds, as Standard Webhooks advises
WORTH = 14 * 86400  # seconds after which an event is given up in any case
TROUBLES = 3  # in a row
PAUSE, LONGEST_PAUSE = 5, 60  # seconds between two tries while it is down
LEASE = 120  # seconds: longer than one post takes
LEASED = 10**12  # added to the end of a lease in WEBHOOK_DUE: behind everything that is only put off
LOGGED = 1000
KEPT_GIVEN_UP = 100_000
KEPT = 31 * 86400  # seconds
WANTED_FOR = 7 * 86400  # seconds for which events are written while no process delivers
GONE_AFTER = 3600  # seconds
SILENT = 180  # seconds after which no process delivers: three times as long as one says so
COMMON = (
    named(
        **WEBHOOKS,
        EVENTS=EVENTS,
        MOST_WAITING=MOST_WAITING,
        SCHEDULE=SCHEDULE,
        ENOUGH=0.9 * sum(SCHEDULE),  # an endpoint that comes and goes must not use up the tries within minutes
        WORTH=WORTH,
        TROUBLES=TROUBLES,
        PAUSE=PAUSE,
        LONGEST_PAUSE=LONGEST_PAUSE,
        LEASED=LEASED,
        LOGGED=LOGGED,
        KEPT_GIVEN_UP=KEPT_GIVEN_UP,
    )
    + """
local function redis_time() return redis.call('TIME') end
"""
    + ANNOUNCE
    + """
local endpoint = ARGV[1]
local waiting, due, state, log, given_up = unpack(KEYS)

local function first(id)  -- of a mail: attempts, since when it is the first, its line, those behind it
  local value = redis.call('HGET', waiting, id) or ''
  local attempts, since, line, rest = string.match(value, '^(%d+) (%d+)\\n([^\\n]*)(.*)$')
  return tonumber(attempts), tonumber(since), line, rest
end

local function take_out(id)
  local at = redis.call('ZSCORE', due, id)
  redis.call('ZREM', due, id)
  return at
end

local function put_back(id, at)
  if at then redis.call('ZADD', due, at, id) end
end

local function remove_first(id, rest, now)
  if rest == '' then
    redis.call('HDEL', waiting, id)
  else
    redis.call('HSET', waiting, id, '0 ' .. math.floor(now) .. rest)
    redis.call('ZADD', due, 0, id)
  end
end

local function note(entry, what)
  redis.call('LPUSH', log, entry)
  redis.call('LTRIM', log, 0, LOGGED - 1)
  redis.pcall('HINCRBY', WEBHOOK_TOTALS, what .. ':' .. endpoint, 1)
end

local function answers(now)  -- what was put off because it did not is due now
  redis.call('HSET', state, 'answered', now)
  if redis.call('HDEL', state, 'since', 'troubles', 'until', 'reply') == 0 then return end
  for _, id in ipairs(redis.call('ZRANGEBYSCORE', due, '(' .. now, '(' .. LEASED, 'LIMIT', 0, 1000)) do
    redis.call('ZADD', due, now, id)
  end
end
"""
)
# Each script begins with a command that frees memory, as BECOME does and why.
# KEYS: as `keys` returns them. ARGV: endpoint, now, lease in seconds. Returns a mail and what it has in
# WEBHOOK_WAITING; or the seconds for which the endpoint is left alone; or nothing.
TAKE = """
local now, lease = tonumber(ARGV[2]), ARGV[3]
local pause = tonumber(redis.call('HGET', state, 'until') or now) - now
if pause > 0 then return {tostring(pause)} end
local ended = redis.call('ZRANGEBYSCORE', due, LEASED, LEASED + now, 'LIMIT', 0, 1)
local found = ended[1] and ended or redis.call('ZRANGEBYSCORE', due, '-inf', now, 'LIMIT', 0, 1)
local id = found[1]
if not id then return {} end
local value = redis.call('HGET', waiting, id)
local micros = string.match(value or '', '^%d+ %d+\\n[%l_.]+ (%d+) ')
if not micros or #micros > 17 then  -- nothing of ours
  redis.call('HDEL', waiting, id)
  redis.call('ZREM', due, id)
  return {'0'}
end
take_out(id)
redis.call('ZADD', due, LEASED + now + lease, id)
if redis.call('HEXISTS', state, 'until') == 1 then redis.call('HSET', state, 'until', now + lease) end
return {id, value}
"""
# ARGV: endpoint, now, mail id, its first line, entry of the log.
DELIVERED = """
local now, id = tonumber(ARGV[2]), ARGV[3]
local at = take_out(id)
answers(now)
note(ARGV[5], 'delivered')
local _, _, line, rest = first(id)
if line == ARGV[4] then remove_first(id, rest, now) else put_back(id, at) end
"""
# ARGV: as above, then "1" if others would fail as well, the seconds that the endpoint asks for, its reply. Returns the
# seconds until the next try, -1 if it was given up.
FAILED = """
local now, id, pause = tonumber(ARGV[2]), ARGV[3], tonumber(ARGV[7])
local at = take_out(id)
note(ARGV[5], 'failed')
local is_down = false
if ARGV[6] == '1' then
  local troubles = redis.call('HINCRBY', state, 'troubles', 1)
  redis.call('HSETNX', state, 'since', now)
  redis.call('HSET', state, 'reply', ARGV[8])
  is_down = troubles >= TROUBLES or pause > 0
  if is_down then
    pause = math.max(pause, math.min(LONGEST_PAUSE, PAUSE * 2 ^ math.min(10, math.max(0, troubles - TROUBLES))))
    redis.call('HSET', state, 'until', now + pause)
  end
else
  answers(now)
end
local attempts, since, line, rest = first(id)
if line ~= ARGV[4] then
  put_back(id, at)
  return 0
end
if not is_down then
  attempts = attempts + 1
  pause = math.max(pause, SCHEDULE[math.min(attempts, #SCHEDULE)])
end
local age = now - since
if age > WORTH or not is_down and attempts > #SCHEDULE and age > ENOUGH then
  redis.call('RPUSH', given_up, id .. ' ' .. line)
  redis.call('LTRIM', given_up, -KEPT_GIVEN_UP, -1)
  redis.pcall('HINCRBY', WEBHOOK_TOTALS, 'given_up:' .. endpoint, 1)
  remove_first(id, rest, now)
  return -1
end
redis.call('HSET', waiting, id, attempts .. ' ' .. since .. '\\n' .. line .. rest)
redis.call('ZADD', due, now + pause, id)
return math.ceil(pause)
"""
# ARGV: endpoint, how many. Returns how many of those that were given up wait again, the oldest first.
REPLAY = """
local done = 0
for _ = 1, ARGV[2] do
  local id, line = string.match(redis.call('LPOP', given_up) or '', '^(%S+) (.*)$')
  if not id then break end
  await(endpoint, id, line)
  done = done + 1
end
return done
"""
# ARGV: endpoint, mail id, event.
AWAIT = "await(endpoint, ARGV[2], ARGV[3])"


class Line(NamedTuple):
    """An event as it waits: its type, its moment in microseconds since 1970, and the reason, if it has one."""

    type: str
    micros: int
    reason: str = ""

    @classmethod
    def parse(cls, text: str) -> Line:
        """Raises ValueError."""
        kind, micros, *reason = text.split(" ", 2)
        return cls(kind, int(micros), *reason)

    def __str__(self) -> str:
        return f"{self.type} {self.micros} {self.reason}"


class Taken(NamedTuple):
    mail_id: str
    attempts: int  # before this one
    line: str


class Post(NamedTuple):
    """What the log keeps of one post. `status` is 0 where there was no answer; `next_in` is in seconds, -1 where it was
    given up."""

    at: float
    mail_id: str
    line: str
    status: int
    said: str
    ms: int


class Standing(NamedTuple):
    """How an endpoint stands. Moments are in seconds since 1970, 0 where there is none."""

    name: str
    host: str
    events: list[str]
    seen: float  # when a process that delivers was last there
    waiting: int  # mails whose events wait
    given_up: int  # that can be replayed
    since: float  # when its posts began to fail
    is_down: bool
    reply: str  # of the last that failed
    answered: float
    counts: dict[str, int]

    def is_silent(self, now: float) -> bool:
        """Returns whether no process delivers."""
        return self.seen < now - SILENT


class Queue:
    """The events of one endpoint."""

    def __init__(self, redis: Redis, name: str) -> None:
        self.redis, self.name = redis, name
        self.keys = [prefix + name for prefix in KINDS]
        self._scripts = {body: Script(redis, COMMON + body) for body in (TAKE, DELIVERED, FAILED, REPLAY, AWAIT)}

    def _run(self, body: str, *args: Any) -> Any:
        with translating_errors():
            return self._scripts[body](self.keys, [self.name, *args])

    def take(self, now: float) -> Taken | float:
        """Takes a mail's first event that is due; or returns for how many seconds there is none, at least."""
        match self._run(TAKE, now, LEASE):
            case [mail_id, value]:
                head, line, *_ = value.decode(errors="replace").split("\n")
                return Taken(mail_id.decode(errors="replace"), int(head.split()[0]), line)
            case [pause]:
                return float(pause)
        return 1.0

    def delivered(self, taken: Taken, now: float, post: Post) -> None:
        self._run(DELIVERED, now, taken.mail_id, taken.line, json.dumps(post))

    def failed(self, taken: Taken, now: float, post: Post, trouble: bool, pause: float) -> int:
        """Puts the event off. Returns for how many seconds; -1 if it was given up."""
        args = [now, taken.mail_id, taken.line, json.dumps(post), "1" if trouble else "", pause, post.said]
        return int(self._run(FAILED, *args))

    def replay(self, most: int) -> int:
        return int(self._run(REPLAY, most))

    def put(self, mail_id: str, line: str) -> None:
        """Adds an event: one that was delivered, again."""
        self._run(AWAIT, mail_id, line)

    def test(self, now: float) -> None:
        self.put(new_id(), str(Line(TEST, int(now * 1e6))))

    def waiting_of(self, mail_id: str) -> list[Line]:
        """Returns the events of a mail that wait."""
        stored: Any = self.redis.hget(WEBHOOK_WAITING + self.name, mail_id)
        return list(_lines((stored or b"").decode(errors="replace").split("\n")[1:]))

    def log(self, most: int = LOGGED) -> Iterator[Post]:
        """Yields the last posts, the latest first."""
        entries: Any = self.redis.lrange(LOG + self.name, 0, most - 1)
        for entry in entries:
            with suppress(ValueError, TypeError):
                yield Post(*json.loads(entry))


def _lines(texts: list[str]) -> Iterator[Line]:
    for text in texts:
        with suppress(ValueError):
            yield Line.parse(text)


def want(redis: Redis, wanted: dict[str, str], now: float) -> None:
    """Says which events are to be written from now on, and forgets endpoints that no process has known for an hour.
    `wanted` has, of each endpoint, its host and the types of events, one behind the other."""
    for name, about in wanted.items():
        host, _, events = about.partition(" ")
        redis.hset(WEBHOOK_WANTED, name, f"{host} {int(now)} {events} ")
        for prefix in KINDS:
            redis.expire(prefix + name, KEPT)
    redis.expire(WEBHOOK_WANTED, WANTED_FOR)
    redis.expire(WEBHOOK_TOTALS, KEPT)
    for one in standings(redis):
        if one.name not in wanted and one.seen < now - GONE_AFTER:
            redis.hdel(WEBHOOK_WANTED, one.name)
            redis.unlink(*(prefix + one.name for prefix in KINDS))


def standings(redis: Redis) -> list[Standing]:
    """Returns how each endpoint stands."""
    stored: Any = redis.hgetall(WEBHOOK_WANTED)
    if not stored:
        return []
    wanted = {name.decode(errors="replace"): about.decode(errors="replace") for name, about in stored.items()}
    names = sorted(wanted)
    pipe: Any = redis.pipeline(transaction=False)  # a full Redis refuses a transaction, even to read
    pipe.hgetall(WEBHOOK_TOTALS)
    for name in names:
        pipe.hlen(WEBHOOK_WAITING + name).llen(GIVEN_UP + name).hgetall(STATE + name)
    totals, *rest = (None if isinstance(one, Exception) else one for one in pipe.execute(raise_on_error=False))
    found = []
    for name, waiting, given_up, state in zip(names, rest[::3], rest[1::3], rest[2::3], strict=True):
        host, seen, *events = [*wanted[name].split(), "", "0"][:60]
        known = {key.decode(): value.decode(errors="replace") for key, value in (state or {}).items()}
        moments = [_number(known.get(one, "")) for one in ("since", "answered")]
        counts = {
            field.decode(errors="replace").partition(":")[0]: int(_number(value))
            for field, value in (totals or {}).items()
            if field.decode(errors="replace").partition(":")[2] == name
        }
        about = (name, host, [one for one in events if "." in one], _number(seen), waiting or 0, given_up or 0)
        found.append(Standing(*about, moments[0], "until" in known, known.get("reply", ""), moments[1], counts))
    return found


def _number(text: str | bytes) -> float:
    try:
        return float(text)
    except ValueError:
        return 0
