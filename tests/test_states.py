"""What becoming a state means, by each script that brings a mail into it, and what a reader is shown beforehand."""

from __future__ import annotations

from typing import Any

import fakeredis
import pytest

from mail.causes import of_cause
from mail.claim import ClaimLost
from mail.outbox import Outbox
from mail.states import CAUSED, FINAL, FOLLOWS, RETURNED, State, effective_state
from mail.sweep import sweep
from queues.jobs import NotPossible
from tests.mails import accept, claim

DAY = 86400


@pytest.fixture
def client() -> fakeredis.FakeRedis:
    return fakeredis.FakeRedis()


def bring(outbox: Outbox, client: Any, how: str) -> str:
    """Brings a mail into a state: an attempt settles it so, or what is named happens."""
    mail_id = accept(outbox, expires_in=-1 if how == "expired" else 0)
    if how in ("claimed", "canceled twice", "given up"):  # each after it was put off
        claim(outbox, mail_id).settle(State.DELAYED, reason="450 at rcpt", next_in=60)
    match how:
        case "claimed":
            claim(outbox, mail_id)
        case "claimed again":
            claim(outbox, mail_id).settle(State.FAILED, reason="550 at rcpt")
            claim(outbox, mail_id)
        case "canceled twice":
            outbox.cancel(mail_id)
            outbox.cancel(mail_id)
        case "given up":
            client.delete(f"rq:job:{mail_id}")
            client.zadd("mail:open", {mail_id: 1})
            list(sweep(outbox))
        case "expired":
            list(sweep(outbox))
        case "failed and canceled" | "unknown and canceled":
            claim(outbox, mail_id).settle(State(how.split()[0]), reason="550 at rcpt")
            outbox.cancel(mail_id)
        case State():
            claim(outbox, mail_id).settle(how, reason="550 at rcpt", next_in=60 if how == State.DELAYED else 0)
    return mail_id


@pytest.mark.parametrize(
    ("how", "state", "counted", "kept_for"),
    [
        ("accepted", State.QUEUED, [], 0),
        ("claimed", State.SENDING, ["delayed"], 0),
        ("claimed again", State.SENDING, ["failed"], 0),
        (State.DELAYED, State.DELAYED, ["delayed"], 0),
        (State.SENT, State.SENT, ["sent"], 3 * DAY + 3600),
        (State.FAILED, State.FAILED, ["failed"], 15 * DAY),
        (State.UNKNOWN, State.UNKNOWN, ["unknown"], 15 * DAY),
        (State.SUPPRESSED, State.SUPPRESSED, ["suppressed"], 15 * DAY),
        ("canceled twice", State.CANCELED, ["delayed", "canceled"], 15 * DAY),
        ("failed and canceled", State.CANCELED, ["failed", "canceled"], 15 * DAY),
        ("unknown and canceled", State.CANCELED, ["unknown", "canceled"], 15 * DAY),
        ("given up", State.FAILED, ["delayed", "failed"], 15 * DAY),
        ("expired", State.FAILED, ["expired"], 15 * DAY),
    ],
)
def test_a_state_is_counted_kept_and_watched_however_a_mail_comes_into_it(
    outbox: Outbox, client: Any, how: str, state: State, counted: list[str], kept_for: int
) -> None:
    mail_id = bring(outbox, client, how)
    mail = client.hgetall(f"mail:{mail_id}")
    assert mail[b"state"].decode() == state
    assert client.hgetall("mail:totals") == {name.encode(): b"1" for name in ["accepted", *counted]}
    assert client.ttl(f"mail:{mail_id}") == (kept_for or -1)
    assert client.zrange("mail:open", 0, -1) == ([] if kept_for else [mail_id.encode()])
    assert (b"content" in mail) == (state not in (State.SENT, State.CANCELED))
    assert bool(mail.get(b"next_attempt_at")) == (state == State.DELAYED)
    assert bool(mail.get(b"reason")) == (state not in (State.QUEUED, State.SENDING))
    assert (outbox.last_sent() is not None) == (state == State.SENT)
    causes = [of_cause(state, mail[b"reason"].decode())] if state in CAUSED else []
    assert [one[:-16] for one in client.zrangebylex("mail:index", "[r", "(s")] == causes


