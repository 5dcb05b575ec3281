"""The kinds of values that settings have: durations, rates, hosts, addresses; how each is written, and read. Pure.

A fault is a ValueError that says what must be true, and never repeats what was given: it may be a secret.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Callable
from contextlib import suppress
from typing import Annotated, Any, NamedTuple
from urllib.parse import urlsplit

from pydantic import BeforeValidator, Field, ValidationError

UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400}
DOMAIN = r"[a-z0-9](?:[a-z0-9-]*[a-z0-9])?(?:\.[a-z0-9](?:[a-z0-9-]*[a-z0-9])?)*"
ATOM = r'[^\s\x00-\x1f\x7f@.,;:()<>\[\]"\\]+'
ADDRESS = rf"{ATOM}(?:\.{ATOM})*@(?i:{DOMAIN})"


def parsed_by(parse: Callable[[str], object]) -> BeforeValidator:
    """Applies `parse` to text only: a default, or a value that code passes in, has its type already."""
    return BeforeValidator(lambda given: parse(given) if isinstance(given, str) else given)


def parse_duration(text: str) -> int:
    """Returns seconds: `"90s"` -> 90, `"5m"` -> 300, `"24h"`, `"3d"`."""
    match = re.fullmatch(r"([0-9]{1,9})([smhd])", text.strip())
    if not match:
        raise ValueError("must be a number and a unit: 30s, 5m, 24h or 3d")
    return int(match[1]) * UNITS[match[2]]


def parse_schedule(text: str) -> list[int]:
    return [parse_duration(part) for part in text.split(",")]


class Rate(NamedTuple):
    most: int  # so many mails or requests
    seconds: int  # in any period of this length

    def __str__(self) -> str:
        return f"{self.most}/{next(unit for unit, seconds in UNITS.items() if seconds == self.seconds)}"

    @classmethod
    def parse(cls, text: str) -> Rate:
        match = re.fullmatch(r"([1-9][0-9]{0,4})/([smhd])", text.strip())
        if not match:
            raise ValueError("must be a rate per second, minute, hour or day, such as 14/s")
        return cls(int(match[1]), UNITS[match[2]])


def parse_rates(text: str) -> tuple[Rate, ...]:
    """Returns the rates of `"14/s, 2000/d"`, all of which hold at once."""
    try:
        return tuple(map(Rate.parse, text.split(",")))
    except ValueError as error:
        raise ValueError(f"{error}, or several such as 30/m,2000/d") from None


class Address(NamedTuple):
    """Where a process listens."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


def is_loopback(host: str) -> bool:
    with suppress(ValueError):
        return ipaddress.ip_address(host).is_loopback
    return host == "localhost"


def parse_address(text: str) -> Address:
    match = re.fullmatch(r"(?:\[([0-9a-fA-F:]+)\]|([^\s:\[\]]+)):([0-9]{1,5})", text.strip())
    if not match or not 0 < int(match[3]) < 65536:
        raise ValueError("must be host:port, such as 127.0.0.1:8000 or [::1]:8000")
    return Address(match[1] or match[2], int(match[3]))


def parse_one_address(text: str) -> str:
    """Returns an address as it stands."""
    if not re.fullmatch(ADDRESS, text.strip()):
        raise ValueError("must be one address without a name, such as tester@acme.example")
    return text.strip()


def parse_allowlist(text: str) -> tuple[str, ...]:
    """Returns addresses and domains, in small letters."""
    entries = tuple(part.strip().lower() for part in text.split(","))
    if not all(re.fullmatch(f"{ADDRESS}|{DOMAIN}", entry) for entry in entries):
        raise ValueError("must be addresses and domains in ASCII, such as ada@example.com,acme.example")
    return entries


def parse_domain(text: str) -> str:
    """Returns a domain, or one or more labels of one, in small letters."""
    if not re.fullmatch(DOMAIN, text.strip().lower()) or len(text) > 253:
        raise ValueError("must be a domain in ASCII, or a part of one, such as acme.example")
    return text.strip().lower()


def parse_host(text: str) -> str:
    """Returns a host's name or address as it stands. A port, a scheme or a login beside it is no part of it."""
    host = text.strip()
    if re.fullmatch(r"[0-9A-Fa-f.:]+(%[\w.-]+)?", host):  # ipaddress takes any text behind %
        with suppress(ValueError):
            return str(ipaddress.ip_address(host))
    if not re.fullmatch(r"(?!-)[\w-]{1,63}(\.[\w-]{1,63})*\.?", host) or len(host) > 253:
        raise ValueError("must be a host's name or address alone, such as smtp.example.com; its port is SMTP_PORT")
    return host


def parse_ehlo_name(text: str) -> str:
    """Returns a domain, or an address in brackets (RFC 5321 4.1.3)."""
    name = text.strip()
    if not re.fullmatch(r"[A-Za-z0-9]([A-Za-z0-9.-]*[A-Za-z0-9])?|\[[0-9A-Za-z.:]+\]", name) or len(name) > 255:
        raise ValueError("must be a full name, such as mail.example.com, or an address in brackets: [192.0.2.1]")
    return name


SAFE_URL = "must be a URL that begins with https://, or with http:// on loopback"


def is_safe_url(url: str, secure: str = "https", clear: str = "http") -> bool:
    """Returns whether a secret in it is not sent in clear, but within this machine."""
    try:
        at = urlsplit(url)
        _ = at.port
    except ValueError:
        return False
    loopback = at.scheme == clear and is_loopback(at.hostname or "")
    return bool(at.hostname) and (at.scheme == secure or loopback) and bool(re.fullmatch(r"[!-~]+", url))


IMAP_URL = (
    "a URL such as imaps://user:password@imap.example.com/INBOX, with / : @ # ? % in user and password as %2F ..."
)


def is_imap_url(url: str) -> bool:
    """Returns whether it names a mailbox by IMAP, with a login that is not sent in clear but within this machine."""
    at = urlsplit(url) if is_safe_url(url, "imaps", "imap") else None
    return bool(at and at.username and at.password and not (at.query or at.fragment))


def parse_bounce_address(text: str) -> str:
    """Returns an address to whose local part a mail's id can be added: together, at most 64 octets (RFC 5321)."""
    address = parse_one_address(text)
    if not address.isascii() or len(address.partition("@")[0]) > 20 or "+" in address:
        raise ValueError("must be one address in ASCII, with 1 to 20 characters before the @ and no +")
    return address


def sentences(error: ValidationError) -> list[str]:
    """Returns a sentence for each fault that pydantic has found in a table or an object. Of what was given it has no
    more than the names of fields, and no name that may be a secret."""
    return [_sentence(fault) for fault in error.errors(include_input=False, include_url=False)]


def _sentence(fault: Any) -> str:
    names, text = [part for part in fault["loc"] if isinstance(part, str)], fault["msg"].removeprefix("Value error, ")
    if not all(re.fullmatch(r"[a-z_]{1,32}", name) for name in names):
        return "a field has no known name"
    return f"{'.'.join(names)}: {text[0].lower()}{text[1:]}" if names else text


LONGEST_DURATION = 100 * 366 * 86400  # seconds; what is longer, Redis or Python may refuse
Duration = Annotated[int, parsed_by(parse_duration), Field(gt=0, le=LONGEST_DURATION)]
Host = Annotated[str, parsed_by(parse_host)]
Rates = Annotated[tuple[Rate, ...], parsed_by(parse_rates)]
Listen = Annotated[Address, parsed_by(parse_address)]
Port = Annotated[int, Field(ge=1, le=65535)]
