"""A mail that came by SMTP -> what the API can say of it: text, html, files, headers; or why it cannot. Pure.

Strict: a structure that a reader shows otherwise than the API would write it, a charset that does not fit, a defect
that readers mend in different ways, is refused. What signs or encrypts itself is never taken apart. Trace fields, and
signatures of the header (DKIM), are left behind: the upstream writes its own.
Standards: RFC 2045-2047 and 2231 (MIME), 2387 (related), 2369 and others (headers that are kept as they are).
"""

from __future__ import annotations

import base64
import mimetypes
import re
from collections import Counter
from dataclasses import dataclass, field, replace
from email import message_from_bytes
from email.message import Message as Part
from email.utils import getaddresses

from mail.address import CONTROL, Mailbox, decoded
from mail.message import Message
from mail.raw import Header, header_of

WRITTEN = re.compile(  # by the API's other fields, or by each server anew
    r"from|to|cc|bcc|reply-to|subject|date|message-id|mime-version|content-.*|sender|return-path|received|delivered-to"
    r"|dkim-signature|arc-.*|authentication-results|received-spf"
)
PARAMETER = re.compile(r"[A-Za-z0-9!#$&^_.+-]+")


class Unsayable(Exception):
    """The text names what the API cannot say; never what the mail says."""


@dataclass
class _Content:
    text: str | None = None
    html: str | None = None
    files: list[dict[str, str]] = field(default_factory=list)
    related: list[dict[str, str]] = field(default_factory=list)  # those of them that are beside an html


def parsed(message: Message) -> Message:
    """Returns the message with the content of its `raw`. Raises `Unsayable`."""
    try:
        return _parsed(message) if message.raw else message
    except Unsayable:
        raise
    except Exception:  # strangers write mails, and what a parser meets with in one has many names
        raise Unsayable("a mail that cannot be taken apart") from None


def _parsed(message: Message) -> Message:
    assert message.raw
    octets = message.raw.octets.encode("latin-1")
    header = header_of(octets)
    _check_envelope(message, header)
    content = _content(octets)
    if content.html is not None and content.text is None:
        content.text = ""  # or the upstream would write one
    for one in content.files:
        if content.html is None or not (one in content.related or f"cid:{one.get('content_id')}" in content.html):
            one.pop("content_id", None)
    return replace(
        message, text=content.text, html=content.html, headers=_headers(header), attachments=content.files, raw=None
    )


def _check_envelope(message: Message, header: Header) -> None:
    """Refuses a mail that is addressed otherwise than it is sent."""
    for name, boxes in (("from", [message.sender]), ("to", message.to), ("cc", message.cc)):
        written, read = getaddresses(header.texts(name)), header.mailboxes(name)
        known, named = {box.address.lower() for box in read}, [_names(box) for box in boxes]
        is_same = len(read) == len(written) and all(known & one for one in named) and known <= set().union(*named)
        if not (is_same and len(known) <= len(boxes)) and (written or name != "from"):
            raise Unsayable(f"a {name.title()} that names others than the envelope")
    if len(header.mailboxes("reply-to")) != len(getaddresses(header.texts("reply-to"))):
        raise Unsayable("a Reply-To that is no address")
    if not message.envelope_sender:
        raise Unsayable("a mail from nobody, such as a report")
    if {box.address.lower() for box in header.mailboxes("sender")} - {message.sender.address.lower()}:
        raise Unsayable("a Sender beside From")


def _names(box: Mailbox) -> set[str]:
    """Returns whom the header may name for this one: itself, or of MAIL_REDIRECT_TO whom its name has."""
    meant = re.search(r"(?:^|<)([^<>\s]+@[^<>\s]+)>?$", box.name)
    return {box.address.lower(), meant[1].lower() if meant else box.address.lower()}


def _headers(header: Header) -> dict[str, str]:
    kept = [one for one in header.fields if not WRITTEN.fullmatch(one.name) and one.value]
    if any(count > 1 for count in Counter(one.name for one in kept).values()):
        raise Unsayable("a header field that is there twice")
    if any(one.name.startswith("resent-") for one in kept):
        raise Unsayable("a mail that was resent")
    return {one.line.partition(b":")[0].decode().strip(): one.value for one in kept}


