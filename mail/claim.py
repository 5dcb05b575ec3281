"""One attempt's hold on one mail: taken for a limited time, noted before the final dot, settled with the outcome."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from datetime import datetime, timezone
from typing import Any

from mail.message import Message
from mail.states import State, Status
from mail.store import LOOK_AFTER, Store, claim_key, look_at, mail_key
from process.relays import ONLY
from queues import keys
from queues.heartbeat import LEASE_SECONDS, on_heartbeat
from queues.replication import Unconfirmed
from smtp.policy import may_be_the_mails

SUPPRESSED_RECIPIENTS = "recipients:suppressed"  # in mail.counters' totals
CONFIRMED_WITHIN = 10  # seconds for which the relay waits for its final dot, and we for Redis' replicas
ATTEMPTS_KEPT = 50  # an afternoon of relay trouble must not grow a mail without end
# KEYS: mail, claim. ARGV: token, recipients, other fields and values. 0: the claim has passed to another attempt, or
# the mail was canceled or sent meanwhile, and this attempt must stop.
MARK_IN_DOUBT = """
if redis.call('GET', KEYS[2]) ~= ARGV[1] or redis.call('HGET', KEYS[1], 'state') ~= 'sending' then return 0 end
redis.call('HSET', KEYS[1], 'recipients', unpack(ARGV, 2))
return 1
"""
# KEYS: mail, claim, RQ's job. ARGV: mail id, token, state, now, when to look at it if it does not move on, how many
# words of totals follow, how many for the suppression list, these and those, then field, value, ...
# `sent` is written by every attempt that knows it, also when its claim has run out. Anything else only by the holder. A
# second call with the same token changes nothing.
SETTLE = """
local id, token, state = ARGV[1], ARGV[2], ARGV[3]
local mine = redis.call('GET', KEYS[2]) == token
local settled_by, was = unpack(redis.call('HMGET', KEYS[1], 'settled_by', 'state'))
if settled_by == token then return 1 end
if not mine and state ~= 'sent' then return 0 end
if was == 'bounced' or was == 'complained' then return 1 end  -- somebody else has sent it, and a report has come
local counts = 8 + ARGV[6]
local fields = counts + ARGV[7]
-- Sent already by an attempt that took it over: that one has noted that this one was interrupted, and so it stays.
local written = not mine and was == 'sent' and #ARGV + 1 or fields
if not become(id, state, ARGV[4], ARGV[5], {'settled_by', token, unpack(ARGV, written)}) then return 0 end
if mine then redis.call('DEL', KEYS[2]) end
for i = counts, fields - 1, 2 do suppress(ARGV[i], ARGV[i + 1]) end
for i = 8, counts - 1, 2 do
  redis.pcall('HINCRBY', TOTALS, ARGV[i], ARGV[i + 1])
  if string.find(ARGV[i], OVER_TIME) then note(ARGV[i], ARGV[i + 1]) end
end
if AGAIN[state] and redis.call('EXISTS', KEYS[3]) == 1 then
  redis.call('HSET', KEYS[3], 'retries_left', 0)  -- should its worker die now, RQ must not try again
end
return 1
"""
# KEYS: mail, claim. ARGV: token.
RELEASE = """
if redis.call('GET', KEYS[2]) == ARGV[1] then redis.call('DEL', KEYS[2]) end
"""


class Busy(Exception):
    """Another attempt holds the mail, for `seconds` more at most."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds


class Early(Busy):
    """The mail is not to be sent before its `scheduled_at`, which is in so many seconds."""


class ClaimLost(Exception):
    """The mail is no longer this attempt's: the lease ran out (this process stood still) and another has it, or it was
    canceled. Nothing was sent."""


@dataclass
class Recipient:
    """A recipient, with the relay's last word about this address."""

    address: str
    status: Status = Status.PENDING
    code: int | None = None
    text: str = ""


