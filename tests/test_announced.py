"""A mail whose commands go out with the final dot of the one before: fewer round trips, and what may go wrong."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import pytest

from smtp import pool
from smtp.envelope import Envelope
from smtp.policy import Phase, Verdict
from smtp.pool import Conversation
from smtp.relay import Relay
from smtp.verdict import Outcome
from tests.conversations import POOL, another, fate, served
from tests.scripted_relay import Line, Script, ScriptedRelay, hang_up, last_words
from tests.smtp_samples import ADA, BOB, LARGE, MIME, PIPES, SENDER
from tests.verdicts import ACCEPTED, IN_DOUBT, REFUSED, TRY_AGAIN

pytestmark = pytest.mark.usefixtures("nothing_is_left_open")
NEXT = MIME.replace(b"Ada", b"Bob")


@pytest.fixture(autouse=True)
def nothing_is_learnt() -> Iterator[None]:
    yield
    POOL.one_by_one.clear()


def finished(talk: Conversation, said: object) -> Outcome:
    while not isinstance(said, Outcome):
        said = talk.finish()
    return said


def pair(to: Relay, mime: bytes = MIME) -> tuple[Outcome, Outcome, bool]:
    """Sends a mail to ADA and one to BOB that is announced with it, as mail.delivery does. Returns what became of both,
    and whether the second was under way when its turn came."""
    with POOL.conversation(to) as talk:
        said = talk.begin(Envelope(SENDER, [ADA]), mime)
        following = talk.announce(Envelope(SENDER, [BOB]), NEXT)
        first = finished(talk, said)
    assert following
    was_under_way = following.is_under_way
    with POOL.conversation(to, following) as talk:
        return first, finished(talk, talk.begin(Envelope(SENDER, [BOB]), NEXT)), was_under_way


def after_one(steps: dict[str, Any]) -> Script:
    """Has the steps happen to the second mail of a relay: the first goes well, and tells how soon it answers."""
    good = {"MAIL": "250 ok", "RCPT": "250 ok", "DATA": "354 go on", ".": "250 ok"}
    return {name: [good[name], *(step if isinstance(step, list) else [step])] for name, step in steps.items()}


def forget(line: Line) -> str:
    """Drops what came with the dot, as a relay does that reads no more than a mail at a time."""
    line.unread.clear()
    return "250 ok" if line.say("250 ok") else ""


@pytest.mark.parametrize("mime", [MIME, LARGE], ids=["small", "large"])
def test_each_mail_in_a_row_costs_one_round_trip(mime: bytes) -> None:
    with served(offers=PIPES, latency=0.01) as (there, to):
        another(to)
        before, talk = there.turns, None
        with POOL.conversation(to) as first:
            said: Any = first.begin(Envelope(SENDER, [ADA]), mime)
            talk = first.announce(Envelope(SENDER, [ADA]), mime)
            finished(first, said)
        for left in (3, 2, 1, 0):
            with POOL.conversation(to, talk) as current:
                said = current.begin(Envelope(SENDER, [ADA]), mime)
                assert POOL.running[current.session] == current.deadline
                talk = current.announce(Envelope(SENDER, [ADA]), mime) if left else None
                finished(current, said)
        assert mime is LARGE or there.turns - before == 1 + 5
        assert there.connections == 1
    assert there.accepted == [MIME, *[mime] * 5]


@pytest.mark.parametrize(
    ("steps", "first", "second", "connections"),
    [
        ({}, (Phase.DOT, 250, ACCEPTED), (Phase.DOT, 250, ACCEPTED), 1),
        ({".": ["550 5.7.1 no", "250 ok"]}, (Phase.DOT, 550, REFUSED), (Phase.DOT, 250, ACCEPTED), 1),
        ({".": [last_words("421 bye"), "250 ok"]}, (Phase.DOT, 421, TRY_AGAIN), (Phase.DOT, 250, ACCEPTED), 2),
        ({".": [hang_up, "250 ok"]}, (Phase.DOT, None, IN_DOUBT), (Phase.DOT, 250, ACCEPTED), 2),
        ({".": [last_words("250 ok"), "250 ok"]}, (Phase.DOT, 250, ACCEPTED), (Phase.DOT, 250, ACCEPTED), 2),
        ({"RCPT": ["250 ok", "550 5.1.1 no"]}, (Phase.DOT, 250, ACCEPTED), (Phase.RCPT, 550, REFUSED), 1),
        ({"MAIL": ["250 ok", "451 later"]}, (Phase.DOT, 250, ACCEPTED), (Phase.MAIL, 451, TRY_AGAIN), 1),
        ({"DATA": ["354 go", last_words("421 bye"), "354 go"]}, (Phase.DOT, 250, ACCEPTED), None, 2),
    ],
)
def test_what_becomes_of_one_is_not_what_becomes_of_the_other(
    steps: dict[str, Any], first: Any, second: Any, connections: int
) -> None:
    with served(after_one(steps), offers=PIPES) as (there, to):
        another(to)
        seen = pair(to)
        assert fate(seen[0])[:2] == first[:2]
        assert fate(seen[1]) == (second or (Phase.DOT, 250, ACCEPTED))
        assert there.connections == connections
    copies = [there.accepted.count(NEXT), there.accepted.count(MIME)]
    assert copies[0] == (fate(seen[1])[2] is ACCEPTED)
    assert copies[1] <= 2


class Breaking:
    """A socket whose kernel takes so many octets and no more."""

    def __init__(self, sock: Any, left: int) -> None:
        self.sock, self.left = sock, left

    def __getattr__(self, name: str) -> Any:
        return getattr(self.sock, name)

    def send(self, data: bytes) -> int:
        if not self.left:
            raise TimeoutError
        taken = self.sock.send(data[: self.left])
        self.left -= taken
        return int(taken)

    def sendall(self, data: bytes) -> None:
        while data:
            data = data[self.send(data) :]


@pytest.mark.parametrize(("mime", "more"), [(MIME, 0), (MIME, 9), (LARGE, 40), (MIME, -1)])
def test_a_dot_that_got_out_without_all_that_follows_is_answered_for(mime: bytes, more: int) -> None:
    """It was taken for not sent, and the mail went out again without a word of doubt."""
    with served(offers=PIPES) as (there, to):
        another(to)
        with POOL.conversation(to) as talk:
            said = talk.begin(Envelope(SENDER, [ADA]), mime)
            following = talk.announce(Envelope(SENDER, [BOB]), NEXT)
            talk.session.smtp.sock = Breaking(talk.session.sock, len(talk.session.unsent) + 3 + more)  # type: ignore[assignment]
            first = finished(talk, said)
        assert fate(first) == (Phase.DOT, 250, ACCEPTED)
        with POOL.conversation(to, following) as talk:
            assert fate(finished(talk, talk.begin(Envelope(SENDER, [BOB]), NEXT)))[2] is ACCEPTED
        assert (there.connections, POOL.one_by_one) == (2, set())
    assert there.accepted == [MIME, mime, NEXT]


@pytest.mark.parametrize("steps", [{".": forget}, {"MAIL": ["250 ok", "503 5.5.1 nested MAIL", "250 ok"]}])
def test_a_relay_that_does_not_take_it_is_learnt_and_costs_no_mail(steps: dict[str, Any]) -> None:
    with served(after_one(steps), offers=PIPES, timeout=0.3) as (there, to):
        another(to)
        _, second, _ = pair(to)
        assert fate(second) == (Phase.DOT, 250, ACCEPTED)
        assert to in POOL.one_by_one
        with POOL.conversation(to) as talk:
            said = talk.begin(Envelope(SENDER, [ADA]), MIME)
            assert talk.announce(Envelope(SENDER, [BOB]), NEXT) is None
            finished(talk, said)
    assert there.accepted.count(NEXT) == 1


def test_a_mail_that_is_refused_because_of_what_follows_begins_again_without() -> None:
    refusal: Script = {".": ["250 ok", last_words("554 SMTP synchronization error"), "250 ok"]}
    with served(refusal, offers=PIPES) as (there, to):
        another(to)
        first, second, was_under_way = pair(to)
    assert (fate(first)[2], fate(second)[2], was_under_way) == (ACCEPTED, ACCEPTED, False)
    assert there.accepted == [MIME, MIME, NEXT]


def test_a_deadline_that_passes_between_two_mails_is_not_the_seconds_trouble() -> None:
    with served(offers=PIPES, deadline=0.5) as (there, to):
        another(to)
        with POOL.conversation(to) as talk:
            said = talk.begin(Envelope(SENDER, [ADA]), MIME)
            following = talk.announce(Envelope(SENDER, [BOB]), NEXT)
            finished(talk, said)
        assert following
        assert following.is_under_way
        time.sleep(0.7)  # as long as it takes to write down the first
        following.deadline += 1
        with POOL.conversation(to, following) as talk:
            assert fate(finished(talk, talk.begin(Envelope(SENDER, [BOB]), NEXT))) == (Phase.DOT, 250, ACCEPTED)
        assert there.connections == 2
    assert there.accepted == [MIME, MIME, NEXT]


def test_of_a_mail_that_is_given_up_nothing_goes_out() -> None:
    with served(offers=PIPES) as (there, to):
        another(to)
        with POOL.conversation(to) as talk:
            said = talk.begin(Envelope(SENDER, [ADA]), MIME)
            following = talk.announce(Envelope(SENDER, [BOB]), NEXT)
            finished(talk, said)
        assert following
        following.drop()
    assert there.heard.endswith(b"DATA\r\n")
    assert there.accepted == [MIME, MIME]


@pytest.mark.parametrize(
    ("offers", "mails", "slow", "limit"), [((), 1, 0, 100), (PIPES, 0, 0, 100), (PIPES, 1, 0.1, 100), (PIPES, 1, 0, 2)]
)
def test_no_mail_is_announced_where_that_may_hold_it_up(
    offers: list[str], mails: int, slow: float, limit: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without PIPELINING, before it is known how soon the relay answers, where it is slow, on a session that is old."""

    def answer(line: Line) -> str:
        time.sleep(slow)
        return "250 ok" if line.say("250 ok") else ""

    monkeypatch.setattr(pool, "SOON", 0.05)
    monkeypatch.setattr(pool, "MOST_MAILS", limit)
    with served({".": answer}, offers=offers) as (_, to):
        for _ in range(mails):
            another(to)
        with POOL.conversation(to) as talk:
            said = talk.begin(Envelope(SENDER, [ADA]), MIME)
            assert talk.announce(Envelope(SENDER, [BOB]), NEXT) is None
            finished(talk, said)


def test_an_announced_mail_that_no_command_can_be_made_of_is_refused_in_its_own_turn() -> None:
    with served(offers=PIPES) as (there, to):
        another(to)
        with POOL.conversation(to) as talk:
            said = talk.begin(Envelope(SENDER, [ADA]), MIME)
            assert talk.announce(Envelope(SENDER, ["a\r\nb@example.com"]), NEXT) is None
            assert talk.announce(Envelope(SENDER, [ADA], smtputf8=True), NEXT) is None
            assert finished(talk, said).reply.verdict is Verdict.ACCEPTED
    assert there.connections == 1
    assert isinstance(there, ScriptedRelay)
