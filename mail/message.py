"""A mail that can be sent: `Message`, its stored form, and the `Draft` that the outbox accepts. Pure."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, NamedTuple

from mail.address import Mailbox
from settings import Settings

STRUCTURED = re.compile(  # headers that are no free text: RFC 5322 3.6.4, 2369, 8058, 2919, 3834, 9228 and X-Google's
    r"references|in-reply-to|list-.*|auto-submitted|precedence|feedback-id|importance|x-priority|priority|sensitivity"
    r"|disposition-notification-to|return-receipt-to|errors-to|x-auto-response-suppress|archived-at",
    re.IGNORECASE,
)
PIECE = 64 * 1024  # characters; of base64, a multiple of 4


class Raw(NamedTuple):
    """A mail that came by SMTP, and goes out as it came."""

    octets: str  # its bytes, each as a character (Latin-1)
    sender: str  # the envelope's, to which the relay reports; "" for nobody
    smtputf8: bool = False  # its client has said that it needs RFC 6531


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
    raw: Raw | None = None  # then the others of the content are empty, and to, cc and bcc are the envelope's recipients

    CONTENT = ("text", "html", "headers", "attachments", "raw")

    @property
    def recipients(self) -> list[str]:
        """Returns the envelope's recipients, once each, in the order given."""
        return list(dict.fromkeys(box.address for box in (*self.to, *self.cc, *self.bcc)))

    @property
    def needs_smtputf8(self) -> bool:
        """Returns whether an address is not ASCII: only servers that offer SMTPUTF8 take it (RFC 6531)."""
        boxes = (self.sender, *self.to, *self.cc, *self.bcc, *self.reply_to)
        has_wide_address = not all(box.address.isascii() for box in boxes) or not self.envelope_sender.isascii()
        return has_wide_address or bool(self.raw and self.raw.smtputf8)

    @property
    def needs_8bitmime(self) -> bool:
        """Returns whether it has 8-bit octets as they came: our own are only beside an SMTPUTF8 address."""
        return bool(self.raw and not self.raw.octets.isascii())

    @property
    def envelope_sender(self) -> str:
        """Returns the address in MAIL FROM, "" for the null sender."""
        return self.raw.sender if self.raw else self.sender.address

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
        if "raw" in whole:
            whole["raw"] = Raw(*whole["raw"])
        return cls(**whole)


class Draft(NamedTuple):
    """A mail to accept. After `expires_at` it is not sent any more, but fails; `on_doubt` overrides ON_DOUBT; `key` is
    the name of the API key that submitted it. A `test` is treated as any mail, and never sent. None is sent before its
    `scheduled_at`. `message_id` is the one that it brings, if any; `relay` names the only one that it may go by;
    `skip_suppression` sends it to suppressed addresses, too."""

    message: Message
    expires_at: datetime | None = None
    on_doubt: str | None = None
    key: str = ""
    test: bool = False
    scheduled_at: datetime | None = None
    priority: str = "normal"  # or "high" or "bulk"
    message_id: str = ""
    relay: str = ""
    skip_suppression: bool = False


def who_gets(box: Mailbox, settings: Settings) -> Mailbox | None:
    """Returns who gets the mail for this mailbox: itself, or MAIL_REDIRECT_TO if no mail may go to it. Who was meant is
    the name beside that address then. None: nobody."""
    if settings.admits(box.address):
        return box
    meant = f"{box.name} <{box.address}>" if box.name else box.address
    return Mailbox(meant, settings.mail_redirect_to) if settings.mail_redirect_to else None


def _dump(value: object) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


def _pieces(content: dict[str, Any]) -> Iterator[str]:
    """Writes what `_dump` would, without a second copy of the attachments: base64 has nothing to escape. What does not
    come by SMTP has no member `raw`, which workers of an earlier version refuse."""
    files, raw = content.pop("attachments"), content.pop("raw")
    begun = _dump(content)[:-1]
    if raw:
        octets = raw.octets
        yield f'{begun},"raw":["{_dump(octets[:PIECE])[1:-1]}'
        yield from (_dump(octets[start : start + PIECE])[1:-1] for start in range(PIECE, len(octets), PIECE))
        begun = '",' + _dump(raw[1:])[1:]
    yield begun + ',"attachments":['
    for number, file in enumerate(files):
        small = {name: value for name, value in file.items() if name != "content"}
        yield ("," if number else "") + _dump(small)[:-1] + ',"content":"'
        yield from (file["content"][start : start + PIECE] for start in range(0, len(file["content"]), PIECE))
        yield '"}'
    yield "]}"


def message_id(mail_id: str, sender: Mailbox) -> str:
    """Returns the Message-ID (RFC 5322 3.6.4), fixed when the mail is accepted: every attempt carries the same."""
    return f"<{mail_id}@{sender.address.rpartition('@')[2]}>"
