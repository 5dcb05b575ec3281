"""What a worker runs, and what it refuses: only functions of tasks.py, on their own queue, within their time."""

from __future__ import annotations

import os
import pkgutil
import signal
import socket
import subprocess
import threading
import time
from collections import Counter
from pathlib import Path
from types import FunctionType

import pytest
import redis
from rq import Callback, Queue, Retry, SimpleWorker
from rq.job import Job
from rq.serializers import JSONSerializer
from rq.webhook import Webhook

from mail import delivery
from mail.outbox import Outbox
from queues import health
from queues.connection import connect
from queues.jobs import Jobs
from queues.pipelining import PipeliningRedis
from queues.table import QUEUES
from queues.workers import JobsWorker, make_worker
from settings import Settings
from tests.http_api import JOB
from tests.redis_troubles import configured
from tests.relay import Relay
from tests.scripted_relay import Line, ScriptedRelay
from tests.servers import House, RedisServer, eventually, project_with
from tests.test_structure import digest_of
from worker import WorkerPool

MAIL = {"to": "ada@example.com", "subject": "s", "text": "t"}


@pytest.fixture
def house(sending: House) -> House:
    return sending


def status(client: redis.Redis, job: Job) -> str:
    return str(Job.fetch(job.id, client, serializer=JSONSerializer).get_status().value)


def failure(client: redis.Redis, job: Job) -> str:
    result = Job.fetch(job.id, client, serializer=JSONSerializer).latest_result()
    return str(result.exc_string) if result else ""


FOREIGN = ("os.system", "builtins.eval", "tasks.outbox", "tasks.settings.load", "worker.main", "nothing.at.all")


@pytest.mark.parametrize(("queue", "of_the_other"), [("email", "tasks.why_failed"), ("jobs", "tasks.deliver")])
def test_a_job_that_names_a_function_its_queue_does_not_offer_is_refused_at_once(
    house: House, client: redis.Redis, tmp_path: Path, queue: str, of_the_other: str
) -> None:
    proof, rq_queue = tmp_path / "ran", Queue(queue, connection=client, serializer=JSONSerializer)
    again = Retry(max=5, interval=600)
    jobs = [rq_queue.enqueue(name, f"touch {proof}", retry=again) for name in (*FOREIGN, of_the_other)]
    house.worker(queue)
    eventually(lambda: {status(client, job) for job in jobs} == {"failed"})
    assert all("does not offer" in failure(client, job) for job in jobs)
    assert not proof.exists()


def test_callbacks_and_webhooks_that_a_job_brings_are_not_called(house: House, client: redis.Redis) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(0.5)
        job = Queue("jobs", connection=client, serializer=JSONSerializer).enqueue(
            "tasks.why_failed",
            on_success=Callback("os.abort"),
            on_failure=Callback("os.abort"),
            webhooks=[Webhook(f"http://127.0.0.1:{listener.getsockname()[1]}/", "finished")],
        )
        house.worker("jobs")
        eventually(lambda: status(client, job) == "finished")
        with pytest.raises(TimeoutError):
            listener.accept()
    assert status(client, job) == "finished"


def test_a_mail_that_is_refused_is_one_line_in_the_log_and_in_the_failed_registry(
    house: House, client: redis.Redis, tmp_path: Path
) -> None:
    with Relay() as relay:
        relay.rcpt["ada@example.com"] = ["550 5.1.1 no such user"]
        house.environment |= relay.environment(tmp_path) | {"LOG_LEVEL": "INFO"}
        api = house.api()
        house.worker("email")
        mail_id = api.post("/emails", MAIL).body["id"]
        api.wait_for(mail_id, "failed")
        eventually(lambda: api.get(f"/jobs/{mail_id}").body["status"] == "failed")
    job = Job.fetch(mail_id, client, serializer=JSONSerializer)
    assert failure(client, job) == "mail.delivery.Failed: 550 at rcpt\n"
    assert job.id in job.failed_job_registry.get_job_ids()
    assert api.get(f"/jobs/{mail_id}").body["error"] == "mail.delivery.Failed: 550 at rcpt"
    lines = [line for line in house.log("worker-email").splitlines() if mail_id in line or " INFO " not in line]
    assert [line.partition(" INFO ")[2] for line in lines] == [f'failed id={mail_id} reason="550 at rcpt"']


