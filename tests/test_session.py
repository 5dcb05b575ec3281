"""What goes over the wire to a relay that answers, over a real socket: commands, addresses, bodies, refusals.

The relay of tests/relay.py is for getting along, a scripted one for all that a good server does not do.
"""

from __future__ import annotations

import re
import select
import socket
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from smtp.policy import Phase, Verdict
from smtp.verdict import Reply
from tests.conversations import ANSWERS, at, attempt, fate, meet, opened, took_less_than, write_ca
from tests.relay import Relay as HonestRelay
from tests.scripted_relay import Script, ScriptedRelay, Step, drip, hang, hang_up, last_words, raw, read_slowly, reset
from tests.servers import eventually
from tests.smtp_samples import ADA, BOB, CAY, LARGE, LOGIN, MIME, SENDER
from tests.verdicts import ACCEPTED, IN_DOUBT, REFUSED, TROUBLE, TRY_AGAIN

pytestmark = pytest.mark.usefixtures("nothing_is_left_open")


@pytest.mark.parametrize(
    ("security", "login"), [("none", None), ("starttls", None), ("starttls", LOGIN), ("tls", None), ("tls", LOGIN)]
)
def test_a_mail_goes_over_a_plain_connection_and_over_tls(
    security: str, login: tuple[str, str] | None, tmp_path: Path
) -> None:
    with HonestRelay(login=login, tls=security) as there:
        to = at(there.port, security=security, login=login or (None, None), ca_file=write_ca(there.authority, tmp_path))
        outcome = attempt(to, ADA, BOB)
    assert there.accepted == [(SENDER, [ADA, BOB], MIME)]
    assert fate(outcome) == (Phase.DOT, 250, ACCEPTED)
    assert list(outcome.recipients) == [ADA, BOB]


def test_the_commands_are_those_of_rfc_5321_and_no_more() -> None:
    there, _ = meet({}, ADA, BOB, offers=["SIZE 35882577", "8BITMIME", "SMTPUTF8"])
    hello, *rest = there.commands
    assert re.fullmatch(r"EHLO \S+", hello)
    envelope = [f"MAIL FROM:<{SENDER}> SIZE={len(MIME)}", f"RCPT TO:<{ADA}>", f"RCPT TO:<{BOB}>"]
    assert rest == [*envelope, "DATA", "QUIT"]
    assert there.accepted == [MIME]


def test_the_dot_does_not_wait_for_the_bodys_acknowledgement() -> None:
    with ScriptedRelay() as there, opened(at(there.port)) as session:
        assert session.smtp.sock
        assert session.smtp.sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


@pytest.mark.parametrize("refusal", ["500 5.5.1 what?", "502 5.5.1 what?"])
def test_a_relay_that_refuses_ehlo_is_greeted_with_helo(refusal: str) -> None:
    there, outcome = meet({"EHLO": refusal})
    assert outcome.reply.verdict is ACCEPTED
    assert [command.split()[0] for command in there.commands[:3]] == ["EHLO", "helo", "MAIL"]


@pytest.mark.parametrize("parting", ["421 closing", "500 what?", hang_up, reset, hang, drip(b"221 " + b"x" * 1000)])
def test_how_the_relay_takes_leave_changes_nothing_and_is_not_waited_for(parting: Step) -> None:
    with ScriptedRelay({"QUIT": parting}) as there, took_less_than(2):
        assert fate(attempt(at(there.port))) == (Phase.DOT, 250, ACCEPTED)
        eventually(lambda: there.commands[-1:] == ["QUIT"])
    assert there.accepted == [MIME]


def test_a_slow_line_may_take_longer_for_a_mail_than_one_timeout() -> None:
    with ScriptedRelay({"BODY": read_slowly(0.02)}) as there:
        start = time.monotonic()
        outcome = attempt(at(there.port, timeout=0.8, deadline=60), mime=LARGE)
        assert time.monotonic() - start > 0.8, "the relay was too fast to prove anything"
    assert fate(outcome) == (Phase.DOT, 250, ACCEPTED)
    assert there.accepted == [LARGE]


