"""How fast, and whether, the relay may be used: SMTP_RATE and the breaker, for all workers that share the Redis.

`admit` is asked before each conversation and says go, or how many seconds to wait and why. A mail that must wait goes
back to RQ's scheduler: it holds no worker and loses no attempt. The rate is counted when a mail goes, so a window such
as 14/s is never exceeded, however late a worker is; mails that wait reserve different moments, so that they do not all
come back at once. The breaker opens after some troubles in a row (no connection, TLS, login, throttle; see
smtp.policy), lets one mail probe every half minute and when a worker starts, and closes when one gets through. While it
is open, workers take no mail from the queue: a long queue waits where it is. No mail makes trouble for the others: one
that was put off before opens no breaker, and probes only if no other mail does.

A mail of priority `high` lines up behind nobody: it takes the next moment that the rate leaves, and waits for it in its
worker; and so does a `normal` one that returns at its moment. `bulk` mail lines up by itself and takes what is left, so
that other mail need not wait until all of it has had its turn. It leaves a twentieth of a long period (`30/m`,
`2000/d`): else it would take all of it at its beginning, and a login code would wait for its end.

Keys of the relay of SMTP_HOST; those of a named one begin with `relay:<name>:`. `relay:breaker` (hash: troubles,
open_until, since; of the last trouble phase, code, text, relay), `relay:probe` (string), `relay:rates` (string: of the
worker that started last), `relay:streak` (hash: words, mails, since), and lists of moments in ms: `relay:gone` (mails
sent), `relay:told` (reservations of new mails),
`relay:told_bulk` (of new bulk mails), `relay:told_again` and `relay:told_bulk_again` (of returning ones).
"""

from __future__ import annotations

import hashlib
import math
import time
from contextlib import suppress
from typing import Any, NamedTuple

from process.relays import ONLY
from process.values import Rate
from queues import keys
from queues.connection import Redis, Script, translating_errors
from smtp.policy import CHOSEN, Phase
from smtp.verdict import Reply

TROUBLES = 3  # in a row, until the breaker opens
PAUSE: float = 30  # seconds that it stays open; then one mail may probe
LONGEST = 15 * 60  # seconds; a pause that is asked for beyond that may be meant for one sender
PROBE: float = 60  # seconds after which a probe that never came back is given up; and that others probe first
HOLD = {"high": 3.0, "normal": 1.0, "bulk": 0.2}  # seconds that a mail waits in its worker at most
LATE = 1.0  # seconds by which a mail may come back too late, since RQ looks once a second
LEFT = 20  # bulk mail leaves one place in so many free, in a period that is longer than a mail waits in its worker
BULK_AHEAD = 10  # seconds for which bulk mail has been given its turns
ALIKE = 3  # different mails in a row that are put off or refused in the same words: it is about the account
STREAK = 86400  # seconds for which such a row is remembered
LAST = 2.5e14  # ms since 1970: nothing later is a moment to Python
WORDS = 300  # characters of the relay's words that are kept with the breaker

HEAD = """
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local function moment(written)  -- 0 for none, and for what is none
  local at = tonumber(written) or 0
  return at < 1e15 and at or 0
end
local open_until = moment(redis.call('HGET', KEYS[1], 'open_until'))
"""  # in ms; before each script, whose first key is the breaker
# KEYS: breaker, probe, gone, told, told_again, told_bulk, told_bulk_again. ARGV: PAUSE and PROBE in ms, whether the
# mail had a reservation, whether it was put off before, its priority, for how many ms it may wait in its worker, then
# what _rates returns. Returns `go`, whether there was trouble, and in how many ms. A new mail lines up behind all
# reservations of its line; one that returns at its moment goes, if there is room, or gets another moment soon: there
# may be hours between the ends of the lines.
ADMIT = """
local mine_at = open_until
if open_until > 0 and ARGV[4] == '1' then mine_at = open_until + ARGV[2] end
if mine_at > now then return {'breaker', mine_at - now} end

local most = 0
local function next_free(moments)
  local free = now
  for i = 7, #ARGV, 3 do
    local mails, period = tonumber(ARGV[i]), tonumber(ARGV[i + 1])
    local nth = redis.call('LINDEX', moments, ARGV[i + 2] - 1)
    if nth and moment(nth) + period > free then free = moment(nth) + period end
    if mails > most then most = mails end
  end
  return free
end
local function reserve(moments, moment)
  redis.call('LPUSH', moments, moment)
  redis.call('LTRIM', moments, 0, most - 1)
end

local returning = ARGV[5] == 'high' or ARGV[3] == '1'
local line = KEYS[(returning and 5 or 4) + (ARGV[5] == 'bulk' and 2 or 0)]
local free, turn = next_free(KEYS[3]), next_free(line)
if free > now + ARGV[6] or (turn > now and not returning) then
  turn = math.max(free, turn)
  reserve(line, turn)
  return {'rate', turn - now}
end
if open_until > 0 and not redis.call('SET', KEYS[2], '1', 'NX', 'PX', ARGV[2]) then return {'breaker', ARGV[1] / 4} end
if most > 0 then reserve(KEYS[3], free) end
return {'go', redis.call('EXISTS', KEYS[1]), free - now}
"""

