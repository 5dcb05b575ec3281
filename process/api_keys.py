"""API keys: what each may do, and how API_KEYS writes them. Pure."""

from __future__ import annotations

import hashlib
import hmac
import re
from typing import NamedTuple

from process.values import DOMAIN, Rate

API_KEY = re.compile(
    r"([A-Za-z0-9_.-]{1,64}):([0-9a-f]{64})(?::(full|send|test)"
    rf"(?::(?:([0-9]+/[smhd])|(?=:))(?::((?i:{DOMAIN}(?:\+{DOMAIN})*)))?)?)?"
)


class ApiKey(NamedTuple):
    """A caller's key, of which only the SHA-256 is kept. Scope `send` may submit, and read, move and cancel what
    it submitted; `test` the same, and nothing is sent; `full` may do everything. `rate` is how many requests it may
    make; `domains` are those that it may send from, if not from all."""

    name: str
    sha256: str
    scope: str
    rate: Rate | None = None
    domains: tuple[str, ...] = ()
    old: bool = False  # a newer one has its name

    @property
    def reads_only(self) -> str:
        """Returns the name of the key whose mails alone this one may see: its own, or "" for all."""
        return "" if self.scope == "full" else self.name

    def may_send_from(self, address: str) -> bool:
        """Returns whether the key may send from this address. A domain has no subdomains."""
        return not self.domains or address.rpartition("@")[2] in self.domains

    def __str__(self) -> str:
        optional = [str(self.rate or ""), "+".join(self.domains)]
        return ":".join([self.name, self.sha256, self.scope, *optional]).rstrip(":")


def find_key(keys: tuple[ApiKey, ...], secret: bytes) -> ApiKey | None:
    """Returns the key of this secret. Compares all keys, each in constant time."""
    digest = hashlib.sha256(secret).hexdigest()
    return next(iter([key for key in keys if hmac.compare_digest(key.sha256, digest)]), None)


def parse_api_keys(text: str) -> tuple[ApiKey, ...]:
    keys = []
    for number, entry in enumerate(filter(None, (part.strip() for part in text.split(","))), 1):
        match = API_KEY.fullmatch(entry)
        if not match:  # the entry itself may be a key pasted in clear: never repeat it
            form = "name:sha256hex[:scope[:rate[:domains]]], with scope full, send or test, a rate such as 50/s or none"
            raise ValueError(f"entry {number} must be {form}, and domains in ASCII such as acme.example+acme.test")
        rate, domains = Rate.parse(match[4]) if match[4] else None, (match[5] or "").lower()
        keys.append(ApiKey(match[1], match[2], match[3] or "full", rate, tuple(filter(None, domains.split("+")))))
    for same in ([one for one in keys if one.name == key.name] for key in keys):
        if len(same) > 2 or len(set(same)) < len(same) or len({one._replace(sha256="") for one in same}) > 1:
            raise ValueError("each name must be unique, or that of an old key and a new one that may do the same")
    newest = {key.name: key for key in keys}
    return tuple(key._replace(old=key != newest[key.name]) for key in keys)
