"""What we keep of a mail: the scripts accept, claim, before-dot and settle, one by one and against each other."""

from __future__ import annotations

import time
from typing import Any

import fakeredis
import pytest
from redis.exceptions import ConnectionError, ResponseError, TimeoutError

from mail.claim import Busy, Claim, ClaimLost, iso
from mail.outbox import Outbox, jittered
from mail.states import State, Status
from queues import heartbeat
from queues.heartbeat import LEASE_SECONDS
from queues.jobs import NotFound, NotPossible
from tests.mails import accept, claim, draft
from tests.servers import eventually


@pytest.fixture
def client() -> fakeredis.FakeRedis:
    return fakeredis.FakeRedis()


@pytest.fixture
def mail_id(outbox: Outbox) -> str:
    return accept(outbox)


@pytest.fixture
def taken(outbox: Outbox, mail_id: str) -> Claim:
    """The claim of an attempt at that mail."""
    return claim(outbox, mail_id)


# fmt: off
RESEND_EVENTS = {  # as its SDKs for .NET and Rust have them, which fail at any other
    "bounced", "canceled", "clicked", "complained", "delivered", "delivery_delayed",
    "failed", "opened", "queued", "scheduled", "sent", "suppressed",
}
# fmt: on


def test_the_last_event_is_a_word_that_resend_has_and_the_status_is_the_true_one(
    client: Any, outbox: Outbox, mail_id: str
) -> None:
    seen = {}
    for state in State:
        client.hset(f"mail:{mail_id}", "state", state)
        client.hset(f"rq:job:{mail_id}", "status", "started" if state == State.SENDING else "finished")
        shown = outbox.read(mail_id)
        seen[shown["status"]] = shown["last_event"]
        assert (shown["html"], shown["text"], shown["scheduled_at"]) == (None, None, None)
    assert set(seen) == set(State)
    assert set(seen.values()) <= RESEND_EVENTS
    ours = {status: event for status, event in seen.items() if status != event}
    assert ours == {"sending": "queued", "delayed": "delivery_delayed", "unknown": "delivery_delayed"}


def test_a_claimed_mail_is_busy_for_everybody_else(outbox: Outbox, mail_id: str) -> None:
    claim(outbox, mail_id)
    with pytest.raises(Busy) as busy:
        outbox.claim(mail_id, time.time() + 1)
    assert 40 < busy.value.seconds <= LEASE_SECONDS


def test_a_claim_is_kept_for_as_long_as_its_attempt_lasts(
    client: Any, monkeypatch: pytest.MonkeyPatch, taken: Claim, mail_id: str
) -> None:
    monkeypatch.setattr(heartbeat, "HEARTBEAT_SECONDS", 0.02)
    client.pexpire(f"mail:{mail_id}:claim", 10_000)
    with taken.held():
        eventually(lambda: client.ttl(f"mail:{mail_id}:claim") > 20)
    assert not client.exists(f"mail:{mail_id}:claim")


def test_a_lost_claim_is_not_taken_back_by_a_heartbeat(
    outbox: Outbox, client: Any, monkeypatch: pytest.MonkeyPatch, mail_id: str
) -> None:
    monkeypatch.setattr(heartbeat, "HEARTBEAT_SECONDS", 0.02)
    with claim(outbox, mail_id).held():
        client.set(f"mail:{mail_id}:claim", "somebody else", px=60_000)
        time.sleep(0.2)
    assert client.get(f"mail:{mail_id}:claim") == b"somebody else"


def test_an_attempt_that_raises_gives_its_claim_back(outbox: Outbox, mail_id: str) -> None:
    with pytest.raises(ZeroDivisionError), claim(outbox, mail_id).held():
        raise ZeroDivisionError
    assert claim(outbox, mail_id).state_before == "sending"


def test_a_settled_attempt_asks_redis_for_nothing_more(taken: Claim, monkeypatch: pytest.MonkeyPatch) -> None:
    with taken.held():
        taken.settle(State.SENT)
        monkeypatch.setattr(taken.store, "run", lambda *_: pytest.fail("asked"))


def test_a_mail_that_is_no_longer_kept_cannot_be_claimed_or_canceled(outbox: Outbox, client: Any) -> None:
    assert outbox.claim("gone-mail", 0) == "gone"
    with pytest.raises(NotFound):
        outbox.cancel("gone-mail")
    assert client.keys("*gone-mail*") == []