# KEYS: breaker, probe. ARGV: for how long in ms, after how many troubles, whether the mail was put off before, fields
# and values of the record. Returns whether it has opened now.
TROUBLE = """
if ARGV[3] == '1' and open_until == 0 then return 0 end
local troubles = (tonumber(redis.call('HGET', KEYS[1], 'troubles')) or 0) + 1
redis.call('HSET', KEYS[1], 'troubles', troubles, unpack(ARGV, 4))
redis.call('HSETNX', KEYS[1], 'since', now)
redis.call('DEL', KEYS[2])
if open_until == 0 and troubles < tonumber(ARGV[2]) then return 0 end
redis.call('HSET', KEYS[1], 'open_until', math.max(open_until, now + ARGV[1]))
return open_until == 0 and 1 or 0
"""

# KEYS: breaker, probe. Returns the milliseconds until a mail may be tried.
CLOSED_FOR = """
if open_until > 0 and open_until <= now then return math.max(0, redis.call('PTTL', KEYS[2])) end
return math.max(0, open_until - now)
"""

# KEYS: breaker, told_bulk, told_bulk_again. Returns the milliseconds until the last turn that bulk mail has been given.
BULK_LINE = """
local function last(moments) return moment(redis.call('LINDEX', moments, 0)) end
return math.max(0, last(KEYS[2]) - now, last(KEYS[3]) - now)
"""

# KEYS: breaker, rates, the lines of reservations. ARGV: the rates. An open breaker stays open, but a mail may try.
START = """
if open_until > now then redis.call('HSET', KEYS[1], 'open_until', now) end
if redis.call('GET', KEYS[2]) ~= ARGV[1] then
  redis.call('DEL', unpack(KEYS, 3))
  redis.call('SET', KEYS[2], ARGV[1])
end
"""

# KEYS: breaker, streak. ARGV: digest of the relay's words, when a mail was last sent (seconds), whether this mail was
# put off before, how long to remember it in ms. Returns how many different mails in a row have met with these words.
REFUSED = """
local words, since = unpack(redis.call('HMGET', KEYS[2], 'words', 'since'))
if words ~= ARGV[1] or tonumber(ARGV[2]) > moment(since) then
  redis.call('DEL', KEYS[2])
  redis.call('HSET', KEYS[2], 'words', ARGV[1], 'since', now / 1000)
end
redis.call('PEXPIRE', KEYS[2], ARGV[4])
local mails = (tonumber(redis.call('HGET', KEYS[2], 'mails')) or 0) + 1 - ARGV[3]
redis.call('HSET', KEYS[2], 'mails', mails)
return mails
"""


# KEYS: breaker, gone. ARGV: periods in ms. Returns how many mails have gone in each until now. The newest is the first;
# a mail that is in a hurry may have been given a moment that is a little later than that of the next.
USED = """
local used = {}
for i, period in ipairs(ARGV) do
  local least, most = 0, redis.call('LLEN', KEYS[2])
  while least < most do
    local middle = math.floor((least + most) / 2)
    if moment(redis.call('LINDEX', KEYS[2], middle)) + period > now then least = middle + 1 else most = middle end
  end
  used[i] = least
end
return used
"""


def key_prefix(name: str) -> str:
    """Returns how the keys of a relay begin."""
    return keys.TAG + (ONLY if name == ONLY else f"{ONLY}:{name}")


BREAKER = f"{key_prefix(ONLY)}:breaker"  # exists while the relay of SMTP_HOST is in trouble


