"""The mails together: accept, claim, cancel, requeue; mail.reader reads them.

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
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from datetime import datetime
from itertools import chain
from typing import Any

from mail.address import Mailbox
from mail.claim import (
    Busy,
    Claim,
    Early,
    Recipient,
    attempts_to_json,
    iso,
    recipients_from_json,
    recipients_to_json,
    timestamp,
)
from mail.index import Index, made_at, new_id
from mail.message import Draft, Message, Raw, message_id, who_gets
from mail.raw import header_of, without
from mail.reader import MAIL_ID, NO_MAIL, Reader
from mail.states import AGAIN, SERVED, State, Status
from mail.store import LOOK_AFTER, Store, claim_key, look_at, mail_key
from mail.suppression import Suppressions
from mail.verp import return_path
from queues import keys
from queues.acceptance import Acceptance
from queues.connection import translating_errors
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

# Seconds. RQ's own retries, for an attempt whose worker died or that raised what nobody expected; a mail whose every
# attempt kills its worker is parked as failed after four.
AFTER_A_CRASH = (1, 5, 30)
NOT_SENT = "not sent: the API key has scope test"
BY_A_PERSON = "a person said that it arrived"  # how it is known that a mail in doubt did
COPIED_BY = "dashboard"  # in the place of the API key that has submitted a copy
SMALL = 4096  # characters: what zlib finds in a window of 2**12
UNSUBSCRIBE = re.compile("list-unsubscribe", re.IGNORECASE)  # and -Post
NOT_COPIED = re.compile("list-unsubscribe.*|message-id")
# ARGV[at] and on: of each mail the id, when to look at it if it does not move on, how many words its fields are, these,
# how many words for mail.index, these.
ACCEPT = """
local function beside(at)
  local mails = 0
  while ARGV[at] do
    mails = mails + 1
    local last = at + 2 + ARGV[at + 2]
    become(ARGV[at], 'queued', nil, ARGV[at + 1], {unpack(ARGV, at + 3, last)})
    at = last + 2 + ARGV[last + 1]
    redis.pcall('ZADD', INDEX, unpack(ARGV, last + 2, at - 1))
  end
  count('accepted', mails)
end
"""
# claim(id, token, lease in ms, when the job was queued (seconds), when to look at the mail if this attempt does not
# end, now (ISO 8601: since when the mail waits, if a person has asked again), now (seconds)).
# It is put off until its `scheduled_at`: RQ's scheduler may have queued its job just before that was moved.
# A failed or unknown mail is claimed only if a person has queued it again since: RQ may run a job twice, and then the
# second run must not be taken for a wish. Nor is one that the sweep found expired: the scheduler may queue its job
# later on. A second call with the same token (a lost reply) finds its own claim.
# Returns the state in which there is nothing to do, or `claimed`, the token, whether the relay is calm, how many
# addresses are suppressed, and the mail.
CLAIM = """
local function claim(id, token, lease, queued_at, look_at, iso, now)
  local mail, held = MAIL .. id, MAIL .. id .. ':claim'
  local state, scheduled_at = unpack(redis.call('HMGET', mail, 'state', 'scheduled_at'))
  if not may(state, 'sending') then return {state or 'gone'} end
  local early = (tonumber(scheduled_at) or 0) - now
  if early > 0 then return {'early', math.ceil(early * 1000)} end
  local fields = {'state_before', state}
  if AGAIN[state] then
    local settled_at, lapsed = unpack(redis.call('HMGET', mail, 'settled_at', 'lapsed'))
    local asked = tonumber(queued_at) > tonumber(settled_at) and not redis.call('ZSCORE', FAILED_JOBS, id)
    if lapsed == '1' or not asked then return {state} end
    fields = {'state_before', state, 'since', iso}
  end
  local holder = redis.call('GET', held)
  if holder and holder ~= token then return {'busy', redis.call('PTTL', held)} end
  redis.call('SET', held, token, 'PX', lease)
  if not holder then become(id, 'sending', nil, look_at, fields) end
  local listed = redis.pcall('HLEN', SUPPRESSED)
  listed = type(listed) == 'number' and listed or 0
  return {'claimed', token, redis.call('EXISTS', unpack(BREAKERS)) == 0 and 1 or 0, listed, redis.call('HGETALL', mail)}
