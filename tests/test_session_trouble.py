"""Trouble: a relay without a good certificate or our login, that is away, hangs, drips or hangs up.

Each is judged by where the answer is missing, is bounded in time, and shows nothing of the mail or the login.
"""

from __future__ import annotations

import base64
import hmac
import re
import socket
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import trustme

from smtp.envelope import Envelope
from smtp.policy import Phase, Verdict
from smtp.session import Stopped
from smtp.verdict import Reply, judge
from tests.conversations import ANSWERS, at, attempt, fate, meet, opened, server_context, took_less_than
from tests.scripted_relay import Line, Script, ScriptedRelay, Step, drip, hang, hang_up, last_words, raw
from tests.servers import eventually, free_port
from tests.smtp_samples import ADA, BOB, LARGE, LOGIN, MIME, SENDER
from tests.verdicts import ACCEPTED, IN_DOUBT, REFUSED, TROUBLE, TRY_AGAIN

pytestmark = pytest.mark.usefixtures("nothing_is_left_open")
TOO_LONG = "the conversation took too long"


# TLS


YESTERDAY = datetime.now(timezone.utc) - timedelta(days=1)
NOT_VALID = "the relay's certificate is not valid: "


@pytest.mark.parametrize("security", ["starttls", "tls"])
@pytest.mark.parametrize(
    ("script", "ours", "certificate", "said"),
    [
        ({}, True, {"name": "relay.example"}, NOT_VALID + r".*127\.0\.0\.1.*"),
        ({}, False, {}, NOT_VALID + "unable to get local issuer certificate"),
        ({}, True, {"not_after": YESTERDAY}, NOT_VALID + "certificate has expired"),
        ({"TLS": last_words("220 hello")}, True, {}, r"\[SSL.*"),
    ],
    ids=["another name", "unknown authority", "expired", "not TLS"],
)
def test_without_a_good_certificate_nothing_is_sent(
    security: str, script: Script, ours: bool, certificate: dict[str, Any], said: str,
    authority: trustme.CA, ca_file: str,
) -> None:  # fmt: skip
    context = server_context(authority if ours else trustme.CA(), **certificate)
    offers = ["STARTTLS", "AUTH PLAIN"]
    there, outcome = meet(script, offers=offers, tls=context, security=security, login=LOGIN, ca_file=ca_file)
    phase = Phase.STARTTLS if security == "starttls" else Phase.CONNECT
    assert fate(outcome) == (phase, None, TROUBLE)
    assert re.fullmatch(said, outcome.reply.text)
    in_clear = ["EHLO", "STARTTLS"] if security == "starttls" else []
    assert [command.split()[0] for command in there.commands] == in_clear
    assert there.connections == 1


def test_without_a_ca_file_only_public_authorities_are_trusted(authority: trustme.CA) -> None:
    there, outcome = meet(tls=server_context(authority), security="tls")
    assert fate(outcome) == (Phase.CONNECT, None, TROUBLE)
    assert not there.commands


@pytest.mark.parametrize("security", ["starttls", "tls"])
def test_a_ca_file_that_is_gone_is_trouble(security: str, authority: trustme.CA, tmp_path: Path) -> None:
    gone = str(tmp_path / "gone.pem")
    there, outcome = meet(offers=["STARTTLS"], tls=server_context(authority), security=security, ca_file=gone)
    assert outcome.reply.verdict is TROUBLE
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
    there, outcome = meet(script, offers=offers, security="starttls", login=LOGIN, ca_file=ca_file)
    assert fate(outcome) == (Phase.STARTTLS, code, TROUBLE)
    assert code or outcome.reply.text == "STARTTLS extension not supported by server."
    assert {command.split()[0] for command in there.commands} <= {"EHLO", "helo", "STARTTLS", "QUIT"}


def test_what_was_offered_before_tls_does_not_count_after_it(certified: dict[str, Any]) -> None:
    ehlo: list[Step] = ["250-relay.example\r\n250-STARTTLS\r\n250 AUTH PLAIN", "250 relay.example"]
    there, outcome = meet({"EHLO": ehlo}, security="starttls", login=LOGIN, **certified)
    assert fate(outcome) == (Phase.AUTH, None, TROUBLE)
    assert [command.split()[0] for command in there.commands] == ["EHLO", "STARTTLS", "EHLO", "QUIT"]


