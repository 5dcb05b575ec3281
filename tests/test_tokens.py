"""Tokens: made once for all workers, renewed by one of them, dropped when a relay does not take them; and whatever a
token server may answer."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any

import pytest
import trustme
from hypothesis import given
from hypothesis import strategies as st

from process.grants import parse_grant
from queues.connection import connect
from smtp import oauth, tokens
from smtp.oauth import NoToken
from smtp.tokens import Tokens
from tests.conversations import server_context
from tests.servers import free_port
from tests.token_server import EXPIRED, FIRST, TokenServer

KEY = "relay:token"


@pytest.fixture
def server() -> Iterator[TokenServer]:
    with TokenServer(rotates=True) as server:
        yield server


@pytest.fixture
def workers(client: Any, server: TokenServer) -> list[Tokens]:
    return [Tokens(client, server.grant()) for _ in range(3)]


def number(token: str) -> int:
    return int(token.split("-")[1])


def taken_by_all(workers: list[Tokens]) -> set[int]:
    with ThreadPoolExecutor(24) as pool:
        return {number(one) for one in pool.map(lambda i: workers[i % len(workers)].take(), range(24))}


def test_all_workers_share_one_token_and_one_renewal(client: Any, server: TokenServer, workers: list[Tokens]) -> None:
    server.answers = [0.3]
    assert taken_by_all(workers) == {0}
    client.hset(KEY, "renews", 0)  # in the last tenth of its life
    server.answers = [0.5]
    with ThreadPoolExecutor(1) as pool:
        renewing = pool.submit(workers[0].take)
        while not client.exists("relay:renewing"):
            time.sleep(0.01)
        assert taken_by_all(workers[1:]) == {0}  # which they have meanwhile
        assert number(renewing.result()) == 1
    client.hset(KEY, "ends", 0)  # nobody was there to renew it
    assert taken_by_all(workers) == {2}
    assert [one["refresh_token"] for one in server.asked] == [FIRST, "refresh-1", "refresh-2"]
    assert 0 < client.pttl(KEY) <= tokens.KEPT * 1000
    assert not client.exists("relay:renewing")


def test_a_worker_that_died_renewing_is_not_waited_for_long(
    client: Any, workers: list[Tokens], monkeypatch: pytest.MonkeyPatch
) -> None:
    client.set("relay:renewing", "the dead", px=300)
    assert number(workers[0].take()) == 0
    client.hset(KEY, "ends", 0)
    client.set("relay:renewing", "one that never ends")
    monkeypatch.setattr(tokens, "WAIT", 0.2)
    with pytest.raises(NoToken, match="another worker has not come by one"):
        workers[0].take()


def test_a_token_that_the_relay_does_not_take_is_dropped_once(server: TokenServer, workers: list[Tokens]) -> None:
    first = workers[0].take()
    assert not workers[0].refused(first)  # it is new: another would fare no better
    workers[0].accepted(first)
    assert all(one.refused(first) for one in workers)  # it has worked before, so it has ended
    second = workers[1].take()
    workers[1].accepted(second)
    assert workers[0].refused(first)  # who had the old one drops nothing
    assert taken_by_all(workers) == {1}
    assert len(server.asked) == 2


def test_a_refusal_is_told_to_all_and_asked_again_a_little_later(
    client: Any, server: TokenServer, workers: list[Tokens]
) -> None:
    server.answers = [(400, EXPIRED, {})]
    for one in workers:
        with pytest.raises(NoToken, match=r"^no token: invalid_grant AADSTS700082$"):
            one.take()
    assert len(server.asked) == 1
    client.hset(KEY, "why_until", 0)
    first = workers[0].take()
    client.hset(KEY, "renews", 0)
    server.answers = [(503, b"", {"Retry-After": "120"})]
    assert {one.take() for one in workers} == {first}  # renewed too soon to be in need
    assert client.hget(KEY, "why") == b"no token: the token server answers 503; retry after 120s"
    assert len(server.asked) == 3


def test_a_restored_redis_and_another_grant_begin_with_the_grants_own_refresh_token(
    client: Any, server: TokenServer, workers: list[Tokens]
) -> None:
    workers[0].take()
    client.hset(KEY, mapping={"ends": 0, "refresh": "of-last-year"})
    assert number(workers[0].take()) == 1
    assert [one["refresh_token"] for one in server.asked] == [FIRST, "of-last-year", FIRST]
    Tokens(client, server.grant(refresh_token=None, client_secret="s", scope="all")).take()
    assert server.asked[-1] == {
        "grant_type": "client_credentials",
        "client_id": "app",
        "client_secret": "s",
        "scope": "all",
    }


def test_who_has_no_worker_beside_it_asks_alone_where_redis_is_away(server: TokenServer) -> None:
    away = connect(f"redis://127.0.0.1:{free_port()}/0")
    alone = Tokens(away, server.grant(), even_alone=True)
    assert number(alone.take()) == 0
    assert not alone.refused("token")


# fmt: off
ODD: dict[str, tuple[int, Any, dict[str, str]]] = {  # what the reason begins with -> the answer
    "invalid_client": (401, {"error": "invalid_client", "error_description": "secret 's3cret'"}, {}),
    "invalid_grant AADSTS50076": (400, {"error": "invalid_grant", "error_description": "AADSTS50076: Due to a"}, {}),
    "the token server answers 400": (400, {"error": "s3cret of ada@acme.example"}, {}),
    "the token server answers 200": (200, b"\xff<html>", {}),
    "the token server answers 302": (302, b"", {"Location": "http://127.0.0.1/x"}),
    "the token server answers 500": (500, [1], {}),
    "the token server's answer is too large": (200, b'{"access_token": "' + b"x" * 10**6 + b'"}', {}),
    "the token server's answer holds none": (200, {"access_token": "a\r\nb"}, {}),
    "the token server's answer holds one that has ended": (200, {"access_token": "a", "expires_in": "NaN"}, {}),
    "the token server does not answer (": (200, b"x", {"Content-Length": "5000"}),
    "the token server does not answer in time": (200, b"late", {}),
}
# fmt: on


@pytest.mark.parametrize("reason", ODD)
def test_an_answer_that_is_none_is_told_without_its_words(
    server: TokenServer, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(oauth, "LIMIT", 1.0)
    monkeypatch.setattr(oauth, "PATIENCE", 0.5 if "(" in reason else 5.0)
    server.answers = [*([1.5] if "in time" in reason else []), ODD[reason]]
    with pytest.raises(NoToken) as caught:
        oauth.token_from(server.url, {"grant_type": "refresh_token"})
    assert str(caught.value).startswith(f"no token: {reason}")
    assert "s3cret" not in str(caught.value)


@pytest.mark.parametrize("url", ["http://login.example/token", "ftp://127.0.0.1/x", "https://"])
def test_a_secret_is_not_sent_in_clear(url: str) -> None:
    with pytest.raises(NoToken, match="must be a URL that begins with https"):
        oauth.ask(url, {})


ANSWERS = st.binary(max_size=60) | st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | st.text(max_size=20),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["access_token", "expires_in", "refresh_token", "error"]), inner, max_size=4)
    ),
    max_leaves=8,
).map(lambda said: json.dumps(said).encode())


@given(status=st.sampled_from([200, 400, 429, 503]), body=ANSWERS, hint=st.text(max_size=8))
def test_whatever_is_answered_is_a_token_or_none(status: int, body: bytes, hint: str) -> None:
    with pytest.MonkeyPatch.context() as patch, suppress(NoToken):
        patch.setattr(oauth, "_post", lambda *_: (status, {"Retry-After": hint}, body))
        token = oauth.token_from("https://login.example/token", {})
        assert token.text.isascii()
        assert 0 < token.life <= oauth.LONGEST_LIFE


def test_a_token_server_whose_certificate_is_not_valid_is_told_nothing(authority: trustme.CA, ca_file: str) -> None:
    with TokenServer(tls=server_context(authority)) as server, pytest.MonkeyPatch.context() as patch:
        with pytest.raises(NoToken, match="does not answer"):
            oauth.token_from(server.url, server.grant().request())
        assert server.asked == []
        patch.setenv("SSL_CERT_FILE", ca_file)
        assert number(oauth.token_from(server.url, server.grant().request()).text) == 0


# fmt: off
WRONG = {
    "must be the JSON that bin/oauth writes": "s3cret",
    "client_id: field required": '{"provider": "google", "refresh_token": "s3cret"}',
    "one of provider and token_url must be set": '{"client_id": "a", "refresh_token": "s3cret"}',
    "refresh_token must be set, or client_secret": '{"provider": "microsoft", "client_id": "a"}',
    "refresh_token must be set for google": '{"provider": "google", "client_id": "a", "client_secret": "s3cret"}',
    "tenant must be your own": '{"provider": "microsoft", "client_id": "a", "client_secret": "s3cret"}',
    "tenant must be a directory's":
        '{"provider": "microsoft", "tenant": "a/b", "client_id": "a", "refresh_token": "s3cret"}',
    "token_url must be a URL": '{"token_url": "http://a.example", "client_id": "a", "refresh_token": "s3cret"}',
    "a field has no known name":
        '{"provider": "google", "client_id": "a", "refresh_token": "b", "s3cret": "s3cret"}',
    "provider: input should be 'microsoft' or 'google'": '{"provider": "s3cret", "client_id": "a"}',
}
# fmt: on


@pytest.mark.parametrize("fault", WRONG)
def test_what_is_wrong_with_a_grant_is_said_without_its_secrets(fault: str) -> None:
    with pytest.raises(ValueError, match=r".") as caught:
        parse_grant(WRONG[fault])
    assert str(caught.value).startswith(fault)
    assert "s3cret" not in str(caught.value)


def test_a_grant_is_written_as_it_is_read_and_shows_no_secret() -> None:
    text = '{"provider": "microsoft", "client_id": "a", "client_secret": "s3cret", "refresh_token": "s3cret"}'
    read = parse_grant(text)
    assert parse_grant(read.written()) == read
    assert "s3cret" not in repr(read) + read.digest
    assert read.url == "https://login.microsoftonline.com/organizations/oauth2/v2.0/token"
    assert read.request()["scope"] == "https://outlook.office.com/SMTP.Send offline_access"
