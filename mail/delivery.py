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
from contextlib import ExitStack, suppress
from functools import lru_cache
from typing import Any, NoReturn

import settings
from mail.claim import Busy, Claim, Early, iso
from mail.counters import DELIVERED, SMTP
from mail.dkim import Signer
from mail.mime import to_mime
from mail.outbox import AFTER_A_CRASH, Outbox, jittered
from mail.parsed import Unsayable
from mail.posted import fields_of, key_of
from mail.routes import Routes, Way
from mail.states import (
    AGAIN,
    ALL_SUPPRESSED,
    EXPIRED,
    NOT_ADMITTED,
    RETURNED,
    SERVED,
    TROUBLE_TOO_LONG,
    UNSAYABLE,
    State,
    Status,
)
from mail.sweep import sweep
from process.log import emit
from queues.connection import RedisError, Unavailable, connect
from queues.jobs import JobFailed, Jobs
from queues.pipelining import PipeliningRedis
from queues.replication import Unconfirmed
from queues.running import Retry, allow_exceptions, queued_at, run_again_in, run_by, take_next, taken_with_it
from smtp.envelope import Envelope
from smtp.pacing import WAITS, Wait
from smtp.policy import Phase, Verdict, may_be_the_mails
from smtp.pool import Conversation, SessionPool
from smtp.tally import Tally
from smtp.verdict import Outcome, Reply
from upstream.client import Upstream, as_json

PAUSE_ON_TROUBLE = 30  # seconds until the next attempt of a mail that the relay's trouble put off
PAUSE_UNCONFIRMED = 2  # seconds until the next attempt, where Redis' replicas did not confirm
AFTER = {  # the reply that decided -> what the recipient is after the attempt
    Verdict.ACCEPTED: Status.ACCEPTED,
    Verdict.REFUSED: Status.REFUSED,
    Verdict.TRY_AGAIN: Status.PENDING,
    Verdict.TROUBLE: Status.PENDING,
    Verdict.IN_DOUBT: Status.IN_DOUBT,
}
AT_DOT = AFTER | {Verdict.ACCEPTED: Status.IN_DOUBT}  # the reply to RCPT, while the final dot is unanswered


class Failed(JobFailed):
    """The mail will not be sent unless a person asks again. The text is code and phase, never the relay's words."""


class Aborted(Exception):
    """The process is to end at once; the mail was not sent."""


