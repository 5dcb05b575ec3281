"""One attempt's hold on one mail: taken for a limited time, noted before the final dot, settled with the outcome."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime, timezone
from typing import Any

from mail.counters import SMTP, TOTALS
from mail.message import Message
from mail.store import EXPIRED, LAST_SENT, LOOK_AFTER, OPEN, Store
from queues.heartbeat import LOST_AFTER, beating

ATTEMPTS_KEPT = 50  # an afternoon of relay trouble must not grow a mail without end
# KEYS: mail, claim. ARGV: token, recipients. 0: the claim has passed to another attempt, or the mail was canceled or
# sent meanwhile, and this attempt must stop.
BEFORE_DOT = """
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
    goes to mail.totals with the outcome."""

    store: Store
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

    def spoke_for(self, seconds: float) -> None:
        """How long the conversation with the relay took."""
        SMTP.note(seconds, self.counts)

    @contextmanager
    def held(self) -> Iterator[None]:
        """Keeps the claim for as long as the body runs, and gives it back then, also where nothing was settled."""
        renew = [self.token, LOST_AFTER * 1000]
        try:
            with beating(lambda: self.store.renew(self.keys, renew)):
                yield
        finally:
            if not self.settled:
                self.store.run(RELEASE, self.keys, [self.token])

    def before_dot(self, statuses: Mapping[str, str]) -> None:
        """Writes down, at the last moment, who is in doubt from here on. Raises `ClaimLost`."""
        for recipient in self.recipients:
            recipient.status = statuses.get(recipient.address, recipient.status)
        if not self.store.run(BEFORE_DOT, self.keys, [self.token, dump(self.recipients)]):
            raise ClaimLost(self.id)

    def settle(self, state: str, *, reason: str = "", next_in: float = 0, in_line: bool = False) -> None:
        """Writes the outcome: recipients, attempts, state; for a final state also how long it is kept.

        Raises `ClaimLost` where it is not this attempt's to write. That somebody was served is written however long
        Redis takes: nobody else knows it.
        """
        now = datetime.now(timezone.utc)
        fields: dict[str, str | float] = {
            "recipients": dump(self.recipients),
            "attempts": json.dumps(self.attempts[-ATTEMPTS_KEPT:]),
            "counted": self.counted,
            "reason": reason,
            "settled_at": now.timestamp(),
            "in_line": "1" if in_line else "",
            "next_attempt_at": iso(datetime.fromtimestamp(now.timestamp() + next_in, timezone.utc)) if next_in else "",
        }
        kept_for = self.store.kept_for(state)
        words = [word for pair in fields.items() for word in pair]
        counts = [word for pair in self.counts.items() for word in pair]
        result = EXPIRED if (state, reason) == ("failed", EXPIRED) else state
        keys = [*self.keys, LAST_SENT, f"rq:job:{self.id}", OPEN, TOTALS]
        served = any(recipient.status == "accepted" for recipient in self.recipients)
        settle = self.store.insist if served else self.store.run
        look_at = now.timestamp() + next_in + LOOK_AFTER
        args = [self.token, state, kept_for, now.timestamp(), self.id, look_at, result, len(counts), *counts, *words]
        if not settle(SETTLE, keys, args):
            raise ClaimLost(self.id)
        self.settled = True


def iso(moment: datetime) -> str:
    return moment.isoformat(timespec="milliseconds")


def timestamp(moment: str) -> float:
    """Seconds since 1970; 0 for ""."""
    return datetime.fromisoformat(moment).timestamp() if moment else 0


def dump(recipients: list[Recipient]) -> str:
    return json.dumps([vars(one) for one in recipients], ensure_ascii=False)
