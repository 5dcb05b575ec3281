"""Jobs that RQ cannot read: each is set aside and said, and the others go on, wherever RQ comes upon it."""

from __future__ import annotations

import json
import re
import time
from typing import Any

import pytest
import rq.job
from rq.exceptions import NoSuchJobError, StopRequested
from rq.serializers import JSONSerializer

from queues import health, workers
from queues.jobs import Call, Jobs, NotFound, Policy
from queues.quarantine import UNREADABLE
from queues.table import EMAIL, JOBS
from tests.servers import House, eventually

KINDS: dict[str, dict[str, Any] | None] = {  # what is written over a good job
    "created_at": {"created_at": "garbage"},
    "status": {"status": "nonsense"},
    "no data": {"data": None},
    "a number for a function": {"data": json.dumps([5, None, [], {}])},
    "no list of dependencies": {"dependency_ids": "5"},
    "a dependency that is no JSON": {"dependency_ids": "x"},
    "group": {"group_id": b"\xff"},
    "pauses": {"retry_intervals": "5"},
    "no pauses": {"retry_intervals": "[]"},
    "a pause for ever": {"retry_intervals": "[1e300]"},
    "a lifetime for ever": {"failure_ttl": str(10**30)},
    "timeout": {"timeout": "soon"},
    "no hash": None,
}
Client = Any  # redis-py's types do not tell an answer from a promise of one


@pytest.fixture
def house(sending: House) -> House:
    return sending


def poison(client: Client, job_id: str, kind: str) -> None:
    key, fields = f"rq:job:{job_id}", KINDS[kind]
    if fields is None:
        client.delete(key)
        client.set(key, "x")
        return
    for name, value in fields.items():
        client.hset(key, name, value) if value is not None else client.hdel(key, name)


def accept(client: Client, job_id: str, queue: str = JOBS) -> None:
    jobs, policy = Jobs(client), Policy(60, (1, 1), 60, 60)
    jobs.accept(jobs.acceptance(queue, "tasks.why_failed", {job_id: Call((), {})}, policy))


@pytest.mark.parametrize("kind", KINDS)
def test_a_worker_sets_it_aside_and_rq_takes_it_for_gone(client: Client, kind: str) -> None:
    accept(client, "odd")
    poison(client, "odd", kind)
    for _ in range(2):
        with pytest.raises(NoSuchJobError):
            workers.Job.fetch("odd", client, JSONSerializer)
    assert not client.exists("rq:job:odd")
    assert 13 * 86400 < client.ttl(f"{UNREADABLE}:odd") <= 14 * 86400
    assert client.zrange(UNREADABLE, 0, -1) == [b"odd"]


@pytest.mark.parametrize("kind", KINDS)
def test_to_the_api_it_is_not_found_and_what_changes_it_makes_room_for_another(client: Client, kind: str) -> None:
    accept(client, "odd")
    poison(client, "odd", kind)
    store = Jobs(client)
    with pytest.raises(NotFound, match="cannot be read as a job"):
        store.read("odd")
    assert client.exists("rq:job:odd")
    for act, said in ((store.requeue, "cannot be read"), (store.cancel, "^$")):
        with pytest.raises(NotFound, match=said):
            act("odd")
    accept(client, "odd")
    assert store.read("odd")["status"] == "queued"


def test_that_of_another_program_is_left_to_it(client: Client) -> None:
    accept(client, "odd")
    client.hset("rq:job:odd", mapping={"origin": "theirs", "created_at": "garbage"})
    for act in (Jobs(client).cancel, Jobs(client).requeue):
        with pytest.raises(NotFound):
            act("odd")
    assert client.exists("rq:job:odd")


