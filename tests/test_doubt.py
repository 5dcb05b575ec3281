"""A mail in doubt that is held: a person says that it arrived, or that it did not."""

from __future__ import annotations

from typing import Any

import fakeredis
import pytest

from mail import delivery
from mail.claim import Claim
from mail.outbox import Outbox
from mail.states import State, Status
from queues.jobs import NotFound, NotPossible
from tests.conversations import POOL, served
from tests.mails import BODY, accept, claim


@pytest.fixture
def client() -> fakeredis.FakeRedis:
    return fakeredis.FakeRedis()


def held(outbox: Outbox, client: Any, *statuses: str, attempts: int = 1) -> Claim:
    """The attempt that left a mail in doubt, and what RQ makes of its job then."""
    taken = claim(outbox, accept(outbox))
    for one, status in zip(taken.recipients, statuses, strict=True):
        one.status, one.code = Status(status), None if status in ("in_doubt", "pending") else 550
    taken.attempts = [{"at": "then", "verdict": "in doubt", "text": "the relay closed the connection"}] * attempts
    taken.settle(State.UNKNOWN, reason="no reply at dot")
    client.hset(f"rq:job:{taken.id}", "status", "failed")
    client.lrem("rq:queue:email", 0, taken.id)
    client.zadd("rq:failed:email", {taken.id: 1e10})
    return taken


@pytest.mark.parametrize(
    ("statuses", "state", "reason"),
    [
        ("in_doubt accepted", State.SENT, None),
        ("in_doubt in_doubt", State.SENT, None),
        ("in_doubt refused", State.FAILED, "550 before"),
        ("in_doubt pending", State.FAILED, "no reply at dot"),  # it has expired
    ],
)
def test_a_mail_in_doubt_of_which_a_person_says_that_it_arrived_is_sent_or_failed_for_the_others(
    outbox: Outbox, client: Any, statuses: str, state: State, reason: str | None
) -> None:
    taken = held(outbox, client, *statuses.split(), attempts=50)
    outbox.arrived(taken.id)
    seen, sent = outbox.read(taken.id), state == State.SENT
    assert (seen["status"], seen["reason"]) == (state, reason)
    fates = [one["status"] for one in seen["recipients"]]
    assert fates == [status.replace("in_doubt", "accepted") for status in statuses.split()]
    assert (len(seen["attempts"]), seen["attempts"][-1]["verdict"]) == (50, "settled")
    assert client.zrange("rq:failed:email", 0, -1) == ([] if sent else [taken.id.encode()])
    assert client.exists(f"rq:job:{taken.id}") == client.hexists(f"mail:{taken.id}", "content") == (not sent)
    counts = {"accepted": b"1", "unknown": b"1", state.value: b"1"}
    assert client.hgetall("mail:totals") == {name.encode(): number for name, number in counts.items()}
    states = [member[1:2] for member in client.zrange("mail:index", 0, -1) if member.startswith(b"s")]
    assert states == [b"t" if sent else b"f"]
    assert outbox.last_sent() is None  # the relay has taken nothing now
    before = client.hgetall(f"mail:{taken.id}")
    taken.settle(State.UNKNOWN, reason="no reply at dot")  # the reply to it was lost
    with pytest.raises(NotPossible, match="only a mail in doubt"):
        outbox.arrived(taken.id)
    assert client.hgetall(f"mail:{taken.id}") == before


def test_that_a_mail_arrived_is_noted_once_although_the_reply_is_lost(
    outbox: Outbox, client: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken, run = held(outbox, client, "in_doubt", "in_doubt"), outbox.store.run
    monkeypatch.setattr(outbox.store, "run", lambda *args: [run(*args) for _ in range(2)][1])
    outbox.arrived(taken.id)
    assert client.hget("mail:totals", "sent") == b"1"


@pytest.mark.parametrize("how", ["queued again", "moved on meanwhile", "sent", "gone"])
def test_of_no_other_mail_can_it_be_said(
    outbox: Outbox, client: Any, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    taken = held(outbox, client, "in_doubt", "accepted")
    shown = outbox.read(taken.id)
    match how:
        case "queued again":
            outbox.requeue(taken.id)
        case "moved on meanwhile":
            monkeypatch.setattr(outbox, "read", lambda _: shown)
            outbox.requeue(taken.id)
            claim(outbox, taken.id)
        case "sent":
            outbox.arrived(taken.id)
        case "gone":
            client.delete(f"mail:{taken.id}")
    before = client.hgetall(f"mail:{taken.id}")
    with pytest.raises(NotFound if how == "gone" else NotPossible):
        outbox.arrived(taken.id)
    assert client.hgetall(f"mail:{taken.id}") == before


def test_a_mail_in_doubt_that_did_not_arrive_goes_again_to_those_in_doubt_only(outbox: Outbox, client: Any) -> None:
    taken = held(outbox, client, "in_doubt", "accepted")
    outbox.requeue(taken.id)
    with served() as (there, to):
        made = delivery.Delivery(outbox)
        made.routes.ways[0].relay, made.pool = to, POOL
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(delivery, "queued_at", lambda: 1e10)
            assert made.deliver(taken.id) == "sent"
    assert [one for one in there.commands if one.startswith("RCPT")] == [f"RCPT TO:<{BODY['to'][0]}>"]
    assert client.zrange("rq:failed:email", 0, -1) == []


@pytest.mark.parametrize("statuses", ["in_doubt accepted", "in_doubt refused"])
def test_that_it_arrived_does_not_undo_a_requeue_of_the_same_moment(
    outbox: Outbox, client: Any, monkeypatch: pytest.MonkeyPatch, statuses: str
) -> None:
    taken = held(outbox, client, *statuses.split())
    seen = outbox.read(taken.id)
    outbox.requeue(taken.id)
    monkeypatch.setattr(outbox, "read", lambda _: seen)  # as it was before
    with pytest.raises(NotPossible, match="moved on at this moment"):
        outbox.arrived(taken.id)
    assert claim(outbox, taken.id).state_before == State.UNKNOWN  # the requeue holds
