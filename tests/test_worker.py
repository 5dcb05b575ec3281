"""What a worker runs, and what it refuses: only functions of tasks.py, on their own queue, within their time."""

from __future__ import annotations

import hashlib
import inspect
import pkgutil
import socket
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
import redis
from rq import Callback, Queue, Retry, SimpleWorker
from rq.job import Job
from rq.serializers import JSONSerializer
from rq.webhook import Webhook

from settings import Settings
from tests.scripted_relay import Line, ScriptedRelay
from tests.servers import Api, House, RedisServer, Relay, eventually, project_with
from worker import Crew

MAIL = {"to": "ada@example.com", "subject": "s", "text": "t"}


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


def test_each_of_the_crew_is_a_worker_that_rq_knows(house: House, client: redis.Redis) -> None:
    house.environment["WORKER_CONCURRENCY"] = "3"
    process = house.worker("email")
    eventually(lambda: [worker.get_state() for worker in crew(client)] == ["idle"] * 3)
    for worker in crew(client):
        assert (worker.pid, worker.queue_names()) == (process.pid, ["email"])
        assert 60 < int(client.ttl(worker.key)) <= 95
    eventually(lambda: client.exists("rq:scheduler-lock:email"))
    process.terminate()
    assert process.wait(20) == 0
    assert crew(client) == []
    assert not client.exists("rq:scheduler-lock:email")


def test_a_crew_sends_as_many_mails_at_once_as_it_has_workers_and_drains_them(
    house: House, client: redis.Redis
) -> None:
    together = threading.Barrier(5)  # four attempts and the test

    def meet(line: Line) -> str:
        together.wait(20)
        line.say("250 2.0.0 queued")
        return "250 2.0.0 queued"

    with ScriptedRelay({".": meet}) as relay:
        house.environment |= {"SMTP_PORT": str(relay.port), "SMTP_SECURITY": "none", "WORKER_CONCURRENCY": "4"}
        api = house.api()
        ids = [api.post("/emails", MAIL).body["id"] for _ in range(6)]
        process = house.worker("email")
        eventually(lambda: together.n_waiting == 4)
        eventually(lambda: [worker.get_state() for worker in crew(client)] == ["busy"] * 4)
        process.terminate()
        time.sleep(0.5)
        together.wait(20)
        assert process.wait(20) == 0
        states = Counter(api.email(one)["status"] for one in ids)
    assert states == {"sent": 4, "queued": 2}


def test_a_worker_whose_thread_ended_is_replaced(house: House, client: redis.Redis, tmp_path: Path) -> None:
    with Relay() as relay:
        house.environment |= relay.environment(tmp_path) | {"WORKER_CONCURRENCY": "2"}
        api = house.api()
        house.worker("email")
        eventually(lambda: len(crew(client)) == 2)
        first = {worker.name for worker in crew(client)}
        client.config_set("maxmemory", 1)
        client.client_kill_filter(_type="normal", skipme=True)  # the next command is refused, and RQ's worker quits
        eventually(lambda: house.log("worker-email").count("quitting") >= 2)
        client.config_set("maxmemory", 0)
        mail_id = eventually(lambda: api.post("/emails", MAIL).body.get("id"))
        api.wait_for(mail_id, "sent")
        eventually(lambda: len({worker.name for worker in crew(client)} - first) == 2)


def test_a_sign_of_life_from_a_future_that_the_clock_has_left_is_pulled_in(house: House, client: redis.Redis) -> None:
    client.zadd("rq:wip:email", {"a-job:an-execution": time.time() + 3600})
    house.worker("email")
    eventually(lambda: float(client.zscore("rq:wip:email", "a-job:an-execution") or 0) < time.time() + 46)


def test_a_suspended_crew_takes_no_mail(house: House, client: redis.Redis, tmp_path: Path) -> None:
    with Relay() as relay:
        house.environment |= relay.environment(tmp_path) | {"WORKER_CONCURRENCY": "2"}
        api = house.api()
        client.set("rq:suspended", 1)  # as `rq suspend` does
        house.worker("email")
        eventually(lambda: len(crew(client)) == 2)
        mail_id = api.post("/emails", MAIL).body["id"]
        time.sleep(2)
        assert api.email(mail_id)["status"] == "queued"
        client.delete("rq:suspended")
        api.wait_for(mail_id, "sent")


