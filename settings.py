"""Every environment variable: typed, checked together, read once.

A process calls `load()` once, at its start, and gets a frozen `Settings` or a `SettingsError` that holds one sentence
per fault, each naming its variable and none showing a value that may be secret. Values come from the environment, then
from a file `.env` in the working directory; in `.env` an unknown name is a fault, most often a typing error, and a
name with two values is one.
A secret may be in a file instead: `SMTP_PASSWORD_FILE=/path` for `SMTP_PASSWORD`. A service of systemd finds both among
its credentials (`LoadCredential=`): `async-email.env` in place of `.env`, and `smtp_password`.

The only file of the service that reads `os.environ`, except what systemd puts there. `.env.example` and the README's
table list the same variables; a test compares them.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import quote

from pydantic import (
    BaseModel,
    ConfigDict,
    DirectoryPath,
    Field,
    FilePath,
    SecretStr,
    ValidationError,
    model_validator,
)

from process import env_file
from process.api_keys import ApiKey, parse_api_keys
from process.grants import Grant, parse_grant
from process.redis_url import RedisUrl
from process.relays import ONLY, RelaySettings, parse_relays
from process.values import (
    IMAP_URL,
    SAFE_URL,
    Address,
    Duration,
    Host,
    Listen,
    Port,
    Rates,
    is_imap_url,
    is_loopback,
    is_safe_url,
    parse_address,
    parse_allowlist,
    parse_bounce_address,
    parse_domain,
    parse_ehlo_name,
    parse_one_address,
    parse_schedule,
    parsed_by,
)
from process.webhooks import ONLY as ONLY_WEBHOOK
from process.webhooks import SECRET, URL, EndpointSettings, is_fit, parse_secrets, parse_webhooks

# fmt: off
SECRETS = ("redis_url", "smtp_password", "smtp_oauth", "api_keys", "dashboard_password", "alert_url", "dkim_key",
           "relays", "webhook_url", "webhook_secret", "webhooks", "bounce_imap_url", "doubt_imap_url")
# fmt: on
VERBATIM = (  # any text, so `#` too
    *("smtp_username", "smtp_password", "dashboard_password", "mail_from", "redis_url"),
    *("bounce_imap_url", "doubt_imap_url"),
)
CUT = "{} would end before its #: put the whole value in single quotes, or the comment on a line of its own"
DEV_KEY = "dev"  # bin/dev's API key; everybody knows it, so it may be served on loopback only


class SettingsError(Exception):
    """The process cannot start. `faults` holds one sentence for each variable that is wrong."""

    def __init__(self, faults: list[str]) -> None:
        super().__init__("\n".join(faults))
        self.faults = faults


class Settings(BaseModel):
    """All settings. Durations are in seconds, sizes in bytes."""

    model_config = ConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True, validate_default=True)

    redis_url: SecretStr = SecretStr("redis://127.0.0.1:6379/0")
    redis_url_file: FilePath | None = None
    redis_ca_file: FilePath | None = None
    redis_replicas: Annotated[int, Field(ge=0, le=9)] = 0

    smtp_host: Host | None = None
    smtp_port: Port = 587
    smtp_security: Literal["starttls", "tls", "none"] = Field(
        default_factory=lambda given: "tls" if given.get("smtp_port") == 465 else "starttls"
    )
    smtp_username: str | None = None
    smtp_password: SecretStr | None = None
    smtp_password_file: FilePath | None = None
    smtp_oauth: Annotated[Grant, parsed_by(parse_grant)] | None = None
    smtp_oauth_file: FilePath | None = None
    smtp_ca_file: FilePath | None = None
    smtp_timeout: Duration = 30
    ehlo_name: Annotated[str, parsed_by(parse_ehlo_name)] | None = None
    smtp_rate: Rates = ()
    relays: Annotated[tuple[RelaySettings, ...], parsed_by(parse_relays)] = ()
    relays_file: FilePath | None = None

    mail_from: str | None = None
    dkim_domain: Annotated[str, parsed_by(parse_domain)] | None = None
    dkim_selector: Annotated[str, parsed_by(parse_domain)] | None = None
    dkim_key: SecretStr | None = None
    dkim_key_file: FilePath | None = None
    mail_redirect_to: Annotated[str, parsed_by(parse_one_address)] | None = None
    mail_allowlist: Annotated[tuple[str, ...], parsed_by(parse_allowlist)] = ()

    bounce_address: Annotated[str, parsed_by(parse_bounce_address)] | None = None
    bounce_imap_url: SecretStr | None = None
    bounce_imap_url_file: FilePath | None = None
    doubt_imap_url: SecretStr | None = None
    doubt_imap_url_file: FilePath | None = None

    listen: Listen = Address("127.0.0.1", 8000)
    api_processes: Annotated[int, Field(ge=1, le=64)] = 2
    api_keys: Annotated[tuple[ApiKey, ...], parsed_by(parse_api_keys)] = ()
    api_keys_file: FilePath | None = None

    submission_listen: Annotated[
        tuple[Address, ...], parsed_by(lambda text: tuple(map(parse_address, text.split(","))))
    ] = ()
    submission_tls_cert: Path | None = None  # which only that process need be able to see
    submission_tls_key: Path | None = None
    submission_dedupe: Duration | None = None

    templates_dir: DirectoryPath | None = None
    tasks_file: FilePath | None = None

    worker_concurrency: Annotated[int, Field(ge=1, le=64)] = 16
    worker_processes: Annotated[int, Field(ge=1, le=64)] | None = None

    # fmt: off
    retry_schedule: Annotated[tuple[Duration, ...], parsed_by(parse_schedule), Field(max_length=50)] = (
        60, 5 * 60, 15 * 60, 30 * 60, 3600, 2 * 3600, 4 * 3600, 8 * 3600, 12 * 3600
    )
    # fmt: on
    trouble_for: Duration = 5 * 86400
    on_doubt: Literal["retry", "hold"] = "retry"
    retain_sent: Duration = 3 * 86400
    retain_failed: Duration = 14 * 86400
    idempotency_ttl: Duration = 86400
    keep_suppressed_addresses: bool = False

    max_message_bytes: Annotated[int, Field(ge=1024, le=64 * 2**20)] = 10 * 2**20
    allow_local_domains: bool = False
    max_recipients: Annotated[int, Field(ge=1, le=1000)] = 50

    dashboard_listen: Listen = Address("127.0.0.1", 9181)
    dashboard_username: str = "admin"
    dashboard_password: SecretStr | None = None
    dashboard_password_file: FilePath | None = None
    show_addresses: bool = True

    alert_url: SecretStr | None = None
    alert_url_file: FilePath | None = None
    alert_to: Annotated[str, parsed_by(parse_one_address)] | None = None

    webhook_url: SecretStr | None = None
    webhook_url_file: FilePath | None = None
    webhook_secret: Annotated[tuple[SecretStr, ...], parsed_by(parse_secrets)] = ()
    webhook_secret_file: FilePath | None = None
    webhooks: Annotated[tuple[EndpointSettings, ...], parsed_by(parse_webhooks)] = ()
    webhooks_file: FilePath | None = None

    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = "INFO"
    log_format: Literal["plain", "json"] = "plain"

    @model_validator(mode="before")
    @classmethod
    def read_secret_files(cls, given: dict[str, Any]) -> dict[str, Any]:
        given = {name: value for name, value in given.items() if value != ""}  # an empty credential is none
        for name in SECRETS:
            path = given.get(f"{name}_file")
            if not path:
                continue
            if given.get(name):
                raise ValueError(f"only one of {name.upper()} and {name.upper()}_FILE may be set")
            try:
                given[name] = Path(path).read_text().strip()
            except (OSError, UnicodeDecodeError) as error:
                reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
                raise ValueError(f"{name.upper()}_FILE cannot be read: {reason}") from None
        return given

    @model_validator(mode="after")
    def check_combinations(self) -> Settings:
        """Raises ValueError with a sentence for each value that has its type and is wrong all the same."""
        faults = []
        if self.smtp_host and self.relays:
            faults.append("SMTP_HOST and RELAYS both name a relay: put the one of SMTP_HOST into RELAYS, and unset it")
        if bool(self.dkim_domain) != bool(self.dkim_selector):
            faults.append("DKIM_DOMAIN and DKIM_SELECTOR go together: set both, or neither")
        if self.smtp_password and self.smtp_oauth:
            faults.append("only one of SMTP_PASSWORD and SMTP_OAUTH may be set")
        if self.smtp_username and self.smtp_security == "none" and not is_loopback(self.smtp_host or ""):
            faults.append("SMTP_SECURITY=none would send SMTP_PASSWORD in clear; use starttls or tls")
        open_to_all = [self.listen.host, *(address.host for address in self.submission_listen)]
        if not all(map(is_loopback, open_to_all)) and self.knows_dev_key:
            name = "SUBMISSION_LISTEN" if is_loopback(self.listen.host) else "LISTEN"
            faults.append(
                f"API_KEYS holds the key '{DEV_KEY}', which everybody knows, and {name} is not loopback; make a key"
            )
        if bool(self.submission_tls_cert) != bool(self.submission_tls_key):
            faults.append("SUBMISSION_TLS_CERT and SUBMISSION_TLS_KEY go together: set both, or neither")
        try:
            RedisUrl.parse(self.redis_url.get_secret_value())
        except ValueError as error:
            faults.append(f"REDIS_URL {error}")
        if self.alert_url and not is_safe_url(self.alert_url.get_secret_value()):
            faults.append(f"ALERT_URL {SAFE_URL}")
        if self.webhook_url and self.webhooks:
            faults.append("WEBHOOK_URL and WEBHOOKS both name an endpoint: put it into WEBHOOKS, and unset WEBHOOK_URL")
        if self.webhook_url and not is_fit(self.webhook_url.get_secret_value()):
            faults.append(f"WEBHOOK_URL {URL}")
        for name in ("bounce_imap_url", "doubt_imap_url"):
            given = getattr(self, name)
            if given and not is_imap_url(given.get_secret_value()):
                faults.append(f"{name.upper()} must be {IMAP_URL}")
        if faults:
            raise ValueError("\n".join(faults))
        return self

    @property
    def redis(self) -> str:
        """Returns REDIS_URL, with REDIS_CA_FILE among its parameters: what `queues.connection.connect` takes."""
        url = self.redis_url.get_secret_value()
        given, mark = str(self.redis_ca_file or ""), "&" if "?" in url else "?"
        has_tls = url.startswith("rediss") and "ssl_ca_certs=" not in url
        return f"{url}{mark}ssl_ca_certs={quote(given)}" if given and has_tls else url

    @property
    def knows_dev_key(self) -> bool:
        """Returns whether anybody may ask the API, so that it must look at who makes a browser ask."""
        return hashlib.sha256(DEV_KEY.encode()).hexdigest() in (key.sha256 for key in self.api_keys)

    def admits(self, address: str) -> bool:
        """Returns whether mail may go to this address: to any, unless MAIL_ALLOWLIST or MAIL_REDIRECT_TO is set."""
        named = {*self.mail_allowlist, *([self.mail_redirect_to.lower()] if self.mail_redirect_to else [])}
        return not named or bool(named & {address.lower(), address.lower().rpartition("@")[2]})

    @property
    def staging(self) -> str:
        """Returns what MAIL_ALLOWLIST and MAIL_REDIRECT_TO do, without an address; "" if neither is set."""
        if not self.mail_redirect_to:
            return "only recipients on MAIL_ALLOWLIST are served" if self.mail_allowlist else ""
        whose = "mail for recipients that are not on MAIL_ALLOWLIST" if self.mail_allowlist else "all mail"
        return f"{whose} goes to MAIL_REDIRECT_TO"

    @property
    def all_relays(self) -> tuple[RelaySettings, ...]:
        """Returns the relays in the order in which they are asked: those of RELAYS, or the one of SMTP_HOST, if any."""
        if self.relays or not self.smtp_host:
            return self.relays
        fields = ("host", "port", "security", "username", "password", "oauth", "ca_file", "rate")
        return (RelaySettings.model_construct(name=ONLY, **{name: getattr(self, f"smtp_{name}") for name in fields}),)

    @property
    def all_webhooks(self) -> tuple[EndpointSettings, ...]:
        """Returns the endpoints that are told what becomes of mails: those of WEBHOOKS, or the one of WEBHOOK_URL."""
        if self.webhooks or not self.webhook_url:
            return self.webhooks
        url, secrets = self.webhook_url, self.webhook_secret
        return (EndpointSettings.model_construct(name=ONLY_WEBHOOK, url=url, secrets=secrets),)

    def has(self, name: str) -> bool:
        """Returns whether a setting is there; RELAYS stands for SMTP_HOST, and WEBHOOKS for WEBHOOK_URL."""
        several = {"smtp_host": self.relays, "webhook_url": self.webhooks}
        return bool(several.get(name) or getattr(self, name))

    @property
    def deliver_timeout(self) -> int:
        """Returns how many seconds one whole SMTP session may take; the reply to the dot may take what is left."""
        return 4 * self.smtp_timeout

    @property
    def job_timeout(self) -> int:
        """Returns the seconds after which RQ ends an attempt: later than the session does, which leaves a verdict."""
        return self.deliver_timeout + 30


def from_environment() -> dict[str, str]:
    """Returns what the environment sets, by the names of fields. What is empty there is not set."""
    given = {name.lower(): value for name, value in os.environ.items() if value}
    return {name: given[name] for name in Settings.model_fields if name in given}


def from_credentials(directory: str | None) -> dict[str, str]:
    """Returns what systemd's credentials set, a file for each, by the names of fields."""
    files = {name: Path(directory, name) for name in Settings.model_fields} if directory else {}
    return {name: file.read_text().strip() for name, file in files.items() if file.is_file()}