def test_a_reply_slipped_in_before_tls_is_not_taken_for_one_after_it(certified: dict[str, Any]) -> None:
    """CVE-2011-0411 the other way round: the second line came in clear, from anybody."""
    script = {"STARTTLS": "220 2.0.0 go ahead\r\n250-mallory.example\r\n250 AUTH PLAIN"}
    there, outcome = meet(script, offers=["STARTTLS"], security="starttls", login=LOGIN, **certified)
    assert outcome.reply.verdict is TROUBLE
    assert not any(command.startswith("AUTH") for command in there.commands)


# The login


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
    there, outcome = meet({"AUTH": reply}, offers=["AUTH PLAIN LOGIN CRAM-MD5"], login=LOGIN)
    assert fate(outcome) == (Phase.AUTH, code, TROUBLE)
    assert [command.split()[0] for command in there.commands[1:]] in (["AUTH"], ["AUTH", "QUIT"])


@pytest.mark.parametrize("offers", [[], ["AUTH"], ["AUTH XOAUTH2 GSSAPI"]])
def test_a_relay_without_a_login_we_know_is_trouble(offers: list[str]) -> None:
    there, outcome = meet(offers=offers, login=LOGIN)
    assert fate(outcome) == (Phase.AUTH, None, TROUBLE)
    assert outcome.reply.text == "the relay offers no AUTH PLAIN, LOGIN or CRAM-MD5"
    assert there.commands[1:] == ["QUIT"]


def expect_plain(line: Line) -> str:
    return check(line, base64.b64decode(line.relay.commands[-1].split()[2]) == "\0{}\0{}".format(*LOGIN).encode())


def expect_login(line: Line) -> str:
    line.say("334 VXNlcm5hbWU6")
    username = base64.b64decode(line.hear_until(b"\r\n"))
    line.say("334 UGFzc3dvcmQ6")
    return check(line, (username, base64.b64decode(line.hear_until(b"\r\n"))) == tuple(one.encode() for one in LOGIN))


def expect_cram_md5(line: Line) -> str:
    challenge = b"<1896.697170952@relay.example>"
    line.say_raw(b"334 " + base64.b64encode(challenge) + b"\r\n")
    digest = hmac.new(LOGIN[1].encode(), challenge, "md5").hexdigest()
    return check(line, base64.b64decode(line.hear_until(b"\r\n")).decode() == f"{LOGIN[0]} {digest}")


def check(line: Line, right: bool) -> str:
    return line.say("235 2.7.0 welcome" if right else "535 5.7.8 no")


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
    there, outcome = meet({"AUTH": expect}, offers=[f"AUTH {offered}"], login=LOGIN)
    assert outcome.reply.verdict is ACCEPTED
    assert [command.split()[1] for command in there.commands if command.startswith("AUTH")] == [chosen]


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
    mail: dict[str, Any] = {"login": CREDENTIALS, "sender": AUTHOR, "mime": BODY}
    with caplog.at_level(0):
        _, outcome = meet({step: f"{code} {ECHO}"}, RECIPIENT, offers=["AUTH PLAIN"], **mail)
    [reply] = outcome.recipients.values()
    assert outcome.reply.verdict is not ACCEPTED
    assert "planted" in reply.text or step == "EHLO"  # the relay's words are kept, but only in the record of the mail
    assert re.fullmatch(r"(-?\d+|no reply) at [a-z]+", reply.summary)
    assert_clean(reply.summary + caplog.text + "".join(capfd.readouterr()))


def stopped_by(script: Script, sender: str = AUTHOR) -> Reply:
    """Returns the reply that ended a conversation, whose traceback is clean."""
    with ScriptedRelay(script, offers=["AUTH LOGIN"]) as there:
        try:
            with opened(at(there.port, login=CREDENTIALS)) as session:
                session.begin(Envelope(sender, [ADA]), BODY)
                session.finish()
        except Stopped as error:
            assert_clean("".join(traceback.format_exception(error)) + str(error) + repr(error))
            return error.reply
    pytest.fail("nothing has stopped it")


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
    stopped_by({"500": reply, step: reply, **({"EHLO": f"502 {ECHO}"} if step == "HELO" else {})})


def test_no_traceback_holds_an_address_that_cannot_be_sent() -> None:
    assert_clean(stopped_by({}, f"{AUTHOR}\r\nDATA").text)


def test_a_relay_does_not_show_its_password() -> None:
    assert str(at(25, login=LOGIN)) == repr(at(25, login=LOGIN)) == "127.0.0.1:25"


def test_a_text_of_ours_names_no_address() -> None:
    _, outcome = meet({"RCPT": hang_up}, f"{RECIPIENT}\r\nDATA", RECIPIENT, sender=AUTHOR)
    assert_clean(" ".join(reply.text for reply in outcome.recipients.values()))


