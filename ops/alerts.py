"""Decides what people are told, and when: once when something begins, once when it is over, and never a storm.

Something begins, or is over, once it is so in two looks in a row. What cannot be seen meanwhile stays as it was. What
has been over for less than ten minutes is not said to begin again, and there are twenty messages in an hour at most;
what is held back is told later, if it is still true. Dashboards that share a Redis share there what was said
(`mail:watch`), so that one of them says it, and one that starts anew does not say it again. While Redis cannot be
asked, each decides by itself.
"""

from __future__ import annotations

import re
import socket
from collections.abc import Callable
from contextlib import suppress
from typing import Any, NamedTuple

from mail.store import WATCH
from ops.checks.findings import counted, lasting
from ops.condition import Condition, Level, hidden
from ops.push import News, Status
from queues.connection import Redis, RedisError, Script, Unavailable, translating_errors

LOOKS = 2  # in a row
QUIET = 600  # seconds after what was last said of a kind until it may be said to begin again
MOST, IN = 20, 3600  # messages in so many seconds
WITHOUT_REDIS = frozenset({"redis", "replica", "clock"})  # the kinds that are known without it
FIELD = "alert:"
# KEYS: watch. ARGV: kind, begins or ended, now, when this process last said something of the kind, what else to write
# down. Returns `go`, or why not: another has said it (`told`), it is too soon (`later`), too much was said (`held`).
CLAIM = f"""
local field, now = '{FIELD}' .. ARGV[1], tonumber(ARGV[3])
local state, at = string.match(redis.call('HGET', KEYS[1], field) or '', '^(%a+) ([%d.]+)')
local mine, theirs = tonumber(ARGV[4]), tonumber(at) or 0
if (state or 'ended') == ARGV[2] and theirs >= mine then return 'told' end
local last = math.max(mine, theirs)
if ARGV[2] == 'begins' and last <= now and now - last < {QUIET} then return 'later' end
local said = {{}}
for one in string.gmatch(redis.call('HGET', KEYS[1], 'said') or '', '%S+') do
  local ago = now - (tonumber(one) or 0)
  if ago >= 0 and ago < {IN} then said[#said + 1] = one end
end
if #said >= {MOST} then return 'held' end
said[#said + 1] = ARGV[3]
redis.call('HSET', KEYS[1], 'said', table.concat(said, ' '), field, ARGV[2] .. ' ' .. ARGV[3] .. ' ' .. ARGV[5])
return 'go'
"""


class Begun(NamedTuple):
    """What holds, since when, and what people are told of it when it is over."""

    level: Level
    since: float
    what: str


class Alerts:
    """Takes each look at the service, and hands on what is to be said."""

    def __init__(self, redis: Redis, say: Callable[[News], object]) -> None:
        self.redis, self.say = redis, say
        self.claim = Script(redis, CLAIM)
        self.host = socket.gethostname()
        self.recalled = False  # what was said before this process began
        self.begun: dict[str, Begun] = {}  # by kind
        self.over: dict[str, Begun] = {}  # what people were told that it begins, and is over
        self.told: set[str] = set()  # what people were told that it begins
        self.changing: dict[str, list[float]] = {}  # the looks in a row that show something else than `begun`
        self.spoken: dict[str, float] = {}  # when this process last said something of the kind
        self.said: list[float] = []  # when, in the last hour
        self.held: set[tuple[str, str]] = set()

    def look(self, seen: Condition, now: float, blind: bool = False) -> None:
        """Takes what a look has shown; `blind`: Redis could not be asked."""
        if not blind and not self.recalled:
            self._recall()
        holding = {one.kind: one for one in reversed((seen, *seen.also)) if one.push}
        unseen = hidden(seen) | ({*self.begun} - WITHOUT_REDIS if blind else set())
        for kind in [one for one in {**holding, **self.begun, **self.changing} if one not in unseen]:
            looks = [*self.changing.pop(kind, ()), now]
            if (kind in holding) == (kind in self.begun):
                continue
            if len(looks) < LOOKS:
                self.changing[kind] = looks
            else:
                self._change(kind, holding.get(kind), looks[0])
        for kind, one in self.begun.items():
            if kind not in self.told:
                self._tell("begins", kind, one, begins(holding.get(kind), one), now)
        for kind, one in [*self.over.items()]:
            self._tell("ended", kind, one, f"Over after {lasting(now - one.since)}: {one.what} {seen.sentence}", now)

    def _change(self, kind: str, one: Condition | None, at: float) -> None:
        if one:
            since = one.since or at
            self.begun[kind] = self.over.pop(kind, Begun(one.level, since, first_sentence(one.sentence)))
        else:
            ended = self.begun.pop(kind)
            if kind in self.told:
                self.over[kind] = ended

    def _tell(self, status: Status, kind: str, one: Begun, text: str, now: float) -> None:
        verdict = self._may(status, kind, one, now)
        if verdict == "held":
            self.held.add((kind, status))
        if verdict not in ("go", "told"):
            return
        if status == "begins":
            self.told.add(kind)
        else:
            self.told.discard(kind)
            del self.over[kind]
        self.held.discard((kind, status))
        if verdict == "told":
            return
        if self.held:
            text += f" ({counted(len(self.held), 'more message')} held back, since there were {MOST} in an hour.)"
            self.held.clear()
        self.spoken[kind] = now
        self.said = [*(at for at in self.said if 0 <= now - at < IN), now]
        self.say(News(status, kind, one.level, text, one.since, self.host))

    def _may(self, status: Status, kind: str, one: Begun, now: float) -> str:
        """Returns what CLAIM does, from what this process knows if Redis cannot say."""
        mine = self.spoken.get(kind, 0.0)
        with suppress(Unavailable, RedisError), translating_errors():
            words = f"{one.since:.3f} {one.level} {one.what}"
            return str(self.claim([WATCH], [kind, status, f"{now:.3f}", f"{mine:.3f}", words]).decode())
        if status == "begins" and 0 <= now - mine < QUIET:
            return "later"
        return "held" if sum(0 <= now - at < IN for at in self.said) >= MOST else "go"

    def _recall(self) -> None:
        """Takes up what was begun when the last process ended, or what another has said."""
        with suppress(Unavailable, RedisError), translating_errors():
            stored: Any = self.redis.hgetall(WATCH)
            self.recalled = True
            for field, value in stored.items():
                name, said = field.decode(errors="replace"), value.decode(errors="replace").split(" ", 4)
                if name.startswith(FIELD) and said[0] == "begins" and len(said) == 5:
                    kind = name.removeprefix(FIELD)
                    with suppress(ValueError):
                        level: Level = "bad" if said[3] == "bad" else "warn"
                        self.begun.setdefault(kind, Begun(level, float(said[2]), said[4]))
                        self.told.add(kind)


def begins(one: Condition | None, begun: Begun) -> str:
    """Returns what is said first: how it is at this moment and the next step, if it can be seen now."""
    if not one:
        return begun.what
    return f"{one.sentence} Next: {one.fix}." if one.fix else one.sentence


def first_sentence(text: str) -> str:
    found = re.match(r".+?[.](?= [A-Z0-9]|$)", text)
    return found[0] if found else text
