"""What we keep of a mail in Redis, and the three steps that change it: accept, claim, settle.

A mail is a hash `mail:<id>`; its RQ job has the same id and holds nothing else. `accept` stores both in one atomic
step. `claim` gives a mail to one attempt at a time, for a limited time, so that a job that RQ runs twice sends once.
`settle` writes the outcome, recipient by recipient. In between, `Claim.before_dot` notes who is about to be served:
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
import time
import uuid
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import datetime, timezone
from typing import Any

from redis.client import Pipeline

from mail.claim import BEFORE_DOT, RELEASE, SETTLE, Busy, Claim, Recipient, dump, iso, timestamp
from mail.counters import TOTALS
from mail.draft import Draft
from mail.message import Message, message_id
from mail.store import EXPIRED, FINAL, LAST_SENT, LOOK_AFTER, OPEN, Store
from queues.connection import unavailable
from queues.heartbeat import LOST_AFTER
from queues.jobs import EMAIL, Accepted, Idempotency, Jobs, NotFound, NotPossible
from settings import Settings
from smtp.pacing import in_trouble

# Seconds. RQ's own retries, for an attempt whose worker died or that raised what nobody expected; a mail whose every
# attempt kills its worker is parked as failed after four. Pauses that the relay asks for are in `settle`, not here.
AFTER_A_CRASH = (1, 5, 30)
SHOWN = (
    *("state", "created_at", "message_id", "outline", "recipients", "attempts", "next_attempt_at", "reason"),
    *("expires_at", "on_doubt"),
)
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


def _record(mail_id: str, draft: Draft) -> dict[Any, Any]:
    outline, content = draft.message.to_json()
    return {
        "state": "queued",
        "created_at": iso(datetime.now(timezone.utc)),
        "message_id": message_id(mail_id, draft.message.sender),
        "outline": outline,
        "content": _compressed(content),
        "recipients": dump([Recipient(address) for address in draft.message.recipients]),
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
        self.store = Store(jobs.redis, settings, (CLAIM, BEFORE_DOT, SETTLE, RELEASE))

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
        return self.jobs.accept_all(
            EMAIL,
            "tasks.deliver",
            {mail_id: ([mail_id], {}) for mail_id in ids},
            timeout=self.settings.job_timeout,
            retry_in=AFTER_A_CRASH,
            result_ttl=self.settings.retain_sent,
            failure_ttl=self.settings.retain_failed,
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
        reply = self.store.run(CLAIM, keys, [token, LOST_AFTER * 1000, mail_id, queued_at, time.time() + LOOK_AFTER])
        verdict = reply[0].decode()
        if verdict == "busy":
            raise Busy(reply[1] / 1000)
        if verdict != "claimed":
            return str(verdict)
        stored = {name.decode(): value for name, value in zip(reply[1][::2], reply[1][1::2], strict=True)}
        return Claim(
            store=self.store,
            id=mail_id,
            token=token,
            message=Message.from_json(stored["outline"], zlib.decompress(stored["content"])),
            message_id=stored["message_id"].decode(),
            created_at=datetime.fromisoformat(stored["created_at"].decode()),
            state_before=stored["state_before"].decode(),
            recipients=[Recipient(**one) for one in json.loads(stored["recipients"])],
            attempts=json.loads(stored.get("attempts", b"[]")),
            counted=int(stored.get("counted", 0)),
            expires_at=timestamp(stored.get("expires_at", b"").decode()),
            on_doubt=stored.get("on_doubt", b"").decode(),
            in_line=bool(stored.get("in_line")),
        )

    def read(self, mail_id: str) -> dict[str, Any]:
        """A mail as `GET /emails/{id}` shows it. Raises `NotFound`, `Unavailable`."""
        with unavailable():
            pipe = self.jobs.redis.pipeline(transaction=False)  # a full Redis refuses a transaction, even to read
            pipe.hmget(f"mail:{mail_id}", SHOWN)
            pipe.hget(f"rq:job:{mail_id}", "status")
            values, job_status = pipe.execute()
        if values[0] is None:
            raise NotFound
        stored = {name: (value or b"").decode() for name, value in zip(SHOWN, values, strict=True)}
        expired = 0 < timestamp(stored["expires_at"]) <= time.time()
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
            commands.expire(f"mail:{mail_id}", self.store.kept_for("canceled"))
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
        if expires_at and timestamp(expires_at.decode()) <= time.time():
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