# A relay that is not there, hangs, drips or hangs up


def test_a_relay_that_refuses_the_connection_is_trouble() -> None:
    outcome = attempt(at(free_port()))
    assert fate(outcome) == (Phase.CONNECT, None, TROUBLE)
    assert outcome.reply.summary == "no reply at connect (Connection refused)"


def test_a_name_without_an_address_is_trouble(monkeypatch: pytest.MonkeyPatch) -> None:
    unknown = socket.gaierror(socket.EAI_NONAME, "Name or service not known")
    monkeypatch.setattr(socket, "getaddrinfo", Mock(side_effect=unknown))
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
    with black_hole() as nowhere, took_less_than(2):
        resolve_to(monkeypatch, *[nowhere] * 5)
        outcome = attempt(at(25, timeout=1))
    assert fate(outcome) == (Phase.CONNECT, None, TROUBLE)
    assert outcome.reply.text == "timed out"


def test_a_relay_is_reached_by_the_address_that_works(monkeypatch: pytest.MonkeyPatch) -> None:
    """And from there on it has the whole timeout for each reply."""
    late: Script = {"GREETING": raw(b"220 relay.example\r\n", size=10, pause=0.6)}
    with black_hole() as nowhere, ScriptedRelay(late) as there, monkeypatch.context() as patched:
        resolve_to(patched, free_port(), nowhere, there.port)
        assert attempt(at(25, timeout=1.5)).reply.verdict is ACCEPTED
    assert there.accepted == [MIME]


def test_a_deadline_that_passes_while_connecting_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    with black_hole() as nowhere, ScriptedRelay() as there, monkeypatch.context() as patched:
        resolve_to(patched, nowhere, there.port)
        outcome = attempt(at(25, timeout=1, deadline=0.1))
        eventually(lambda: there.connections)
    assert fate(outcome) == (Phase.CONNECT, None, TROUBLE)
    assert outcome.reply.text == TOO_LONG
    assert not there.commands


FAULTS = [
    (hang_up, 5, 10, "the relay closed the connection"),
    (hang, 0.3, 10, "timed out"),
    (drip(b"250-" + b"x" * 1000), 5, 0.4, TOO_LONG),
]


@pytest.mark.parametrize("step", ANSWERS)
@pytest.mark.parametrize(("fault", "timeout", "deadline", "text"), FAULTS, ids=["hang up", "hang", "drip"])
def test_an_answer_that_does_not_come_is_judged_by_where_it_is_missing(
    step: str, fault: Step, timeout: float, deadline: float, text: str
) -> None:
    if step == "." and fault is hang:  # the one answer that is waited for until the end of the conversation
        deadline, text = 1, TOO_LONG
    security = "starttls" if step == "STARTTLS" else "none"
    to: dict[str, Any] = {"timeout": timeout, "deadline": deadline, "security": security, "username": "x"}
    mime = LARGE if step == "BODY" else MIME
    with took_less_than(3):
        there, outcome = meet({step: fault}, ADA, BOB, offers=["STARTTLS", "AUTH PLAIN"], mime=mime, **to)
    assert fate(outcome)[::2] == ANSWERS[step]
    assert (outcome.reply.code, outcome.reply.text) == (None, text)
    assert not there.accepted
    assert there.connections == 1
    assert b"QUIT" not in there.heard


TLS_FAULTS = [
    (hang_up, 5, 10, ""),
    (hang, 0.3, 10, "timed out"),
    (hang, 5, 0.3, TOO_LONG),
    (drip(b"\x16\x03\x03\x40\x00" + b"2" * 1000), 5, 0.3, TOO_LONG),
]


@pytest.mark.parametrize(("security", "phase"), [("tls", Phase.CONNECT), ("starttls", Phase.STARTTLS)])
@pytest.mark.parametrize(("fault", "timeout", "deadline", "text"), TLS_FAULTS)
def test_a_tls_handshake_that_does_not_come_about_is_trouble(
    security: str, phase: Phase, fault: Step, timeout: float, deadline: float, text: str
) -> None:
    with took_less_than(3):
        _, outcome = meet({"TLS": fault}, offers=["STARTTLS"], security=security, timeout=timeout, deadline=deadline)
    assert fate(outcome) == (phase, None, TROUBLE)
    assert text in outcome.reply.text


