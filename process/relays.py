"""RELAYS: several relays by name, as TOML; each table is one, and their order is that in which they are asked. Pure.

[first]
host = "smtp.example.com"
username = "acme"
password = "..."

[second]
kind = "resend"
url = "https://api.resend.com"
api_key = "..."
"""

from __future__ import annotations

import re
import sys
from importlib import import_module
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, FilePath, SecretStr, ValidationError, model_validator

from process.grants import Grant
from process.values import DOMAIN, SAFE_URL, Host, Port, Rates, is_loopback, is_safe_url, sentences

Named = TypeVar("Named", bound=BaseModel)
tomllib: Any = import_module("tomllib" if sys.version_info >= (3, 11) else "tomli")
ONLY = "relay"  # the name of the one that SMTP_HOST names
NAME = re.compile(r"[a-z0-9][a-z0-9_-]{0,31}")
OF_KIND = {
    "smtp": {"host", "port", "security", "username", "password", "oauth", "ca_file"},
    "resend": {"url", "api_key"},
}


class RelaySettings(BaseModel):
    """Says where one relay is, and what mail it takes. `rate` and `concurrency` hold for all workers together; with
    `domains`, it takes mail from these alone."""

    model_config = ConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True, validate_default=True)

    name: str
    kind: Literal["smtp", "resend"] = "smtp"
    host: Host | None = None
    port: Port = 587
    security: Literal["starttls", "tls", "none"] = Field(
        default_factory=lambda given: "tls" if given.get("port") == 465 else "starttls"
    )
    username: str | None = None
    password: SecretStr | None = None
    oauth: Grant | None = None  # in place of a password
    ca_file: FilePath | None = None
    url: str | None = None
    api_key: SecretStr | None = None
    rate: Rates = ()
    concurrency: Annotated[int, Field(ge=1, le=64)] | None = None
    domains: Annotated[tuple[str, ...], Field(max_length=1000)] = ()

    @model_validator(mode="after")
    def check_combinations(self) -> RelaySettings:
        faults = []
        needed = {"smtp": "host", "resend": "url"}[self.kind]
        if not getattr(self, needed):
            faults.append(f"{needed} must be set for a relay of kind {self.kind}")
        others = set().union(*OF_KIND.values()) - OF_KIND[self.kind]
        faults += [f"{name} is not for a relay of kind {self.kind}" for name in sorted(others & self.model_fields_set)]
        if self.url and not is_safe_url(self.url):
            faults.append(f"url {SAFE_URL}")
        if self.kind == "resend" and not self.api_key:
            faults.append("api_key must be set for a relay of kind resend")
        if self.username and self.security == "none" and not is_loopback(self.host or ""):
            faults.append("security none would send the password in clear; use starttls or tls")
        if self.password and self.oauth:
            faults.append("only one of password and oauth may be set")
        elif self.kind == "smtp" and bool(self.username) != bool(self.password or self.oauth):
            faults.append("username and password go together (or oauth): set both, or neither for one without a login")
        if not all(re.fullmatch(DOMAIN, domain) for domain in self.domains):
            faults.append("domains must be domains in ASCII and small letters, such as acme.example")
        if faults:
            raise ValueError("; ".join(faults))
        return self

    def serves(self, domain: str) -> bool:
        """Returns whether it takes mail from addresses of this domain, written in small letters."""
        return not self.domains or domain in self.domains


def parse_relays(text: str) -> tuple[RelaySettings, ...]:
    """Returns the relays of a TOML text, in its order. Raises ValueError with all that is wrong."""
    return parse_tables(text, RelaySettings, ONLY)


def parse_tables(text: str, kind: type[Named], reserved: str) -> tuple[Named, ...]:
    """Returns what each table of a TOML text describes, in its order; its name is one of its fields, and none is
    `reserved`. Raises ValueError with all that is wrong."""
    try:
        tables: dict[str, Any] = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:  # which names the line, and quotes nothing
        raise ValueError(f"must be TOML: {error}") from None
    found, faults = [], []
    for name, table in tables.items():
        if not NAME.fullmatch(name) or not isinstance(table, dict) or name == reserved:
            name_of = f"a name of 1 to 32 letters a-z, digits, _ or -, other than {reserved}"
            faults.append(f"each entry must be a table with {name_of}")
            continue
        try:
            found.append(kind(**{**table, "name": name}))
        except ValidationError as error:
            faults += [f"{name}: {sentence}" for sentence in sentences(error)]
    if faults:
        raise ValueError("; ".join(faults))
    return tuple(found)
