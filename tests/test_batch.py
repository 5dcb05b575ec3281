"""POST /emails/batch: all or none, or those that can be sent."""

from __future__ import annotations

import pytest
import redis

from tests.http_api import MAIL, fields, refused, stored
from tests.servers import Answer, Api

pytestmark = pytest.mark.usefixtures("client")
BAD = {**MAIL, "to": ["ada@example.com", "nobody"]}


def ids(answer: Answer) -> list[str]:
    return [one["id"] for one in answer.body["data"]]


def batch(api: Api, body: object, **headers: str) -> Answer:
    return api.post("/emails/batch", body, **headers)


def test_a_batch_is_stored_whole_and_its_ids_stand_in_its_order(api: Api, client: redis.Redis) -> None:
    answer = batch(api, [{**MAIL, "subject": str(number)} for number in range(100)])
    assert answer.status == 200
    assert stored(client) == set(ids(answer))
    assert [api.email(one)["subject"] for one in ids(answer)] == [str(number) for number in range(100)]
    queued: list[bytes] = client.lrange("rq:queue:email", 0, -1)  # type: ignore[assignment]
    assert [one.decode() for one in queued] == ids(answer)


def test_a_batch_costs_one_round_trip(api: Api, client: redis.Redis) -> None:
    batch(api, [MAIL])
    before = client.info("commandstats")["cmdstat_evalsha"]["calls"]
    commands = client.info("stats")["total_commands_processed"]
    batch(api, [MAIL] * 100, Idempotency_Key="k")
    assert client.info("commandstats")["cmdstat_evalsha"]["calls"] == before + 1
    assert client.info("stats")["total_commands_processed"] - commands < 1400  # of the script, and ours


def test_one_bad_mail_keeps_a_batch_out(api: Api, client: redis.Redis) -> None:
    refused(api, client, "/emails/batch", [MAIL, BAD, {**MAIL, "subject": 1}], 422, "[1].to[1]", "[2].subject")


def test_a_permissive_batch_takes_the_good_and_tells_of_the_bad(api: Api, client: redis.Redis) -> None:
    answer = batch(api, [MAIL, BAD, MAIL], x_batch_validation="permissive", Idempotency_Key="k")
    assert answer.status == 200
    assert stored(client) == set(ids(answer))
    assert len(ids(answer)) == 2
    [error] = answer.body["errors"]
    assert error["index"] == 1
    assert error["message"].startswith("[1].to[1]: is not an e-mail address")
    again = batch(api, [MAIL, BAD, MAIL], x_batch_validation="permissive", Idempotency_Key="k")
    assert (again.body, again.headers["Idempotent-Replayed"]) == (answer.body, "true")
    assert batch(api, [MAIL], x_batch_validation="permissive").body["errors"] == []
    assert batch(api, [BAD], x_batch_validation="permissive").body["data"] == []


def test_a_repeated_batch_is_queued_once_and_another_under_its_key_not_at_all(api: Api, client: redis.Redis) -> None:
    first = batch(api, [MAIL, MAIL], Idempotency_Key="k")
    again = batch(api, [MAIL, MAIL], Idempotency_Key="k")
    assert (again.status, again.body) == (200, first.body)
    assert batch(api, [MAIL], Idempotency_Key="k").status == 409
    assert stored(client) == set(ids(first))


@pytest.mark.parametrize("body", [[], [MAIL] * 101, MAIL, "x", None])
def test_what_is_no_batch_is_refused(api: Api, client: redis.Redis, body: object) -> None:
    refused(api, client, "/emails/batch", body, 422, "body")


def test_a_third_way_to_validate_a_batch_is_refused(api: Api, client: redis.Redis) -> None:
    answer = batch(api, [MAIL], x_batch_validation="loose")
    assert (answer.status, fields(answer)) == (400, ["x-batch-validation"])
    assert client.dbsize() == 0
