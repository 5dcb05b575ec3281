"""Jobs taken and ended in one step: what that writes beside what RQ's own worker writes, and what is in the way."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from typing import Any

import pytest
import redis
from rq import Queue, SimpleWorker
from rq.job import Job
from rq.serializers import JSONSerializer

from queues.executions import TO_RUN, Turns
from queues.workers import EmailWorker, make_worker, register
from tests.servers import RedisServer

Kept = dict[str, Any]


@pytest.fixture
def client(redis_server: RedisServer) -> redis.Redis:
    redis_server.reset()
    return redis_server.client()


def kept(client: redis.Redis) -> Kept:
    """Returns all of Redis, with ids by what they name and moments as seconds from now."""
    found: Kept = {}
    for key in sorted(client.scan_iter()):
        match client.type(key):
            case b"hash":
                value: Any = {named(name): named(text) for name, text in client.hgetall(key).items()}
            case b"zset":
                scored: Any = client.zrange(key, 0, -1, withscores=True)
                value = {named(one): since(score) for one, score in scored}
            case b"set":
                value = {named(one) for one in client.smembers(key)}
            case b"list":
                value = [named(one) for one in client.lrange(key, 0, -1)]
            case _:
                value = "stream"
        lifetime = client.ttl(key)  # a worker's list of executions has another with each heartbeat
        found[named(key)] = (value, None if key.endswith(b":executions") else round(lifetime / 10))
    return found


def since(score: float) -> int:
    return round((score - time.time()) / 5)


def named(text: Any) -> str:
    said = re.sub(r"\b[0-9a-f]{32}\b", "HEX", text.decode(errors="replace"))
    said = re.sub(r"\d{4}-\d\d-\d\dT[\d:.]+Z", "MOMENT", said)
    return re.sub(r"\b1\d{9}(\.\d+)?\b", "SECONDS", said)


def enqueue(client: redis.Redis, *functions: str) -> list[Job]:
    queue = Queue("email", connection=client, serializer=JSONSerializer)
    return [queue.enqueue(one, "an-id", job_id=f"job-{at}", result_ttl=900) for at, one in enumerate(functions)]


def ours(client: redis.Redis, deliver: Callable[[str], object]) -> EmailWorker:
    worker = make_worker(EmailWorker, "email", client, {"tasks.deliver": deliver})
    worker.turns = Turns(worker)
    register(worker, client)
    return worker


def as_rq_does(client: redis.Redis, monkeypatch: pytest.MonkeyPatch) -> tuple[Kept, Kept]:
    """Returns what RQ keeps while the job runs and after it."""
    during: list[Kept] = []

    def deliver(_: str) -> str:
        during.append(kept(client))
        return "sent"

    monkeypatch.setattr("tasks.deliver", deliver)
    worker = SimpleWorker(["email"], connection=client, serializer=JSONSerializer, worker_ttl=35)
    monkeypatch.setattr(worker, "get_heartbeat_ttl", lambda *_: 45)
    monkeypatch.setattr(worker, "register_death", lambda: None)
    worker.work(burst=True, logging_level="ERROR")
    return during[0], kept(client)


def as_we_do(client: redis.Redis) -> tuple[Kept, Kept]:
    during: list[Kept] = []

    def deliver(_: str) -> str:
        during.append(kept(client))
        return "sent"

    worker = ours(client, deliver)
    taken = worker.turns.take()
    assert taken
    assert worker.turns.take(worker.perform(taken)) is None
    return during[0], kept(client)


# What RQ writes and we do not: it also says that it is busy in between, and cleans up as it starts.
NOT_OURS = ("rq:clean_", "rq:workers", "rq:worker:HEX", "rq:queues")


def test_what_is_written_is_what_rqs_own_worker_writes(client: redis.Redis, monkeypatch: pytest.MonkeyPatch) -> None:
    enqueue(client, "tasks.deliver")
    theirs = as_rq_does(client, monkeypatch)
    client.flushall()
    enqueue(client, "tasks.deliver")
    mine = as_we_do(client)
    for here, there in zip(mine, theirs, strict=True):
        for name in {*here, *there} - {"rq:results:job-0"}:
            if not name.startswith(NOT_OURS) or name.endswith(":executions"):
                expected, actual = there.get(name), here.get(name)
                if name == "rq:job:job-0" and expected and here is mine[1]:
                    fields = {at: text for at, text in expected[0].items() if at not in TO_RUN}
                    expected = (fields | {"result": '"sent"', "data": actual and actual[0]["data"]}, expected[1])
                assert actual == expected, name
    counted = mine[1]["rq:worker:HEX"][0]
    assert counted["successful_job_count"] == theirs[1]["rq:worker:HEX"][0]["successful_job_count"] == "1"
    assert float(counted["total_working_time"]) < 5


def test_the_next_job_is_taken_in_the_step_in_which_one_ends(client: redis.Redis) -> None:
    enqueue(client, "tasks.deliver", "tasks.deliver")
    worker = ours(client, lambda _: "sent")
    first = worker.turns.take()
    assert first
    second = worker.turns.take(worker.perform(first))
    assert second
    assert (first.job.id, second.job.id) == ("job-0", "job-1")
    assert client.hget("rq:job:job-0", "status") == b"finished"
    assert client.zrange("rq:wip:email", 0, -1) == [f"job-1:{second.execution.id}".encode()]
    worker.turns.end(worker.perform(second))
    assert client.zcard("rq:wip:email") == client.scard(worker.executions_key) == 0


def test_a_job_that_is_on_its_way_already_is_taken_by_its_id(client: redis.Redis) -> None:
    enqueue(client, "tasks.deliver", "tasks.deliver")
    client.lmove("rq:queue:email", "rq:queue:email:intermediate", "RIGHT", "RIGHT")
    taken = ours(client, lambda _: "sent").turns.take(job_id="job-1")
    assert taken
    assert taken.job.id == "job-1"
    assert client.llen("rq:queue:email:intermediate") == 0
    assert client.llen("rq:queue:email") == 1


def test_jobs_that_are_gone_or_unreadable_are_passed_over(client: redis.Redis) -> None:
    enqueue(client, *["tasks.deliver"] * 5)
    client.delete("rq:job:job-0", "rq:job:job-1")
    client.set("rq:job:job-1", "no hash")
    client.hdel("rq:job:job-2", "data")
    client.hset("rq:job:job-3", "timeout", "never")
    taken = ours(client, lambda _: "sent").turns.take()
    assert taken
    assert taken.job.id == "job-4"
    assert client.zrange("jobs:unreadable", 0, -1) == [b"job-1", b"job-2", b"job-3"]
    assert client.zrange("rq:wip:email", 0, -1) == [f"job-4:{taken.execution.id}".encode()]


def test_a_worker_that_is_killed_leaves_its_jobs_to_rqs_maintenance(client: redis.Redis) -> None:
    enqueue(client, "tasks.deliver")
    worker = ours(client, lambda _: "sent")
    assert worker.turns.take()
    entry: Any = client.zrange("rq:wip:email", 0, -1)[0]
    client.zadd("rq:wip:email", {entry: time.time() - 1})
    make_worker(EmailWorker, "email", client, {}).run_maintenance_tasks()  # type: ignore[no-untyped-call]
    assert client.zrange("rq:failed:email", 0, -1) == [b"job-0"]  # without a retry


def test_a_full_redis_still_ends_a_job_and_gives_out_the_next(client: redis.Redis) -> None:
    enqueue(client, *["tasks.deliver"] * 3)
    worker = ours(client, lambda _: "sent")
    taken = worker.turns.take()
    assert taken
    client.config_set("maxmemory", 1)
    try:
        assert worker.turns.take(worker.perform(taken))
        assert worker.turns.take()
    finally:
        client.config_set("maxmemory", 0)


def test_a_job_is_in_the_queue_until_all_of_its_start_is_written(client: redis.Redis) -> None:
    enqueue(client, "tasks.deliver")
    worker = ours(client, lambda _: "sent")
    client.set("rq:wip:email", "no registry")
    with pytest.raises(redis.ResponseError, match="WRONGTYPE"):
        worker.turns.take()
    assert client.lrange("rq:queue:email", 0, -1) == [b"job-0"]
    client.delete("rq:wip:email")
    assert worker.turns.take()
    assert client.llen("rq:queue:email") == 0


def test_what_fails_beside_a_job_is_left_to_the_job(client: redis.Redis) -> None:
    enqueue(client, "tasks.deliver")
    worker = ours(client, lambda _: "sent")
    worker.turns = Turns(worker, "local function beside(id, at) return redis.call('LLEN', 'rq:job:' .. id) end")
    taken = worker.turns.take()
    assert taken
    assert taken.job.beside is None
    assert client.zcard("rq:wip:email") == 1
