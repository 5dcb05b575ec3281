"""What we keep of a mail in Redis, and the three steps that change it: accept, claim, settle.

A mail is a hash `mail:<id>`; its RQ job has the same id and holds nothing else. `accept` stores both in one atomic
step. `claim` gives a mail to one attempt at a time, for a limited time, so that a job that RQ runs twice sends once.
`settle` writes the outcome, recipient by recipient. In between, `Claim.mark_in_doubt` notes who is about to be served:
should the worker die after that, the mail is in doubt for them and not for the others.

    queued -> sending -> sent | failed | unknown (in doubt and held) | delayed -> sending ...
    queued, delayed, failed, unknown -> canceled

Every script may be run again after a lost reply. Once sent, a mail's content is dropped and its outline kept for
RETAIN_SENT. The one home of key names: `mail:<id>` (hash), `mail:<id>:claim` (token with expiry), `mail:last_sent`,
`mail:open` (sorted set: every mail that is not final, by the moment at which mail.sweep looks whether it is stuck).
"""

from __future__ import annotations

import io
import json
import random
import re
import time
import uuid
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import datetime, timezone
from typing import Any

from redis.client import Pipeline

from mail.counters import SMTP, TOTALS
from mail.draft import Draft
from mail.message import Message, message_id
from queues.connection import Script, Unavailable, impatient, unavailable
from queues.heartbeat import LOST_AFTER, beating
from queues.jobs import Accepted, Idempotency, Jobs, NotFound, NotPossible, Policy
from queues.table import EMAIL
from settings import Settings
from smtp.pacing import in_trouble

FINAL = ("sent", "failed", "unknown", "canceled")
MAIL_ID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")  # mail:last_sent, mail:<id>:claim are no mails
LAST_SENT = "mail:last_sent"
OPEN = "mail:open"
LOOK_AFTER = 2 * LOST_AFTER  # seconds after which a mail should have moved on, and mail.sweep looks at it
# Seconds. RQ's own retries, for an attempt whose worker died or that raised what nobody expected; a mail whose every
# attempt kills its worker is parked as failed after four. Pauses that the relay asks for are in `settle`, not here.
AFTER_A_CRASH = (1, 5, 30)
EXPIRED = "expired"  # the reason of a mail whose `expires_at` has passed
SHOWN = (
    *("state", "created_at", "message_id", "outline", "recipients", "attempts", "next_attempt_at", "reason"),
    *("expires_at", "on_doubt"),
)
ATTEMPTS_KEPT = 50  # an afternoon of relay trouble must not grow a mail without end
# KEYS: mail, claim, RQ's failed registry, open. ARGV: token, lease in ms, mail id, when the job was queued (seconds),
# when to look at the mail if this attempt does not end.
# There is nothing to do for a mail that is gone, sent or canceled; nor for a failed or unknown one, unless a person has
# queued it again since: RQ may run a job twice, and then the second run must not be taken for a wish. A second call
# with the same token (a lost reply) finds its own claim.
CLAIM = """
local state = redis.call('HGET', KEYS[1], 'state')
if not state or state == 'sent' or state == 'canceled' then return {state or 'gone'} end
if state == 'failed' or state == 'unknown' then
  local settled_at = tonumber(redis.call('HGET', KEYS[1], 'settled_at'))
  if redis.call('ZSCORE', KEYS[3], ARGV[3]) or tonumber(ARGV[4]) <= settled_at then return {state} end
end
local holder = redis.call('GET', KEYS[2])
if holder and holder ~= ARGV[1] then return {'busy', redis.call('PTTL', KEYS[2])} end
redis.call('SET', KEYS[2], ARGV[1], 'PX', ARGV[2])
if not holder then redis.call('HSET', KEYS[1], 'state', 'sending', 'state_before', state) end
redis.call('HDEL', KEYS[1], 'next_attempt_at', 'reason')
redis.call('PERSIST', KEYS[1])
redis.call('ZADD', KEYS[4], ARGV[5], ARGV[3])
return {'claimed', redis.call('HGETALL', KEYS[1])}
"""
# KEYS: mail, claim. ARGV: token, recipients. 0: the claim has passed to another attempt, or the mail was canceled or
# sent meanwhile, and this attempt must stop.
MARK_IN_DOUBT = """
if redis.call('GET', KEYS[2]) ~= ARGV[1] or redis.call('HGET', KEYS[1], 'state') ~= 'sending' then return 0 end
redis.call('HSET', KEYS[1], 'recipients', ARGV[2])
return 1
"""
# KEYS: mail, claim, last_sent, RQ's job, open, totals. ARGV: token, state, lifetime in seconds (0: none), now, mail id,
# when to look at it if it does not move on, what the state counts as, how many words of totals follow, these, then
# field, value, ...
# `sent` is written by whoever knows it, also when his claim has run out: it is the truth. Anything else only by the
# holder, and never over `sent` or `canceled`. A second call with the same token changes nothing.
# It begins with a command that frees memory: Redis looks for memory before a script's first write only, and a mail that
# was sent must be written down on a full Redis, too.
SETTLE = """
local state = redis.call('HGET', KEYS[1], 'state')
local mine = redis.call('GET', KEYS[2]) == ARGV[1]
if redis.call('HGET', KEYS[1], 'settled_by') == ARGV[1] then return 1 end
if not state or (ARGV[2] ~= 'sent' and (not mine or state ~= 'sending')) then return 0 end
if mine then redis.call('DEL', KEYS[2]) end
if ARGV[2] == 'sent' then redis.call('HDEL', KEYS[1], 'content') end
local fields = 9 + ARGV[8]
redis.call('HSET', KEYS[1], 'state', ARGV[2], 'settled_by', ARGV[1], unpack(ARGV, fields))
if state ~= 'sent' then redis.call('HINCRBY', KEYS[6], ARGV[7], 1) end  -- sent twice is still one mail that was sent
for i = 9, fields - 1, 2 do redis.call('HINCRBY', KEYS[6], ARGV[i], ARGV[i + 1]) end
if ARGV[2] == 'sent' then redis.call('SET', KEYS[3], ARGV[4]) end
if (ARGV[2] == 'failed' or ARGV[2] == 'unknown') and redis.call('EXISTS', KEYS[4]) == 1 then
  redis.call('HSET', KEYS[4], 'retries_left', 0)  -- should its worker die now, RQ must not try again
end
if tonumber(ARGV[3]) > 0 then
  redis.call('EXPIRE', KEYS[1], ARGV[3])
  redis.call('ZREM', KEYS[5], ARGV[5])
else
  redis.call('PERSIST', KEYS[1])
  redis.call('ZADD', KEYS[5], ARGV[6], ARGV[5])
end
return 1
"""
# KEYS: mail, claim. ARGV: token, lease in ms.
RENEW = """
if redis.call('GET', KEYS[2]) == ARGV[1] then return redis.call('PEXPIRE', KEYS[2], ARGV[2]) end
return 0
"""
# KEYS: mail, claim. ARGV: token.
RELEASE = """
if redis.call('GET', KEYS[2]) == ARGV[1] then return redis.call('DEL', KEYS[2]) end
return 0
"""


