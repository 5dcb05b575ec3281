"""The judgement, asked as a table: what each answer of a relay means."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from smtp.verdict import Phase, Reply, Verdict, judge
from tests.verdicts import ACCEPTED, IN_DOUBT, REFUSED, TROUBLE, TRY_AGAIN

# What relays say, as they word it, where the matrix below does not decide by itself.
QUOTED = [
    # 451, 452 on RCPT or DATA; too many recipients; 432
    (Phase.RCPT, 451, "4.7.1 Greylisting in action, please come back later", TRY_AGAIN),
    (Phase.RCPT, 452, "4.5.3 Your message has too many recipients", TRY_AGAIN),
    (Phase.RCPT, 552, "5.5.3 too many recipients", TRY_AGAIN),
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
    # 535, 534, 538: the login
    (Phase.AUTH, 535, "5.7.8 Username and Password not accepted.", TROUBLE),
    (Phase.AUTH, 535, "5.7.139 Authentication unsuccessful, SmtpClientAuthentication is disabled", TROUBLE),
    (Phase.AUTH, 534, "5.7.9 Application-specific password required.", TROUBLE),
    (Phase.MAIL, 535, "Authentication Credentials Invalid", TROUBLE),
    (Phase.MAIL, 534, "5.7.9 Authentication mechanism is too weak", TROUBLE),
    (Phase.MAIL, 538, "5.7.11 Encryption required for requested authentication mechanism", TROUBLE),
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
    (Phase.STARTTLS, 454, "4.7.0 TLS not available due to local problem", TROUBLE),
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
def test_a_relays_own_words_mean_what_they_say(phase: Phase, code: int | None, text: str, verdict: Verdict) -> None:
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
