"""The threads that run a worker's jobs: none is forgotten, whatever happens to another."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
import redis

from queues.connection import Unavailable, connect
from queues.senders import Senders
from tests.servers import RedisServer, eventually
from tests.test_executions import client as client
from tests.test_executions import enqueue, ours


@pytest.fixture
def done() -> list[str]:
    return []


@pytest.fixture
def troubles() -> list[Exception]:
    """What goes wrong where the thread that waits for jobs asks whether it may."""
    return []


@pytest.fixture
def senders(
    redis_server: RedisServer, client: redis.Redis, done: list[str], troubles: list[Exception]
) -> Iterator[Senders]:
    def is_paused() -> bool:
        if troubles and threading.current_thread().name == "waiter":
            raise troubles.pop()
        return False

    worker = ours(client, lambda one: done.append(one) or "sent")  # type: ignore[func-returns-value]
    kept = Senders(worker, connect(redis_server.url), 1, is_paused)
    yield kept
    kept.stop()
    kept.join(10)
    assert kept.waiter
    kept.waiter.join(10)  # else it takes a job of the next test's


def test_a_job_is_found_after_what_the_waiting_thread_could_not_bear(
    client: redis.Redis, senders: Senders, done: list[str], troubles: list[Exception]
) -> None:
    troubles += [Unavailable("Redis does not answer"), ValueError()]
    eventually(lambda: senders.replenish() or not troubles)  # type: ignore[func-returns-value]
    enqueue(client, "tasks.deliver")
    eventually(lambda: senders.replenish() or done)  # type: ignore[func-returns-value]
