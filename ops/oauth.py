"""Gets the right to send through Microsoft 365 or Google, once: `bin/oauth microsoft|google --client-id ID`.

A person consents in a browser, which need not be on this machine: with a code at Microsoft (device flow, RFC 8628), at
Google over a loopback address with PKCE (RFC 8252, 7636), since Google's device flow knows no mail. What comes of it is
written to a file that SMTP_OAUTH_FILE names, or systemd passes on, and is printed nowhere. `--client-credentials` lets
an application of Microsoft's send for itself.
"""

from __future__ import annotations

import argparse
import base64
import getpass
import hashlib
import os
import re
import secrets
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlencode, urlsplit

from pydantic import ValidationError

from ops.key import SERVER, replace
from process.grants import PROVIDERS, Grant
from smtp import oauth
from smtp.oauth import NoToken, Refused

DEVICE = "urn:ietf:params:oauth:grant-type:device_code"
PORT = 8085  # of the address to which Google sends the browser back
PATIENCE = 600.0  # seconds for a person
SLOWER = 5  # seconds that `slow_down` adds (RFC 8628 3.5)
HOSTS = {"microsoft": "smtp.office365.com", "google": "smtp.gmail.com"}


class GivenUp(Exception):
    """Nothing was written. The text says why."""


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def by_device(asked: Grant) -> str:
    """Returns the refresh token for which a person enters a code at Microsoft."""
    provider = PROVIDERS[asked.provider or ""]
    scope = asked.scope or provider.scope
    said = oauth.ask(provider.ask_url.format(tenant=asked.tenant), {"client_id": asked.client_id, "scope": scope})
    say(f"Open {_shown(said, 'verification_uri')} in a browser, on any machine, enter {_shown(said, 'user_code')},")
    say("and log in as the mailbox that is to send.")
    pause, until = _seconds(said.get("interval"), 5), time.monotonic() + min(_seconds(said.get("expires_in")), PATIENCE)
    fields = asked.request() | {"grant_type": DEVICE, "device_code": str(said.get("device_code"))}
    del fields["refresh_token"]
    while time.monotonic() < until:
        time.sleep(pause)
        try:
            return oauth.token_from(asked.url, fields).refresh_token
        except Refused as error:
            if error.code not in ("authorization_pending", "slow_down"):
                raise
            pause += SLOWER if error.code == "slow_down" else 0
    raise GivenUp("nobody has entered the code in time")


def by_browser(asked: Grant, port: int) -> str:
    """Returns the refresh token for which a person consents at Google, whose browser then comes to this machine."""
    provider, state, verifier = PROVIDERS[asked.provider or ""], secrets.token_urlsafe(24), secrets.token_urlsafe(48)
    with HTTPServer(("127.0.0.1", port), Redirected) as server:
        port = server.server_port
        here = f"http://127.0.0.1:{port}"
        challenge = base64.urlsafe_b64encode(hashlib.sha256(verifier.encode()).digest()).rstrip(b"=").decode()
        ask = {"client_id": asked.client_id, "redirect_uri": here, "response_type": "code", "state": state}
        ask |= {"scope": asked.scope or provider.scope, "access_type": "offline", "prompt": "consent"}
        ask |= {"code_challenge": challenge, "code_challenge_method": "S256"}
        say("Open this in a browser, and log in as the mailbox that is to send:")
        say(f"\n{provider.ask_url}?{urlencode(ask)}\n")
        say(f"If the browser is on another machine, first there: ssh -L {port}:127.0.0.1:{port} THIS-MACHINE")
        code = _wait_for_code(server, state)
    fields = asked.request() | {"grant_type": "authorization_code", "code": code}
    fields |= {"redirect_uri": here, "code_verifier": verifier}
    del fields["refresh_token"]
    return oauth.token_from(asked.url, fields).refresh_token


def _wait_for_code(server: HTTPServer, state: str) -> str:
    server.timeout, until = 1, time.monotonic() + PATIENCE
    heard: dict[str, list[str]] = {}
    server.heard = heard  # type: ignore[attr-defined]
    while time.monotonic() < until:
        server.handle_request()
        given = {name: values[0] for name, values in heard.items()}
        heard.clear()
        if not secrets.compare_digest(given.get("state", "").encode(errors="replace"), state.encode()):
            continue  # of a page that has nothing to do with this
        if given.get("code"):
            return given["code"]
        raise GivenUp(f"Google says {re.sub('[^a-z_]', '', given.get('error', ''))[:40] or 'nothing'}")
    raise GivenUp("nobody has consented in time")


