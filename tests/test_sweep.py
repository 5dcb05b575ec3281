"""Mails that got stuck, and what the sweep makes of them: against a real Redis, with the traces that faults leave."""

from __future__ import annotations

import math
import time
from datetime import datetime, timedelta, timezone
from typing import Any

import pytest
from rq.job import Job
from rq.serializers import JSONSerializer

from mail import sweep as sweeping
from mail.claim import iso
from mail.outbox import Outbox
from mail.states import TROUBLE_TOO_LONG, State, Status
from mail.sweep import Finding, sweep, swept
from queues.bulk import Bulk
from queues.jobs import NotPossible
from tests.mails import accept, claim, draft

QUEUE = "rq:queue:email"


def swept_now(outbox: Outbox) -> list[Finding]:
    """As if every mail were overdue."""
    redis: Any = outbox.jobs.redis
    for mail_id in redis.zrange("mail:open", 0, -1):
        redis.zadd("mail:open", {mail_id: 1})
    return list(sweep(outbox))


def job(outbox: Outbox, mail_id: str) -> Job:
    return Job.fetch(mail_id, outbox.jobs.redis, serializer=JSONSerializer)


def test_a_mail_that_waits_where_its_job_says_is_left_alone(outbox: Outbox, client: Any) -> None:
    queued, scheduled, started, popped = (accept(outbox) for _ in range(4))
    for mail_id in (scheduled, started, popped):
        client.lrem(QUEUE, 1, mail_id)
    client.hset(f"rq:job:{scheduled}", "status", "scheduled")
    client.zadd("rq:scheduled:email", {scheduled: time.time() + 60})
    client.hset(f"rq:job:{started}", "status", "started")
    client.zadd("rq:wip:email", {f"{started}:an-execution": time.time() + 45})
    client.rpush(f"{QUEUE}:intermediate", popped)
    assert swept_now(outbox) == []
    assert client.lrange(QUEUE, 0, -1) == [queued.encode()]
    seen = swept(client)
    assert (seen["mails_repaired"], seen["mails_given_up"]) == (0, 0)
    assert all(score > time.time() + 200 for _, score in client.zrange("mail:open", 0, -1, withscores=True))


def test_only_what_is_overdue_is_looked_at(outbox: Outbox, client: Any) -> None:
    client.lrem(QUEUE, 1, accept(outbox))
    assert list(sweep(outbox)) == []
    assert len(swept_now(outbox)) == 1


@pytest.mark.parametrize("status", ["queued", "scheduled", "started", "finished"])
@pytest.mark.parametrize("others", [0, 3])
def test_a_mail_whose_job_is_in_no_list_is_queued_again(outbox: Outbox, client: Any, status: str, others: int) -> None:
    stuck = accept(outbox)
    client.lrem(QUEUE, 1, stuck)
    waiting = [accept(outbox) for _ in range(others)]
    client.hset(f"rq:job:{stuck}", "status", status)
    client.expire(f"rq:job:{stuck}", 100)
    assert swept_now(outbox) == [Finding(stuck, "repaired", f"its job was {status} and in no list")]
    assert client.lrange(QUEUE, 0, -1) == [one.encode() for one in [*waiting, stuck]]
    assert job(outbox, stuck).get_status().value == "queued"
    assert client.ttl(f"rq:job:{stuck}") == -1
    assert swept_now(outbox) == []
    assert swept(client)["mails_repaired"] == 1


def test_a_mail_that_was_made_sooner_while_rq_put_it_back_for_later_goes_out_then(outbox: Outbox, client: Any) -> None:
    soon, later = datetime.now(timezone.utc) + timedelta(minutes=1), time.time() + 7200
    mail_id = outbox.accept([draft()._replace(scheduled_at=soon)]).id
    client.zadd("rq:scheduled:email", {mail_id: later})
    assert swept_now(outbox) == []
    assert client.zscore("rq:scheduled:email", mail_id) == math.ceil(soon.timestamp())
    put_off = outbox.accept([draft()._replace(scheduled_at=soon)]).id
    outbox.reschedule(put_off, time.time() - 1)
    claim(outbox, put_off).settle(State.DELAYED, next_in=7200)
    client.hset(f"rq:job:{put_off}", "status", "scheduled")
    client.zadd("rq:scheduled:email", {put_off: later})
    assert swept_now(outbox) == []
    assert client.zscore("rq:scheduled:email", put_off) == pytest.approx(later)


