"""A mailbox: an address with an optional display name, checked. Pure.

Refuses an address that a parser would rewrite, and control characters anywhere.
Standards: RFC 5321 (addresses, lengths), 5322 (display names), 6531 (UTF-8 local parts).
"""

from __future__ import annotations

import re
import unicodedata
from base64 import b64decode
from binascii import a2b_qp
from itertools import groupby
from typing import NamedTuple

CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")
ENCODED = r"=\?(?:utf-8|us-ascii|iso-8859-\d\d?|windows-125\d)(?:\*[A-Za-z-]*)?\?[bq]\?[!->@-~]*\?="
ENCODED_WORDS = re.compile(rf"(?<!\S){ENCODED}(?: +{ENCODED})*(?!\S)", re.IGNORECASE)
# What any parser reads alike, and the validator finds nothing to say about, at twenty times the cost.
PLAIN = re.compile(
    r"(?=.{3,254}$)(?=[^@]{1,64}@)[A-Za-z0-9_+-]+(?:\.[A-Za-z0-9_+-]+)*@(?:(?=[^.]{1,63}\.)[a-z0-9]+(?:-[a-z0-9]+)*\.)+[a-z]{2,63}"
)
EXAMPLES = "ada@example.com or Ada Lovelace <ada@example.com>"


class Mailbox(NamedTuple):
    """One address with an optional display name. `address` goes into the envelope unchanged."""

    name: str
    address: str

    @classmethod
    def parse(cls, text: object) -> Mailbox:
        """Reads `a@b.example` or `Name <a@b.example>`. Raises a `ValueError` for anything less plain than that."""
        if isinstance(text, Mailbox):  # one that was checked before; JSON has no such thing
            return text
        if not isinstance(text, str):
            raise ValueError(f"must be a string such as {EXAMPLES}")
        if len(text) > 998:  # before any parser spends time on it
            raise ValueError("must be at most 998 characters long")
        header_text(text)
        match = re.fullmatch(r"(?P<name>.*)<(?P<named>[^<>]*)>|(?P<bare>[^<>]*)", text.strip(" "))
        if not match:
            raise ValueError(f"must be one address such as {EXAMPLES}")
        name = (match["name"] or "").strip(" ")
        try:
            return cls(display_name(name), strict_address(match["named"] or match["bare"] or ""))
        except ValueError:
            if re.search("@[^@]*[,;][^@]*@", text):
                raise ValueError("must be one address; each further one must be a string of its own") from None
            raise

    @property
    def is_local(self) -> bool:
        """Returns whether the domain is one word, which only the relay's own network can know."""
        return "." not in self.address.rpartition("@")[2]

    def __str__(self) -> str:
        return f"{phrase(self.name)} <{self.address}>" if self.name else self.address


def default_sender(text: object, allow_local: bool) -> Mailbox:
    """Reads the sender of mail that names none. Raises a `ValueError`."""
    sender = Mailbox.parse(text)
    if sender.is_local and not allow_local:
        raise ValueError("must have a domain with a dot, unless ALLOW_LOCAL_DOMAINS=yes")
    return sender


def display_name(text: str) -> str:
    """Returns the name that `text` stands for, without its quotes or encoding. Raises a `ValueError`.

    Clients write names without the quotes that RFC 5322 wants. Before the only <...> a name can be nothing else, but if
    it holds an address and a separator, or begins like a quoted string and is none.
    """
    if re.fullmatch(r'"(?:[^"\\]|\\.)*"', text):
        text = re.sub(r"\\(.)", r"\1", text[1:-1])
    elif re.search(r"^\"|[<>]|@.*[,;]|[,;].*@", text):
        told = "with an address, an angle bracket or a quote that does not close needs double quotes"
        raise ValueError(f'a display name {told}: "Lovelace, Ada" <ada@example.com>')
    else:
        text = header_text(decoded(text))
    if len(text) > 200:
        raise ValueError("the display name must be at most 200 characters long")
    return text.strip(" ")


def decoded(text: str) -> str:
    """Returns the text with its RFC 2047 words decoded, or as it is if one of them cannot be."""
    try:
        return ENCODED_WORDS.sub(lambda found: _decoded(found[0].split()), text)
    except (ValueError, LookupError):
        return text


def _decoded(words: list[str]) -> str:
    """Decodes words that stand together: the space between them does not count, and a character may lie across two."""
    parts = [word.split("?")[1:4] for word in words]
    text = ""
    for charset, group in groupby(parts, key=lambda part: part[0].partition("*")[0].lower()):
        octets = (
            b64decode(body, validate=True) if kind in "bB" else a2b_qp(body, header=True) for _, kind, body in group
        )
        text += b"".join(octets).decode(charset)
    return text


def phrase(name: str) -> str:
    """Writes a display name as RFC 5322 does: unchanged if made of plain words, else as a quoted string."""
    if re.fullmatch(r"[^\W_]+(?: [^\W_]+)*", name):
        return name
    return '"' + name.replace("\\", r"\\").replace('"', r"\"") + '"'


def strict_address(text: str) -> str:
    """Returns an addr-spec that every parser reads alike. Only the domain may change: lower case, A-labels."""
    if PLAIN.fullmatch(text):
        return text
    # Here, since it takes 20 ms to load, and no worker checks an address.
    from email_validator import SPECIAL_USE_DOMAIN_NAMES, EmailNotValidError, validate_email

    # Whether corp.local or home.arpa takes mail is for the relay to know: RFC 5321 forbids no name.
    SPECIAL_USE_DOMAIN_NAMES.clear()
    try:
        checked = validate_email(text, check_deliverability=False, globally_deliverable=False)
    except EmailNotValidError as error:
        raise ValueError(f"is not an e-mail address: {error}" if text else "the address must not be empty") from None
    local = text.rpartition("@")[0]  # as written: the validator would make info@ of Info@
    if not unicodedata.is_normalized("NFC", local):
        raise ValueError("the part before @ must be in Unicode's normal form NFC")
    if checked.ascii_domain.rpartition(".")[2].isdigit():
        raise ValueError("the part after @ must be a domain name, not an address of the network")
    if "=?" in local:
        raise ValueError("the part before @ must not contain =?, which mail programs take for encoded text")
    return f"{local}@{checked.ascii_domain}"


def header_text(text: str) -> str:
    if CONTROL.search(text):
        raise ValueError("must not contain a line break or another control character")
    return text
