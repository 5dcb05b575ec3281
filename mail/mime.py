"""`Message` -> MIME bytes. Pure: the same arguments give the same bytes, so every attempt sends the same mail.

Writes every header line itself, those of the parts too: `EmailMessage` parses what it is given and writes what it
understood, which for a file named `=?utf-8?q?x?=.txt` is another name, and for a media type with a parameter name of
80 letters an endless loop. The only home of `email.*`.
Standards: RFC 5322 (headers), 2045-2047 and 2231 (MIME), 2387 (related), 6532 (UTF-8 headers).
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import re
from collections.abc import Iterator
from datetime import datetime
from email.header import Header
from email.utils import format_datetime
from urllib.parse import quote

from mail.address import Mailbox, phrase
from mail.message import STRUCTURED, Message
from mail.plain import text_beside
from mail.raw import header_of

# Header text that needs no encoding and folds at its spaces. After the longest name (76) the longest word with the
# longest run of spaces still ends before column 998.
PLAIN = re.compile(r"[!-~]{1,900}(?: {1,9}[!-~]{1,900})*")
ENCODED_WORD = re.compile(r"=\?[^?]*\?[BbQq]\?.*?\?=")  # what a reader takes for one, also where RFC 2047 forbids it
PLAIN_FILE_NAME = re.compile(r"[A-Za-z0-9_.,+@()-]+(?: [A-Za-z0-9_.,+@()-]+)*")
NAMED = re.compile(r";\s*name\*?=", re.IGNORECASE)
INVITATION = re.compile(r"text/calendar\s*;(?:.*;)?\s*method=", re.IGNORECASE)
FOLD = ";\r\n "
DELIMITER = b"--=_"  # how the lines between parts begin; a text that holds it is encoded, and then it does not


def to_mime(message: Message, message_id: str, date: datetime) -> bytes:
    """Returns the message as it goes over the wire: CRLF line ends, 7-bit but for SMTPUTF8 addresses, without Bcc."""
    if message.raw:
        return as_it_came(message, message.raw.octets.encode("latin-1"), message_id, date)
    seed = hashlib.sha256(message_id.encode()).hexdigest()[:24]
    return head(message, message_id, date).encode() + mime_body(message, seed)


def as_it_came(message: Message, octets: bytes, message_id: str, date: datetime) -> bytes:
    """Puts in front of a mail that came by SMTP the header fields that it must have and lacks."""
    there = {field.name for field in header_of(octets).fields}
    lines = {
        "from": address_header("From", [message.sender]),
        "date": f"Date: {format_datetime(date)}",
        "message-id": f"Message-ID: {message_id}",
        "mime-version": "MIME-Version: 1.0",
    }
    missing = "".join(f"{line}\r\n" for name, line in lines.items() if name not in there)
    return missing.encode() + octets


def head(message: Message, message_id: str, date: datetime) -> str:
    """Returns the header lines but for those that say how the body is written."""
    lines = [
        address_header("From", [message.sender]),
        address_header("To", message.to),
        address_header("Cc", message.cc),
        address_header("Reply-To", message.reply_to),
        text_header("Subject", message.subject),
        f"Date: {format_datetime(date)}",
        f"Message-ID: {message_id}",
        "MIME-Version: 1.0",
        *(text_header(name, value) for name, value in message.headers.items()),
    ]
    return "".join(f"{line}\r\n" for line in lines if line)


def text_header(name: str, value: str) -> str:
    """Writes a header of free text: folded at its spaces when plain, else in RFC 2047 encoded words. A structured one
    is never encoded (RFC 2047 5): mail.request has seen to it that it is plain."""
    if STRUCTURED.fullmatch(name) or (PLAIN.fullmatch(value) and not ENCODED_WORD.search(value)):
        return "\r\n".join(_folded(name, value))
    return f"{name}: " + _encoded(value, used=len(name) + 2)


def _folded(name: str, value: str) -> Iterator[str]:
    line = f"{name}:"
    for word in re.split(" (?! )", value):  # at the last space of a run, so that no line is blank
        if len(line) + 1 + len(word) > 78 and line != f"{name}:":
            yield line
            line = ""
        line += f" {word}"
    yield line


def _encoded(text: str, used: int) -> str:
    # header_name is only measured, as what stands before the first word. At 40 that still fits on the line; were it
    # longer, Header would fold before it, and some parsers take that fold for a space.
    return Header(text, "utf-8", maxlinelen=76, header_name=" " * min(used - 2, 40)).encode(linesep="\r\n")


def address_header(name: str, boxes: list[Mailbox]) -> str:
    """Writes a header of addresses, one a line, so that no fold can fall inside one."""
    return f"{name}: " + ",\r\n ".join(map(_wire, boxes)) if boxes else ""


def _wire(box: Mailbox) -> str:
    if not box.name:
        return box.address
    plain = box.name.isascii() and "=?" not in box.name
    name = phrase(box.name) if plain else _encoded(box.name, used=20)
    fits = plain and len(name) + len(box.address) < 60
    return f"{name} <{box.address}>" if fits else f"{name}\r\n <{box.address}>"


def mime_body(message: Message, seed: str) -> bytes:
    """Writes text, html, or both as alternatives; inline images related to the html; the other files mixed around all.

    A part is its own header lines, an empty line and its content, with CRLF line ends throughout. Where there is html,
    a text that is not given is made from it, and an empty one left out. `seed` makes the boundaries this mail's own,
    unlike those of a mail that it quotes.
    """
    invitations = [one for one in message.attachments if _is_invitation(one)]
    invitation = invitations[0] if len(invitations) == 1 else None  # of two alternatives a reader shows one
    inline = [_file(one) for one in message.attachments if "content_id" in one]
    files = [_file(one) for one in message.attachments if "content_id" not in one and one is not invitation]
    text = text_beside(message.text, message.html)
    versions = [_text("plain", text or "")] if text or not message.html else []
    if message.html:
        versions.append(_multipart('related; type="text/html"', [_text("html", message.html), *inline], f"r_{seed}"))
    shown = _multipart(
        "alternative", [*versions, *([_file(invitation, shown=True)] if invitation else [])], f"a_{seed}"
    )
    return _multipart("mixed", [shown, *files], f"m_{seed}")


def _is_invitation(one: dict[str, str]) -> bool:
    """Returns whether a file is what calendars answer with buttons: then it is an alternative (RFC 6047 2.4)."""
    return bool(INVITATION.match(one["content_type"])) and "content_id" not in one


def _multipart(subtype: str, parts: list[bytes], name: str) -> bytes:
    """Joins parts as RFC 2046 5.1 says. A single part needs no multipart around it."""
    if len(parts) == 1:
        return parts[0]
    delimiter = DELIMITER + name.encode()
    head = b'Content-Type: multipart/%b;\r\n boundary="%b"\r\n\r\n' % (subtype.encode(), delimiter[2:])
    return head + b"".join(b"%b\r\n%b\r\n" % (delimiter, part) for part in parts) + delimiter + b"--\r\n"


def _text(subtype: str, text: str) -> bytes:
    lines = text if text.endswith("\n") else text + "\n"
    encoding, body = _encoded_text(lines.replace("\n", "\r\n").encode())
    head = f"Content-Type: text/{subtype}; charset=utf-8\r\nContent-Transfer-Encoding: {encoding}\r\n\r\n"
    return head.encode() + body


def _encoded_text(data: bytes) -> tuple[str, bytes]:
    if data.isascii() and DELIMITER not in data and max(map(len, data.split(b"\r\n"))) <= 78:
        return "7bit", data
    quoted, packed = binascii.b2a_qp(data), _base64_lines(base64.b64encode(data).decode())
    fits = len(quoted) <= len(packed) and max(map(len, quoted.split(b"\r\n"))) <= 76  # b2a_qp may write 77
    return ("quoted-printable", quoted) if fits else ("base64", packed)


def _base64_lines(text: str) -> bytes:
    return "".join(f"{text[start : start + 76]}\r\n" for start in range(0, len(text), 76)).encode()


def _file(one: dict[str, str], shown: bool = False) -> bytes:
    """Writes a file's part; without a disposition if it is `shown`, as an invitation is."""
    disposition = "inline" if "content_id" in one else "attachment"
    stored = f"Content-Disposition: {disposition}{FOLD}{filename_parameter(one['filename'])}"
    lines = [
        f"Content-Type: {re.sub('; ?', FOLD, one['content_type'])}{_older_name(one)}",
        "Content-Transfer-Encoding: base64",
        *([] if shown else [stored]),
        *([f"Content-ID: <{one['content_id']}>"] if "content_id" in one else []),
    ]
    return "\r\n".join([*lines, "", ""]).encode() + _base64_lines(one["content"])