class Delivery:
    """Makes attempts at mails. There is one in a process, with all that its threads share."""

    def __init__(self, outbox: Outbox) -> None:
        self.outbox = outbox
        self.routes = Routes(outbox.jobs.redis, outbox.settings)
        self.pool = SessionPool()
        self.tally = Tally(self.pool, self.routes.relays)
        self.dots = Dots()
        self.signer = Signer.of(outbox.settings)
        self.ahead = threading.local()  # the mail at which a thread has looked ahead

    def deliver(self, mail_id: str) -> str | Retry:
        """Returns the state in which nothing is left to do (`sent`, `canceled`), or a `Retry`, which RQ's scheduler
        obeys. Raises `Failed` when a person must look: RQ then puts the job into its failed registry, and a requeue
        from there gives the mail all its attempts again."""
        ahead, replication = self._announced(mail_id), self.outbox.jobs.replication
        at = replication.at
        try:
            claim = ahead.claim if ahead else self.outbox.claim(mail_id, queued_at(), taken_with_it())
        except Busy as busy:
            emit("early" if isinstance(busy, Early) else "busy", id=mail_id, next_in=f"{busy.seconds:.0f}s")
            return run_again_in(busy.seconds + 1)
        if isinstance(claim, str):
            try:  # a primary that was replaced does not know what the new one knows
                replication.confirm(at)
            except Unconfirmed:
                return run_again_in(PAUSE_UNCONFIRMED)
            emit("nothing_to_do", id=mail_id, state=claim)
            if claim == "gone" and replication.replicas and not self.outbox.store.has_job(mail_id):
                return claim  # both are of a primary that was replaced, and were never acknowledged
            return claim if claim in (State.SENT, State.CANCELED, *RETURNED) else _give_up(claim)
        with claim.held():
            try:
                return self._attempt(claim, ahead)
            except Unconfirmed as error:  # as it was to be marked, so the relay has had no dot
                return self._end(claim, State.DELAYED, str(error), PAUSE_UNCONFIRMED)
            finally:
                self.dots.settled(claim.id)
                if ahead:
                    ahead.close()

    def _attempt(self, claim: Claim, ahead: Ahead | None = None) -> str | Retry:
        admits = self.outbox.settings.admits
        if not all(admits(one.address) for one in claim.recipients if one.status not in SERVED):
            return self._end(claim, given_up(claim), NOT_ADMITTED)  # stored before that was set, or by another service
        asks_again = self.routes.can_ask(claim)
        take_up(claim, asks_again)
        if not (ahead and ahead.letter) and not asks_again:  # that must be for the same recipients
            self.outbox.suppressions.obey(claim)
        todo = [one.address for one in claim.recipients if one.status == Status.PENDING]
        if not todo:
            return self._conclude(claim, [])
        if claim.has_expired():
            return self._expire(claim)
        with self.routes.lend(claim) as way:
            if isinstance(way, Wait):
                return self._wait(claim, way)
            if way.upstream:
                return self._post(claim, way, way.upstream, todo)
            letter = (ahead and ahead.letter) or written(claim, todo, self.signer)
            return self._hand_over(claim, way, *letter, ahead.talk if ahead else None)

    def _wait(self, claim: Claim, wait: Wait) -> str | Retry:
        if wait.is_trouble and claim.age > self.outbox.settings.trouble_for:
            why = "" if wait.reason == WAITS["breaker"] else f": {wait.reason}"
            return self._end(claim, given_up(claim), f"{TROUBLE_TOO_LONG}{why}")
        return self._end(claim, State.DELAYED, wait.reason, math.ceil(wait.seconds), wait.line)

    def _hand_over(
        self, claim: Claim, way: Way, envelope: Envelope, mime: bytes, announced: Conversation | None
    ) -> str | Retry:
        started = time.monotonic()
        with self.pool.conversation(way.relay, announced) as talk:
            said = talk.begin(envelope, mime)  # all but the final dot: until it is out, nothing is sent
            if not isinstance(said, Outcome):
                self._look_ahead(way, talk)
            while not isinstance(said, Outcome):  # a second time where a kept session has died at the dot
                if claim.has_expired():
                    way.pacing.well()
                    return self._expire(claim)
                self.dots.expect(claim.id)
                claim.mark_in_doubt(at_dot(envelope.recipients, said), way.name)
                said = talk.finish()
            SMTP.note(time.monotonic() - started, claim.counts)
            return self._write_down(claim, way, said, talk.figures(since=claim.started))

    def _post(self, claim: Claim, way: Way, upstream: Upstream, recipients: list[str]) -> str | Retry:
        """Hands the mail to an upstream. What is not answered is asked again under the same key, so nothing is in doubt
        as long as that is known there. That it may be asked is written down before."""
        try:
            body = as_json(fields_of(claim.message, claim.message_id, recipients))
        except Unsayable as what:
            return self._end(claim, given_up(claim), f"{UNSAYABLE}: {what}")
        started, before = time.monotonic(), (claim.asked, claim.held_by)
        claim.mark_asked(upstream.identity, recipients, way.name)
        reply = upstream.post(key_of(claim.id, claim.message, recipients), body, way.relay.deadline)
        if reply.may_have_been_taken:
            claim.held_by = way.name
        else:  # another answer says nothing of what was asked earlier
            claim.asked, claim.held_by = ("", "") if reply.verdict in (Verdict.ACCEPTED, Verdict.REFUSED) else before
        SMTP.note(time.monotonic() - started, claim.counts)
        figures = {"took_ms": round((time.monotonic() - claim.started) * 1000), "bytes": len(body)}
        return self._write_down(claim, way, Outcome(reply, dict.fromkeys(recipients, reply)), figures)

    def _write_down(self, claim: Claim, way: Way, said: Outcome, figures: Mapping[str, Any]) -> str | Retry:
        put_off = claim.put_off_by(way.name)
        if said.reply.is_about_the_mail and self._met_by_others(way, said.reply, put_off):
            said = said.repeated()
        record(claim, said, way, figures)
        self.outbox.suppressions.note_refused(claim, said)
        try:  # written down before a word more to the relay, and before anything else
            return self._conclude(claim, list(said.recipients.values()), way)
        finally:
            self._tell_breaker(way, said.reply, put_off)

    def _look_ahead(self, way: Way, talk: Conversation) -> None:
        """Takes the next mail now, if all senders are busy, and holds it. The envelope of one that nothing can stop any
        more goes out with this one's final dot: the relay then waits for its text."""
        if not (self.routes.is_single and way.pacing.is_free and self.pool.may_follow(talk.session)):
            return
        job_id, taken = take_next()
        with suppress(Exception):  # what is wrong with the next mail is for its own attempt to say
            claim = self.outbox.claim(job_id, 0, taken) if taken and taken[0] == b"claimed" else ""
            if isinstance(claim, Claim):
                self.ahead.mail = ahead = Ahead(claim)
                if self._is_plain(claim):
                    ahead.letter = written(claim, [one.address for one in claim.recipients], self.signer)
                    ahead.talk = talk.announce(*ahead.letter)

    def _is_plain(self, claim: Claim) -> bool:
        is_new = claim.state_before == State.QUEUED and claim.calm and not claim.expires_at and not claim.relay
        admits = self.outbox.settings.admits
        is_new = is_new and all(one.status == Status.PENDING and admits(one.address) for one in claim.recipients)
        return is_new and not self.outbox.suppressions.obey(claim)

    def _announced(self, mail_id: str) -> Ahead | None:
        """Returns the mail if this thread has looked ahead at it. One that is not the next is given up."""
        ahead: Ahead | None = getattr(self.ahead, "mail", None)
        self.ahead.mail = None
        if ahead and ahead.claim.id != mail_id:
            ahead.close()
            return None
        return ahead

    def _met_by_others(self, way: Way, reply: Reply, put_off: bool) -> bool:
        try:
            return way.pacing.refused_alike(reply.words, self.outbox.last_sent() or 0, put_off)
        except (Unavailable, RedisError):  # the reply is to be written down, however long that takes
            return False

    def _conclude(self, claim: Claim, replies: Sequence[Reply], way: Way | None = None) -> str | Retry:
        if way and self.routes.may_move(claim, way, replies):
            claim.attempts[-1]["moved"] = True
            return self._end(claim, State.DELAYED, reason(claim, replies), 1)
        state, pause = next_state(claim, replies, self.outbox.settings.retry_schedule)
        why = reason(claim, replies) if state != State.SENT else ""
        if state == State.SENT and replies:  # a test has none
            DELIVERED.note(max(0.0, claim.age), claim.counts)
        if state == State.DELAYED and is_trouble(claim, replies) and claim.age > self.outbox.settings.trouble_for:
            return self._end(claim, given_up(claim), f"{TROUBLE_TOO_LONG}: {why}")
        return self._end(claim, state, why, pause)

    def _expire(self, claim: Claim) -> str | Retry:
        return self._end(claim, given_up(claim), EXPIRED)

    def _end(self, claim: Claim, state: State, reason: str, pause: int = 0, reserved: str = "") -> str | Retry:
        """Writes down the state after this attempt, logs it, and says to RQ what is to become of the job."""
        if state == State.DELAYED and claim.has_expired(within=pause):
            return self._expire(claim)  # now rather than then: there will be no other attempt
        for one in claim.recipients if claim.asked else ():
            one.status = Status.IN_DOUBT if one.status == Status.PENDING else one.status
        claim.settle(state, reason=reason, next_in=pause, reserved=reserved)
        emit(state, id=claim.id, reason=reason, next_in=f"{pause}s" if pause else None, test=claim.test or None)
        if state == State.SENT:
            return state
        if state != State.DELAYED:
            _give_up(reason)
        allow_exceptions(len(AFTER_A_CRASH))  # this attempt ended well enough: crashes are counted from here
        return run_again_in(pause)

    def _tell_breaker(self, way: Way, reply: Reply, put_off: bool) -> None:
        # What was said to several mails alike is about the account, or about what one caller sends. The relay is there,
        # and others are to find out for themselves.
        if not reply.repeated and (reply.code is None or reply.verdict is Verdict.TROUBLE):
            inside = may_be_the_mails(reply.phase, reply.code)
            pause = 0 if reply.phase is Phase.RCPT else reply.pause  # which may be one recipient's
            if way.pacing.trouble(pause, put_off and inside, reply=reply, relay=way.place):
                emit("breaker_opened", reason=reply.summary, relay=way.marks.get("relay_name"))
        elif way.pacing.well():
            emit("breaker_closed", relay=way.marks.get("relay_name"))

    def sweep(self) -> None:
        """Looks after mails that got stuck where RQ's own maintenance does not look."""
        for found in sweep(self.outbox):
            emit(found.event, id=found.mail_id, reason=found.why)


