"""Which relay a mail goes to: the first that serves it and takes it now.

A way is one relay as delivery sees it. Trouble before the final dot moves a mail to the next way: its next attempt
leaves out those that it has met with trouble at, until it has tried all. Nothing else does: a rate that is reached is
waited for, and a mail whose final dot went out without an answer stays with the relay that may have it.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from itertools import takewhile
from typing import Any

from mail.claim import Claim
from mail.parsed import Unsayable
from mail.posted import fields_of
from mail.states import Status
from process.relays import ONLY, RelaySettings
from queues.connection import Redis, RedisError, Unavailable
from settings import Settings
from smtp.pacing import PAUSE, Pacing, Wait
from smtp.policy import MESSAGE, SESSION, Phase, Verdict
from smtp.published import publish
from smtp.relay import Relay
from smtp.verdict import Reply
from upstream.client import KEY_LIFE, Upstream

BEFORE_DOT = {*SESSION, *MESSAGE} - {Phase.DOT}
SLOT_WAIT = 1  # seconds for which a mail waits in its worker for one of the relay's `concurrency`


class Way:
    """One relay: its breaker and rate, and how it is spoken to: `relay` by SMTP; one of kind resend has `upstream`."""

    def __init__(self, one: RelaySettings, redis: Redis, current: Settings) -> None:
        self.name, self.kind, self.settings = one.name, one.kind, one
        self.pacing = Pacing(redis, one.rate, one.name)
        self.relay = Relay.of(current, one, redis)
        self.upstream = Upstream(one, current.smtp_timeout) if one.kind == "resend" else None
        self.slots = threading.BoundedSemaphore(one.concurrency) if one.concurrency else None

    @property
    def place(self) -> object:
        """Returns what is written down of where it is."""
        return self.upstream or self.relay

    @property
    def is_only(self) -> bool:
        """Returns whether this is the one of SMTP_HOST."""
        return self.name == ONLY

    def can_say(self, claim: Claim) -> bool:
        """Returns whether the mail can go this way: by HTTP, not all that came by SMTP."""
        todo = [one.address for one in claim.recipients if one.status == Status.PENDING]
        with suppress(Unsayable):
            return not (self.upstream and todo) or bool(fields_of(claim.message, claim.message_id, todo))
        return False

    @property
    def marks(self) -> dict[str, str]:
        """Returns what names it in the record of an attempt."""
        return {} if self.is_only else {"relay_name": self.name}

    @property
    def line(self) -> str:
        """Returns what a mail that has a reservation here says of it."""
        return "1" if self.is_only else self.name

    def admit(self, claim: Claim) -> Wait | None:
        """Returns None where the mail may go now. Its reservation at another relay is none here."""
        return self.pacing.admit(claim.reserved == self.line, claim.put_off_by(self.name), claim.priority, claim.calm)

    def named(self, wait: Wait) -> Wait:
        """Returns a wait that is not for trouble, with the relay that it is for."""
        words = wait.reason if self.is_only or not wait.reserved else f"the rate of relay {self.name} is reached"
        return wait._replace(line=self.line if wait.reserved else "", reason=words)

    @contextmanager
    def slot(self) -> Iterator[bool]:
        """Takes one of the relay's `concurrency` for as long as the body runs; yields whether there was one."""
        free = not self.slots or self.slots.acquire(timeout=SLOT_WAIT)
        try:
            yield free
        finally:
            if free and self.slots:
                self.slots.release()


