"""The mails together: accept, claim, cancel, requeue, read.

A mail is a hash in Redis; its RQ job has the same id and holds nothing else. `accept` stores both in one atomic step.
`claim` gives a mail to one attempt at a time, for a limited time, so that a job that RQ runs twice sends once; the
attempt then marks and settles it (mail.claim). Every script may be run again after a lost reply.
"""

from __future__ import annotations

import io
import json
import math
import random
import re
import time
import uuid
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from datetime import datetime
from typing import Any

from mail.claim import Busy, Claim, Early, Recipient, iso, recipients_from_json, recipients_to_json, timestamp
from mail.counters import number
from mail.index import Index, made_at, new_id
from mail.message import Draft, Message, message_id
from mail.states import State, Status, effective_state
from mail.store import LAST_SENT, LOOK_AFTER, Store, claim_key, look_at, mail_key
from queues import keys
from queues.connection import is_wrong_type, translating_errors
from queues.heartbeat import LEASE_SECONDS
from queues.jobs import (
    REMOVE_JOB,
    Accepted,
    Beside,
    Call,
    Idempotency,
    Jobs,
    NotFound,
    NotPossible,
    Place,
    Policy,
    not_removed,
)
from queues.quarantine import DAMAGED
from queues.table import BULK, EMAIL
from settings import Settings
from smtp.pacing import in_trouble

# Seconds. RQ's own retries, for an attempt whose worker died or that raised what nobody expected; a mail whose every
# attempt kills its worker is parked as failed after four.
AFTER_A_CRASH = (1, 5, 30)
NOT_SENT = "not sent: the API key has scope test"
NO_MAIL = "what is stored under this id cannot be read as a mail"
MAIL_ID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")  # other keys of ours begin with mail:, too
# fmt: off
SHOWN = ("state", "created_at", "message_id", "outline", "recipients", "attempts", "next_attempt_at", "reason",
         "expires_at", "on_doubt", "key", "test", "scheduled_at", "priority")
# fmt: on
# ARGV[at] and on: of each mail the id, when to look at it if it does not move on, how many words its fields are, these,
# how many words for mail.index, these.
ACCEPT = """
local function beside(at)
  while ARGV[at] do
    local last = at + 2 + ARGV[at + 2]
    become(ARGV[at], 'queued', nil, ARGV[at + 1], {unpack(ARGV, at + 3, last)})
    at = last + 2 + ARGV[last + 1]
    redis.pcall('ZADD', INDEX, unpack(ARGV, last + 2, at - 1))
  end
end
"""
# KEYS: mail, claim, RQ's failed registry. ARGV: mail id, token, lease in ms, when the job was queued (seconds), when to
# look at the mail if this attempt does not end, now (ISO 8601: since when the mail waits, if a person has asked again),
# now (seconds).
# It is put off until its `scheduled_at`: RQ's scheduler may have queued its job just before that was moved.
# A failed or unknown mail is claimed only if a person has queued it again since: RQ may run a job twice, and then the
# second run must not be taken for a wish. Nor is one that the sweep found expired: the scheduler may queue its job
# later on. A second call with the same token (a lost reply) finds its own claim.
CLAIM = """
local state = redis.call('HGET', KEYS[1], 'state')
if not may(state, 'sending') then return {state or 'gone'} end
local early = (tonumber(redis.call('HGET', KEYS[1], 'scheduled_at')) or 0) - ARGV[7]
if early > 0 then return {'early', math.ceil(early * 1000)} end
if state == 'failed' or state == 'unknown' then
  local settled_at, lapsed = unpack(redis.call('HMGET', KEYS[1], 'settled_at', 'lapsed'))
  local asked = tonumber(ARGV[4]) > tonumber(settled_at) and not redis.call('ZSCORE', KEYS[3], ARGV[1])
  if lapsed == '1' or not asked then return {state} end
end
local holder = redis.call('GET', KEYS[2])
if holder and holder ~= ARGV[2] then return {'busy', redis.call('PTTL', KEYS[2])} end
redis.call('SET', KEYS[2], ARGV[2], 'PX', ARGV[3])
local fields = {'state_before', state}
if state == 'failed' or state == 'unknown' then fields = {'state_before', state, 'since', ARGV[6]} end
if not holder then become(ARGV[1], 'sending', nil, ARGV[5], fields) end
return {'claimed', redis.call('HGETALL', KEYS[1])}
"""
# KEYS: mail, claim, bulk, of which RQ knows nothing. ARGV: mail id, now, then what removes its job, if it has one.
# Returns what stands in the way: the mail's state ('sending': an attempt holds it), and the job's status where that is
# it.
CANCEL = """
local state = redis.call('HGET', KEYS[1], 'state')
if not may(state, 'canceled') then return {state or 'gone'} end
if redis.call('EXISTS', KEYS[2]) == 1 then return {'sending'} end
local status = remove_job(3)
if status and status ~= '' then return {state, status} end
if redis.call('HGET', KEYS[1], 'priority') == 'bulk' then redis.pcall('LREM', KEYS[3], 1, ARGV[1]) end
become(ARGV[1], 'canceled', nil, nil, {'settled_at', ARGV[2]})
return {}
"""
# KEYS: mail, RQ's scheduled registry, RQ's job. ARGV: mail id, the moment (seconds), the same in RQ's form, in ISO
# 8601, and when to look at it. Returns the state that stands in the way. Its job may be queued: CLAIM puts it off.
RESCHEDULE = """
local state, scheduled_at = unpack(redis.call('HMGET', KEYS[1], 'state', 'scheduled_at'))
if state ~= 'queued' or not scheduled_at then return state or 'gone' end
if LOST[redis.call('HGET', KEYS[3], 'status') or ''] then return 'failed' end  -- nobody would send it
redis.call('HSET', KEYS[1], 'scheduled_at', ARGV[2], 'since', ARGV[4])
redis.call('ZADD', KEYS[2], 'XX', ARGV[3], ARGV[1])
redis.pcall('ZADD', OPEN, ARGV[5], ARGV[1])
return ''
"""
# A state that Resend does not have -> its word for it: SDKs fail at any other.
LAST_EVENT: Mapping[str, str] = {
    State.SENDING: "queued",
    State.DELAYED: "delivery_delayed",
    State.UNKNOWN: "delivery_delayed",
}


