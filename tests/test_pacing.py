"""SMTP_RATE and the breaker, against a real Redis: its clock is the one that counts."""

from __future__ import annotations

import math
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import redis

from process.values import Rate
from smtp import pacing
from smtp.pacing import Pacing, in_trouble, standing
from smtp.policy import Phase
from smtp.verdict import Reply


def opened(client: redis.Redis) -> Pacing:
    """A relay that was in trouble often enough."""
    relay = Pacing(client, ())
    for _ in range(pacing.TROUBLES):
        relay.trouble()
    return relay


def gone(client: redis.Redis) -> list[int]:
    moments: list[bytes] = client.lrange("relay:gone", 0, -1)  # type: ignore[assignment]
    return sorted(int(moment) for moment in moments)


def test_without_a_rate_and_without_trouble_everybody_goes(client: redis.Redis) -> None:
    free = Pacing(client, ())
    assert [free.admit() for _ in range(100)] == [None] * 100
    assert client.keys("relay:*") == []


@pytest.mark.parametrize("in_a_hurry", [0, 3])
def test_a_window_is_never_exceeded_however_many_ask_at_once(client: redis.Redis, in_a_hurry: int) -> None:
    shared = Pacing(client, (Rate(10, 1), Rate(1000, 3600)))
    deadline = time.monotonic() + 2.5

    def ask(number: int) -> int:
        """Returns how many went that must not wait."""
        went = 0
        while time.monotonic() < deadline:
            went += shared.admit(went > 0, priority="high" if number < in_a_hurry else "bulk") is None
            time.sleep(0.005)
        return went if number < in_a_hurry else 0

    with ThreadPoolExecutor(8) as workers:
        hurried = sum(workers.map(ask, range(8)))
    moments = sorted(gone(client))
    assert len(moments) >= 20
    assert all(eleventh - first >= 1000 for first, eleventh in zip(moments, moments[10:], strict=False))
    assert hurried >= 6 * bool(in_a_hurry)  # each has a place in every window but the first


def test_bulk_mail_lines_up_behind_bulk_mail_alone(client: redis.Redis) -> None:
    shared = Pacing(client, (Rate(2, 1),))
    assert [shared.admit(priority="bulk") for _ in range(2)] == [None, None]
    assert shared.room_for_bulk() == math.inf
    assert shared.admit(priority="bulk") is not None
    assert shared.room_for_bulk() == pytest.approx(18, abs=1)
    waits = [shared.admit(priority="bulk") for _ in range(20)]
    assert waits[-1] is not None
    assert waits[-1].seconds > 8
    assert 0 <= shared.room_for_bulk() < 4
    assert Pacing(client, ()).room_for_bulk() == math.inf
    other = shared.admit()
    assert other is not None
    assert other.seconds < 2
    for _ in range(20):
        shared.admit()
    assert shared.admit(priority="high") is None  # whatever is lined up


def test_a_mail_in_a_hurry_waits_in_its_worker_for_a_few_seconds_at_most(client: redis.Redis) -> None:
    shared = Pacing(client, (Rate(1, 1),))
    began = time.monotonic()
    assert [shared.admit(priority="high") for _ in range(3)] == [None] * 3
    assert time.monotonic() - began > 1.9
    assert shared.admit(reserved=True) is None  # one that returns waits for a second at most
    slow = Pacing(client, (Rate(1, 60),))
    wait = slow.admit(priority="high")
    assert wait is not None
    assert (wait.reserved, 50 < wait.seconds <= 58) == (True, True)  # to come back before bulk mail does


def test_bulk_mail_that_comes_back_in_vain_lines_up_by_itself_too(client: redis.Redis) -> None:
    shared = Pacing(client, (Rate(2, 1),))
    for _ in range(30):
        shared.admit(reserved=True, priority="bulk")
    assert shared.room_for_bulk() < 4
    client.lpush("relay:gone", *[int(time.time() * 1000) + 4000] * 2)  # so that all must wait
    waits = [shared.admit(reserved=True, priority=one) for one in ("normal", "high")]
    assert all(wait and wait.seconds < 6 for wait in waits)


@pytest.mark.parametrize(
    ("rate", "left"), [(Rate(30, 60), 1), (Rate(40, 86400), 2), (Rate(1, 60), 0), (Rate(20, 1), 0)]
)
def test_of_a_long_period_bulk_mail_leaves_some_places_to_others(client: redis.Redis, rate: Rate, left: int) -> None:
    shared, went = Pacing(client, (rate, Rate(1000, 3600))), 0
    while shared.admit(priority="bulk") is None:
        went += 1
    assert went == rate.most - left
    while shared.admit() is None:
        went += 1
    assert went == rate.most