end
"""
# ARGV: as `claim` takes them.
CLAIM_ALONE = CLAIM + "return claim(unpack(ARGV))"
# For queues.executions, which takes the mail's job in the same step. ARGV[at] and on: the token, the lease in ms, when
# to look at the mail, now (ISO 8601), now (seconds). It leaves a mail that may have been asked for again to `claim`.
CLAIM_BESIDE = f"""{CLAIM}
local function beside(id, at)
  local state = redis.call('HGET', MAIL .. id, 'state')
  if AGAIN[state] then return end
  local token, lease, look_at, iso, now = unpack(ARGV, at, at + 4)
  return claim(id, token, lease, 0, look_at, iso, now)
end
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
# KEYS: mail, RQ's job. ARGV: mail id, its new state, attempts, recipients, reason, now, then what removes its job, if
# that is to go. Returns what stands in the way, as CANCEL does: also that somebody has queued it again meanwhile, which
# a later `settled_at` would undo without a word. A second call (a lost reply) finds its own attempt. `settled_by`
# stays, so that the attempt that left the doubt has nothing more to write.
ARRIVED = """
local state, attempts = unpack(redis.call('HMGET', KEYS[1], 'state', 'attempts'))
if attempts == ARGV[3] then return {} end
if state ~= 'unknown' then return {state or 'gone'} end
local waits = redis.call('HGET', KEYS[2], 'status')
if waits == 'queued' or waits == 'scheduled' or waits == 'started' then return {state, waits} end
local status = remove_job(7)
if status and status ~= '' then return {state, status} end
local fields = {'attempts', ARGV[3], 'recipients', ARGV[4], 'reason', ARGV[5], 'settled_at', ARGV[6]}
become(ARGV[1], ARGV[2], nil, nil, fields)
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


def _record(mail_id: str, draft: Draft) -> dict[Any, Any]:
    outline, content = draft.message.to_json()
    return {
        "created_at": iso(made_at(mail_id)),
        "message_id": draft.message_id or message_id(mail_id, draft.message.sender),
        "outline": outline,
        "content": _compressed(content),
        "recipients": recipients_to_json(_recipients(draft)),
        **({"expires_at": draft.expires_at.isoformat()} if draft.expires_at else {}),
        **({"on_doubt": draft.on_doubt} if draft.on_doubt else {}),
        **({"key": draft.key} if draft.key else {}),
        **({"test": "1"} if draft.test else {}),
        **({"skip_suppression": "1"} if draft.skip_suppression else {}),
        **({"relay": draft.relay} if draft.relay else {}),
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


def _compressed(pieces: Iterator[str]) -> bytes:
    """Compresses what most mails hold in a sixteenth of zlib's usual memory: to get and return that took ten times as
    long as the rest."""
    first = next(pieces)
    window, level = (12, 4) if len(first) <= SMALL else (15, 8)
    packer = zlib.compressobj(1, zlib.DEFLATED, window, level)
    packed = io.BytesIO()  # which gives what it holds without another copy
    for piece in chain([first], pieces):
        packed.write(packer.compress(piece.encode()))
    packed.write(packer.flush())
    return packed.getvalue()


class Outbox(Reader):
    def __init__(self, jobs: Jobs, settings: Settings) -> None:
        super().__init__(jobs, settings)
        self.store = Store(jobs, settings)
        self.index = Index(jobs.redis)
        self.suppressions = Suppressions(self.store, self.index, settings)

    def accept(self, drafts: Sequence[Draft], idempotency: Idempotency | None = None, **how: Any) -> Accepted:
        """Stores and queues mails in one atomic step, all of them. Takes what `acceptance` takes. Raises
        `IdempotencyConflict`, `Unavailable`."""
        return self.jobs.accept(self.acceptance(drafts, idempotency, **how))

    def acceptance(
        self,
        drafts: Sequence[Draft],
        idempotency: Idempotency | None = None,
        *,
        ids: Sequence[str] = (),
        known_for: int | None = None,
    ) -> Acceptance:
        """Returns what `accept` hands to Redis. With the same `ids` that may be done again after `Unavailable`: nothing
        is stored twice. A repeat is known for IDEMPOTENCY_TTL, or `known_for` so many seconds. Raises `Unavailable`."""
        mails = dict(zip(ids or [new_id() for _ in drafts], drafts, strict=True))
        words = [word for mail_id, draft in mails.items() for word in self._words(mail_id, draft)]
        places = {mail_id: _place(draft) for mail_id, draft in mails.items()}
        return self._queued(places, Beside(self.store.script(ACCEPT).source, words), idempotency, known_for)

    def _words(self, mail_id: str, draft: Draft) -> list[Any]:
        fields = [word for pair in _record(mail_id, draft).items() for word in pair]
        moment = draft.scheduled_at.timestamp() if draft.scheduled_at else time.time()
        expires_at = draft.expires_at.timestamp() if draft.expires_at else 0
        scored = [word for member in self.index.members(mail_id, draft) for word in (0, member)]
        return [mail_id, look_at(moment + LOOK_AFTER, expires_at), len(fields), *fields, len(scored), *scored]

    def _queued(
        self,
        places: Mapping[str, Place],
        beside: Beside,
        idempotency: Idempotency | None = None,
        known_for: int | None = None,
    ) -> Acceptance:
        return self.jobs.acceptance(
            EMAIL,
            "tasks.deliver",
            {mail_id: Call([mail_id], {}, place) for mail_id, place in places.items()},
            Policy(self.settings.job_timeout, AFTER_A_CRASH, self.settings.retain_sent, self.settings.retain_failed),
            beside=beside,
            idempotency=idempotency,
            idempotency_ttl=known_for or self.settings.idempotency_ttl,
        )

    def claim(self, mail_id: str, queued_at: float, taken: Any = None) -> Claim | str:
        """Takes a mail for one attempt, or returns the state in which there is nothing to do. Raises `Busy`, `Early`.

        `queued_at` is when its job was queued, in seconds since 1970: it shows whether somebody has asked again for a
        mail that failed. `taken` is what `claim_beside` has returned, if it was taken with its job. `Claim.held` keeps
        the claim; one that ran out is of a worker that is dead or stood still.
        """
        reply = taken or self._claim(mail_id, queued_at)
        verdict = reply[0].decode()
        if verdict == "busy":
            raise Busy(reply[1] / 1000)
        if verdict == "early":
            raise Early(reply[1] / 1000)
        if verdict != "claimed":
            return str(verdict)
        return self._claimed(mail_id, *reply[1:])

    def _claimed(self, mail_id: str, token: bytes, calm: int, listed: int, fields: list[bytes]) -> Claim:
        stored = {name.decode(): value for name, value in zip(fields[::2], fields[1::2], strict=True)}
        return Claim(
            store=self.store,
            id=mail_id,
            token=token.decode(),
            calm=bool(calm),
            return_path=return_path(self.settings.bounce_address, mail_id, self.index.proof),
            suppressing=bool(listed) and not stored.get("skip_suppression"),
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
            reserved=stored.get("in_line", b"").decode(),
            relay=stored.get("relay", b"").decode(),
            held_by=stored.get("held_by", b"").decode(),
            asked=stored.get("asked", b"").decode(),
            test=bool(stored.get("test")),
            priority=stored.get("priority", b"normal").decode(),
        )

    def _claim(self, mail_id: str, queued_at: float) -> Any:
        token, lease, look_at, iso_now, now = self._claiming(uuid.uuid4().hex)
        return self.store.run(CLAIM_ALONE, [], [mail_id, token, lease, queued_at, look_at, iso_now, now])

    def claim_beside(self) -> tuple[str, Callable[[str], list[Any]]]:
        """Returns what queues.executions needs to claim a mail in the step that takes its job: the script's source, and
        what makes its words of a token."""
        return self.store.script(CLAIM_BESIDE).source, self._claiming

    def _claiming(self, token: str) -> list[Any]:
        now = time.time()
        return [token, LEASE_SECONDS * 1000, now + LOOK_AFTER, iso(now), now]

    def cancel(self, mail_id: str) -> None:
        """Stops a mail that is not being sent and not sent. Raises `NotFound`, `NotPossible`, `Unavailable`."""
        if not MAIL_ID.fullmatch(mail_id):
            raise NotFound
        job = self._removal(mail_id)
        with translating_errors():
            touched = [mail_key(mail_id), claim_key(mail_id), keys.queue(BULK)]
            refused = self.store.confirmed(REMOVE_JOB + CANCEL, touched, [mail_id, time.time(), *job])
        match [word.decode(errors="replace") for word in refused]:
            case [_, status]:
                raise not_removed(status)
            case ["gone"]:
                raise NotFound
            case [state]:
                raise NotPossible(f"the mail is {'being sent' if state == State.SENDING else 'sent already'}")

    def _removal(self, mail_id: str) -> list[Any]:
        try:
            return self.jobs.removal(mail_id)
        except NotFound:  # somebody deleted the job; the mail is left
            return []

    def arrived(self, mail_id: str, how: str = BY_A_PERSON) -> None:
        """Notes that a mail in doubt did arrive, and how that is known: those in doubt were served. It is sent then and
        its job removed; or failed, if somebody else was not served. Raises `NotFound`, `NotPossible`,
        `Unavailable`."""
        seen = self.read(mail_id)
        if seen["status"] != State.UNKNOWN:
            raise NotPossible("only a mail in doubt can be settled; see its status")
        recipients = [Recipient(**one) for one in seen["recipients"]]
        for one in recipients:
            one.status = Status.ACCEPTED if one.status == Status.IN_DOUBT else one.status
        left = [one for one in recipients if one.status not in (*SERVED, Status.SUPPRESSED)]
        why = ", ".join(dict.fromkeys(f"{one.code} before" for one in left if one.code)) or seen["reason"]
        now = time.time()
        attempts = [*seen["attempts"], {"at": iso(now), "verdict": "settled", "text": how}]
        args: list[Any] = [mail_id, State.FAILED if left else State.SENT, attempts_to_json(attempts)]
        args += [recipients_to_json(recipients), why if left else "", now, *([] if left else self._removal(mail_id))]
        with translating_errors():
            if self.store.confirmed(REMOVE_JOB + ARRIVED, [mail_key(mail_id), keys.job(mail_id)], args):
                raise NotPossible("the mail moved on at this moment; look again")

    def copy(self, mail_id: str, to: str) -> str:
        """Accepts a mail of the same content for `to` alone, an operator's own address, and returns its id. The copy
        obeys MAIL_REDIRECT_TO and MAIL_ALLOWLIST, and has no List-Unsubscribe: that would unsubscribe the recipient.
        Raises `NotFound`, `NotPossible`, `Unavailable`."""
        self.read(mail_id)
        with translating_errors():
            stored: Any = self.jobs.redis.hmget(mail_key(mail_id), ["outline", "content"])
        if not stored[1]:
            raise NotPossible("its content is no longer kept: the mail was sent or canceled")
        try:
            message = Message.from_json(stored[0], zlib.decompress(stored[1]))
        except (*DAMAGED, zlib.error):
            raise NotFound(NO_MAIL) from None
        box = _who_gets(to, self.settings)
        if not box:
            raise NotPossible("the address must be one, such as ada@example.com, to which this service sends mail")
        headers = {name: value for name, value in message.headers.items() if not UNSUBSCRIBE.match(name)}
        raw = message.raw and as_a_copy(message.raw)
        copied = replace(message, to=[box], cc=[], bcc=[], headers=headers, raw=raw)
        return self.accept([Draft(copied, key=COPIED_BY)]).id

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
            state = self.store.confirmed(RESCHEDULE, touched, args).decode()
        if state == "gone":
            raise NotFound
        if state:
            raise NotPossible("only a mail that waits for its scheduled_at can be moved; see its status")

    def requeue(self, mail_id: str, in_doubt: bool = True) -> None:
        """Queues a failed mail again with all its attempts, also if its job was deleted; one that is in doubt only if
        that is asked for. Raises as `Jobs.requeue`."""
        with translating_errors():
            stored: Any = self.jobs.redis.hmget(mail_key(mail_id), ["expires_at", "state"])
        expires_at, state = stored
        if state == State.UNKNOWN.value.encode() and not in_doubt:
            raise NotPossible("the mail is in doubt: the relay may have it; look again")
        try:
            has_expired = bool(expires_at) and timestamp(expires_at.decode()) <= time.time()
        except ValueError:
            raise NotFound(NO_MAIL) from None
        if has_expired:
            raise NotPossible("the mail has expired and will not be sent; submit it anew")
        try:
            self.jobs.requeue(mail_id)
        except NotFound:
            if self.read(mail_id)["status"] not in AGAIN:
                raise NotPossible("only a failed mail can be queued again") from None
            self.jobs.accept(self._queued({mail_id: Place()}, Beside()))


def _who_gets(to: str, settings: Settings) -> Mailbox | None:
    try:
        meant = Mailbox.parse(to)
    except ValueError:
        return None
    return who_gets(meant, settings) if settings.allow_local_domains or not meant.is_local else None


def as_a_copy(raw: Raw) -> Raw:
    octets = raw.octets.encode("latin-1")
    return raw._replace(octets=without(octets, header_of(octets), NOT_COPIED).decode("latin-1"))


def jittered(pause: int) -> int:
    """Changes a pause by up to 20 %, so that mails put off together do not come back together."""
    return max(1, round(pause * random.uniform(0.8, 1.2)))