class Redirected(BaseHTTPRequestHandler):
    """Takes a browser's request, of which only the query matters."""

    timeout = 5

    def do_GET(self) -> None:
        at = urlsplit(self.path)
        if at.path == "/":
            with suppress(ValueError):  # too many fields
                self.server.heard.update(parse_qs(at.query, max_num_fields=20))  # type: ignore[attr-defined]
        self.send_response(200 if at.path == "/" else 404)
        self.send_header("Content-Type", "text/plain; charset=utf-8")
        self.end_headers()
        self.wfile.write(b"Thank you. The rest is said on the terminal; this page can be closed.\n")

    def log_message(self, *_: object) -> None:
        """Writes nothing: the request holds a code."""


def _shown(said: dict[str, Any], name: str) -> str:
    """Returns a word of the server that people are shown."""
    found = re.fullmatch(r"[!-~]{1,200}", str(said.get(name, "")))
    if not found:
        raise GivenUp(f"the server's answer has no {name}")
    return found[0]


def _seconds(given: Any, otherwise: float = PATIENCE) -> float:
    return float(given) if isinstance(given, int) and 0 < given < 86400 else otherwise


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    about = "Gets the right to send through Microsoft 365 or Google by token, and writes it to a file."
    parser = argparse.ArgumentParser(prog="bin/oauth", description=about)
    parser.add_argument("provider", choices=sorted(PROVIDERS))
    parser.add_argument("--client-id", required=True, help="of the application that you have registered there")
    secret = "a file with the application's secret; without, it is asked for where there must be one"
    parser.add_argument("--client-secret-file", type=Path, metavar="FILE", help=secret)
    tenant = "Microsoft: your directory's ID or domain, such as acme.onmicrosoft.com"
    parser.add_argument("--tenant", default="organizations", help=tenant)
    parser.add_argument(
        "--client-credentials",
        action="store_true",
        help="Microsoft: the application sends for itself, and nobody consents (SMTP.SendAsApp)",
    )
    back = f"Google: the port on this machine to which the browser is sent back ({PORT})"
    parser.add_argument("--port", type=int, default=PORT, help=back)
    output = f"where to write it ({SERVER}/credentials/smtp_oauth, in a checkout .env.smtp_oauth)"
    parser.add_argument("--output", type=Path, metavar="FILE", help=output)
    given = parser.parse_args(arguments)
    if given.client_credentials and given.provider != "microsoft":
        parser.error("--client-credentials is for microsoft")
    return given


def get_grant(given: argparse.Namespace) -> Grant:
    """Returns what lets the service get tokens. Raises `GivenUp` and `NoToken`."""
    fields = {"provider": given.provider, "client_id": given.client_id, "tenant": given.tenant}
    if given.client_secret_file:
        fields["client_secret"] = given.client_secret_file.read_text().strip()
    elif given.client_credentials or given.provider == "google":
        fields["client_secret"] = getpass.getpass("The application's client secret (not shown): ")
    try:
        if given.client_credentials:
            grant = Grant(**fields)
            oauth.token_from(grant.url, grant.request())  # whether it works
            return grant
        asked = Grant(**fields, refresh_token="-")
    except ValidationError as error:
        faults = [one["msg"].removeprefix("Value error, ") for one in error.errors(include_input=False)]
        raise GivenUp("; ".join(faults)) from None
    refresh = by_browser(asked, given.port) if given.provider == "google" else by_device(asked)
    if not refresh:
        raise GivenUp("there is no refresh token in the answer: the application must be let to ask for offline access")
    return Grant(**fields, refresh_token=refresh)


def next_steps(file: Path, provider: str) -> str:
    login = f"SMTP_HOST={HOSTS[provider]} and SMTP_USERNAME=the mailbox's address, without SMTP_PASSWORD"
    if SERVER in file.parents:
        restart = "systemctl restart async-email-worker@email async-email-dashboard"
        return f"Next: {login}, in {SERVER}/async-email.env; {restart}; bin/doctor"
    return f"Next: SMTP_OAUTH_FILE={file}, {login}, in .env; restart bin/dev; bin/doctor"


def main(arguments: Sequence[str] | None = None) -> int:
    given = parse(arguments)
    root = Path(__file__).resolve().parent.parent
    default = SERVER / "credentials" / "smtp_oauth" if SERVER.is_dir() else root / ".env.smtp_oauth"
    file: Path = (given.output or default).resolve()
    if not os.access(file.parent, os.W_OK):
        say(f"{file.parent} is not yours to write; run this with sudo.")
        return 1
    try:
        grant = get_grant(given)
        replace(file, f"{grant.written()}\n")
    except (GivenUp, NoToken) as error:
        say(f"{error}; bin/doctor and docs/operations.md explain what the provider says. Nothing was written.")
        return 1
    except (OSError, UnicodeDecodeError) as error:
        say(f"{getattr(error, 'filename', None) or given.port}: {getattr(error, 'strerror', 'is no text')}.")
        return 1
    say(f"Written to {file}. {next_steps(file, given.provider)}.")
    return 0