def kinds(name: str = ONLY) -> dict[str, str]:
    """Returns the keys of a relay, and the type of each. Those of tokens are smtp.tokens', `sessions` is
    smtp.tally's."""
    of_type = {
        "hash": ("breaker", "streak", "sessions", "token"),
        "list": ("gone", "told", "told_again", "told_bulk", "told_bulk_again"),
        "string": ("probe", "rates", "renewing"),
    }
    return {f"{key_prefix(name)}:{key}": kind for kind, names in of_type.items() for key in names}


class Wait(NamedTuple):
    """Says how long a mail must wait, and why. `reserved`: it has its turn under SMTP_RATE at that moment, at the relay
    that `line` names."""

    seconds: float
    reason: str
    reserved: bool
    is_trouble: bool = False
    line: str = ""


WAITS = {"breaker": "the relay is in trouble", "rate": "SMTP_RATE is reached"}


def _rates(rates: tuple[Rate, ...], for_bulk: bool) -> list[int]:
    """Returns of each rate the mails, the period in ms, and how many of the mails bulk, or any other, may be."""
    numbers: list[int] = []
    for most, seconds in rates:
        left = most // LEFT if for_bulk and seconds > HOLD["high"] else 0
        numbers += [most, seconds * 1000, most - left]
    return numbers


class Pacing:
    """Paces the mail to one relay, by its name, together with all workers. Raises redis-py's errors: a worker that
    cannot ask does not send."""

    def __init__(self, redis: Redis, rates: tuple[Rate, ...], name: str = ONLY) -> None:
        self.redis, relay = redis, key_prefix(name)
        self.breaker = [f"{relay}:breaker", f"{relay}:probe"]
        self.moments = [f"{relay}:{name}" for name in ("gone", "told", "told_again", "told_bulk", "told_bulk_again")]
        self.streak, self.used = f"{relay}:streak", f"{relay}:rates"
        self.rates, self.bulk_rates = _rates(rates, for_bulk=False), _rates(rates, for_bulk=True)
        self._admit, self._trouble, self._closed_for, self._refused, self._start, self._bulk_line = (
            Script(redis, HEAD + one) for one in (ADMIT, TROUBLE, CLOSED_FOR, REFUSED, START, BULK_LINE)
        )
        self._troubled = False  # as far as this process knows: spares the healthy case a round trip

    @property
    def is_free(self) -> bool:
        """Returns whether no rate is set, and this process has met with no trouble of late."""
        return not self.rates and not self._troubled

    def admit(
        self, reserved: bool = False, put_off: bool = False, priority: str = "normal", calm: bool = False
    ) -> Wait | None:
        """Returns None for go, now: after a wait of HOLD at most if that gets it its turn. A go is counted, and wasted
        if the mail does not go. `reserved`: the mail had a reservation. `put_off`: the relay has put this mail off
        before, so others probe first for a minute. `calm`: there was no BREAKER right now, so nothing need be asked
        where no rate is set either."""
        if calm and self.is_free:
            return None
        hold = HOLD[priority] if reserved or priority == "high" else 0
        args = [int(PAUSE * 1000), int(PROBE * 1000), int(reserved), int(put_off), priority, int(hold * 1000)]
        args += self.bulk_rates if priority == "bulk" else self.rates
        verdict, number, *wait = self._admit(keys=self.breaker + self.moments, args=args)
        self._troubled = verdict == b"breaker" or (verdict == b"go" and number == 1)
        if verdict == b"go":
            time.sleep(wait[0] / 1000)
            return None
        early = max(0.0, HOLD[priority] - LATE) if verdict == b"rate" else 0  # to wait there for its moment
        is_rate = verdict == b"rate"
        return Wait(number / 1000 - early, WAITS[verdict.decode()], reserved=is_rate, is_trouble=not is_rate)

    def trouble(
        self, pause: float = 0, put_off: bool = False, *, reply: Reply | None = None, relay: object = ""
    ) -> bool:
        """Counts trouble that no mail can be blamed for. Returns whether this opened the breaker. `pause` is for how
        many seconds the relay has asked to be left alone; then it opens at once, for that long. `put_off`: this mail
        has met with trouble of its own before, so it keeps an open breaker open and opens none. `reply` is what
        happened, and `relay` where: both are kept for people."""
        self._troubled = True
        args: list[Any] = [int(max(PAUSE, min(pause, LONGEST)) * 1000), 1 if pause else TROUBLES, int(put_off)]
        if reply:  # without addresses: it stays until a mail gets through
            words = CHOSEN.sub("", reply.text)[:WORDS]
            args += ["phase", reply.phase.value, "code", reply.code or "", "text", words, "relay", str(relay)]
        return bool(self._trouble(keys=self.breaker, args=args))

    def refused_alike(self, words: str, last_sent: float, put_off: bool) -> bool:
        """Counts a mail that was put off or refused with these words, and returns whether several different ones in a
        row were, with none sent in between: then it is about the account. `put_off`: this mail was counted before."""
        digest = hashlib.sha256(words.encode()).hexdigest()[:16]
        args = [digest, last_sent, int(put_off), int(STREAK * 1000)]
        return int(self._refused(keys=[self.breaker[0], self.streak], args=args)) >= ALIKE

    def well(self) -> bool:
        """Forgets the troubles, after a conversation that came about. Returns whether this closed the breaker."""
        if not self._troubled:
            return False
        self._troubled = False
        with self.redis.pipeline() as commands:
            commands.hexists(self.breaker[0], "open_until")
            commands.delete(*self.breaker)
            return bool(commands.execute()[0])

    def close(self) -> None:
        """Closes the breaker because a person asks for it."""
        self.redis.delete(*self.breaker)

    def closed_for(self, sure: bool = False) -> float:
        """Returns the seconds for which no mail can go, because the breaker is open or another mail probes; 0 as long
        as this process has met with no trouble itself, unless it is to be `sure`."""
        return self._closed_for(keys=self.breaker) / 1000 if self._troubled or sure else 0.0

    def room_for_bulk(self) -> float:
        """Returns how many bulk mails may line up now: as many as go in BULK_AHEAD, any number where none has to wait.
        More would only go round."""
        if not self.rates:
            return math.inf
        ahead = self._bulk_line(keys=[self.breaker[0], *self.moments[3:]]) / 1000
        periods, mails = self.bulk_rates[1::3], self.bulk_rates[2::3]
        slowest = min(1000 * most / period for period, most in zip(periods, mails, strict=True))
        return max(0, math.ceil((BULK_AHEAD - ahead) * slowest)) if ahead else math.inf

    def start(self) -> None:
        """Takes up the settings of a worker that starts, since they may be corrected ones: lets a mail probe at once,
        and forgets the moments that mails were given at another SMTP_RATE. Under `20/h` the last may be hours away."""
        self._start(keys=[self.breaker[0], self.used, *self.moments[1:]], args=[str(self.rates)])