def test_a_task_may_fail_in_an_ordinary_way_and_else_has_its_traceback(
    house: House, client: redis.Redis, tmp_path: Path
) -> None:
    task = "@task(retry_in=(0,))\ndef look(ordinary: bool) -> None:\n    {}\n"
    body = "from queues.jobs import JobFailed\n    raise JobFailed('no such customer') if ordinary else KeyError('x')"
    house.root = project_with(tmp_path / "project", task.format(body))
    api = house.api()
    house.worker("jobs")
    for ordinary in (True, False):
        job_id = api.post("/jobs", {"task": "look", "args": {"ordinary": ordinary}}).body["job_id"]
        eventually(lambda job_id=job_id: api.get(f"/jobs/{job_id}").body["status"] == "failed")  # type: ignore[misc]
        kept = failure(client, Job.fetch(job_id, client, serializer=JSONSerializer))
        assert (kept == "queues.jobs.JobFailed: no such customer\n") == ordinary
        assert ("Traceback" in kept) != ordinary
        assert ("Traceback" in house.log("worker-jobs")) != ordinary


def test_an_offered_task_runs_and_its_result_can_be_read(house: House, client: redis.Redis) -> None:
    """why_failed counts the mails that failed, by reason."""
    api = house.api()
    for number, (reason, hours_ago) in enumerate([("550 at rcpt", 1), ("550 at rcpt", 2), ("554 at dot", 40)]):
        client.zadd("rq:failed:email", {f"mail-{number}": 1})
        now = float(client.time()[0])
        client.hset(f"mail:mail-{number}", mapping={"reason": reason, "settled_at": now - hours_ago * 3600})
    house.worker("jobs")

    def result_with(**args: int) -> object:
        job_id = api.post("/jobs", {"task": "why_failed", "args": args}).body["job_id"]
        eventually(lambda: api.get(f"/jobs/{job_id}").body["status"] == "finished")
        assert f"task_finished id={job_id} task=why_failed" in house.log("worker-jobs")
        return api.get(f"/jobs/{job_id}").body["result"]

    assert result_with() == {"550 at rcpt": 2}
    assert result_with(hours=100) == {"550 at rcpt": 2, "554 at dot": 1}


def test_a_task_that_hangs_is_killed_after_its_time(house: House, client: redis.Redis, tmp_path: Path) -> None:
    house.root = project_with(
        tmp_path, "@task(timeout=1, retry_in=())\ndef hang() -> None:\n    import time; time.sleep(60)\n"
    )
    api = house.api()
    house.worker("jobs")
    answer = api.post("/jobs", {"task": "hang"})
    eventually(lambda: api.get(f"/jobs/{answer.body['job_id']}").body["status"] == "failed")
    assert "JobTimeoutException" in api.get(f"/jobs/{answer.body['job_id']}").body["error"]


def test_a_process_is_one_worker_that_rq_knows(house: House, client: redis.Redis) -> None:
    process = house.worker("email")
    eventually(lambda: [worker.get_state() for worker in registered(client)] == ["idle"])
    [one] = registered(client)
    assert (one.pid, one.queue_names()) == (process.pid, ["email"])
    assert 60 < int(client.ttl(one.key)) <= 95
    eventually(lambda: client.exists("rq:scheduler-lock:email"))
    process.terminate()
    assert process.wait(20) == 0
    assert registered(client) == []
    assert not client.exists("rq:scheduler-lock:email")


