"""Reads a mail's bytes for people to look at: headers, text, HTML, inline images and attachments; and shows HTML in a
frame of which nothing gets out.

It never raises, however malformed the mail is: what `email` cannot read at all is shown as one text. Everything that it
returns can be written as UTF-8. RFC 5322 (headers), 2045-2049 (MIME), 2392 (cid: URLs).
"""

from __future__ import annotations

import mimetypes
import re
from collections.abc import Iterator
from dataclasses import dataclass
from email import message_from_bytes
from email.policy import EmailPolicy
from typing import Any
from urllib.parse import unquote

# Sandboxed, a mail has an origin of its own, no scripts and no forms, and cannot leave its frame. A link opens in a new
# tab. Images are the mail's own, as data: URLs.
MAIL_CSP = (
    "sandbox allow-popups allow-popups-to-escape-sandbox; default-src 'none'; img-src data:; font-src data:; "
    "style-src 'unsafe-inline'; form-action 'none'; base-uri 'none'; frame-ancestors 'self'"
)
# Chromium opens a connection for these even where the policy forbids what they would load.
PRECONNECTS = re.compile(r"<(?=(?:link|i?frame|fencedframe|object|embed)\b)", re.IGNORECASE)
CID = re.compile(r"\bcid:([^\"'()\s<>]+)", re.IGNORECASE)


class LenientPolicy(EmailPolicy):
    """`email.policy.default`, except that a header on which its parser raises is returned as it is."""

    def header_fetch_parse(self, name: str, value: str) -> Any:
        try:
            return super().header_fetch_parse(name, value)
        except Exception:
            return value.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


POLICY = LenientPolicy(refold_source="none")


def readable(text: str) -> str:
    """Replaces the halves of surrogate pairs, which UTF-8 cannot hold."""
    return re.sub("[\ud800-\udfff]", "\ufffd", text)


def framed(html: str) -> str:
    """Returns a mail's HTML as a frame with MAIL_CSP may be given it; links open outside of the frame."""
    html = PRECONNECTS.sub("<x-", html)
    return re.sub(r"(?i)\A(\s*<!doctype[^>]*>)?", r'\1<base target="_blank">', html, count=1)


@dataclass(frozen=True, eq=False)
class Part:
    """A leaf of a mail: a body, an image that the HTML shows, or a file."""

    name: str
    content_type: str
    content_id: str
    is_file: bool
    data: bytes
    text: str


@dataclass(frozen=True)
class Content:
    """What could be read out of a mail's bytes. `attachments` holds everything that neither `text` nor `html` shows."""

    headers: list[tuple[str, str]]
    text: str | None
    html: str | None
    images: dict[str, Part]
    attachments: list[Part]


def take_apart(raw: bytes) -> Content:
    try:
        message = message_from_bytes(raw, policy=POLICY)
        headers = [(readable(name), readable(str(value))) for name, value in message.items()]
        return sort_out(headers, [read_part(number, leaf) for number, leaf in enumerate(leaves(message), 1)])
    except Exception:  # a thousand nested parts, for one
        return Content([], raw.decode("utf-8", "replace"), None, {}, [])


def leaves(part: Any) -> Iterator[Any]:
    """Yields the parts that hold data; a mail within the mail is one of them."""
    if part.is_multipart() and part.get_content_maintype() == "multipart":
        for child in part.get_payload():
            yield from leaves(child)
    else:
        yield part


def read_part(number: int, leaf: Any) -> Part:
    content_type = readable(leaf.get_content_type())
    if content_type.startswith("multipart/"):  # in name only: it has no boundary
        content_type = "text/plain"
    name = readable(leaf.get_filename() or "")
    data = bytes(leaf.get_payload(decode=True) or b"")  # None: a mail within the mail
    if leaf.is_multipart():
        data = b"".join(child.as_bytes() for child in leaf.get_payload())
    return Part(
        name=name or f"part-{number}{mimetypes.guess_extension(content_type) or ''}",
        content_type=content_type,
        content_id=readable(str(leaf.get("content-id", ""))).strip().strip("<>"),
        is_file=bool(name) or leaf.get_content_disposition() == "attachment",
        data=data,
        text=decode(data, leaf) if content_type in ("text/plain", "text/html") else "",
    )


def decode(data: bytes, leaf: Any) -> str:
    try:
        return readable(data.decode(leaf.get_content_charset("utf-8")))
    except (LookupError, ValueError):  # no such charset, or bytes that it does not allow
        return data.decode("utf-8", "replace")


def sort_out(headers: list[tuple[str, str]], parts: list[Part]) -> Content:
    text = next((part for part in parts if part.content_type == "text/plain" and not part.is_file), None)
    html = next((part for part in parts if part.content_type == "text/html" and not part.is_file), None)
    used = {unquote(cid) for cid in CID.findall(html.text if html else "")}
    images = {
        part.content_id: part
        for part in parts
        if part.content_id in used and re.fullmatch(r"image/[a-z0-9.+-]+", part.content_type)
    }
    shown = [text, html, *images.values()]
    attachments = [part for part in parts if part not in shown]
    return Content(headers, text.text if text else None, html.text if html else None, images, attachments)
