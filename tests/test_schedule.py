"""`scheduled_at`, and a mail that is moved or canceled: not sent before its time, nor after it was called back."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timedelta, timezone
from typing import Any

import pytest
import redis
from rq import Retry

from mail import delivery
from mail.claim import Busy, Claim, Early
from mail.moments import time_or_delay, time_with_zone
from mail.outbox import Outbox
from mail.states import State
from queues.jobs import Jobs, NotFound, NotPossible
from settings import load
from tests.http_api import MAIL, UNKNOWN_ID, fields, held_to_the_shape
from tests.relay import Relay
from tests.servers import Api, House, eventually

NOON = datetime(2026, 11, 21, 12, 30, tzinfo=timezone.utc)
READ: dict[str, datetime | timedelta] = {
    "2026-11-21T12:30:00Z": NOON,
    "2026-11-21t12:30:00z": NOON,
    "2026-11-21 14:30:00+02:00": NOON,
    "2026-11-21T07:00:00-0530": NOON,
    "2026-11-21T12:30:00.5Z": NOON + timedelta(milliseconds=500),
    "2026-11-21T12:30:00.123456789Z": NOON + timedelta(microseconds=123456),
    "in 1 min": timedelta(minutes=1),
    "in 5 minutes": timedelta(minutes=5),
    "In 1 Hour": timedelta(hours=1),
    "in 30 days": timedelta(days=30),
}
# fmt: off
NOT_READ: list[object] = [
    "", " ", "now", "tomorrow at 9am", "in an hour", "in 5", "in 5 min ", "in -5 minutes", "in 1.5 hours", "in 5 weeks",
    "in 5 seconds", "5 minutes", "in ٥ minutes", "in  5 minutes", "2026-11-21", "2026-11-21T12:30Z", "1795264200",
    "2026-11-21T12:30:00", "2026-02-31T12:30:00Z", "2026-11-21T25:00:00Z", "2026-11-21T12:30:00+0200Z", 1795264200, 1.5,
    "Sat, 21 Nov 2026 12:30:00 GMT", "2026-11-21T12:30:00 Europe/Berlin", True, ["in 5 minutes"], {"in": 5},
]
# fmt: on


def later(**how_much: float) -> str:
    return (datetime.now(timezone.utc) + timedelta(**how_much)).isoformat()


@pytest.mark.parametrize("text", READ)
def test_a_time_is_read_as_clients_write_it(text: str) -> None:
    assert time_or_delay(text) == READ[text]


@pytest.mark.parametrize("given", NOT_READ, ids=str)
def test_what_is_no_time_is_refused_and_nothing_is_stored(api: Api, client: redis.Redis, given: object) -> None:
    answer = api.post("/emails", MAIL | {"scheduled_at": given})
    held_to_the_shape(answer, 422)
    assert fields(answer) == ["scheduled_at"]
    assert client.dbsize() == 0
    with pytest.raises(ValueError, match="must be a time with its zone"):
        time_with_zone(given)


WHEN = {  # what is wrong -> the field, and what is sent
    "it has passed": ("scheduled_at", lambda: {"scheduled_at": later(seconds=-1)}),
    "it is now": ("scheduled_at", lambda: {"scheduled_at": "in 0 minutes"}),
    "it is too far away": ("scheduled_at", lambda: {"scheduled_at": "in 31 days"}),
    "beyond all years": ("scheduled_at", lambda: {"scheduled_at": "in 999999 days"}),
    "it expires before": ("expires_at", lambda: {"scheduled_at": "in 2 hours", "expires_at": later(hours=1)}),
}


@pytest.mark.parametrize(("field", "made"), WHEN.values(), ids=WHEN)
def test_a_time_that_makes_no_sense_is_refused(
    api: Api, client: redis.Redis, field: str, made: Callable[[], dict[str, str]]
) -> None:
    answer = api.post("/emails", MAIL | made())
    assert (answer.status, fields(answer)) == (422, [field])
    assert client.dbsize() == 0


def test_a_scheduled_mail_waits_where_rq_shows_it(api: Api, client: Any) -> None:
    mails = [MAIL | {"scheduled_at": "in 2 hours"}, MAIL, MAIL | {"scheduled_at": later(days=30)}]
    first, now, last = (one["id"] for one in api.post("/emails/batch", mails).body["data"])
    due = time.time() + 2 * 3600
    scores = dict(client.zrange("rq:scheduled:email", 0, -1, withscores=True))
    assert set(scores) == {first.encode(), last.encode()}
    assert scores[first.encode()] == pytest.approx(due, abs=60)
    assert client.lrange("rq:queue:email", 0, -1) == [now.encode()]
    seen = api.email(first)
    assert (seen["status"], seen["last_event"]) == ("scheduled", "scheduled")
    assert datetime.fromisoformat(seen["scheduled_at"]).timestamp() == pytest.approx(due, abs=60)
    assert api.email(now)["scheduled_at"] is None
    assert client.zscore("mail:open", first) > due


def test_the_same_request_is_the_same_mail_also_after_its_time(api: Api, outbox: Outbox) -> None:
    body = MAIL | {"scheduled_at": later(seconds=1)}
    first = api.post("/emails", body, Idempotency_Key="k").body
    assert first["status"] == "scheduled"
    time.sleep(1.1)
    assert api.post("/emails", body, Idempotency_Key="k").body == first
    assert api.post("/emails", body, Idempotency_Key="other").status == 422


def test_nobody_takes_a_mail_before_its_time_and_it_waits_since_then(outbox: Outbox, api: Api, client: Any) -> None:
    mail_id = api.submit(MAIL | {"scheduled_at": "in 2 hours"})
    with pytest.raises(Early) as early:
        outbox.claim(mail_id, queued_at=time.time())
    assert early.value.seconds == pytest.approx(7200, abs=60)
    assert isinstance(early.value, Busy)
    again = delivery.Delivery(outbox).deliver(mail_id)  # what its job does, and comes again then
    assert isinstance(again, Retry)
    assert again.intervals[0] == pytest.approx(7200, abs=60)
    outbox.reschedule(mail_id, time.time() - 1)
    taken = outbox.claim(mail_id, queued_at=time.time())
    assert isinstance(taken, Claim)
    assert taken.age == pytest.approx(1, abs=1)


def test_a_mail_is_moved_and_says_so(api: Api, client: Any) -> None:
    mail_id = api.submit(MAIL | {"scheduled_at": "in 2 hours"})
    moved = api.call("PATCH", f"/emails/{mail_id}", {"id": mail_id, "scheduled_at": "in 3 days"})
    assert (moved.status, moved.body) == (200, {"object": "email", "id": mail_id})
    due = time.time() + 3 * 86400
    assert client.zscore("rq:scheduled:email", mail_id) == pytest.approx(due, abs=60)
    assert datetime.fromisoformat(api.email(mail_id)["scheduled_at"]).timestamp() == pytest.approx(due, abs=60)
    assert client.zscore("mail:open", mail_id) > due


def test_a_mail_whose_job_was_queued_just_before_it_is_moved_is_not_scheduled_a_second_time(
    api: Api, outbox: Outbox, client: Any
) -> None:
    mail_id = api.submit(MAIL | {"scheduled_at": "in 2 hours"})
    client.zrem("rq:scheduled:email", mail_id)  # as RQ's scheduler does
    outbox.reschedule(mail_id, time.time() + 60)
    assert client.zcard("rq:scheduled:email") == 0
    with pytest.raises(Early):
        outbox.claim(mail_id, queued_at=time.time())


def test_what_cannot_be_moved_is_not(api: Api, outbox: Outbox, client: Any) -> None:
    mail_id, other = api.submit(MAIL | {"scheduled_at": "in 2 hours"}), api.submit(MAIL)
    short = api.submit(MAIL | {"scheduled_at": "in 1 hour", "expires_at": later(hours=2)})
    before = client.hgetall(f"mail:{mail_id}")
    for body in ({}, {"scheduled_at": None}, {"scheduled_at": "soon"}, {"scheduled_at": "in 1 hour", "subject": "x"}):
        answer = api.call("PATCH", f"/emails/{mail_id}", body)
        held_to_the_shape(answer, 422)
    for unmovable in (other, short):
        held_to_the_shape(api.call("PATCH", f"/emails/{unmovable}", {"scheduled_at": "in 3 hours"}), 409)
    held_to_the_shape(api.call("PATCH", f"/emails/{UNKNOWN_ID}", {"scheduled_at": "in 3 hours"}), 404)
    jobless = api.submit(MAIL | {"scheduled_at": "in 2 hours"})
    client.delete(f"rq:job:{jobless}")  # by somebody at the dashboard
    outbox.cancel(mail_id)
    for unmovable in (mail_id, jobless):
        with pytest.raises(NotPossible):
            outbox.reschedule(unmovable, time.time() + 60)
    with pytest.raises(NotFound):
        outbox.reschedule(UNKNOWN_ID, time.time() + 60)
    assert client.hget(f"mail:{mail_id}", "scheduled_at") == before[b"scheduled_at"]


@pytest.mark.parametrize("raw", [None, b"", b"{}"])
def test_a_mail_is_canceled_with_any_body_or_none(api: Api, client: Any, raw: bytes | None) -> None:
    mail_id = api.submit(MAIL | {"scheduled_at": "in 2 hours"})
    answer = api.call("POST", f"/emails/{mail_id}/cancel", raw=raw)
    assert (answer.status, answer.body) == (200, {"object": "email", "id": mail_id})
    assert api.email(mail_id)["status"] == "canceled"
    assert client.zcard("rq:scheduled:email") == 0


def test_a_key_cancels_and_moves_its_own_mail_only(api: Api) -> None:
    shop = Api(api.port, "send-key")
    ours, theirs = (one.submit(MAIL | {"scheduled_at": "in 2 hours"}) for one in (shop, api))
    for mail_id, status in ((theirs, 404), (ours, 200)):
        assert shop.call("PATCH", f"/emails/{mail_id}", {"scheduled_at": "in 3 hours"}).status == status
        assert shop.call("POST", f"/emails/{mail_id}/cancel").status == status


def raced(sending: House, relay: Relay, change: Callable[[Api, str], int], **more: object) -> tuple[set[int], set[int]]:
    """Submits a thousand mails, changes each at about the moment at which it is sent, and returns the numbers of those
    that were changed, and of those that the relay got."""
    api, number = sending.api(), range(1000)
    sending.worker()
    ids: list[str] = []
    for start in number[::100]:
        mails = [MAIL | {"to": f"n{one}@example.com"} | more for one in number[start : start + 100]]
        ids += [one["id"] for one in api.post("/emails/batch", mails).body["data"]]
    if "scheduled_at" in more:
        with redis.Redis.from_url(sending.environment["REDIS_URL"]) as client:
            outbox, due = Outbox(Jobs(client), load(from_file={})), time.time() + 2
            for mail_id in ids:
                outbox.reschedule(mail_id, due)
    eventually(lambda: relay.accepted)  # then all are on their way
    order = random.sample(number, len(number))
    with ThreadPoolExecutor(8) as callers:
        statuses = dict(zip(order, callers.map(lambda one: change(api, ids[one]), order), strict=True))
    assert set(statuses.values()) <= {200, 409}, [line for line in sending.log("api").splitlines() if "crash" in line]
    changed = {one for one, status in statuses.items() if status == 200}
    eventually(lambda: len(relay.accepted) >= len(number) - len(changed))
    time.sleep(1)
    got = [int(one.recipients[0].partition("@")[0][1:]) for one in relay.accepted]
    assert len(got) == len(set(got))
    for one in number:
        assert (api.email(ids[one])["status"] == State.SENT) == (one in got)
    return changed, set(got)


def test_of_a_thousand_mails_canceled_while_they_are_sent_none_is_both(sending: House, relay: Relay) -> None:
    changed, got = raced(sending, relay, lambda api, mail_id: api.call("POST", f"/emails/{mail_id}/cancel").status)
    assert not changed & got
    assert changed | got == set(range(1000))
    assert min(len(changed), len(got)) > 50  # else there was no race


def test_of_a_thousand_mails_moved_when_they_are_due_none_is_sent_before_its_new_time(
    sending: House, relay: Relay
) -> None:
    def move(api: Api, mail_id: str) -> int:
        return api.call("PATCH", f"/emails/{mail_id}", {"scheduled_at": "in 2 hours"}).status

    changed, got = raced(sending, relay, move, scheduled_at="in 2 hours")
    assert not changed & got
    assert changed | got == set(range(1000))
    assert min(len(changed), len(got)) > 50
    log = sending.log("worker-email")  # of the worker that took one too early: it waits, and is no failed attempt
    assert "Traceback" not in log, log[-2000:]
