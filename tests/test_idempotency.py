"""Idempotency-Key: the same request is answered again and done once."""

from __future__ import annotations

from typing import Any

import pytest
import redis

from tests.http_api import ACCEPTED, JOB, MAIL, SUBMITTED, app_with, held_to_the_shape, keys, served
from tests.servers import Api, RedisServer

pytestmark = pytest.mark.usefixtures("client")


@pytest.mark.parametrize("path", SUBMITTED)
def test_a_request_with_the_same_key_is_answered_again_and_done_once(api: Api, client: redis.Redis, path: str) -> None:
    first = api.post(path, SUBMITTED[path], Idempotency_Key="order 66")
    reordered = dict(reversed(SUBMITTED[path].items()))
    again = [api.post(path, body, Idempotency_Key="order 66") for body in (SUBMITTED[path], reordered)]
    assert {answer.status for answer in (first, *again)} == {ACCEPTED[path]}
    assert all(answer.body == first.body for answer in again)
    assert [answer.headers.get("Idempotent-Replayed") for answer in (first, *again)] == [None, "true", "true"]
    assert len(keys(client, "rq:job:*")) == 1


@pytest.mark.parametrize(
    ("path", "change"),
    [("/emails", {"subject": "Other"}), ("/start-job", {"name": "Eve"}), ("/jobs", {"args": {"hours": 2}})],
)
def test_the_same_key_for_another_request_is_a_conflict(
    api: Api, client: redis.Redis, path: str, change: dict[str, Any]
) -> None:
    assert api.post(path, SUBMITTED[path], Idempotency_Key="one").status == ACCEPTED[path]
    answer = api.post(path, SUBMITTED[path] | change, Idempotency_Key="one")
    assert (answer.status, answer.body["name"]) == (409, "invalid_idempotent_request")
    assert len(keys(client, "rq:job:*")) == 1


@pytest.mark.parametrize("given", ["x", "x" * 256, '!"#$%&/()=?', "0"])
def test_a_key_may_have_1_to_256_printable_characters(api: Api, given: str) -> None:
    first, again = (api.post("/emails", MAIL, Idempotency_Key=given) for _ in range(2))
    assert first.body == again.body


@pytest.mark.parametrize("given", ["", "x" * 257, "a\tb", "é"])
def test_a_key_of_the_wrong_length_or_characters_is_refused(api: Api, client: redis.Redis, given: str) -> None:
    held_to_the_shape(api.post("/emails", MAIL, Idempotency_Key=given), 400, "invalid_idempotency_key")
    assert client.dbsize() == 0


def test_an_idempotency_key_belongs_to_one_api_key_and_one_endpoint(api: Api, client: redis.Redis) -> None:
    sender = Api(api.port, "send-key")
    ids = {
        next(iter(one.post(path, SUBMITTED[path], Idempotency_Key="one").body.values()))
        for one, path in ((api, "/emails"), (sender, "/emails"), (api, "/start-job"), (api, "/jobs"))
    }
    assert len(ids) == len(keys(client, "rq:job:*")) == 4


def test_a_key_is_remembered_for_IDEMPOTENCY_TTL(redis_server: RedisServer, client: redis.Redis) -> None:
    with served(app_with(redis_server.url, idempotency_ttl="2h")) as api:
        api.post("/emails", MAIL, Idempotency_Key="one")
        api.post("/jobs", JOB, Idempotency_Key="two")
    assert len(keys(client, "idempotency:*")) == 2
    for key in keys(client, "idempotency:*"):
        assert 7100 < client.ttl(key) <= 7200


def test_a_refused_request_does_not_use_its_key_up(api: Api, client: redis.Redis) -> None:
    for path, body in SUBMITTED.items():
        assert api.post(path, {**body, "nonsense": 1}, Idempotency_Key="one").status == 422
        assert client.dbsize() == 0
        answer = api.post(path, body, Idempotency_Key="one")
        assert (answer.status, answer.headers.get("Idempotent-Replayed")) == (ACCEPTED[path], None)
        client.flushall()
