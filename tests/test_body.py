"""What a request's body may be: strict JSON of the right media type, bounded in size, depth and number of values."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import redis

from tests.http_api import MAIL, SUBMITTED, refused, spoken, stored
from tests.servers import Api, House, RedisServer
from web.body import MAX_DEPTH, SMALL_BODY
from web.octets import MAX_VALUES

pytestmark = pytest.mark.usefixtures("client")
SETTINGS = {"MAX_MESSAGE_BYTES": "300000"}  # the smallest body nested 40,000 deep is larger than 64 KiB
DEEP = 40_000
# fmt: off
NOT_JSON = {
    "nothing": b"",
    "half an object": b'{"to": ',
    "two objects": b"{} {}",
    "single quotes": b"{'to': 1}",
    "a trailing comma": b'{"to": "a",}',
    "NaN": b'{"to": NaN}',
    "Infinity": b'{"to": Infinity}',
    "-Infinity": b'{"to": [-Infinity]}',
    "a number beyond any float": b'{"to": [1, 1e999]}',
    "the same, negative and deep": b'{"template": {"variables": {"a": -1e999}}}',
    "an integer of 5000 digits": b'{"to": %b}' % (b"1" * 5000),
    "deep arrays": b"[" * DEEP + b"]" * DEEP,
    "deep objects": b'{"a":' * DEEP + b"1" + b"}" * DEEP,
    "arrays a little too deep": b"[" * 40 + b"]" * 40,
    "deep variables": b'{"template": {"id": "welcome", "variables": {"a": %b}}}' % (b"[" * 40 + b"]" * 40),
    "deep arguments": b'{"task": "why_failed", "args": %b1%b}' % (b'{"a":' * 40, b"}" * 40),
    "half a surrogate pair": rb'{"to": ["a", "\ud800"]}',
    "half a surrogate pair in a name": rb'{"headers": {"X-\udfff": "a"}}',
    "a name twice": b'{"to": "a@b.example", "to": "c@d.example"}',
    "a name twice, deep": b'{"headers": {"X": "1", "X": "2"}}',
    "Latin-1": '{"to": "é"}'.encode("latin-1"),
    "a byte order mark": b"\xef\xbb\xbf{}",
    "UTF-16": '{"to": "a"}'.encode("utf-16"),
    "UTF-32": '{"to": "a"}'.encode("utf-32"),
    "UTF-8 with surrogates in it": b'{"to": "\xed\xa0\x80"}',
    "a NUL in a string": b'{"to": "\0"}',
    "20,000 values": b"[%b1]" % (b"256," * 20_000),
    "10,002 names and values": b"{%b}" % b",".join(b'"%d":1' % number for number in range(5_001)),
}
# fmt: on


@pytest.mark.parametrize("path", SUBMITTED)
@pytest.mark.parametrize("what", NOT_JSON)
def test_a_body_that_is_not_plain_json_is_refused(api: Api, client: redis.Redis, path: str, what: str) -> None:
    if path != "/emails" and len(NOT_JSON[what]) > SMALL_BODY:
        refused(api, client, path, NOT_JSON[what], 413)
    else:
        refused(api, client, path, NOT_JSON[what], 400, "body")


@pytest.mark.parametrize("path", SUBMITTED)
@pytest.mark.parametrize("raw", [b"[]", b"[{}]", b'"x"', b"1", b"1.5", b"true", b"null"])
def test_a_body_that_is_no_object_is_refused(api: Api, client: redis.Redis, path: str, raw: bytes) -> None:
    refused(api, client, path, raw, 422, "body")


def test_a_body_as_deep_and_as_long_as_is_allowed_is_read(api: Api) -> None:
    def status_of(depth: int, values: int) -> int:
        nested: Any = "x"
        for _ in range(depth - 3):
            nested = [nested]
        use = {"id": "welcome", "variables": {"name": "Ada", "deep": nested, "long": ["x"] * values}}
        return api.post("/emails", {"to": "ada@example.com", "template": use}).status

    besides = 14 + MAX_DEPTH - 3
    assert status_of(MAX_DEPTH, MAX_VALUES - besides) == 200
    assert status_of(MAX_DEPTH, MAX_VALUES - besides + 1) == 400
    assert status_of(MAX_DEPTH + 1, 1) == 400


@pytest.mark.parametrize("path", ["/start-job", "/jobs"])
def test_a_body_over_64_KiB_is_taken_by_emails_only(api: Api, client: redis.Redis, path: str) -> None:
    raw = json.dumps(SUBMITTED[path]).encode().ljust(SMALL_BODY)
    refused(api, client, path, raw + b" ", 413)
    assert api.call("POST", path, raw=raw).status == 202
    assert api.post("/emails", {**MAIL, "text": "x" * SMALL_BODY}).status == 200


SPELLINGS = ["application/json; charset=utf-8", "APPLICATION/JSON", "application/json ;a=b"]
OTHERS = ["", "text/plain", "application/jsonp", "application/problem+json", "json", "é", "text/json"]


@pytest.mark.parametrize(("given", "status"), [*((one, 200) for one in SPELLINGS), *((one, 415) for one in OTHERS)])
def test_the_content_type_must_be_json_however_it_is_spelled(
    api: Api, client: redis.Redis, given: str, status: int
) -> None:
    assert api.call("POST", "/emails", MAIL, {"Content-Type": given}).status == status
    assert len(stored(client)) == (status == 200)


def test_a_body_without_a_content_type_is_refused(api: Api, client: redis.Redis) -> None:
    body = json.dumps(MAIL).encode()
    head = b"POST /emails HTTP/1.0\r\nAuthorization: Bearer full-key\r\nContent-Length: %d\r\n\r\n" % len(body)
    assert [answer.status for answer in spoken(api.port, head + body)] == [415]
    assert client.dbsize() == 0


def test_of_many_large_mails_at_once_most_are_sent_away_and_none_is_half_stored(
    redis_server: RedisServer, client: redis.Redis, tmp_path: Path
) -> None:
    large = {**MAIL, "attachments": [{"filename": "a", "content": "AAAA" * 1_000_000}]}
    raw = json.dumps(large).encode()
    with House(tmp_path, redis_server.url) as house, ThreadPoolExecutor(30) as callers:
        api = house.api()
        answers = list(callers.map(lambda _: api.call("POST", "/emails", raw=raw), range(30)))
        assert {answer.status for answer in answers} == {200, 503}
        assert {answer.headers.get("Retry-After") for answer in answers if answer.status == 503} == {"5"}
        assert stored(client) == {answer.body["id"] for answer in answers if answer.status == 200}
        assert api.call("POST", "/emails", raw=raw).status == 200
