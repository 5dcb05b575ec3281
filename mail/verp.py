"""The return path that a mail goes out with under BOUNCE_ADDRESS: it names the mail, and proves that we made it.

    bounces@acme.example -> bounces+<the mail's id, 26 letters>.<16 letters>@acme.example

What comes back to it is about that mail (VERP, as mailing lists call it), whatever a server has left of the rest. The
last letters are a keyed digest of the id, so that who has not seen the mail cannot write one. Both are in base32, which
bears being written in capitals.
"""

from __future__ import annotations

import base64
import hmac
import re
import uuid
from collections.abc import Callable

Proof = Callable[[str], bytes]  # a mail's id -> ten bytes that nobody else can compute: mail.index


def return_path(bounce_address: str | None, mail_id: str, prove: Proof) -> str:
    """Returns the address to which servers report on a mail; "" without BOUNCE_ADDRESS."""
    if not bounce_address:
        return ""
    local, _, domain = bounce_address.rpartition("@")
    return f"{local}+{_letters(uuid.UUID(mail_id).bytes)}.{_letters(prove(mail_id))}@{domain}"


def mails_in(text: str, bounce_address: str, prove: Proof) -> list[str]:
    """Returns for each return path of ours in a text, to the tenth, the mail's id; "" for one that is forged."""
    local, _, domain = bounce_address.rpartition("@")
    form = rf"{re.escape(local)}\+([a-z2-7]{{26}})\.([a-z2-7]{{16}})@{re.escape(domain)}(?![\w.-]*\w)"
    found = list(
        dict.fromkeys((one[1].lower(), one[2].lower()) for one in re.finditer(form, text, re.IGNORECASE | re.ASCII))
    )
    ids = [str(uuid.UUID(bytes=base64.b32decode(f"{one.upper()}======"))) for one, _ in found[:10]]
    return [
        one if hmac.compare_digest(_letters(prove(one)), proof) else ""
        for one, (_, proof) in zip(ids, found, strict=False)
    ]


def _letters(octets: bytes) -> str:
    return base64.b32encode(octets).decode().rstrip("=").lower()
