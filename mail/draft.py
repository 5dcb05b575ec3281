"""A request's body -> a `Draft` that the outbox can accept: checked, its template rendered, composed.

Raises `Invalid` with each field that is wrong.
"""

from __future__ import annotations

import time
from datetime import datetime
from typing import NamedTuple

from mail.address import Mailbox
from mail.message import Message, compose
from mail.request import FieldError, Invalid, parse
from mail.templates import render


class Expired(Invalid):
    """The mail would be right but for the time: its `expires_at` has passed."""


class Draft(NamedTuple):
    """A mail to accept. After `expires_at` it is not sent any more, but fails; `on_doubt` goes before ON_DOUBT."""

    message: Message
    expires_at: datetime | None = None
    on_doubt: str | None = None


def prepare(body: object, *, default_sender: Mailbox | None, max_recipients: int) -> Draft:
    """Returns the draft of one request's body. Raises `Invalid`; `Expired` where nothing but the time is wrong."""
    asked = parse(body, default_sender=default_sender, max_recipients=max_recipients)
    rendered = render(asked.template.id, asked.template.variables) if asked.template else None
    mail = compose(asked, rendered)
    if asked.expires_at and asked.expires_at.timestamp() <= time.time():
        raise Expired(FieldError("expires_at", "this moment has passed; the mail would never be sent"))
    return Draft(mail, asked.expires_at, asked.on_doubt)
