"""A mail that an attempt takes before its turn: whose it is, how long it is held, and what if it may not go then."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import fakeredis
import pytest
from rq import Retry

from mail import delivery
from mail.address import Mailbox
from mail.outbox import CLAIM_BESIDE, Outbox
from process.values import Rate
from queues.heartbeat import on_heartbeat
from smtp.pacing import Pacing
from smtp.policy import Phase
from smtp.verdict import Reply
from tests.conversations import POOL, another, served
from tests.mails import draft
from tests.scripted_relay import Line, Script, take
from tests.smtp_samples import ADA, PIPES
from tests.test_deliver import delivers

pytestmark = pytest.mark.usefixtures("nothing_is_left_open")
TEXTS = ["one", "two" * 20_000, "three"]
HEARTBEATS = on_heartbeat.__self__.all  # type: ignore[attr-defined]


@pytest.fixture
def client() -> fakeredis.FakeRedis:
    return fakeredis.FakeRedis()


@pytest.fixture(autouse=True)
def nothing_is_held() -> Iterator[None]:
    with on_heartbeat(lambda: None):
        pass  # its thread is there for good
    yield
    POOL.one_by_one.clear()
    assert not HEARTBEATS


def accept(outbox: Outbox, text: str, **more: Any) -> str:
    made = draft()
    message = replace(made.message, to=[Mailbox("", f"{text[:9]}@example.com")], text=text)
    return outbox.accept([made._replace(message=message, **more)]).id


def beside(outbox: Outbox, mail_id: str) -> Any:
    """Claims a mail as the step does that takes its job."""
    words = outbox.claim_beside()[1](f"token of {mail_id}")
    return outbox.store.run(CLAIM_BESIDE + "return beside(ARGV[1], 2)", [], [mail_id, *words])


def in_a_row(made: delivery.Delivery, ids: list[str], monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Delivers mails as a sender does that takes each next one while the one before is under way."""
    taken = {ids[0]: beside(made.outbox, ids[0])}
    states = []
    for mail_id, following in zip(ids, [*ids[1:], ""], strict=True):

        def take_next(following: str = following) -> tuple[str, Any]:
            taken[following] = beside(made.outbox, following) if following else None
            return following, taken[following]

        monkeypatch.setattr(delivery, "take_next", take_next)
        monkeypatch.setattr(delivery, "taken_with_it", lambda mail_id=mail_id: taken.get(mail_id))
        try:
            said = made.deliver(mail_id)
        except delivery.Failed:
            said = "failed"
        states.append("delayed" if isinstance(said, Retry) else said)
    return states


@pytest.fixture
def held() -> list[int]:
    """How many leases of claims were renewed at each final dot: in its turn, a mail that was taken ahead has two."""
    return []


def steps(held: list[int]) -> Script:
    def dot(line: Line) -> str:
        held.append(len(HEARTBEATS))
        return take(line)

    return {".": ["250 ok", dot]}


