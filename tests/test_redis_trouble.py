"""What the API says when Redis is in trouble: within three seconds, and a mail is then stored whole or not at all.

Redis is killed, stopped, filled, cut off from its disk and made a replica while the API runs.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from secrets import token_hex

import pytest
import redis

from chaos.proxy import Proxy
from tests.http_api import ANY_ID, MAIL, QUEUES, SUBMITTED, app_with, keys, served, stored, submitted
from tests.redis_troubles import TROUBLES, Trouble, configured, killed, stopped
from tests.relay import Relay
from tests.servers import Answer, Api, House, RedisServer, eventually

pytestmark = pytest.mark.usefixtures("client")
every_trouble = pytest.mark.parametrize(("trouble", "said"), TROUBLES, ids=[one.__name__ for one, _ in TROUBLES])


def timed(ask: Callable[[], Answer]) -> tuple[Answer, float]:
    started = time.monotonic()
    return ask(), time.monotonic() - started


@every_trouble
def test_redis_in_trouble_is_said_within_three_seconds_and_leaves_nothing_half_stored(
    api: Api, redis_server: RedisServer, client: redis.Redis, trouble: Trouble, said: str
) -> None:
    before = submitted(api, "/emails")  # so that the connection is there when the trouble begins
    with trouble(redis_server):
        answer, seconds = timed(lambda: api.post("/emails", MAIL, Idempotency_Key="one"))
    assert (answer.status, answer.body["type"]) == (503, "service_unavailable")
    assert said in answer.body["message"]
    assert answer.headers["Retry-After"] == "5"
    assert seconds < 3
    stored_meanwhile = stored(client) - {before}
    again = api.post("/emails", MAIL, Idempotency_Key="one")
    assert again.status == 200
    assert stored(client) == {before, again.body["id"]}
    assert stored_meanwhile <= {again.body["id"]}


def test_a_redis_that_is_full_has_room_left_to_move_what_is_stored(
    redis_server: RedisServer, client: redis.Redis, tmp_path: Path
) -> None:
    """Beyond maxmemory it would not even let a worker take a mail from the queue, for ever."""
    most = int(client.info("memory")["used_memory"]) + 12_000_000
    with (
        configured(redis_server, maxmemory=most),
        Relay() as relay,
        House(
            tmp_path, redis_server.url, SMTP_HOST="127.0.0.1", SMTP_PORT=str(relay.port), SMTP_SECURITY="none"
        ) as house,
    ):
        api = house.api()
        statuses = [api.post("/emails", MAIL | {"text": token_hex(50_000)}).status for _ in range(200)]
        assert sorted(set(statuses)) == [200, 503]
        assert client.info("memory")["used_memory"] < most * 0.98
        house.worker()
        eventually(lambda: len(relay.accepted) == statuses.count(200))
        assert "Traceback" not in house.log("worker-email")


@pytest.mark.parametrize("trouble", [killed, stopped])
def test_no_route_waits_longer_than_three_seconds_for_redis(
    api: Api, redis_server: RedisServer, trouble: Trouble
) -> None:
    asked = [
        ("GET", "/readyz", None),
        *((*one, None) for one in ANY_ID),
        *(("POST", *one) for one in SUBMITTED.items()),
    ]
    with trouble(redis_server), ThreadPoolExecutor(len(asked)) as pool:
        heard = list(pool.map(lambda one: timed(lambda: api.call(*one)), asked))
    assert [answer.status for answer, _ in heard] == [503] * len(asked)
    assert max(seconds for _, seconds in heard) < 3
    assert api.get("/readyz").status == 200


def test_forty_callers_at_once_do_not_wait_for_each_others_time_outs(
    api: Api, redis_server: RedisServer, client: redis.Redis
) -> None:
    submitted(api, "/emails")
    with stopped(redis_server), ThreadPoolExecutor(40) as pool:
        heard = list(pool.map(lambda _: timed(lambda: api.post("/emails", MAIL)), range(40)))
    assert {answer.status for answer, _ in heard} == {503}
    assert max(seconds for _, seconds in heard) < 3
    assert api.post("/emails", MAIL).status == 200
    assert stored(client)


def test_redis_that_restarts_under_load_loses_nothing_that_was_accepted(
    api: Api, redis_server: RedisServer, client: redis.Redis
) -> None:
    enough = threading.Event()

    def submit(_: int) -> list[tuple[Answer, float]]:
        heard = []
        while not enough.is_set():
            heard.append(timed(lambda: api.post("/emails", MAIL)))
        return heard

    with ThreadPoolExecutor(4) as pool:
        runs = [pool.submit(submit, number) for number in range(4)]
        for _ in range(2):
            time.sleep(0.3)
            with killed(redis_server):
                time.sleep(0.2)
        eventually(lambda: api.post("/emails", MAIL).status == 200)
        enough.set()
        heard = [one for run in runs for one in run.result()]
    accepted = {answer.body["id"] for answer, _ in heard if answer.status == 200}
    assert {answer.status for answer, _ in heard} == {200, 503}
    assert accepted <= stored(client)
    assert max(seconds for _, seconds in heard) < 3


@pytest.fixture
def cut_off(redis_server: RedisServer) -> Iterator[tuple[Api, Proxy]]:
    with Proxy(redis_server.port) as proxy:
        app = app_with(f"redis://127.0.0.1:{proxy.port}/0")
        with served(app) as api:
            yield api, proxy
        app.accepting.redis.close()


@pytest.mark.parametrize("path", SUBMITTED)
def test_a_reply_that_was_lost_after_a_mail_was_stored_doubles_nothing_and_is_no_replay(
    cut_off: tuple[Api, Proxy], client: redis.Redis, path: str
) -> None:
    api, proxy = cut_off
    submitted(api, path)  # so that Redis knows the script
    client.flushdb()
    proxy.lose((b"EVALSHA",), 1)
    first, again = (api.post(path, SUBMITTED[path], Idempotency_Key="one") for _ in range(2))
    assert proxy.lost == 1
    assert ("Idempotent-Replayed" in first.headers, "Idempotent-Replayed" in again.headers) == (False, True)
    job_id = first.body.get("id") or first.body["job_id"]
    assert keys(client, "rq:job:*") == {f"rq:job:{job_id}"}
    assert client.lrange(f"rq:queue:{QUEUES[path]}", 0, -1) == [job_id.encode()]


def test_a_lost_reply_to_a_cancellation_is_trouble_and_no_conflict(
    cut_off: tuple[Api, Proxy], client: redis.Redis
) -> None:
    api, proxy = cut_off
    assert api.call("DELETE", f"/jobs/{submitted(api, '/emails')}").status == 200  # from here on Redis knows the script
    mail_id = submitted(api, "/emails")
    proxy.lose((b"EVALSHA",), 1)
    assert api.call("DELETE", f"/jobs/{mail_id}").status == 503
    assert proxy.lost == 1
    assert api.email(mail_id)["status"] == "canceled"
