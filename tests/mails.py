"""Mails in an outbox, as tests need them: accepted, and claimed by an attempt."""

from __future__ import annotations

import time
from datetime import datetime, timedelta, timezone
from typing import Any

from mail.claim import Claim
from mail.draft import compose
from mail.message import Draft
from mail.outbox import Outbox
from mail.request import parse

BODY = {"from": "a@example.com", "to": ["b@example.com", "c@example.com"], "subject": "s", "text": "t"}


def draft(expires_in: float = 0, on_doubt: str | None = None, **fields: Any) -> Draft:
    """`expires_in` is in seconds, below 0 for a mail that has expired, 0 for one that does not."""
    expires_at = datetime.now(timezone.utc) + timedelta(seconds=expires_in) if expires_in else None
    return Draft(compose(parse(BODY | fields, default_sender=None, max_recipients=50)), expires_at, on_doubt)


def accept(outbox: Outbox, expires_in: float = 0, on_doubt: str | None = None, **fields: Any) -> str:
    return outbox.accept([draft(expires_in, on_doubt, **fields)]).id


def claim(outbox: Outbox, mail_id: str) -> Claim:
    """As an attempt of a job that was queued just now."""
    taken = outbox.claim(mail_id, queued_at=time.time() + 1)
    assert isinstance(taken, Claim), taken
    return taken
