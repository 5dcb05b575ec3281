"""One run of `deliver`: a mail in Redis, an attempt that asks a relay or does not, and what is told to RQ."""

from __future__ import annotations

import time
from contextlib import suppress
from typing import Any

import fakeredis
import pytest
from redis.exceptions import ConnectionError
from rq import Retry

from mail import delivery
from mail.claim import Claim, iso
from mail.figures import hours
from mail.outbox import Outbox
from mail.states import TROUBLE_TOO_LONG, State, Status
from queues.connection import Unavailable
from smtp import pacing
from smtp.pacing import Wait, standing
from smtp.policy import Phase
from smtp.relay import Relay
from tests.conversations import POOL, served
from tests.mails import BODY, accept, claim, draft

RECIPIENTS = BODY["to"]


@pytest.fixture
def client() -> fakeredis.FakeRedis:
    return fakeredis.FakeRedis()


def delivers(outbox: Outbox, to: Relay) -> delivery.Delivery:
    made = delivery.Delivery(outbox)
    made.routes.ways[0].relay, made.pool = to, POOL
    return made


def test_a_mail_goes_to_all_its_recipients_once_however_often_its_job_runs(
    outbox: Outbox, caplog: pytest.LogCaptureFixture
) -> None:
    mail_id = accept(outbox)
    with caplog.at_level(0), served() as (there, to):
        made = delivers(outbox, to)
        assert [made.deliver(mail_id) for _ in range(2)] == ["sent", "sent"]
    assert [one for one in there.commands if one.startswith("RCPT")] == [f"RCPT TO:<{who}>" for who in RECIPIENTS]
    assert len(there.accepted) == 1
    seen = outbox.read(mail_id)
    assert [one["status"] for one in seen["recipients"]] == ["accepted", "accepted"]
    assert seen["reason"] is None
    assert f"nothing_to_do id={mail_id} state=sent" in caplog.text


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


def test_the_job_of_a_canceled_mail_ends_well(outbox: Outbox) -> None:
    mail_id = accept(outbox)
    outbox.cancel(mail_id)
    with served() as (there, to):
        assert delivers(outbox, to).deliver(mail_id) == "canceled"
    assert there.connections == 0


