"""The doctor at an upstream: each way in which URL, key or account can be wrong is told from the others."""

from __future__ import annotations

import json

import pytest

from ops.checks import relay, replies
from ops.checks.findings import FAULT, OK
from ops.checks.target import Target
from settings import Settings, load
from smtp.policy import Phase
from smtp.published import Published
from smtp.verdict import Reply
from tests.checks.support import assert_finds
from tests.http_upstream import CUT, Scripted, answer
from tests.servers import free_port


def said(status: int, name: str) -> bytes:
    return answer(status, json.dumps({"name": name, "message": "planted words"}))


def at(url: str) -> Settings:
    return load(from_file={}, relays=f'[up]\nkind = "resend"\nurl = "{url}"\napi_key = "planted-key"\n')


@pytest.mark.parametrize(
    ("act", "level", "found", "fix"),
    [
        (answer(200, '{"object": "list", "data": []}'), OK, "accepts our API key", ""),
        (said(401, "restricted_api_key"), OK, "accepts our API key", ""),
        (said(403, "invalid_api_key"), FAULT, "relay up: 127.0.0.1:", "put it into api_key"),
        (said(401, "missing_api_key"), FAULT, "401 at http: the upstream does not accept the API key", "api_key"),
        (said(404, "not_found"), FAULT, "404 at http: no API", "url must be"),
        (answer(200, "<html>"), FAULT, "200 at http: no API", "url must be"),
        (said(429, "daily_quota_exceeded"), FAULT, "the quota", "raise it"),
        (said(429, "rate_limit_exceeded"), FAULT, "fewer mails at a time", "set rate"),
        (answer(503, ""), FAULT, "503 at http: the upstream does not answer, or is out of order", "nothing"),
        (CUT, FAULT, "no reply at http: the upstream does not answer", "nothing"),
    ],
)
def test_what_is_wrong_with_an_upstream_is_said(target: Target, act: bytes, level: str, found: str, fix: str) -> None:
    with Scripted([act]) as there:
        assert_finds(relay.login(target, at(there.url)), level, found, fix)
    assert there.asked[0].line == "GET /emails?limit=1 HTTP/1.1"


def test_an_upstream_that_is_not_there_is_told_from_one_that_refuses(target: Target) -> None:
    settings = at(f"http://127.0.0.1:{free_port()}")
    assert_finds(relay.login(target, settings), FAULT, "cannot be reached: Connection refused", "correct url")
    away = Published("up", "resend", "api.example.com")
    assert "check url," in replies.explain_at(away, Reply(Phase.CONNECT, None, "timed out"))[1]
    assert "domain" in replies.explain_at(away, Reply(Phase.HTTP, 403, "validation_error: not verified"))[1]
    assert "permanently" in replies.explain_at(away, Reply(Phase.HTTP, 422, "validation_error: to"))[0]