def test_a_signal_while_a_job_is_read_is_not_taken_for_damage(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    """RQ's handler of SIGTERM raises wherever an idle worker is."""

    def stop(*_: object) -> None:
        raise StopRequested

    accept(client, "good")
    monkeypatch.setattr(rq.job.Job, "restore", stop)
    with pytest.raises(StopRequested):
        workers.Job.fetch("good", client, JSONSerializer)
    monkeypatch.setattr(workers, "sift", stop)
    with pytest.raises(StopRequested):
        workers.JobsWorker([JOBS], connection=client, serializer=JSONSerializer).run_maintenance_tasks()
    assert client.exists("rq:job:good")


def test_only_the_last_thousand_are_listed(client: Client) -> None:
    client.zadd(UNREADABLE, {str(number): time.time() - number for number in range(1000)} | {"old": 1})
    accept(client, "odd")
    poison(client, "odd", "status")
    with pytest.raises(NoSuchJobError):
        workers.Job.fetch("odd", client, JSONSerializer)
    assert client.zcard(UNREADABLE) == 1000
    assert client.zscore(UNREADABLE, "old") is client.zscore(UNREADABLE, "999") is None


def test_a_job_of_a_group_that_is_gone_can_be_canceled(client: Client) -> None:
    accept(client, "one")
    client.hset("rq:job:one", "group_id", "gone")
    Jobs(client).cancel("one")
    assert not client.exists("rq:job:one")


def test_a_job_that_waited_for_another_can_be_queued_again(client: Client) -> None:
    accept(client, "one")
    client.hset("rq:job:one", mapping={"dependency_ids": '["gone"]', "status": "failed"})
    client.delete("rq:queue:jobs")
    Jobs(client).requeue("one")
    assert client.lrange("rq:queue:jobs", 0, -1) == [b"one"]


PLACES = {  # of RQ, and its key
    "the queue": "rq:queue:{}",
    "those popped": "rq:queue:{}:intermediate",
    "those started": "rq:wip:{}",
    "those scheduled": "rq:scheduled:{}",
}
STATUS = {"those started": "started", "those scheduled": "scheduled"}


def put(client: Client, queue: str, where: str, entry: str | bytes) -> None:
    key = PLACES[where].format(queue)
    if where in ("the queue", "those popped"):
        client.rpush(key, entry)
    else:
        client.zadd(key, {entry: 1})


def put_job(client: Client, queue: str, where: str, job_id: str) -> None:
    """As a killed worker, or the scheduler, leaves it."""
    put(client, queue, where, f"{job_id}:an-execution" if where == "those started" else job_id)
    client.hset(f"rq:job:{job_id}", "status", STATUS.get(where, "queued"))
    client.set(f"rq:queue:{queue}:intermediate:first_seen:{job_id}", 1)


def place(client: Client, queue: str, where: str, good: str) -> list[str]:
    """Puts one of each kind there, then a good one. Returns the ids of the former."""
    client.delete(f"rq:queue:{queue}")
    for number, kind in enumerate(KINDS):
        accept(client, f"odd-{number}", queue)
        client.rpop(f"rq:queue:{queue}")
        put_job(client, queue, where, f"odd-{number}")
        poison(client, f"odd-{number}", kind)
    for entry in (b"no job", b"\xff", b"a:b:c") if where != "the queue" else ():
        put(client, queue, where, entry)
    put_job(client, queue, where, good)
    return [f"odd-{number}" for number in range(len(KINDS))]


def assert_set_aside(house: House, client: Client, queue: str, where: str, odd: list[str]) -> None:
    eventually(lambda: {one.decode() for one in client.zrange(UNREADABLE, 0, -1)} == set(odd))
    log = house.log(f"worker-{queue}")
    assert sorted(re.findall(r" ERROR unreadable id=(\S+) reason=\w+", log)) == sorted(odd)
    assert log.count("names no job") == (3 if where != "the queue" else 0)
    assert "garbage" not in log


@pytest.mark.parametrize("where", PLACES)
def test_a_mail_beside_unreadable_jobs_is_sent(house: House, client: Client, where: str) -> None:
    house.environment["WORKER_CONCURRENCY"] = "2"
    api = house.api()
    good = api.post("/emails", {"to": "ada@example.com", "subject": "s", "text": "t"}).body["id"]
    odd = place(client, EMAIL, where, good)
    pool = house.worker()
    api.wait_for(good, "sent", 60)
    assert_set_aside(house, client, EMAIL, where, odd)
    assert "quitting" not in house.log("worker-email")
    assert pool.poll() is None


@pytest.mark.parametrize("where", PLACES)
def test_a_job_beside_unreadable_jobs_is_run_and_its_worker_survives(house: House, client: Client, where: str) -> None:
    accept(client, "good")
    odd = place(client, JOBS, where, "good")
    process = house.worker(JOBS)
    eventually(lambda: client.hget("rq:job:good", "status") == b"finished", 90)
    assert_set_aside(house, client, JOBS, where, odd)
    assert process.poll() is None


def test_maintenance_that_fails_all_the_same_does_not_end_the_worker(house: House, client: Client) -> None:
    client.sadd("rq:groups", "odd")
    client.set("rq:group:odd", "x")
    process = house.worker(JOBS)
    eventually(lambda: "crashed where=" in house.log(f"worker-{JOBS}"))
    accept(client, "good")
    eventually(lambda: client.hget("rq:job:good", "status") == b"finished")
    assert process.poll() is None


def test_a_mail_whose_job_is_unreadable_fails_and_is_sent_if_it_is_queued_again(house: House, client: Client) -> None:
    api = house.api()
    ids = [api.post("/emails", {"to": "ada@example.com", "subject": "s", "text": "t"}).body["id"] for _ in "123"]
    for mail_id, kind in zip(ids, ("status", "no data", "no hash"), strict=True):
        poison(client, mail_id, kind)
    assert api.call("DELETE", f"/jobs/{ids[0]}").status == 200
    assert api.email(ids[0])["status"] == "canceled"
    house.worker()
    for mail_id in ids[1:]:
        api.wait_for(mail_id, "failed")
        assert api.post(f"/jobs/{mail_id}/requeue", {}).status == 202
        api.wait_for(mail_id, "sent")


def test_ready_is_told_while_an_unreadable_job_heads_the_queue(house: House, client: Client) -> None:
    api = house.api()
    accept(client, "odd", EMAIL)
    client.hset("rq:job:odd", "enqueued_at", "garbage")
    assert api.get("/readyz").status == 200
    assert health.queue_states(Jobs(client))[EMAIL].jobs["queued"] == 1  # which /metrics shows
    assert api.get("/jobs/odd").status == 404