@pytest.mark.parametrize("step", ["MAIL", "."])
def test_the_deadline_ends_a_conversation_inside_tls(step: str, certified: dict[str, Any]) -> None:
    with took_less_than(3):
        _, outcome = meet({step: drip(b"250-" + b"x" * 1000)}, security="tls", timeout=5, deadline=0.5, **certified)
    assert outcome.reply.verdict is (IN_DOUBT if step == "." else TROUBLE)
    assert outcome.reply.text == TOO_LONG


@pytest.mark.parametrize(("timeout", "deadline", "text"), [(2, 10, "timed out"), (5, 0.5, TOO_LONG)])
def test_a_relay_that_neither_reads_a_body_nor_speaks_costs_one_timeout_and_no_more_than_the_deadline(
    timeout: float, deadline: float, text: str
) -> None:
    with took_less_than(3.5):
        _, outcome = meet({"BODY": hang}, timeout=timeout, deadline=deadline, mime=LARGE)
    assert fate(outcome) == (Phase.TRANSFER, None, TRY_AGAIN)
    assert outcome.reply.text == text


def test_the_answer_to_the_final_dot_may_take_the_rest_of_the_conversation() -> None:
    """A relay that scans for viruses before it answers has the mail, and another attempt would be another mail."""
    _, outcome = meet({".": raw(b"250 2.0.0 clean\r\n", size=10, pause=1)}, timeout=0.3)
    assert outcome.reply.verdict is ACCEPTED


def test_a_reply_that_came_before_the_deadline_counts_after_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """The machine may be slow; that the relay has answered is no less true for it."""
    with ScriptedRelay() as there, opened(at(there.port)) as session:
        read = session.final_reply

        def read_late() -> Reply:
            eventually(lambda: there.accepted)
            session.abort()
            return read()

        monkeypatch.setattr(session, "final_reply", read_late)
        session.begin(Envelope(SENDER, [ADA]), MIME)
        assert session.finish().verdict is ACCEPTED


def test_a_deadline_that_passes_before_the_dot_leaves_nothing_in_doubt() -> None:
    there, outcome = meet(deadline=0.2, before_dot=lambda _: time.sleep(0.4))
    assert fate(outcome) == (Phase.TRANSFER, None, TRY_AGAIN)
    assert not there.accepted


@pytest.mark.parametrize("security", ["none", "tls"])
@pytest.mark.parametrize(
    ("words", "verdict"),
    [
        ("552 5.3.4 message too large", REFUSED),
        ("421 4.3.2 shutting down", TROUBLE),
        ("250 2.0.0 thanks", TROUBLE),
        ("garbage", TROUBLE),
    ],
)
def test_why_the_relay_cut_the_body_off_is_read_before_judging(
    words: str, verdict: Verdict, security: str, certified: dict[str, Any]
) -> None:
    there, outcome = meet({"BODY": last_words(words)}, security=security, mime=LARGE, **certified)
    assert fate(outcome)[::2] == (Phase.TRANSFER, verdict)
    assert outcome.reply.text == words[4:]
    assert b"QUIT" not in there.heard


@pytest.mark.parametrize("words", ["552 5.3.4 message too large", "421 4.3.2 shutting down"])
def test_a_relay_that_objects_in_mid_body_and_reads_on_is_heard_after_the_dot(words: str) -> None:
    _, outcome = meet({"BODY": words, ".": hang})
    assert fate(outcome) == (Phase.DOT, int(words[:3]), judge(Phase.DOT, int(words[:3])))


def endless(line: Line) -> str:
    """A reply of many lines that never ends."""
    code = b"220" if not line.relay.commands else b"250"
    while True:
        line.say_raw((code + b"-" + b"x" * 1000 + b"\r\n") * 100)


@pytest.mark.parametrize(
    ("script", "phase", "verdict"),
    [
        ({"GREETING": endless}, Phase.GREETING, TROUBLE),
        ({"EHLO": endless}, Phase.HELLO, TROUBLE),
        ({"MAIL": endless}, Phase.MAIL, TROUBLE),
        ({"RCPT": endless}, Phase.RCPT, TROUBLE),
        ({".": endless}, Phase.DOT, IN_DOUBT),
    ],
)
def test_a_reply_that_never_ends_is_given_up_before_it_fills_the_memory(
    script: Script, phase: Phase, verdict: Verdict
) -> None:
    with ScriptedRelay(script) as there:
        outcome = attempt(at(there.port))
    assert (outcome.reply.phase, outcome.reply.code, outcome.reply.verdict) == (phase, -1, verdict)
    assert "more lines than any has" in outcome.reply.text