class Ahead:
    """A mail that was claimed before its turn, and is held until then, however long the relay takes for the one before;
    `talk` if its envelope was announced with the final dot of that."""

    def __init__(self, claim: Claim) -> None:
        self.claim = claim
        self.letter: tuple[Envelope, bytes] | None = None
        self.talk: Conversation | None = None
        self.hold = ExitStack()
        self.hold.enter_context(claim.renewed())

    def close(self) -> None:
        self.hold.close()
        if self.talk:
            self.talk.drop()


def written(claim: Claim, recipients: list[str], signer: Signer | None = None) -> tuple[Envelope, bytes]:
    """Returns a mail's envelope, and its text as it goes out."""
    message = claim.message
    envelope = Envelope(claim.envelope_sender, recipients, message.needs_smtputf8, message.needs_8bitmime)
    mime = to_mime(message, claim.message_id, claim.created_at)
    return envelope, signer.signed(mime) if signer else mime


def take_up(claim: Claim, asks_again: bool = False) -> None:
    """Deals with the traces of earlier attempts, before this one. `asks_again`: of an upstream that may have the mail,
    whether it has; those recipients are this attempt's, and no others."""
    asked_again = claim.state_before in AGAIN
    if asked_again:
        claim.counted, claim.held_by = 0, claim.held_by if asks_again else ""
    if claim.state_before == State.SENDING:
        died = {"verdict": "interrupted", "text": "the worker died in this attempt"}
        at = {"relay_name": claim.held_by} if claim.held_by else {}
        claim.attempts.append({"at": iso(time.time()), **at, **died})
        claim.counts["attempt:interrupted"] += 1
    unresolved = claim.asked and not asks_again  # the key is known no more, or the upstream
    if unresolved or (claim.state_before == State.SENDING and not asks_again):
        claim.asked = ""
        claim.counts["in_doubt"] += any(one.status == Status.IN_DOUBT for one in claim.recipients)
    retry_doubt = (asked_again or asks_again or claim.on_doubt == "retry") and not claim.has_expired()
    for one in claim.recipients:
        refused = one.status == Status.SUPPRESSED or (one.status == Status.REFUSED and asked_again)
        if (refused and not asks_again) or (one.status == Status.IN_DOUBT and retry_doubt):
            one.status = Status.PENDING


