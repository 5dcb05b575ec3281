"""What an attempt leads to: the next state, from the replies of the relay and from what is left of the schedule."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import date, datetime, timezone
from typing import Annotated, Any

import pytest
from pydantic import Field, ValidationError

import settings
from mail import delivery
from mail.address import Mailbox
from mail.claim import Claim, Recipient
from mail.message import Message
from mail.states import State, Status
from queues import offer
from settings import Settings
from smtp.verdict import Outcome, Phase, Reply, Verdict

OK = Reply(Phase.DOT, 250, "queued")
LATER = Reply(Phase.RCPT, 450, "busy")
NEVER = Reply(Phase.RCPT, 550, "5.1.1 no such user")
SILENCE = Reply(Phase.DOT, None, "the relay closed the connection")
AWAY = Reply(Phase.CONNECT, None, "refused")


@pytest.fixture(autouse=True)
def _settings(monkeypatch: pytest.MonkeyPatch) -> None:
    given(monkeypatch)


def given(monkeypatch: pytest.MonkeyPatch, **values: Any) -> None:
    current = Settings(_env_file=None, smtp_host="relay.example.com", retry_schedule=(10, 100), **values)
    monkeypatch.setattr(settings, "current", lambda: current)
    delivery.the_relay.cache_clear()


@pytest.fixture(autouse=True)
def _forget() -> Iterator[None]:
    yield
    delivery.the_relay.cache_clear()


def claim(*statuses: str, before: str = "queued", counted: int = 0, on_doubt: str = "") -> Claim:
    a = Mailbox("", "a@example.com")
    return Claim(
        store=None,  # type: ignore[arg-type]
        id="an-id",
        token="a-token",
        message=Message(a, [a], [], [], [], "s", text="t"),
        message_id="<1@example.com>",
        created_at=datetime.now(timezone.utc),
        state_before=State(before),
        recipients=[Recipient(f"{number}@example.com", Status(status)) for number, status in enumerate(statuses)],
        counted=counted,
        on_doubt=on_doubt,
    )


def after(taken: Claim, *replies: Reply) -> tuple[str, int]:
    pending = [one.address for one in taken.recipients if one.status == "pending"]
    outcome = Outcome(replies[-1], dict(zip(pending, replies, strict=True)))
    delivery._record(taken, outcome)
    return delivery._next_state(taken, replies)


@pytest.mark.parametrize(
    ("replies", "state"),
    [
        ([OK, OK], "sent"),
        ([OK, NEVER], "failed"),
        ([NEVER, NEVER], "failed"),
        ([OK, LATER], "delayed"),
        ([NEVER, LATER], "delayed"),
        ([AWAY, AWAY], "delayed"),
        ([SILENCE, SILENCE], "delayed"),
        ([SILENCE, NEVER], "delayed"),
    ],
)
def test_the_state_after_an_attempt(replies: list[Reply], state: str) -> None:
    assert after(claim("pending", "pending"), *replies)[0] == state


@pytest.mark.parametrize(
    ("replies", "state"), [([SILENCE, OK], "unknown"), ([SILENCE, NEVER], "unknown"), ([SILENCE, LATER], "delayed")]
)
def test_what_is_in_doubt_is_held_where_the_operator_chose_so(
    monkeypatch: pytest.MonkeyPatch, replies: list[Reply], state: str
) -> None:
    given(monkeypatch, on_doubt="hold")
    assert after(claim("pending", "pending"), *replies)[0] == state


def test_the_pauses_follow_the_schedule_and_then_the_mail_fails() -> None:
    taken = claim("pending")
    pauses = [after(taken, LATER) for _ in range(3)]
    assert [state for state, _ in pauses] == ["delayed", "delayed", "failed"]
    assert 8 <= pauses[0][1] <= 12
    assert 80 <= pauses[1][1] <= 120


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


def test_of_several_pauses_asked_for_the_longest_counts() -> None:
    minutes = Reply(Phase.RCPT, 450, "4.2.1 in 5 minutes")
    assert after(claim("pending", "pending"), minutes, LATER) == ("delayed", 301)


@pytest.mark.parametrize("way", ["", "retry", "hold"])
def test_what_the_sender_chose_for_doubt_goes_before_what_the_operator_chose(
    monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    given(monkeypatch, on_doubt="hold" if way == "retry" else "retry")
    assert after(claim("pending", on_doubt=way), SILENCE)[0] == ("unknown" if way == "hold" else "delayed")
    taken = claim("in_doubt", before="sending", on_doubt=way)
    delivery._take_up(taken)
    assert taken.recipients[0].status == ("in_doubt" if way == "hold" else "pending")


def test_a_retry_goes_only_to_those_not_yet_served() -> None:
    taken = claim("accepted", "refused", "pending", "in_doubt")
    delivery._take_up(taken)
    assert [one.status for one in taken.recipients] == ["accepted", "refused", "pending", "pending"]


def test_a_held_doubt_is_not_taken_up_by_a_retry_but_by_a_person(monkeypatch: pytest.MonkeyPatch) -> None:
    given(monkeypatch, on_doubt="hold")
    taken = claim("in_doubt", before="sending")
    delivery._take_up(taken)
    assert taken.recipients[0].status == "in_doubt"
    asked = claim("in_doubt", "refused", "accepted", before="unknown", counted=2)
    delivery._take_up(asked)
    assert [one.status for one in asked.recipients] == ["pending", "pending", "accepted"]
    assert asked.counted == 0


def test_a_relay_that_goes_silent_on_one_mail_again_and_again_counts_at_last() -> None:
    silent = Reply(Phase.RCPT, None, "timed out")
    taken = claim("pending")
    assert [after(taken, silent)[0] for _ in range(5)] == ["delayed"] * 4 + ["failed"]
    assert taken.counted == 3


def test_a_recipient_of_whom_nothing_is_known_yet_is_in_doubt_at_the_final_dot(monkeypatch: pytest.MonkeyPatch) -> None:
    """So it is with CHUNKING, where no reply is awaited before the end of the mail."""
    marks: list[dict[str, str]] = []
    monkeypatch.setattr(Claim, "mark_in_doubt", lambda _, statuses: marks.append(statuses))
    delivery._before_dot(claim("pending"), ["known", "refused", "unknown"], {"known": LATER, "refused": NEVER})
    assert marks == [{"known": "pending", "refused": "refused", "unknown": "in_doubt"}]


def test_the_reason_is_code_and_phase_and_never_the_relays_words() -> None:
    told = Reply(Phase.RCPT, 550, "<secret@example.com> unknown")
    assert delivery._reason([OK, told, told, LATER]) == "550 at rcpt, 450 at rcpt"


def test_an_attempt_is_recorded_with_what_the_relay_said() -> None:
    taken = claim("pending")
    after(taken, NEVER)
    [attempt] = taken.attempts
    assert attempt["relay"] == "relay.example.com:587"
    assert (attempt["phase"], attempt["code"], attempt["verdict"]) == ("rcpt", 550, "refused")
    assert attempt["text"] == "5.1.1 no such user"
    assert (taken.recipients[0].code, taken.recipients[0].text) == (550, "5.1.1 no such user")


def test_every_verdict_has_its_consequence() -> None:
    assert set(delivery.AFTER) == set(Verdict)
    assert delivery.AT_DOT[Verdict.ACCEPTED] == delivery.AFTER[Verdict.IN_DOUBT] == "in_doubt"


def test_a_tasks_arguments_are_made_from_its_type_hints(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(offer, "OFFERED", {})

    @offer.task(timeout=5)
    def plan(day: date, times: Annotated[int, Field(ge=1)] = 1) -> str:
        return f"{day:%A} {times}"

    offered = offer.OFFERED["plan"]
    assert offered.timeout == 5
    assert plan(day="2026-11-21", times=2) == "Saturday 2"  # as RQ calls it, with what JSON can carry
    for wrong in ({}, {"day": "soon"}, {"day": "2026-11-21", "times": 0}, {"day": "2026-11-21", "more": 1}):
        with pytest.raises(ValidationError):
            plan(**wrong)
