"""bin/oauth: both ways in which a person consents, played by a browser and a provider of our own; what is written."""

from __future__ import annotations

import base64
import hashlib
import http.client
import re
import threading
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest

from ops import oauth as command
from process import grants
from process.grants import Grant, parse_grant
from tests.servers import ROOT, mode
from tests.token_server import TokenServer

CODE = {"device_code": "d3vice", "user_code": "ABCD-EFGH", "verification_uri": "https://login.example/device"}


@pytest.fixture
def secret(tmp_path: Path) -> Path:
    (tmp_path / "secret").write_text("s3cret\n")
    return tmp_path / "secret"


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Any:
    with TokenServer() as server:
        for name, provider in grants.PROVIDERS.items():
            here = provider._replace(token_url=server.url, ask_url=f"{server.url}?{{tenant}}")
            monkeypatch.setitem(grants.PROVIDERS, name, here)
        yield server


def run(capfd: pytest.CaptureFixture[str], output: Path, *words: str) -> tuple[int, str]:
    """Returns the status and what was said, which holds no secret."""
    status = command.main([*words, "--client-id", "app", "--output", str(output)])
    said = "".join(capfd.readouterr())
    assert not re.search("s3cret|refresh-|token-|d3vice", said)
    return status, said


def written(output: Path) -> Grant:
    assert mode(output) == 0o600
    return parse_grant(output.read_text())


def test_at_microsoft_a_code_is_entered_and_waited_for(
    server: TokenServer, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    slept: list[float] = []
    monkeypatch.setattr("time.sleep", slept.append)
    pending = ("authorization_pending", "slow_down", "authorization_pending")
    refusals: list[Any] = [(400, {"error": code}, {}) for code in pending]
    server.answers = [(200, CODE | {"interval": 3, "expires_in": 900}, {}), *refusals]
    status, said = run(capfd, tmp_path / "grant", "microsoft", "--tenant", "acme.example")
    assert status == 0, said
    assert "enter ABCD-EFGH" in said
    assert "SMTP_OAUTH_FILE=" in said
    grant = written(tmp_path / "grant")
    assert (grant.provider, grant.tenant, grant.own_refresh_token) == ("microsoft", "acme.example", "refresh-1")
    assert slept == [3, 3, 8, 8]
    assert server.asked[0] == {"client_id": "app", "scope": grants.PROVIDERS["microsoft"].scope}
    assert (server.asked[1]["grant_type"], server.asked[1]["device_code"]) == (command.DEVICE, "d3vice")


@pytest.mark.parametrize(
    ("answers", "reason"),
    [
        ([(400, {"error": "unauthorized_client", "error_description": "AADSTS700016: s3cret"}, {})], "AADSTS700016"),
        ([(200, CODE, {}), (400, {"error": "authorization_declined"}, {})], "authorization_declined"),
        ([(200, CODE, {}), (200, {"access_token": "a"}, {})], "there is no refresh token"),
        ([(200, CODE | {"user_code": "\x1b[2J"}, {})], "has no user_code"),
    ],
)
def test_what_the_provider_refuses_is_said_and_nothing_written(
    server: TokenServer,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    answers: Any,
    reason: str,
) -> None:
    monkeypatch.setattr("time.sleep", lambda _: None)
    server.answers = answers
    status, said = run(capfd, tmp_path / "grant", "microsoft")
    assert (status, reason in said) == (1, True), said
    assert not (tmp_path / "grant").exists()


def test_an_application_of_microsofts_sends_for_itself(
    server: TokenServer, tmp_path: Path, capfd: pytest.CaptureFixture[str], secret: Path
) -> None:
    words = ("microsoft", "--client-credentials", "--client-secret-file", str(secret))
    assert "your own directory" in run(capfd, tmp_path / "grant", *words)[1]
    assert run(capfd, tmp_path / "grant", *words, "--tenant", "acme.example")[0] == 0
    assert written(tmp_path / "grant").refresh_token is None
    assert [one["scope"] for one in server.asked] == ["https://outlook.office365.com/.default"]


def test_at_google_the_browser_comes_back_with_a_code_that_only_we_can_use(
    server: TokenServer, tmp_path: Path, capfd: pytest.CaptureFixture[str], secret: Path, monkeypatch: Any
) -> None:
    shown: list[str] = []

    def say(text: str) -> None:
        shown.append(text)
        if "code_challenge" in text:
            threading.Thread(target=browse, args=[text.strip()]).start()

    def browse(url: str) -> None:
        asked = {name: values[0] for name, values in parse_qs(urlsplit(url).query).items()}
        shown.append(asked["code_challenge"])
        for query in (
            "",
            "state=guessed&code=stolen",
            "state=%C3%A9&code=x",
            "&".join(["a=b"] * 30),
            f"state={asked['state']}&code=c0de",
        ):
            there = http.client.HTTPConnection(urlsplit(asked["redirect_uri"]).netloc, timeout=5)
            there.request("GET", f"/?{query}")
            assert there.getresponse().status == 200
            there.close()

    monkeypatch.setattr(command, "say", say)
    words = ("google", "--client-secret-file", str(secret), "--port", "0")
    assert run(capfd, tmp_path / "grant", *words)[0] == 0, shown
    assert written(tmp_path / "grant").own_refresh_token == "refresh-1"
    [asked] = server.asked
    assert (asked["grant_type"], asked["code"], asked["client_secret"]) == ("authorization_code", "c0de", "s3cret")
    digest = base64.urlsafe_b64encode(hashlib.sha256(asked["code_verifier"].encode()).digest())
    assert digest.rstrip(b"=").decode() in shown


def test_the_command_is_there() -> None:
    assert "ops.oauth" in (ROOT / "bin/oauth").read_text()
    assert (ROOT / "bin/oauth").stat().st_mode & 0o111