def at_dot(recipients: Sequence[str], replies: Mapping[str, Reply]) -> dict[str, Status]:
    """Returns what each recipient is while the final dot is unanswered."""
    return {who: AT_DOT[replies[who].verdict] for who in recipients}


def record(claim: Claim, outcome: Outcome, way: Way, figures: Mapping[str, Any]) -> None:
    """Enters into the claim what the relay said, in all and about each recipient."""
    for one in claim.recipients:
        reply = outcome.recipients.get(one.address)
        if reply:
            one.status, one.code, one.text = AFTER[reply.verdict], reply.code, reply.text
    reply, verdict = outcome.reply, outcome.reply.verdict
    claim.counts[f"attempt:{verdict.value.replace(' ', '_')}"] += 1
    for name in way.marks.values():
        claim.counts[f"relay:{name}:{verdict.value.replace(' ', '_')}"] += 1
    if verdict is Verdict.IN_DOUBT:
        claim.counts["in_doubt"] += 1
        claim.held_by = way.name
    said = {"phase": reply.phase, "code": reply.code, "text": reply.text, "verdict": verdict}
    by = {"worker": run_by(), "began": iso(claim.claimed_at)}
    claim.attempts.append({"at": iso(time.time()), "relay": str(way.place), **way.marks, **said, **by, **figures})


def given_up(claim: Claim) -> State:
    """Returns the state of a mail for which there will be no other attempt."""
    in_doubt = claim.asked or any(one.status == Status.IN_DOUBT for one in claim.recipients)
    return State.UNKNOWN if in_doubt else State.FAILED


def next_state(claim: Claim, replies: Sequence[Reply], schedule: Sequence[int]) -> tuple[State, int]:
    """Returns the state after an attempt, and the seconds until the next one. Only what the mail itself met with counts
    against its attempts."""
    statuses = {one.status for one in claim.recipients}
    asked_for = max((reply.pause + 1 for reply in replies if reply.pause), default=0)  # RQ drops a fraction of a second
    if Status.PENDING in statuses or (Status.IN_DOUBT in statuses and claim.on_doubt == "retry"):
        if _goes_on(replies):
            return State.DELAYED, 0
        if is_trouble(claim, replies):
            return State.DELAYED, max(asked_for, jittered(PAUSE_ON_TROUBLE * 2 ** _troubled(claim)))
        claim.counted += 1
        if claim.counted <= len(schedule):
            return State.DELAYED, max(asked_for, jittered(schedule[claim.counted - 1]))
        return State.UNKNOWN if claim.asked else State.FAILED, 0
    if Status.IN_DOUBT in statuses:
        return State.UNKNOWN, 0
    if Status.REFUSED in statuses:
        return State.FAILED, 0
    return (State.SENT if statuses & set(SERVED) else State.SUPPRESSED), 0


