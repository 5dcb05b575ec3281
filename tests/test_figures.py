"""The figures by minute and hour: what is counted into them and when, how long they are kept, and the events beside."""

from __future__ import annotations

import time
from collections import Counter
from datetime import datetime
from typing import Any

import pytest

from mail import figures
from mail.counters import DELIVERED
from mail.figures import Figures, Mark
from mail.outbox import Outbox
from mail.states import State
from mail.store import HOUR, MINUTE
from tests.mails import accept, claim
from tests.test_states import bring

HOW: list[Any] = ["canceled twice", "given up", "expired", State.SENT, State.FAILED, State.UNKNOWN]
BECAME = {"accepted": 6, "sent": 1, "failed": 3, "unknown": 1, "canceled": 1, "delayed": 2}


def test_what_becomes_of_mails_is_counted_by_minute_and_hour_and_dropped_in_time(outbox: Outbox, client: Any) -> None:
    for how in HOW:
        bring(outbox, client, how)
    for read, period in ((figures.minutes, MINUTE), (figures.hours, HOUR)):
        seen = read(client, 3)
        assert figures.together(one.counts for one in seen) == Counter(BECAME)
        assert [one.at - seen[0].at for one in seen] == [0, period.seconds, 2 * period.seconds]
        assert seen[-1].at <= time.time() < seen[-1].at + 2 * period.seconds
        for key in client.keys(f"{period.prefix}*"):
            assert period.kept - 60 <= client.ttl(key) <= period.kept
    assert figures.together(figures.days(client)) == Counter(BECAME)


def test_how_long_a_sent_mail_took_is_counted_once_in_the_totals_and_over_time(outbox: Outbox, client: Any) -> None:
    taken = claim(outbox, accept(outbox))
    DELIVERED.note(7, taken.counts)
    for _ in range(2):  # the reply was lost
        taken.settle(State.SENT)
    assert client.hmget("mail:totals", "delivered:10", "delivered:us") == [b"1", b"7000000"]
    counts = figures.together(one.counts for one in figures.hours(client, 2))
    assert {name: number for name, number in counts.items() if number} == {"accepted": 1, "sent": 1, "delivered:10": 1}


def test_what_is_no_hash_costs_no_mail_and_counts_as_nothing(outbox: Outbox, client: Any) -> None:
    now = int(client.time()[0])
    for period in (MINUTE, HOUR):
        for at in (0, 1):
            client.set(f"{period.prefix}{now // period.seconds + at}", "x")
    client.hset(f"{HOUR.prefix}{now // 3600 - 1}", mapping={"sent": "x", b"\xff": 3, "failed": 2})
    bring(outbox, client, State.SENT)
    figures.sample(client, 1, 1)
    assert outbox.last_sent()
    assert figures.together(one.counts for one in figures.hours(client, 3))["failed"] == 2


def test_of_the_queue_the_highest_of_a_period_is_kept(client: Any) -> None:
    for depth, oldest in ((3, 1.2), (9, 0.4), (2, 7.6)):
        figures.sample(client, depth, oldest)
    for seen in (figures.minutes(client, 2), figures.hours(client, 2)):
        assert figures.together(one.counts for one in seen) == Counter(depth=9, oldest=8)
    assert figures.together([Counter(depth=9, sent=1), Counter(depth=4, sent=2)]) == Counter(depth=9, sent=3)


@pytest.mark.parametrize(
    ("counted", "share", "seconds"),
    [
        ({}, 0.5, None),
        ({"delivered:1": 4}, 0.5, 0.75),
        ({"delivered:1": 4}, 1, 1),
        ({"delivered:0.05": 1, "delivered:10": 1}, 0.5, 0.05),
        ({"delivered:0.05": 50, "delivered:60": 50}, 0.95, 57),
        ({"delivered:inf": 1}, 0.5, 86400),
    ],
)
def test_a_percentile_lies_where_its_mail_would_within_the_bounds(
    counted: dict[str, int], share: float, seconds: float | None
) -> None:
    assert Figures(0, Counter(counted)).percentile(share) == seconds


@pytest.mark.parametrize("zone", ["UTC", "Europe/Berlin", "Asia/Kolkata", "America/Los_Angeles"])
def test_days_begin_at_the_machines_midnight(client: Any, monkeypatch: pytest.MonkeyPatch, zone: str) -> None:
    monkeypatch.setenv("TZ", zone)
    time.tzset()
    try:
        hour = datetime.fromtimestamp(time.time() // 3600 * 3600)  # half an hour off, a day begins up to that late
        midnight = hour.replace(hour=0, minute=0).timestamp()
        first = -int(-midnight // 3600)  # the first whole hour of today
        for at, number in ((first, 1), (first - 1, 10), (first - 23, 100), (first - 27, 1000)):
            client.hset(f"{HOUR.prefix}{at}", "sent", number)
        today, yesterday = figures.days(client)
        assert (today["sent"], yesterday["sent"]) == (1, 110)
    finally:
        monkeypatch.undo()
        time.tzset()


def test_events_are_kept_in_order_and_only_the_last_of_them(client: Any) -> None:
    now = time.time()
    figures.mark(client, "release", "1.2.3", at=now - 75 * 3600)
    figures.mark(client, "redis_restarted", "", at=now - 60)
    figures.mark(client, "breaker_opened", "535 at auth")
    client.zadd("mail:marks", {b"\xff": now})
    first, second = figures.marks(client, now - 3600)
    assert first == Mark(now - 60, "redis_restarted", "")
    assert second == Mark(pytest.approx(now, abs=5), "breaker_opened", "535 at auth")  # type: ignore[arg-type]
    assert client.zcard("mail:marks") == 3
    for number in range(figures.MARKS_KEPT):
        figures.mark(client, "clock", str(number), at=now)
    assert client.zcard("mail:marks") == figures.MARKS_KEPT
