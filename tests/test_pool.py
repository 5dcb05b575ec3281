"""Sessions that are kept for the next mail: when, for how long, and what becomes of a mail on one that has died."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from smtp import pool, session
from smtp.envelope import Envelope
from smtp.policy import Phase, Verdict
from smtp.relay import Relay
from smtp.verdict import Outcome
from tests.conversations import POOL, another, at, fate, opened, served, took_less_than
from tests.scripted_relay import OBLIGING, Act, Script, Step, drip, hang, hang_up, last_words, raw, reset, then
from tests.servers import eventually
from tests.smtp_samples import ADA, BOB, CAY, LARGE, LOGIN, MIME, PIPES, SENDER, WAYS
from tests.verdicts import ACCEPTED, IN_DOUBT, REFUSED, TROUBLE, TRY_AGAIN

pytestmark = pytest.mark.usefixtures("nothing_is_left_open")


@WAYS
@pytest.mark.parametrize("security", ["none", "tls"])
def test_many_mails_share_a_session(offers: list[str], security: str, certified: dict[str, Any]) -> None:
    with served(offers=offers, security=security, **certified) as (there, to):
        for _ in range(10):
            assert fate(another(to)) == (Phase.DOT, 250, ACCEPTED)
    assert there.accepted == [MIME] * 10
    assert there.connections == 1
    assert [command.split()[0] for command in there.commands].count("EHLO") == 1
    assert "RSET" not in there.commands
    assert there.commands[-1] == "QUIT"


@pytest.mark.parametrize(("security", "tls"), [("none", ""), ("starttls", "TLSv1."), ("tls", "TLSv1.")])
@pytest.mark.parametrize(
    ("script", "dot"), [({}, True), ({".": hang_up}, True), ({"RCPT": last_words("421 no")}, False)]
)
def test_a_mail_has_its_times_its_size_and_the_version_of_tls(
    script: Script, dot: bool, security: str, tls: str, certified: dict[str, Any]
) -> None:
    offers = ["STARTTLS"] if security == "starttls" else []
    with served(script, offers=offers, security=security, **certified) as (_, to), POOL.conversation(to) as talk:
        since = time.monotonic() - 1
        said = talk.begin(Envelope(SENDER, [ADA]), MIME)
        assert isinstance(said, Outcome) != dot
        assert not dot or isinstance(talk.finish(), Outcome)
        seen = talk.figures(since)
    assert (seen["dot_ms"] is not None, seen["tls"].startswith(tls), bool(seen["tls"])) == (dot, True, bool(tls))
    assert 1000 <= (seen["dot_ms"] or 1000) <= seen["took_ms"] < 5000
    assert seen["bytes"] == len(MIME)


def test_a_session_serves_one_relay_and_one_login_only() -> None:
    with served(offers=["AUTH PLAIN"]) as (there, to):
        for login in (LOGIN, ("other", "password"), (None, None)):
            another(at(to.port, login=login))
    assert there.connections == 3


def test_threads_that_send_at_once_have_a_session_each_and_lend_it_to_the_next() -> None:
    meet = threading.Barrier(4)

    def mails(to: Relay) -> None:
        for _ in range(3):
            assert another(to, before_dot=lambda _: meet.wait(5)).reply.verdict is ACCEPTED

    with served() as (there, to):
        for _ in range(2):
            with ThreadPoolExecutor(4) as threads:
                list(threads.map(mails, [to] * 4))
    assert there.connections == 4
    assert there.accepted == [MIME] * 24


AFTER_MAIL: Script = {"RCPT": "503 5.5.1 MAIL first", "DATA": "503 5.5.1 MAIL first", ".": "503 5.5.1 MAIL first"}
NOBODY: Script = {"DATA": "554 5.5.1 no valid recipients", ".": "554 5.5.1 no valid recipients"}
FATES: list[tuple[Script, Phase, int | None, Verdict]] = [
    ({"MAIL": "451 4.3.0 not now", **AFTER_MAIL}, Phase.MAIL, 451, TROUBLE),
    ({"MAIL": "550 5.7.1 not you", **AFTER_MAIL}, Phase.MAIL, 550, REFUSED),
    ({"MAIL": "530 5.7.0 STARTTLS first", **AFTER_MAIL}, Phase.MAIL, 530, TROUBLE),
    ({"MAIL": last_words("421 4.3.2 closing")}, Phase.MAIL, 421, TROUBLE),
    ({"RCPT": "550 5.1.1 no", **NOBODY}, Phase.RCPT, 550, REFUSED),
    ({"RCPT": "450 4.2.0 busy", **NOBODY}, Phase.RCPT, 450, TRY_AGAIN),
    ({"RCPT": last_words("421 4.3.2 closing")}, Phase.RCPT, 421, TROUBLE),
    ({"RCPT": ["250 ok", last_words("421 4.3.2 closing")]}, Phase.RCPT, 421, TROUBLE),
    ({".": "554 5.7.1 spam"}, Phase.DOT, 554, REFUSED),
    ({".": "452 4.3.1 disk full"}, Phase.DOT, 452, TROUBLE),
    ({".": hang_up}, Phase.DOT, None, IN_DOUBT),
]


@WAYS
@pytest.mark.parametrize(("script", "phase", "code", "verdict"), FATES)
def test_a_reply_is_judged_by_its_own_phase_and_leaves_a_session_in_order_or_none(
    offers: list[str], script: Script, phase: Phase, code: int | None, verdict: Verdict
) -> None:
    """The next mail must not meet with what the last one left."""
    with served(script, offers=offers) as (there, to):
        assert fate(another(to, ADA, BOB)) == (phase, code, verdict)
        assert not there.accepted
        kept = code not in (None, 421) and verdict is not TROUBLE
        if not kept:
            eventually(lambda: not any(thread.is_alive() for thread, _ in there.lines))
        there.script.update({name: [relay_says] for name, relay_says in OBLIGING.items()})
        assert fate(another(to, CAY, mime=MIME + b"2\r\n")) == (Phase.DOT, 250, ACCEPTED)
    assert there.accepted == [MIME + b"2\r\n"]
    assert there.connections == (1 if kept else 2)
    reset_needed = kept and phase is not Phase.DOT
    assert ("RSET" in there.commands) == reset_needed


@pytest.mark.parametrize(
    "answer", ["500 what?", "220 ready", "421 closing", hang_up, hang, "354 go", raw(b"what?\r\n")]
)
def test_a_session_whose_rset_is_not_answered_250_is_closed(answer: Step, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session, "PATIENCE", 0.2)
    with served({"RCPT": ["550 5.1.1 no", "250 ok"], "RSET": answer}) as (there, to), took_less_than(4):
        assert another(to).reply.verdict is REFUSED
        assert another(to).reply.verdict is ACCEPTED
        assert there.connections == 2
    assert there.accepted == [MIME]


def test_a_session_in_which_the_relay_waits_for_a_mail_to_nobody_is_not_kept() -> None:
    with served({"RCPT": "550 5.1.1 no"}, offers=PIPES) as (_, to):
        assert another(to).reply.verdict is REFUSED
        assert not POOL.idle


@WAYS
@pytest.mark.parametrize("step", ["MAIL", "RCPT", "DATA", "."])
@pytest.mark.parametrize("reply", ["421 4.3.2 closing soon", "550 5.7.606 banned", raw(b"what?\r\n")])
def test_a_session_that_the_relay_will_close_or_has_lost_step_in_is_not_used_again(
    offers: list[str], step: str, reply: Step
) -> None:
    with served({step: [reply, OBLIGING[step]]}, offers=offers) as (there, to):
        assert another(to).reply.verdict is not ACCEPTED
        assert another(to).reply.verdict is ACCEPTED
    assert there.connections == 2


def test_the_outcome_is_written_down_before_a_word_more_is_said() -> None:
    with served({"RCPT": "550 5.1.1 no"}) as (there, to):
        with POOL.conversation(to) as talk:
            assert isinstance(talk.begin(Envelope(SENDER, [ADA]), MIME), Outcome)
            time.sleep(0.1)
            assert there.commands[-1] == f"RCPT TO:<{ADA}>"
        eventually(lambda: there.commands[-1] == "RSET")


DEATHS: dict[str, Act] = {
    "FIN": hang_up,
    "RST": reset,
    "421 and FIN": last_words("421 4.4.2 idle for too long"),
    "a word unasked": raw(b"250 hello?\r\n"),
}


@WAYS
@pytest.mark.parametrize("security", ["none", "tls"])
@pytest.mark.parametrize("death", DEATHS)
def test_a_session_that_died_between_two_mails_costs_the_second_nothing(
    offers: list[str], death: str, security: str, certified: dict[str, Any]
) -> None:
    answers: list[Step] = [then("250 2.0.0 queued", DEATHS[death]), "250 2.0.0 queued"]
    with served({".": answers}, offers=offers, security=security, **certified) as (there, to):
        another(to)
        time.sleep(0.1)
        calls: list[object] = []
        assert fate(another(to, BOB, before_dot=calls.append)) == (Phase.DOT, 250, ACCEPTED)
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
    with served({step: [alive[step], death, alive[step]]}, offers=offers, timeout=0.5) as (there, to):
        assert another(to).reply.verdict is ACCEPTED
        assert fate(another(to, BOB, mime=LARGE)) == (Phase.DOT, 250, ACCEPTED)
    assert there.accepted == [MIME, LARGE]
    assert there.connections == 2


def test_a_kept_session_whose_relay_does_not_answer_costs_its_mail_nothing() -> None:
    """A NAT that forgot the connection swallows all of it, and says nothing."""
    with served({"MAIL": ["250 ok", hang, "250 ok"]}, offers=PIPES, timeout=0.5) as (there, to):
        another(to)
        assert fate(another(to, BOB)) == (Phase.DOT, 250, ACCEPTED)
    assert len(there.accepted) == 2


@pytest.mark.parametrize(
    ("step", "reply"),
    [
        ("MAIL", "503 5.5.1 Bad sequence of commands"),
        ("RCPT", "503 5.5.0 MAIL first"),  # hMailServer behind a scanner: gitea#9711
        ("DATA", "503 valid RCPT command must precede DATA"),
        ("RCPT", "554 SMTP synchronization error"),  # Exim
        ("MAIL", "421 4.7.0 improper command pipelining after EHLO"),  # Postfix, reject_unauth_pipelining
        ("RCPT", "550 5.5.1 Protocol error: pipelining not allowed"),
    ],
)
def test_a_relay_that_does_not_take_pipelined_commands_gets_them_one_by_one(step: str, reply: str) -> None:
    with served({step: [reply, OBLIGING[step]]}, offers=PIPES) as (there, to):
        assert fate(another(to)) == (Phase.DOT, 250, ACCEPTED)
        before = there.turns
        assert fate(another(to, BOB)) == (Phase.DOT, 250, ACCEPTED)
        assert there.turns - before == 4
        POOL.one_by_one.clear()
    assert there.connections == 2
    assert len(there.accepted) == 2


def test_an_address_in_a_refusal_does_not_turn_pipelining_off() -> None:
    with served({"RCPT": "550 5.1.1 <pipeline@example.com> unknown"}, offers=PIPES) as (_, to):
        assert fate(another(to)) == (Phase.RCPT, 550, REFUSED)
        assert to not in POOL.one_by_one


def test_a_relay_that_says_so_one_by_one_too_means_the_mail() -> None:
    with served({"MAIL": "503 5.5.1 no"}, offers=PIPES) as (there, to):
        assert fate(another(to)) == (Phase.MAIL, 503, TRY_AGAIN)
        assert fate(another(to)) == (Phase.MAIL, 503, TRY_AGAIN)
        POOL.one_by_one.clear()
    assert there.connections == 3


@WAYS
@pytest.mark.parametrize("death", [hang_up, reset, last_words("421 4.4.2 closing"), hang])
def test_after_the_final_dot_nothing_is_repeated(offers: list[str], death: Step) -> None:
    with served({".": ["250 ok", death, "250 ok"]}, offers=offers, deadline=1) as (there, to):
        another(to)
        outcome = another(to, BOB)
        assert there.connections == 1
    assert outcome.reply.phase is Phase.DOT
    assert outcome.reply.verdict is not ACCEPTED
    assert len(there.bodies) == 2


def test_the_session_that_replaces_a_dead_one_decides() -> None:
    with served({"MAIL": ["250 ok", hang_up, "550 5.7.1 not you"]}) as (_, to):
        another(to)
        assert fate(another(to)) == (Phase.MAIL, 550, REFUSED)


def test_a_session_ends_after_so_many_mails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool, "MOST_MAILS", 3)
    with served() as (there, to):
        for _ in range(7):
            another(to)
    assert there.connections == 3
    assert there.commands.count("QUIT") == 3


def test_a_session_ends_when_it_is_old(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool, "OLDEST", 0.3)
    with served() as (there, to):
        another(to)
        another(to)
        assert there.connections == 1
        time.sleep(0.3)
        another(to)
        another(to)
    assert there.connections == 2


def test_a_session_that_nobody_uses_is_closed_and_its_watcher_goes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool, "IDLE", 0.3)
    with served() as (there, to):
        another(to)
        assert [thread.name for thread in threading.enumerate()].count("sessions") == 1
        eventually(lambda: there.commands[-1] == "QUIT", 5)
        eventually(lambda: "sessions" not in [thread.name for thread in threading.enumerate()], 5)
        another(to)
    assert there.connections == 2


def test_one_thread_watches_all_conversations() -> None:
    with served(deadline=60) as (_, to), opened(to), opened(to), opened(to):
        assert [thread.name for thread in threading.enumerate()].count("sessions") == 1


@WAYS
def test_the_deadline_ends_a_mail_on_a_warm_session(offers: list[str]) -> None:
    """It is the mail's own: the session's age does not count, and the session is not used again."""
    slow = drip(b"250-" + b"x" * 1000)
    with served({".": ["250 ok", "250 ok", slow, "250 ok"]}, offers=offers, deadline=0.6) as (there, to):
        for _ in range(2):
            assert another(to).reply.verdict is ACCEPTED
            time.sleep(0.4)
        with took_less_than(2):
            outcome = another(to)
        assert fate(outcome) == (Phase.DOT, None, IN_DOUBT)
        assert outcome.reply.text == "the conversation took too long"
        assert another(to).reply.verdict is ACCEPTED
    assert there.connections == 2


@pytest.mark.parametrize(("timeout", "deadline", "connections"), [(0.7, 1, 2), (5, 0.4, 1)])
def test_a_session_and_the_one_that_replaces_it_share_one_deadline(
    timeout: float, deadline: float, connections: int
) -> None:
    """Once it has passed none is opened."""
    with served({"MAIL": ["250 ok", hang]}, timeout=timeout, deadline=deadline) as (there, to), took_less_than(1.5):
        another(to)
        outcome = another(to)
        time.sleep(0.1)
        assert there.connections == connections
    assert fate(outcome) == (Phase.MAIL, None, TROUBLE)
    assert outcome.reply.text == "the conversation took too long"


def test_a_deadline_that_passes_while_the_outcome_is_written_down_closes_the_session() -> None:
    with served(deadline=0.3) as (there, to):
        with POOL.conversation(to) as talk:
            talk.begin(Envelope(SENDER, [ADA]), MIME)
            outcome = talk.finish()
            time.sleep(0.5)
        assert isinstance(outcome, Outcome)
        assert outcome.reply.verdict is ACCEPTED
        another(to)
    assert there.connections == 2
