"""`Message` -> the fields of `POST /emails`, for a relay of kind `resend`. Pure: the same mail gives the same fields.

What the API cannot say is not sent otherwise than it was asked for: `Unsayable` names it. Nothing is held against an
upstream's limits here; that is for its answer to say.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection
from typing import Any

from mail.address import Mailbox
from mail.message import Message
from mail.parsed import Unsayable, parsed


def fields_of(message: Message, message_id: str, recipients: Collection[str]) -> dict[str, Any]:
    """Returns the fields of a mail to these of its recipients. Raises `Unsayable`."""
    content = parsed(message) if message.raw else message
    to, cc, bcc = (
        [box for box in boxes if box.address in recipients] for boxes in (message.to, message.cc, message.bcc)
    )
    if not to:
        raise Unsayable("a mail to nobody in To")
    fields: dict[str, Any] = {
        "from": str(message.sender),
        **_written(to=to, cc=cc, bcc=bcc, reply_to=message.reply_to),
        "subject": message.subject,
        **{name: text for name, text in (("text", content.text), ("html", content.html)) if text is not None},
        "headers": {**content.headers, "Message-ID": message_id},
        "attachments": content.attachments,
        "tags": message.tags,
    }
    return {name: value for name, value in fields.items() if value != []}


def _written(**boxes: list[Mailbox]) -> dict[str, list[str]]:
    return {name: list(map(str, some)) for name, some in boxes.items()}


def key_of(mail_id: str, message: Message, recipients: Collection[str]) -> str:
    """Returns the Idempotency-Key: the mail's id; of a mail of which others have been served, another."""
    if set(recipients) == set(message.recipients):
        return mail_id
    return f"{mail_id}-{hashlib.sha256(' '.join(sorted(recipients)).encode()).hexdigest()[:16]}"