def test_several_rates_hold_at_once(client: redis.Redis) -> None:
    strict = Pacing(client, (Rate(5, 1), Rate(7, 3600)))
    assert [strict.admit() is None for _ in range(6)] == [True] * 5 + [False]
    time.sleep(1.05)
    assert [strict.admit() is None for _ in range(4)] == [True, True, False, False]
    wait = strict.admit()
    assert wait
    assert 3590 < wait.seconds <= 3600


def test_mails_that_wait_reserve_different_moments(client: redis.Redis) -> None:
    shared = Pacing(client, (Rate(2, 1),))
    waits = [shared.admit() for _ in range(12)]
    assert waits[:2] == [None, None]
    seconds = [wait.seconds for wait in waits if wait]
    assert [round(one) for one in seconds] == [1, 1, 2, 2, 3, 3, 4, 4, 5, 5]
    assert all(wait.reason == "SMTP_RATE is reached" for wait in waits if wait)


def test_a_new_mail_does_not_overtake_those_with_a_reservation(client: redis.Redis) -> None:
    shared = Pacing(client, (Rate(2, 1),))
    for _ in range(6):
        shared.admit()  # two go, four reserve 1, 1, 2 and 2 seconds
    time.sleep(1.05)
    new = shared.admit()
    assert new
    assert new.seconds > 1
    assert new.reserved
    assert [shared.admit(reserved=True) for _ in range(2)] == [None, None]


def test_a_returning_mail_that_finds_it_full_gets_a_moment_soon_and_not_the_end_of_the_line(
    client: redis.Redis,
) -> None:
    shared = Pacing(client, (Rate(2, 1),))
    for _ in range(40):
        shared.admit()  # the line is 19 seconds long
    waits = [shared.admit(reserved=True, priority="bulk") for _ in range(4)]
    assert [round(wait.seconds) for wait in waits if wait] == [1, 1, 2, 2]


def test_a_late_worker_does_not_send_all_that_has_piled_up_at_once(client: redis.Redis) -> None:
    shared = Pacing(client, (Rate(3, 1),))
    for _ in range(9):
        shared.admit()  # six of them have a reservation
    time.sleep(2.2)  # all those moments have passed
    assert [shared.admit(True, priority="bulk") is None for _ in range(6)] == [True] * 3 + [False] * 3


def test_a_worker_that_starts_with_another_rate_forgets_the_moments_that_were_given_at_the_old_one(
    client: redis.Redis,
) -> None:
    slow = Pacing(client, (Rate(20, 3600),))
    slow.start()
    for priority in ("normal", "bulk"):
        for _ in range(60):
            slow.admit(priority=priority)
    Pacing(client, (Rate(20, 3600),)).start()  # another worker with the same one
    assert client.llen("relay:told") == 20
    fast = Pacing(client, (Rate(40, 1),))
    fast.start()
    assert (fast.admit(), fast.admit(priority="bulk"), fast.room_for_bulk()) == (None, None, math.inf)
    assert len(gone(client)) > 20  # what has gone out counts as before


def test_the_breaker_opens_after_some_troubles_in_a_row(client: redis.Redis) -> None:
    relay = Pacing(client, ())
    for _ in range(pacing.TROUBLES - 1):
        relay.trouble()
    assert relay.admit() is None
    assert relay.trouble()  # this one
    assert not relay.trouble()
    assert in_trouble(client)
    wait = relay.admit()
    assert wait
    assert 29 < wait.seconds <= 30
    assert wait.reason == "the relay is in trouble"
    assert not wait.reserved


def test_a_relay_that_asks_for_a_pause_gets_it_at_once(client: redis.Redis) -> None:
    relay = Pacing(client, ())
    assert relay.trouble(pause=300)
    wait = relay.admit()
    assert wait
    assert 299 < wait.seconds <= 300
    client.hset("relay:breaker", "open_until", 1)  # it is over
    assert relay.admit() is None
    assert not relay.trouble()  # that was a probe, so one trouble is enough
    assert relay.admit()


def test_a_worker_that_starts_lets_a_mail_probe_at_once(client: redis.Redis) -> None:
    """Whoever has corrected the settings and restarted would wait for half a minute, and be told nothing."""
    started = Pacing(client, ())
    started.start()
    assert started.admit() is None  # there is no breaker
    assert started.trouble(pause=300)
    Pacing(client, ()).start()
    assert in_trouble(client)
    assert started.admit() is None
    assert started.admit()  # while that one probes


