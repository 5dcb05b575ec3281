"""The relay's side of the promise: what each answer means, and what goes over the wire to a relay of any temper.

The judgement is asked as a table. Everything else is a conversation over a real socket: with an aiosmtpd that speaks
TLS and AUTH (tests/relay.py) where it is about getting along, and with a scripted relay where it is about trouble.
"""

from __future__ import annotations

import base64
import gc
import hmac
import os
import re
import socket
import ssl
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import pytest
import trustme
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from mail.address import Mailbox
from mail.message import compose
from mail.mime import to_mime
from mail.request import parse
from smtp import pool, session
from smtp.session import Relay, Session, Stopped
from smtp.verdict import Outcome, Phase, Reply, Verdict, judge
from tests.relay import Relay as HonestRelay
from tests.scripted_relay import (
    OBLIGING,
    Line,
    Script,
    ScriptedRelay,
    Step,
    drip,
    hang,
    hang_up,
    last_words,
    pieces,
    raw,
    read_slowly,
    reset,
)
from tests.servers import eventually, free_port

ADA, BOB, CAY = "ada@example.com", "bob@example.com", "cay@example.com"
SENDER = "sender@example.com"
MIME = b"Subject: Hello\r\nTo: ada@example.com\r\n\r\nHello, Ada.\r\n"
LARGE = MIME + (b"x" * 70 + b"\r\n") * 100_000 + b"The end.\r\n"  # 7 MB: more than sockets buffer
LOGIN = ("mailer", "planted-password")
ACCEPTED, TRY_AGAIN, REFUSED = Verdict.ACCEPTED, Verdict.TRY_AGAIN, Verdict.REFUSED
IN_DOUBT, TROUBLE = Verdict.IN_DOUBT, Verdict.TROUBLE


@pytest.fixture(scope="module", autouse=True)
def _collecting_is_quick() -> Iterator[None]:
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(autouse=True)
def _nothing_is_left_open() -> Iterator[None]:
    """No thread, no socket; an unclosed one that is collected here warns, and warnings are errors."""
    threads, handles = set(threading.enumerate()), len(os.listdir("/dev/fd"))
    yield
    pool.close_all()
    gc.collect()
    eventually(lambda: set(threading.enumerate()) == threads)
    assert len(os.listdir("/dev/fd")) == handles


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    return trustme.CA()