def test_an_attempt_that_lost_its_claim_stops_before_the_final_dot(
    outbox: Outbox, client: Any, taken: Claim, mail_id: str
) -> None:
    client.delete(f"mail:{mail_id}:claim")
    other = claim(outbox, mail_id)
    with pytest.raises(ClaimLost):
        taken.mark_in_doubt({"b@example.com": Status.IN_DOUBT})
    other.mark_in_doubt({"b@example.com": Status.IN_DOUBT})
    assert outbox.read(mail_id)["recipients"][0]["status"] == "in_doubt"


def test_an_attempt_that_lost_its_claim_may_still_say_sent_and_nothing_else(
    outbox: Outbox, client: Any, taken: Claim, mail_id: str
) -> None:
    client.delete(f"mail:{mail_id}:claim")
    claim(outbox, mail_id)
    with pytest.raises(ClaimLost):
        taken.settle(State.FAILED, reason="stale")
    assert client.hget(f"mail:{mail_id}", "state") == b"sending"
    taken.settle(State.SENT)
    assert outbox.read(mail_id)["status"] == "sent"


def test_a_late_word_leaves_the_note_that_the_mail_was_sent_again(
    outbox: Outbox, client: Any, taken: Claim, mail_id: str
) -> None:
    client.delete(f"mail:{mail_id}:claim")
    other = claim(outbox, mail_id)
    other.attempts.append({"verdict": "interrupted"})
    for one in (other, taken):
        one.settle(State.SENT)
    assert outbox.read(mail_id)["attempts"] == [{"verdict": "interrupted"}]


def test_settling_twice_is_settling_once(client: Any, taken: Claim, mail_id: str) -> None:
    taken.attempts.append({"verdict": "accepted"})
    taken.settle(State.SENT)
    before = client.hgetall(f"mail:{mail_id}")
    taken.settle(State.SENT)
    assert client.hgetall(f"mail:{mail_id}") == before


def test_an_interrupted_claim_is_taken_over_with_what_it_noted(outbox: Outbox, client: Any, mail_id: str) -> None:
    claim(outbox, mail_id).mark_in_doubt({"b@example.com": Status.IN_DOUBT, "c@example.com": Status.REFUSED})
    client.delete(f"mail:{mail_id}:claim")
    taken = claim(outbox, mail_id)
    assert taken.state_before == "sending"
    assert [one.status for one in taken.recipients] == [Status.IN_DOUBT, "refused"]


def test_the_list_of_attempts_does_not_grow_without_end(outbox: Outbox, mail_id: str) -> None:
    for _ in range(60):
        attempt = claim(outbox, mail_id)
        attempt.attempts.append({"at": "then", "verdict": "trouble"})
        attempt.settle(State.DELAYED, next_in=1)
    assert len(outbox.read(mail_id)["attempts"]) == 50


def test_a_failed_mail_is_claimed_again_only_if_it_was_queued_again_since(
    outbox: Outbox, client: Any, mail_id: str
) -> None:
    accepted_at = time.time()
    claim(outbox, mail_id).settle(State.UNKNOWN, reason="x")
    assert outbox.claim(mail_id, queued_at=accepted_at) == "unknown"
    client.zadd("rq:failed:email", {mail_id: 1})
    assert outbox.claim(mail_id, queued_at=time.time() + 1) == "unknown"
    client.zrem("rq:failed:email", mail_id)
    assert claim(outbox, mail_id).state_before == "unknown"


@pytest.mark.parametrize("state", ["failed", "unknown"])
def test_rq_does_not_try_a_mail_again_that_was_given_up(outbox: Outbox, client: Any, state: str, mail_id: str) -> None:
    assert client.hmget(f"rq:job:{mail_id}", "retries_left", "retry_intervals") == [b"3", b"[1, 5, 30]"]
    claim(outbox, mail_id).settle(State(state), reason="x")
    assert client.hget(f"rq:job:{mail_id}", "retries_left") == b"0"
    assert client.hexists(f"rq:job:{mail_id}", "data")


def test_giving_up_a_mail_without_a_job_makes_none(client: Any, taken: Claim, mail_id: str) -> None:
    client.delete(f"rq:job:{mail_id}")
    taken.settle(State.FAILED, reason="x")
    assert not client.exists(f"rq:job:{mail_id}")


def test_a_mail_that_an_attempt_holds_is_not_canceled(outbox: Outbox, client: Any, mail_id: str) -> None:
    claim(outbox, mail_id)
    with pytest.raises(NotPossible, match="being sent"):
        outbox.cancel(mail_id)
    client.delete(f"mail:{mail_id}:claim")  # its worker has died
    outbox.cancel(mail_id)
    assert client.hget(f"mail:{mail_id}", "state") == b"canceled"


