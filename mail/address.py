"""A mailbox: an address with an optional display name, checked. Pure.

Refuses an address that a parser would rewrite, and control characters anywhere.
Standards: RFC 5321 (addresses, lengths), 5322 (display names), 6531 (UTF-8 local parts).
"""

from __future__ import annotations

import re
import unicodedata
from typing import NamedTuple

from email_validator import EmailNotValidError, validate_email
from pydantic_core import PydanticCustomError

CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")


def wrong(message: str) -> PydanticCustomError:
    return PydanticCustomError("wrong", "{message}", {"message": message})


class Mailbox(NamedTuple):
    """One address with an optional display name. `address` is what goes into the envelope, to the letter."""

    name: str
    address: str

    @classmethod
    def parse(cls, text: object) -> Mailbox:
        """`a@b.example` or `Name <a@b.example>`. Raises a validation error for anything less plain than that."""
        if isinstance(text, Mailbox):  # one that was checked before; JSON has no such thing
            return text
        if not isinstance(text, str):
            raise wrong("write a string such as ada@example.com or Ada Lovelace <ada@example.com>")
        if len(text) > 998:  # before any parser spends time on it
            raise wrong("it is longer than 998 characters")
        header_text(text)
        match = re.fullmatch(r"(?P<name>.*)<(?P<named>[^<>]*)>|(?P<bare>[^<>]*)", text.strip(" "))
        if not match:
            raise wrong("write one address, such as ada@example.com or Ada Lovelace <ada@example.com>")
        name = (match["name"] or "").strip(" ")
        return cls(display_name(name), strict_address(match["named"] or match["bare"] or ""))

    @property
    def needs_smtputf8(self) -> bool:
        return not self.address.isascii()

    def __str__(self) -> str:
        return f"{phrase(self.name)} <{self.address}>" if self.name else self.address


def display_name(text: str) -> str:
    if re.fullmatch(r'"(?:[^"\\]|\\.)*"', text):
        text = re.sub(r"\\(.)", r"\1", text[1:-1])
    elif re.search(r'[",;:@\\()\[\]<>]', text):
        raise wrong('put a display name with special characters in double quotes: "Lovelace, Ada" <ada@example.com>')
    if len(text) > 200:
        raise wrong("the display name is longer than 200 characters")
    return text.strip(" ")


def phrase(name: str) -> str:
    """A display name as RFC 5322 writes it: as it is if made of plain words, else as a quoted string."""
    if re.fullmatch(r"[^\W_]+(?: [^\W_]+)*", name):
        return name
    return '"' + name.replace("\\", r"\\").replace('"', r"\"") + '"'


def strict_address(text: str) -> str:
    """One addr-spec that no parser reads differently. Only the domain's spelling may change: lower case, A-labels."""
    try:
        found = validate_email(text, check_deliverability=False, test_environment=True)
    except EmailNotValidError as error:
        raise wrong(f"this is not an e-mail address: {error}" if text else "the address is empty") from None
    local = text.rpartition("@")[0]  # as written: the validator would make info@ of Info@
    if not unicodedata.is_normalized("NFC", local):
        raise wrong("the part before @ is not in Unicode's normal form (NFC); write it as it is meant")
    if "=?" in local:
        raise wrong("the part before @ holds =?, which mail programs take for the beginning of encoded text")
    return f"{local}@{found.ascii_domain}"


def header_text(text: str) -> str:
    if CONTROL.search(text):
        raise wrong("it holds a line break or another control character, which no header may")
    return text
