"""`@task(cron="0 7 * * *")`: each time is queued once, however many ask, and late rather than never."""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any
from unittest.mock import patch

import fakeredis
import pytest
import redis
from rq import cron
from rq.job import Job

from queues import cron as ours
from queues.connection import Unavailable
from queues.cron import Cron, next_time, planned
from queues.jobs import Jobs, Policy
from queues.table import JOBS
from tests.http_api import job_of
from tests.servers import House, eventually, project_with

POLICY = Policy(60, (60, 300), 100, 200)
HOURLY = "0 * * * *"
At = Callable[[str], None]


@pytest.fixture
def store() -> redis.Redis:
    return fakeredis.FakeRedis()


@pytest.fixture
def at(monkeypatch: pytest.MonkeyPatch) -> At:
    """Sets the clock of all processes to a time of one day."""

    def at(hour: str) -> None:
        moment = datetime.fromisoformat(f"2026-11-27T{hour}").astimezone()
        for module in (cron, ours):
            monkeypatch.setattr(module, "now", lambda: moment)

    at("06:30")
    return at


def started(store: redis.Redis, line: str = HOURLY, policy: Policy = POLICY) -> Cron:
    """A process that asks."""
    one = Cron(store, JOBS, {"tasks.report": (line, policy)})
    one.tick()
    return one


def queued(store: redis.Redis) -> list[Job]:
    ids: Any = store.lrange("rq:queue:jobs", 0, -1)
    return [job_of(store, one.decode()) for one in ids]


def test_a_time_that_comes_is_queued_once_however_many_ask_and_as_the_task_has_it(store: redis.Redis, at: At) -> None:
    several = [started(store), started(store)]
    for hour, jobs in (("06:59:59", 0), ("07:00", 1), ("07:00:01", 1), ("07:59:59", 1), ("08:00:07", 2)):
        at(hour)
        for one in several:
            one.tick()
        assert len(queued(store)) == jobs, hour
    job = queued(store)[0]
    assert (job.func_name, job.args, job.kwargs, job.description) == ("tasks.report", [], {}, f"tasks.report {job.id}")
    assert (job.timeout, job.retry_intervals, job.result_ttl, job.failure_ttl) == (60, [60, 300], 100, 200)
    assert planned(store, JOBS) == {"report": datetime.fromisoformat("2026-11-27T09:00").astimezone()}
    assert planned(store, "email") == {}


def test_two_that_see_a_time_come_at_the_same_moment_queue_one_job(store: redis.Redis, at: At) -> None:
    tasks = [started(store).get_jobs()[0] for _ in range(2)]
    at("07:00")
    assert all(task.should_run() for task in tasks)
    for task in tasks:
        task.enqueue(store)
    assert len(queued(store)) == 1


@pytest.mark.parametrize(
    ("ended", "again", "line", "jobs"),
    [
        ("06:59:58", "07:00:03", HOURLY, 1),  # a restart just then
        ("07:00", "07:00:03", HOURLY, 1),  # just after
        ("06:59", "15:30", HOURLY, 1),  # nine times were missed
        ("06:59", "06:59:58", HOURLY, 0),
        ("06:59", "07:30", "15 * * * *", 0),  # another line has missed nothing
    ],
)
def test_what_came_due_while_nobody_asked_is_queued_once(
    store: redis.Redis, at: At, ended: str, again: str, line: str, jobs: int
) -> None:
    first = started(store)
    at(ended)
    first.tick()
    at(again)
    for _ in range(2):
        started(store, line).tick()
    assert len(queued(store)) == jobs


def test_a_clock_that_was_ahead_for_a_while_neither_doubles_nor_loses_a_time(store: redis.Redis, at: At) -> None:
    one = started(store)
    for hour, jobs in (("15:00", 1), ("06:50", 1), ("07:00", 1), ("08:00", 2), ("09:00", 3)):
        at(hour)
        one.tick()
        one = started(store)
        assert len(queued(store)) == jobs, hour


def test_a_redis_that_is_full_or_emptied_loses_no_time(store: redis.Redis, at: At) -> None:
    one = started(store)
    store.flushall()
    at("07:00")
    with patch.object(Jobs, "accept", side_effect=Unavailable("full")), pytest.raises(Unavailable):
        one.tick()
    one.tick()
    assert len(queued(store)) == 1


@pytest.mark.parametrize(
    ("line", "after", "due"),
    [
        ("30 2 * * *", "2027-03-27T20:00Z", "2027-03-28T01:30Z"),  # there is no half past two that night
        ("30 2 * * *", "2027-10-30T20:00Z", "2027-10-31T00:30Z"),  # there are two of it
        ("30 2 * * *", "2027-10-31T00:30Z", "2027-11-01T01:30Z"),
        ("*/15 * * * *", "2027-10-31T00:45Z", "2027-10-31T02:00Z"),  # nothing in the hour that comes again
        ("0 7 * * mon-fri", "2026-11-27T12:00Z", "2026-11-30T06:00Z"),
    ],
)
def test_times_are_those_of_the_machines_time_zone(
    monkeypatch: pytest.MonkeyPatch, line: str, after: str, due: str
) -> None:
    monkeypatch.setenv("TZ", "Europe/Berlin")
    time.tzset()
    try:
        moment, wanted = (datetime.fromisoformat(one.replace("Z", "+00:00")) for one in (after, due))
        monkeypatch.setattr(cron, "now", lambda: moment)
        assert next_time(line) == wanted
    finally:
        monkeypatch.undo()
        time.tzset()


REPORT = '@task(cron="0 0 1 1 *")\ndef report(day: str = "today") -> str:\n    return day\n'


def test_a_worker_queues_and_runs_it_and_two_do_so_once(sending: House, client: redis.Redis, tmp_path: Path) -> None:
    root, off = project_with(tmp_path, REPORT), tmp_path / "off"
    off.write_text("0")
    for _ in range(2):
        sending.run("jobs", str(root / "tests/stepped_clock.py"), str(off), str(root / "worker.py"), "jobs")
    due = eventually(lambda: planned(client, JOBS)).popitem()[1]
    off.write_text(str(due.timestamp() - time.time()))  # their clock is at that moment now
    eventually(lambda: "task_finished" in sending.log("jobs"))
    time.sleep(2)
    lines = [line for line in sending.log("jobs").splitlines() if "report" in line]
    assert [line.split(" INFO ")[1].split()[0] for line in lines] == ["cron_queued", "task_finished"]
    assert f"due={due.isoformat()}" in lines[0]
    assert planned(client, JOBS)["report"].year == due.year + 1
