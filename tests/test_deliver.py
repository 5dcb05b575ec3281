"""One run of `deliver`: a mail in Redis, an attempt that asks a relay or does not, and what is told to RQ."""

from __future__ import annotations

from typing import Any

import fakeredis
import pytest
from rq import Retry

from mail import delivery
from mail.claim import Claim
from mail.outbox import Outbox
from mail.states import Status
from smtp.pacing import Wait
from smtp.relay import Relay
from tests.conversations import POOL, served
from tests.mails import BODY, accept, claim

RECIPIENTS = BODY["to"]


@pytest.fixture
def client() -> fakeredis.FakeRedis:
    return fakeredis.FakeRedis()


def delivers(outbox: Outbox, to: Relay) -> delivery.Delivery:
    made = delivery.Delivery(outbox)
    made.relay, made.pool = to, POOL
    return made


def test_a_mail_goes_to_all_its_recipients_once_however_often_its_job_runs(outbox: Outbox) -> None:
    mail_id = accept(outbox)
    with served() as (there, to):
        made = delivers(outbox, to)
        assert [made.deliver(mail_id) for _ in range(2)] == ["sent", "sent"]
    assert [one for one in there.commands if one.startswith("RCPT")] == [f"RCPT TO:<{who}>" for who in RECIPIENTS]
    assert len(there.accepted) == 1
    seen = outbox.read(mail_id)
    assert [one["status"] for one in seen["recipients"]] == ["accepted", "accepted"]
    assert seen["reason"] is None


def test_a_mail_with_nobody_left_to_serve_is_settled_without_the_relay(outbox: Outbox, client: Any) -> None:
    mail_id = accept(outbox, on_doubt="hold")
    claim(outbox, mail_id).mark_in_doubt(dict.fromkeys(RECIPIENTS, Status.IN_DOUBT))
    client.delete(f"mail:{mail_id}:claim")  # its worker has died
    with served() as (there, to), pytest.raises(delivery.Failed, match="held"):
        delivers(outbox, to).deliver(mail_id)
    assert there.connections == 0
    assert client.hget(f"mail:{mail_id}", "state") == b"unknown"


@pytest.mark.parametrize(("expires_in", "codes"), [(-1, []), (60, [451])])
def test_a_mail_that_has_expired_or_will_before_its_next_attempt_fails_at_once(
    outbox: Outbox, client: Any, expires_in: int, codes: list[int]
) -> None:
    mail_id = accept(outbox, expires_in=expires_in)
    with served({"RCPT": "451 4.7.1 try again in 5 minutes"}) as (there, to):
        made = delivers(outbox, to)
        for why in ("expired", "failed"):  # the second run finds nothing to do, and fails the job all the same
            with pytest.raises(delivery.Failed, match=why):
                made.deliver(mail_id)
    assert there.connections == len(codes)
    assert client.hmget(f"mail:{mail_id}", "state", "reason", "next_attempt_at") == [b"failed", b"expired", b""]
    assert [one["code"] for one in outbox.read(mail_id)["attempts"]] == codes


def test_a_refused_mail_fails_with_code_and_phase(outbox: Outbox, client: Any) -> None:
    mail_id = accept(outbox)
    with served({"RCPT": "550 5.1.1 no user"}) as (_, to), pytest.raises(delivery.Failed, match=r"^550 at rcpt$"):
        delivers(outbox, to).deliver(mail_id)
    assert client.hmget(f"mail:{mail_id}", "state", "reason") == [b"failed", b"550 at rcpt"]


def test_a_mail_that_another_attempt_holds_is_left_to_it(outbox: Outbox, caplog: pytest.LogCaptureFixture) -> None:
    mail_id = accept(outbox)
    claim(outbox, mail_id)
    with caplog.at_level(0), served() as (there, to):
        later = delivers(outbox, to).deliver(mail_id)
    assert f"busy id={mail_id} next_in=" in caplog.text
    assert there.connections == 0
    assert isinstance(later, Retry)
    assert 40 < later.intervals[0] <= 46


@pytest.mark.parametrize("reserved", [True, False])
def test_a_mail_comes_back_as_one_with_a_reservation_if_pacing_has_given_it_one(
    outbox: Outbox, monkeypatch: pytest.MonkeyPatch, reserved: bool
) -> None:
    mail_id, asked = accept(outbox), []

    def wait(returning: bool) -> Wait:
        asked.append(returning)
        return Wait(6.1, "wait", reserved)

    with served() as (there, to):
        made = delivers(outbox, to)
        monkeypatch.setattr(made.pacing, "admit", wait)
        later = [made.deliver(mail_id) for _ in range(2)]
    assert there.connections == 0
    assert asked == [False, reserved]
    assert [one.intervals for one in later if isinstance(one, Retry)] == [[7], [7]]
    assert outbox.read(mail_id)["status"] == "delayed"


def test_a_mail_that_the_relay_has_put_off_has_no_reservation(outbox: Outbox) -> None:
    mail_id = accept(outbox)
    with served({"DATA": "451 later"}) as (_, to):
        assert isinstance(delivers(outbox, to).deliver(mail_id), Retry)
    assert not claim(outbox, mail_id).reserved


def test_the_breaker_hears_of_each_conversation(outbox: Outbox, client: Any) -> None:
    with served({"GREETING": ["421 busy", "421 busy", "421 busy", "220 ready"]}) as (_, to):
        made, mails = delivers(outbox, to), [accept(outbox) for _ in range(4)]
        for mail_id in mails[:3]:
            assert not outbox.relay_in_trouble()
            assert isinstance(made.deliver(mail_id), Retry)
        assert outbox.relay_in_trouble()
        client.hset("relay:breaker", "open_until", 1)  # the pause is over
        assert made.deliver(mails[3]) == "sent"
        assert not outbox.relay_in_trouble()


def test_a_mail_that_expires_while_its_body_goes_out_gets_no_final_dot(
    outbox: Outbox, client: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """But it has shown that the relay is well."""
    mail_id = accept(outbox)
    client.hset("relay:breaker", "open_until", 1)
    with served() as (there, to):
        monkeypatch.setattr(Claim, "has_expired", lambda *_, **__: "DATA" in there.commands)
        with pytest.raises(delivery.Failed, match="expired"):
            delivers(outbox, to).deliver(mail_id)
    assert not there.bodies
    assert not outbox.relay_in_trouble()