def test_workers_that_redis_has_forgotten_are_registered_again(house: House, client: redis.Redis) -> None:
    """With FLUSHALL, or since they stood still for long. RQ registers a worker at its birth alone."""
    house.worker("email")
    house.worker("jobs")
    eventually(lambda: Counter(worker.queue_names()[0] for worker in registered(client)) == {"email": 1, "jobs": 1})
    before = {worker.name for worker in registered(client)}
    client.flushall()
    eventually(lambda: {worker.name for worker in registered(client)} == before)  # each says something every 20 seconds
    eventually(lambda: {worker.get_state() for worker in registered(client)} == {"idle"})
    states = health.queue_states(Jobs(client))
    assert (states["email"].workers, states["jobs"].workers) == (1, 1)
    assert all(worker.pid and worker.birth_date for worker in registered(client))


def test_a_pool_sends_as_many_mails_at_once_as_it_has_senders_and_drains_them(
    house: House, client: redis.Redis
) -> None:
    together = threading.Barrier(5)  # four attempts and the test

    def meet(line: Line) -> str:
        together.wait(20)
        line.say("250 2.0.0 queued")
        return "250 2.0.0 queued"

    with ScriptedRelay({".": meet}) as relay:
        house.environment |= {"SMTP_PORT": str(relay.port), "WORKER_CONCURRENCY": "4"}
        api = house.api()
        ids = [api.post("/emails", MAIL).body["id"] for _ in range(6)]
        process = house.worker("email")
        eventually(lambda: together.n_waiting == 4)
        eventually(lambda: [worker.get_state() for worker in registered(client)] == ["busy"])
        assert client.scard(registered(client)[0].executions_key) == 4
        process.terminate()
        time.sleep(0.5)
        together.wait(20)
        assert process.wait(20) == 0
        states = Counter(api.email(one)["status"] for one in ids)
    assert states == {"sent": 4, "queued": 2}


def test_processes_share_the_senders_and_one_that_is_killed_is_replaced(house: House, client: redis.Redis) -> None:
    together = threading.Barrier(4)  # as many attempts as there may be, and the test

    def meet(line: Line) -> str:
        together.wait(20)
        line.say("250 2.0.0 queued")
        return "250 2.0.0 queued"

    with ScriptedRelay({".": [*[meet] * 3, "250 2.0.0 queued"]}) as relay:
        house.environment |= {"SMTP_PORT": str(relay.port), "WORKER_CONCURRENCY": "3", "WORKER_PROCESSES": "2"}
        api = house.api()
        ids = [api.post("/emails", MAIL).body["id"] for _ in range(8)]
        parent = house.worker("email")
        eventually(lambda: together.n_waiting == 3)
        assert relay.connections == 3
        pids = {worker.pid for worker in registered(client)}
        assert len(pids) == 2
        assert parent.pid not in pids
        together.wait(20)
        for mail_id in ids:
            api.wait_for(mail_id, "sent")
        killed = min(pid for pid in pids if pid)
        os.kill(killed, signal.SIGKILL)
        eventually(lambda: len({worker.pid for worker in registered(client)} - pids) == 1)
        api.wait_for(api.post("/emails", MAIL).body["id"], "sent")
        parent.terminate()
        assert parent.wait(20) == 0
        assert {worker.pid for worker in registered(client)} <= {killed}


def test_a_sender_goes_on_after_what_it_cannot_bear(house: House, client: redis.Redis) -> None:
    house.environment["WORKER_CONCURRENCY"] = "2"
    api = house.api()
    house.worker("email")
    eventually(lambda: len(registered(client)) == 1)
    client.set("rq:queue:email", "no list")
    client.client_kill_filter(_type="normal", skipme=True)  # the next command is refused
    eventually(lambda: "crashed" in house.log("worker-email"))
    client.delete("rq:queue:email")
    mail_id = eventually(lambda: api.post("/emails", MAIL).body.get("id"))
    api.wait_for(mail_id, "sent")


