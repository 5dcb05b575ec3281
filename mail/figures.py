"""The figures over time: what became of mails and how long it took, by minute and hour; and what happened then.

One hash in Redis for each minute, kept 3 hours, and for each hour, kept 74: `mail:minute:<n>` and `mail:hour:<n>`,
counted from 1970 by Redis' own clock. BECOME and settle count into them where they count the totals (mail.counters),
and so once. Fields: `accepted`, `sent`, `failed` (also what has expired), `unknown`, `canceled`, `delayed`, `test`; the
histogram `delivered:<bound in seconds>`; and the highest `depth` and `oldest` (seconds) of the queue that `sample` was
told. `mail:marks` has the events that stand beside them, as `<seconds> <kind> <text>`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from datetime import datetime, timedelta
from typing import Any, NamedTuple

from mail.counters import DELIVERED, number
from mail.states import NOTE, named
from mail.store import HOUR, MARKS, MINUTE, PERIODS, Period
from queues.connection import Redis, Script, is_wrong_type, translating_errors

HIGHEST = ("depth", "oldest")  # of which a period has the highest, and not the sum
MARKS_KEPT = 500
LATEST = 1e11  # seconds since 1970; a mark behind it has no year
# ARGV: field, number, ... of which each bucket keeps the highest.
SAMPLE = """
for _, bucket in ipairs(current()) do
  for at = 1, #ARGV, 2 do
    local highest = tonumber(redis.pcall('HGET', bucket[1], ARGV[at])) or -1
    if highest < tonumber(ARGV[at + 1]) then redis.pcall('HSET', bucket[1], ARGV[at], ARGV[at + 1]) end
  end
  redis.call('EXPIRE', bucket[1], bucket[2])
end
"""


class Figures(NamedTuple):
    """What was counted in a period that began `at` (seconds since 1970)."""

    at: float
    counts: Counter[str]

    def percentile(self, share: float) -> float | None:
        """Returns within how many seconds `share` of the mails were sent, or None if none was: between the bounds of
        the histogram as if they lay evenly there, and the last one for all beyond."""
        counted = [self.counts[field] for field in DELIVERED.fields]
        left, low = share * sum(counted), 0.0
        for high, mails in zip((*DELIVERED.bounds, DELIVERED.bounds[-1]), counted, strict=True):
            if mails and left <= mails:
                return low + (high - low) * left / mails
            left, low = left - mails, high
        return low if any(counted) else None


class Mark(NamedTuple):
    """An event: a release, the breaker, a restart of Redis, a clock that stepped."""

    at: float
    kind: str
    text: str


def minutes(redis: Redis, number: int) -> list[Figures]:
    """Returns the figures of the last minutes, the current one last. Raises `Unavailable`."""
    return _read(redis, MINUTE, number)


def hours(redis: Redis, number: int) -> list[Figures]:
    """Returns the figures of the last hours, the current one last. Raises `Unavailable`."""
    return _read(redis, HOUR, number)


def days(redis: Redis) -> tuple[Counter[str], Counter[str]]:
    """Returns the figures of today and yesterday, which begin at midnight of this machine's time zone. They are made of
    whole hours of UTC: in a zone that is half an hour off, the one around midnight counts to the day in which it began.
    Raises `Unavailable`."""
    seen = hours(redis, 51)  # two days, and the hour by which one of them may be longer
    today = datetime.fromtimestamp(seen[-1].at).date()
    of_day = {today: list[Counter[str]](), today - timedelta(days=1): list[Counter[str]]()}
    for one in seen:
        of_day.get(datetime.fromtimestamp(one.at).date(), []).append(one.counts)
    first, second = map(together, of_day.values())
    return first, second


def together(parts: Iterable[Counter[str]]) -> Counter[str]:
    """Returns the figures of several periods as of one."""
    sums, highest = Counter[str](), Counter[str]()
    for part in parts:
        sums.update(part)
        highest |= part
    return Counter(dict(sums) | {field: highest[field] for field in HIGHEST})


def sample(redis: Redis, depth: int, oldest: float) -> None:
    """Notes how many jobs wait in the queue and for how long the first has. Raises redis-py's errors."""
    Script(redis, named(PERIODS=PERIODS) + NOTE + SAMPLE)([], ["depth", depth, "oldest", round(oldest)])


def mark(redis: Redis, kind: str, text: str, at: float | None = None) -> None:
    """Notes an event: now, or `at` (seconds since 1970). Raises redis-py's errors."""
    moment = _now(redis) if at is None else at
    with redis.pipeline(transaction=False) as pipe:
        pipe.zadd(MARKS, {f"{moment:.3f} {kind} {text}": moment})
        pipe.zremrangebyscore(MARKS, "-inf", moment - HOUR.kept)
        pipe.zremrangebyrank(MARKS, 0, -1 - MARKS_KEPT)
        pipe.execute()


def marks(redis: Redis, since: float) -> list[Mark]:
    """Returns the events since a moment, the first of them first. Raises `Unavailable`."""
    with translating_errors():
        stored: Any = redis.zrangebyscore(MARKS, since, LATEST, withscores=True)
    entries = [(at, member.decode(errors="replace").split(" ", 2)) for member, at in stored]
    return [Mark(at, words[1], words[2]) for at, words in entries if len(words) == 3]


def _now(redis: Redis) -> float:
    seconds, microseconds = redis.time()
    return float(seconds + microseconds / 1_000_000)


def _read(redis: Redis, period: Period, how_many: int) -> list[Figures]:
    with translating_errors():
        last = int(_now(redis)) // period.seconds
        numbers = range(last - how_many + 1, last + 1)
        with redis.pipeline(transaction=False) as pipe:
            for one in numbers:
                pipe.hgetall(f"{period.prefix}{one}")
            stored: list[Any] = pipe.execute(raise_on_error=False)
        for error in stored:
            if isinstance(error, Exception) and not is_wrong_type(error):
                raise error
    return [Figures(float(one * period.seconds), _counts(fields)) for one, fields in zip(numbers, stored, strict=True)]


def _counts(stored: Any) -> Counter[str]:
    fields = stored if isinstance(stored, dict) else {}
    return Counter({field.decode(errors="replace"): int(number(count)) for field, count in fields.items()})
