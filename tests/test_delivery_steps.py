"""One attempt: what comes before the final dot and after it, and the next state."""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from collections.abc import Callable
from contextlib import nullcontext
from datetime import datetime, timedelta, timezone
from queue import Queue
from types import SimpleNamespace
from typing import Any

import pytest

from mail import delivery
from mail.address import Mailbox
from mail.claim import MARK_IN_DOUBT, Claim, ClaimLost, Recipient
from mail.message import Message
from mail.outbox import Outbox
from mail.states import State, Status
from queues.connection import connect
from queues.jobs import Jobs
from settings import Settings
from smtp import session
from smtp.envelope import Envelope
from smtp.policy import Phase, Verdict
from smtp.relay import Relay
from smtp.verdict import Outcome, Reply
from tests.conversations import POOL, at, served
from tests.scripted_relay import Line, ScriptedRelay, reset
from tests.servers import eventually
from tests.smtp_samples import MIME, SENDER, WAYS

pytestmark = pytest.mark.usefixtures("nothing_is_left_open")

OK = Reply(Phase.DOT, 250, "queued")
LATER = Reply(Phase.RCPT, 450, "busy")
NEVER = Reply(Phase.RCPT, 550, "5.1.1 no such user")
SILENCE = Reply(Phase.DOT, None, "the relay closed the connection")
AWAY = Reply(Phase.CONNECT, None, "refused")
RELAY = Relay("relay.example.com", 587, "none", None, None, None, timeout=5, deadline=10, ehlo_name="client.example")
WAY: Any = SimpleNamespace(name="relay", relay=RELAY, place=RELAY, marks={})


def claim(*statuses: str, before: str = "queued", counted: int = 0, on_doubt: str = "retry") -> Claim:
    a, now = Mailbox("", "a@example.com"), datetime.now(timezone.utc)
    return Claim(
        store=None,  # type: ignore[arg-type]
        id="an-id",
        token="a-token",
        message=Message(a, [a], [], [], [], "s", text="t"),
        message_id="<1@example.com>",
        created_at=now,
        since=now,
        state_before=State(before),
        recipients=[Recipient(f"{number}@example.com", Status(status)) for number, status in enumerate(statuses)],
        counted=counted,
        on_doubt=on_doubt,
    )


def after(taken: Claim, *replies: Reply) -> tuple[str, int]:
    pending = [one.address for one in taken.recipients if one.status == "pending"]
    delivery.record(taken, Outcome(replies[-1], dict(zip(pending, replies, strict=True))), WAY, {})
    return delivery.next_state(taken, replies, (10, 100))


@pytest.mark.parametrize(
    ("on_doubt", "replies", "state"),
    [
        ("retry", [OK, OK], "sent"),
        ("retry", [OK, NEVER], "failed"),
        ("retry", [NEVER, NEVER], "failed"),
        ("retry", [OK, LATER], "delayed"),
        ("retry", [NEVER, LATER], "delayed"),
        ("retry", [AWAY, AWAY], "delayed"),
        ("retry", [SILENCE, SILENCE], "delayed"),
        ("retry", [SILENCE, NEVER], "delayed"),
        ("hold", [SILENCE, OK], "unknown"),
        ("hold", [SILENCE, NEVER], "unknown"),
        ("hold", [SILENCE, LATER], "delayed"),
    ],
)
def test_the_state_after_an_attempt(on_doubt: str, replies: list[Reply], state: str) -> None:
    after_it, pause = after(claim("pending", "pending", on_doubt=on_doubt), *replies)
    assert (after_it, pause > 0) == (state, state == "delayed")


def test_a_mail_of_which_one_has_bounced_and_the_other_is_suppressed_now_was_sent() -> None:
    assert delivery.next_state(claim("bounced", "suppressed"), [], ()) == ("sent", 0)


@pytest.mark.parametrize("reply", [LATER, SILENCE])
def test_the_pauses_follow_the_schedule_and_then_the_mail_fails(reply: Reply) -> None:
    taken, pauses = claim("pending"), []
    for _ in range(3):
        delivery.take_up(taken)
        pauses.append(after(taken, reply))
    assert [state for state, _ in pauses] == ["delayed", "delayed", "failed"]
    assert 8 <= pauses[0][1] <= 12
    assert 80 <= pauses[1][1] <= 120
    assert pauses[2][1] == 0


def test_trouble_never_counts_and_never_ends() -> None:
    taken = claim("pending")
    for _ in range(50):
        state, pause = after(taken, AWAY)
        assert (state, taken.counted) == ("delayed", 0)
        assert 24 <= pause <= 36


@pytest.mark.parametrize(
    ("phase", "code", "text", "at_least", "at_most"),
    [
        (Phase.RCPT, 451, "4.7.1 Greylisted, try again in 5 minutes", 301, 301),
        (Phase.RCPT, 451, "4.7.1 try again in 5 seconds", 8, 12),  # the schedule asks for more
        (Phase.DOT, 454, "Throttling failure: retry after 600 seconds", 601, 601),
    ],
)
def test_a_relay_that_says_when_is_obeyed(phase: Phase, code: int, text: str, at_least: int, at_most: int) -> None:
    state, pause = after(claim("pending"), Reply(phase, code, text))
    assert state == "delayed"
    assert at_least <= pause <= at_most