def test_a_canceled_mail_is_not_queued_again(outbox: Outbox, mail_id: str) -> None:
    outbox.cancel(mail_id)
    with pytest.raises(NotPossible, match="only a failed mail"):
        outbox.requeue(mail_id)


def test_an_attempt_at_a_mail_that_was_canceled_meanwhile_stops_before_the_final_dot(
    client: Any, taken: Claim, mail_id: str
) -> None:
    client.hset(f"mail:{mail_id}", "state", "canceled")
    with pytest.raises(ClaimLost):
        taken.mark_in_doubt({})


@pytest.mark.parametrize(("state", "served"), [("sent", 2), ("delayed", 1), ("failed", 1)])
def test_that_somebody_was_served_is_written_as_soon_as_redis_takes_it(
    outbox: Outbox, client: Any, monkeypatch: pytest.MonkeyPatch, state: str, served: int, taken: Claim, mail_id: str
) -> None:
    for one in taken.recipients[:served]:
        one.status = Status.ACCEPTED
    run, refusals = outbox.store.run, [ConnectionError(), TimeoutError(), ResponseError("MISCONF the disk is full")]

    def sometimes(*args: Any) -> Any:
        if refusals:
            raise refusals.pop()
        return run(*args)

    monkeypatch.setattr(outbox.store, "run", sometimes)
    pauses: list[float] = []
    monkeypatch.setattr(time, "sleep", pauses.append)
    taken.settle(State(state), reason="x")
    assert pauses == [1, 1, 1]
    assert client.hget(f"mail:{mail_id}", "state") == state.encode()
    assert outbox.read(mail_id)["recipients"][0]["status"] == "accepted"


def test_that_nobody_was_served_is_not_waited_for(
    outbox: Outbox, monkeypatch: pytest.MonkeyPatch, taken: Claim
) -> None:
    taken.recipients[0].status = Status.REFUSED
    monkeypatch.setattr(outbox.store, "insist", lambda *_: pytest.fail("waited"))
    taken.settle(State.DELAYED, next_in=1)


def test_the_reasons_of_failures_are_those_of_the_mails_that_failed_since(outbox: Outbox, client: Any) -> None:
    settled_at = {"old": 99, "new": 100, **{f"late-{number}": 101 for number in range(1001)}}
    for name, moment in settled_at.items():
        client.hset(f"mail:{name}", mapping={"reason": f"550 {name}", "settled_at": moment})
    client.hset("mail:not-settled", "state", "queued")
    client.zadd("rq:failed:email", dict.fromkeys([*settled_at, "not-settled", "not-there"], 1))
    assert sorted(outbox.failures(since=0)) == sorted(f"550 {name}" for name in settled_at)
    assert sorted(outbox.failures(since=100)) == sorted(f"550 {name}" for name in settled_at if name != "old")


@pytest.mark.parametrize(("expires_in", "on_doubt"), [(60, "hold"), (0, None)])
def test_what_the_sender_chose_is_in_the_claim_and_shown(outbox: Outbox, expires_in: int, on_doubt: str | None) -> None:
    one = draft(expires_in, on_doubt)
    mail_id = outbox.accept([one]).id
    taken, seen = claim(outbox, mail_id), outbox.read(mail_id)
    assert taken.on_doubt == seen["on_doubt"] == (on_doubt or "retry")
    assert taken.expires_at == (one.expires_at.timestamp() if one.expires_at else 0)
    assert seen["expires_at"] == (one.expires_at.isoformat() if one.expires_at else None)
    assert (taken.has_expired(), taken.has_expired(within=61)) == (False, bool(expires_in))


def test_moments_are_written_with_milliseconds() -> None:
    assert [iso(0), iso(1.5)] == ["1970-01-01T00:00:00.000+00:00", "1970-01-01T00:00:01.500+00:00"]


def test_jitter_stays_within_a_fifth() -> None:
    values = {jittered(1000) for _ in range(500)}
    assert min(values) >= 800
    assert max(values) <= 1200
    assert len(values) > 100
    assert jittered(1) == 1


def test_a_mail_given_up_before_it_expires_can_be_queued_again_in_time(outbox: Outbox) -> None:
    """Its next attempt would have come too late."""
    mail_id = accept(outbox, expires_in=60)
    claim(outbox, mail_id).settle(State.FAILED, reason="expired")
    assert claim(outbox, mail_id).state_before == State.FAILED