class Busy(Exception):
    """Another attempt holds the mail, for `seconds` more at most."""

    def __init__(self, seconds: float) -> None:
        super().__init__(f"claimed for {seconds:.0f} s more")
        self.seconds = seconds


class ClaimLost(Exception):
    """The mail is no longer this attempt's: the lease ran out (this process stood still) and another has it, or it was
    canceled. Nothing was sent."""


@dataclass
class Recipient:
    """pending, in_doubt, accepted or refused; with the relay's last word about this address."""

    address: str
    status: str = "pending"
    code: int | None = None
    text: str = ""


@dataclass
class Claim:
    """One attempt's hold on one mail. `expires_at` is in seconds since 1970, 0 for a mail that does not expire;
    `on_doubt` is what its sender chose, or ""; `in_line` says that SMTP_RATE has told it to come back now; `counts`
    goes to mail.counters with the outcome."""

    outbox: Outbox
    id: str
    token: str
    message: Message
    message_id: str
    created_at: datetime
    state_before: str
    recipients: list[Recipient]
    attempts: list[dict[str, Any]] = field(default_factory=list)
    counted: int = 0
    expires_at: float = 0
    on_doubt: str = ""
    in_line: bool = False
    settled: bool = False
    counts: Counter[str] = field(default_factory=Counter)

    def has_expired(self, within: float = 0) -> bool:
        """Whether the mail may not be sent any more, now or `within` so many seconds."""
        return 0 < self.expires_at <= time.time() + within

    @property
    def keys(self) -> list[str]:
        return [f"mail:{self.id}", f"mail:{self.id}:claim"]

    def observe_conversation(self, seconds: float) -> None:
        """Counts how long the conversation with the relay took."""
        SMTP.note(seconds, self.counts)

    @contextmanager
    def held(self) -> Iterator[None]:
        """Renews the claim for as long as the body runs, and releases it then, also where nothing was settled."""
        renew = [self.token, LOST_AFTER * 1000]
        try:
            with beating(lambda: self.outbox.renew(self.keys, renew)):
                yield
        finally:
            if not self.settled:
                self.outbox.run(RELEASE, self.keys, [self.token])

    def mark_in_doubt(self, statuses: Mapping[str, str]) -> None:
        """Writes down, right before the final dot, who is in doubt if nothing more is heard of this attempt. The claim
        itself stays as it is: the dot may yet fail to go out. Raises `ClaimLost`."""
        marked = [replace(one, status=statuses.get(one.address, one.status)) for one in self.recipients]
        if not self.outbox.run(MARK_IN_DOUBT, self.keys, [self.token, _dump(marked)]):
            raise ClaimLost(self.id)

    def settle(self, state: str, *, reason: str = "", next_in: float = 0, in_line: bool = False) -> None:
        """Writes the outcome: recipients, attempts, state; for a final state also how long it is kept.

        Raises `ClaimLost` where it is not this attempt's to write. That somebody was served is written however long
        Redis takes: nobody else knows it.
        """
        now = datetime.now(timezone.utc)
        fields: dict[str, str | float] = {
            "recipients": _dump(self.recipients),
            "attempts": json.dumps(self.attempts[-ATTEMPTS_KEPT:]),
            "counted": self.counted,
            "reason": reason,
            "settled_at": now.timestamp(),
            "in_line": "1" if in_line else "",
            "next_attempt_at": _iso(datetime.fromtimestamp(now.timestamp() + next_in, timezone.utc)) if next_in else "",
        }
        kept_for = self.outbox.kept_for(state)
        words = [word for pair in fields.items() for word in pair]
        counts = [word for pair in self.counts.items() for word in pair]
        result = EXPIRED if (state, reason) == ("failed", EXPIRED) else state
        keys = [*self.keys, LAST_SENT, f"rq:job:{self.id}", OPEN, TOTALS]
        served = any(recipient.status == "accepted" for recipient in self.recipients)
        settle = self.outbox.insist if served else self.outbox.run
        look_at = now.timestamp() + next_in + LOOK_AFTER
        args = [self.token, state, kept_for, now.timestamp(), self.id, look_at, result, len(counts), *counts, *words]
        if not settle(SETTLE, keys, args):
            raise ClaimLost(self.id)
        self.settled = True


