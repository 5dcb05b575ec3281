"""One attempt at one mail: claim, admit, hand over, mark, dot, settle.

`deliver` is what RQ runs. Running it twice is harmless. It gets a mail's id and nothing else, so no address, subject or
body is ever in a job, its description, its result or its traceback.
"""

from __future__ import annotations

import math
import os
import threading
import time
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from functools import lru_cache
from typing import NoReturn

from rq import Retry, get_current_job

import settings
from mail import sweep as sweeping
from mail.claim import Busy, Claim
from mail.mime import to_mime
from mail.outbox import AFTER_A_CRASH, Outbox, jittered
from mail.states import EXPIRED, State, Status
from process.log import emit
from queues.connection import connect
from queues.jobs import Jobs
from smtp import pool
from smtp.pacing import Pacing
from smtp.session import Relay
from smtp.verdict import Outcome, Reply, Verdict

PAUSE_ON_TROUBLE = 30  # seconds until the next attempt of a mail that the relay's trouble put off
_at_dot: set[str] = set()  # the mails whose final dot is out and whose answer is not written down yet
_dots = threading.Lock()
_broken_off = threading.Event()


class Failed(Exception):
    """The mail will not be sent unless a person asks again. The text is code and phase, never the relay's words."""


class BrokenOff(Exception):
    """The process is to end at once; nothing was sent."""


class Expired(Exception):
    """The mail's `expires_at` has come while its body went out. Without the final dot, nothing was sent."""


@lru_cache(maxsize=1)
def outbox() -> Outbox:
    current = settings.current()
    return Outbox(Jobs(connect(current.redis_url.get_secret_value(), patient=True)), current)


@lru_cache(maxsize=1)
def pacing() -> Pacing:
    return Pacing(outbox().jobs.redis, settings.current().smtp_rate)


@lru_cache(maxsize=1)
def the_relay() -> Relay:
    return Relay.of(settings.current())


def deliver(mail_id: str) -> str | Retry:
    """Makes one attempt at one mail. Running it twice is harmless.

    Returns the state in which nothing is left to do (`sent`, `canceled`, ...), or a `Retry`, which RQ's scheduler
    obeys. Raises `Failed` when a person must look: RQ then puts the job into its failed registry, and a requeue from
    there gives the mail all its attempts again.
    """
    try:
        claim = outbox().claim(mail_id, _queued_at())
    except Busy as busy:
        emit("busy", id=mail_id, next_in=f"{busy.seconds:.0f}s")
        return _later(busy.seconds + 1)
    if isinstance(claim, str):
        emit("nothing_to_do", id=mail_id, state=claim)
        return claim if claim in (State.SENT, State.CANCELED) else _give_up(claim)
    with claim.held():
        try:
            return _attempt(claim)
        finally:
            _at_dot.discard(claim.id)


def _attempt(claim: Claim) -> str | Retry:
    _take_up(claim)
    todo = [one.address for one in claim.recipients if one.status == Status.PENDING]
    if not todo:
        return _conclude(claim, None)
    if claim.has_expired():
        return _expire(claim)
    wait = pacing().admit(claim.in_line)
    if wait:
        return _end(claim, State.DELAYED, wait.reason, math.ceil(wait.seconds), in_line=wait.in_line)
    mime = to_mime(claim.message, claim.message_id, claim.created_at)
    started = time.monotonic()
    with pool.conversation(the_relay()) as conversation:
        try:
            outcome = conversation.send(
                claim.message.sender.address,
                todo,
                mime,
                smtputf8=claim.message.needs_smtputf8,
                before_dot=lambda replies: _before_dot(claim, todo, replies),
            )
        except Expired:
            pacing().well()
            return _expire(claim)
        claim.observe_conversation(time.monotonic() - started)
        _record(claim, outcome)
        try:
            return _conclude(claim, outcome)  # written down before a word more to the relay, and before anything else
        finally:
            _tell_breaker(outcome.reply)


def _before_dot(claim: Claim, todo: Sequence[str], replies: Mapping[str, Reply]) -> None:
    """Whose recipient's reply is not known yet may be accepted in the next moment."""
    if claim.has_expired():
        raise Expired
    with _dots:
        if _broken_off.is_set():
            raise BrokenOff
        _at_dot.add(claim.id)
    claim.mark_in_doubt({who: AT_DOT[replies[who].verdict] if who in replies else Status.IN_DOUBT for who in todo})


def break_off() -> NoReturn:
    """Ends the process as soon as no final dot is unanswered, and lets no other go out. Whatever else was in hand is
    found out like the mail of a killed worker, and sent by another."""
    with _dots:
        _broken_off.set()
    while _at_dot:
        time.sleep(0.05)
    os._exit(0)


def _queued_at() -> float:
    job = get_current_job()
    return job.enqueued_at.timestamp() if job and job.enqueued_at else 0


def _give_up(reason: str) -> NoReturn:
    """Straight to the failed registry: a person must look."""
    job = get_current_job()
    if job:
        job.retries_left = 0
    raise Failed(reason)


AFTER = {  # the reply that decided -> what the recipient is after the attempt
    Verdict.ACCEPTED: Status.ACCEPTED,
    Verdict.REFUSED: Status.REFUSED,
    Verdict.TRY_AGAIN: Status.PENDING,
    Verdict.TROUBLE: Status.PENDING,
    Verdict.IN_DOUBT: Status.IN_DOUBT,
}
AT_DOT = AFTER | {Verdict.ACCEPTED: Status.IN_DOUBT}  # the reply to RCPT, while the final dot is unanswered


