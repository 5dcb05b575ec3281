"""A request's body -> a `Draft` that the outbox can accept: checked, its template rendered, composed."""

from __future__ import annotations

import time
from datetime import datetime
from typing import NamedTuple

from mail.address import Mailbox
from mail.message import Message, compose
from mail.request import FieldError, Invalid, parse
from mail.templates import render


class Expired(Invalid):
    """Nothing is wrong with the request except that its `expires_at` has passed."""


class Draft(NamedTuple):
    """A mail to accept. After `expires_at` it is not sent any more, but fails; `on_doubt` overrides ON_DOUBT."""

    message: Message
    expires_at: datetime | None = None
    on_doubt: str | None = None


def prepare(body: object, *, default_sender: Mailbox | None, max_recipients: int) -> Draft:
    """Returns the draft of one request's body. Raises `Invalid` with every field that is wrong, or `Expired`."""
    request = parse(body, default_sender=default_sender, max_recipients=max_recipients)
    rendered = render(request.template.id, request.template.variables) if request.template else None
    message = compose(request, rendered)
    if request.expires_at and request.expires_at.timestamp() <= time.time():
        raise Expired(FieldError("expires_at", "must be in the future"))
    return Draft(message, request.expires_at, request.on_doubt)
