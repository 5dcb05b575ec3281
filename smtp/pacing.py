"""How fast, and whether, the relay may be used: SMTP_RATE and the breaker, for all workers that share the Redis.

`admit` is asked before each conversation and says go, or how many seconds to wait and why. A mail that must wait goes
back to RQ's scheduler: it holds no worker and loses no attempt. The rate is counted when a mail goes, so a window such
as 14/s is never exceeded, however late a worker is; those who wait are told different moments, so that they do not all
come back at once. The breaker opens after some troubles in a row (no connection, TLS, login, throttle; see
smtp.verdict.judge), lets one mail probe every half minute, and closes when one gets through. While it is open, workers
take no mail from the queue: a long queue waits where it is.

Keys: `relay:breaker` (hash: troubles, open_until), `relay:probe` (string), and lists of moments in ms: `relay:gone`
(mails that went), `relay:told` (moments given to those who came first), `relay:told_again` (to those who came back).
"""

from __future__ import annotations

from typing import NamedTuple

from redis import Redis

from queues.connection import Script, unavailable
from settings import Rate

TROUBLES = 3  # in a row, until the breaker opens
PAUSE: float = 30  # seconds that it stays open; then one mail may probe
PROBE: float = 60  # seconds after which a probe that never came back is given up

# KEYS: breaker, probe, gone, told, told_again. ARGV: PAUSE and PROBE in ms, whether the mail has waited in line before,
# then mails and period (ms) of each rate. Whoever comes first lines up behind those who were told a moment; whoever
# comes back at his moment goes, if there is room, or is told another soon: there may be hours between the two lines.
ADMIT = """
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local open_until = tonumber(redis.call('HGET', KEYS[1], 'open_until') or '0')
if open_until > now then return {'breaker', open_until - now} end

local most = 0
local function next_free(moments)
  local free = now
  for i = 4, #ARGV, 2 do
    local mails, period = tonumber(ARGV[i]), tonumber(ARGV[i + 1])
    local nth = redis.call('LINDEX', moments, mails - 1)
    if nth and tonumber(nth) + period > free then free = tonumber(nth) + period end
    if mails > most then most = mails end
  end
  return free
end
local function note(moments, moment)
  redis.call('LPUSH', moments, moment)
  redis.call('LTRIM', moments, 0, most - 1)
end

local waited = ARGV[3] == '1'
local line = waited and KEYS[5] or KEYS[4]
local free, turn = next_free(KEYS[3]), next_free(line)
if free > now or (turn > now and not waited) then
  turn = math.max(free, turn)
  note(line, turn)
  return {'rate', turn - now}
end
if open_until > 0 and not redis.call('SET', KEYS[2], '1', 'NX', 'PX', ARGV[2]) then return {'breaker', ARGV[1] / 4} end
if most > 0 then note(KEYS[3], now) end
return {'go', redis.call('EXISTS', KEYS[1])}
"""

# KEYS: breaker, probe. ARGV: for how long in ms, whether at once (1) or after this many troubles. Returns whether it
# has opened now.
TROUBLE = """
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local troubles = redis.call('HINCRBY', KEYS[1], 'troubles', 1)
local was_open = redis.call('HGET', KEYS[1], 'open_until')
redis.call('DEL', KEYS[2])
if not was_open and troubles < tonumber(ARGV[2]) then return 0 end
redis.call('HSET', KEYS[1], 'open_until', now + ARGV[1])
return was_open and 0 or 1
"""

# KEYS: breaker, probe. Milliseconds until a mail may be tried; 0: now.
CLOSED_FOR = """
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local open_until = tonumber(redis.call('HGET', KEYS[1], 'open_until') or '0')
if open_until > 0 and open_until <= now then return math.max(0, redis.call('PTTL', KEYS[2])) end
return math.max(0, open_until - now)
"""


class Wait(NamedTuple):
    """How long a mail must wait, and why. `in_line`: for its turn under SMTP_RATE, which it has from now on."""

    seconds: float
    reason: str
    in_line: bool


WAITS = {"breaker": "the relay is in trouble", "rate": "SMTP_RATE is reached"}


class Pacing:
    """One worker's view of the relay, which all share. Raises redis-py's errors: who cannot ask does not send."""

    def __init__(self, redis: Redis, rates: tuple[Rate, ...]) -> None:
        self.redis = redis
        self.rates = [number for rate in rates for number in (rate.mails, rate.seconds * 1000)]
        self._admit, self._trouble, self._closed_for = (Script(redis, one) for one in (ADMIT, TROUBLE, CLOSED_FOR))
        self._troubled = False  # as far as this process knows: spares the healthy case a round trip

    def admit(self, waited: bool = False) -> Wait | None:
        """None: go, now. A go is counted; whoever does not use it has wasted it. `waited`: it was told a moment."""
        keys = ["relay:breaker", "relay:probe", "relay:gone", "relay:told", "relay:told_again"]
        args = [int(PAUSE * 1000), int(PROBE * 1000), int(waited), *self.rates]
        verdict, number = self._admit(keys=keys, args=args)
        self._troubled = verdict == b"breaker" or (verdict == b"go" and number == 1)
        if verdict == b"go":
            return None
        return Wait(number / 1000, WAITS[verdict.decode()], in_line=verdict == b"rate")

    def trouble(self, pause: float = 0) -> bool:
        """A conversation met with trouble that no mail can be blamed for. Returns whether this opened the breaker.

        `pause` is for how many seconds the relay has asked to be left alone; then it opens at once, for that long.
        """
        self._troubled = True
        args = [int(max(PAUSE, pause) * 1000), 1 if pause else TROUBLES]
        return bool(self._trouble(keys=["relay:breaker", "relay:probe"], args=args))

    def well(self) -> bool:
        """A conversation came about: the troubles are over. Returns whether this closed the breaker."""
        if not self._troubled:
            return False
        self._troubled = False
        with self.redis.pipeline() as commands:
            commands.hexists("relay:breaker", "open_until")
            commands.delete("relay:breaker", "relay:probe")
            return bool(commands.execute()[0])

    def closed_for(self) -> float:
        """Seconds for which no mail can go, because the breaker is open or somebody probes; 0 as long as this process
        has met with no trouble itself."""
        return self._closed_for(keys=["relay:breaker", "relay:probe"]) / 1000 if self._troubled else 0.0


def in_trouble(redis: Redis) -> bool:
    """Whether the breaker is open. Raises `Unavailable`."""
    with unavailable():
        return bool(redis.hexists("relay:breaker", "open_until"))