def test_a_slow_line_leaves_little_of_the_mail_on_its_way_when_it_is_in_doubt() -> None:
    left: list[int] = []
    with ScriptedRelay({"BODY": read_slowly(0.01)}) as there:
        attempt(at(there.port), mime=LARGE, before_dot=lambda _: left.append(len(LARGE) - len(there.heard)))
    assert left[0] < 1_000_000


@pytest.mark.parametrize("last_line", [b"no line end", b"a line end\r\n", b".", b".\r\n", b"", b"\r\n"])
def test_however_a_mail_ends_its_dot_stands_on_a_line_of_its_own(last_line: bytes) -> None:
    there, outcome = meet(mime=MIME + last_line)
    assert outcome.reply.verdict is ACCEPTED
    [body] = there.accepted
    assert unstuffed(body) in (MIME + last_line, MIME + last_line + b"\r\n")


def unstuffed(body: bytes) -> bytes:
    lines = body.split(b"\r\n")
    assert not any(line.startswith(b".") and not line.startswith(b"..") for line in lines)
    return b"\r\n".join(line[1:] if line.startswith(b".") else line for line in lines)


SMUGGLED = "MAIL FROM:<a@evil.example>\r\nRCPT TO:<b@evil.example>\r\nDATA\r\nFrom: ceo\r\n\r\npay\r\n.\r\n"
LINE_ENDS = ["\n", "\r", "\r\n", "\n\r", "\r\r\n", "\n\n", "\r\r"]


def assert_arrives(there: ScriptedRelay, body: bytes) -> None:
    """The relay takes it for one mail, and for the same but for its line ends."""
    del there.bodies[:], there.commands[:]
    assert attempt(at(there.port), mime=MIME + body).reply.verdict is ACCEPTED
    [arrived] = there.bodies
    assert unstuffed(arrived) == re.sub(rb"\r\n|\r|\n|(?<=[^\r\n])\Z", b"\r\n", MIME + body)
    assert {command.split()[0] for command in there.commands} <= {"EHLO", "MAIL", "RCPT", "DATA", "QUIT"}


@pytest.mark.parametrize("before", LINE_ENDS)
@pytest.mark.parametrize("after", LINE_ENDS)
def test_no_second_mail_can_be_smuggled_in_a_body(before: str, after: str) -> None:
    """A line end that only one side takes for one, around a dot, would end the mail for that side alone."""
    with ScriptedRelay() as there:
        assert_arrives(there, f"x{before}.{after}{SMUGGLED}".encode())


def test_any_body_arrives_to_the_byte() -> None:
    words = [b"\n", b"\r", b"\r\n", b".", b"..", b"x", b" ", b"=2E", "é\u2028😀".encode(), b"\x85", b"y" * 990]
    with ScriptedRelay() as there:

        @given(st.lists(st.sampled_from(words), max_size=24).map(b"".join))
        @hypothesis_settings(max_examples=150, deadline=None, database=None)
        def check(body: bytes) -> None:
            assert_arrives(there, body)

        check()


# Whom the relay refuses, and how


@pytest.mark.parametrize(
    ("replies", "code", "verdict"),
    [
        (["550 5.1.1 no", "551 5.1.6 no", "553 5.1.3 no"], 550, REFUSED),
        (["550 5.1.1 no", "450 4.2.1 busy", "550 5.1.1 no"], 450, TRY_AGAIN),
        (["550 5.1.1 no", "450 4.2.1 busy", "454 4.7.1 throttled"], 454, TROUBLE),
    ],
)
def test_no_data_is_sent_for_nobody(replies: list[Step], code: int, verdict: Verdict) -> None:
    called: list[object] = []
    there, outcome = meet({"RCPT": replies}, ADA, BOB, CAY, before_dot=called.append)
    assert "DATA" not in there.commands
    assert not called
    assert (outcome.reply.summary, outcome.reply.verdict) == (f"{code} at rcpt", verdict)
    assert [f"{reply.code} {reply.text}" for reply in outcome.recipients.values()] == replies


def test_a_relay_that_closes_at_a_recipient_keeps_its_word_about_the_earlier_ones() -> None:
    replies: list[Step] = ["550 5.1.1 no such user", "250 ok", last_words("421 4.3.2 closing"), "250 ok"]
    there, outcome = meet({"RCPT": replies}, ADA, BOB, CAY, "dan@example.com")
    closing = Reply(Phase.RCPT, 421, "4.3.2 closing")
    assert outcome.reply == closing
    assert outcome.reply.verdict is TROUBLE
    gone = Reply(Phase.RCPT, 550, "5.1.1 no such user")
    assert outcome.recipients == {ADA: gone, BOB: closing, CAY: closing, "dan@example.com": closing}
    assert not any("dan@" in command for command in there.commands)
    assert "DATA" not in there.commands