def test_a_redis_that_takes_nothing_ends_no_worker_and_is_said_once(house: House, client: redis.Redis) -> None:
    """Each thread of the pool ended with a traceback and was replaced, each second; the worker for jobs gave up."""
    api = house.api()
    processes = {queue: house.worker(queue) for queue in QUEUES}

    def logs() -> list[str]:
        return [house.log(f"worker-{queue}") for queue in QUEUES]

    eventually(lambda: [worker.get_state() for worker in registered(client)].count("idle") == 2)  # all have started
    client.config_set("maxmemory", 1)
    try:
        client.client_kill_filter(_type="normal", skipme=True)
        eventually(lambda: all("redis_unavailable" in log for log in logs()))
        time.sleep(3)
    finally:
        client.config_set("maxmemory", 0)
    mail_id = eventually(lambda: api.post("/emails", MAIL).body.get("id"))
    api.wait_for(mail_id, "sent")
    job_id = api.post("/jobs", JOB).body["job_id"]
    eventually(lambda: api.get(f"/jobs/{job_id}").body["status"] == "finished")
    assert [process.poll() for process in processes.values()] == [None] * len(QUEUES)
    assert [log.partition("Traceback")[2] for log in logs()] == [""] * len(QUEUES)
    said = {queue: house.log(f"worker-{queue}").count("redis_unavailable") for queue in QUEUES}
    assert said["email"] == 1
    assert said["jobs"] <= 2  # RQ's scheduler is a process of its own there


def test_maintenance_on_a_full_redis_ends_no_worker(redis_server: RedisServer, client: redis.Redis) -> None:
    """It did after twenty seconds, and with it all of bin/dev."""
    worker = make_worker(JobsWorker, "jobs", client, {})
    with configured(redis_server, maxmemory=1):
        worker.run_maintenance_tasks()


def test_a_heartbeat_from_a_future_that_the_clock_has_left_is_clamped(house: House, client: redis.Redis) -> None:
    client.zadd("rq:wip:email", {"a-job:an-execution": time.time() + 3600})
    house.worker("email")
    eventually(lambda: float(client.zscore("rq:wip:email", "a-job:an-execution") or 0) < time.time() + 46)


def test_a_suspended_pool_takes_no_mail(house: House, client: redis.Redis) -> None:
    api = house.api()
    client.set("rq:suspended", 1)  # as `rq suspend` does
    house.worker("email")
    eventually(lambda: len(registered(client)) == 1)
    mail_id = api.post("/emails", MAIL).body["id"]
    time.sleep(2)
    assert api.email(mail_id)["status"] == "queued"
    client.delete("rq:suspended")
    api.wait_for(mail_id, "sent")


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGQUIT])
def test_a_signal_costs_no_mail_whose_final_dot_is_unanswered(
    house: House, relay: Relay, number: signal.Signals
) -> None:
    house.environment["WORKER_CONCURRENCY"] = "1"
    api, worker = house.api(), house.worker("email")

    def signalled() -> None:
        worker.send_signal(number)
        time.sleep(0.5)

    relay.on_data = signalled
    assert api.wait_for(api.post("/emails", MAIL).body["id"], "sent")["attempts"][0]["code"] == 250
    assert len(relay.accepted) == 1
    if number == signal.SIGQUIT:
        assert worker.wait(20) == 0