def from_file(path: Path) -> dict[str, str]:
    """Returns what an env file sets, by the names of fields. Raises `SettingsError`."""
    try:
        assignments = env_file.read(path)
    except env_file.Unreadable as error:
        raise SettingsError(error.faults) from None
    except OSError as error:
        raise SettingsError([f"{path} cannot be read: {error.strerror}"]) from None
    if faults := [f"{path.name} line {one.line}: {text}" for one in assignments for text in _faults(one, assignments)]:
        raise SettingsError(faults)
    return {one.name.lower(): one.value for one in assignments if one.value}


def _faults(one: env_file.Assignment, assignments: list[env_file.Assignment]) -> Iterator[str]:
    known = [name.upper() for name in Settings.model_fields]
    if one.value and one.name == "RQ_KEY_PREFIX":
        yield "RQ_KEY_PREFIX must be in the environment: see docs/scale.md"
    elif one.value and one.name not in known:
        import difflib  # here, since nobody needs it but who has mistyped a name

        meant = difflib.get_close_matches(one.name.upper(), known, 1)
        advice = f"did you mean {meant[0]}?" if meant else "see .env.example for the names"
        yield f"{one.name} is not a setting; {advice}"
    elif one.comment and one.name.lower() in VERBATIM:
        yield CUT.format(one.name)
    for other in assignments:
        if other.name == one.name and other.line < one.line and other.value not in ("", one.value):
            yield f"{one.name} has another value in line {other.line}; only one may stay"