def test_a_worker_that_met_with_trouble_knows_how_long_to_take_no_mail(
    client: redis.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pacing, "PAUSE", 0.3)
    other = Pacing(client, ())
    assert other.closed_for() == 0
    unlucky = opened(client)
    assert 0 < unlucky.closed_for() <= 0.3
    time.sleep(0.35)
    assert unlucky.closed_for() == 0  # it may probe
    assert other.admit() is None  # and the other does
    assert 59 < unlucky.closed_for() <= 60  # so it waits for that one
    assert other.well()
    assert unlucky.closed_for() == 0
    assert unlucky.admit() is None
    assert not unlucky.well()  # nothing was wrong any more


def test_a_success_in_between_starts_the_count_anew(client: redis.Redis) -> None:
    relay = Pacing(client, ())
    for _ in range(10):
        relay.trouble()
        relay.well()
    assert relay.admit() is None
    assert not in_trouble(client)


@pytest.mark.parametrize("then", ["succeeds", "fails", "dies"])
def test_one_mail_probes_and_what_becomes_of_it_decides_for_the_others(
    client: redis.Redis, monkeypatch: pytest.MonkeyPatch, then: str
) -> None:
    monkeypatch.setattr(pacing, "PAUSE", 0.3)
    monkeypatch.setattr(pacing, "PROBE", 0.3)
    relay = opened(client)
    assert relay.admit()
    time.sleep(0.35)
    assert [relay.admit() is None for _ in range(5)] == [True, False, False, False, False]
    if then == "succeeds":
        relay.well()
        assert [relay.admit() for _ in range(3)] == [None] * 3
        return
    if then == "fails":
        relay.trouble()
    assert relay.admit()
    time.sleep(0.35)
    assert relay.admit() is None  # and the next may probe again, also for a worker that died


def test_each_relay_has_its_own_breaker_and_rate(client: redis.Redis) -> None:
    one, other = Pacing(client, (Rate(1, 3600),), "relay"), Pacing(client, (Rate(1, 3600),), "other")
    for _ in range(pacing.TROUBLES):
        one.trouble()
    assert (in_trouble(client), in_trouble(client, "other")) == (True, False)
    assert other.admit() is None
    assert other.admit() is not None


def test_no_pause_keeps_all_mail_for_longer_than_a_quarter_of_an_hour(client: redis.Redis) -> None:
    """It may be meant for one sender: `blocked for 12 hours`."""
    relay = Pacing(client, ())
    relay.trouble(pause=12 * 3600)
    wait = relay.admit()
    assert wait
    assert 800 < wait.seconds <= 900


def test_a_pause_that_the_relay_asked_for_is_not_made_shorter_by_more_trouble(client: redis.Redis) -> None:
    relay = Pacing(client, ())
    relay.trouble(pause=300)
    relay.trouble()
    wait = relay.admit()
    assert wait
    assert wait.seconds > 290


def test_as_long_as_there_is_trouble_it_is_known_since_when_and_what_the_last_one_was(client: redis.Redis) -> None:
    relay, began = Pacing(client, ()), time.time()
    assert standing(client) is None
    relay.trouble(reply=Reply(Phase.AUTH, 535, "5.7.8 no"), relay="relay.example:587")
    first: Any = standing(client)
    assert first == (0, pytest.approx(began, abs=1), (Phase.AUTH, 535, "5.7.8 no", False), "relay.example:587")
    relay.trouble(pause=60, reply=Reply(Phase.CONNECT, None, "<ada@example.com> " + 999 * "x"))
    last: Any = standing(client)
    assert last == (pytest.approx(began + 60, abs=1), first.since, (Phase.CONNECT, None, " " + 299 * "x", False), "")
    relay.well()
    assert standing(client) is None


@pytest.mark.parametrize(
    "fields", [{"open_until": 60_000}, {"open_until": 60_000, "since": "x", "phase": "moon", "code": "", "text": ""}]
)
def test_what_an_earlier_or_a_later_version_has_written_is_read_as_far_as_it_can_be(
    client: redis.Redis, fields: Any
) -> None:
    client.hset("relay:breaker", mapping=fields)
    assert standing(client) == (60, 0, None, "")


def test_how_much_of_each_rate_is_used(client: redis.Redis) -> None:
    rates = (Rate(3, 1), Rate(100, 60), Rate(2000, 86400))
    assert pacing.used(client, rates) == [(rate, 0) for rate in rates]
    now = int(time.time() * 1000)
    client.rpush("relay:gone", *(now - ago for ago in (-100, 100, 5_000, 50_000, 70_000, 86_000_000, 87_000_000)))
    assert [mails for _, mails in pacing.used(client, rates)] == [2, 4, 6]
    assert pacing.used(client, ()) == []
