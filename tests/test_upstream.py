"""A mail is posted under a key until it is answered: what each answer means, and that none is waited for too long."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Callable
from typing import Any

import pytest
import trustme
from hypothesis import given
from hypothesis import strategies as st

from process.relays import RelaySettings
from process.version import VERSION
from smtp.policy import NO_API, Phase
from smtp.verdict import TIMED_OUT, Reply
from tests.conversations import server_context
from tests.http_upstream import CUT, TAKEN, Scripted, answer
from tests.servers import Api, free_port
from tests.verdicts import ACCEPTED, REFUSED, TROUBLE, TRY_AGAIN
from upstream.answer import reply_of
from upstream.client import Upstream, as_json

GOT = Reply(Phase.HTTP, 200, "accepted as abc")
MAIL = {"from": "ada@example.com", "to": ["bob@example.com"], "subject": "Grüße", "text": "Hi"}
BODY = as_json(MAIL)
NOT_JSON = "<html><body>Log in to the hotel's network"


def at(url: str, key: str = "planted-key") -> Upstream:
    return Upstream(RelaySettings.model_validate({"name": "up", "kind": "resend", "url": url, "api_key": key}), 2)


def error(name: str, message: str = "words") -> str:
    return json.dumps({"statusCode": 400, "name": name, "message": message})


def test_a_mail_is_posted_with_key_and_token_and_the_connection_is_kept() -> None:
    with Scripted() as server:
        upstream = at(f"{server.url}/v1/")
        assert [upstream.post("k", BODY, 9), upstream.post("k", BODY, 9)] == [GOT, GOT]
        upstream.close()
    assert (server.connections, server.asked[0]) == (1, server.asked[1])
    assert (server.asked[0].line, json.loads(server.asked[0].body)) == ("POST /v1/emails HTTP/1.1", MAIL)
    sent = {"authorization": "Bearer planted-key", "idempotency-key": "k", "user-agent": f"async-email/{VERSION}"}
    assert sent.items() <= server.asked[0].headers.items()


@pytest.mark.parametrize(
    ("status", "body", "headers", "text", "verdict", "pause"),
    [
        (200, '{"id": "abc", "status": "queued"}', [], "accepted as abc", ACCEPTED, 0),
        *((200, body, [], NO_API, TROUBLE, 0) for body in (NOT_JSON, "[]", '{"id": 7}', '{"id": ""}', "[" * 9999)),
        (204, "", [], NO_API, TROUBLE, 0),
        (302, "", ["Location: https://elsewhere.example/"], NO_API, TROUBLE, 0),
        (422, error("invalid_from_address", "a\n b"), [], "invalid_from_address: a b", REFUSED, 0),
        (422, error("validation_error", "x" * 999), [], f"validation_error: {'x' * 482}", REFUSED, 0),
        (413, NOT_JSON, [], NO_API, REFUSED, 0),
        (400, NOT_JSON, [], NO_API, TROUBLE, 0),
        (403, error("invalid_api_key"), [], "invalid_api_key: words", TROUBLE, 0),
        (403, error("validation_error"), [], "validation_error: words", TRY_AGAIN, 0),
        (409, error("invalid_idempotent_request"), [], "invalid_idempotent_request: words", ACCEPTED, 0),
        *((429, error("quota"), [f"{it}: 7"], "quota (retry after 7 s): words", TROUBLE, 7)
          for it in ("Retry-After", "ratelimit-reset")),
        (429, error("daily_quota_exceeded"), ["Retry-After: 999999"],
         "daily_quota_exceeded (retry after 43200 s): words", TROUBLE, 43200),
        (429, NOT_JSON, ["Retry-After: Fri, 27 Nov 2026 13:00:00 GMT"], NO_API, TROUBLE, 0),
        (503, error("application_error"), ["Retry-After: 5"], "application_error (retry after 5 s): words", TROUBLE, 5),
        (502, NOT_JSON, [], NO_API, TROUBLE, 0),
    ],
)  # fmt: skip
def test_what_an_answer_says(status: int, body: str, headers: list[str], text: str, verdict: Any, pause: int) -> None:
    with Scripted([answer(status, body, *headers)]) as server:
        reply = at(server.url).post("k", BODY, 9)
    assert (reply, reply.verdict, reply.pause) == (Reply(Phase.HTTP, status, text), verdict, pause)
    assert reply.may_have_been_taken is (verdict is TROUBLE and status not in (400, 403, 429))
    assert len(server.asked) == (4 if status in (200, 204) and verdict is TROUBLE else 1)


@pytest.mark.parametrize(
    ("acts", "reply", "times"),
    [
        ([TAKEN, CUT, TAKEN], GOT, 3),  # a kept connection may have died
        ([TAKEN, CUT, CUT], Reply(Phase.HTTP, None, "the upstream closed the connection"), 5),
        ([TAKEN, answer(409, error("concurrent_idempotent_requests")), TAKEN], GOT, 3),
        ([TAKEN, answer(429, error("rate_limit_exceeded"), "Retry-After: 1"), TAKEN], GOT, 3),
        ([TAKEN, answer(429, error("rate_limit_exceeded"), "Retry-After: 1")],
         Reply(Phase.HTTP, 429, "rate_limit_exceeded (retry after 1 s): words"), 5),
        ([TAKEN, TAKEN[:-4], TAKEN[:-4]], Reply(Phase.HTTP, None, TIMED_OUT), 2),
        ([TAKEN, b"220 mail.example.com ESMTP\r\n"], Reply(Phase.HTTP, None, "the upstream closed the connection"), 5),
        ([TAKEN, answer(200, " " * 70_000 + '{"id":"abc"}')], Reply(Phase.HTTP, 200, NO_API), 5),
    ],
)  # fmt: skip
def test_a_mail_is_asked_for_again_at_once_where_that_helps(
    acts: list[bytes], reply: Reply, times: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("upstream.client.random.uniform", lambda *_: 0.01)
    with Scripted(acts) as server:
        upstream = at(server.url)
        assert upstream.post("first", BODY, 9) == GOT
        assert upstream.post("k", BODY, 1 if reply.text == TIMED_OUT else 60) == reply
    assert len(server.asked) == times
    assert (
        len({one.body for one in server.asked})
        == 1
        == len({one.headers["idempotency-key"] for one in server.asked[1:]})
    )


def nobody(port: int) -> str:
    return f"http://127.0.0.1:{port}"


@pytest.mark.parametrize(
    ("url", "why"),
    [
        (lambda: nobody(free_port()), "Connection refused"),
        (lambda: "https://no-such-host.invalid", "its name cannot be resolved"),
    ],
)
def test_an_upstream_that_is_not_reached_has_nothing(url: Callable[[], str], why: str) -> None:
    reply = at(url()).post("k", BODY, 9)
    assert (reply, reply.verdict) == (Reply(Phase.CONNECT, None, why), TROUBLE)
    assert not reply.may_have_been_taken


def test_a_certificate_that_nobody_vouches_for_is_no_upstreams() -> None:
    with Scripted(tls=server_context(trustme.CA())) as server:
        reply = at(server.url).post("k", BODY, 9)
    assert (reply.phase, "certificate is not valid" in reply.text, server.asked) == (Phase.CONNECT, True, [])


def test_an_answer_that_drips_is_over_at_the_deadline() -> None:
    with Scripted([0.3]) as server:
        began = time.monotonic()
        reply = at(server.url).post("k", BODY, 1)
        assert (reply, reply.may_have_been_taken) == (Reply(Phase.HTTP, None, TIMED_OUT), True)
        assert time.monotonic() - began < 20


def test_a_proxy_of_the_environment_is_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "ALL_PROXY"):
        monkeypatch.setenv(name, nobody(free_port()))
    with Scripted() as server:
        assert at(server.url).post("k", BODY, 9) == GOT


@given(
    st.integers(100, 599), st.dictionaries(st.sampled_from(["retry-after", "ratelimit-reset"]), st.text()), st.binary()
)
def test_any_answer_is_judged(status: int, headers: dict[str, str], body: bytes) -> None:
    assert reply_of(status, headers, body).verdict in (ACCEPTED, TROUBLE, REFUSED, TRY_AGAIN)


def test_another_of_ours_takes_a_mail_once_and_says_so_again(api: Api) -> None:
    upstream = at(nobody(api.port), "full-key")
    taken = [upstream.post("k1", BODY, 9) for _ in range(3)]
    assert [one.verdict for one in taken] == [ACCEPTED] * 3
    assert len({one.text for one in taken}) == 1
    assert api.email(taken[0].text.split()[-1])["subject"] == MAIL["subject"]
    assert upstream.post("k1", as_json(MAIL | {"text": "another"}), 9)[1:3] == (
        409, "invalid_idempotent_request: this Idempotency-Key was used for a different request; "
        "use a new key for a new request",
    )  # fmt: skip
    assert upstream.post("k2", as_json(MAIL | {"to": ["x"]}), 9).verdict is REFUSED
    assert (upstream.check(9).code, at(nobody(api.port), "wrong").check(9).verdict) == (200, TROUBLE)
    assert at(nobody(api.port), "full-key").check(9).verdict is ACCEPTED


def test_the_key_is_in_no_text_of_the_upstream() -> None:
    assert "planted" not in f"{at('http://127.0.0.1:1')}{at('http://127.0.0.1:1').identity}"
    assert at("http://127.0.0.1:1/").identity == at("http://127.0.0.1:1").identity != at("http://127.0.0.1:2").identity
    assert at("http://127.0.0.1:1", "another").identity != at("http://127.0.0.1:1").identity
    assert str(at("https://api.resend.com")) == "api.resend.com"


def test_a_socket_that_is_never_answered_is_no_leak() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        reply = at(nobody(silent.getsockname()[1])).post("k", BODY, 0.5)
    assert reply == Reply(Phase.HTTP, None, TIMED_OUT)