def _content(octets: bytes) -> _Content:
    whole = message_from_bytes(octets)
    if any(part.defects for part in whole.walk()):
        raise Unsayable("a mail with faults in its MIME structure")
    content = _Content()
    _mixed(whole, content)
    return content


def _mixed(part: Part, content: _Content) -> None:
    kind = part.get_content_type()
    if kind != "multipart/mixed":
        return _shown(part, content)
    first, *files = _parts(part)
    _mixed(first, content)
    for one in files:
        if one.get_content_disposition() is None and one.get_content_type() in ("text/plain", "text/html"):
            raise Unsayable("a text behind another")
        content.files.append(_file(one))


def _shown(part: Part, content: _Content) -> None:
    """Takes in what a reader shows: a text, an html, both as alternatives."""
    kind = part.get_content_type()
    if kind == "multipart/alternative":
        for one in _parts(part):
            if content.html is not None or one.get_content_type() not in (
                "text/plain",
                "text/html",
                "multipart/related",
            ):
                raise Unsayable("alternatives other than a text and an html")
            _shown(one, content)
    elif kind == "multipart/related":
        first, *files = _parts(part)
        if first.get_content_type() not in ("text/html", "multipart/alternative"):
            raise Unsayable("related parts without an html")
        _shown(first, content)
        related = [_file(one) for one in files]
        content.related += related
        content.files += related
        if not all("content_id" in one for one in related):
            raise Unsayable("a related part without a Content-ID")
    elif part.get_content_disposition() == "attachment" or kind not in ("text/plain", "text/html"):
        content.files.append(_file(part))
    elif kind == "text/html":
        content.html = _text(part)
    elif content.text is None:
        content.text = _text(part)
    else:
        raise Unsayable("two texts")


def _parts(part: Part) -> list[Part]:
    parts = part.get_payload()
    if not isinstance(parts, list) or not parts:
        raise Unsayable("a multipart without parts")
    return [one for one in parts if isinstance(one, Part)]


def _octets(part: Part) -> bytes:
    if part.is_multipart():
        known = re.fullmatch("multipart/(signed|encrypted|report)", part.get_content_type())
        raise Unsayable(f"a {known[0] if known else part.get_content_maintype() + '/'} part")
    encoding = str(part.get("Content-Transfer-Encoding", "7bit")).strip().lower()
    if encoding not in ("7bit", "8bit", "binary", "quoted-printable", "base64"):
        raise Unsayable("a part in an encoding that is none of MIME's")
    octets = part.get_payload(decode=True)
    if part.defects or not isinstance(octets, bytes):
        raise Unsayable("a part that cannot be decoded")
    return octets


def _text(part: Part) -> str:
    if str(part.get_param("delsp", "no")).lower() == "yes":
        raise Unsayable("a text whose lines are joined (format=flowed; delsp=yes)")
    try:
        text = _octets(part).decode(str(part.get_content_charset("us-ascii")))
    except (LookupError, ValueError):
        raise Unsayable("a text that is not in its charset") from None
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _file(part: Part) -> dict[str, str]:
    octets, kind = _octets(part), part.get_content_type()
    cid = str(part.get("Content-ID", "")).strip().removeprefix("<").removesuffix(">")
    given = [(name, value) for name, value in part.get_params([])[1:] if name.lower() != "name"]
    kept = [f"; {name}={value}" for name, value in given if isinstance(value, str) and PARAMETER.fullmatch(value)]
    name = CONTROL.sub(" ", decoded(CONTROL.sub(" ", part.get_filename("") or ""))).strip()
    return {
        "filename": name or f"attachment{mimetypes.guess_extension(kind) or '.bin'}",
        "content": base64.b64encode(octets).decode(),
        "content_type": kind + "".join(kept),
        **({"content_id": cid} if cid else {}),
    }
