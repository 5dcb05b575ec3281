"""`@task(concurrency=1)`: so many jobs of a task at the same time, over all workers; the others wait, none is lost."""

from __future__ import annotations

import os
import signal
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import fakeredis
import pytest
import redis
from rq.rate_limit import RateLimitRegistry

from queues import keys
from queues.jobs import Call, Jobs, Policy
from queues.table import JOBS
from tests.http_api import fail
from tests.servers import Api, House, eventually, project_with

ALONE = """
@task(concurrency=1, retry_in=(0,))
def alone(seconds: float = 0.3) -> list[float]:
    import time
    began = time.time()
    time.sleep(seconds)
    return [began, time.time()]
"""


@pytest.fixture
def house(sending: House, tmp_path: Path) -> House:
    sending.root = project_with(tmp_path, ALONE)
    return sending


def submit(api: Api, **args: float) -> str:
    return str(api.post("/jobs", {"task": "alone", "args": args}).body["job_id"])


def seen(api: Api, job_id: str) -> dict[str, Any]:
    return dict(api.get(f"/jobs/{job_id}").body)


def test_jobs_of_a_task_run_one_after_the_other_on_two_workers_in_the_order_of_their_requests(house: House) -> None:
    api = house.api()
    ids = [submit(api) for _ in range(6)]
    assert [seen(api, one)["status"] for one in ids] == ["queued"] + ["rate_limited"] * 5
    assert 'async_email_queue_jobs{queue="jobs",state="rate_limited"} 5.0' in api.get("/metrics").body
    for _ in range(2):
        house.worker("jobs")
    ran = eventually(lambda: [result for one in ids if (result := seen(api, one).get("result"))][5:] and ids)
    times = [seen(api, one)["result"] for one in ran]
    assert all(ended <= began for (_, ended), (began, _) in pairwise(times))


def test_what_a_killed_worker_held_goes_to_the_next_and_its_job_runs_again(house: House, client: redis.Redis) -> None:
    api, worker = house.api(), house.worker("jobs")
    first, second = submit(api, seconds=1), submit(api)
    eventually(lambda: seen(api, first)["status"] == "started")
    for process in Path("/proc").glob("[0-9]*"):  # as systemd does: also the one that runs the job, a group of its own
        if os.getsid(int(process.name)) == worker.pid:
            os.kill(int(process.name), signal.SIGKILL)
    leases: Any = client.zrange("rq:wip:jobs", 0, -1)
    client.zadd("rq:wip:jobs", dict.fromkeys(leases, time.time() - 1))  # as it is after a minute and a half
    house.worker("jobs")
    eventually(lambda: seen(api, first)["status"] == seen(api, second)["status"] == "finished")


LIMIT = f"{JOBS}:tasks.alone"
IDS = [f"{letter}0000000-0000-4000-8000-000000000000" for letter in "cba"]


def test_a_job_that_waits_can_be_canceled_and_one_that_failed_waits_again() -> None:
    jobs, (first, second, third) = Jobs(fakeredis.FakeRedis()), IDS
    for one in IDS:
        policy = Policy(60, (), 100, 200, concurrency=1)
        jobs.accept(jobs.acceptance(JOBS, "tasks.alone", {one: Call((), {})}, policy))
    waiting = jobs.redis.zrange(keys.waiting(LIMIT), 0, -1)
    assert waiting == [second.encode(), third.encode()]  # in the order of their requests, not of their ids
    jobs.cancel(second)
    fail(jobs.redis, jobs.fetch(first))
    jobs.requeue(first)
    assert [jobs.fetch(one).get_status() for one in (first, third)] == ["rate_limited"] * 2
    jobs.cancel(third)
    RateLimitRegistry(LIMIT, jobs.redis).cleanup()  # of RQ's maintenance: the place of one that left without a word
    assert jobs.fetch(first).get_status() == "queued"
    assert jobs.redis.lrange(keys.queue(JOBS), 0, -1) == [first.encode()]
    jobs.cancel(first)
    RateLimitRegistry(LIMIT, jobs.redis).cleanup()
    assert jobs.redis.keys("*") == [b"rq:queues"]