def test_a_mail_costs_eight_round_trips_to_redis(house: House, client: redis.Redis, tmp_path: Path) -> None:
    """What is sent before an answer is waited for: a command, a script, a transaction."""
    with Relay() as relay:
        house.environment |= relay.environment(tmp_path) | {"WORKER_CONCURRENCY": "1"}
        api = house.api()
        house.worker("email")
        api.wait_for(api.post("/emails", MAIL).body["id"], "sent")
        eventually(lambda: any(one["cmd"] == "blmove" for one in client.client_list()))  # it is through with that one
        trips = []
        with client.monitor() as monitor:  # type: ignore[no-untyped-call]
            mail_id = api.post("/emails", MAIL).body["id"]
            for entry in monitor.listen():
                command = entry["command"].split(" ")[0]
                if (entry["client_type"] != "lua" and mail_id in entry["command"]) or command in ("EXEC", "BLMOVE"):
                    trips.append(command)
                if command == "BLMOVE":
                    break
    accept, *deliver = (one for one in trips if one in ("EVALSHA", "HGETALL", "EXEC", "BLMOVE"))
    assert accept == "EVALSHA"
    assert deliver == ["HGETALL", "EXEC", *["EVALSHA"] * 3, "EXEC", "BLMOVE"]  # and the breaker's, without the id


LEANT_ON = {  # what EmailWorker overrides or calls beyond RQ's documentation -> its source in the RQ that we know
    "rq.worker.base:BaseWorker.work": "04b5cdf8e554d8a2",
    "rq.worker.base:BaseWorker.dequeue_job_and_maintain_ttl": "2715cf34d9e3af3b",
    "rq.worker.base:BaseWorker.perform_job": "1f0e40678ae519cf",
    "rq.worker.base:BaseWorker.prepare_job_execution": "d08dd32962e3f82a",
    "rq.worker.base:BaseWorker.handle_job_success": "9dda7c7d3ca18ee6",
    "rq.worker.base:BaseWorker.handle_job_failure": "7432afe53b9f84ec",
    "rq.worker.base:BaseWorker.handle_job_retry": "541a1b09523069c2",
    "rq.worker.base:BaseWorker.handle_execution_ended": "23748b027980a6cd",
    "rq.worker.base:BaseWorker.heartbeat": "63b1089fd146d19c",
    "rq.worker.base:BaseWorker.maintain_heartbeats": "b73451c9b97f7247",
    "rq.worker.base:BaseWorker.run_maintenance_tasks": "3d8a446b5354fce3",
    "rq.worker.base:BaseWorker.clean_registries": "e2c9790c8156c72c",
    "rq.worker.worker_classes:SimpleWorker": "fbf9ab75fb1e46da",
    "rq.executions:prepare_execution": "e8d5a964e2a10d0c",
    "rq.executions:Execution.create": "b167074a0d209e85",
    "rq.executions:Execution.heartbeat": "d5b2cc74931f91b9",
    "rq.job:Job.prepare_for_execution": "4e8e0eca634da20b",
    "rq.job:Job._handle_success": "35b96f8229b6053d",
    "rq.job:Job.set_status": "a093b9649641e3ea",
    "rq.intermediate_queue:IntermediateQueue.cleanup": "e465aaeb5d294870",
    "rq.registry:StartedJobRegistry.cleanup": "c5cd78c27fc023d6",
    "rq.scheduler:RQScheduler.work": "5d1810bdd4392089",
    "rq.scheduler:RQScheduler.enqueue_scheduled_jobs": "a31620c83110baeb",
}


@pytest.mark.parametrize("name", LEANT_ON)
def test_what_the_crew_leans_on_in_rq_is_as_it_was(name: str) -> None:
    """If this fails after an upgrade: read what changed in RQ against worker.EmailWorker, then write the new digest."""
    source = inspect.getsource(pkgutil.resolve_name(name))
    assert hashlib.sha256(source.encode()).hexdigest()[:16] == LEANT_ON[name]


def crew(client: redis.Redis) -> list[SimpleWorker]:
    return SimpleWorker.all(connection=client, serializer=JSONSerializer)  # type: ignore[return-value]


def test_the_worker_says_what_is_missing_and_does_not_start(tmp_path: Path, redis_server: RedisServer) -> None:
    with House(tmp_path, redis_server.url) as house:
        assert house.worker("email").wait(20) == 2
        assert "SMTP_HOST is not set" in house.log("worker-email")
        assert house.worker("nonsense").wait(20) == 2
        assert "usage: worker.py [email|jobs]" in house.log("worker-nonsense")


def test_a_duty_that_goes_wrong_keeps_the_main_thread_from_no_other(
    monkeypatch: pytest.MonkeyPatch, redis_server: RedisServer
) -> None:
    main = Crew(Settings(_env_file=None, redis_url=redis_server.url))
    done: list[str] = []

    def wrong() -> None:
        done.append("schedule")
        raise ZeroDivisionError

    monkeypatch.setattr(main, "schedule", wrong)
    monkeypatch.setattr(main, "pull_in", lambda: done.append("pull_in"))
    monkeypatch.setattr(main.delivery, "sweep", lambda: done.append("sweep"))
    monkeypatch.setattr(main, "man", lambda: done.append("man"))
    main.look_after()
    assert done == ["schedule", "pull_in", "sweep", "man"]