@pytest.mark.parametrize(
    ("second", "announced"),
    [
        *[({}, 2), ({"expires_in": 3600}, 1), ({"on_doubt": "hold"}, 2), ({"test": True}, 0), ({"canceled": True}, 0)],
        *[({"listed": f"{TEXTS[1][:9]}@example.com"}, 0), ({"listed": "eve@example.com"}, 2)],
    ],
)
def test_each_mail_goes_to_its_own_recipients_and_is_held_until_its_turn(
    outbox: Outbox, monkeypatch: pytest.MonkeyPatch, held: list[int], second: dict[str, Any], announced: int
) -> None:
    listed = second.pop("listed", "")
    is_suppressed = listed.startswith("two")
    if listed:
        outbox.suppressions.add(listed, "manual")
    is_sent = not {"test", "canceled"} & second.keys() and not is_suppressed
    is_canceled = second.pop("canceled", False)
    if "expires_in" in second:
        second = {"expires_at": draft(second["expires_in"]).expires_at}
    ids = [accept(outbox, text, **(second if at == 1 else {})) for at, text in enumerate(TEXTS)]
    if is_canceled:
        outbox.cancel(ids[1])
    with served(steps(held), offers=PIPES) as (there, to):
        another(to)
        states = in_a_row(delivers(outbox, to), ids, monkeypatch)
        assert len(there.log) == len(held)
        another(to, ADA)
        assert (there.connections, there.log[-1].recipients) == (1, [ADA])
    assert states == ["sent", "canceled" if is_canceled else "failed" if is_suppressed else "sent", "sent"]
    sent = [text for text in TEXTS if is_sent or text != TEXTS[1]]
    gone = [
        (one.recipients, "".join(one.body.decode().split("\r\n\r\n", 1)[1].split("=\r\n"))) for one in there.log[:-1]
    ]
    assert gone == [([f"{text[:9]}@example.com"], f"{text}\r\n") for text in sent]
    assert there.announced == announced
    assert held[:-1] == ([2, 3, 2] if is_sent else [1 if is_canceled else 2, 1])


def test_a_mail_that_may_not_go_when_its_turn_comes_leaves_nothing_of_it_behind(
    outbox: Outbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The breaker opens meanwhile: its envelope is out, and the relay waits for its text."""
    ids = [accept(outbox, text) for text in TEXTS[:2]]
    with served({".": ["250 ok", "250 ok"]}, offers=PIPES) as (there, to):
        another(to)
        made = delivers(outbox, to)
        after = made._tell_breaker

        def trouble(*args: Any) -> None:
            after(*args)
            made.routes.ways[0].pacing.trouble(60, reply=Reply(Phase.CONNECT, None, "refused"))

        monkeypatch.setattr(made, "_tell_breaker", trouble)
        assert in_a_row(made, ids, monkeypatch) == ["sent", "delayed"]
        assert there.announced == 1
        assert outbox.read(ids[1])["reason"] == "the relay is in trouble"
        another(to)
    assert there.connections == 2
    assert len(there.accepted) == 3


def test_only_what_is_new_is_claimed_with_its_job_and_nothing_is_where_a_rate_is_set(
    outbox: Outbox, client: fakeredis.FakeRedis, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = (accept(outbox, text) for text in TEXTS[:2])
    client.hset(f"mail:{second}", "state", "failed")
    assert beside(outbox, second) is None  # whether a person has asked again its own attempt finds out
    with served(offers=PIPES) as (there, to):
        another(to)
        made = delivers(outbox, to)
        made.routes.ways[0].pacing = Pacing(outbox.jobs.redis, (Rate(1000, 1),))
        monkeypatch.setattr(delivery, "take_next", lambda: pytest.fail("took the next mail"))
        assert made.deliver(first) == "sent"
    assert there.announced == 0


def test_an_address_that_is_not_allowed_is_not_even_announced(outbox: Outbox, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = [accept(outbox, text) for text in TEXTS]
    monkeypatch.setattr(type(outbox.settings), "admits", lambda _, address: not address.startswith("two"))
    with served(offers=PIPES) as (there, to):
        another(to)
        assert in_a_row(delivers(outbox, to), ids, monkeypatch) == ["sent", "failed", "sent"]
    assert "two" not in "".join(there.commands)


def test_a_mail_whose_turn_never_comes_is_given_up_with_its_session(
    outbox: Outbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second, third = (accept(outbox, text) for text in TEXTS)
    with served(offers=PIPES) as (there, to):
        another(to)
        made = delivers(outbox, to)
        monkeypatch.setattr(delivery, "take_next", lambda: (second, beside(outbox, second)))
        made.deliver(first)
        assert len(HEARTBEATS) == 1
        monkeypatch.setattr(delivery, "take_next", lambda: ("", None))
        assert made.deliver(third) == "sent"
        assert there.connections == 2
    assert [b"three" in one for one in there.accepted] == [False, False, True]