class Routes:
    """All ways, in the order of the settings."""

    def __init__(self, redis: Redis, current: Settings) -> None:
        relays = current.all_relays or (RelaySettings.model_construct(name=ONLY),)
        self.redis = redis
        self.ways = [Way(one, redis, current) for one in relays]
        self.is_single = len(relays) == 1 and relays[0].name == ONLY

    @property
    def relays(self) -> dict[str, Relay | None]:
        """Returns the relays whose sessions are counted, by name; None stands for any."""
        return {ONLY: None} if self.is_single else {way.name: way.relay for way in self.ways}

    def share(self, place: int, processes: int) -> None:
        """Divides the `concurrency` of each relay among the processes; this one has this place among them."""
        for way in self.ways:
            if most := way.settings.concurrency:
                way.slots = threading.BoundedSemaphore(max(1, most // processes + (place < most % processes)))

    def start(self) -> None:
        """Takes up the settings of a worker that starts."""
        for way in self.ways:
            way.pacing.start()
        publish(self.redis, [way.settings for way in self.ways])

    def close(self) -> None:
        """Closes the connections to upstreams, for a process that ends."""
        for way in self.ways:
            if way.upstream:
                way.upstream.close()

    @property
    def is_closed(self) -> bool:
        """Returns whether all relays are in trouble, as far as this process knows."""
        return all(way.pacing.closed_for() > 0 for way in self.ways)

    def room_for_bulk(self) -> float:
        """Returns how many bulk mails may line up now: as many as there is room for at one of the relays that mail goes
        to while all is well, and at those that stand in."""
        rooms = []
        for way in self.ways:
            if way.pacing.closed_for() == 0 or len(self.ways) == 1:
                rooms.append(way.pacing.room_for_bulk())
                if not way.settings.domains:
                    break
        return max(rooms, default=0)

    def for_mail(self, claim: Claim) -> list[Way]:
        """Returns the ways that serve the mail, the one to try first in front; those in trouble are among them."""
        if self.is_single:
            return self.ways if claim.relay in ("", ONLY) else []
        if held := [way for way in self.ways if way.name == claim.held_by]:
            return held
        domain = claim.message.sender.address.rpartition("@")[2].lower()
        ways = [way for way in self.ways if (way.name == claim.relay if claim.relay else way.settings.serves(domain))]
        if len(ways) > 1:
            ways = [way for way in ways if way.can_say(claim)] or ways
        tried = _tried(claim.attempts)
        return sorted(ways, key=lambda way: way.name in tried)

    def can_ask(self, claim: Claim) -> bool:
        """Returns whether the upstream that may have the mail still knows the key under which it was asked."""
        if not (claim.asked and any(one.status == Status.IN_DOUBT for one in claim.recipients)):
            return False
        since, _, identity = claim.asked.partition(" ")
        known = {way.upstream.identity for way in self.ways if way.upstream}
        return identity in known and time.time() - float(since) < KEY_LIFE

    @contextmanager
    def lend(self, claim: Claim) -> Iterator[Way | Wait]:
        """Lends the first way that takes the mail now; or yields how long it must wait, and why."""
        waits = []
        for way in self.for_mail(claim):
            with way.slot() as free:
                full = Wait(1, f"the concurrency of relay {way.name} is reached", claim.reserved == way.line)
                wait = way.admit(claim) if free else full
                if not wait:
                    yield way
                    return
                if not wait.is_trouble:
                    yield way.named(wait)
                    return
                waits.append(wait)
        yield min(waits, default=Wait(PAUSE, self.why_none(claim), False, True))

    def why_none(self, claim: Claim) -> str:
        if claim.relay:
            return f"relay {claim.relay} is configured no more"
        return "no relay takes mail from this domain"

    def may_move(self, claim: Claim, way: Way, replies: Sequence[Reply]) -> bool:
        """Returns whether the mail, after such replies of `way` in its last attempt, goes on to another at once."""
        left = [reply for reply in replies if reply.verdict not in (Verdict.ACCEPTED, Verdict.REFUSED)]
        if self.is_single or not left or not all(map(is_movable, left)):
            return False
        tried = {way.name, *_tried(claim.attempts[:-1])}
        others = [one for one in self.for_mail(claim) if one.name not in tried]
        with suppress(Unavailable, RedisError):  # what was replied is to be written down first
            return any(one.pacing.closed_for(sure=True) == 0 for one in others)
        return False


def is_movable(reply: Reply) -> bool:
    """Returns whether it is about the relay alone, and nothing of the mail can have been taken."""
    untaken = reply.phase in BEFORE_DOT or (reply.phase is Phase.HTTP and not reply.may_have_been_taken)
    return reply.verdict is Verdict.TROUBLE and not reply.repeated and untaken


def _tried(attempts: Sequence[Mapping[str, Any]]) -> set[str]:
    """Returns the relays that the mail has been moved on from since it waited last."""
    last = takewhile(lambda one: one.get("moved"), reversed(attempts))
    return {one.get("relay_name", "") for one in last}