@pytest.mark.parametrize(
    ("script", "phase"),
    [
        ({"RCPT": ["550 5.1.1 no such user", hang_up]}, Phase.RCPT),
        ({"RCPT": ["550 5.1.1 no such user", "250 ok"], "DATA": hang_up}, Phase.DATA),
    ],
)
def test_a_refusal_outlives_the_connection(script: Script, phase: Phase) -> None:
    _, outcome = meet(script, ADA, BOB, CAY)
    lost = Reply(phase, None, "the relay closed the connection")
    assert outcome.reply == lost
    assert outcome.recipients == {ADA: Reply(Phase.RCPT, 550, "5.1.1 no such user"), BOB: lost, CAY: lost}


@pytest.mark.parametrize(
    ("step", "reply", "verdict"),
    [
        ("GREETING", "554 5.7.1 go away", TROUBLE),
        ("EHLO", "554 5.7.1 not from there", TROUBLE),
        ("MAIL", "451 4.3.0 not now", TROUBLE),
        ("MAIL", "550 5.7.1 not you", REFUSED),
        ("MAIL", "530 5.7.0 Must issue a STARTTLS command first", TROUBLE),
        ("DATA", "554 5.5.1 no valid recipients", REFUSED),
        ("DATA", "451 4.3.0 not now", TROUBLE),
        ("DATA", "250 2.0.0 ok", TROUBLE),
        (".", "451 4.3.0 queue file write error", TROUBLE),
        (".", "554 5.7.1 spam", REFUSED),
        (".", "454 Throttling failure: Maximum sending rate exceeded.", TROUBLE),
        (".", "354 go on", IN_DOUBT),
    ],
)
def test_an_answer_decides_for_all_who_were_not_refused(step: str, reply: str, verdict: Verdict) -> None:
    there, outcome = meet({step: reply}, ADA, BOB)
    assert fate(outcome) == (ANSWERS[step][0], int(reply[:3]), verdict)
    assert outcome.reply.text == reply[4:]
    assert not there.accepted
    assert there.commands[-1] == "QUIT"


# Addresses


@pytest.mark.parametrize(
    "evil",
    [
        "eve@example.com>\r\nRCPT TO:<mallory@example.com",
        "eve@example.com\r\nDATA",
        "eve@example.com\nDATA",
        "eve@example.com\rDATA",
        "eve@example.com> NOTIFY=NEVER <eve@example.com",
        "eve@example.com SIZE=1",
        "eve@example.com\0",
        "",
    ],
)
def test_an_address_that_would_be_another_command_is_refused_unsent(evil: str) -> None:
    with ScriptedRelay() as there:
        outcome = attempt(at(there.port), ADA, evil, BOB)
        refused = attempt(at(there.port), ADA, BOB, sender=evil)
        assert fate(attempt(at(there.port), evil)) == (Phase.RCPT, 553, REFUSED)
    assert outcome.recipients[evil].verdict is REFUSED
    assert [outcome.recipients[one].verdict for one in (ADA, BOB)] == [ACCEPTED, ACCEPTED]
    assert fate(refused) == ((Phase.MAIL, 553, REFUSED) if evil else (Phase.DOT, 250, ACCEPTED))  # "": the null sender
    once = [f"MAIL FROM:<{SENDER}>", f"RCPT TO:<{ADA}>", f"RCPT TO:<{BOB}>", "DATA", "QUIT"]
    null: list[str] = [] if evil else ["MAIL FROM:<>", *once[1:4]]
    assert [one for one in there.commands if not one.startswith("EHLO")] == [*once, *null, "QUIT", "QUIT"]
    assert there.accepted == [MIME] * (1 if evil else 2)