NEEDED = {  # a setting that a process cannot run without -> what to write there
    "smtp_host": "name the relay to send through, such as smtp.example.com",
    "mail_from": "name the sender of mail that names none, such as 'Acme <hello@example.com>'",
    "api_keys": "without a key nobody could call the API; make one with: bin/key new NAME",
    "webhook_url": "name the endpoint that is told what becomes of mails, or several in WEBHOOKS",
    "dashboard_password": "the dashboard shows and repeats mail, so it needs a login",
}


def load(*needed: str, **overrides: Any) -> Settings:
    """Reads and checks everything. `needed` names the settings that this process cannot run without.

    Raises `SettingsError` with everything that is wrong or, if nothing is, with everything that is missing.
    """
    directory = os.environ.get("CREDENTIALS_DIRECTORY")
    file = Path(directory, "async-email.env") if directory else Path(".env")
    written = overrides.pop("from_file") if "from_file" in overrides else from_file(file)
    try:
        settings = Settings(**{**from_credentials(directory), **written, **from_environment(), **overrides})
    except ValidationError as error:
        raise SettingsError(explain(error)) from None
    missing = [f"{name.upper()} is not set: {NEEDED[name]}" for name in needed if not settings.has(name)]
    if "smtp_host" in needed and bool(settings.smtp_username) != bool(settings.smtp_password or settings.smtp_oauth):
        # Checked in the process that sends the mail: under systemd, the API is not given the password.
        why = "SMTP_USERNAME and SMTP_PASSWORD go together: set both, or neither for a relay without a login"
        missing.append(why.replace("PASSWORD", "OAUTH") if settings.smtp_oauth else why)
    if "webhook_url" in needed and settings.webhook_url and not settings.webhook_secret:
        missing.append(f"WEBHOOK_SECRET is not set: it {SECRET}")
    if missing:
        raise SettingsError(missing)
    return settings


def explain(error: ValidationError) -> list[str]:
    """Returns one sentence per fault."""
    faults: list[str] = []
    for fault in error.errors(include_input=False, include_url=False):
        text, name = fault["msg"].removeprefix("Value error, "), "".join(map(str, fault["loc"][:1])).upper()
        if not name:
            faults += text.splitlines()
        elif fault["type"] != "default_factory_not_called":  # that is due to another fault, which is reported as well
            faults.append(f"{name}: {text[0].lower()}{text[1:]}")
    return faults