def test_a_worker_for_jobs_ignores_what_does_not_ask_it_to_end(house: House, client: redis.Redis) -> None:
    worker = house.worker("jobs")
    eventually(lambda: "worker_started" in house.log("worker-jobs"))
    time.sleep(1)
    for number in (signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        worker.send_signal(number)
        with pytest.raises(subprocess.TimeoutExpired):
            worker.wait(1)
    worker.send_signal(signal.SIGQUIT)
    assert worker.wait(20) == 0


def test_a_mail_costs_four_round_trips_to_redis_and_a_wait(house: House, client: redis.Redis) -> None:
    """Take, mark, settle, end; in a queue with more in it, the next is taken in the step in which one ends."""
    api = house.api()
    house.worker("email")
    api.wait_for(api.post("/emails", MAIL).body["id"], "sent")
    eventually(lambda: any(one["cmd"] == "blmove" for one in client.client_list()))  # it is through with that one
    trips = []
    with client.monitor() as monitor:  # type: ignore[no-untyped-call]
        mail_id = api.post("/emails", MAIL).body["id"]
        for entry in monitor.listen():
            command = entry["command"].split(" ")[0]
            if entry["client_type"] != "lua" and (mail_id in entry["command"] or command in ("EXEC", "EVALSHA")):
                trips.append(command)
            if trips and command == "EVALSHA" and f" {mail_id} " in entry["command"] and len(trips) == 5:
                break
    assert trips == ["EVALSHA"] * 5  # accept among them


def test_a_sent_mail_keeps_little_in_redis(house: House, client: redis.Redis, tmp_path: Path) -> None:
    """It kept 6.5 KB for three days, and 4.7 of them were RQ's stream with the word `sent`."""
    before = client.config_get("hash-max-ziplist-value")["hash-max-ziplist-value"] or ""
    client.config_set("hash-max-ziplist-value", 2048)  # as in deploy/redis
    try:
        with Relay() as relay:
            house.environment |= relay.environment(tmp_path)
            api = house.api()
            house.worker()
            mail_id = api.submit(MAIL)
            api.wait_for(mail_id, "sent")
            eventually(lambda: api.get(f"/jobs/{mail_id}").body["status"] == "finished")
        kept = {key.decode(): client.memory_usage(key, samples=0) or 0 for key in client.scan_iter(f"*{mail_id}*")}
    finally:
        client.config_set("hash-max-ziplist-value", before)
    assert set(kept) == {f"mail:{mail_id}", f"rq:job:{mail_id}"}
    assert sum(kept.values()) < 1400, kept
    seen = api.get(f"/jobs/{mail_id}").body
    assert (seen["task"], seen["result"]) == ("deliver", "sent")
    assert all(seen[name] for name in ("created_at", "enqueued_at", "started_at", "ended_at"))


LEANT_ON = {  # what we override in RQ, or call beyond its documentation -> its source in the RQ that we know
    "rq.worker.base:BaseWorker.work": "04b5cdf8e554d8a2",
    "rq.worker.base:BaseWorker.dequeue_job_and_maintain_ttl": "2715cf34d9e3af3b",
    "rq.worker.base:BaseWorker.perform_job": "1f0e40678ae519cf",
    "rq.worker.base:BaseWorker.prepare_job_execution": "d08dd32962e3f82a",
    "rq.worker.base:BaseWorker.handle_job_success": "9dda7c7d3ca18ee6",
    "rq.worker.base:BaseWorker.handle_job_failure": "7432afe53b9f84ec",
    "rq.worker.base:BaseWorker.handle_exception": "fffd9b2925ac1432",
    "rq.worker.base:BaseWorker._finalize_failure": "6d1b8bd1117e9641",
    "rq.worker.base:BaseWorker.handle_job_retry": "541a1b09523069c2",
    "rq.worker.base:BaseWorker.handle_execution_ended": "23748b027980a6cd",
    "rq.worker.base:BaseWorker.heartbeat": "63b1089fd146d19c",
    "rq.worker.base:BaseWorker.maintain_heartbeats": "b73451c9b97f7247",
    "rq.worker.base:BaseWorker.run_maintenance_tasks": "3d8a446b5354fce3",
    "rq.worker.base:BaseWorker.clean_registries": "e2c9790c8156c72c",
    "rq.worker.worker_classes:Worker.execute_job": "69165f5321397cff",
    "rq.worker.base:BaseWorker.check_for_suspension": "e8095ae1fcf966bd",
    "rq.worker.base:BaseWorker.set_state": "bb8d4f1d93ff078b",
    "rq.worker.base:BaseWorker.register_death": "cb2b0be150213a99",
    "rq.worker.base:BaseWorker._start_scheduler": "49c229109608aa31",
    "rq.queue:Queue.dequeue_any": "2452e56ad5197396",
    "rq.worker.base:BaseWorker._shutdown": "828be105b616d1d6",
    "rq.worker.base:BaseWorker.serialize": "219368b12c2d438b",
    "rq.worker_registration:register": "757bc1c839a259c8",
    "rq.executions:Execution.heartbeat": "d5b2cc74931f91b9",
    "rq.executions:ExecutionRegistry.get_executions": "f0b4dd0be021900e",
    "rq.job:Job.set_status": "a093b9649641e3ea",
    "rq.job:Job.func.fget": "2347dd5ec6918732",
    "rq.job:Job.restore": "859daf950a3ede0b",
    "rq.job:Job.refresh": "818b52b414f3efb2",
    "rq.job:Job.fetch": "4c0184a10a6ca526",
    "rq.job:Job.fetch_many": "04cf72c02cbdd0ff",
    "rq.job:Job.delete": "1a15005871aa9579",
    "rq.job:parse_job_id": "3bc6ef40c78205ef",
    "rq.queue:Queue.intermediate_queue.fget": "77cb167510546504",
    "rq.queue:Queue.acquire_maintenance_lock": "ebdce3e6d60ef394",
    "rq.queue:Queue.fetch_job": "063ad9f184a917dd",
    "rq.queue:Queue._fetch_dequeued_job": "dccbf64962d1bbfc",
    "rq.intermediate_queue:IntermediateQueue.cleanup": "e465aaeb5d294870",
    "rq.intermediate_queue:IntermediateQueue.should_be_cleaned_up": "adb9f8c95fc4d7b5",
    "rq.intermediate_queue:IntermediateQueue.get_first_seen": "9e0c1dfb01455f3f",
    "rq.registry:StartedJobRegistry.cleanup": "c5cd78c27fc023d6",
    "rq.registry:ReadyJobRegistry.enqueue_jobs": "2809ef714ffa5575",
    "rq.scheduler:RQScheduler.stop": "580a762f2bf94180",
    "rq.scheduler:RQScheduler.work": "5d1810bdd4392089",
    "rq.scheduler:RQScheduler.enqueue_scheduled_jobs": "a31620c83110baeb",
    "rq.scheduler:RQScheduler.acquire_locks": "4d15324e1639d356",
    "rq.scheduler:RQScheduler.heartbeat": "8bf3e1cfc0a2839d",
    # RQ makes a pool of its own from these; our connections look for the primary by themselves.
    "rq.scheduler:RQScheduler.connection.fget": "c0305c4947b60556",
    "rq.connections:parse_connection": "c13289442f13a10b",
    "redis.connection:Connection._connect": "660740390d04a256",
    "redis.connection:SSLConnection._connect": "2d27728b160c2c17",
    "redis.connection:AbstractConnection.connect_check_health": "6d69f8fe38a17d5c",
    "redis.connection:AbstractConnection.on_connect_check_health": "fb8e8114ccbf0d2a",
    "redis.connection:AbstractConnection.send_packed_command": "df64e60810061d0a",
    "rq:rate_limit": "a100a9cb0851cac4",
    "rq.queue:Queue.enqueue_job": "05ff025c22a03128",
    "rq.queue:Queue._enqueue_rate_limited_job": "a610af91fc148871",
    "rq.cron:CronJob.__init__": "8b09c9e33418f0ae",
    "rq.cron:CronJob.should_run": "a78384c5419adb8b",
    "rq.cron:CronJob.enqueue": "7d695e184914aa75",
    "rq.cron:CronJob.get_next_enqueue_time": "41dbac572ea58535",
    "rq.cron:CronJob.set_enqueue_time": "539748653af94bdf",
    "rq.cron:CronScheduler.__init__": "6a052c66eadf6ae9",
    "rq.cron:CronScheduler.enqueue_jobs": "f692e977f03577fb",
    "rq.cron:CronScheduler.heartbeat": "3ea7c009f1c4cc6b",
    "rq.cron:CronScheduler.save": "b6cf473069a365b4",
    "rq.suspension:suspend": "38c07847ddb762c0",
    "rq.suspension:resume": "67ffffc651ea50f9",
    "rq.cron_job_registry:add": "c289d80b994ec909",
    "rq.timeouts:BaseDeathPenalty": "e2466980efb81666",
}


@pytest.mark.parametrize("name", LEANT_ON)
def test_what_the_workers_lean_on_in_rq_is_as_it_was(name: str) -> None:
    """If this fails after an upgrade: read what changed in RQ against what leans on it here, then write it anew."""
    assert digest_of(name) == LEANT_ON[name]


OURS = ("EmailWorker", "JobsWorker", "NoTimeout", "Job", "Queue", "IntermediateQueue", "Scheduler", "PatientScheduler")


ELSEWHERE = ("queues.quarantine:StrictJob", "queues.cron:CronTask", "queues.cron:Cron")


@pytest.mark.parametrize("which", [*(f"queues.workers:{name}" for name in OURS), *ELSEWHERE])
def test_whatever_we_override_in_rq_is_on_the_list(which: str) -> None:
    ours = pkgutil.resolve_name(which)
    listed = {name.split(":")[1].removesuffix(".fget") for name in LEANT_ON}
    for name, what in vars(ours).items():
        theirs = [one for one in ours.__mro__[1:] if one.__module__.startswith("rq.") and name in vars(one)]
        if theirs and isinstance(what, (FunctionType, classmethod, property)) and name != "__init__":
            assert {theirs[0].__name__, f"{theirs[0].__name__}.{name}"} & listed, name


def registered(client: redis.Redis) -> list[SimpleWorker]:
    return SimpleWorker.all(connection=client, serializer=JSONSerializer)  # type: ignore[return-value]


def test_the_worker_says_what_is_missing_and_does_not_start(tmp_path: Path, redis_server: RedisServer) -> None:
    with House(tmp_path, redis_server.url) as house:
        assert house.worker("email").wait(20) == 2
        assert "SMTP_HOST is not set" in house.log("worker-email")
        assert house.worker("nonsense").wait(20) == 2
        assert "usage: worker.py [email|jobs]" in house.log("worker-nonsense")


@pytest.mark.parametrize("error", [ZeroDivisionError(), redis.ResponseError("WRONGTYPE of key")])
def test_a_duty_that_goes_wrong_keeps_the_main_thread_from_no_other(
    monkeypatch: pytest.MonkeyPatch, redis_server: RedisServer, error: Exception
) -> None:
    current = Settings(redis_url=redis_server.url)
    redis_of_threads = connect(redis_server.url, kind=PipeliningRedis)
    monkeypatch.setattr(delivery, "current", lambda: delivery.Delivery(Outbox(Jobs(redis_of_threads), current)))
    main, done = WorkerPool("email", current), list[str]()

    def wrong() -> None:
        done.append("schedule")
        raise error

    monkeypatch.setattr(main, "schedule", wrong)
    monkeypatch.setattr(main, "clamp_future_heartbeats", lambda: done.append("clamp_future_heartbeats"))
    monkeypatch.setattr(main.delivery, "sweep", lambda: done.append("sweep"))
    monkeypatch.setattr(main.senders, "replenish", lambda: done.append("replenish"))
    main.tick()
    assert done == ["schedule", "clamp_future_heartbeats", "sweep", "replenish"]


def test_the_envelope_of_the_next_mail_goes_out_with_the_final_dot_where_all_are_busy(
    house: House, client: redis.Redis
) -> None:
    with ScriptedRelay(offers=["PIPELINING"]) as relay:
        house.environment |= {"SMTP_PORT": str(relay.port), "WORKER_CONCURRENCY": "1"}
        api = house.api()
        ids = [api.post("/emails", MAIL | {"subject": str(number)}).body["id"] for number in range(6)]
        process = house.worker("email")
        for mail_id in ids:
            api.wait_for(mail_id, "sent")
        eventually(lambda: not client.zcard("rq:wip:email"))
        assert relay.turns == 1 + 2 + 6  # EHLO, two envelopes alone, and all dots
        process.terminate()
        assert process.wait(20) == 0
    assert [body.count(f"Subject: {number}".encode()) for number, body in enumerate(relay.accepted)] == [1] * 6
    assert all(len(api.email(mail_id)["attempts"]) == 1 for mail_id in ids)
