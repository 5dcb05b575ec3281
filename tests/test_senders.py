"""The threads that run a worker's jobs: none is forgotten, whatever happens to another."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import redis

from queues import running
from queues.connection import Unavailable, connect
from queues.heartbeat import on_heartbeat
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
def during() -> list[Callable[[], object]]:
    """What a job does."""
    return []


@pytest.fixture
def senders(
    redis_server: RedisServer,
    client: redis.Redis,
    done: list[str],
    troubles: list[Exception],
    during: list[Callable[[], object]],
) -> Iterator[Senders]:
    def is_paused() -> bool:
        if troubles and threading.current_thread().name == "waiter":
            raise troubles.pop()
        return False

    def deliver(_: str) -> str:
        for act in during:
            act()
        done.append(running.run_by())
        return "sent"

    worker = ours(client, deliver)
    kept = Senders(worker, connect(redis_server.url), 1, is_paused)
    yield kept
    kept.stop()
    kept.join(10)
    if kept.waiter:
        kept.waiter.join(10)  # else it takes a job of the next test's


def test_a_job_is_found_after_what_the_waiting_thread_could_not_bear(
    client: redis.Redis, senders: Senders, done: list[str], troubles: list[Exception]
) -> None:
    troubles += [Unavailable("Redis does not answer"), ValueError()]
    eventually(lambda: senders.replenish() or not troubles)  # type: ignore[func-returns-value]
    enqueue(client, "tasks.deliver")
    eventually(lambda: senders.replenish() or done)  # type: ignore[func-returns-value]


@pytest.mark.parametrize(
    ("number", "stopping", "taken"), [(1, False, ["job-1", "job-2", ""]), (2, False, [""]), (1, True, [""])]
)
def test_a_job_is_taken_ahead_and_held_only_if_nobody_else_could_run_it(
    client: redis.Redis,
    senders: Senders,
    done: list[str],
    during: list[Callable[[], object]],
    number: int,
    stopping: bool,
    taken: list[str],
) -> None:
    senders.number = number
    if number == 2:
        senders.replenish()
        eventually(lambda: senders.idle == 2)
    seen: list[tuple[str, int]] = []

    def act() -> None:
        if stopping:
            senders.stop()
        job_id, _ = running.take_next()
        seen.append((job_id, len(on_heartbeat.__self__.all)))  # type: ignore[attr-defined]

    during.append(act)
    enqueue(client, *["tasks.deliver"] * (1 if number == 2 else 3))
    senders.replenish()
    eventually(lambda: len(done) == len(taken))
    assert seen == [(one, 2 if one else 1) for one in taken]
    eventually(lambda: client.zcard("rq:finished:email") == len(taken) and not client.zcard("rq:wip:email"))
    assert client.llen("rq:queue:email") == (2 if stopping else 0)
    assert int(client.hget(senders.worker.key, "successful_job_count") or 0) == len(taken)


def test_a_job_that_is_found_as_the_worker_ends_goes_back(
    client: redis.Redis, senders: Senders, monkeypatch: pytest.MonkeyPatch
) -> None:
    enqueue(client, "tasks.deliver", "tasks.deliver")
    blmove = senders.waiting.blmove

    def stopped_meanwhile(*words: Any) -> Any:
        senders.stop()
        return blmove(*words)

    monkeypatch.setattr(senders.waiting, "blmove", stopped_meanwhile)
    assert senders._find_one()
    assert client.lrange("rq:queue:email", 0, -1) == [b"job-0", b"job-1"]
    assert client.llen("rq:queue:email:intermediate") == 0


def test_a_sender_that_is_to_stop_waits_for_no_redis(
    client: redis.Redis, senders: Senders, during: list[Callable[[], object]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It asked again for as long as Redis was away, until systemd killed it."""

    def fail(_: object) -> None:
        raise Unavailable("Redis does not answer")

    monkeypatch.setattr(senders.worker.turns, "end", fail)
    during.append(senders.stop)
    enqueue(client, "tasks.deliver")
    senders.replenish()
    eventually(lambda: senders.stopping)
    senders.join(10)
    assert not senders.threads