def test_a_refusal_keeps_nobody_waiting_for_whom_there_was_no_room() -> None:
    full = Reply(Phase.RCPT, 452, "4.5.3 too many recipients")
    assert after(claim("pending", "pending", "pending"), OK, NEVER, full) == ("delayed", 0)


def test_of_several_pauses_asked_for_the_longest_counts() -> None:
    minutes = Reply(Phase.RCPT, 450, "4.2.1 try again in 5 minutes")
    assert after(claim("pending", "pending"), minutes, LATER) == ("delayed", 301)


@pytest.mark.parametrize(
    ("before", "on_doubt", "were", "are"),
    [
        ("delayed", "retry", "accepted refused pending in_doubt", "accepted refused pending pending"),
        ("sending", "retry", "in_doubt in_doubt", "pending pending"),
        ("sending", "retry", "pending", "pending"),
        ("sending", "hold", "in_doubt", "in_doubt"),
        ("failed", "retry", "accepted refused", "accepted pending"),  # a person has asked again
        ("unknown", "hold", "in_doubt refused accepted", "pending pending accepted"),
    ],
)
def test_what_earlier_attempts_have_left_is_taken_up(before: str, on_doubt: str, were: str, are: str) -> None:
    taken = claim(*were.split(), before=before, counted=2, on_doubt=on_doubt)
    delivery.take_up(taken)
    assert [one.status for one in taken.recipients] == are.split()
    assert taken.counted == (0 if before in ("failed", "unknown") else 2)
    died = before == "sending"
    assert [(one["verdict"], set(one)) for one in taken.attempts] == [("interrupted", {"at", "verdict", "text"})] * died
    assert (taken.counts["attempt:interrupted"], taken.counts["in_doubt"]) == (died, died and "in_doubt" in were)


def test_a_held_doubt_outlasts_the_attempts_at_the_others() -> None:
    taken = claim("pending", "pending", on_doubt="hold")
    assert after(taken, SILENCE, LATER)[0] == "delayed"
    delivery.take_up(taken)
    assert after(taken, OK)[0] == "unknown"
    assert [one.status for one in taken.recipients] == ["in_doubt", "accepted"]


@pytest.mark.parametrize("phase", [Phase.MAIL, Phase.RCPT, Phase.DATA])
def test_a_relay_that_goes_silent_on_one_mail_again_and_again_counts_at_last(phase: Phase) -> None:
    silent = Reply(phase, None, "timed out")
    taken = claim("pending")
    assert [after(taken, silent)[0] for _ in range(5)] == ["delayed"] * 4 + ["failed"]
    assert taken.counted == 3


def test_whom_the_final_dot_puts_in_doubt() -> None:
    replies = {"accepted": OK, "known": LATER, "refused": NEVER}
    marks = {"accepted": "in_doubt", "known": "pending", "refused": "refused"}
    assert delivery.at_dot(list(replies), replies) == marks


def test_the_reason_is_code_and_phase_and_never_the_relays_words() -> None:
    told = Reply(Phase.RCPT, 550, "<secret@example.com> unknown")
    assert delivery.reason(claim("accepted"), [OK, told, told, LATER]) == "550 at rcpt, 450 at rcpt"


def test_the_reason_is_also_what_an_earlier_attempt_met_with() -> None:
    """It said `held: the relay may have accepted it`, though nobody was in doubt."""
    taken = claim("pending", "pending", "pending")
    for replies, why in (([OK, NEVER, LATER], "550 at rcpt, 450 at rcpt"), ([LATER], "450 at rcpt, 550 before")):
        assert after(taken, *replies)[0] == "delayed"
        assert delivery.reason(taken, replies) == why
    assert after(taken, OK)[0] == "failed"
    assert delivery.reason(taken, [OK]) == "550 before"
    doubtful = claim("in_doubt", on_doubt="hold")
    assert delivery.reason(doubtful, []).startswith("held: ")


def test_an_attempt_is_recorded_with_what_the_relay_said() -> None:
    taken = claim("pending")
    after(taken, NEVER)
    [attempt] = taken.attempts
    assert attempt["relay"] == "relay.example.com:587"
    assert (attempt["phase"], attempt["code"], attempt["verdict"]) == ("rcpt", 550, "refused")
    assert attempt["worker"] == socket.gethostname()  # outside of a worker
    assert attempt["text"] == "5.1.1 no such user"
    assert timedelta(0) <= datetime.now(timezone.utc) - datetime.fromisoformat(attempt["at"]) < timedelta(minutes=5)
    assert (taken.recipients[0].code, taken.recipients[0].text) == (550, "5.1.1 no such user")