@dataclass
class Claim:
    """One attempt's hold on one mail. `counted` is the number of attempts that count against it; `expires_at` is in
    seconds since 1970, 0 for a mail that does not expire; `reserved` names the relay where it has its turn now ("1":
    that of SMTP_HOST), `relay` the one that it must go by, `held_by` the one that may have it already, and if that
    can be asked, `asked` since when (seconds since 1970) and what identifies it; `counts` goes into the totals with the
    outcome. The recipients of a `test` are all served already."""

    store: Store
    id: str
    token: str
    message: Message
    message_id: str
    created_at: datetime
    since: datetime  # when it was accepted, or asked for again after it had failed
    state_before: State
    recipients: list[Recipient]
    on_doubt: str
    attempts: list[dict[str, Any]] = field(default_factory=list)
    counted: int = 0
    expires_at: float = 0
    reserved: str = ""
    relay: str = ""
    held_by: str = ""
    asked: str = ""
    test: bool = False
    priority: str = "normal"
    return_path: str = ""  # in the place of the sender in its envelope, but for a mail that has none there
    calm: bool = False  # no relay was in trouble as the mail was claimed
    suppressing: bool = False  # the suppression list is not empty, and is to be obeyed
    suppress: list[bytes] = field(default_factory=list)  # what settle adds to it: mail.suppression
    settled: bool = False
    names_relay: bool = False  # the mark has written `held_by`, so settle must write it, too
    counts: Counter[str] = field(default_factory=Counter)
    claimed_at: float = field(default_factory=time.time)
    started: float = field(default_factory=time.monotonic)  # the same moment, to measure from

    def has_expired(self, within: float = 0) -> bool:
        """Returns whether the mail may not be sent any more, now or `within` so many seconds."""
        return 0 < self.expires_at <= time.time() + within

    @property
    def age(self) -> float:
        """Returns the seconds since the mail was accepted, or asked for again."""
        return time.time() - self.since.timestamp()

    @property
    def envelope_sender(self) -> str:
        """Returns the address to which servers report. What is itself a report, and so has none, gets none."""
        given = self.message.envelope_sender
        return (self.return_path or given) if given else ""

    def put_off_by(self, relay: str) -> bool:
        """Returns whether the relay has put off this mail itself before; not only that it could not be reached."""
        return any(
            may_be_the_mails(one.get("phase"), one.get("code")) and one.get("relay_name", ONLY) == relay
            for one in self.attempts
        )

    @property
    def keys(self) -> list[str]:
        return [mail_key(self.id), claim_key(self.id)]

    def renewed(self) -> AbstractContextManager[None]:
        """Renews the claim for as long as the body runs."""
        return on_heartbeat(lambda: self.store.renew(self.keys, [self.token, LEASE_SECONDS * 1000]))

    @contextmanager
    def held(self) -> Iterator[None]:
        """Renews the claim for as long as the body runs, and releases it then, also where nothing was settled."""
        try:
            with self.renewed():
                yield
        finally:
            if not self.settled:
                self.store.run(RELEASE, self.keys, [self.token])

    def undecided(self) -> list[Recipient]:
        """Returns the recipients of a mail that is not through yet: the next attempt looks again who is suppressed, and
        workers of an earlier version do not know that word. But an upstream is asked again for the same ones."""
        waiting = () if self.asked else (Status.SUPPRESSED,)
        return [replace(one, status=Status.PENDING) if one.status in waiting else one for one in self.recipients]

    def mark_in_doubt(self, statuses: Mapping[str, Status], relay: str = ONLY) -> None:
        """Writes down, right before the final dot, who is in doubt if nothing more is heard of this attempt, and which
        relay may have the mail. The claim itself stays as it is: the dot may yet fail to go out. Raises `ClaimLost`;
        `Unconfirmed` where the mark might be lost with the primary: no dot may go out then, for another worker may
        find the mail unmarked, and send it."""
        marked = [replace(one, status=statuses.get(one.address, one.status)) for one in self.undecided()]
        held = [] if relay == ONLY else ["held_by", relay, *(["asked", self.asked] if self.asked else [])]
        words, self.names_relay = [self.token, recipients_to_json(marked), *held], bool(held)
        if not self.store.confirmed(MARK_IN_DOUBT, self.keys, words, CONFIRMED_WITHIN):
            raise ClaimLost(self.id)

    def mark_asked(self, upstream: str, recipients: Sequence[str], relay: str) -> None:
        """Writes down, right before an upstream is asked, that it may have the mail. Raises `ClaimLost`; `Unconfirmed`,
        after which the upstream must not be asked, and this attempt knows nothing of the note."""
        before, self.asked = self.asked, self.asked or f"{time.time():.3f} {upstream}"
        try:
            self.mark_in_doubt(dict.fromkeys(recipients, Status.IN_DOUBT), relay)
        except Unconfirmed:
            self.asked = before
            raise

    def settle(self, state: State, *, reason: str = "", next_in: float = 0, reserved: str = "") -> None:
        """Writes the outcome: recipients, attempts, state. Raises `ClaimLost` where it is not this attempt's to write.
        That somebody was served is written however long Redis takes: nobody else knows it."""
        now, waits = time.time(), state == State.DELAYED
        if not waits and (left_out := sum(one.status == Status.SUPPRESSED for one in self.recipients)):
            self.counts[SUPPRESSED_RECIPIENTS] += left_out
        fields: dict[str, str | float] = {
            "recipients": recipients_to_json(self.undecided() if waits else self.recipients),
            "attempts": attempts_to_json(self.attempts),
            "counted": self.counted,
            "reason": reason,
            "settled_at": now,
            "in_line": reserved,
            "next_attempt_at": iso(now + next_in) if next_in else "",
            **(
                {"held_by": self.held_by, "asked": self.asked}
                if self.names_relay or any("relay_name" in one for one in self.attempts)
                else {}
            ),
        }
        words = [word for pair in fields.items() for word in pair]
        counts = [word for pair in self.counts.items() for word in pair]
        again = look_at(now + next_in + LOOK_AFTER, self.expires_at)
        args = [self.id, self.token, state, now, again, len(counts), len(self.suppress)]
        args += [*counts, *self.suppress, *words]
        served = any(recipient.status == Status.ACCEPTED for recipient in self.recipients)
        settle = self.store.insist if served else self.store.run
        if not settle(SETTLE, [*self.keys, keys.job(self.id)], args):
            raise ClaimLost(self.id)
        self.settled = True


def iso(moment: float) -> str:
    return datetime.fromtimestamp(moment, timezone.utc).isoformat(timespec="milliseconds")


def timestamp(moment: str) -> float:
    """Returns seconds since 1970; 0 for ""."""
    return datetime.fromisoformat(moment).timestamp() if moment else 0


def attempts_to_json(attempts: list[dict[str, Any]]) -> str:
    return json.dumps(attempts[-ATTEMPTS_KEPT:], separators=(",", ":"))


def recipients_to_json(recipients: list[Recipient]) -> str:
    return json.dumps([vars(one) for one in recipients], ensure_ascii=False)


def recipients_from_json(recipients: str | bytes) -> list[Recipient]:
    return [Recipient(**one | {"status": Status(one["status"])}) for one in json.loads(recipients)]
