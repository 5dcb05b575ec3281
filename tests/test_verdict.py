"""The judgement, asked as a table: what each answer of a relay means."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from smtp import policy
from smtp.policy import TABLE, Phase, Row, Verdict, row_for
from smtp.verdict import LONGEST_HINT, Reply, judge
from tests.verdicts import ACCEPTED, IN_DOUBT, REFUSED, TROUBLE, TRY_AGAIN

# 257 replies of relays, as they word them, with the right judgement, the pause they ask for (seconds), and the source.
with (Path(__file__).parent / "relay_replies.tsv").open(encoding="utf-8") as table:
    REPLIES = list(csv.DictReader(table, delimiter="\t", quoting=csv.QUOTE_NONE))
# Samples that the policy was not made from.
OTHERS: list[tuple[Phase, int | None, str, Verdict]] = [
    (Phase.DOT, 454, "4.7.0 not now", TROUBLE),
    (Phase.RCPT, 550, "lookup of host ratelimit.evil.example failed", REFUSED),
    (Phase.RCPT, 451, "host lookup for throttle.evil.example did not complete", TRY_AGAIN),
    (Phase.MAIL, 550, "sender domain sending-limit.example not verified", REFUSED),
    (Phase.DOT, 554, "Message rejected: URL in user content is blocked", REFUSED),
    (Phase.RCPT, 552, "Requested mail action aborted", TRY_AGAIN),
    (
        Phase.RCPT,
        550,
        "5.2.1 The email account that you tried to reach is disabled. Learn more at https://support.google.com/mail/?p=DisabledUser",
        REFUSED,
    ),
    (Phase.RCPT, 550, "5.1.1 Mailbox disabled for this recipient", REFUSED),
    (Phase.RCPT, 550, "User account is disabled", REFUSED),
    (Phase.RCPT, 554, "delivery error: dd This user doesn't have a yahoo.com account (x@yahoo.com) [-5]", REFUSED),
    (Phase.RCPT, 550, "5.7.1 This account is currently blocked", REFUSED),
    (Phase.DOT, 550, "5.7.1 Your message was rejected because your account has been blocked for sending spam", TROUBLE),
    (Phase.DOT, 554, "5.7.1 Your account has exceeded its daily sending limit", TROUBLE),
    (Phase.DOT, 550, "5.7.1 Message contains spam or virus or sender is blocked", REFUSED),
    (Phase.RCPT, 450, "4.2.2 mailbox full", TRY_AGAIN),
    (Phase.RCPT, 452, "4.2.2 user over quota", TRY_AGAIN),
    (Phase.RCPT, 552, "5.2.2 mailbox quota exceeded", REFUSED),
    (Phase.DOT, 421, "4.7.0 Try again later, closing connection", TROUBLE),
    (Phase.MAIL, 451, "4.7.1 Greylisting in action, please come back in 00:04:59", TRY_AGAIN),
    (Phase.RCPT, 451, "4.7.1 Greylisting in action, please come back in 00:04:59", TRY_AGAIN),
    (Phase.RCPT, 450, "4.7.1 Recipient address rejected: Policy restrictions; try later", TRY_AGAIN),
    (Phase.DOT, 451, "4.7.0 Temporary local problem, please try again", TRY_AGAIN),
    (
        Phase.DOT,
        554,
        "5.7.1 The message from (<a@example.com>) with the subject of (rate limit) matches spam",
        REFUSED,
    ),
    (Phase.DOT, 550, "5.7.350 Remote server returned message detected as spam", REFUSED),
    (Phase.DOT, 550, "High probability of spam", REFUSED),
    (Phase.RCPT, 550, "5.4.1 Recipient address rejected: Access denied", REFUSED),
    (Phase.MAIL, 550, "5.7.1 Sending limit exceeded for this domain", TROUBLE),
    (Phase.MAIL, 451, "4.7.1 You have exceeded your hourly sending limit of 200", TROUBLE),
    (Phase.MAIL, 450, "4.7.1 Error: too many connections", TROUBLE),
    (Phase.DOT, 452, "4.3.1 Out of memory", TROUBLE),
    (Phase.MAIL, 452, "4.3.1 Insufficient system storage", TROUBLE),
    (
        Phase.RCPT,
        550,
        "5.7.133 RESOLVER.RST.SenderNotAuthenticatedForGroup; authentication required; not authenticated",
        REFUSED,
    ),
    (Phase.RCPT, 550, "5.7.1 RESOLVER.RST.AuthRequired; authentication required", REFUSED),
    (
        Phase.DOT,
        554,
        "5.2.0 STOREDRV.Submission.Exception:OutboundSpamException; Failed to process",
        TROUBLE,
    ),
    (Phase.MAIL, 501, "5.1.7 Invalid address", REFUSED),
    (Phase.MAIL, 553, "5.1.8 Domain of sender address does not exist", REFUSED),
    (Phase.DOT, 554, "5.3.4 message too big", REFUSED),
    (Phase.MAIL, 535, "5.7.0 auth", TROUBLE),
    (Phase.RCPT, 550, "This message was not accepted due to domain (example.com) owner DMARC policy", REFUSED),
    (Phase.RCPT, 421, "4.2.1 mailbox busy", TRY_AGAIN),
    (Phase.RCPT, 550, "5.7.23 The message was rejected because of Sender Policy Framework violation", REFUSED),
    (Phase.RCPT, 451, "4.3.0 <rcpt>: Temporary lookup failure", TROUBLE),
    (Phase.DOT, 250, "ok", ACCEPTED),
    (Phase.RCPT, 550, "sorry, no mailbox here by that name (#5.1.1)", REFUSED),
    (Phase.RCPT, 553, "sorry, your mail was administratively denied. (#5.7.1)", REFUSED),
    (Phase.DOT, 554, "Transaction failed: Address blacklisted", REFUSED),
    (Phase.RCPT, 550, "5.7.1 Recipient's mailbox has exceeded the limit of incoming messages", REFUSED),
    (Phase.RCPT, 450, "4.2.1 Mailbox has exceeded the limit", TRY_AGAIN),
    (Phase.RCPT, 554, "5.7.1 : Recipient address rejected: You have exceeded the daily message limit", TROUBLE),
    (Phase.DOT, 554, "Message rejected: Account is in the sandbox; email address not verified", REFUSED),
    (Phase.DOT, 450, "4.7.1 Message throttled: too many messages sent by user", TROUBLE),
    (Phase.HTTP, 200, "accepted as 49a3999c-0ce1-4ea6-ab68-afcd6dc2e794", ACCEPTED),
    (Phase.HTTP, 200, "the answer is none of the API", TROUBLE),
    (Phase.HTTP, 400, "invalid_idempotency_key: The key must be 1 to 256 characters", REFUSED),
    (Phase.HTTP, 401, "restricted_api_key: This API key is restricted to only send emails", TROUBLE),
    (Phase.HTTP, 402, "", TROUBLE),
    (Phase.HTTP, 403, "invalid_api_key: API key is invalid", TROUBLE),
    (Phase.HTTP, 403, "validation_error: The acme.example domain is not verified", TRY_AGAIN),
    (Phase.HTTP, 404, "not_found: The requested endpoint does not exist", TROUBLE),
    (Phase.HTTP, 405, "method_not_allowed: Method is not allowed for the requested path", TROUBLE),
    (Phase.HTTP, 408, "", TRY_AGAIN),
    (Phase.HTTP, 409, "invalid_idempotent_request: Same key, another payload", ACCEPTED),
    (Phase.HTTP, 409, "concurrent_idempotent_requests (retry after 1 s): Same key, in progress", TROUBLE),
    (Phase.HTTP, 409, "validation_error: not possible", TRY_AGAIN),
    (Phase.HTTP, 413, "the answer is none of the API", REFUSED),
    (Phase.HTTP, 400, "the answer is none of the API", TROUBLE),
    (Phase.HTTP, 422, "invalid_from_address: invalid_idempotent_request", REFUSED),
    (Phase.HTTP, 429, "daily_quota_exceeded: You have reached your daily email sending quota", TROUBLE),
    (Phase.HTTP, 451, "security_error: We may have found a security issue with the request", REFUSED),
    (Phase.HTTP, 500, "internal_server_error: An unexpected error occurred", TROUBLE),
]

# A: accepted, which before DOT means go on. t: try again, r: refused, d: in doubt, !: trouble.
MATRIX = """
           none 150 200 220 235 250 299 334 354 399 421 450 499 503 530 550 599  -1   0 999
