"""SMTP_OAUTH: what a relay's login by token is made from (RFC 6749), as JSON or as a table of RELAYS. Pure.

{"provider": "microsoft", "tenant": "acme.onmicrosoft.com", "client_id": "...", "refresh_token": "..."}

With a refresh token the service acts for the mailbox that has consented; with a client secret alone for itself (client
credentials). Another provider is named by its token_url and scope. bin/oauth writes it.
"""

from __future__ import annotations

import hashlib
import json
import re
from typing import Any, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, SecretStr, ValidationError, model_validator

from process.values import SAFE_URL, is_safe_url, sentences


class Provider(NamedTuple):
    """Has a provider's addresses and the scopes that let mail out. `{tenant}` in an address is the organisation."""

    token_url: str
    ask_url: str  # where a person consents: of the device flow, or of the browser's
    scope: str
    own_scope: str = ""  # of client credentials; "" where there are none


PROVIDERS = {
    "microsoft": Provider(
        "https://login.microsoftonline.com/{tenant}/oauth2/v2.0/token",
        "https://login.microsoftonline.com/{tenant}/oauth2/v2.0/devicecode",
        "https://outlook.office.com/SMTP.Send offline_access",
        "https://outlook.office365.com/.default",
    ),
    "google": Provider(
        "https://oauth2.googleapis.com/token",
        "https://accounts.google.com/o/oauth2/v2/auth",
        "https://mail.google.com/",
    ),
}
TENANT = re.compile(r"[A-Za-z0-9][A-Za-z0-9.-]{0,252}")
ANYBODYS = ("common", "organizations", "consumers")  # tenants that are no organisation's own


class Grant(BaseModel):
    """Says how to get tokens for a relay."""

    model_config = ConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True)

    provider: Literal["microsoft", "google"] | None = None
    tenant: str = "organizations"
    token_url: str | None = None
    scope: str | None = None
    client_id: str
    client_secret: SecretStr | None = None
    refresh_token: SecretStr | None = None

    @model_validator(mode="after")
    def check_combinations(self) -> Grant:
        faults = []
        if bool(self.provider) == bool(self.token_url):
            faults.append("one of provider and token_url must be set")
        if self.token_url and not is_safe_url(self.token_url):
            faults.append(f"token_url {SAFE_URL}")
        if not TENANT.fullmatch(self.tenant):
            faults.append("tenant must be a directory's ID or domain, such as acme.onmicrosoft.com")
        if not self.refresh_token and not self.client_secret:
            faults.append("refresh_token must be set, or client_secret for client credentials")
        elif not self.refresh_token and self.provider == "google":
            faults.append("refresh_token must be set for google")
        elif not self.refresh_token and self.provider and self.tenant in ANYBODYS:
            faults.append("tenant must be your own directory's ID or domain for client credentials")
        if faults:
            raise ValueError("; ".join(faults))
        return self

    @property
    def url(self) -> str:
        """Returns where tokens are made."""
        return self.token_url or PROVIDERS[self.provider or ""].token_url.format(tenant=self.tenant)

    @property
    def digest(self) -> str:
        """Returns what tells this grant from another, and nothing about it."""
        secrets = [one.get_secret_value() if one else "" for one in (self.client_secret, self.refresh_token)]
        return hashlib.sha256(json.dumps([self.url, self.scope, self.client_id, *secrets]).encode()).hexdigest()[:32]

    def request(self, refresh_token: str = "") -> dict[str, str]:
        """Returns the fields of a request for a token; `refresh_token` is one that has taken the place of its own."""
        known = PROVIDERS.get(self.provider or "")
        fields = {"client_id": self.client_id}
        if self.client_secret:
            fields["client_secret"] = self.client_secret.get_secret_value()
        if self.refresh_token:
            fields |= {"grant_type": "refresh_token", "refresh_token": refresh_token or self.own_refresh_token}
            scope = self.scope or (known.scope if known and self.provider != "google" else "")
        else:
            fields["grant_type"] = "client_credentials"
            scope = self.scope or (known.own_scope if known else "")
        return fields | ({"scope": scope} if scope else {})

    @property
    def own_refresh_token(self) -> str:
        return self.refresh_token.get_secret_value() if self.refresh_token else ""

    def written(self) -> str:
        """Returns it as JSON, with its secrets."""
        given = self.model_dump(exclude_defaults=True)
        secrets = {name: value.get_secret_value() for name, value in given.items() if isinstance(value, SecretStr)}
        return json.dumps(given | secrets)


def parse_grant(text: str) -> Grant:
    """Returns what a JSON text says. Raises ValueError with all that is wrong, and nothing of what was given."""
    try:
        given: Any = json.loads(text)
    except (ValueError, RecursionError):
        given = None
    if not isinstance(given, dict):
        raise ValueError("must be the JSON that bin/oauth writes")
    try:
        return Grant.model_validate(given)
    except ValidationError as error:
        raise ValueError("; ".join(sentences(error))) from None
