"""The process that delivers, as it is run: beside the others, killed at any moment, and two of it at a time."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import standardwebhooks

from mail.outbox import Outbox
from mail.states import State
from tests.receiver import Got, Receiver
from tests.servers import House, RedisServer, eventually
from tests.test_webhooks import NEW, OLD, end
from webhooks.queue import standings


def deliverer(house: House, name: str = "webhooks") -> Any:
    process = house.run(name, "-m", "webhooks", cwd=house.root)
    eventually(lambda: "webhooks_started" in house.log(name))
    return process


@pytest.fixture
def receiver() -> Any:
    with Receiver() as receiver:
        yield receiver


@pytest.fixture
def told(redis_server: RedisServer, tmp_path: Path, receiver: Receiver) -> Any:
    redis_server.reset()
    settings = {"WEBHOOK_URL": receiver.url, "WEBHOOK_SECRET": f"{NEW},{OLD}"}
    with House(tmp_path, redis_server.url, **settings) as house:
        yield house


def test_a_process_that_is_killed_loses_no_event(client: Any, outbox: Outbox, told: House, receiver: Receiver) -> None:
    """It dies with some of them in hand, after they have arrived and before that is written down."""
    process = deliverer(told)
    eventually(lambda: standings(client))
    seen = 0

    def kill_at_the_tenth(got: Got) -> int:
        nonlocal seen
        seen += 1
        if seen == 10:
            os.kill(process.pid, signal.SIGKILL)
        return 200

    receiver.answer = kill_at_the_tenth
    mails = [end(outbox, State.SENT, end(outbox, State.DELAYED)) for _ in range(30)]
    process.wait(30)
    assert standings(client)[0].waiting > 0
    for mail_id, at in client.zrange("webhook:due:webhook", 0, -1, withscores=True):
        if at >= 10**12:
            client.zadd("webhook:due:webhook", {mail_id: 10**12})  # as if two minutes had passed
    deliverer(told, "second")
    eventually(lambda: standings(client)[0].waiting == 0)
    types: dict[str, dict[str, str]] = {}
    for one in receiver.got:
        standardwebhooks.Webhook(OLD).verify(one.body, one.headers)
        types.setdefault(one.event["data"]["email_id"], {})[one.headers["webhook-id"]] = one.event["type"]
    assert {mail: [*of.values()] for mail, of in types.items()} == {
        mail: ["email.delivery_delayed", "email.sent"] for mail in mails
    }
    assert "very-secret" not in told.log("webhooks") + told.log("second")


def test_two_processes_post_each_event_once_and_end_when_they_are_told_to(
    client: Any, outbox: Outbox, told: House, receiver: Receiver
) -> None:
    both = [deliverer(told, name) for name in ("one", "two")]
    eventually(lambda: standings(client))
    for _ in range(100):
        end(outbox, State.SENT)
    eventually(lambda: standings(client)[0].waiting == 0)
    assert len({one.headers["webhook-id"] for one in receiver.got}) == len(receiver.got) == 100
    receiver.answer = lambda got: time.sleep(1) or 200  # type: ignore[func-returns-value]
    end(outbox, State.SENT)
    eventually(lambda: any(at >= 10**12 for _, at in client.zrange("webhook:due:webhook", 0, -1, withscores=True)))
    for process in both:
        process.send_signal(signal.SIGTERM)
    assert [process.wait(30) for process in both] == [0, 0]
    assert (standings(client)[0].waiting, len(receiver.got)) == (0, 101)


def test_it_goes_on_once_redis_is_back(
    redis_server: RedisServer, client: Any, outbox: Outbox, told: House, receiver: Receiver
) -> None:
    deliverer(told)
    eventually(lambda: standings(client))
    redis_server.kill()
    eventually(lambda: "redis_unavailable" in told.log("webhooks"))
    redis_server.start()
    mail_id = end(outbox, State.SENT)
    [got] = eventually(lambda: list(receiver.got))
    assert got.event["data"]["email_id"] == mail_id
    assert "crashed" not in told.log("webhooks")