def test_bulk_mail_waits_where_it_was_put_until_it_is_in_no_list(outbox: Outbox, client: Any) -> None:
    lost, waiting, moved = (outbox.accept([draft()._replace(priority="bulk")]).id for _ in range(3))
    assert client.lrange("rq:queue:bulk", 0, -1) == [one.encode() for one in (lost, waiting, moved)]
    assert swept_now(outbox) == []
    queued_at = client.hget(f"rq:job:{moved}", "enqueued_at")
    client.hset(f"rq:job:{moved}", "enqueued_at", "2026-11-21T12:30:00.000000Z")  # by a clock that was set back
    Bulk(client, most=5).feed(at_most=1)
    Bulk(client, most=1).feed()
    assert swept_now(outbox) == []
    assert (client.llen(QUEUE), client.llen("rq:queue:bulk")) == (1, 2)
    client.hset(f"rq:job:{moved}", "enqueued_at", queued_at)
    client.lpop(QUEUE)
    client.lmove("rq:queue:bulk", QUEUE, "RIGHT", "LEFT")
    assert swept_now(outbox) == [Finding(lost, "repaired", "its job was queued and in no list")]
    Bulk(client, most=5).feed()
    assert client.lrange(QUEUE, 0, -1) == [one.encode() for one in (moved, lost, waiting)]
    for one in (lost, waiting):
        outbox.cancel(one)
    assert client.lrange(QUEUE, 0, -1) == [moved.encode()]


def test_a_long_queue_is_not_searched_whatever_is_at_its_head(outbox: Outbox, client: Any) -> None:
    normal, bulk, high = (draft()._replace(priority=one) for one in ("normal", "bulk", "high"))
    for _ in range(3):
        first = outbox.accept([bulk, normal]).ids[0]
        outbox.accept([high])
    client.delete(f"rq:job:{client.lindex('rq:queue:bulk', 0).decode()}")
    outbox.cancel(first)
    assert client.llen("rq:queue:bulk") == 2
    client.config_resetstat()
    swept_now(outbox)
    assert "cmdstat_lpos" not in client.info("commandstats")


def test_a_mail_that_an_attempt_holds_is_left_alone(outbox: Outbox, client: Any) -> None:
    mail_id = accept(outbox)
    outbox.claim(mail_id, time.time())
    client.delete(QUEUE, f"rq:job:{mail_id}")
    assert swept_now(outbox) == []


@pytest.mark.parametrize(
    ("status", "reason"),
    [
        ("failed", "its worker died in every attempt"),
        ("stopped", "its job was stopped"),
        ("canceled", "its job was canceled"),
        ("", "its job was deleted"),
    ],
)
def test_a_mail_whose_job_is_over_fails_with_the_reason_and_is_not_kept_for_ever(
    outbox: Outbox, client: Any, status: str, reason: str
) -> None:
    mail_id = accept(outbox)
    client.delete(QUEUE)
    if status:
        client.hset(f"rq:job:{mail_id}", "status", status)
    else:
        client.delete(f"rq:job:{mail_id}")
    assert outbox.read(mail_id)["status"] == "failed"  # seen at once, written by the sweep
    assert swept_now(outbox) == [Finding(mail_id, "given_up", reason)]
    assert client.hmget(f"mail:{mail_id}", "state", "reason") == [b"failed", reason.encode()]
    assert client.ttl(f"mail:{mail_id}") > 0
    assert swept(client)["mails_given_up"] == 1


def test_a_mail_that_has_expired_is_looked_at_soon_and_fails_where_it_waits(outbox: Outbox, client: Any) -> None:
    mail_id, later = accept(outbox, -1), accept(outbox, 3600)
    assert outbox.read(mail_id)["status"] == "failed"  # a preview
    assert list(sweep(outbox)) == [Finding(mail_id, "failed", "expired")]
    assert client.hmget(f"mail:{mail_id}", "state", "reason") == [b"failed", b"expired"]
    assert client.zrange("mail:open", 0, -1) == [later.encode()]
    assert client.hgetall("mail:totals") == {b"accepted": b"2", b"expired": b"1"}
    assert swept(client)["mails_given_up"] == 0  # it was not stuck