@pytest.mark.parametrize(
    ("reply", "counts"),
    [
        (OK, {"attempt:accepted": 1}),
        (LATER, {"attempt:try_again": 1}),
        (SILENCE, {"attempt:in_doubt": 1, "in_doubt": 1}),
    ],
)
def test_an_attempt_is_counted_once_and_a_doubt_also_as_one(reply: Reply, counts: dict[str, int]) -> None:
    taken = claim("pending", "pending")
    after(taken, reply, reply)
    assert taken.counts == counts


def test_every_verdict_has_its_consequence() -> None:
    assert set(delivery.AFTER) == set(Verdict)
    assert delivery.AT_DOT[Verdict.ACCEPTED] == delivery.AFTER[Verdict.IN_DOUBT] == "in_doubt"


def test_a_process_that_aborts_waits_for_its_dots_and_lets_no_other_go_out(monkeypatch: pytest.MonkeyPatch) -> None:
    dots, exits = delivery.Dots(), Queue[int]()
    monkeypatch.setattr(os, "_exit", exits.put)
    dots.expect("one")
    aborting = threading.Thread(target=dots.abort_unsent, daemon=True)
    aborting.start()
    with pytest.raises(delivery.Aborted):
        eventually(lambda: dots.expect("one"), seconds=10)
    assert exits.empty()
    dots.settled("one")
    aborting.join(10)
    assert exits.get_nowait() == 0


LOST = object()


class Attempt:
    """A mail that `Delivery._hand_over` sends, with a store that notes in `events` what is written down."""

    def __init__(self, there: ScriptedRelay) -> None:
        self.there = there
        self.events: list[tuple[str, int]] = []  # with the number of mails that the relay had then
        self.claim = claim("pending")
        self.at_mark: Callable[[], object] = lambda: None
        self.delivery = delivery.Delivery(Outbox(Jobs(connect("redis://127.0.0.1:1/0")), Settings()))
        self.way = self.delivery.routes.ways[0]
        self.way.relay, self.delivery.pool = at(there.port), POOL
        self.claim.store = SimpleNamespace(run=self.run, confirmed=self.run, insist=self.run)  # type: ignore[assignment]

    def run(self, script: str, keys: list[str], args: list[str], patience: float = 0) -> bool:
        """Stands for Redis, which writes the mark if the claim is not lost, and the outcome."""
        self.events.append(("mark" if script == MARK_IN_DOUBT else args[2], len(self.there.bodies)))
        if script != MARK_IN_DOUBT:
            return True
        assert [one["status"] for one in json.loads(args[1])] == ["in_doubt"]
        return self.at_mark() is not LOST

    def make(self) -> object:
        return self.delivery._hand_over(self.claim, self.way, Envelope(SENDER, ["0@example.com"]), MIME, None)


@WAYS
def test_the_mark_comes_before_the_dot_and_the_outcome_before_another_word(offers: list[str]) -> None:
    with served(offers=offers) as (there, _):
        attempt = Attempt(there)
        assert attempt.make() == "sent"
        assert attempt.events == [("mark", 0), ("sent", 1)]
        assert attempt.delivery.dots._pending == {"an-id"}  # until `deliver` ends, a process that aborts waits
    assert len(there.accepted) == 1


@WAYS
@pytest.mark.parametrize(
    ("stop", "error", "events"),
    [
        ("expired", delivery.Failed, [("failed", 0)]),
        ("claim lost", ClaimLost, [("mark", 0)]),
        ("aborting", delivery.Aborted, []),
    ],
)
def test_what_stops_a_mail_before_its_dot_leaves_it_unsent(
    offers: list[str], stop: str, error: type[Exception], events: list[object]
) -> None:
    with served(offers=offers) as (there, _):
        attempt = Attempt(there)
        if stop == "expired":
            attempt.claim.expires_at = 1
        elif stop == "claim lost":
            attempt.at_mark = lambda: LOST
        else:
            attempt.delivery.dots._aborting = True
        with pytest.raises(error):
            attempt.make()
    assert attempt.events == events
    assert not there.bodies


@pytest.mark.parametrize(
    ("expires", "events"), [(False, [("mark", 1), ("mark", 1), ("sent", 2)]), (True, [("mark", 1), ("failed", 1)])]
)
def test_a_mail_whose_kept_session_dies_at_the_dot_begins_again_and_nothing_of_the_first_mark_is_left(
    expires: bool, events: list[object], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(session, "SMALL", 0)
    gone = threading.Event()

    def die(line: Line) -> str:
        assert gone.wait(5)
        return reset(line)

    def wait_for_the_reset() -> None:
        gone.set()
        time.sleep(0.1)
        attempt.claim.expires_at = float(expires)

    with served({"BODY": [lambda _: "", die, lambda _: ""]}) as (there, _):
        Attempt(there).make()
        attempt = Attempt(there)
        attempt.at_mark = wait_for_the_reset
        with pytest.raises(delivery.Failed) if expires else nullcontext():
            attempt.make()
        assert attempt.events == events
    assert there.connections == 2
