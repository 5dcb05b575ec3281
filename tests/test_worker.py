"""What a worker runs, and what it refuses: only functions of tasks.py, on their own queue, within their time."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
import redis
from rq import Callback, Queue, Retry
from rq.job import Job
from rq.serializers import JSONSerializer
from rq.webhook import Webhook

from tests.servers import Api, House, RedisServer, eventually, project_with


@pytest.fixture
def client(redis_server: RedisServer) -> Iterator[redis.Redis]:
    redis_server.reset()
    with redis_server.client() as client:
        yield client


@pytest.fixture
def house(redis_server: RedisServer, client: redis.Redis, tmp_path: Path) -> Iterator[House]:
    with House(tmp_path, redis_server.url, SMTP_HOST="127.0.0.1", SMTP_PORT="9") as house:
        yield house


def status(client: redis.Redis, job: Job) -> str:
    return str(Job.fetch(job.id, client, serializer=JSONSerializer).get_status().value)


def failure(client: redis.Redis, job: Job) -> str:
    result = Job.fetch(job.id, client, serializer=JSONSerializer).latest_result()
    return str(result.exc_string) if result else ""


@pytest.mark.parametrize("queue", ["email", "jobs"])
@pytest.mark.parametrize(
    "function", ["os.system", "builtins.eval", "tasks.outbox", "tasks.settings.load", "worker.main", "nothing.at.all"]
)
def test_a_job_that_names_any_other_function_is_refused_at_once(
    house: House, client: redis.Redis, tmp_path: Path, queue: str, function: str
) -> None:
    proof = tmp_path / "ran"
    job = Queue(queue, connection=client, serializer=JSONSerializer).enqueue(
        function, f"touch {proof}", retry=Retry(max=5, interval=1)
    )
    house.worker(queue)
    eventually(lambda: status(client, job) == "failed")
    assert not proof.exists()
    assert "does not offer" in failure(client, job)


def test_each_queue_runs_its_own_functions_only(house: House, client: redis.Redis) -> None:
    lost = Queue("jobs", connection=client, serializer=JSONSerializer).enqueue("tasks.deliver", "an-id")
    stray = Queue("email", connection=client, serializer=JSONSerializer).enqueue("tasks.why_failed", hours=1)
    house.worker("jobs")
    house.worker("email")
    eventually(lambda: status(client, lost) == status(client, stray) == "failed")


def test_callbacks_that_a_job_brings_are_not_run(house: House, client: redis.Redis, tmp_path: Path) -> None:
    queue = Queue("jobs", connection=client, serializer=JSONSerializer)
    job = queue.enqueue("tasks.why_failed", on_success=Callback("os.abort"), on_failure=Callback("os.abort"))
    house.worker("jobs")
    eventually(lambda: status(client, job) == "finished")
    assert status(client, job) == "finished"


def test_a_webhook_that_a_job_brings_is_not_called(house: House, client: redis.Redis) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(0.5)
        hook = Webhook(f"http://127.0.0.1:{listener.getsockname()[1]}/", "finished")
        job = Queue("jobs", connection=client, serializer=JSONSerializer).enqueue("tasks.why_failed", webhooks=[hook])
        house.worker("jobs")
        eventually(lambda: status(client, job) == "finished")
        with pytest.raises(TimeoutError):
            listener.accept()


def test_an_offered_task_runs_and_its_result_can_be_read(house: House, client: redis.Redis) -> None:
    api = house.api()
    house.worker("jobs")
    answer = api.post("/jobs", {"task": "why_failed", "args": {"hours": 2}})
    assert answer.status == 202
    eventually(lambda: api.get(f"/jobs/{answer.body['job_id']}").body["status"] == "finished")
    assert api.get(f"/jobs/{answer.body['job_id']}").body["result"] == {}
    assert f"task_finished id={answer.body['job_id']} task=why_failed" in house.log("worker-jobs")


def test_why_failed_counts_the_mails_that_failed_by_reason(house: House, client: redis.Redis) -> None:
    api = house.api()
    for number, (reason, hours_ago) in enumerate([("550 at rcpt", 1), ("550 at rcpt", 2), ("554 at dot", 40)]):
        client.zadd("rq:failed:email", {f"mail-{number}": 1})
        now = float(client.time()[0])
        client.hset(f"mail:mail-{number}", mapping={"reason": reason, "settled_at": now - hours_ago * 3600})
    house.worker("jobs")
    answer = api.post("/jobs", {"task": "why_failed"})
    assert finished(api, answer.body["job_id"]) == {"550 at rcpt": 2}
    answer = api.post("/jobs", {"task": "why_failed", "args": {"hours": 100}})
    assert finished(api, answer.body["job_id"]) == {"550 at rcpt": 2, "554 at dot": 1}


def finished(api: Api, job_id: str) -> object:
    eventually(lambda: api.get(f"/jobs/{job_id}").body["status"] == "finished")
    return api.get(f"/jobs/{job_id}").body["result"]


def test_a_task_that_hangs_is_killed_after_its_time(house: House, client: redis.Redis, tmp_path: Path) -> None:
    house.root = project_with(
        tmp_path, "@task(timeout=1, retry_in=())\ndef hang() -> None:\n    import time; time.sleep(60)\n"
    )
    api = house.api()
    house.worker("jobs")
    answer = api.post("/jobs", {"task": "hang"})
    eventually(lambda: api.get(f"/jobs/{answer.body['job_id']}").body["status"] == "failed")
    assert "JobTimeoutException" in api.get(f"/jobs/{answer.body['job_id']}").body["error"]


def test_the_worker_says_what_is_missing_and_does_not_start(tmp_path: Path, redis_server: RedisServer) -> None:
    with House(tmp_path, redis_server.url) as house:
        assert house.worker("email").wait(20) == 2
        assert "SMTP_HOST is not set" in house.log("worker-email")
        assert house.worker("nonsense").wait(20) == 2
        assert "usage: worker.py [email|jobs]" in house.log("worker-nonsense")