def _record(mail_id: str, draft: Draft) -> dict[Any, Any]:
    outline, content = draft.message.to_json()
    return {
        "state": "queued",
        "created_at": _iso(datetime.now(timezone.utc)),
        "message_id": message_id(mail_id, draft.message.sender),
        "outline": outline,
        "content": _compressed(content),
        "recipients": _dump([Recipient(address) for address in draft.message.recipients]),
        **({"expires_at": draft.expires_at.isoformat()} if draft.expires_at else {}),
        **({"on_doubt": draft.on_doubt} if draft.on_doubt else {}),
    }


def _compressed(pieces: Iterable[str]) -> bytes:
    packer, packed = zlib.compressobj(level=1), io.BytesIO()  # which gives what it holds without another copy
    for piece in pieces:
        packed.write(packer.compress(piece.encode()))
    packed.write(packer.flush())
    return packed.getvalue()


class Outbox:
    def __init__(self, jobs: Jobs, settings: Settings) -> None:
        self.jobs = jobs
        self.settings = settings
        self.renew = Script(impatient(jobs.redis), RENEW)
        sources = (CLAIM, MARK_IN_DOUBT, SETTLE, RELEASE)
        self._scripts = {source: Script(jobs.redis, source) for source in sources}

    def run(self, script: str, keys: list[str], args: list[Any]) -> Any:
        return self._scripts[script](keys=keys, args=args)

    def insist(self, script: str, keys: list[str], args: list[Any]) -> Any:
        """Runs a script, however long Redis is away or refuses writes."""
        while True:
            try:
                with unavailable():
                    return self.run(script, keys, args)
            except Unavailable:
                time.sleep(1)

    def kept_for(self, state: str) -> int:
        """Seconds; 0 while the mail is on its way. Longer than its job, which must not outlive it: by a day where that
        may be queued again in its last minute and then wait for a worker."""
        if state not in FINAL:
            return 0
        return self.settings.retain_sent + 3600 if state == "sent" else self.settings.retain_failed + 86400

    def accept(self, drafts: Sequence[Draft], idempotency: Idempotency | None = None) -> Accepted:
        """Stores and queues mails in one atomic step, all of them. Raises `IdempotencyConflict`, `Unavailable`."""
        mails = {str(uuid.uuid4()): draft for draft in drafts}

        def store(commands: Pipeline) -> None:
            for mail_id, draft in mails.items():
                commands.hset(f"mail:{mail_id}", mapping=_record(mail_id, draft))
                commands.zadd(OPEN, {mail_id: time.time() + LOOK_AFTER})
            commands.hincrby(TOTALS, "accepted", len(mails))

        return self._queue(list(mails), store, idempotency)

    def _queue(
        self,
        ids: Sequence[str],
        store: Callable[[Pipeline], None] | None = None,
        idempotency: Idempotency | None = None,
    ) -> Accepted:
        return self.jobs.accept(
            EMAIL,
            "tasks.deliver",
            {mail_id: ([mail_id], {}) for mail_id in ids},
            Policy(self.settings.job_timeout, AFTER_A_CRASH, self.settings.retain_sent, self.settings.retain_failed),
            beside=store,
            idempotency=idempotency,
            idempotency_ttl=self.settings.idempotency_ttl,
        )

    def claim(self, mail_id: str, queued_at: float) -> Claim | str:
        """Takes a mail for one attempt, or returns the state in which there is nothing to do. Raises `Busy`.

        `queued_at` is when its job was queued, in seconds since 1970: for a mail that failed it tells whether somebody
        has asked for it again since.

        `Claim.held` keeps it, so a claim that ran out belongs to a worker that is dead or was stopped for long.
        """
        token = uuid.uuid4().hex
        keys = [f"mail:{mail_id}", f"mail:{mail_id}:claim", f"rq:failed:{EMAIL}", OPEN]
        reply = self.run(CLAIM, keys, [token, LOST_AFTER * 1000, mail_id, queued_at, time.time() + LOOK_AFTER])
        verdict = reply[0].decode()
        if verdict == "busy":
            raise Busy(reply[1] / 1000)
        if verdict != "claimed":
            return str(verdict)
        stored = {name.decode(): value for name, value in zip(reply[1][::2], reply[1][1::2], strict=True)}
        return Claim(
            outbox=self,
            id=mail_id,
            token=token,
            message=Message.from_json(stored["outline"], zlib.decompress(stored["content"])),
            message_id=stored["message_id"].decode(),
            created_at=datetime.fromisoformat(stored["created_at"].decode()),
            state_before=stored["state_before"].decode(),
            recipients=[Recipient(**one) for one in json.loads(stored["recipients"])],
            attempts=json.loads(stored.get("attempts", b"[]")),
            counted=int(stored.get("counted", 0)),
            expires_at=_timestamp(stored.get("expires_at", b"").decode()),
            on_doubt=stored.get("on_doubt", b"").decode(),
            in_line=bool(stored.get("in_line")),
        )

    def read(self, mail_id: str) -> dict[str, Any]:
        """A mail as `GET /emails/{id}` shows it. Raises `NotFound`, `Unavailable`."""
        if not MAIL_ID.fullmatch(mail_id):
            raise NotFound
        with unavailable():
            pipe = self.jobs.redis.pipeline(transaction=False)  # a full Redis refuses a transaction, even to read
            pipe.hmget(f"mail:{mail_id}", SHOWN)
            pipe.hget(f"rq:job:{mail_id}", "status")
            values, job_status = pipe.execute()
        if values[0] is None:
            raise NotFound
        stored = {name: (value or b"").decode() for name, value in zip(SHOWN, values, strict=True)}
        expired = 0 < _timestamp(stored["expires_at"]) <= time.time()
        state, reason = seen_state(stored["state"], (job_status or b"").decode(), stored["reason"], expired)
        outline = Message.from_json(stored["outline"])
        return {
            "object": "email",
            "id": mail_id,
            "status": state,
            "last_event": state,  # Resend's name for it
            "from": str(outline.sender),
            **{name: [str(box) for box in getattr(outline, name)] for name in ("to", "cc", "bcc", "reply_to")},
            "subject": outline.subject,
            "tags": outline.tags,
            "message_id": stored["message_id"],
            "created_at": stored["created_at"],
            "next_attempt_at": stored["next_attempt_at"] or None,
            "expires_at": stored["expires_at"] or None,
            "on_doubt": stored["on_doubt"] or self.settings.on_doubt,
            "reason": reason or None,
            "recipients": json.loads(stored["recipients"]),
            "attempts": json.loads(stored["attempts"] or "[]"),
        }

    def exists(self, mail_id: str) -> bool:
        if not MAIL_ID.fullmatch(mail_id):
            return False
        with unavailable():
            return bool(self.jobs.redis.exists(f"mail:{mail_id}"))

    def cancel(self, mail_id: str) -> None:
        """Stops a mail that is not being sent and not sent. Raises `NotFound`, `NotPossible`, `Unavailable`."""
        with unavailable():  # its job may say otherwise: its worker died, or RQ runs it twice
            state: Any = self.jobs.redis.hget(f"mail:{mail_id}", "state")
            held = self.jobs.redis.exists(f"mail:{mail_id}:claim")
        if state == b"sent" or held:
            raise NotPossible("the mail is sent already" if state == b"sent" else "the mail is being sent")

        def mark(commands: Pipeline) -> None:
            commands.hset(f"mail:{mail_id}", "state", "canceled")
            commands.hdel(f"mail:{mail_id}", "content", "next_attempt_at")
            commands.expire(f"mail:{mail_id}", self.kept_for("canceled"))
            commands.zrem(OPEN, mail_id)
            if state != b"canceled":
                commands.hincrby(TOTALS, "canceled", 1)

        try:
            self.jobs.cancel(mail_id, beside=mark)
        except NotFound:  # somebody deleted the job; the mail is left
            with unavailable(), self.jobs.redis.pipeline() as commands:
                mark(commands)
                commands.execute()

    def requeue(self, mail_id: str) -> None:
        """Queues a failed mail again with all its attempts, also if its job was deleted. Raises as `Jobs.requeue`."""
        with unavailable():
            expires_at: Any = self.jobs.redis.hget(f"mail:{mail_id}", "expires_at")
        if expires_at and _timestamp(expires_at.decode()) <= time.time():
            raise NotPossible("the mail has expired and will not be sent; submit it anew")
        try:
            self.jobs.requeue(mail_id)
        except NotFound:
            if self.read(mail_id)["status"] not in ("failed", "unknown"):
                raise NotPossible("only a failed mail can be queued again") from None
            self._queue([mail_id])

    def failures(self, since: float) -> Iterator[str]:
        """The reason of each mail that failed after `since` (seconds since 1970) and was not queued again."""
        with unavailable():
            ids: list[Any] = self.jobs.redis.zrange(f"rq:failed:{EMAIL}", 0, -1)
            for start in range(0, len(ids), 500):
                pipe = self.jobs.redis.pipeline(transaction=False)
                for mail_id in ids[start : start + 500]:
                    pipe.hmget(f"mail:{mail_id.decode()}", "reason", "settled_at")
                for reason, settled_at in pipe.execute():
                    if reason and float(settled_at or 0) >= since:
                        yield reason.decode()

    def relay_in_trouble(self) -> bool:
        """Returns whether the relay's breaker is open, so that all mail waits. Raises `Unavailable`."""
        return in_trouble(self.jobs.redis)

    def last_sent(self) -> float | None:
        with unavailable():
            moment = self.jobs.redis.get(LAST_SENT)
        return float(moment) if moment else None


