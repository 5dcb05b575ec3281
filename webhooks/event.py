"""An event as it is posted: its body in Resend's shape, made of the mail's record at that moment; id and signatures.

The id is the same at each try, and at a replay, so that a receiver knows what it has. A mail whose record is no longer
kept is told by its id alone. Standards: Standard Webhooks 1.0.0; Svix has other names for the same headers.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
from collections.abc import Sequence
from datetime import datetime, timezone
from typing import Any

from mail.reader import Reader
from mail.states import EVENTS, State
from queues.jobs import NotFound
from webhooks.queue import TEST, Line

SENT = EVENTS[State.SENT]
# The member of `data` that says why, by the type of event -> beside its text, as Resend has it.
WHY: dict[str, tuple[str, str, dict[str, str]]] = {
    "email.failed": ("failed", "reason", {}),
    "email.bounced": ("bounce", "message", {"type": "Permanent", "subType": "General"}),
    "email.suppressed": ("suppressed", "message", {"type": "OnAccountSuppressionList"}),
    "email.delivery_delayed": ("delayed", "reason", {}),
    "email.in_doubt": ("in_doubt", "reason", {}),
}


def event_id(mail_id: str, line: Line) -> str:
    """Returns the id, without the dot that would separate it from what is signed with it."""
    return f"evt_{mail_id.replace('-', '')}_{line.micros}"


def body(reader: Reader, mail_id: str, line: Line) -> bytes:
    """Returns the body. Raises `Unavailable`."""
    data: dict[str, Any] = {} if line.type == TEST else {"email_id": mail_id, **about(reader, mail_id)}
    if why := WHY.get(line.type):
        member, text, beside = why
        data[member] = {text: line.reason, **beside}
        if line.type == EVENTS[State.BOUNCED] and " 4." in line.reason:  # given up after days, and may be well tomorrow
            data[member]["type"] = "Transient"
    moment = datetime.fromtimestamp(line.micros / 1e6, timezone.utc).isoformat(timespec="milliseconds")
    return json.dumps({"type": line.type, "created_at": moment, "data": data}, separators=(",", ":")).encode()


def about(reader: Reader, mail_id: str) -> dict[str, Any]:
    try:
        mail = reader.read(mail_id)
    except NotFound:
        return {}
    told = {name: mail[name] for name in ("created_at", "from", "to", "subject", "message_id")}
    tags = {tag["name"]: tag["value"] for tag in mail["tags"]}
    return {**told, "tags": tags, **({"test": True} if mail["test"] else {})}


def headers(keys: Sequence[bytes], id: str, body: bytes, now: float) -> dict[str, str]:
    """Returns the headers that sign a body, with each of the keys."""
    signed = f"{id}.{int(now)}.".encode() + body
    digests = (hmac.new(key, signed, hashlib.sha256).digest() for key in keys)
    signature = " ".join(f"v1,{base64.b64encode(digest).decode()}" for digest in digests)
    values = {"id": id, "timestamp": str(int(now)), "signature": signature}
    return {f"{family}-{name}": value for family in ("webhook", "svix") for name, value in values.items()}
