"""A mail that can be sent: `Message`, its stored form, and how a checked request becomes one. Pure."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from mail.address import Mailbox
from mail.request import PIECE, Invalid, Rendered, Request, content_errors, validate


@dataclass(frozen=True)
class Message:
    """A mail that can be sent. The first group of fields is its outline; the rest is its content, dropped once sent."""

    sender: Mailbox
    to: list[Mailbox]
    cc: list[Mailbox]
    bcc: list[Mailbox]
    reply_to: list[Mailbox]
    subject: str
    tags: list[dict[str, str]] = field(default_factory=list)

    text: str | None = None
    html: str | None = None
    headers: dict[str, str] = field(default_factory=dict)
    attachments: list[dict[str, str]] = field(default_factory=list)

    CONTENT = ("text", "html", "headers", "attachments")

    @property
    def recipients(self) -> list[str]:
        """Returns the envelope's recipients, once each, in the order given."""
        return list(dict.fromkeys(box.address for box in (*self.to, *self.cc, *self.bcc)))

    @property
    def needs_smtputf8(self) -> bool:
        """Returns whether an address is not ASCII: only servers that offer SMTPUTF8 take it (RFC 6531)."""
        boxes = (self.sender, *self.to, *self.cc, *self.bcc, *self.reply_to)
        return not all(box.address.isascii() for box in boxes)

    def to_json(self) -> tuple[str, Iterator[str]]:
        """Returns (outline, content). The content may hold ten megabytes, so it comes in pieces."""
        whole = dict(vars(self))
        content = {name: whole.pop(name) for name in self.CONTENT}
        return _dump(whole), _pieces(content)

    @classmethod
    def from_json(cls, outline: str | bytes, content: str | bytes = "{}") -> Message:
        whole = {**json.loads(outline), **json.loads(content)}
        whole["sender"] = Mailbox(*whole["sender"])
        for name in ("to", "cc", "bcc", "reply_to"):
            whole[name] = [Mailbox(*box) for box in whole[name]]
        return cls(**whole)


def _dump(value: object) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


def _pieces(content: dict[str, Any]) -> Iterator[str]:
    """Writes what `_dump` would, without a second copy of the attachments: base64 has nothing to escape."""
    files = content.pop("attachments")
    yield _dump(content)[:-1] + ',"attachments":['
    for number, file in enumerate(files):
        small = {name: value for name, value in file.items() if name != "content"}
        yield ("," if number else "") + _dump(small)[:-1] + ',"content":"'
        yield from (file["content"][start : start + PIECE] for start in range(0, len(file["content"]), PIECE))
        yield '"}'
    yield "]}"


def compose(request: Request, rendered: tuple[str, str | None, str | None] | None = None) -> Message:
    """Returns the message of a checked request; `rendered` is the (subject, text, html) of its template.

    Raises `Invalid` if what was rendered cannot be sent: a variable may have put a line break into the subject.
    """
    subject, text, html = request.subject, request.text, request.html
    if rendered:
        made = validate(Rendered, dict(zip(("subject", "text", "html"), rendered, strict=True)), "template")
        Invalid.raise_if(content_errors(request, made.text, made.html))
        subject, text, html = made.subject if subject is None else subject, made.text, made.html
    return Message(
        sender=request.sender,
        to=request.to,
        cc=request.cc,
        bcc=request.bcc,
        reply_to=request.reply_to,
        subject=subject or "",
        tags=[tag.model_dump() for tag in request.tags],
        text=text,
        html=html,
        headers=request.headers,
        attachments=[one.model_dump(exclude_none=True) | {"content_type": one.type} for one in request.attachments],
    )


def message_id(mail_id: str, sender: Mailbox) -> str:
    """Returns the Message-ID (RFC 5322 3.6.4), fixed when the mail is accepted: every attempt carries the same."""
    return f"<{mail_id}@{sender.address.rpartition('@')[2]}>"
