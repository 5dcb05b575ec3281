"""A mail as SMTP writes it: its envelope as commands, its lines for DATA. Pure.

An address goes out exactly as it was accepted, or not at all; no body can end its mail early.
Standards: RFC 5321 (SMTP), 6152 (8BITMIME), 6531 (SMTPUTF8).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

ADDRESS = re.compile(r"[^\x00-\x20\x7f<>\ud800-\udfff]+")  # what fits between < and >


class Envelope(NamedTuple):
    """Names who sends to whom, which need not be what the mail itself says."""

    sender: str
    recipients: Sequence[str]
    smtputf8: bool = False  # an address needs RFC 6531
    eight_bit: bool = False  # its lines need RFC 6152

    def mail_from(self, *options: str) -> bytes | None:
        """Returns the command, or None if the address cannot be written into one. "" is the null sender (4.5.5)."""
        options += ("BODY=8BITMIME",) * self.eight_bit + ("SMTPUTF8",) * self.smtputf8
        return self._command("MAIL FROM", self.sender, *options)

    def rcpt_to(self) -> dict[str, bytes | None]:
        """Returns the commands by address, None where it cannot be written into one."""
        return {address: self._command("RCPT TO", address) for address in self.recipients}

    def _command(self, words: str, address: str, *options: str) -> bytes | None:
        """Writes the address to the letter: smtplib's own methods send what their parser makes of it."""
        is_null = not address and words == "MAIL FROM"
        if not (is_null or ADDRESS.fullmatch(address)) or not (self.smtputf8 or address.isascii()):
            return None
        return (" ".join([f"{words}:<{address}>", *options]) + "\r\n").encode()


def crlf_lines(mime: bytes) -> bytes:
    """Makes every line end in CRLF and nothing else (RFC 5321 2.3.8). A lone CR or LF by a dot would end the mail for
    some relays and not for others, and what follows it would be another: SMTP smuggling."""
    lines = mime.replace(b"\r\n", b"\n").replace(b"\r", b"\n").replace(b"\n", b"\r\n")
    return lines if lines.endswith(b"\r\n") else lines + b"\r\n"


def dot_stuffed(lines: bytes) -> bytes:
    """Doubles a dot that begins a line (RFC 5321 4.5.2)."""
    return re.sub(rb"(?m)^\.", b"..", lines)
