"""`priority`: a login code does not wait behind a newsletter."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from queues import health
from queues.connection import connect
from queues.jobs import Jobs
from tests.http_api import MAIL, fields, job_of
from tests.relay import Relay
from tests.servers import Api, House, RedisServer, eventually

LISTS = {"high": "rq:queue:email", "normal": "rq:queue:email", "bulk": "rq:queue:bulk"}


def test_each_priority_waits_in_its_own_place(api: Api, client: Any, redis_server: RedisServer) -> None:
    ids = {one: api.submit(MAIL | ({"priority": one} if one else {})) for one in ("", "normal", "bulk", "high")}
    assert client.lrange("rq:queue:email", 0, -1) == [ids[one].encode() for one in ("high", "", "normal")]
    assert client.lrange("rq:queue:bulk", 0, -1) == [ids["bulk"].encode()]
    assert {one: api.email(mail_id)["priority"] for one, mail_id in ids.items()} == {
        one: one or "normal" for one in ids
    }
    assert job_of(client, ids["high"]).should_enqueue_at_front()
    with connect(redis_server.url) as redis:
        seen = health.queue_states(Jobs(redis))["email"]
        assert (seen.jobs["queued"], seen.jobs["bulk"], health.state(Jobs(redis))["queued"]) == (3, 1, 4)


def test_the_job_that_waits_longest_is_found_behind_those_in_a_hurry(api: Api, client: Any) -> None:
    old = api.submit(MAIL)
    client.hset(f"rq:job:{old}", "enqueued_at", "2026-11-21T12:30:00.000000Z")
    for _ in range(5):
        api.submit(MAIL | {"priority": "high"})
    assert api.get("/readyz").body["oldest_queued_seconds"] > 86400


@pytest.mark.parametrize("given", ["urgent", "HIGH", 1, ""])
def test_another_priority_is_refused(api: Api, client: Any, given: object) -> None:
    answer = api.post("/emails", MAIL | {"priority": given})
    assert (answer.status, fields(answer)) == (422, ["priority"])
    assert "high" in answer.body["message"]
    assert client.dbsize() == 0


def test_what_is_in_a_hurry_goes_first_and_bulk_mail_last_and_none_is_left(
    redis_server: RedisServer, client: Any, relay: Relay, tmp_path: Path
) -> None:
    with House(
        tmp_path, redis_server.url, WORKER_CONCURRENCY="1", SMTP_RATE="20/s", **relay.environment(tmp_path)
    ) as house:
        api = house.api()
        bulk = [MAIL | {"to": f"bulk{one}@example.com", "priority": "bulk"} for one in range(100)]
        api.post("/emails/batch", bulk)
        for one in range(3):
            api.submit(MAIL | {"to": f"normal{one}@example.com"})
        api.submit(MAIL | {"to": "high@example.com", "priority": "high"})
        house.worker()
        eventually(lambda: len(relay.accepted) == 104)
    got = [one.recipients[0].partition("@")[0] for one in relay.accepted]
    assert got[0] == "high"
    assert max(got.index(f"normal{one}") for one in range(3)) < 50  # in a line of their own, beside that of bulk mail