def _take_up(claim: Claim) -> None:
    """What earlier attempts left behind, before this one."""
    asked_again = claim.state_before in (State.FAILED, State.UNKNOWN)
    if asked_again:
        claim.counted = 0
    if claim.state_before == State.SENDING:
        claim.attempts.append({"at": _now(), "verdict": "interrupted", "text": "the worker died in this attempt"})
        claim.counts["attempt:interrupted"] += 1
        if any(one.status == Status.IN_DOUBT for one in claim.recipients):
            claim.counts["in_doubt"] += 1
    retry_doubt = (asked_again or _on_doubt(claim) == "retry") and not claim.has_expired()
    for one in claim.recipients:
        if (one.status == Status.IN_DOUBT and retry_doubt) or (one.status == Status.REFUSED and asked_again):
            one.status = Status.PENDING


def _on_doubt(claim: Claim) -> str:
    return claim.on_doubt or settings.current().on_doubt


def _record(claim: Claim, outcome: Outcome) -> None:
    for one in claim.recipients:
        reply = outcome.recipients.get(one.address)
        if reply:
            one.status, one.code, one.text = AFTER[reply.verdict], reply.code, reply.text
    reply = outcome.reply
    claim.counts[f"attempt:{reply.verdict.value.replace(' ', '_')}"] += 1
    if reply.verdict is Verdict.IN_DOUBT:
        claim.counts["in_doubt"] += 1
    claim.attempts.append(
        {
            "at": _now(),
            "relay": str(the_relay()),
            "phase": reply.phase.value,
            "code": reply.code,
            "text": reply.text,
            "verdict": reply.verdict.value,
        }
    )


def _conclude(claim: Claim, outcome: Outcome | None) -> str | Retry:
    """The state after this attempt: written down, logged, and told to RQ in its own way."""
    replies = list(outcome.recipients.values()) if outcome else []
    state, pause = _next_state(claim, replies)
    return _end(claim, state, _reason(replies) if state != State.SENT else "", pause)


def _end(
    claim: Claim, state: State, reason: str, pause: int = 0, *, in_line: bool = False, expired: bool = False
) -> str | Retry:
    if state == State.DELAYED and claim.has_expired(within=pause):
        return _expire(claim)  # now rather than then: there will be no other attempt
    claim.settle(state, reason=reason, next_in=pause, in_line=in_line, expired=expired)
    emit(state, id=claim.id, reason=reason, next_in=f"{pause}s" if pause else None)
    if state == State.SENT:
        return state
    if state != State.DELAYED:
        _give_up(reason)
    job = get_current_job()
    if job:
        job.retries_left = len(AFTER_A_CRASH)  # this attempt ended well enough: crashes are counted from here
    return _later(pause)


def _expire(claim: Claim) -> str | Retry:
    doubtful = any(one.status == Status.IN_DOUBT for one in claim.recipients)
    return _end(claim, State.UNKNOWN if doubtful else State.FAILED, EXPIRED, expired=True)


def _tell_breaker(reply: Reply) -> None:
    if reply.code is None or reply.verdict is Verdict.TROUBLE:
        if pacing().trouble(reply.pause):
            emit("breaker_opened", reason=reply.summary)
    elif pacing().well():
        emit("breaker_closed")


def relay_closed_for() -> float:
    """Seconds for which this process need not take any mail: the breaker is open."""
    return pacing().closed_for()


def leave_relay() -> None:
    """For a worker that ends: takes leave on the sessions that were kept."""
    pool.close_all()


def sweep() -> None:
    """Looks after mails that got stuck where RQ's own maintenance does not look."""
    for found in sweeping.sweep(outbox()):
        emit(found.event, id=found.mail_id, reason=found.why)


def _next_state(claim: Claim, replies: Sequence[Reply]) -> tuple[State, int]:
    """(state, seconds until the next attempt). Only what the mail itself met with counts against its attempts."""
    schedule = settings.current().retry_schedule
    statuses = {one.status for one in claim.recipients}
    asked_for = max((reply.pause + 1 for reply in replies if reply.pause), default=0)  # RQ drops a fraction of a second
    if Status.PENDING in statuses or (Status.IN_DOUBT in statuses and _on_doubt(claim) == "retry"):
        if not {reply.verdict for reply in replies} & {Verdict.TRY_AGAIN, Verdict.IN_DOUBT} and not _silenced(claim):
            return State.DELAYED, max(asked_for, jittered(PAUSE_ON_TROUBLE))
        claim.counted += 1
        if claim.counted <= len(schedule):
            return State.DELAYED, max(asked_for, jittered(schedule[claim.counted - 1]))
        return State.FAILED, 0
    if Status.IN_DOUBT in statuses:
        return State.UNKNOWN, 0
    return (State.FAILED if Status.REFUSED in statuses else State.SENT), 0


def _silenced(claim: Claim) -> bool:
    """Whether the relay has gone silent on this mail three times running, after it had let us in: then the mail itself
    may be the reason, and it counts."""
    last = [(one.get("phase"), one.get("code")) for one in claim.attempts[-3:]]
    return len(last) == 3 and all(phase in ("mail", "rcpt", "data") and code is None for phase, code in last)


def _reason(replies: Sequence[Reply]) -> str:
    """Code and phase of everything but success, without repetition: `550 at rcpt, 451 at rcpt`."""
    bad = [reply.summary for reply in replies if reply.verdict is not Verdict.ACCEPTED]
    return ", ".join(dict.fromkeys(bad)) or "held: the relay may have accepted it"


def _later(seconds: float) -> Retry:
    """RQ counts these apart from the attempts that an exception uses up; our own count is in the mail."""
    return Retry(max=1_000_000, interval=max(1, round(seconds)))


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="milliseconds")