def test_from_a_final_state_only_a_person_goes_on() -> None:
    assert set(FOLLOWS) == {None, *State}
    assert set().union(*(FOLLOWS[state] for state in FINAL)) == {
        State.SENDING,
        State.CANCELED,
        State.SENT,
        State.FAILED,
        *RETURNED,
    }
    assert State.FAILED not in FOLLOWS[State.SENT] | FOLLOWS[State.CANCELED]


@pytest.mark.parametrize("state", State)
def test_that_a_mail_was_sent_is_written_over_every_state(outbox: Outbox, client: Any, state: State) -> None:
    mail_id = accept(outbox)
    late = claim(outbox, mail_id)
    client.hset(f"mail:{mail_id}", "state", state)
    late.settle(State.SENT)
    assert outbox.read(mail_id)["status"] == (state if state in RETURNED else "sent")  # a report knows more


@pytest.mark.parametrize("state", [State.SENT, State.CANCELED])
@pytest.mark.parametrize("then", [State.DELAYED, State.FAILED, State.UNKNOWN])
def test_nothing_but_sent_is_written_over_sent_or_canceled(
    outbox: Outbox, client: Any, state: State, then: State
) -> None:
    mail_id = accept(outbox)
    late = claim(outbox, mail_id)
    client.delete(f"mail:{mail_id}:claim")
    claim(outbox, mail_id).settle(State.SENT) if state == State.SENT else outbox.cancel(mail_id)
    client.set(f"mail:{mail_id}:claim", late.token)
    with pytest.raises(ClaimLost):
        late.settle(then, reason="x")
    client.delete(f"mail:{mail_id}:claim")
    assert outbox.claim(mail_id, queued_at=1e10) == state
    late.settle(State.SENT)
    assert outbox.read(mail_id)["status"] == "sent"
    with pytest.raises(NotPossible, match="sent already"):
        outbox.cancel(mail_id)


# fmt: off
PREVIEWS = [  # the state that is stored, the status of the job, the state that is shown
    ("queued", "queued", "queued"), ("sending", "started", "sending"), ("delayed", "scheduled", "delayed"),
    ("sent", "started", "sent"), ("sent", "failed", "sent"), ("canceled", "", "canceled"),
    ("failed", "failed", "failed"), ("failed", "", "failed"), ("unknown", "failed", "unknown"),
    ("failed", "queued", "queued"), ("failed", "scheduled", "queued"), ("unknown", "queued", "queued"),
    ("sending", "failed", "failed"), ("sending", "scheduled", "delayed"), ("delayed", "stopped", "failed"),
    ("sending", "queued", "delayed"), ("queued", "canceled", "failed"), ("queued", "failed", "failed"),
    ("queued", "finished", "queued"), ("queued", "", "failed"), ("delayed", "", "failed"),
    ("failed", "started", "queued"),
]
# fmt: on


@pytest.mark.parametrize(("state", "job_status", "shown"), PREVIEWS)
def test_the_state_shown_follows_what_rq_knows_better(state: str, job_status: str, shown: str) -> None:
    assert effective_state(state, job_status, "")[0] == shown


@pytest.mark.parametrize(("state", "shown"), [("queued", "failed"), ("delayed", "failed"), ("sending", "sending")])
def test_a_mail_that_still_waits_when_it_expires_has_failed_and_one_in_mid_air_has_not(state: str, shown: str) -> None:
    seen = effective_state(state, "started" if state == "sending" else "queued", "", expired=True)
    assert seen == (shown, "expired" if shown == "failed" else "")


def test_an_expired_mail_has_failed_although_its_job_still_waits() -> None:
    assert effective_state("failed", "queued", "expired", expired=True) == ("failed", "expired")
    # Given up before its time, because the next attempt would have come after it; and queued again in time.
    assert effective_state("failed", "queued", "expired", expired=False) == ("queued", "")