connect    !    !   !   !   !   !   !   !   !   !   !   !   !   !   !   !   !    !   !  !
greeting   !    !   A   A   A   A   A   !   !   !   !   !   !   !   !   !   !    !   !  !
hello      !    !   A   A   A   A   A   !   !   !   !   !   !   !   !   !   !    !   !  !
starttls   !    !   !   A   !   !   !   !   !   !   !   !   !   !   !   !   !    !   !  !
auth       !    !   !   !   A   !   !   !   !   !   !   !   !   !   !   !   !    !   !  !
mail       !    !   A   A   A   A   A   !   !   !   !   t   t   t   !   r   r    !   !  !
rcpt       !    !   A   A   A   A   A   !   !   !   !   t   t   t   !   r   r    !   !  !
data       !    !   !   !   !   !   !   !   A   !   !   t   t   t   !   r   r    !   !  !
transfer   t    !   !   !   !   !   !   !   !   !   !   t   t   t   !   r   r    !   !  !
dot        d    d   A   A   A   A   A   d   d   d   !   t   t   t   !   r   r    d   d  d
http       !    !   !   !   !   !   !   !   !   !   !   r   r   !   !   !   !    !   !  !
"""
LETTERS = {"A": ACCEPTED, "t": TRY_AGAIN, "r": REFUSED, "d": IN_DOUBT, "!": TROUBLE}


def cells() -> Iterator[tuple[Phase, int | None, Verdict]]:
    head, *rows = (line.split() for line in MATRIX.strip().splitlines())
    for name, *letters in rows:
        for code, letter in zip(head, letters, strict=True):
            yield Phase(name), None if code == "none" else int(code), LETTERS[letter]


@pytest.mark.parametrize("row", REPLIES, ids=lambda row: f"{row['who']} {row['code']} {row['text'][:40]}")
def test_a_relays_own_words_mean_what_they_say(row: dict[str, str]) -> None:
    reply = Reply(Phase(row["phase"]), int(row["code"]), row["text"])
    assert reply.verdict.value == row["verdict"]
    assert reply.pause == min(int(row["pause"]), LONGEST_HINT)


@pytest.mark.parametrize(("phase", "code", "text", "verdict"), OTHERS)
def test_other_words_are_judged_by_the_same_rules(phase: Phase, code: int, text: str, verdict: Verdict) -> None:
    assert judge(phase, code, text) is verdict


@pytest.mark.parametrize("row", TABLE, ids=lambda row: row.meaning)
def test_each_row_of_the_policy_is_needed(row: Row, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[Phase, int | None, str]] = [(phase, code, "") for phase, code, _ in cells()]
    asked += [(Phase(one["phase"]), int(one["code"]), one["text"]) for one in REPLIES]
    asked += [one[:3] for one in OTHERS]
    before = [row_for(*one) for one in asked]
    monkeypatch.setattr(policy, "TABLE", tuple(one for one in TABLE if one is not row))
    with suppress(LookupError):
        assert [one[4:6] for one in before] != [row_for(*one)[4:6] for one in asked]


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
        (421, "4.7.0 blocked for 24 hours", 12 * 3600),
        (450, "4.7.1 the limit of 200 mails in 24 hours is reached", 0),
        (450, "4.7.1 policy allows 100 recipients for 1 hour", 0),
        (451, "4.7.1 please retry after at least 10 minutes", 600),
        (450, "4.7.1 quota will reset in 1.5 hours", 5400),
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