LOST = {  # the status of a mail's job in RQ -> why the mail will not be sent although nobody has settled it
    "failed": "its worker died in every attempt",
    "stopped": "its job was stopped",
    "canceled": "its job was canceled",
    "": "its job was deleted",
}


def seen_state(state: str, job_status: str, reason: str, expired: bool = False) -> tuple[str, str]:
    """What is known and not yet written into the mail: queued again after it failed, a worker that died for good, a job
    that somebody deleted (`rq empty`), a life that is over while the mail still waits."""
    if state in ("failed", "unknown") and job_status in ("queued", "scheduled", "started"):
        return "queued", ""
    if state in FINAL:
        return state, reason
    if expired and state != "sending":
        return "failed", EXPIRED
    if state == "sending" and job_status in ("queued", "scheduled"):
        return "delayed", "its worker died in the last attempt"
    return ("failed", LOST[job_status]) if job_status in LOST else (state, reason)


def jittered(pause: int) -> int:
    """±20 %, so that mails put off together do not come back together."""
    return max(1, round(pause * random.uniform(0.8, 1.2)))


def _iso(moment: datetime) -> str:
    return moment.isoformat(timespec="milliseconds")


def _timestamp(moment: str) -> float:
    """Seconds since 1970; 0 for ""."""
    return datetime.fromisoformat(moment).timestamp() if moment else 0


def _dump(recipients: list[Recipient]) -> str:
    return json.dumps([vars(one) for one in recipients], ensure_ascii=False)
