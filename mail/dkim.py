"""Signs mail with DKIM (RFC 6376) for relays that do not: DKIM_DOMAIN, DKIM_SELECTOR and DKIM_KEY. Home of `dkim`.

Signs the lines that SMTP will carry: what is done to a mail after this changes none. Fields that a stranger might add
are signed once more than they occur, so that one more breaks the signature. A mail from another domain, or one that has
a signature of this domain already, goes out as it is. It is RSA by Python alone: milliseconds of a core for each mail.
"""

from __future__ import annotations

import base64
import re
from functools import lru_cache
from typing import Any

from mail.raw import Header, NotAMail, header_of
from settings import Settings, SettingsError
from smtp.envelope import crlf_lines

SEALED = ("from", "to", "cc", "reply-to", "subject", "date", "message-id")  # signed once more than they occur
SIGNED = (*SEALED, "sender", "in-reply-to", "references", "mime-version", "content-type", "content-transfer-encoding",
          "list-id", "list-unsubscribe", "list-unsubscribe-post")  # fmt: skip
MOST = 10  # fields of one name; who has more is not signed
FEWEST_BITS = 1024  # RFC 8301 3.2
FORM = "DKIM_KEY must be an RSA private key in PEM, without a passphrase, of at least 1024 bits"


class Signer:
    """Signs for one domain. Raises `SettingsError` for a key that is none."""

    def __init__(self, domain: str, selector: str, key: str) -> None:
        self.domain, self.selector = domain, selector
        self.key = pem(key)
        self.modulus, self.exponent = public_numbers(self.key)

    @classmethod
    def of(cls, current: Settings) -> Signer | None:
        """Returns None if no mail is to be signed. Raises `SettingsError`."""
        if not (current.dkim_domain and current.dkim_selector):
            return None
        if not current.dkim_key:
            raise SettingsError(["DKIM_KEY is not set: name the key that signs for DKIM_DOMAIN, or unset that"])
        return cls(current.dkim_domain, current.dkim_selector, current.dkim_key.get_secret_value())

    def signed(self, mime: bytes) -> bytes:
        """Returns the mail with a signature in front, or as it is."""
        lines = crlf_lines(mime)
        try:
            header = header_of(lines)
        except NotAMail:
            return mime
        if not self.may_sign(header):
            return mime
        counts = {name: sum(field.name == name for field in header.fields) for name in SIGNED}
        if max(counts.values()) > MOST:
            return mime
        names = [name.encode() for name in SIGNED for _ in range(counts[name] + (name in SEALED))]
        library = _library()
        how = {"canonicalize": (b"relaxed", b"relaxed"), "include_headers": names}
        try:
            signature: bytes = library.sign(lines, self.selector.encode(), self.domain.encode(), self.key, **how)
        except library.MessageFormatError:  # in a mail that came by SMTP: a field that it does not take for one
            return mime
        return signature + lines

    def may_sign(self, header: Header) -> bool:
        """Returns whether the one From is of this domain or below it, which DMARC calls aligned, and no signature of
        this domain is there."""
        domains = [box.address.rpartition("@")[2].lower() for box in header.mailboxes("from")]
        ours = all(domain == self.domain or domain.endswith(f".{self.domain}") for domain in domains)
        there = [re.search(r"(?:^|;)\s*d\s*=\s*([^\s;]+)", text) for text in header.texts("dkim-signature")]
        once = sum(field.name == "from" for field in header.fields) == 1
        return bool(domains) and ours and once and not any(one and one[1].lower() == self.domain for one in there)

    @property
    def record(self) -> str:
        """Returns what DNS should say at `selector._domainkey.domain`."""
        return f"v=DKIM1; k=rsa; p={_spki(self.modulus, self.exponent)}"

    def is_in(self, published: str) -> bool:
        """Returns whether the key that DNS has, the `p` of a record, is this one's."""
        try:
            found = _library().crypto.parse_public_key(base64.b64decode(re.sub(r"\s", "", published)))
        except Exception:  # whatever the library stumbles over in it
            return False
        return (found["modulus"], found["publicExponent"]) == (self.modulus, self.exponent)


@lru_cache(maxsize=1)
def _library() -> Any:
    import dkim  # here, since only who signs needs its megabytes, and those of dnspython
    import dkim.crypto

    return dkim


def pem(text: str) -> bytes:
    """Returns a key as the library reads it. One without its first and last line, as `.env` may have it, will do."""
    body = re.sub(r"-----[A-Z ]+-----|\s", "", text)
    return f"-----BEGIN PRIVATE KEY-----\n{body}\n-----END PRIVATE KEY-----\n".encode()


def public_numbers(key: bytes) -> tuple[int, int]:
    """Returns modulus and exponent. Raises `SettingsError`."""
    try:
        read = _library().crypto.parse_pem_private_key(key)
        modulus, exponent = int(read["modulus"]), int(read["publicExponent"])
        works = pow(pow(2, int(read["privateExponent"]), modulus), exponent, modulus) == 2
    except Exception:  # whatever the library stumbles over, its text may quote the key
        works = False
    if not works or modulus.bit_length() < FEWEST_BITS:
        raise SettingsError([FORM])
    return modulus, exponent


def _spki(modulus: int, exponent: int) -> str:
    """Writes a public key as DNS has it (RFC 5280 4.1, RFC 8017 A.1)."""

    def tagged(tag: int, content: bytes) -> bytes:
        size = len(content)
        if size < 128:
            return bytes((tag, size)) + content
        length = size.to_bytes((size.bit_length() + 7) // 8, "big")
        return bytes((tag, 128 + len(length))) + length + content

    def integer(number: int) -> bytes:
        return tagged(2, number.to_bytes(number.bit_length() // 8 + 1, "big"))

    numbers = tagged(0x30, integer(modulus) + integer(exponent))
    rsa = bytes.fromhex("300d06092a864886f70d0101010500")  # rsaEncryption, NULL
    return base64.b64encode(tagged(0x30, rsa + tagged(3, b"\0" + numbers))).decode()