def test_a_mail_is_looked_at_again_when_it_expires(outbox: Outbox, client: Any) -> None:
    for moment in (100, 1000):
        mail_id = accept(outbox, moment)
        assert 80 < client.zscore("mail:open", mail_id) - time.time() <= min(moment, 90)
        assert swept_now(outbox) == []
        assert abs(client.zscore("mail:open", mail_id) - time.time() - min(moment, 300)) < 10
        taken = claim(outbox, mail_id)
        taken.settle(State.DELAYED, next_in=500)
        assert abs(client.zscore("mail:open", mail_id) - time.time() - min(moment, 590)) < 10
        client.delete("mail:open")


def test_a_mail_that_expires_during_an_attempt_is_left_to_the_attempt(outbox: Outbox, client: Any) -> None:
    mail_id = accept(outbox, -1)
    taken = claim(outbox, mail_id)
    assert swept_now(outbox) == []
    client.delete(f"mail:{mail_id}:claim")  # its worker died; whether it was sent, the next attempt finds out
    assert swept_now(outbox) == []
    taken.settle(State.SENT)
    assert outbox.read(mail_id)["status"] == "sent"


def test_a_mail_in_doubt_that_expires_while_it_waits_is_unknown(outbox: Outbox, client: Any) -> None:
    mail_id = accept(outbox, -1)
    taken = claim(outbox, mail_id)
    taken.recipients[1].status = Status.IN_DOUBT
    taken.settle(State.DELAYED, next_in=1)
    assert swept_now(outbox) == [Finding(mail_id, "unknown", "expired")]
    assert client.hmget("mail:totals", "unknown", "expired") == [b"1", None]


@pytest.mark.parametrize("later", [-1, 1])
def test_the_job_of_an_expired_mail_finds_nothing_to_do_whenever_it_is_queued(outbox: Outbox, later: int) -> None:
    mail_id = accept(outbox, -1)
    assert len(swept_now(outbox)) == 1
    assert outbox.claim(mail_id, queued_at=time.time() + later) == "failed"
    with pytest.raises(NotPossible, match="has expired"):
        outbox.requeue(mail_id)


def test_a_failed_mail_that_was_queued_again_is_none_of_the_sweeps_affair(outbox: Outbox, client: Any) -> None:
    mail_id = accept(outbox)
    client.hset(f"rq:job:{mail_id}", "status", "failed")
    swept_now(outbox)
    outbox.requeue(mail_id)
    assert swept_now(outbox) == []
    assert outbox.read(mail_id)["status"] == "queued"
    assert client.hget(f"mail:{mail_id}", "state") == b"failed"
    claim(outbox, mail_id)
    assert client.hget(f"mail:{mail_id}", "state") == b"sending"


def test_a_mail_in_doubt_whose_job_is_over_is_unknown(outbox: Outbox, client: Any) -> None:
    mail_id = accept(outbox)
    taken = claim(outbox, mail_id)
    taken.mark_in_doubt({"b@example.com": Status.IN_DOUBT})
    client.delete(QUEUE, f"mail:{mail_id}:claim")
    client.hset(f"rq:job:{mail_id}", "status", "failed")
    assert swept_now(outbox) == [Finding(mail_id, "given_up", "its worker died in every attempt")]
    assert outbox.read(mail_id)["status"] == "unknown"


@pytest.mark.parametrize("state", ["failed", "unknown"])
def test_a_mail_given_up_can_be_queued_again_with_its_content(outbox: Outbox, client: Any, state: str) -> None:
    mail_id = accept(outbox)
    if state == "unknown":
        claim(outbox, mail_id).mark_in_doubt({"b@example.com": Status.IN_DOUBT})
    client.delete(QUEUE, f"rq:job:{mail_id}", f"mail:{mail_id}:claim")
    swept_now(outbox)
    assert outbox.read(mail_id)["status"] == state
    outbox.requeue(mail_id)
    assert client.lrange(QUEUE, 0, -1) == [mail_id.encode()]
    taken = claim(outbox, mail_id)
    assert taken.message.text == "t"
    assert client.ttl(f"mail:{mail_id}") == -1