@pytest.fixture(scope="module")
def ca_file(authority: trustme.CA, tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_ca(authority, tmp_path_factory.mktemp("ca"))


def write_ca(authority: trustme.CA, directory: Path) -> str:
    path = directory / "ca.pem"
    authority.cert_pem.write_to_path(str(path))
    return str(path)


def server_context(authority: trustme.CA, name: str = "127.0.0.1", **options: Any) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert(name, **options).configure_cert(context)
    return context


def at(port: int, **changes: Any) -> Relay:
    plain = Relay("127.0.0.1", port, "none", None, None, None, timeout=5, deadline=10)
    if "login" in changes:
        changes["username"], changes["password"] = changes.pop("login")
    return plain._replace(**changes)


def attempt(
    to: Relay,
    *recipients: str,
    sender: str = SENDER,
    mime: bytes = MIME,
    smtputf8: bool = False,
    before_dot: Callable[[Mapping[str, Reply]], None] = lambda replies: None,
) -> Outcome:
    """On a session of its own."""
    try:
        return another(to, *recipients, sender=sender, mime=mime, smtputf8=smtputf8, before_dot=before_dot)
    finally:
        pool.close_all()


def another(
    to: Relay,
    *recipients: str,
    sender: str = SENDER,
    mime: bytes = MIME,
    smtputf8: bool = False,
    before_dot: Callable[[Mapping[str, Reply]], None] = lambda replies: None,
) -> Outcome:
    """On the session that the last one left, if it left any."""
    with pool.conversation(to) as conversation:
        return conversation.send(sender, recipients or (ADA,), mime, smtputf8=smtputf8, before_dot=before_dot)


@contextmanager
def opened(to: Relay) -> Iterator[Session]:
    with pool.conversation(to) as conversation:
        conversation.session.open()
        yield conversation.session


def transact(
    session: Session, sender: str = SENDER, mime: bytes = MIME, before_dot: Callable[[], None] = lambda: None
) -> Reply:
    replies: dict[str, Reply] = {}
    return session.transact(session.letter(sender, [ADA], mime, False, replies), replies, before_dot)


def fate(outcome: Outcome) -> tuple[Phase, int | None, Verdict]:
    """Of an attempt that met all recipients alike."""
    assert set(outcome.recipients.values()) == {outcome.reply}
    return outcome.reply.phase, outcome.reply.code, outcome.verdict


@contextmanager
def took_less_than(seconds: float) -> Iterator[None]:
    start = time.monotonic()
    yield
    assert time.monotonic() - start < seconds


# The judgement

# reference/mail-and-ops.md 1.3, row by row, with the replies it quotes as those relays word them.
QUOTED = [
    # DNS, connect or TLS error, 421 on greeting, timeout before the dot
    (Phase.CONNECT, None, "Name or service not known", TROUBLE),
    (Phase.STARTTLS, None, "the relay's certificate is not valid: certificate has expired", TROUBLE),
    (Phase.GREETING, 421, "4.7.0 Try again later, closing connection.", TROUBLE),
    (Phase.GREETING, 421, "Too many concurrent SMTP connections; please try again later.", TROUBLE),
    (Phase.MAIL, None, "timed out", TROUBLE),
    (Phase.RCPT, None, "timed out", TROUBLE),
    (Phase.DATA, None, "timed out", TROUBLE),
    # ... but in the middle of the body the mail itself may be the reason, so that it must not be tried for ever
    (Phase.TRANSFER, None, "timed out", TRY_AGAIN),
    # timeout or disconnect after the dot
    (Phase.DOT, None, "timed out", IN_DOUBT),
    (Phase.DOT, None, "the relay closed the connection", IN_DOUBT),
    # 421, 450, 451, 452 on RCPT or DATA; too many recipients; 432
    (Phase.RCPT, 421, "4.7.28 Gmail has detected an unusual rate of unsolicited mail", TRY_AGAIN),
    (Phase.RCPT, 450, "4.2.1 The user you are trying to contact is receiving mail too quickly", TRY_AGAIN),
    (Phase.RCPT, 451, "4.7.1 Greylisting in action, please come back later", TRY_AGAIN),
    (Phase.RCPT, 452, "4.5.3 Your message has too many recipients", TRY_AGAIN),
    (Phase.RCPT, 552, "5.5.3 too many recipients", TRY_AGAIN),
    (Phase.DATA, 421, "4.4.2 Connection dropped", TRY_AGAIN),
    (Phase.DATA, 450, "4.2.0 try later", TRY_AGAIN),
    (Phase.DATA, 451, "4.3.0 Mail server temporarily rejected message.", TRY_AGAIN),
    (Phase.DATA, 452, "4.3.1 Insufficient system storage", TRY_AGAIN),
    (Phase.DOT, 451, "4.3.0 queue file write error", TRY_AGAIN),
    (Phase.RCPT, 432, "4.3.2 Concurrent connections limit exceeded.", TROUBLE),
    (Phase.DOT, 432, "4.3.2 STOREDRV.ClientSubmit; sender thread limit exceeded", TROUBLE),
    # 454: on AUTH, and the throttle of SES
    (Phase.AUTH, 454, "4.7.0 Too many login attempts, please try again later.", TROUBLE),
    (Phase.AUTH, 454, "Temporary authentication failure", TROUBLE),
    (Phase.MAIL, 454, "Throttling failure: Maximum sending rate exceeded.", TROUBLE),
    (Phase.DOT, 454, "Throttling failure: Maximum sending rate exceeded.", TROUBLE),
    (Phase.DOT, 454, "Throttling failure: Daily message quota exceeded.", TROUBLE),
    # 535, 534, 530: the login, or STARTTLS required
    (Phase.AUTH, 535, "5.7.8 Username and Password not accepted.", TROUBLE),
    (Phase.AUTH, 535, "5.7.139 Authentication unsuccessful, SmtpClientAuthentication is disabled", TROUBLE),
    (Phase.AUTH, 534, "5.7.9 Application-specific password required.", TROUBLE),
    (Phase.AUTH, 530, "5.7.0 Must issue a STARTTLS command first.", TROUBLE),
    (Phase.MAIL, 530, "5.7.0 Must issue a STARTTLS command first.", TROUBLE),
    (Phase.MAIL, 530, "5.7.57 Client not authenticated to send mail.", TROUBLE),
    (Phase.MAIL, 535, "Authentication Credentials Invalid", TROUBLE),
    (Phase.MAIL, 534, "5.7.9 Authentication mechanism is too weak", TROUBLE),
    (Phase.MAIL, 538, "5.7.11 Encryption required for requested authentication mechanism", TROUBLE),
    (Phase.RCPT, 530, "Authentication required", TROUBLE),
    # 550 5.4.5: Gmail's quota
    (Phase.MAIL, 550, "5.4.5 Daily user sending limit exceeded.", TROUBLE),
    (Phase.DATA, 550, "5.4.5 Daily user sending limit exceeded.", TROUBLE),
    (Phase.DOT, 550, "5.4.5 Daily SMTP relay limit exceeded for customer.", TROUBLE),
    # 550 5.7.30 and 5.2.251-255: Microsoft 365
    (Phase.MAIL, 550, "5.7.30 Basic authentication is not supported for Client Submission.", TROUBLE),
    (Phase.MAIL, 550, "5.2.251 Sender throttled due to continuous mailbox full errors.", TROUBLE),
    (Phase.DATA, 550, "5.2.252 Sender throttled due to continuous send as denied errors.", TROUBLE),
    (Phase.DOT, 550, "5.2.253 Sender throttled due to continuous invalid license errors.", TROUBLE),
    (Phase.DOT, 550, "5.2.254 Sender throttled due to continuous too many recipients errors.", TROUBLE),
    (Phase.DOT, 550, "5.2.255 Sender throttled due to continuous invalid recipients errors.", TROUBLE),
    # 5xx on RCPT or MAIL, 552 size, 554 content
    (Phase.MAIL, 550, "5.7.60 SMTP; Client does not have permissions to send as this sender", REFUSED),
    (Phase.MAIL, 552, "5.2.3 Your message exceeded Google's message size limits.", REFUSED),
    (Phase.MAIL, 553, "5.7.1 Sender address rejected: not owned by user", REFUSED),
    (Phase.RCPT, 550, "5.1.1 The email account that you tried to reach does not exist.", REFUSED),
    (Phase.RCPT, 551, "5.1.6 User has moved", REFUSED),
    (Phase.RCPT, 553, "5.1.3 The recipient address is not a valid address.", REFUSED),
    (Phase.TRANSFER, 552, "5.3.4 Message size exceeds fixed limit", REFUSED),
    (Phase.DOT, 552, "5.3.4 Message size exceeds fixed limit", REFUSED),
    (Phase.DATA, 554, "5.5.1 Error: no valid recipients", REFUSED),
    (Phase.DOT, 554, "Message rejected: Email address is not verified.", REFUSED),
    (Phase.DOT, 554, "5.7.1 Spam message rejected", REFUSED),
    (Phase.DOT, 554, "5.2.252 SendAsDenied; this login may not send as that sender", REFUSED),
    # not supported: STARTTLS, AUTH, SMTPUTF8
    (Phase.STARTTLS, None, "STARTTLS extension not supported by server.", TROUBLE),
    (Phase.STARTTLS, 454, "4.7.0 TLS not available due to local problem", TROUBLE),
    (Phase.AUTH, None, "the relay offers no AUTH PLAIN, LOGIN or CRAM-MD5", TROUBLE),
    (Phase.MAIL, 550, "5.6.7 the relay does not offer SMTPUTF8", REFUSED),
    # 5xx greeting
    (Phase.GREETING, 554, "5.7.1 Your access to this mail system has been rejected", TROUBLE),
]

# A: accepted, which before DOT means go on. t: try again, r: refused, d: in doubt, !: trouble.
MATRIX = """
           none 150 200 220 235 250 299 334 354 399 421 450 499 503 530 550 599  -1   0 999
connect    !    !   !   !   !   !   !   !   !   !   !   !   !   !   !   !   !    !   !  !
greeting   !    !   A   A   A   A   A   !   !   !   !   !   !   !   !   !   !    !   !  !
hello      !    !   A   A   A   A   A   !   !   !   !   !   !   !   !   !   !    !   !  !
starttls   !    !   !   A   !   !   !   !   !   !   !   !   !   !   !   !   !    !   !  !
auth       !    !   !   !   A   !   !   !   !   !   !   !   !   !   !   !   !    !   !  !
mail       !    !   A   A   A   A   A   !   !   !   t   t   t   t   !   r   r    !   !  !
rcpt       !    !   A   A   A   A   A   !   !   !   t   t   t   t   !   r   r    !   !  !
data       !    !   !   !   !   !   !   !   A   !   t   t   t   t   !   r   r    !   !  !
transfer   t    !   !   !   !   !   !   !   !   !   t   t   t   t   !   r   r    !   !  !
dot        d    d   A   A   A   A   A   d   d   d   t   t   t   t   !   r   r    d   d  d
"""
LETTERS = {"A": ACCEPTED, "t": TRY_AGAIN, "r": REFUSED, "d": IN_DOUBT, "!": TROUBLE}


def cells() -> Iterator[tuple[Phase, int | None, Verdict]]:
    head, *rows = (line.split() for line in MATRIX.strip().splitlines())
    for name, *letters in rows:
        for code, letter in zip(head, letters, strict=True):
            yield Phase(name), None if code == "none" else int(code), LETTERS[letter]


@pytest.mark.parametrize(("phase", "code", "text", "verdict"), QUOTED)
def test_a_reply_means_what_the_reference_says(phase: Phase, code: int | None, text: str, verdict: Verdict) -> None:
    assert judge(phase, code, text) is verdict


@pytest.mark.parametrize(("phase", "code", "verdict"), list(cells()))
def test_every_class_of_code_has_one_meaning_in_each_phase(phase: Phase, code: int | None, verdict: Verdict) -> None:
    assert judge(phase, code) is judge(phase, code, "any words") is verdict


@pytest.mark.parametrize(
    ("code", "text", "seconds"),
    [
        (451, "4.7.1 Greylisted, please try again in 300 seconds", 300),
        (450, "4.2.0 <x@example.com>: Recipient address rejected: Greylisted, try again in 5 minutes", 300),
        (421, "4.7.0 Try again later, wait 1 hour", 3600),
        (451, "4.7.1 Greylisting in action, please come back in 00:04:59", 299),
        (452, "4.3.1 retry after 90s", 90),
        (451, "4.7.1 come back IN 2 MIN", 120),
        (451, "4.7.1 try again in 99999 hours", 12 * 3600),
        (451, "4.7.1 try again later", 0),
        (451, "4.3.2 5 messages in 1 month", 0),
        (550, "5.7.1 blocked for 24 hours", 0),  # refused is refused
        (250, "2.0.0 queued, will be sent in 5 minutes", 0),
    ],
)
def test_how_long_a_relay_asks_to_be_left_alone(code: int, text: str, seconds: int) -> None:
    assert Reply(Phase.RCPT, code, text).pause == seconds


def test_the_matrix_leaves_no_phase_out() -> None:
    assert {phase for phase, _, _ in cells()} == set(Phase)


@given(st.sampled_from(Phase), st.none() | st.integers() | st.integers(100, 600), st.text())
@hypothesis_settings(max_examples=1000, database=None)
def test_the_judgement_never_promises_too_much_and_never_raises(phase: Phase, code: int | None, text: str) -> None:
    verdict = judge(phase, code, text)
    good = {354} if phase is Phase.DATA else range(200, 300)
    assert verdict is not ACCEPTED or code in good
    assert verdict is not IN_DOUBT or phase is Phase.DOT
    assert code is not None or verdict is not REFUSED


@pytest.mark.parametrize("address", ["x-5.4.5@example.com", "5.4.5@example.com", "5.2.251@example.com"])
def test_an_address_in_a_refusal_does_not_turn_it_into_a_throttle(address: str) -> None:
    """Else whoever signs up with such an address stops all mail of this service, again and again."""
    mailbox = address.split("@")[0]
    for unknown in (f"5.1.1 <{address}>: who?", f"<{address}> who?", f"{address} who?", f"who is {mailbox} ?"):
        assert judge(Phase.RCPT, 550, unknown) is REFUSED


# A mail that arrives


def test_a_mail_goes_over_a_plain_connection() -> None:
    with HonestRelay() as there:
        outcome = attempt(at(there.port), ADA, BOB)
    [delivery] = there.accepted
    assert (delivery.sender, delivery.recipients, delivery.content) == (SENDER, [ADA, BOB], MIME)
    assert fate(outcome) == (Phase.DOT, 250, ACCEPTED)
    assert list(outcome.recipients) == [ADA, BOB]


@pytest.mark.parametrize(("security", "login"), [("starttls", None), ("starttls", LOGIN), ("tls", None)])
def test_a_mail_goes_over_tls(security: str, login: tuple[str, str] | None, tmp_path: Path) -> None:
    with HonestRelay(login=login, tls=security) as there:
        ca_file = write_ca(there.authority, tmp_path)
        outcome = attempt(at(there.port, security=security, login=login or (None, None), ca_file=ca_file))
    assert [delivery.content for delivery in there.accepted] == [MIME]
    assert fate(outcome) == (Phase.DOT, 250, ACCEPTED)


def test_a_login_goes_over_implicit_tls(authority: trustme.CA, ca_file: str) -> None:
    with ScriptedRelay(
        {"AUTH": expect_plain}, offers=["AUTH PLAIN"], tls=server_context(authority), implicit=True
    ) as there:
        outcome = attempt(at(there.port, security="tls", login=LOGIN, ca_file=ca_file))
    assert outcome.verdict is ACCEPTED
    assert there.accepted == [MIME]


def test_the_commands_are_those_of_rfc_5321_and_no_more() -> None:
    with ScriptedRelay(offers=["SIZE 35882577", "8BITMIME", "SMTPUTF8"]) as there:
        attempt(at(there.port), ADA, BOB)
    hello, *rest = there.commands
    assert re.fullmatch(r"ehlo \S+", hello)
    assert rest == [
        f"MAIL FROM:<{SENDER}> SIZE={len(MIME)}",
        f"RCPT TO:<{ADA}>",
        f"RCPT TO:<{BOB}>",
        "DATA",
        "QUIT",
    ]
    assert there.accepted == [MIME]


def test_the_dot_does_not_wait_for_the_bodys_acknowledgement() -> None:
    with ScriptedRelay() as there, opened(at(there.port)) as session:
        assert session.smtp.sock
        assert session.smtp.sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


def test_no_size_is_declared_to_a_relay_that_did_not_ask() -> None:
    with ScriptedRelay() as there:
        assert attempt(at(there.port)).verdict is ACCEPTED
    assert f"MAIL FROM:<{SENDER}>" in there.commands


def test_a_relay_that_refuses_ehlo_is_greeted_with_helo() -> None:
    with ScriptedRelay({"EHLO": "502 5.5.1 what?"}) as there:
        assert attempt(at(there.port)).verdict is ACCEPTED
    assert [command.split()[0] for command in there.commands[:3]] == ["ehlo", "helo", "MAIL"]


@pytest.mark.parametrize("octets", [1, 5])
def test_replies_may_come_in_any_number_of_packets_and_lines(octets: int) -> None:
    script: Script = {
        "GREETING": pieces("220-relay.example\r\n220-welcomes\r\n220 you", octets),
        "EHLO": pieces("250-relay.example\r\n250-SIZE 100000\r\n250 SMTPUTF8", octets),
        "MAIL": pieces("250-2.1.0 fine\r\n250 2.1.0 go on", octets),
        "RCPT": [pieces("250-2.1.5 known\r\n250 liked", octets), pieces("550-5.1.1 not\r\n550 5.1.1 here", octets)],
        "DATA": pieces("354-end with\r\n354 a dot", octets),
        ".": pieces("250-2.0.0 thanks\r\n250 2.0.0 4711", octets),
    }
    with ScriptedRelay(script) as there:
        outcome = attempt(at(there.port), ADA, BOB)
    assert there.accepted == [MIME]
    assert outcome.reply == Reply(Phase.DOT, 250, "2.0.0 thanks 2.0.0 4711")
    assert outcome.recipients == {ADA: outcome.reply, BOB: Reply(Phase.RCPT, 550, "5.1.1 not 5.1.1 here")}


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
    with ScriptedRelay() as there:
        assert attempt(at(there.port), mime=MIME + last_line).verdict is ACCEPTED
    [body] = there.accepted
    assert unstuffed(body) in (MIME + last_line, MIME + last_line + b"\r\n")


def unstuffed(body: bytes) -> bytes:
    lines = body.split(b"\r\n")
    assert not any(line.startswith(b".") and not line.startswith(b"..") for line in lines)
    return b"\r\n".join(line[1:] if line.startswith(b".") else line for line in lines)


SMUGGLED = "MAIL FROM:<a@evil.example>\r\nRCPT TO:<b@evil.example>\r\nDATA\r\nFrom: ceo\r\n\r\npay\r\n.\r\n"
LINE_ENDS = ["\n", "\r", "\r\n", "\n\r", "\r\r\n", "\n\n", "\r\r"]


def assert_one_mail(there: ScriptedRelay, mime: bytes) -> bytes:
    """What the relay took for the one mail that it was given, dots taken away again."""
    del there.bodies[:], there.commands[:]
    assert attempt(at(there.port), mime=mime).verdict is ACCEPTED
    [body] = there.bodies
    assert not re.search(rb"\r(?!\n)|(?<!\r)\n", body)
    assert {command.split()[0] for command in there.commands} <= {"ehlo", "MAIL", "RCPT", "DATA", "QUIT"}
    return unstuffed(body)


@pytest.mark.parametrize("before", LINE_ENDS)
@pytest.mark.parametrize("after", LINE_ENDS)
def test_no_second_mail_can_be_smuggled_in_a_body(before: str, after: str) -> None:
    """A line end that only one side takes for one, around a dot, would end the mail for that side alone."""
    smuggled = f"x{before}.{after}{SMUGGLED}".encode()
    with ScriptedRelay() as there:
        arrived = assert_one_mail(there, MIME + smuggled)
    assert arrived.splitlines() == (MIME + smuggled).splitlines()


def test_any_body_arrives_to_the_byte() -> None:
    words = ["\n", "\r", "\r\n", "\x85", "\u2028", ".", "..", "x", " ", "=", "=2E", "é", "😀", "From ", "y" * 990]
    text = st.lists(st.sampled_from(words), max_size=12).map(lambda words: "x" + "".join(words))
    with ScriptedRelay() as there:

        @given(text, text)
        @hypothesis_settings(max_examples=150, deadline=None, database=None)
        def check(text: str, html: str) -> None:
            body = {"to": ADA, "subject": "Hi", "text": text, "html": html}
            message = compose(parse(body, default_sender=Mailbox("", SENDER), max_recipients=1))
            mime = to_mime(message, "<1@example.com>", datetime(2026, 1, 1, tzinfo=timezone.utc))
            assert assert_one_mail(there, mime) == mime

        check()


# Whom the relay refuses, and how


def test_of_three_recipients_the_mail_goes_to_the_one_accepted() -> None:
    refusals: list[Step] = ["250 ok", "550 5.1.1 no such user", "450 4.2.1 mailbox busy"]
    with ScriptedRelay({"RCPT": refusals}) as there:
        outcome = attempt(at(there.port), ADA, BOB, CAY)
    assert there.accepted == [MIME]
    assert outcome.verdict is ACCEPTED
    assert outcome.recipients == {
        ADA: Reply(Phase.DOT, 250, "2.0.0 queued as 4711"),
        BOB: Reply(Phase.RCPT, 550, "5.1.1 no such user"),
        CAY: Reply(Phase.RCPT, 450, "4.2.1 mailbox busy"),
    }


def test_recipients_beyond_the_relays_limit_are_left_for_the_next_attempt() -> None:
    with ScriptedRelay({"RCPT": ["250 ok", "250 ok", "452 4.5.3 Too many recipients"]}) as there:
        outcome = attempt(at(there.port), ADA, BOB, CAY)
    assert there.accepted == [MIME]
    assert [reply.verdict for reply in outcome.recipients.values()] == [ACCEPTED, ACCEPTED, TRY_AGAIN]


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
    with ScriptedRelay({"RCPT": replies}) as there:
        outcome = attempt(at(there.port), ADA, BOB, CAY, before_dot=called.append)
    assert "DATA" not in there.commands
    assert not called
    assert (outcome.reply.phase, outcome.reply.code, outcome.verdict) == (Phase.RCPT, code, verdict)
    assert [f"{reply.code} {reply.text}" for reply in outcome.recipients.values()] == replies


def test_a_relay_that_closes_at_a_recipient_keeps_its_word_about_the_earlier_ones() -> None:
    replies: list[Step] = ["550 5.1.1 no such user", "250 ok", last_words("421 4.3.2 closing"), "250 ok"]
    with ScriptedRelay({"RCPT": replies}) as there:
        outcome = attempt(at(there.port), ADA, BOB, CAY, "dan@example.com")
    closing = Reply(Phase.RCPT, 421, "4.3.2 closing")
    assert outcome.reply == closing
    assert outcome.verdict is TRY_AGAIN
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
    with ScriptedRelay(script) as there:
        outcome = attempt(at(there.port), ADA, BOB, CAY)
    lost = Reply(phase, None, "the relay closed the connection")
    assert outcome.reply == lost
    assert outcome.recipients == {ADA: Reply(Phase.RCPT, 550, "5.1.1 no such user"), BOB: lost, CAY: lost}


@pytest.mark.parametrize(
    ("step", "reply", "phase", "verdict"),
    [
        ("GREETING", "421 4.3.2 too many connections", Phase.GREETING, TROUBLE),
        ("GREETING", "554 5.7.1 go away", Phase.GREETING, TROUBLE),
        ("MAIL", "451 4.3.0 not now", Phase.MAIL, TRY_AGAIN),
        ("MAIL", "550 5.7.1 not you", Phase.MAIL, REFUSED),
        ("MAIL", "552 5.3.4 too large", Phase.MAIL, REFUSED),
        ("MAIL", "530 5.7.0 Must issue a STARTTLS command first", Phase.MAIL, TROUBLE),
        ("DATA", "554 5.5.1 no valid recipients", Phase.DATA, REFUSED),
        ("DATA", "451 4.3.0 not now", Phase.DATA, TRY_AGAIN),
        ("DATA", "250 2.0.0 ok", Phase.DATA, TROUBLE),
        (".", "451 4.3.0 queue file write error", Phase.DOT, TRY_AGAIN),
        (".", "452 4.3.1 disk full", Phase.DOT, TRY_AGAIN),
        (".", "554 5.7.1 spam", Phase.DOT, REFUSED),
        (".", "454 Throttling failure: Maximum sending rate exceeded.", Phase.DOT, TROUBLE),
        (".", "354 go on", Phase.DOT, IN_DOUBT),
        (".", "150 wait", Phase.DOT, IN_DOUBT),
    ],
)
def test_an_answer_decides_for_all_who_were_not_refused(step: str, reply: str, phase: Phase, verdict: Verdict) -> None:
    with ScriptedRelay({step: reply}) as there:
        outcome = attempt(at(there.port), ADA, BOB)
    assert fate(outcome) == (phase, int(reply[:3]), verdict)
    assert outcome.reply.text == reply[4:]
    assert not there.accepted
    assert there.commands[-1] == "QUIT"


def test_a_relay_that_insists_on_starttls_is_our_trouble_and_not_the_mails() -> None:
    with HonestRelay(tls="starttls") as there:
        outcome = attempt(at(there.port))
    assert fate(outcome) == (Phase.MAIL, 530, TROUBLE)


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
    assert outcome.recipients[evil].verdict is REFUSED
    assert [outcome.recipients[one].verdict for one in (ADA, BOB)] == [ACCEPTED, ACCEPTED]
    assert fate(refused) == (Phase.MAIL, 553, REFUSED)
    once = [f"MAIL FROM:<{SENDER}>", f"RCPT TO:<{ADA}>", f"RCPT TO:<{BOB}>", "DATA", "QUIT"]
    assert [one for one in there.commands if not one.startswith("ehlo")] == [*once, "QUIT"]
    assert there.accepted == [MIME]


@pytest.mark.parametrize("address", ["o'neil+x@example.com", "a(b)@example.com", "a,b@example.com", "a@b@example.com"])
def test_an_address_goes_out_to_the_letter(address: str) -> None:
    """smtplib would send what a header parser makes of it: `a@example.com`, which is somebody else."""
    with ScriptedRelay() as there:
        attempt(at(there.port), address, sender=address)
    assert there.commands[1:3] == [f"MAIL FROM:<{address}>", f"RCPT TO:<{address}>"]


def test_a_utf8_address_goes_to_a_relay_that_takes_it() -> None:
    with HonestRelay() as there:
        outcome = attempt(at(there.port), "jürgen@example.com", sender="þór@example.com", smtputf8=True)
    assert fate(outcome) == (Phase.DOT, 250, ACCEPTED)
    [delivery] = there.accepted
    assert (delivery.sender, delivery.recipients) == ("þór@example.com", ["jürgen@example.com"])


def test_smtputf8_is_asked_for_only_where_it_is_needed() -> None:
    with ScriptedRelay(offers=["SMTPUTF8"]) as there:
        attempt(at(there.port))
        attempt(at(there.port), smtputf8=True)
    plain = f"MAIL FROM:<{SENDER}>"
    assert [one for one in there.commands if "MAIL" in one] == [plain, f"{plain} SMTPUTF8"]


def test_a_utf8_address_is_refused_where_the_relay_cannot_take_it() -> None:
    with HonestRelay(smtputf8=False) as there:
        outcome = attempt(at(there.port), ADA, "jürgen@example.com", smtputf8=True)
    assert fate(outcome) == (Phase.MAIL, 550, REFUSED)
    assert not there.accepted
    assert not there.seen_rcpt


def test_a_utf8_address_never_goes_out_unannounced() -> None:
    with ScriptedRelay(offers=["SMTPUTF8"]) as there:
        outcome = attempt(at(there.port), "jürgen@example.com", ADA)
    assert outcome.recipients["jürgen@example.com"].verdict is REFUSED
    assert outcome.recipients[ADA].verdict is ACCEPTED
    assert there.heard.isascii()


# TLS


@pytest.mark.parametrize("security", ["starttls", "tls"])
@pytest.mark.parametrize("fault", ["another name", "unknown authority", "expired", "not TLS"])
def test_without_a_good_certificate_nothing_is_sent(
    security: str, fault: str, authority: trustme.CA, ca_file: str
) -> None:
    yesterday = datetime.now(timezone.utc) - timedelta(days=1)
    context = {
        "another name": lambda: server_context(authority, "relay.example"),
        "unknown authority": lambda: server_context(trustme.CA()),
        "expired": lambda: server_context(authority, not_after=yesterday),
        "not TLS": lambda: server_context(authority),
    }[fault]()
    script: Script = {"TLS": last_words("220 hello")} if fault == "not TLS" else {}
    with ScriptedRelay(script, offers=["STARTTLS", "AUTH PLAIN"], tls=context, implicit=security == "tls") as there:
        outcome = attempt(at(there.port, security=security, login=LOGIN, ca_file=ca_file))
    phase = Phase.STARTTLS if security == "starttls" else Phase.CONNECT
    assert fate(outcome) == (phase, None, TROUBLE)
    said = {
        "another name": r"the relay's certificate is not valid: .*127\.0\.0\.1.*",
        "unknown authority": r"the relay's certificate is not valid: unable to get local issuer certificate",
        "expired": r"the relay's certificate is not valid: certificate has expired",
        "not TLS": r"\[SSL.*",
    }[fault]
    assert re.fullmatch(said, outcome.reply.text)
    in_clear = ["ehlo", "STARTTLS"] if security == "starttls" else []
    assert [command.split()[0] for command in there.commands] == in_clear
    assert there.connections == 1


def test_without_a_ca_file_only_public_authorities_are_trusted(authority: trustme.CA) -> None:
    with ScriptedRelay(tls=server_context(authority), implicit=True) as there:
        outcome = attempt(at(there.port, security="tls"))
    assert fate(outcome) == (Phase.CONNECT, None, TROUBLE)
    assert not there.commands


@pytest.mark.parametrize("security", ["starttls", "tls"])
def test_a_ca_file_that_is_gone_is_trouble(security: str, authority: trustme.CA, tmp_path: Path) -> None:
    with ScriptedRelay(offers=["STARTTLS"], tls=server_context(authority), implicit=security == "tls") as there:
        outcome = attempt(at(there.port, security=security, ca_file=str(tmp_path / "gone.pem")))
    assert outcome.verdict is TROUBLE
    assert outcome.reply.text == "No such file or directory"
    assert "STARTTLS" not in there.commands


@pytest.mark.parametrize(
    ("script", "offers", "code"),
    [
        ({}, ["AUTH PLAIN LOGIN"], None),
        ({"EHLO": "502 5.5.1 what?"}, [], None),
        ({"STARTTLS": "454 4.7.0 TLS not available"}, ["STARTTLS", "AUTH PLAIN"], 454),
        ({"STARTTLS": "501 5.5.4 syntax"}, ["STARTTLS", "AUTH PLAIN"], 501),
        ({"STARTTLS": "250 2.0.0 ok"}, ["STARTTLS", "AUTH PLAIN"], 250),
        ({"STARTTLS": "221 2.0.0 ok"}, ["STARTTLS", "AUTH PLAIN"], 221),
    ],
)
def test_without_starttls_neither_login_nor_mail_goes_out(
    script: Script, offers: list[str], code: int | None, ca_file: str
) -> None:
    with ScriptedRelay(script, offers=offers) as there:
        outcome = attempt(at(there.port, security="starttls", login=LOGIN, ca_file=ca_file))
    assert fate(outcome) == (Phase.STARTTLS, code, TROUBLE)
    assert {command.split()[0] for command in there.commands} <= {"ehlo", "helo", "STARTTLS", "QUIT"}


def test_what_was_offered_before_tls_does_not_count_after_it(authority: trustme.CA, ca_file: str) -> None:
    ehlo: list[Step] = ["250-relay.example\r\n250-STARTTLS\r\n250 AUTH PLAIN", "250 relay.example"]
    with ScriptedRelay({"EHLO": ehlo}, tls=server_context(authority)) as there:
        outcome = attempt(at(there.port, security="starttls", login=LOGIN, ca_file=ca_file))
    assert fate(outcome) == (Phase.AUTH, None, TROUBLE)
    assert [command.split()[0] for command in there.commands] == ["ehlo", "STARTTLS", "ehlo", "QUIT"]


def test_a_reply_slipped_in_before_tls_is_not_taken_for_one_after_it(authority: trustme.CA, ca_file: str) -> None:
    """CVE-2011-0411 the other way round: the second line came in clear, from anybody."""
    slipped = "220 2.0.0 go ahead\r\n250-mallory.example\r\n250 AUTH PLAIN"
    with ScriptedRelay({"STARTTLS": slipped}, offers=["STARTTLS"], tls=server_context(authority)) as there:
        outcome = attempt(at(there.port, security="starttls", login=LOGIN, ca_file=ca_file))
    assert outcome.verdict is TROUBLE
    assert not any(command.startswith("AUTH") for command in there.commands)


# The login


def test_a_wrong_password_is_trouble_and_is_tried_once(tmp_path: Path) -> None:
    with HonestRelay(login=("mailer", "right"), tls="starttls") as there:
        ca_file = write_ca(there.authority, tmp_path)
        outcome = attempt(at(there.port, security="starttls", login=("mailer", "wrong"), ca_file=ca_file))
    assert fate(outcome) == (Phase.AUTH, 535, TROUBLE)
    assert not there.accepted


@pytest.mark.parametrize(
    ("reply", "code"),
    [
        ("535 5.7.8 no", 535),
        (last_words("535 5.7.8 no"), 535),
        ("534 5.7.9 Application-specific password required", 534),
        ("454 4.7.0 Too many login attempts", 454),
        ("421 4.7.0 closing", 421),
        ("250 2.0.0 ok", 250),
        ("299 what", 299),
        (hang_up, None),
    ],
)
def test_a_login_that_fails_is_trouble_with_the_reply_to_it(reply: Step, code: int | None) -> None:
    with ScriptedRelay({"AUTH": reply}, offers=["AUTH PLAIN LOGIN CRAM-MD5"]) as there:
        outcome = attempt(at(there.port, login=LOGIN))
    assert fate(outcome) == (Phase.AUTH, code, TROUBLE)
    assert [command.split()[0] for command in there.commands[1:]] in (["AUTH"], ["AUTH", "QUIT"])


@pytest.mark.parametrize("offers", [[], ["AUTH"], ["AUTH XOAUTH2 GSSAPI"]])
def test_a_relay_without_a_login_we_know_is_trouble(offers: list[str]) -> None:
    with ScriptedRelay(offers=offers) as there:
        outcome = attempt(at(there.port, login=LOGIN))
    assert fate(outcome) == (Phase.AUTH, None, TROUBLE)
    assert outcome.reply.text == "the relay offers no AUTH PLAIN, LOGIN or CRAM-MD5"
    assert there.commands[1:] == ["QUIT"]


def expect_plain(line: Line) -> str:
    return check(line, base64.b64decode(line.relay.commands[-1].split()[2]) == "\0{}\0{}".format(*LOGIN).encode())


def expect_login(line: Line) -> str:
    username = base64.b64decode(line.relay.commands[-1].split()[2])
    line.say("334 UGFzc3dvcmQ6")
    return check(line, (username, base64.b64decode(line.hear_until(b"\r\n"))) == tuple(one.encode() for one in LOGIN))


def expect_cram_md5(line: Line) -> str:
    challenge = b"<1896.697170952@relay.example>"
    line.say_raw(b"334 " + base64.b64encode(challenge) + b"\r\n")
    digest = hmac.new(LOGIN[1].encode(), challenge, "md5").hexdigest()
    return check(line, base64.b64decode(line.hear_until(b"\r\n")).decode() == f"{LOGIN[0]} {digest}")


def check(line: Line, right: bool) -> str:
    reply = "235 2.7.0 welcome" if right else "535 5.7.8 no"
    line.say(reply)
    return reply


@pytest.mark.parametrize(
    ("offered", "chosen", "expect"),
    [
        ("PLAIN", "PLAIN", expect_plain),
        ("LOGIN", "LOGIN", expect_login),
        ("CRAM-MD5", "CRAM-MD5", expect_cram_md5),
        ("GSSAPI NTLM LOGIN", "LOGIN", expect_login),
        ("CRAM-MD5 LOGIN PLAIN XOAUTH2", "PLAIN", expect_plain),
        ("login plain", "PLAIN", expect_plain),
    ],
)
def test_the_login_uses_what_the_relay_offers(offered: str, chosen: str, expect: Callable[[Line], str]) -> None:
    with ScriptedRelay({"AUTH": expect}, offers=[f"AUTH {offered}"]) as there:
        assert attempt(at(there.port, login=LOGIN)).verdict is ACCEPTED
    assert [command.split()[1] for command in there.commands if command.startswith("AUTH")] == [chosen]


# A relay that is not there, hangs, drips or hangs up


def test_a_relay_that_refuses_the_connection_is_trouble() -> None:
    outcome = attempt(at(free_port()))
    assert fate(outcome) == (Phase.CONNECT, None, TROUBLE)
    assert outcome.reply.text == "Connection refused"


def test_a_name_without_an_address_is_trouble(monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(*_: object, **__: object) -> None:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    assert fate(attempt(at(25, host="x.invalid"))) == (Phase.CONNECT, None, TROUBLE)


@pytest.mark.parametrize("host", ["x..invalid", "x" * 64 + ".invalid", "\udcff.invalid"])
def test_a_name_that_is_none_is_trouble(host: str) -> None:
    assert fate(attempt(at(25, host=host))) == (Phase.CONNECT, None, TROUBLE)


@contextmanager
def black_hole() -> Iterator[int]:
    """A port that answers no SYN: its queue is full and nobody empties it."""
    with ExitStack() as stack:
        listener = stack.enter_context(socket.socket())
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        for _ in range(4):
            visitor = stack.enter_context(socket.socket())
            visitor.setblocking(False)
            visitor.connect_ex(listener.getsockname())
        yield listener.getsockname()[1]


def resolve_to(monkeypatch: pytest.MonkeyPatch, *ports: int) -> None:
    found = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", port)) for port in ports]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: found)


def test_all_addresses_of_a_relay_share_one_timeout(monkeypatch: pytest.MonkeyPatch) -> None:
    with black_hole() as nowhere, took_less_than(12):
        resolve_to(monkeypatch, *[nowhere] * 20)
        outcome = attempt(at(25, timeout=1, deadline=60))
    assert fate(outcome) == (Phase.CONNECT, None, TROUBLE)
    assert outcome.reply.text == "timed out"


def test_a_relay_is_reached_by_the_address_that_works(monkeypatch: pytest.MonkeyPatch) -> None:
    """And from there on it has the whole timeout for each reply."""

    def greet_late(line: Line) -> str:
        time.sleep(0.6)
        return pieces("220 relay.example", 100)(line)

    with black_hole() as nowhere, ScriptedRelay({"GREETING": greet_late}) as there, monkeypatch.context() as patched:
        resolve_to(patched, free_port(), nowhere, there.port)
        assert attempt(at(25, timeout=1.5)).verdict is ACCEPTED
    assert there.accepted == [MIME]


def test_a_deadline_that_passes_while_connecting_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    with black_hole() as nowhere, ScriptedRelay() as there, monkeypatch.context() as patched:
        resolve_to(patched, nowhere, there.port)
        outcome = attempt(at(25, timeout=1, deadline=0.1))
    assert fate(outcome) == (Phase.CONNECT, None, TROUBLE)
    assert outcome.reply.text == "the conversation took too long"
    assert not there.commands


FAULTS = [
    (hang_up, 60, 60, "the relay closed the connection"),
    (hang, 0.5, 60, "timed out"),
    (drip(b"250-" + b"x" * 1000), 60, 1, "the conversation took too long"),
]


@pytest.mark.parametrize(
    ("step", "phase", "verdict"),
    [
        ("GREETING", Phase.GREETING, TROUBLE),
        ("EHLO", Phase.HELLO, TROUBLE),
        ("STARTTLS", Phase.STARTTLS, TROUBLE),
        ("AUTH", Phase.AUTH, TROUBLE),
        ("MAIL", Phase.MAIL, TROUBLE),
        ("RCPT", Phase.RCPT, TROUBLE),
        ("DATA", Phase.DATA, TROUBLE),
        ("BODY", Phase.TRANSFER, TRY_AGAIN),
        (".", Phase.DOT, IN_DOUBT),
    ],
)
@pytest.mark.parametrize(("fault", "timeout", "deadline", "text"), FAULTS, ids=["hang up", "hang", "drip"])
def test_an_answer_that_does_not_come_is_judged_by_where_it_is_missing(
    step: str, phase: Phase, verdict: Verdict, fault: Step, timeout: float, deadline: float, text: str
) -> None:
    if step == "." and fault is hang:  # the one answer that is waited for until the end of the conversation
        deadline, text = 2, "the conversation took too long"
    with ScriptedRelay({step: fault}, offers=["STARTTLS", "AUTH PLAIN"]) as there, took_less_than(20):
        to = at(there.port, timeout=timeout, deadline=deadline, security="starttls" if step == "STARTTLS" else "none")
        outcome = attempt(to._replace(username="x"), ADA, BOB, mime=LARGE if step == "BODY" else MIME)
    assert fate(outcome) == (phase, None, verdict)
    assert outcome.reply.text == text
    assert not there.accepted
    assert there.connections == 1
    assert b"QUIT" not in there.heard


TLS_FAULTS = [
    (hang_up, 60, 60, ""),
    (hang, 0.5, 60, "timed out"),
    (hang, 60, 0.5, "the conversation took too long"),
    (drip(b"\x16\x03\x03\x40\x00" + b"2" * 1000), 60, 0.5, "the conversation took too long"),
]


@pytest.mark.parametrize(("security", "phase"), [("tls", Phase.CONNECT), ("starttls", Phase.STARTTLS)])
@pytest.mark.parametrize(("fault", "timeout", "deadline", "text"), TLS_FAULTS)
def test_a_tls_handshake_that_does_not_come_about_is_trouble(
    security: str, phase: Phase, fault: Step, timeout: float, deadline: float, text: str,
    authority: trustme.CA, ca_file: str,
) -> None:  # fmt: skip
    script: Script = {"TLS": fault}
    with (
        ScriptedRelay(script, offers=["STARTTLS"], implicit=security == "tls") as there,
        took_less_than(20),
    ):
        outcome = attempt(at(there.port, security=security, ca_file=ca_file, timeout=timeout, deadline=deadline))
    assert fate(outcome) == (phase, None, TROUBLE)
    assert text in outcome.reply.text


@pytest.mark.parametrize("step", ["MAIL", "."])
def test_the_deadline_ends_a_conversation_inside_tls(step: str, authority: trustme.CA, ca_file: str) -> None:
    script: Script = {step: drip(b"250-" + b"x" * 1000)}
    with ScriptedRelay(script, tls=server_context(authority), implicit=True) as there, took_less_than(20):
        outcome = attempt(at(there.port, security="tls", ca_file=ca_file, timeout=60, deadline=1))
    assert outcome.verdict is (IN_DOUBT if step == "." else TROUBLE)
    assert outcome.reply.text == "the conversation took too long"


def test_the_deadline_ends_a_body_that_the_relay_does_not_read() -> None:
    with ScriptedRelay({"BODY": hang}) as there, took_less_than(20):
        outcome = attempt(at(there.port, timeout=60, deadline=2), mime=LARGE)
    assert fate(outcome) == (Phase.TRANSFER, None, TRY_AGAIN)
    assert outcome.reply.text == "the conversation took too long"


def test_the_answer_to_the_final_dot_may_take_the_rest_of_the_conversation() -> None:
    """A relay that scans for viruses before it answers has the mail, and another attempt would be another mail."""

    def answer_late(line: Line) -> str:
        time.sleep(1)
        return pieces("250 2.0.0 clean", 100)(line)

    with ScriptedRelay({".": answer_late}) as there:
        assert attempt(at(there.port, timeout=0.3, deadline=10)).verdict is ACCEPTED


def test_a_relay_that_neither_reads_nor_speaks_costs_one_timeout() -> None:
    with ScriptedRelay({"BODY": hang}) as there, took_less_than(7.5):
        outcome = attempt(at(there.port, timeout=4, deadline=60), mime=LARGE)
    assert fate(outcome) == (Phase.TRANSFER, None, TRY_AGAIN)


def test_a_reply_that_came_before_the_deadline_counts_after_it() -> None:
    """`before_dot` and the machine may be slow; that the relay has answered is no less true for it."""
    with ScriptedRelay() as there, opened(at(there.port)) as session:
        original, answered = session.push, threading.Event()

        def push(data: bytes) -> None:
            original(data)
            if data == b".\r\n":
                eventually(lambda: there.accepted)
                session.hang_up()
                answered.set()

        session.push = push  # type: ignore[method-assign]
        reply = transact(session)
    assert answered.is_set()
    assert (reply.code, reply.verdict) == (250, ACCEPTED)


def test_a_deadline_that_passes_before_the_dot_leaves_nothing_in_doubt() -> None:
    with ScriptedRelay() as there:
        outcome = attempt(at(there.port, deadline=0.2), before_dot=lambda _: time.sleep(0.4))
    assert fate(outcome) == (Phase.TRANSFER, None, TRY_AGAIN)
    assert not there.accepted


def test_a_dot_that_cannot_go_out_leaves_nothing_in_doubt() -> None:
    def wait_for_the_reset(_: object) -> None:
        eventually(lambda: gone.wait(5))
        time.sleep(0.1)  # until the kernel has taken notice

    gone = threading.Event()

    def go(line: Line) -> str:
        gone.set()
        return reset(line)

    with ScriptedRelay({"BODY": go}) as there:
        outcome = attempt(at(there.port), before_dot=wait_for_the_reset)
    assert fate(outcome) == (Phase.TRANSFER, None, TRY_AGAIN)
    assert not there.accepted


@pytest.mark.parametrize("security", ["none", "tls"])
@pytest.mark.parametrize(
    ("words", "verdict"),
    [
        ("552 5.3.4 message too large", REFUSED),
        ("421 4.3.2 shutting down", TRY_AGAIN),
        ("250 2.0.0 thanks", TROUBLE),
        ("garbage", TROUBLE),
    ],
)
def test_why_the_relay_cut_the_body_off_is_read_before_judging(
    words: str, verdict: Verdict, security: str, authority: trustme.CA, ca_file: str
) -> None:
    with ScriptedRelay({"BODY": last_words(words)}, tls=server_context(authority), implicit=security == "tls") as there:
        outcome = attempt(at(there.port, security=security, ca_file=ca_file), mime=LARGE)
    assert outcome.reply.phase is Phase.TRANSFER
    assert outcome.verdict is verdict
    assert outcome.reply.text == words[4:]
    assert b"QUIT" not in there.heard


@pytest.mark.parametrize("words", ["552 5.3.4 message too large", "421 4.3.2 shutting down"])
def test_a_relay_that_objects_in_mid_body_and_reads_on_is_heard_after_the_dot(words: str) -> None:
    with ScriptedRelay({"BODY": words, ".": hang}) as there:
        outcome = attempt(at(there.port))
    assert fate(outcome) == (Phase.DOT, int(words[:3]), judge(Phase.DOT, int(words[:3])))


# Replies that are not SMTP


@pytest.mark.parametrize(
    "banner",
    [b"+OK Dovecot ready\r\n", b"* OK IMAP4\r\n", b"SSH-2.0-OpenSSH_9.2\r\n", b"HTTP/1.1 400 Bad Request\r\n", b"\r\n"],
)
def test_another_protocols_greeting_is_trouble(banner: bytes) -> None:
    with ScriptedRelay({"GREETING": raw(banner)}) as there:
        outcome = attempt(at(there.port))
    assert fate(outcome) == (Phase.GREETING, -1, TROUBLE)
    assert outcome.reply.summary == "-1 at greeting"
    assert not any(command.startswith("MAIL") for command in there.commands)


@pytest.mark.parametrize(
    ("step", "phase", "verdict"),
    [
        ("GREETING", Phase.GREETING, TROUBLE),
        ("EHLO", Phase.HELLO, TROUBLE),
        ("MAIL", Phase.MAIL, TROUBLE),
        ("RCPT", Phase.RCPT, TROUBLE),
        ("DATA", Phase.DATA, TROUBLE),
        (".", Phase.DOT, IN_DOUBT),
    ],
)
@pytest.mark.parametrize("reply", [b"2" * 20_000, b"250 " + b"x" * 9_000, b"what?", b"120 x", b"-250 x", b"999 x"])
def test_a_reply_that_is_not_smtp_ends_the_conversation(
    step: str, phase: Phase, verdict: Verdict, reply: bytes
) -> None:
    """After it nobody could say which reply belongs to which recipient."""
    with ScriptedRelay({step: raw(reply + b"\r\n")}) as there:
        outcome = attempt(at(there.port), ADA, BOB)
    assert fate(outcome)[::2] == (phase, verdict)
    assert not any(BOB in command for command in there.commands) or step in ("DATA", ".")


@pytest.mark.parametrize(
    ("octets", "text"),
    [
        ("250 2.0.0 größe ✓\r\n".encode(), "2.0.0 größe ✓"),
        (b"250 2.0.0 gr\xf6\xdfe\r\n", "2.0.0 gr\ufffd\ufffde"),
        (b"250\r\n", ""),
        (b"250 " + b"long " * 1000 + b"\r\n", "long " * 100),
    ],
)
def test_any_octets_in_a_reply_are_kept_as_text(octets: bytes, text: str) -> None:
    with ScriptedRelay({".": raw(octets)}) as there:
        outcome = attempt(at(there.port))
    assert outcome.reply == Reply(Phase.DOT, 250, text)


# before_dot


@pytest.mark.parametrize("mime", [MIME, LARGE], ids=["small", "large"])
def test_before_dot_is_called_once_when_all_but_the_dot_is_out(mime: bytes) -> None:
    calls: list[Mapping[str, Reply]] = []

    def look(replies: Mapping[str, Reply]) -> None:
        calls.append(dict(replies))
        eventually(lambda: there.heard.endswith(mime[-10:]))
        assert bytes(there.heard).endswith(b"DATA\r\n" + mime)
        time.sleep(0.1)
        assert bytes(there.heard).endswith(b"DATA\r\n" + mime)
        assert not there.bodies

    with ScriptedRelay({"RCPT": ["250 2.1.5 ok", "550 5.1.1 no", "450 4.2.1 busy"]}) as there:
        outcome = attempt(at(there.port), ADA, BOB, CAY, mime=mime, before_dot=look)
    assert calls == [
        {
            ADA: Reply(Phase.RCPT, 250, "2.1.5 ok"),
            BOB: Reply(Phase.RCPT, 550, "5.1.1 no"),
            CAY: Reply(Phase.RCPT, 450, "4.2.1 busy"),
        }
    ]
    assert outcome.verdict is ACCEPTED
    assert there.accepted == [mime]


class Interrupted(BaseException):
    """Such as RQ's timeout, a signal, or an error of Redis."""


@pytest.mark.parametrize("error", [Interrupted, OSError, ValueError, TimeoutError, ConnectionResetError])
def test_what_before_dot_raises_ends_the_attempt_with_nothing_sent(error: type[BaseException]) -> None:
    def refuse(_: object) -> None:
        raise error("lost the claim")

    with ScriptedRelay() as there:
        with pytest.raises(error, match="lost the claim"):
            attempt(at(there.port), before_dot=refuse)
        eventually(lambda: there.heard.endswith(MIME))
    assert there.heard.endswith(b"DATA\r\n" + MIME)
    assert not there.bodies


def test_an_interrupted_caller_leaves_nothing_open() -> None:
    def talk(port: int) -> None:
        with opened(at(port)):
            raise Interrupted

    with ScriptedRelay() as there, pytest.raises(Interrupted):
        talk(there.port)
    assert there.commands[-1] == "QUIT"


# What is told to whom

PLANTED = ["planted-recipient", "planted-sender", "planted-subject", "planted-body", "planted-user", "planted-password"]
RECIPIENT, AUTHOR = (f"{word}@example.com" for word in PLANTED[:2])
CREDENTIALS = (PLANTED[4], PLANTED[5])
BODY = f"Subject: {PLANTED[2]}\r\n\r\n{PLANTED[3]}\r\n".encode()
ECHO = f"<{RECIPIENT}> <{AUTHOR}> {PLANTED[2:]}"  # a relay that repeats everything it was told


def assert_clean(text: str) -> None:
    """Neither as they are nor in base64, at any of the three offsets that a word may have in it."""
    for word in PLANTED:
        assert word not in text
        for offset in range(3):
            encoded = base64.b64encode(b"\0" * offset + word.encode()).decode()
            assert encoded[4:-4] not in text


@pytest.mark.parametrize("step", ["GREETING", "EHLO", "AUTH", "MAIL", "RCPT", "DATA", "."])
@pytest.mark.parametrize("code", ["450", "550", "what?"])
def test_a_summary_and_the_log_hold_nothing_of_the_mail_or_the_login(
    step: str, code: str, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    with caplog.at_level(0), ScriptedRelay({step: f"{code} {ECHO}"}, offers=["AUTH PLAIN"]) as there:
        outcome = attempt(at(there.port, login=CREDENTIALS), RECIPIENT, sender=AUTHOR, mime=BODY)
    [reply] = outcome.recipients.values()
    assert outcome.verdict is not ACCEPTED
    assert "planted" in reply.text or step == "EHLO"  # the relay's words are kept, but only in the record of the mail
    assert re.fullmatch(r"(-?\d+|no reply) at [a-z]+", reply.summary)
    assert_clean(reply.summary + caplog.text + "".join(capfd.readouterr()))


def talk(port: int, sender: str, seen: Callable[[], None] = lambda: None) -> None:
    with opened(at(port, login=CREDENTIALS)) as session:
        transact(session, sender, BODY, seen)


def printed(error: BaseException) -> str:
    return "".join(traceback.format_exception(error)) + str(error) + repr(error)


@pytest.mark.parametrize("step", ["GREETING", "EHLO", "HELO", "AUTH", "MAIL", "DATA"])
@pytest.mark.parametrize(
    "reply",
    [
        f"550 {ECHO}",
        f"what? {ECHO}",
        last_words(f"421 {ECHO}"),
        f"334 {base64.b64encode(ECHO.encode()).decode()}",  # to AUTH it is a challenge without end
        hang_up,
    ],
)
def test_no_traceback_holds_anything_of_the_mail_or_the_login(step: str, reply: Step) -> None:
    script: Script = {"500": reply, step: reply} | ({"EHLO": f"502 {ECHO}"} if step == "HELO" else {})
    with ScriptedRelay(script, offers=["AUTH LOGIN"]) as there, pytest.raises(Stopped) as stopped:
        talk(there.port, AUTHOR)
    assert_clean(printed(stopped.value))


def test_no_traceback_holds_an_address_that_cannot_be_sent() -> None:
    with ScriptedRelay(offers=["AUTH LOGIN"]) as there, pytest.raises(Stopped) as stopped:
        talk(there.port, f"{AUTHOR}\r\nDATA")
    assert_clean(printed(stopped.value) + stopped.value.reply.text)


def test_no_traceback_from_before_the_dot_holds_anything_of_the_mail_or_the_login() -> None:
    def interrupt() -> None:
        raise Interrupted

    with ScriptedRelay(offers=["AUTH PLAIN"]) as there, pytest.raises(Interrupted) as interrupted:
        talk(there.port, AUTHOR, interrupt)
    assert_clean(printed(interrupted.value))


def test_a_relay_does_not_show_its_password() -> None:
    assert str(at(25, login=LOGIN)) == repr(at(25, login=LOGIN)) == "127.0.0.1:25"


def test_a_text_of_ours_names_no_address() -> None:
    with ScriptedRelay({"RCPT": hang_up}) as there:
        outcome = attempt(at(there.port), f"{RECIPIENT}\r\nDATA", RECIPIENT, sender=AUTHOR)
    assert_clean(" ".join(reply.text for reply in outcome.recipients.values()))


# Fewer round trips

PIPES = ["PIPELINING"]
CHUNKS = ["PIPELINING", "CHUNKING"]
WAYS = pytest.mark.parametrize("offers", [[], PIPES, CHUNKS], ids=["plain", "pipelined", "chunked"])


@pytest.mark.parametrize(("offers", "trips"), [([], 4), (["CHUNKING"], 4), (PIPES, 2), (CHUNKS, 1)])
def test_a_mail_on_a_warm_session_takes_as_few_round_trips_as_the_relay_allows(offers: list[str], trips: int) -> None:
    with ScriptedRelay(offers=offers, latency=0.01) as there:
        another(at(there.port))
        before = there.turns
        for _ in range(5):
            assert another(at(there.port)).verdict is ACCEPTED
        assert there.turns - before == 5 * trips
        assert there.connections == 1
        pool.close_all()
    assert there.accepted == [MIME] * 6


@pytest.mark.parametrize("offers", [PIPES, CHUNKS])
def test_what_is_pipelined_is_what_is_said_without(offers: list[str]) -> None:
    with ScriptedRelay(offers=[*offers, "SIZE"]) as there:
        attempt(at(there.port), ADA, BOB)
    envelope = [f"MAIL FROM:<{SENDER}> SIZE={len(MIME)}", f"RCPT TO:<{ADA}>", f"RCPT TO:<{BOB}>"]
    assert there.commands[1:] == [*envelope, "DATA" if offers is PIPES else f"BDAT {len(MIME)} LAST", "QUIT"]


def test_a_large_mail_waits_for_the_replies_about_its_recipients() -> None:
    with ScriptedRelay({"RCPT": "550 5.1.1 no", "DATA": "554 no valid recipients"}, offers=CHUNKS) as there:
        assert fate(attempt(at(there.port), mime=LARGE)) == (Phase.RCPT, 550, REFUSED)
    assert len(there.heard) < 1000


def test_a_chunk_holds_the_mail_to_the_byte_with_crlf_line_ends_and_no_dot_doubled() -> None:
    with ScriptedRelay(offers=CHUNKS) as there:
        attempt(at(there.port), mime=b"A: b\n\n.\r\n..x\r\xff\0\n.")
    assert there.accepted == [b"A: b\r\n\r\n.\r\n..x\r\n\xff\0\r\n.\r\n"]


@WAYS
@pytest.mark.parametrize("octets", [1, 7, 10_000])
def test_replies_to_many_commands_may_come_in_any_number_of_packets(offers: list[str], octets: int) -> None:
    together: list[str] = []

    def gathered(text: str, reply: str) -> Step:
        def act(line: Line) -> str:
            together.append(text)
            if offers == [] or text.startswith(("354", "250 2.0.0")):
                pieces("\r\n".join(together), octets)(line)
                together.clear()
            return reply

        return act

    script: Script = {
        "MAIL": gathered("250-2.1.0 fine\r\n250 go on", "250"),
        "RCPT": [gathered("250 2.1.5 liked", "250"), gathered("550-5.1.1 not\r\n550 5.1.1 here", "550")],
        "DATA": gathered("354 go", "354"),
        ".": gathered("250 2.0.0 4711", "250"),
    }
    with ScriptedRelay(script, offers=offers) as there:
        outcome = attempt(at(there.port), ADA, BOB)
    assert there.accepted == [MIME]
    assert outcome.recipients == {
        ADA: Reply(Phase.DOT, 250, "2.0.0 4711"),
        BOB: Reply(Phase.RCPT, 550, "5.1.1 not 5.1.1 here"),
    }


AFTER_MAIL: Script = {"RCPT": "503 5.5.1 MAIL first", "DATA": "503 5.5.1 MAIL first", ".": "503 5.5.1 MAIL first"}
NOBODY: Script = {"DATA": "554 5.5.1 no valid recipients", ".": "554 5.5.1 no valid recipients"}
FATES: list[tuple[Script, Phase, int | None, Verdict]] = [
    ({"MAIL": "451 4.3.0 not now", **AFTER_MAIL}, Phase.MAIL, 451, TRY_AGAIN),
    ({"MAIL": "550 5.7.1 not you", **AFTER_MAIL}, Phase.MAIL, 550, REFUSED),
    ({"MAIL": "530 5.7.0 STARTTLS first", **AFTER_MAIL}, Phase.MAIL, 530, TROUBLE),
    ({"MAIL": last_words("421 4.3.2 closing")}, Phase.MAIL, 421, TRY_AGAIN),
    ({"RCPT": "550 5.1.1 no", **NOBODY}, Phase.RCPT, 550, REFUSED),
    ({"RCPT": "450 4.2.0 busy", **NOBODY}, Phase.RCPT, 450, TRY_AGAIN),
    ({"RCPT": last_words("421 4.3.2 closing")}, Phase.RCPT, 421, TRY_AGAIN),
    ({"RCPT": ["250 ok", last_words("421 4.3.2 closing")]}, Phase.RCPT, 421, TRY_AGAIN),
    ({".": "554 5.7.1 spam"}, Phase.DOT, 554, REFUSED),
    ({".": "452 4.3.1 disk full"}, Phase.DOT, 452, TRY_AGAIN),
    ({".": hang_up}, Phase.DOT, None, IN_DOUBT),
]


@WAYS
@pytest.mark.parametrize(("script", "phase", "code", "verdict"), FATES)
def test_each_reply_is_judged_by_its_own_phase(
    offers: list[str], script: Script, phase: Phase, code: int | None, verdict: Verdict
) -> None:
    with ScriptedRelay(script, offers=offers) as there:
        assert fate(attempt(at(there.port), ADA, BOB)) == (phase, code, verdict)
    assert not there.accepted


@pytest.mark.parametrize(
    ("offers", "script", "phase", "verdict"),
    [
        (PIPES, {"MAIL": hang_up}, Phase.MAIL, TROUBLE),
        (PIPES, {"RCPT": hang_up}, Phase.RCPT, TROUBLE),
        (PIPES, {"DATA": hang_up}, Phase.DATA, TROUBLE),
        (PIPES, {"RCPT": raw(b"what?\r\n")}, Phase.RCPT, TROUBLE),
        (PIPES, {"RCPT": "354 go"}, Phase.RCPT, TROUBLE),
        # The end of the chunk may have come before the relay went away.
        (CHUNKS, {"MAIL": hang_up}, Phase.DOT, IN_DOUBT),
        (CHUNKS, {"RCPT": hang_up}, Phase.DOT, IN_DOUBT),
        (CHUNKS, {"MAIL": raw(b"what?\r\n")}, Phase.DOT, IN_DOUBT),
        (CHUNKS, {"MAIL": "354 go"}, Phase.DOT, IN_DOUBT),
        (CHUNKS, {"RCPT": "354 go"}, Phase.DOT, IN_DOUBT),
        (CHUNKS, {".": "354 go"}, Phase.DOT, IN_DOUBT),
    ],
)
def test_with_too_few_replies_or_wrong_ones_a_mail_is_in_doubt_once_its_end_is_out(
    offers: list[str], script: Script, phase: Phase, verdict: Verdict
) -> None:
    with ScriptedRelay(script, offers=offers) as there:
        outcome = attempt(at(there.port), ADA, BOB)
    assert fate(outcome)[::2] == (phase, verdict)


@WAYS
def test_whoever_was_refused_keeps_his_reply_when_the_rest_is_in_doubt(offers: list[str]) -> None:
    with ScriptedRelay({"RCPT": ["550 5.1.1 no", "250 ok"], ".": hang_up}, offers=offers) as there:
        outcome = attempt(at(there.port), ADA, BOB)
    assert [reply.verdict for reply in outcome.recipients.values()] == [REFUSED, IN_DOUBT]


@pytest.mark.parametrize("refusal", ["MAIL", "RCPT"])
def test_no_mail_is_sent_for_nobody_though_the_relay_invites_one(refusal: str) -> None:
    """RFC 2920 3.1 would have an empty one sent, and trust the relay to refuse that; closing needs no trust."""
    called: list[object] = []
    with ScriptedRelay({refusal: "550 5.1.1 no"}, offers=PIPES) as there:
        assert fate(attempt(at(there.port), before_dot=called.append)) == (Phase(refusal.lower()), 550, REFUSED)
    assert there.heard.endswith(b"DATA\r\n")
    assert not called
    assert not there.bodies


def test_a_relay_that_takes_a_chunk_for_nobody_has_taken_it_for_nobody() -> None:
    with ScriptedRelay({"RCPT": "550 5.1.1 no"}, offers=CHUNKS) as there:
        assert fate(another(at(there.port))) == (Phase.RCPT, 550, REFUSED)
        another(at(there.port))
        assert there.connections == 2
        pool.close_all()


def test_before_a_chunks_end_its_mark_is_written_and_only_its_end_is_kept_back() -> None:
    calls: list[Mapping[str, Reply]] = []

    def look(replies: Mapping[str, Reply]) -> None:
        calls.append(dict(replies))
        eventually(lambda: there.heard.endswith(MIME[:-2]))
        time.sleep(0.1)
        assert there.heard.endswith(b"LAST\r\n" + MIME[:-2])

    with ScriptedRelay(offers=CHUNKS) as there:
        assert attempt(at(there.port), ADA, "not an address", before_dot=look).verdict is ACCEPTED
    [known] = calls
    assert {who: reply.code for who, reply in known.items()} == {"not an address": 553}
    assert there.accepted == [MIME]


@pytest.mark.parametrize("error", [Interrupted, OSError, ValueError])
def test_what_before_dot_raises_leaves_a_chunk_without_its_end(error: type[BaseException]) -> None:
    """Not even a QUIT may follow: the relay would take it for the end of the mail."""

    def refuse(_: object) -> None:
        raise error("lost the claim")

    with ScriptedRelay(offers=CHUNKS) as there, pytest.raises(error, match="lost the claim"):
        attempt(at(there.port), before_dot=refuse)
    assert there.heard.endswith(b"LAST\r\n" + MIME[:-2])
    assert not there.bodies


def test_a_chunk_whose_end_cannot_go_out_leaves_nothing_in_doubt() -> None:
    gone = threading.Event()

    def go(line: Line) -> str:
        gone.set()
        return reset(line)

    def wait_for_the_reset(_: object) -> None:
        assert gone.wait(5)
        time.sleep(0.1)

    with ScriptedRelay({"BODY": go}, offers=CHUNKS) as there:
        outcome = attempt(at(there.port), before_dot=wait_for_the_reset)
    assert fate(outcome) == (Phase.TRANSFER, None, TRY_AGAIN)
    assert not there.bodies


@pytest.mark.parametrize(("rcpt", "phase"), [("550 5.1.1 no", Phase.RCPT), ("250 2.1.5 ok", Phase.TRANSFER)])
def test_after_a_chunk_that_did_not_get_out_whole_nothing_is_said(rcpt: str, phase: Phase) -> None:
    """All its replies are here, and the relay still waits for the rest: a RSET or QUIT might complete a mail."""

    def refuse_and_pause(line: Line) -> str:
        line.say("554 5.5.1 no")
        time.sleep(0.4)
        return "554"

    called: list[object] = []
    large = MIME + b"x" * 200_000 + b"\r\n"
    script: Script = {"RCPT": rcpt, "BODY": refuse_and_pause}
    with ScriptedRelay(script, offers=CHUNKS, receive_buffer=2048) as there, small_send_buffer():
        outcome = attempt(at(there.port, timeout=0.3), mime=large, before_dot=called.append)
    assert outcome.reply.phase is phase
    assert outcome.verdict is REFUSED
    assert not called
    assert b"RSET" not in there.heard
    assert b"QUIT" not in there.heard


@contextmanager
def small_send_buffer() -> Iterator[None]:
    """A kernel that takes less of a mail at once."""
    original = session._dial

    def dial(to: Relay) -> socket.socket:
        line = original(to)
        line.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        return line

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(session, "_dial", dial)
        yield


# Warm sessions


@WAYS
@pytest.mark.parametrize("security", ["none", "tls"])
def test_many_mails_share_a_session(offers: list[str], security: str, authority: trustme.CA, ca_file: str) -> None:
    with ScriptedRelay(offers=offers, tls=server_context(authority), implicit=security == "tls") as there:
        for _ in range(10):
            assert fate(another(at(there.port, security=security, ca_file=ca_file))) == (Phase.DOT, 250, ACCEPTED)
        pool.close_all()
    assert there.accepted == [MIME] * 10
    assert there.connections == 1
    assert [command.split()[0] for command in there.commands].count("ehlo") == 1
    assert "RSET" not in there.commands
    assert there.commands[-1] == "QUIT"


def test_a_session_serves_one_relay_and_one_login_only() -> None:
    with ScriptedRelay(offers=["AUTH PLAIN"]) as there:
        another(at(there.port, login=LOGIN))
        another(at(there.port, login=("other", "password")))
        another(at(there.port))
        pool.close_all()
    assert there.connections == 3


def test_threads_that_send_at_once_have_a_session_each_and_lend_it_to_the_next() -> None:
    meet = threading.Barrier(4)

    def mails(port: int) -> None:
        for _ in range(3):
            assert another(at(port), before_dot=lambda _: void(meet.wait(5))).verdict is ACCEPTED

    with ScriptedRelay() as there:
        for _ in range(2):
            crew = [threading.Thread(target=mails, args=[there.port]) for _ in range(4)]
            for one in crew:
                one.start()
            for one in crew:
                one.join()
        pool.close_all()
    assert there.connections == 4
    assert there.accepted == [MIME] * 24


def void(_: object) -> None:
    pass


@WAYS
@pytest.mark.parametrize(("script", "phase", "code", "verdict"), FATES)
def test_a_mail_that_fails_leaves_a_session_in_order_or_none(
    offers: list[str], script: Script, phase: Phase, code: int | None, verdict: Verdict
) -> None:
    """The next mail must not meet with what the last one left."""
    with ScriptedRelay(script, offers=offers) as there:
        assert another(at(there.port), ADA, BOB).verdict is verdict
        kept = code not in (None, 421) and verdict is not TROUBLE
        if not kept:
            eventually(lambda: not any(thread.is_alive() for thread, _ in there.lines))
        there.script.update({name: [relay_says] for name, relay_says in OBLIGING.items()})
        assert fate(another(at(there.port), CAY, mime=MIME + b"2\r\n")) == (Phase.DOT, 250, ACCEPTED)
        pool.close_all()
    assert there.accepted == [MIME + b"2\r\n"]
    assert there.connections == (1 if kept else 2)
    reset_needed = kept and not (phase is Phase.DOT and offers is not CHUNKS)
    assert ("RSET" in there.commands) == reset_needed


@pytest.mark.parametrize(
    "answer", ["500 what?", "220 ready", "421 closing", hang_up, hang, "354 go", raw(b"what?\r\n")]
)
def test_a_session_whose_rset_is_not_answered_250_is_closed(answer: Step, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session, "PATIENCE", 0.2)
    with ScriptedRelay({"RCPT": ["550 5.1.1 no", "250 ok"], "RSET": answer}) as there:
        assert another(at(there.port)).verdict is REFUSED
        assert another(at(there.port)).verdict is ACCEPTED
        assert there.connections == 2
        pool.close_all()
    assert there.accepted == [MIME]


@WAYS
@pytest.mark.parametrize("step", ["MAIL", "RCPT", "DATA", "."])
@pytest.mark.parametrize("reply", ["421 4.3.2 closing soon", "503 5.5.1 what?"])
def test_a_session_that_the_relay_will_close_or_has_lost_step_in_is_not_used_again(
    offers: list[str], step: str, reply: str
) -> None:
    if step == "DATA" and offers is CHUNKS:
        step = "."
    with ScriptedRelay({step: [reply, OBLIGING[step]]}, offers=offers) as there:
        assert another(at(there.port)).verdict is TRY_AGAIN
        assert another(at(there.port)).verdict is ACCEPTED
        pool.close_all()
    assert there.connections == 2


def test_the_outcome_is_written_down_before_a_word_more_is_said() -> None:
    with ScriptedRelay({"RCPT": "550 5.1.1 no"}) as there:
        with pool.conversation(at(there.port)) as conversation:
            conversation.send(SENDER, [ADA], MIME, smtputf8=False, before_dot=void)
            time.sleep(0.1)
            assert there.commands[-1] == f"RCPT TO:<{ADA}>"
        eventually(lambda: there.commands[-1] == "RSET")
        pool.close_all()


def then(text: str, act: Callable[[Line], str]) -> Step:
    """A reply, and what the relay does right after it."""

    def both(line: Line) -> str:
        line.say(text)
        return act(line)

    return both


DEATHS: dict[str, Callable[[Line], str]] = {
    "FIN": hang_up,
    "RST": reset,
    "421 and FIN": last_words("421 4.4.2 idle for too long"),
    "a word unasked": raw(b"250 hello?\r\n"),
}


@WAYS
@pytest.mark.parametrize("security", ["none", "tls"])
@pytest.mark.parametrize("death", DEATHS)
def test_a_session_that_died_between_two_mails_costs_the_second_nothing(
    offers: list[str], death: str, security: str, authority: trustme.CA, ca_file: str
) -> None:
    answers: list[Step] = [then("250 2.0.0 queued", DEATHS[death]), "250 2.0.0 queued"]
    with ScriptedRelay(
        {".": answers}, offers=offers, tls=server_context(authority), implicit=security == "tls"
    ) as there:
        to = at(there.port, security=security, ca_file=ca_file)
        another(to)
        time.sleep(0.1)
        calls: list[object] = []
        assert fate(another(to, BOB, before_dot=calls.append)) == (Phase.DOT, 250, ACCEPTED)
        pool.close_all()
    assert len(calls) == 1
    assert there.connections == 2
    assert there.commands.count(f"RCPT TO:<{BOB}>") == 1


@pytest.mark.parametrize("offers", [[], PIPES], ids=["plain", "pipelined"])
@pytest.mark.parametrize("step", ["MAIL", "RCPT", "DATA", "BODY"])
@pytest.mark.parametrize("death", [hang_up, reset, last_words("421 4.4.2 closing"), hang])
def test_a_session_that_dies_under_a_later_mail_costs_it_no_attempt(
    offers: list[str], step: str, death: Step, monkeypatch: pytest.MonkeyPatch
) -> None:
    alive: dict[str, Step] = {**OBLIGING, "BODY": lambda _: ""}
    with ScriptedRelay({step: [alive[step], death, alive[step]]}, offers=offers) as there:
        to = at(there.port, timeout=0.5)
        assert another(to).verdict is ACCEPTED
        assert fate(another(to, BOB, mime=LARGE)) == (Phase.DOT, 250, ACCEPTED)
        pool.close_all()
    assert there.accepted == [MIME, LARGE]
    assert there.connections == 2


@pytest.mark.parametrize("step", ["MAIL", "RCPT"])
def test_a_relay_that_says_421_to_a_chunk_has_not_taken_it(step: str) -> None:
    with ScriptedRelay({step: ["250 ok", last_words("421 4.4.2 closing"), "250 ok"]}, offers=CHUNKS) as there:
        another(at(there.port))
        assert another(at(there.port), BOB).verdict is ACCEPTED
        pool.close_all()
    assert there.accepted == [MIME, MIME]
    assert there.connections == 2


def test_on_a_session_that_rested_the_relay_must_answer_before_a_mail_can_be_in_doubt(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A NAT that forgot the connection swallows all of it, and says nothing."""
    monkeypatch.setattr(session, "FRESH", 0.1)
    with ScriptedRelay({"MAIL": ["250 ok", hang, "250 ok"]}, offers=CHUNKS) as there:
        to = at(there.port, timeout=0.5)
        another(to)
        time.sleep(0.2)
        assert fate(another(to, BOB)) == (Phase.DOT, 250, ACCEPTED)
        pool.close_all()
    assert [command.split()[0] for command in there.commands].count("BDAT") == 2
    assert len(there.accepted) == 2


@WAYS
@pytest.mark.parametrize("death", [hang_up, reset, last_words("421 4.4.2 closing"), hang])
def test_after_the_final_dot_nothing_is_repeated(offers: list[str], death: Step) -> None:
    with ScriptedRelay({".": ["250 ok", death, "250 ok"]}, offers=offers) as there:
        to = at(there.port, deadline=1)
        another(to)
        outcome = another(to, BOB)
        assert there.connections == 1
        pool.close_all()
    assert outcome.reply.phase is Phase.DOT
    assert outcome.verdict is not ACCEPTED
    assert len(there.bodies) == 2


def test_a_new_session_is_not_replaced_when_it_dies() -> None:
    with ScriptedRelay({"MAIL": hang_up}) as there:
        assert fate(attempt(at(there.port))) == (Phase.MAIL, None, TROUBLE)
    assert there.connections == 1


def test_the_session_that_replaces_a_dead_one_decides() -> None:
    with ScriptedRelay({"MAIL": ["250 ok", hang_up, "550 5.7.1 not you"]}) as there:
        another(at(there.port))
        assert fate(another(at(there.port))) == (Phase.MAIL, 550, REFUSED)
        pool.close_all()


def test_a_mail_may_lose_its_claim_on_the_way_to_another_session() -> None:
    calls: list[object] = []

    def once(_: object) -> None:
        calls.append(1)
        if len(calls) == 2:
            gone.set()
            time.sleep(0.1)
        if len(calls) == 3:
            raise Interrupted

    gone = threading.Event()

    def go(line: Line) -> str:
        assert gone.wait(5)
        return reset(line)

    with ScriptedRelay({"BODY": [lambda _: "", go, lambda _: ""]}) as there:
        another(at(there.port), before_dot=once)
        with pytest.raises(Interrupted):
            another(at(there.port), before_dot=once)
    assert there.accepted == [MIME]
    assert there.connections == 2


def test_a_session_ends_after_so_many_mails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool, "MOST_MAILS", 3)
    with ScriptedRelay() as there:
        for _ in range(7):
            another(at(there.port))
        pool.close_all()
    assert there.connections == 3
    assert there.commands.count("QUIT") == 3


def test_a_session_ends_when_it_is_old(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool, "OLDEST", 0.3)
    with ScriptedRelay() as there:
        another(at(there.port))
        another(at(there.port))
        assert there.connections == 1
        time.sleep(0.3)
        another(at(there.port))
        another(at(there.port))
        pool.close_all()
    assert there.connections == 2


def test_a_session_that_nobody_uses_is_closed_and_its_watcher_goes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool, "IDLE", 0.3)
    with ScriptedRelay() as there:
        another(at(there.port))
        assert [thread.name for thread in threading.enumerate()].count("sessions") == 1
        eventually(lambda: there.commands[-1] == "QUIT", 5)
        eventually(lambda: "sessions" not in [thread.name for thread in threading.enumerate()], 5)
        another(at(there.port))
        pool.close_all()
    assert there.connections == 2


def test_one_thread_watches_all_conversations() -> None:
    with ExitStack() as stack:
        there = stack.enter_context(ScriptedRelay())
        stack.callback(pool.close_all)
        for _ in range(5):
            stack.enter_context(opened(at(there.port, deadline=60)))
        assert [thread.name for thread in threading.enumerate()].count("sessions") == 1


@WAYS
def test_the_deadline_ends_a_mail_on_a_warm_session(offers: list[str]) -> None:
    """It is the mail's own: the session's age does not count, and the session is not used again."""
    slow = drip(b"250-" + b"x" * 1000)
    with ScriptedRelay({".": ["250 ok", "250 ok", slow, "250 ok"]}, offers=offers) as there:
        to = at(there.port, deadline=0.6)
        for _ in range(2):
            assert another(to).verdict is ACCEPTED
            time.sleep(0.4)
        with took_less_than(4):  # the relay would take fifty seconds
            outcome = another(to)
        assert fate(outcome) == (Phase.DOT, None, IN_DOUBT)
        assert outcome.reply.text == "the conversation took too long"
        assert another(to).verdict is ACCEPTED
        pool.close_all()
    assert there.connections == 2


def test_a_session_and_the_one_that_replaces_it_share_one_deadline() -> None:
    with ScriptedRelay({"MAIL": ["250 ok", hang]}) as there:
        to = at(there.port, timeout=1.5, deadline=2)
        another(to)
        outcome = another(to)
    assert fate(outcome) == (Phase.MAIL, None, TROUBLE)
    assert outcome.reply.text == "the conversation took too long"
    assert there.connections == 2


def test_a_deadline_that_has_passed_is_not_followed_by_another_session() -> None:
    with ScriptedRelay({"MAIL": ["250 ok", hang]}) as there, took_less_than(20):
        to = at(there.port, timeout=60, deadline=1)
        another(to)
        outcome = another(to)
        time.sleep(0.1)
        assert there.connections == 1
    assert outcome.reply.text == "the conversation took too long"


def test_a_deadline_that_passes_while_the_outcome_is_written_down_closes_the_session() -> None:
    with ScriptedRelay() as there:
        with pool.conversation(at(there.port, deadline=0.3)) as conversation:
            outcome = conversation.send(SENDER, [ADA], MIME, smtputf8=False, before_dot=void)
            time.sleep(0.5)
        assert outcome.verdict is ACCEPTED
        another(at(there.port))
        pool.close_all()
    assert there.connections == 2