@pytest.mark.parametrize("known", [True, False], ids=["this version", "an earlier version"])
@pytest.mark.parametrize("before", [State.QUEUED, State.SENDING, State.DELAYED, State.FAILED, State.UNKNOWN])
def test_no_worker_asks_relay_rate_or_breaker_for_a_test_whatever_became_of_it(
    outbox: Outbox,
    client: Any,
    before: State,
    known: bool,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    mail_id = outbox.accept([draft()._replace(test=True)]).id
    if before == State.SENDING:
        claim(outbox, mail_id)
        client.delete(f"mail:{mail_id}:claim")  # its worker has died
    elif before != State.QUEUED:
        claim(outbox, mail_id).settle(before, reason="its job was deleted")
    if not known:
        client.hdel(f"mail:{mail_id}", "test")  # which an earlier version does not look at
    monkeypatch.setattr(delivery, "queued_at", lambda: time.time() + 1)  # of one that was asked for again
    with caplog.at_level(0), served() as (there, to):
        made = delivers(outbox, to)
        monkeypatch.setattr(made.routes.ways[0].pacing, "admit", lambda *_: pytest.fail("asked"))
        assert made.deliver(mail_id) == "sent"
    assert there.connections == 0
    seen = outbox.read(mail_id)
    assert (seen["status"], seen["test"]) == ("sent", known)
    if known:
        assert f"sent id={mail_id} test=True" in caplog.text
        assert outbox.last_sent() is None  # what tells whether the relay works
        assert client.hmget("mail:totals", "test", "sent", "delivered:us") == [b"1", None, None]


def test_how_long_it_took_is_counted_from_the_moment_at_which_it_was_to_go(outbox: Outbox, client: Any) -> None:
    mail_id = accept(outbox)
    client.hset(f"mail:{mail_id}", "since", iso(time.time() - 100))
    with served() as (_, to):
        delivers(outbox, to).deliver(mail_id)
    assert client.hget("mail:totals", "delivered:120") == b"1"
    assert sum(one.counts["delivered:120"] for one in hours(client, 2)) == 1


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

    def wait(returning: bool, *_: Any) -> Wait:
        asked.append(returning)
        return Wait(6.1, "wait", reserved)

    with served() as (there, to):
        made = delivers(outbox, to)
        monkeypatch.setattr(made.routes.ways[0].pacing, "admit", wait)
        later = [made.deliver(mail_id) for _ in range(2)]
    assert there.connections == 0
    assert asked == [False, reserved]
    assert [one.intervals for one in later if isinstance(one, Retry)] == [[7], [7]]
    assert outbox.read(mail_id)["status"] == "delayed"


def test_a_mail_that_the_relay_has_put_off_has_no_reservation(outbox: Outbox, caplog: pytest.LogCaptureFixture) -> None:
    mail_id = accept(outbox)
    with caplog.at_level(0), served({"DATA": "451 later"}) as (_, to):
        again = delivers(outbox, to).deliver(mail_id)
    assert isinstance(again, Retry)
    assert f'delayed id={mail_id} reason="451 at data" next_in={again.intervals[0]}s' in caplog.text
    assert not claim(outbox, mail_id).reserved


def test_the_breaker_hears_of_each_conversation(outbox: Outbox, client: Any, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(0), served({"GREETING": ["421 busy", "421 busy", "421 busy", "220 ready"]}) as (_, to):
        made, mails = delivers(outbox, to), [accept(outbox) for _ in range(4)]
        for mail_id in mails[:3]:
            assert not outbox.relay_in_trouble()
            assert isinstance(made.deliver(mail_id), Retry)
        assert outbox.relay_in_trouble()
        assert 'breaker_opened reason="421 at greeting"' in caplog.text
        seen = standing(client)
        assert seen
        assert (seen.reply, seen.relay) == ((Phase.GREETING, 421, "busy", False), str(to))
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


# What is said of one mail is not the relay's state


def told(made: delivery.Delivery, mail_id: str) -> str:
    """Makes one attempt and returns what the mail is then."""
    with suppress(delivery.Failed):
        made.deliver(mail_id)
    stored: Any = made.outbox.jobs.redis.hget(f"mail:{mail_id}", "state")
    return str(stored.decode())


@pytest.mark.parametrize(
    "reply", ["454 4.7.1 Relay access denied", "450 4.1.8 no such domain", "451 4.7.1 greylisted", "550 5.1.1 who?"]
)
def test_a_recipient_that_is_put_off_or_refused_makes_no_trouble_for_others(outbox: Outbox, reply: str) -> None:
    """Postfix' defer_unauth_destination among them, at RCPT: mailcow#643, anonaddy#607."""
    with served({"RCPT": reply}) as (_, relay):
        made = delivers(outbox, relay)
        states = {told(made, mail_id) for mail_id in [accept(outbox) for _ in range(8)] * 2}
    assert states == ({"failed", "suppressed"} if reply.startswith("5") else {"delayed"})
    assert not outbox.relay_in_trouble()


@pytest.mark.parametrize(("phase", "opens"), [("RCPT", False), ("MAIL", True)])
def test_a_pause_that_the_relay_asks_for_opens_the_breaker_unless_it_may_be_a_recipients(
    outbox: Outbox, phase: str, opens: bool
) -> None:
    with served({phase: "421 4.7.0 try again in 10 minutes"}) as (_, relay):
        assert told(delivers(outbox, relay), accept(outbox)) == "delayed"
    assert outbox.relay_in_trouble() == opens


@pytest.mark.parametrize(
    ("phase", "reply"),
    [
        ("MAIL", "553 5.7.1 not for {n}@example.com"),
        (".", "554 5.7.1 blocked, id {n}"),
        ("DATA", "451 4.7.1 no {n}"),
    ],
)
def test_the_same_words_to_several_mails_in_a_row_are_about_the_account(outbox: Outbox, phase: str, reply: str) -> None:
    script: Any = {phase: [reply.format(n=number) for number in range(4)] + ["250 2.0.0 ok"]}
    with served(script) as (_, relay):
        made, mails = delivers(outbox, relay), [accept(outbox) for _ in range(5)]
        states = [told(made, mail_id) for mail_id in mails]
    own = "delayed" if phase == "DATA" else "failed"
    assert states[:4] == [own, own, "delayed", "delayed"]
    assert not outbox.relay_in_trouble()  # others find out for themselves: it may be what one caller sends
    verdicts = [outbox.read(mail_id)["attempts"][-1]["verdict"] for mail_id in mails[:4]]
    assert verdicts[2:] == ["trouble", "trouble"]
    assert "trouble" not in verdicts[:2]


@pytest.mark.parametrize(
    "reply",
    ["552 5.3.4 too large", "552 message size exceeds the maximum", "550 5.6.0 bad lines", "553 5.1.8 no domain"],
)
def test_what_is_surely_a_mails_own_fault_is_never_the_accounts(outbox: Outbox, reply: str) -> None:
    with served({"MAIL": reply}) as (_, relay):
        made = delivers(outbox, relay)
        assert {told(made, accept(outbox)) for _ in range(6)} == {"failed"}


@pytest.mark.parametrize("error", [Unavailable("Redis does not answer"), ConnectionError()])
def test_a_reply_is_written_down_although_redis_cannot_count_it(
    outbox: Outbox, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def away(*_: object) -> bool:
        raise error

    with served({".": "554 5.7.1 spam"}) as (_, relay):
        made, mail_id = delivers(outbox, relay), accept(outbox)
        monkeypatch.setattr(made.routes.ways[0].pacing, "refused_alike", away)
        assert told(made, mail_id) == "failed"


def test_each_trouble_that_a_mail_itself_meets_with_doubles_its_pause(outbox: Outbox) -> None:
    with served({"MAIL": "454 4.7.0 quota"}) as (_, relay):
        made, mail_id = delivers(outbox, relay), accept(outbox)
        pauses = []
        for _ in range(9):
            again = made.deliver(mail_id)
            assert isinstance(again, Retry)
            pauses += again.intervals
    for number, pause in enumerate(pauses):
        assert 0.79 * 30 * 2 ** min(number, 6) <= pause <= 1.21 * 30 * 2 ** min(number, 6)


def test_a_probe_that_is_refused_as_others_were_does_not_keep_the_breaker_open(outbox: Outbox, client: Any) -> None:
    with served({".": ["554 5.7.1 spam"] * 3 + ["250 2.0.0 ok"]}) as (_, relay):
        made, mails = delivers(outbox, relay), [accept(outbox) for _ in range(4)]
        assert [told(made, mail_id) for mail_id in mails[:2]] == ["failed", "failed"]
        client.hset("relay:breaker", "open_until", 1)  # for another reason; the pause is over
        assert told(made, mails[2]) == "delayed"
        assert not outbox.relay_in_trouble()
        assert told(made, mails[3]) == "sent"


def test_one_mail_refused_again_and_again_is_not_the_account(outbox: Outbox) -> None:
    with served({"DATA": "451 4.7.1 not this one"}) as (_, relay):
        made, mail_id = delivers(outbox, relay), accept(outbox)
        assert [told(made, mail_id) for _ in range(5)] == ["delayed"] * 5
    assert {one["verdict"] for one in outbox.read(mail_id)["attempts"]} == {"try again"}


def test_a_mail_sent_in_between_shows_that_it_is_not_the_account(outbox: Outbox) -> None:
    spam = "554 5.7.1 spam"
    with served({".": [spam, spam, "250 2.0.0 ok", spam, spam]}) as (_, relay):
        made = delivers(outbox, relay)
        states = [told(made, accept(outbox)) for _ in range(5)]
    assert states == ["failed", "failed", "sent", "failed", "failed"]


def test_a_mail_in_trouble_of_its_own_does_not_open_the_breaker(outbox: Outbox) -> None:
    with served({".": "452 4.3.1 disk full"}) as (_, relay):
        made, mail_id = delivers(outbox, relay), accept(outbox)
        assert [told(made, mail_id) for _ in range(6)] == ["delayed"] * 6
        assert not outbox.relay_in_trouble()
        for _ in range(2):
            told(made, accept(outbox))
        assert outbox.relay_in_trouble()


def test_a_mail_that_was_put_off_lets_others_probe_first(outbox: Outbox, client: Any) -> None:
    with served({".": ["452 4.3.1 disk full"] * 3 + ["250 2.0.0 ok"]}) as (there, relay):
        made, mails = delivers(outbox, relay), [accept(outbox) for _ in range(4)]
        for mail_id in mails[:3]:
            told(made, mail_id)
        client.hset("relay:breaker", "open_until", 1000 * (time.time() - 1))  # the pause is over
        before = there.connections
        assert [told(made, mail_id) for mail_id in mails[:3]] == ["delayed"] * 3
        assert there.connections == before
        assert [told(made, mail_id) for mail_id in reversed(mails)] == ["sent"] * 4


def test_a_mail_that_was_put_off_probes_where_there_is_no_other(outbox: Outbox, client: Any) -> None:
    with served({".": ["452 4.3.1 disk full"] * 3 + ["250 2.0.0 ok"]}) as (_, relay):
        made, mails = delivers(outbox, relay), [accept(outbox) for _ in range(3)]
        for mail_id in mails:
            told(made, mail_id)
        client.hset("relay:breaker", "open_until", 1000 * (time.time() - pacing.PROBE - 1))
        assert told(made, mails[0]) == "sent"


# Trouble keeps no mail for ever


def aged(client: Any, mail_id: str, days: float) -> None:
    client.hset(f"mail:{mail_id}", "created_at", iso(time.time() - days * 86400))


@pytest.mark.parametrize(("days", "state"), [(4.9, "delayed"), (5.1, "failed")])
def test_trouble_keeps_a_mail_for_five_days(outbox: Outbox, client: Any, days: float, state: str) -> None:
    mail_id = accept(outbox)
    aged(client, mail_id, days)
    with served({"MAIL": "454 4.7.0 quota"}) as (_, relay):
        assert told(delivers(outbox, relay), mail_id) == state
    if state == "failed":
        assert client.hget(f"mail:{mail_id}", "reason") == f"{TROUBLE_TOO_LONG}: 454 at mail".encode()


def test_a_mail_that_waits_for_an_open_breaker_waits_no_longer_than_that(outbox: Outbox, client: Any) -> None:
    mail_id = accept(outbox)
    aged(client, mail_id, 5.1)
    client.hset("relay:breaker", "open_until", 1000 * (time.time() + 60))
    with served() as (there, relay):
        assert told(delivers(outbox, relay), mail_id) == "failed"
    assert there.connections == 0
    assert client.hget(f"mail:{mail_id}", "reason") == TROUBLE_TOO_LONG.encode()


def test_an_old_mail_that_the_relay_takes_is_sent(outbox: Outbox, client: Any) -> None:
    mail_id = accept(outbox)
    aged(client, mail_id, 30)
    with served() as (_, relay):
        assert told(delivers(outbox, relay), mail_id) == "sent"


def test_who_asks_for_a_mail_again_gives_it_another_five_days(outbox: Outbox, client: Any) -> None:
    mail_id = accept(outbox)
    aged(client, mail_id, 5.1)
    with served({"MAIL": "454 4.7.0 quota"}) as (_, relay):
        made = delivers(outbox, relay)
        assert told(made, mail_id) == "failed"
        again = claim(outbox, mail_id)  # as an attempt of a job that a person has queued since
        delivery.take_up(again)
        again.settle(State.DELAYED, next_in=1)
        assert told(made, mail_id) == "delayed"


def test_that_somebody_asked_again_is_known_although_the_first_attempt_after_it_died(
    outbox: Outbox, client: Any
) -> None:
    mail_id = accept(outbox)
    aged(client, mail_id, 5.1)
    client.hset(f"mail:{mail_id}", mapping={"state": "failed", "settled_at": 1})
    claim(outbox, mail_id)
    client.delete(f"mail:{mail_id}:claim")
    with served({"MAIL": "454 4.7.0 quota"}) as (_, relay):
        assert told(delivers(outbox, relay), mail_id) == "delayed"


# A relay that takes fewer recipients at once than a mail has


@pytest.mark.parametrize("reply", ["452 4.5.3 Error: too many recipients", "452 too many recipients", "552 no more"])
def test_those_for_whom_there_was_no_room_have_their_turn_at_once(outbox: Outbox, reply: str) -> None:
    mail_id = accept(outbox)
    with served({"RCPT": ["250 2.1.5 ok", reply, "250 2.1.5 ok"]}) as (there, relay):
        made = delivers(outbox, relay)
        first = made.deliver(mail_id)
        assert isinstance(first, Retry)
        assert first.intervals == [1]
        assert made.deliver(mail_id) == "sent"
    assert [one["code"] for one in outbox.read(mail_id)["recipients"]] == [250, 250]
    assert len(there.accepted) == 2
    assert [one for one in there.commands if one.startswith("RCPT")][-1] == f"RCPT TO:<{RECIPIENTS[1]}>"


def test_a_relay_that_has_room_for_nobody_costs_an_attempt(outbox: Outbox, client: Any) -> None:
    mail_id = accept(outbox)
    with served({"RCPT": "452 4.5.3 too many recipients"}) as (_, relay):
        assert told(delivers(outbox, relay), mail_id) == "delayed"
    assert client.hget(f"mail:{mail_id}", "counted") == b"1"