def _older_name(one: dict[str, str]) -> str:
    """Writes the file's name for readers that know no Content-Disposition, which know no RFC 2231 either."""
    name = one["filename"]
    if NAMED.search(one["content_type"]):
        return ""
    plain = name.isascii() and not ENCODED_WORD.search(name)
    quoted = name.replace('"', r"\"") if plain else _encoded(name, used=8)
    return f'{FOLD}name="{quoted}"'


def filename_parameter(name: str) -> str:
    """Writes a file name in quotes when plain, else percent-encoded, in several pieces when long (RFC 2231 3 and 4)."""
    if PLAIN_FILE_NAME.fullmatch(name):
        return f'filename="{name}"'
    first, *more = _percent_encoded(name, 60)
    if not more:
        return f"filename*=utf-8''{first}"
    numbered = [f"filename*{number}*={piece}" for number, piece in enumerate([f"utf-8''{first}", *more])]
    return FOLD.join(numbered)


def _percent_encoded(text: str, size: int) -> list[str]:
    """Returns pieces of at most `size` characters, none of which ends inside an encoded character."""
    pieces = [""]
    for character in text:
        encoded = quote(character, safe="")
        if len(pieces[-1]) + len(encoded) > size:
            pieces.append("")
        pieces[-1] += encoded
    return pieces