def _record(mail_id: str, draft: Draft) -> dict[Any, Any]:
    outline, content = draft.message.to_json()
    return {
        "created_at": iso(made_at(mail_id)),
        "message_id": message_id(mail_id, draft.message.sender),
        "outline": outline,
        "content": _compressed(content),
        "recipients": recipients_to_json(_recipients(draft)),
        **({"expires_at": draft.expires_at.isoformat()} if draft.expires_at else {}),
        **({"on_doubt": draft.on_doubt} if draft.on_doubt else {}),
        **({"key": draft.key} if draft.key else {}),
        **({"test": "1"} if draft.test else {}),
        **({"priority": draft.priority} if draft.priority != "normal" else {}),
        **(_scheduled(draft.scheduled_at.timestamp()) if draft.scheduled_at else {}),
    }


def _recipients(draft: Draft) -> list[Recipient]:
    """Returns the recipients of a new mail. Those of a test are served from the beginning: no attempt, also of a worker
    of an earlier version or after a requeue, has anybody to send it to."""
    served = (Status.ACCEPTED, None, NOT_SENT) if draft.test else ()
    return [Recipient(address, *served) for address in draft.message.recipients]


def _scheduled(moment: float) -> dict[str, Any]:
    """Returns the fields of a mail that is not sent before `moment`, and waits from then on."""
    return {"scheduled_at": round(moment, 3), "since": iso(moment)}


