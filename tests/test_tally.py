"""How many sessions all workers have: what each process writes down of its own."""

from __future__ import annotations

import time

import pytest
import redis

from smtp.tally import Tally, key_of, sessions
from tests.conversations import POOL, another, served
from tests.http_api import MAIL
from tests.relay import Relay
from tests.servers import House, eventually

SESSIONS = key_of("relay")
pytestmark = pytest.mark.usefixtures("nothing_is_left_open")


def test_the_sessions_of_all_that_have_written_lately_are_added_up(client: redis.Redis) -> None:
    now = int(time.time())
    for name, figures in (("1", f"3 2 {now - 50}"), ("2", f"9 9 {now - 70}"), ("3", f"9 9 {now + 3600}"), ("4", "?")):
        client.hset(SESSIONS, name, figures)
    mine = Tally(POOL)
    with served() as (_, to):
        with POOL.conversation(to):
            mine.write(client)
            assert sessions(client) == (4, 2)
        another(to)
        mine.write(client)
        assert sessions(client) == (3, 3)
        client.hdel(SESSIONS, mine.name)
        mine.write(client)  # nothing has changed: it is not due
        assert sessions(client) == (3, 2)
    mine.forget_ended(client)
    assert client.hkeys(SESSIONS) == [b"1"]


def test_a_worker_tells_of_its_sessions_for_as_long_as_it_runs(
    sending: House, relay: Relay, client: redis.Redis
) -> None:
    seen: list[object] = []
    relay.on_data = lambda: eventually(lambda: seen.append(sessions(client)) or seen[-1] == (1, 0))  # type: ignore[func-returns-value]
    api, worker = sending.api(), sending.worker()
    api.wait_for(api.submit(MAIL), "sent")
    assert seen[-1] == (1, 0)
    worker.terminate()
    assert worker.wait(30) == 0
    assert client.hlen(SESSIONS) == 0
    assert "crashed" not in sending.log("worker-email")
