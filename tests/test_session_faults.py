"""A relay that is not there, hangs, drips or hangs up: judged by where the answer is missing, and bounded in time."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import pytest
import trustme

from smtp.envelope import Envelope
from smtp.verdict import Phase, Reply, Verdict, judge
from tests.conversations import (
    ACCEPTED,
    ADA,
    BOB,
    IN_DOUBT,
    LARGE,
    MIME,
    REFUSED,
    SENDER,
    TROUBLE,
    TRY_AGAIN,
    at,
    attempt,
    fate,
    opened,
    server_context,
    took_less_than,
)
from tests.scripted_relay import (
    Line,
    Script,
    ScriptedRelay,
    Step,
    drip,
    hang,
    hang_up,
    last_words,
    pieces,
    reset,
)
from tests.servers import eventually, free_port

pytestmark = pytest.mark.usefixtures("nothing_is_left_open")


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
    with black_hole() as nowhere, took_less_than(2):
        resolve_to(monkeypatch, *[nowhere] * 5)
        outcome = attempt(at(25, timeout=1))
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
    (hang_up, 5, 10, "the relay closed the connection"),
    (hang, 0.3, 10, "timed out"),
    (drip(b"250-" + b"x" * 1000), 5, 0.4, "the conversation took too long"),
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
        deadline, text = 1, "the conversation took too long"
    with ScriptedRelay({step: fault}, offers=["STARTTLS", "AUTH PLAIN"]) as there, took_less_than(3):
        to = at(there.port, timeout=timeout, deadline=deadline, security="starttls" if step == "STARTTLS" else "none")
        outcome = attempt(to._replace(username="x"), ADA, BOB, mime=LARGE if step == "BODY" else MIME)
    assert fate(outcome) == (phase, None, verdict)
    assert outcome.reply.text == text
    assert not there.accepted
    assert there.connections == 1
    assert b"QUIT" not in there.heard


TLS_FAULTS = [
    (hang_up, 5, 10, ""),
    (hang, 0.3, 10, "timed out"),
    (hang, 5, 0.3, "the conversation took too long"),
    (drip(b"\x16\x03\x03\x40\x00" + b"2" * 1000), 5, 0.3, "the conversation took too long"),
]


@pytest.mark.parametrize(("security", "phase"), [("tls", Phase.CONNECT), ("starttls", Phase.STARTTLS)])
@pytest.mark.parametrize(("fault", "timeout", "deadline", "text"), TLS_FAULTS)
def test_a_tls_handshake_that_does_not_come_about_is_trouble(
    security: str, phase: Phase, fault: Step, timeout: float, deadline: float, text: str,
    authority: trustme.CA, ca_file: str,
) -> None:  # fmt: skip
    script: Script = {"TLS": fault}
    with ScriptedRelay(script, offers=["STARTTLS"], implicit=security == "tls") as there, took_less_than(3):
        outcome = attempt(at(there.port, security=security, ca_file=ca_file, timeout=timeout, deadline=deadline))
    assert fate(outcome) == (phase, None, TROUBLE)
    assert text in outcome.reply.text


@pytest.mark.parametrize("step", ["MAIL", "."])
def test_the_deadline_ends_a_conversation_inside_tls(step: str, authority: trustme.CA, ca_file: str) -> None:
    script: Script = {step: drip(b"250-" + b"x" * 1000)}
    with ScriptedRelay(script, tls=server_context(authority), implicit=True) as there, took_less_than(3):
        outcome = attempt(at(there.port, security="tls", ca_file=ca_file, timeout=5, deadline=0.5))
    assert outcome.verdict is (IN_DOUBT if step == "." else TROUBLE)
    assert outcome.reply.text == "the conversation took too long"


def test_the_deadline_ends_a_body_that_the_relay_does_not_read() -> None:
    with ScriptedRelay({"BODY": hang}) as there, took_less_than(3):
        outcome = attempt(at(there.port, timeout=5, deadline=0.5), mime=LARGE)
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
    with ScriptedRelay({"BODY": hang}) as there, took_less_than(3.5):
        outcome = attempt(at(there.port, timeout=2), mime=LARGE)
    assert fate(outcome) == (Phase.TRANSFER, None, TRY_AGAIN)


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