def test_a_final_mail_is_taken_off_the_list(outbox: Outbox, client: Any) -> None:
    mail_id = accept(outbox)
    client.hset(f"mail:{mail_id}", "state", "sent")
    client.zadd("mail:open", {"long-gone": 1})
    assert swept_now(outbox) == []
    assert client.zcard("mail:open") == 0


def test_a_sweep_looks_at_a_bounded_number_of_mails(
    outbox: Outbox, client: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sweeping, "AT_ONCE", 2)
    for _ in range(3):
        accept(outbox)
    client.delete(QUEUE)
    assert [len(swept_now(outbox)), len(list(sweep(outbox)))] == [2, 1]


def test_what_is_no_mail_is_taken_off_the_list_and_keeps_the_sweep_from_no_other(outbox: Outbox, client: Any) -> None:
    client.set("mail:a-text", "x")
    client.zadd("mail:open", {"a-text": 1, "no id": 1, b"\xff": 1})
    stuck = accept(outbox)
    client.delete(QUEUE)
    found = {one.event: one.mail_id for one in swept_now(outbox)}
    assert found == {"unreadable": found["unreadable"], "repaired": stuck}
    assert client.zrange("mail:open", 0, -1) == [stuck.encode()]


@pytest.mark.parametrize("broken", ["rq:job:", "mail:", "rq:wip:email"])
def test_a_mail_that_cannot_be_judged_keeps_the_sweep_from_no_other(outbox: Outbox, client: Any, broken: str) -> None:
    odd, stuck = accept(outbox), accept(outbox)
    client.delete(QUEUE)
    match broken:
        case "rq:job:":
            client.delete(f"rq:job:{odd}")
            client.set(f"rq:job:{odd}", "x")
        case "mail:":
            client.hdel(f"mail:{odd}", "recipients", "content")
            client.hset(f"rq:job:{odd}", "status", "failed")
        case _:
            client.set(broken, "x")
            client.hset(f"rq:job:{odd}", "status", "started")
    outcomes = {one.mail_id: one.event for one in swept_now(outbox)}
    assert outcomes == {odd: "unreadable" if broken == "rq:wip:email" else "given_up", stuck: "repaired"}


def test_a_list_of_the_wrong_kind_is_put_aside_for_a_new_one(outbox: Outbox, client: Any) -> None:
    client.set("mail:open", "x")
    assert list(sweep(outbox)) == []
    assert client.get("jobs:unreadable:mail:open") == b"x"
    mail_id = accept(outbox)
    client.delete(QUEUE)
    assert [(one.mail_id, one.event) for one in swept_now(outbox)] == [(mail_id, "repaired")]


def test_an_unreadable_head_of_the_queue_keeps_no_mail_from_being_looked_at(outbox: Outbox, client: Any) -> None:
    stuck = accept(outbox)
    client.delete(QUEUE)
    client.set("rq:job:odd", "x")
    client.rpush(QUEUE, "odd")
    assert [one.mail_id for one in swept_now(outbox)] == [stuck]


@pytest.mark.parametrize(
    ("days", "trouble", "left"), [(5.1, True, "failed"), (4.9, True, "queued"), (5.1, False, "queued")]
)
def test_a_mail_in_the_queue_is_kept_by_trouble_for_five_days(
    outbox: Outbox, client: Any, days: float, trouble: bool, left: str
) -> None:
    mail_id = accept(outbox)
    client.hset(f"mail:{mail_id}", "created_at", iso(time.time() - days * 86400))
    if trouble:
        client.hset("relay:breaker", "open_until", 1)
    found = swept_now(outbox)
    assert outbox.read(mail_id)["status"] == left
    assert found == ([Finding(mail_id, "failed", TROUBLE_TOO_LONG)] if left == "failed" else [])


@pytest.mark.parametrize(("sent_days_ago", "left"), [(1, "queued"), (5.1, "failed")])
def test_bulk_mail_that_waits_for_its_turn_for_weeks_is_not_kept_by_trouble(
    outbox: Outbox, client: Any, sent_days_ago: float, left: str
) -> None:
    bulk = outbox.accept([draft()._replace(priority="bulk")]).id
    client.hset(f"mail:{bulk}", "created_at", iso(time.time() - 20 * 86400))
    client.hset("relay:breaker", "open_until", 1)
    client.set("mail:last_sent", time.time() - sent_days_ago * 86400)
    swept_now(outbox)
    assert outbox.read(bulk)["status"] == left
