"""The judgement, asked as a table: what each answer of a relay means."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product

import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from smtp.verdict import Phase, Reply, Verdict, judge
from tests.verdicts import ACCEPTED, IN_DOUBT, REFUSED, TROUBLE, TRY_AGAIN

QUOTED = [  # what relays say where their words decide
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
    # what looks like them and is not
    (Phase.MAIL, 550, "5.7.60 SMTP; Client does not have permissions to send as this sender", REFUSED),
    (Phase.RCPT, 550, "5.1.1 The email account that you tried to reach does not exist.", REFUSED),
    (Phase.DOT, 554, "5.2.252 SendAsDenied; this login may not send as that sender", REFUSED),
]

# A: accepted, which before DOT means go on. t: try again, r: refused, d: in doubt, !: trouble.
MATRIX = """
           none 150 200 220 235 250 299 334 354 399  -1   0 999
connect    !    !   !   !   !   !   !   !   !   !    !   !  !
greeting   !    !   A   A   A   A   A   !   !   !    !   !  !
hello      !    !   A   A   A   A   A   !   !   !    !   !  !
starttls   !    !   !   A   !   !   !   !   !   !    !   !  !
auth       !    !   !   !   A   !   !   !   !   !    !   !  !
mail       !    !   A   A   A   A   A   !   !   !    !   !  !
rcpt       !    !   A   A   A   A   A   !   !   !    !   !  !
data       !    !   !   !   !   !   !   !   A   !    !   !  !
transfer   t    !   !   !   !   !   !   !   !   !    !   !  !
dot        d    d   A   A   A   A   A   d   d   d    d   d  d

                                     421 432 450 451 452 454 499 503 530 534 535 538 550 551 552 553 554 599
connect/greeting/hello/starttls/auth !   !   !   !   !   !   !   !   !   !   !   !   !   !   !   !   !   !
mail/data/transfer/dot               t   !   t   t   t   !   t   t   !   !   !   !   r   r   r   r   r   r
rcpt                                 t   !   t   t   t   !   t   t   !   !   !   !   r   r   t   r   r   r
"""
LETTERS = {"A": ACCEPTED, "t": TRY_AGAIN, "r": REFUSED, "d": IN_DOUBT, "!": TROUBLE}


def cells() -> Iterator[tuple[Phase, int | None, Verdict]]:
    for block in MATRIX.strip().split("\n\n"):
        head, *rows = (line.split() for line in block.splitlines())
        for names, *letters in rows:
            for name, (code, letter) in product(names.split("/"), zip(head, letters, strict=True)):
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
