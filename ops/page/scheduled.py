"""The mails that wait for their time, or for their next attempt, by when it comes: `/mail/scheduled`.

They are those in RQ's scheduled registry. Its entries are in the order of their times, so a page and the number of
mails of a day take no longer where there are a million.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from datetime import date, datetime, time, timedelta
from itertools import groupby, pairwise
from typing import Any, NamedTuple

from flask import Response, request

from mail.moments import LONGEST_DELAY
from ops.page.view import View, row
from queues import keys
from queues.connection import Redis
from queues.table import EMAIL

SHOWN = 50  # mails on a page
LATE = 60  # seconds; another worker takes over the scheduler of one that died within these
DAYS = LONGEST_DELAY.days + 2  # that are counted one by one, from today on


class Day(NamedTuple):
    name: str
    begins: float  # seconds since 1970
    mails: int


def show(view: View) -> Response:
    now = datetime.now().astimezone()
    start, skip = (_number(request.args.get(name, "")) for name in ("from", "skip"))
    days = {day.name: day for day in _days(view.redis, now)}
    entries = _entries(view.redis, start, round(skip))
    more, entries = entries[SHOWN:], entries[:SHOWN]
    mails = {mail["id"]: row(mail) for mail in view.outbox.read_all([name for name, _ in entries])}
    rows = [(at, mails[name]) for name, at in entries if name in mails]
    groups = [
        (days.get(name, Day(name, 0, 0)), list(found))
        for name, found in groupby(rows, lambda row: _name(datetime.fromtimestamp(row[0]).date(), now.date()))
    ]
    return view.render(
        "scheduled.html",
        "Scheduled",
        days=[day for day in days.values() if day.mails],
        groups=groups,
        late=_late(view.redis, now.timestamp()),
        is_first=not start,
        later=_later(entries, start, round(skip)) if more else "",
    )


def _number(given: str) -> float:
    return float(given) if re.fullmatch(r"\d{1,11}(\.\d{1,6})?", given, re.ASCII) else 0


def _days(redis: Redis, now: datetime) -> Iterator[Day]:
    """Yields each day, and what is before and behind them, with the number of its mails."""
    dates = [now.date() + timedelta(days) for days in range(DAYS)]
    bounds = [0.0, *(datetime.combine(one, time()).timestamp() for one in dates), float("inf")]
    with redis.pipeline(transaction=False) as pipe:
        for begins, ends in pairwise(bounds):
            pipe.zcount(keys.scheduled(EMAIL), begins, f"({ends}")
        counts: list[int] = pipe.execute()
    for begins, day, mails in zip(bounds, (dates[0] - timedelta(1), *dates), counts, strict=False):
        yield Day(_name(day, now.date()), begins, mails)


def _name(day: date, today: date) -> str:
    if day < today:
        return "Before today"
    return {0: "Today", 1: "Tomorrow"}.get((day - today).days, f"{day:%A}, {day.day} {day:%B}")


def _entries(redis: Redis, start: float, skip: int) -> list[tuple[str, float]]:
    """Returns the ids that come from `start` on, but for the first `skip` of them, and their times; one more than are
    shown."""
    rank = redis.zcount(keys.scheduled(EMAIL), 0, f"({start}") + skip
    found: Any = redis.zrange(keys.scheduled(EMAIL), rank, rank + SHOWN, withscores=True)
    return [(name.decode(errors="replace"), at) for name, at in found]


def _later(entries: list[tuple[str, float]], start: float, skip: int) -> str:
    """Returns where the next page is: many mails may have the time of the last one."""
    last = entries[-1][1]
    shown = sum(at == last for _, at in entries) + (skip if last == start else 0)
    return f"/mail/scheduled?from={last:.6f}&skip={shown}"


def _late(redis: Redis, now: float) -> tuple[float, int] | None:
    """Returns by how many seconds RQ's scheduler is late, and with how many mails, if it is."""
    first: Any = redis.zrange(keys.scheduled(EMAIL), 0, 0, withscores=True)
    if not first or first[0][1] > now - LATE:
        return None
    return now - first[0][1], redis.zcount(keys.scheduled(EMAIL), 0, now)
