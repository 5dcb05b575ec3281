"""A mail as its sender wrote it: checked, its own lines kept to the octet, its header read. Pure.

Refuses what two mail servers may read differently: a line that does not end in CRLF (SMTP smuggling), one that is too
long, an octet 0, a header that is none. Changes nothing but that whole header fields are taken out, or put in front, so
that a signature of the sender's own stays valid.
Standards: RFC 5322 (lines, fields), 2045 2.8 (8-bit), 6376 (DKIM), 6532 (UTF-8 headers).
"""

from __future__ import annotations

import re
from email.utils import getaddresses
from functools import lru_cache
from typing import NamedTuple

from mail.address import CONTROL, Mailbox, decoded, strict_address

LONGEST_LINE = 998  # octets without CRLF
LARGEST_HEADER = 256 * 1024  # bytes
FIELD = re.compile(rb"([!-9;-~]+)[ \t]*:([^\r\n]*(?:\r\n[ \t][^\r\n]*)*)\r\n")
END_OF_HEADER = b"\r\n\r\n"
address_of = lru_cache(maxsize=1000)(
    strict_address
)  # envelope and header have the same ones, a program's mails one From


class NotAMail(Exception):
    """The text says what must be true."""


class Field(NamedTuple):
    name: str  # in small letters
    line: bytes  # as it came, with its CRLF

    @property
    def value(self) -> str:
        """Returns the text without folds, encoding and control characters."""
        octets = self.line.partition(b":")[2].replace(b"\r\n", b"")
        try:
            text = octets.decode()
        except UnicodeDecodeError:
            text = octets.decode("latin-1")
        return CONTROL.sub(" ", decoded(CONTROL.sub(" ", text).strip())).strip()


class Header(NamedTuple):
    fields: tuple[Field, ...]
    size: int  # bytes

    def values(self, name: str) -> list[str]:
        return [field.value for field in self.fields if field.name == name]

    def mailboxes(self, name: str) -> list[Mailbox]:
        """Returns whom the fields of this name have, without what is no address."""
        found = []
        for display, address in getaddresses(self.texts(name)):
            try:
                name_of = CONTROL.sub(" ", decoded(CONTROL.sub(" ", display))).strip()[:200]
                found.append(Mailbox(name_of, address_of(address)))
            except ValueError:
                continue
        return found

    def texts(self, name: str) -> list[str]:
        """Returns the values as they are written, but for folds: an encoded word may stand for a comma."""
        lines = [field.line.partition(b":")[2] for field in self.fields if field.name == name]
        return [line.replace(b"\r\n", b"").decode(errors="replace").strip() for line in lines]


def check(data: bytes) -> None:
    """Raises `NotAMail`."""
    if not data.count(b"\r") == data.count(b"\n") == data.count(b"\r\n"):
        raise NotAMail("each line must end in CRLF, and no CR or LF may stand alone")
    if b"\0" in data:
        raise NotAMail("the mail must not contain an octet 0")
    start = 0
    while len(data) - start > LONGEST_LINE + 2:
        start = data.rfind(b"\n", start, start + LONGEST_LINE + 2) + 1  # behind the last line that fits
        if not start:
            raise NotAMail(f"each line must have at most {LONGEST_LINE} octets (RFC 5322 2.1.1)")


def header_of(data: bytes) -> Header:
    """Raises `NotAMail` if the mail does not begin with header fields."""
    empty_line = data.find(END_OF_HEADER, 0, LARGEST_HEADER)
    end = 0 if data.startswith(b"\r\n") else empty_line + 2 if empty_line >= 0 else len(data)
    if end > LARGEST_HEADER:
        raise NotAMail(f"the header must have at most {LARGEST_HEADER} bytes")
    fields, at = [], 0
    while at < end:
        found = FIELD.match(data, at, end)
        if not found:
            raise NotAMail("the mail must begin with header fields, and an empty line after them")
        fields.append(Field(found[1].decode().lower(), found[0]))
        at = found.end()
    return Header(tuple(fields), end)


def without(data: bytes, header: Header, names: re.Pattern[str]) -> bytes:
    """Returns the mail without the fields of these names, in small letters."""
    kept = [one.line for one in header.fields if not names.fullmatch(one.name)]
    return data if len(kept) == len(header.fields) else b"".join([*kept, data[header.size :]])
