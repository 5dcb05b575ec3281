"""What is kept of the mails, for those who ask: one, many of them, why they failed.

Reads, and never changes a thing: that is mail.outbox.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any, NamedTuple

from mail.claim import iso, timestamp
from mail.counters import number
from mail.message import Message
from mail.states import FINAL, State, Status, effective_state
from mail.store import LAST_SENT, mail_key
from process.values import Rate
from queues import keys
from queues.connection import is_wrong_type, translating_errors
from queues.jobs import Jobs, NotFound
from queues.quarantine import DAMAGED
from queues.table import EMAIL
from settings import Settings
from smtp.pacing import in_trouble, used
from smtp.published import Published, published

NO_MAIL = "what is stored under this id cannot be read as a mail"
MAIL_ID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")  # other keys of ours begin with mail:, too
# fmt: off
SHOWN = ("state", "created_at", "message_id", "outline", "recipients", "attempts", "next_attempt_at", "reason",
         "expires_at", "on_doubt", "key", "test", "scheduled_at", "priority", "relay", "asked")
# fmt: on
# A state that Resend does not have -> its word for it: SDKs fail at any other.
LAST_EVENT: Mapping[str, str] = {
    State.SENDING: "queued",
    State.DELAYED: "delivery_delayed",
    State.UNKNOWN: "delivery_delayed",
}


class At(NamedTuple):
    """Says how one of the relays stands, and of each of its rates how many mails have gone within its period."""

    relay: Published
    in_trouble: bool
    used: list[tuple[Rate, int]]


class Reader:
    def __init__(self, jobs: Jobs, settings: Settings) -> None:
        self.jobs = jobs
        self.settings = settings

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
            "relay": stored["relay"] or None,
            "next_attempt_at": stored["next_attempt_at"] or None,
            "expires_at": stored["expires_at"] or None,
            "on_doubt": stored["on_doubt"] or self.settings.on_doubt,
            "reason": reason or None,
            "recipients": _recipients(stored, state),
            "attempts": [dict(one) for one in json.loads(stored["attempts"] or "[]")],
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

    def failures(self, since: float) -> Iterator[str]:
        """Yields the reason of each mail that failed after `since` (seconds since 1970) and was not queued again."""
        with translating_errors():
            ids: list[Any] = self.jobs.redis.zrange(keys.failed(EMAIL), 0, -1)
            for start in range(0, len(ids), 500):
                pipe = self.jobs.redis.pipeline(transaction=False)
                for mail_id in ids[start : start + 500]:
                    pipe.hmget(mail_key(mail_id.decode()), "state", "reason", "settled_at")
                for state, reason, settled_at in pipe.execute():
                    if reason and number(settled_at) >= since and state != State.SUPPRESSED.value.encode():
                        yield reason.decode(errors="replace")

    def relay_in_trouble(self) -> bool:
        """Returns whether the breaker of each relay is open, so that all mail waits. Raises `Unavailable`."""
        return all(in_trouble(self.jobs.redis, one.name) for one in self.relays())

    def standings(self) -> list[At]:
        """Returns how the relays stand. Raises `Unavailable`."""
        redis = self.jobs.redis
        return [
            At(one, in_trouble(redis, one.name), used(redis, one.rate, one.name) if one.rate else [])
            for one in self.relays()
        ]

    def relays(self) -> list[Published]:
        """Returns the relays that the workers know, in their order. Raises `Unavailable`."""
        return published(self.jobs.redis)

    def last_sent(self) -> float | None:
        with translating_errors():
            moment = self.jobs.redis.get(LAST_SENT)
        return number(moment) or None


def _recipients(stored: dict[str, str], state: str) -> list[dict[str, Any]]:
    """Returns the recipients. None is in doubt as long as an upstream that has not answered is asked again."""
    found = [{**one, "address": str(one["address"])} for one in json.loads(stored["recipients"])]
    if stored["asked"] and state not in FINAL:
        return [{**one, "status": Status.PENDING} if one["status"] == Status.IN_DOUBT else one for one in found]
    return found