def _place(draft: Draft) -> Place:
    at = math.ceil(draft.scheduled_at.timestamp()) if draft.scheduled_at else 0
    return Place(at, front=draft.priority == "high", aside=BULK if draft.priority == "bulk" and not at else "")


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
        self.store = Store(jobs.redis, settings)
        self.index = Index(jobs.redis)

    def accept(self, drafts: Sequence[Draft], idempotency: Idempotency | None = None) -> Accepted:
        """Stores and queues mails in one atomic step, all of them. Raises `IdempotencyConflict`, `Unavailable`."""
        mails = {new_id(): draft for draft in drafts}
        words = [word for mail_id, draft in mails.items() for word in self._words(mail_id, draft)]
        places = {mail_id: _place(draft) for mail_id, draft in mails.items()}
        return self._queue(places, Beside(self.store.script(ACCEPT).source, words), idempotency)

    def _words(self, mail_id: str, draft: Draft) -> Iterator[Any]:
        fields = [word for pair in _record(mail_id, draft).items() for word in pair]
        moment = draft.scheduled_at.timestamp() if draft.scheduled_at else time.time()
        expires_at = draft.expires_at.timestamp() if draft.expires_at else 0
        yield from (mail_id, look_at(moment + LOOK_AFTER, expires_at), len(fields), *fields)
        scored = [word for member in self.index.members(mail_id, draft) for word in (0, member)]
        yield from (len(scored), *scored)

    def _queue(self, places: Mapping[str, Place], beside: Beside, idempotency: Idempotency | None = None) -> Accepted:
        return self.jobs.accept(
            EMAIL,
            "tasks.deliver",
            {mail_id: Call([mail_id], {}, place) for mail_id, place in places.items()},
            Policy(self.settings.job_timeout, AFTER_A_CRASH, self.settings.retain_sent, self.settings.retain_failed),
            beside=beside,
            idempotency=idempotency,
            idempotency_ttl=self.settings.idempotency_ttl,
        )

    def claim(self, mail_id: str, queued_at: float) -> Claim | str:
        """Takes a mail for one attempt, or returns the state in which there is nothing to do. Raises `Busy`, `Early`.

        `queued_at` is when its job was queued, in seconds since 1970: it shows whether somebody has asked again for a
        mail that failed. `Claim.held` keeps the claim; one that ran out is of a worker that is dead or stood still.
        """
        token = uuid.uuid4().hex
        touched = [mail_key(mail_id), claim_key(mail_id), keys.failed(EMAIL)]
        now = time.time()
        args = [mail_id, token, LEASE_SECONDS * 1000, queued_at, now + LOOK_AFTER, iso(now), now]
        reply = self.store.run(CLAIM, touched, args)
        verdict = reply[0].decode()
        if verdict == "busy":
            raise Busy(reply[1] / 1000)
        if verdict == "early":
            raise Early(reply[1] / 1000)
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
            since=datetime.fromisoformat(stored.get("since", stored["created_at"]).decode()),
            state_before=State(stored["state_before"].decode()),
            recipients=recipients_from_json(stored["recipients"]),
            attempts=json.loads(stored.get("attempts", b"[]")),
            counted=int(stored.get("counted", 0)),
            expires_at=timestamp(stored.get("expires_at", b"").decode()),
            on_doubt=stored.get("on_doubt", b"").decode() or self.settings.on_doubt,
            reserved=bool(stored.get("in_line")),
            test=bool(stored.get("test")),
            priority=stored.get("priority", b"normal").decode(),
        )

    def read(self, mail_id: str, only: str = "") -> dict[str, Any]:
        """Returns a mail as `GET /emails/{id}` shows it; with `only`, if the API key of this name submitted it. Raises
        `NotFound`, `Unavailable`."""
        if not MAIL_ID.fullmatch(mail_id):
            raise NotFound
        [(values, job_status)] = self._stored([mail_id])
        if only and (isinstance(values, Exception) or values[SHOWN.index("key")] != only.encode()):
            raise NotFound
        if isinstance(values, Exception):
            raise NotFound(NO_MAIL)
        if values[0] is None:
            raise NotFound
        try:
            return self._shown(mail_id, values, job_status)
        except DAMAGED:
            raise NotFound(NO_MAIL) from None

    def read_all(self, ids: Sequence[str]) -> Iterator[dict[str, Any]]:
        """Yields those of the mails that are kept and can be read, as `read` returns them. Raises `Unavailable`."""
        for mail_id, (values, job_status) in zip(ids, self._stored(ids), strict=True):
            if not isinstance(values, Exception) and values[0] is not None:
                with suppress(*DAMAGED):
                    yield self._shown(mail_id, values, job_status)

    def _stored(self, ids: Sequence[str]) -> list[tuple[Any, bytes]]:
        """Returns of each mail the values of SHOWN, or an exception where there is something else, and the status of
        its job. Raises `Unavailable`."""
        with translating_errors():
            pipe = self.jobs.redis.pipeline(transaction=False)  # a full Redis refuses a transaction, even to read
            for mail_id in ids:
                pipe.hmget(mail_key(mail_id), SHOWN)
                pipe.hget(keys.job(mail_id), "status")
            seen: list[Any] = pipe.execute(raise_on_error=False)
            for error in seen:
                if isinstance(error, Exception) and not is_wrong_type(error):
                    raise error
        statuses = [status if isinstance(status, bytes) else b"" for status in seen[1::2]]
        return list(zip(seen[::2], statuses, strict=True))

    def _shown(self, mail_id: str, values: list[bytes | None], job_status: bytes) -> dict[str, Any]:
        stored = {name: (value or b"").decode() for name, value in zip(SHOWN, values, strict=True)}
        expired = 0 < timestamp(stored["expires_at"]) <= time.time()
        scheduled_at = iso(float(stored["scheduled_at"])) if stored["scheduled_at"] else None
        state, reason = effective_state(
            stored["state"], job_status.decode(), stored["reason"], expired, bool(scheduled_at)
        )
        outline = Message.from_json(stored["outline"])
        return {
            "object": "email",
            "id": mail_id,
            "status": state,
            "last_event": LAST_EVENT.get(state, state),
            "from": str(outline.sender),
            **{name: [str(box) for box in getattr(outline, name)] for name in ("to", "cc", "bcc", "reply_to")},
            "subject": outline.subject,
            **dict.fromkeys(("html", "text")),  # the content is never shown
            "scheduled_at": scheduled_at,
            "tags": outline.tags,
            "message_id": stored["message_id"],
            "created_at": stored["created_at"],
            "key": stored["key"] or None,
            "test": bool(stored["test"]),
            "priority": stored["priority"] or "normal",
            "next_attempt_at": stored["next_attempt_at"] or None,
            "expires_at": stored["expires_at"] or None,
            "on_doubt": stored["on_doubt"] or self.settings.on_doubt,
            "reason": reason or None,
            "recipients": json.loads(stored["recipients"]),
            "attempts": json.loads(stored["attempts"] or "[]"),
        }

    def hold_to(self, mail_id: str, only: str) -> None:
        """Raises `NotFound` for a mail that another API key than `only` submitted; "" may have any."""
        if only:
            self.read(mail_id, only)

    def exists(self, mail_id: str) -> bool:
        if not MAIL_ID.fullmatch(mail_id):
            return False
        with translating_errors():
            return bool(self.jobs.redis.exists(mail_key(mail_id)))

    def cancel(self, mail_id: str) -> None:
        """Stops a mail that is not being sent and not sent. Raises `NotFound`, `NotPossible`, `Unavailable`."""
        if not MAIL_ID.fullmatch(mail_id):
            raise NotFound
        try:
            job = self.jobs.removal(mail_id)
        except NotFound:  # somebody deleted the job; the mail is left
            job = []
        with translating_errors():
            touched = [mail_key(mail_id), claim_key(mail_id), keys.queue(BULK)]
            refused = self.store.run(REMOVE_JOB + CANCEL, touched, [mail_id, time.time(), *job])
        match [word.decode(errors="replace") for word in refused]:
            case [_, status]:
                raise not_removed(status)
            case ["gone"]:
                raise NotFound
            case [state]:
                raise NotPossible(f"the mail is {'being sent' if state == State.SENDING else 'sent already'}")

    def reschedule(self, mail_id: str, moment: float) -> None:
        """Moves a scheduled mail that no attempt has taken yet to `moment` (seconds since 1970). Raises `NotFound`,
        `NotPossible`, `Unavailable`."""
        if not MAIL_ID.fullmatch(mail_id):
            raise NotFound
        with translating_errors():
            stored: Any = self.jobs.redis.hget(mail_key(mail_id), "expires_at")
            expires_at = timestamp((stored or b"").decode())
            if 0 < expires_at <= moment:
                raise NotPossible("the mail expires before that, and would not be sent")
            fields, again = _scheduled(moment), look_at(moment + LOOK_AFTER, expires_at)
            args = [mail_id, fields["scheduled_at"], math.ceil(moment), fields["since"], again]
            touched = [mail_key(mail_id), keys.scheduled(EMAIL), keys.job(mail_id)]
            state = self.store.run(RESCHEDULE, touched, args).decode()
        if state == "gone":
            raise NotFound
        if state:
            raise NotPossible("only a mail that waits for its scheduled_at can be moved; see its status")

    def requeue(self, mail_id: str) -> None:
        """Queues a failed mail again with all its attempts, also if its job was deleted. Raises as `Jobs.requeue`."""
        with translating_errors():
            expires_at: Any = self.jobs.redis.hget(mail_key(mail_id), "expires_at")
        try:
            has_expired = bool(expires_at) and timestamp(expires_at.decode()) <= time.time()
        except ValueError:
            raise NotFound(NO_MAIL) from None
        if has_expired:
            raise NotPossible("the mail has expired and will not be sent; submit it anew")
        try:
            self.jobs.requeue(mail_id)
        except NotFound:
            if self.read(mail_id)["status"] not in (State.FAILED, State.UNKNOWN):
                raise NotPossible("only a failed mail can be queued again") from None
            self._queue({mail_id: Place()}, Beside())

    def failures(self, since: float) -> Iterator[str]:
        """Yields the reason of each mail that failed after `since` (seconds since 1970) and was not queued again."""
        with translating_errors():
            ids: list[Any] = self.jobs.redis.zrange(keys.failed(EMAIL), 0, -1)
            for start in range(0, len(ids), 500):
                pipe = self.jobs.redis.pipeline(transaction=False)
                for mail_id in ids[start : start + 500]:
                    pipe.hmget(mail_key(mail_id.decode()), "reason", "settled_at")
                for reason, settled_at in pipe.execute():
                    if reason and number(settled_at) >= since:
                        yield reason.decode(errors="replace")

    def relay_in_trouble(self) -> bool:
        """Returns whether the relay's breaker is open, so that all mail waits. Raises `Unavailable`."""
        return in_trouble(self.jobs.redis)

    def last_sent(self) -> float | None:
        with translating_errors():
            moment = self.jobs.redis.get(LAST_SENT)
        return number(moment) or None


def jittered(pause: int) -> int:
    """Changes a pause by up to 20 %, so that mails put off together do not come back together."""
    return max(1, round(pause * random.uniform(0.8, 1.2)))