def is_trouble(claim: Claim, replies: Sequence[Reply]) -> bool:
    """Returns whether nothing but the relay's trouble keeps the mail."""
    its_own = any(reply.verdict in (Verdict.TRY_AGAIN, Verdict.IN_DOUBT) for reply in replies)
    return not its_own and not _silenced(claim)


def _troubled(claim: Claim) -> int:
    """Returns how often the relay has put off this mail without charging it, 6 at most: each doubles the pause, to half
    an hour. Mail that only waits for a relay that is away comes back within half a minute."""
    inside = sum(may_be_the_mails(one.get("phase"), one.get("code")) and not one.get("moved") for one in claim.attempts)
    return min(6, max(0, inside - claim.counted - 1))


def _goes_on(replies: Sequence[Reply]) -> bool:
    """Returns whether somebody was served and the others only did not fit into this transaction: they have theirs at
    once (RFC 5321 4.5.3.1.10)."""
    served = any(reply.verdict is Verdict.ACCEPTED for reply in replies)
    left = [reply for reply in replies if reply.verdict not in (Verdict.ACCEPTED, Verdict.REFUSED)]
    return served and bool(left) and all(reply.is_too_many for reply in left)


def _silenced(claim: Claim) -> bool:
    """Returns whether the relay has gone silent on this mail three times running, after it had let us in, or an
    upstream has met with a fault of its own: then the mail itself may be the reason, and it counts."""
    met = ((Phase.MAIL, None), (Phase.RCPT, None), (Phase.DATA, None), (Phase.HTTP, 500))
    last = claim.attempts[-3:]
    return len(last) == 3 and all((one.get("phase"), one.get("code")) in met for one in last)


def reason(claim: Claim, replies: Sequence[Reply]) -> str:
    """Returns code and phase of everything but success, without repetition: `550 at rcpt, 451 at rcpt`; and what
    refused a recipient in an earlier attempt: `550 before`."""
    bad = [reply.summary for reply in replies if reply.verdict is not Verdict.ACCEPTED]
    now = {reply.code for reply in replies}
    refused = [one.code for one in claim.recipients if one.status == Status.REFUSED and one.code not in now]
    bad += [f"{code} before" for code in refused]
    suppressed = all(one.status == Status.SUPPRESSED for one in claim.recipients)
    return ", ".join(dict.fromkeys(bad)) or (ALL_SUPPRESSED if suppressed else "held: the relay may have accepted it")


def _give_up(reason: str) -> NoReturn:
    """Sends the job straight to the failed registry: a person must look."""
    allow_exceptions(0)
    raise Failed(reason) from None


class Dots:
    """Knows the mails of this process whose final dot waits for its answer, and ends it with none of them in doubt."""

    def __init__(self) -> None:
        self._pending: set[str] = set()
        self._lock = threading.Lock()
        self._aborting = False

    def expect(self, mail_id: str) -> None:
        """Notes that the mail's final dot may go out now, so that its answer is waited for. Raises `Aborted`."""
        with self._lock:
            if self._aborting:
                raise Aborted
            self._pending.add(mail_id)

    def settled(self, mail_id: str) -> None:
        """Forgets a mail whose answer is written down, or that has had no dot."""
        self._pending.discard(mail_id)

    def abort_unsent(self) -> NoReturn:
        """Ends the process as soon as no final dot is unanswered, and lets no other go out. The other mails in hand are
        found like those of a killed worker, and sent by another."""
        with self._lock:
            self._aborting = True
        while self._pending:
            time.sleep(0.05)
        os._exit(0)


@lru_cache(maxsize=1)
def current() -> Delivery:
    """Returns this process's delivery. The main thread must ask for it before others do: there must not be two."""
    chosen = settings.load()
    redis = connect(chosen.redis, retrying=True, kind=PipeliningRedis)
    return Delivery(Outbox(Jobs(redis, chosen.redis_replicas), chosen))