def used(redis: Redis, rates: tuple[Rate, ...], name: str = ONLY) -> list[tuple[Rate, int]]:
    """Returns of each rate how many mails have gone within its period until now. Raises `Unavailable`."""
    with translating_errors():
        ask, periods = Script(redis, HEAD + USED), [rate.seconds * 1000 for rate in rates]
        counts = ask([f"{key_prefix(name)}:breaker", f"{key_prefix(name)}:gone"], periods)
    return list(zip(rates, counts, strict=True))


def in_trouble(redis: Redis, name: str = ONLY) -> bool:
    """Returns whether the relay's breaker is open. Raises `Unavailable`."""
    with translating_errors():
        return bool(redis.hexists(f"{key_prefix(name)}:breaker", "open_until"))


class Standing(NamedTuple):
    """Says how the relay stands as long as there is trouble: until when the breaker is open (0: not yet), since when
    there has been trouble, the last reply and of which relay, `host:port`. A worker of an earlier version leaves the
    last three out. Moments in seconds since 1970."""

    open_until: float
    since: float
    reply: Reply | None
    relay: str


def standing(redis: Redis, name: str = ONLY) -> Standing | None:
    """Returns None if there is no trouble. Raises `Unavailable`."""
    with translating_errors():
        stored: Any = redis.hgetall(f"{key_prefix(name)}:breaker")
    return read_standing(stored)


def read_standing(stored: dict[bytes, bytes]) -> Standing | None:
    """Returns what the hash of the breaker says."""
    if not stored:
        return None
    said = {name.decode(errors="replace"): value.decode(errors="replace") for name, value in stored.items()}
    reply = None
    with suppress(KeyError, ValueError):
        reply = Reply(Phase(said["phase"]), int(said["code"]) if said["code"] else None, said["text"])
    return Standing(_moment(said.get("open_until")), _moment(said.get("since")), reply, said.get("relay", ""))


def _moment(written: str | None) -> float:
    """Returns seconds of what is written in ms; 0 for none, and for what is none."""
    with suppress(ValueError):
        if 0 < (ms := float(written or 0)) < LAST:
            return ms / 1000
    return 0.0