@pytest.mark.parametrize(
    "address", ["o'neil+x@example.com", "a(b)@example.com", "a,b@example.com", "a@b@example.com", "þór@example.com"]
)
def test_an_address_goes_out_to_the_letter(address: str) -> None:
    """smtplib would send what a header parser makes of it: `a@example.com`, which is somebody else."""
    there, outcome = meet({}, address, sender=address, offers=["SMTPUTF8"], smtputf8=True)
    assert there.commands[1:3] == [f"MAIL FROM:<{address}> SMTPUTF8", f"RCPT TO:<{address}>"]
    assert fate(outcome) == (Phase.DOT, 250, ACCEPTED)


@pytest.mark.parametrize(("needed", "option"), [(False, ""), (True, " SMTPUTF8")])
def test_smtputf8_is_asked_for_only_where_it_is_needed(needed: bool, option: str) -> None:
    there, _ = meet(offers=["SMTPUTF8"], smtputf8=needed)
    assert there.commands[1] == f"MAIL FROM:<{SENDER}>{option}"


def test_a_mail_of_8_bits_goes_only_to_a_relay_that_takes_it() -> None:
    there, _ = meet(offers=["8BITMIME"], eight_bit=True)
    assert there.commands[1] == f"MAIL FROM:<{SENDER}> BODY=8BITMIME"
    there, outcome = meet(eight_bit=True)
    assert (fate(outcome), there.commands[1:]) == ((Phase.MAIL, 550, REFUSED), ["QUIT"])


def test_a_utf8_address_is_refused_where_the_relay_cannot_take_it() -> None:
    there, outcome = meet({}, ADA, "jürgen@example.com", smtputf8=True)
    assert fate(outcome) == (Phase.MAIL, 550, REFUSED)
    assert there.commands[1:] == ["QUIT"]


def test_a_utf8_address_never_goes_out_unannounced() -> None:
    there, outcome = meet({}, "jürgen@example.com", ADA, offers=["SMTPUTF8"])
    assert outcome.recipients["jürgen@example.com"].verdict is REFUSED
    assert outcome.recipients[ADA].verdict is ACCEPTED
    assert there.heard.isascii()


# Replies that are not SMTP


@pytest.mark.parametrize("step", ["GREETING", "EHLO", "MAIL", "RCPT", "DATA", "."])
@pytest.mark.parametrize(
    "reply",
    [b"2" * 20_000, b"250 " + b"x" * 9_000, b"+OK Dovecot ready", b"SSH-2.0", b"", b"120 x", b"-250 x", b"999 x"],
)
def test_a_reply_that_is_not_smtp_ends_the_conversation(step: str, reply: bytes) -> None:
    """After it nobody could say which reply belongs to which recipient."""
    there, outcome = meet({step: raw(reply + b"\r\n")}, ADA, BOB)
    assert fate(outcome)[::2] == ANSWERS[step]
    assert outcome.reply.code not in range(200, 600)
    assert not any(BOB in command for command in there.commands) or step in ("DATA", ".")


@pytest.mark.parametrize(
    ("data", "text"),
    [
        ("250 2.0.0 größe ✓\r\n".encode(), "2.0.0 größe ✓"),
        (b"250 2.0.0 gr\xf6\xdfe\r\n", "2.0.0 gr\ufffd\ufffde"),
        (b"250\r\n", ""),
        (b"250 " + b"long " * 1000 + b"\r\n", "long " * 100),
    ],
)
def test_any_bytes_in_a_reply_are_kept_as_text(data: bytes, text: str) -> None:
    _, outcome = meet({".": raw(data)})
    assert outcome.reply == Reply(Phase.DOT, 250, text)


@pytest.mark.parametrize("code", [200, 599])
def test_the_lowest_and_the_highest_code_of_smtp_are_replies(code: int) -> None:
    there, outcome = meet({"RCPT": f"{code} said"}, ADA, BOB)
    assert outcome.reply.verdict is (ACCEPTED if code == 200 else REFUSED)
    assert [command for command in there.commands if BOB in command]


@pytest.mark.parametrize("death", [hang_up, reset, "421 4.4.2 closing"])
def test_a_session_is_quiet_until_the_relay_says_or_does_something(death: Step) -> None:
    with ScriptedRelay({"500": death}) as there, opened(at(there.port)) as session:
        assert session.is_quiet()
        session.smtp.putcmd("NONSENSE")
        assert select.select([session.sock], [], [], 10)[0]
        assert not session.is_quiet()
