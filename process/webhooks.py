"""WEBHOOKS: several endpoints that are told what becomes of mails, as TOML; each table is one. Pure.

[shop]
url = "https://shop.example.com/hooks/mail"
secrets = ["whsec_..."]

[audit]
url = "https://audit.internal/mail"
secrets = ["whsec_new...", "whsec_old..."]
events = ["email.failed", "email.bounced"]
private = true
"""

from __future__ import annotations

import base64
import binascii
from typing import Annotated
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict, Field, SecretStr, model_validator

from process.relays import parse_tables
from process.values import is_safe_url

ONLY = "webhook"  # the name of the endpoint that WEBHOOK_URL describes
PREFIX = "whsec_"
URL = "must be a URL without a login that begins with https://, or with http:// on loopback"
SECRET = "must be whsec_ and 24 to 64 bytes in base64; make one with: echo whsec_$(openssl rand -base64 32)"


def is_fit(url: str) -> bool:
    """Returns whether events may be posted to this URL."""
    return is_safe_url(url) and "@" not in urlsplit(url).netloc


def key_of(secret: str) -> bytes:
    """Returns the bytes with which a request is signed. Raises ValueError."""
    try:
        key = base64.b64decode(secret.removeprefix(PREFIX), validate=True)
    except (binascii.Error, ValueError):
        key = b""
    if not secret.startswith(PREFIX) or not 24 <= len(key) <= 64:
        raise ValueError(SECRET)
    return key


def parse_secrets(text: str) -> tuple[str, ...]:
    """Returns the secrets of WEBHOOK_SECRET, one or several. Raises ValueError."""
    secrets = tuple(part.strip() for part in text.split(","))
    for one in secrets:
        key_of(one)
    return secrets


class EndpointSettings(BaseModel):
    """An endpoint. A request is signed with each of its `secrets`, so that a receiver may change from one to another;
    `events` names what it is told, and without it that is everything; `private` lets its name be one of this machine
    or network."""

    model_config = ConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True)

    name: str
    url: SecretStr
    secrets: Annotated[tuple[SecretStr, ...], Field(min_length=1, max_length=5)]
    events: Annotated[tuple[str, ...], Field(max_length=50)] = ()
    private: bool = False

    @model_validator(mode="after")
    def check_combinations(self) -> EndpointSettings:
        if not is_fit(self.url.get_secret_value()):
            raise ValueError(f"url {URL}")
        for one in self.secrets:
            try:
                key_of(one.get_secret_value())
            except ValueError as error:
                raise ValueError(f"each of secrets {error}") from None
        return self

    @property
    def host(self) -> str:
        """Returns all of its URL that may be shown: the rest may be a secret."""
        return urlsplit(self.url.get_secret_value()).hostname or ""

    @property
    def keys(self) -> list[bytes]:
        return [key_of(one.get_secret_value()) for one in self.secrets]


def parse_webhooks(text: str) -> tuple[EndpointSettings, ...]:
    """Returns the endpoints of a TOML text, in its order. Raises ValueError with all that is wrong."""
    return parse_tables(text, EndpointSettings, ONLY)
