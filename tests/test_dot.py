"""The final dot: what is out before it, what it puts in doubt, how few round trips a mail takes."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping

import pytest

from smtp import session
from smtp.policy import Phase, Verdict
from smtp.verdict import Reply
from tests.conversations import another, at, attempt, fate, meet, opened, served
from tests.scripted_relay import Line, Script, ScriptedRelay, Step, hang_up, raw, reset
from tests.servers import eventually
from tests.smtp_samples import ADA, BOB, CAY, LARGE, MIME, PIPES, SENDER, WAYS
from tests.verdicts import ACCEPTED, IN_DOUBT, REFUSED, TROUBLE, TRY_AGAIN

pytestmark = pytest.mark.usefixtures("nothing_is_left_open")


@pytest.mark.parametrize(("mime", "heard"), [(MIME, b""), (LARGE, LARGE)], ids=["small", "large"])
def test_begin_sends_the_envelope_or_all_but_the_dot_and_knows_the_replies_about_recipients(
    mime: bytes, heard: bytes
) -> None:
    calls: list[dict[str, Reply]] = []

    def look(replies: Mapping[str, Reply]) -> None:
        calls.append(dict(replies))
        eventually(lambda: there.heard.endswith(heard[-10:] or b"DATA\r\n"))
        time.sleep(0.1)
        assert bytes(there.heard).endswith(b"DATA\r\n" + heard)
        assert not there.bodies

    with ScriptedRelay({"RCPT": ["250 2.1.5 ok", "550 5.1.1 no", "450 4.2.1 busy"]}) as there:
        outcome = attempt(at(there.port), ADA, BOB, CAY, mime=mime, before_dot=look)
    refused = {BOB: Reply(Phase.RCPT, 550, "5.1.1 no"), CAY: Reply(Phase.RCPT, 450, "4.2.1 busy")}
    assert calls == [{ADA: Reply(Phase.RCPT, 250, "2.1.5 ok"), **refused}]
    assert outcome.recipients == {ADA: outcome.reply, **refused}
    assert outcome.reply == Reply(Phase.DOT, 250, "2.0.0 queued as 4711")
    assert there.accepted == [mime]


@WAYS
@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
def test_a_conversation_that_ends_between_begin_and_finish_has_sent_nothing(
    offers: list[str], error: type[BaseException]
) -> None:
    """Not even a QUIT may follow: the relay would take it for the end of the mail."""

    def refuse(_: object) -> None:
        raise error("lost the claim")

    with ScriptedRelay(offers=offers) as there:
        with pytest.raises(error, match="lost the claim"):
            attempt(at(there.port), before_dot=refuse, mime=LARGE)
        eventually(lambda: there.heard.endswith(LARGE[-10:]))
    assert there.heard.endswith(b"DATA\r\n" + LARGE)
    assert not there.bodies


def test_an_interrupted_caller_leaves_nothing_open() -> None:
    with ScriptedRelay() as there, pytest.raises(KeyboardInterrupt), opened(at(there.port)):
        raise KeyboardInterrupt
    assert there.commands[-1] == "QUIT"


@pytest.mark.parametrize(("offers", "trips"), [([], 4), (["CHUNKING"], 4), (PIPES, 2), ([*PIPES, "CHUNKING"], 2)])
def test_a_mail_on_a_warm_session_takes_as_few_round_trips_as_the_relay_allows(offers: list[str], trips: int) -> None:
    with served(offers=offers, latency=0.01) as (there, to):
        another(to)
        before = there.turns
        for _ in range(5):
            assert another(to).reply.verdict is ACCEPTED
        assert there.turns - before == 5 * trips
        assert there.connections == 1
    assert there.accepted == [MIME] * 6


def test_what_is_pipelined_is_what_is_said_without() -> None:
    there, _ = meet({}, ADA, BOB, offers=[*PIPES, "SIZE"])
    envelope = [f"MAIL FROM:<{SENDER}> SIZE={len(MIME)}", f"RCPT TO:<{ADA}>", f"RCPT TO:<{BOB}>"]
    assert there.commands[1:] == [*envelope, "DATA", "QUIT"]


def test_a_large_mail_waits_for_the_replies_about_its_recipients() -> None:
    nobody: Script = {"RCPT": "550 5.1.1 no", "DATA": "554 no valid recipients"}
    there, outcome = meet(nobody, offers=PIPES, mime=LARGE)
    assert fate(outcome) == (Phase.RCPT, 550, REFUSED)
    assert len(there.heard) < 1000


@WAYS
@pytest.mark.parametrize("size", [1, 7, 10_000])
def test_replies_to_many_commands_may_come_in_any_number_of_packets(offers: list[str], size: int) -> None:
    together: list[bytes] = []

    def gathered(text: bytes) -> Step:
        def act(line: Line) -> str:
            together.append(text + b"\r\n")
            if offers == [] or text.startswith((b"354", b"250-2.0.0")):
                raw(b"".join(together), size)(line)
                together.clear()
            return text.decode()

        return act

    script: Script = {
        "GREETING": raw(b"220-relay.example\r\n220-welcomes\r\n220 you\r\n", size),
        "EHLO": raw("\r\n".join(["250-relay.example", *(f"250-{it}" for it in offers), "250 HELP\r\n"]).encode(), size),
        "MAIL": gathered(b"250-2.1.0 fine\r\n250 go on"),
        "RCPT": [gathered(b"250 2.1.5 liked"), gathered(b"550-5.1.1 not\r\n550 5.1.1 here")],
        "DATA": gathered(b"354-end with\r\n354 a dot"),
        ".": gathered(b"250-2.0.0 thanks\r\n250 2.0.0 4711"),
    }
    there, outcome = meet(script, ADA, BOB)
    assert there.accepted == [MIME]
    assert outcome.reply == Reply(Phase.DOT, 250, "2.0.0 thanks 2.0.0 4711")
    assert outcome.recipients == {ADA: outcome.reply, BOB: Reply(Phase.RCPT, 550, "5.1.1 not 5.1.1 here")}


@pytest.mark.parametrize(
    ("offers", "script", "phase", "verdict"),
    [
        (PIPES, {"MAIL": hang_up}, Phase.MAIL, TROUBLE),
        (PIPES, {"RCPT": hang_up}, Phase.RCPT, TROUBLE),
        (PIPES, {"DATA": hang_up}, Phase.DATA, TROUBLE),
        (PIPES, {"RCPT": raw(b"what?\r\n")}, Phase.RCPT, TROUBLE),
        (PIPES, {"RCPT": "354 go"}, Phase.RCPT, TROUBLE),
    ],
)
def test_with_too_few_replies_or_wrong_ones_no_mail_goes_out(
    offers: list[str], script: Script, phase: Phase, verdict: Verdict
) -> None:
    _, outcome = meet(script, ADA, BOB, offers=offers)
    assert fate(outcome)[::2] == (phase, verdict)


@WAYS
def test_a_refused_recipient_keeps_its_reply_when_the_rest_is_in_doubt(offers: list[str]) -> None:
    _, outcome = meet({"RCPT": ["550 5.1.1 no", "250 ok"], ".": hang_up}, ADA, BOB, offers=offers)
    assert [reply.verdict for reply in outcome.recipients.values()] == [REFUSED, IN_DOUBT]


@pytest.mark.parametrize("refusal", ["MAIL", "RCPT"])
def test_no_mail_is_sent_for_nobody_though_the_relay_invites_one(refusal: str) -> None:
    """RFC 2920 3.1 would have an empty one sent, and trust the relay to refuse that; closing needs no trust."""
    called: list[object] = []
    there, outcome = meet({refusal: "550 5.1.1 no"}, offers=PIPES, before_dot=called.append)
    assert fate(outcome) == (Phase(refusal.lower()), 550, REFUSED)
    assert there.heard.endswith(b"DATA\r\n")
    assert not called
    assert not there.bodies


@WAYS
def test_an_end_that_cannot_go_out_leaves_nothing_in_doubt(offers: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session, "SMALL", 0)
    gone = threading.Event()

    def go(line: Line) -> str:
        gone.set()
        return reset(line)

    def wait_for_the_reset(_: object) -> None:
        assert gone.wait(5)
        time.sleep(0.1)  # until the kernel has taken notice

    there, outcome = meet({"BODY": go}, offers=offers, before_dot=wait_for_the_reset)
    assert fate(outcome) == (Phase.TRANSFER, None, TRY_AGAIN)
    assert not there.bodies


@pytest.mark.parametrize("way", [hang_up, reset])
def test_a_small_mail_is_not_in_doubt_where_the_relay_has_hung_up_before_its_text(way: Callable[[Line], str]) -> None:
    def go(line: Line) -> str:
        line.say("354 go on")
        return way(line)

    there, outcome = meet({"DATA": go}, before_dot=lambda _: time.sleep(0.3))
    assert fate(outcome) == (Phase.TRANSFER, None, TRY_AGAIN)
    assert not there.bodies


@pytest.mark.parametrize("cut", [b"2", b"250", b"250 2.0.0 que", b"250-2.0.0 queued\r\n250 as 4711"])
def test_a_reply_that_is_cut_off_is_none(cut: bytes) -> None:
    def part(line: Line) -> str:
        line.say_raw(cut)
        return hang_up(line)

    assert fate(meet({".": part})[1]) == (Phase.DOT, None, IN_DOUBT)
