"""POST /jobs, and what can be done with a job or mail by its id: read, queue again, cancel."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import redis
from rq.job import Job, JobStatus

import tasks
from mail.outbox import Outbox
from queues import offer
from tests import http_api
from tests.http_api import ANY_ID, JOB, QUEUES, UNKNOWN_ID, both_kinds, job_of, keys, refused, submitted, work
from tests.servers import Api, RedisServer

pytestmark = pytest.mark.usefixtures("client")


def test_a_job_holds_its_arguments_and_nothing_of_a_mail(api: Api, client: redis.Redis) -> None:
    job = job_of(client, submitted(api, "/jobs"))
    assert (job.func_name, job.args, job.kwargs, job.timeout) == ("tasks.why_failed", [], {"hours": 1}, 60)
    assert client.lrange("rq:queue:jobs", 0, -1) == [job.id.encode()]
    job = job_of(client, submitted(api, "/emails"))
    assert (job.args, job.kwargs, job.description) == ([job.id], {}, f"tasks.deliver {job.id}")


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({}, "task"),
        *(({"task": task}, "task") for task in (1, "nothing", "deliver", "tasks.why_failed", "os.system")),
        ({"task": "why_failed", "args": []}, "args"),
        ({"task": "why_failed", "args": None}, "args"),
        ({"task": "why_failed", "kwargs": {}}, "kwargs"),
        *((JOB | {"args": {"hours": hours}}, "args.hours") for hours in ("1", True, 1.5, None, 0, 10**4000)),
        (JOB | {"args": {"hour": 1}}, "args.hour"),
    ],
)
def test_a_job_that_no_task_can_run_is_refused_by_field(
    api: Api, client: redis.Redis, body: dict[str, Any], field: str
) -> None:
    refused(api, client, "/jobs", body, 422, field)


def test_an_argument_that_a_task_needs_is_missed_by_name(
    redis_server: RedisServer, client: redis.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(offer, "OFFERED", {})
    monkeypatch.setattr(tasks, "OFFERED", offer.OFFERED)

    @offer.task()
    def report(month: int, title: str = "") -> None:
        """Never run."""

    with http_api.served(http_api.app_with(redis_server.url)) as api:
        refused(api, client, "/jobs", {"task": "report"}, 422, "args.month")
        assert api.post("/jobs", {"task": "report", "args": {"month": 5}}).status == 202  # the title has a default


def failing(monkeypatch: pytest.MonkeyPatch, client: redis.Redis, job_id: str) -> None:
    """The next run of the job fails, and is its last."""

    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("the reason")

    monkeypatch.setattr(tasks, "deliver", fail)
    monkeypatch.setattr(tasks, "why_failed", fail)
    client.hset(f"rq:job:{job_id}", "retries_left", 0)


def test_a_job_can_be_read_while_it_waits_and_with_its_result(api: Api, client: redis.Redis, outbox: Outbox) -> None:
    job_id = submitted(api, "/jobs")
    seen = api.get(f"/jobs/{job_id}").body
    created, enqueued = seen.pop("created_at"), seen.pop("enqueued_at")
    assert seen == {"job_id": job_id, "task": "why_failed", "status": "queued", "started_at": None, "ended_at": None}
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}\+00:00", created)
    work(client, "jobs")
    seen = api.get(f"/jobs/{job_id}").body
    assert (seen["status"], seen["result"]) == ("finished", {})
    assert created <= enqueued <= seen["started_at"] <= seen["ended_at"]
    assert "error" not in seen


@both_kinds
def test_a_failed_job_can_be_read_with_its_error_and_queued_again_with_all_its_attempts(
    api: Api, client: redis.Redis, outbox: Outbox, monkeypatch: pytest.MonkeyPatch, path: str
) -> None:
    job_id = submitted(api, path)
    retries = job_of(client, job_id).retries_left
    failing(monkeypatch, client, job_id)
    work(client, QUEUES[path])
    seen = api.get(f"/jobs/{job_id}").body
    assert (seen["status"], seen["error"]) == ("failed", "RuntimeError: the reason")
    assert "result" not in seen
    assert client.zrange(f"rq:failed:{QUEUES[path]}", 0, -1) == [job_id.encode()]
    answer = api.post(f"/jobs/{job_id}/requeue", None)
    assert (answer.status, answer.body) == (202, {"job_id": job_id, "status": "queued"})
    assert client.zcard(f"rq:failed:{QUEUES[path]}") == 0
    assert client.lrange(f"rq:queue:{QUEUES[path]}", 0, -1) == [job_id.encode()]
    job = job_of(client, job_id)
    assert (job.get_status(), job.retries_left, job.ended_at) == (JobStatus.QUEUED, retries, None)
    assert retries


# fmt: off
ODD_IDS = [
    "..", "%2e%2e", "%00", "%20", "a%20b", "%C3%A9", "%F0%9F%93%A7", "%ff", "a%0a", "*", "last_sent", "x" * 10_000,
    f"{UNKNOWN_ID}:claim", f"{UNKNOWN_ID}:dependents", f"{UNKNOWN_ID}%0a", UNKNOWN_ID.upper(), f"%20{UNKNOWN_ID}", "{}",
]
# fmt: on


@pytest.mark.parametrize("odd", ODD_IDS, ids=lambda odd: odd[:40])
def test_an_id_that_nothing_has_is_not_found_however_odd(api: Api, client: redis.Redis, odd: str) -> None:
    client.mset({"mail:last_sent": 1, f"mail:{UNKNOWN_ID}:claim": "token"})  # what the outbox keeps beside its mails
    for method, path in ANY_ID:
        answer = api.call(method, path.replace(UNKNOWN_ID, odd))
        assert (answer.status, answer.body["name"]) == (404, "not_found"), (method, path, answer)
    assert client.dbsize() == 2


@both_kinds
def test_a_job_that_runs_is_neither_queued_again_nor_canceled(api: Api, client: redis.Redis, path: str) -> None:
    job_id = submitted(api, path)
    job_of(client, job_id).set_status(JobStatus.STARTED)
    requeued, canceled = api.post(f"/jobs/{job_id}/requeue", None), api.call("DELETE", f"/jobs/{job_id}")
    assert [(one.status, one.body["type"]) for one in (requeued, canceled)] == [(409, "not_possible")] * 2
    assert requeued.body["message"] == "only a failed job can be queued again; this one is started"
    assert canceled.body["message"] == "a job that is started cannot be canceled any more"
    assert client.llen(f"rq:queue:{QUEUES[path]}") == 1


@both_kinds
@pytest.mark.parametrize("bring", [lambda *_: None, http_api.fail], ids=["queued", "failed"])
def test_a_job_that_is_not_running_can_be_canceled_and_a_mail_is_still_told_of(
    api: Api, client: redis.Redis, path: str, bring: Callable[[redis.Redis, Job], None]
) -> None:
    job_id = submitted(api, path)
    bring(client, job_of(client, job_id))
    answer = api.call("DELETE", f"/jobs/{job_id}")
    assert (answer.status, answer.body) == (200, {"job_id": job_id, "status": "canceled"})
    assert api.get(f"/jobs/{job_id}").status == 404
    if path == "/emails":
        seen = api.email(job_id)
        assert (seen["status"], seen["last_event"], seen["to"]) == ("canceled", "canceled", ["ada@example.com"])
        beside = {"mail:totals", "mail:index", "mail:keys", "mail:secret"}
        beside |= keys(client, "mail:minute:*") | keys(client, "mail:hour:*")
        assert keys(client, "*") - beside == {"rq:queues", f"mail:{job_id}"}
        assert api.call("DELETE", f"/jobs/{job_id}").status == 200
    else:
        assert keys(client, "*") == {"rq:queues"}
        assert api.call("DELETE", f"/jobs/{job_id}").status == 404
