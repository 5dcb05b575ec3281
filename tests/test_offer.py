"""A task: its arguments are made from its type hints and checked."""

from __future__ import annotations

import re
import sys
from datetime import date
from pathlib import Path
from typing import Annotated

import pytest
from pydantic import Field, ValidationError

from queues import offer
from queues.jobs import JobFailed
from queues.offer import load_file
from settings import SettingsError
from tests.servers import House, RedisServer, eventually


def test_a_tasks_arguments_are_made_from_its_type_hints(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(offer, "OFFERED", {})

    @offer.task(timeout=5)
    def plan(day: date, times: Annotated[int, Field(ge=1)] = 1) -> str:
        return f"{day:%A} {times}"

    offered = offer.OFFERED["plan"]
    assert offered.timeout == 5
    assert plan(day="2026-11-21", times=2) == "Saturday 2"  # as RQ calls it, with what JSON can carry
    for wrong in ({}, {"day": "soon"}, {"day": "2026-11-21", "times": 0}, {"day": "2026-11-21", "more": 1}):
        with pytest.raises(ValidationError):
            plan(**wrong)


OWN = '''
"""Tasks of an operator's own."""
from queues.offer import task


@task(timeout=5)
def greet_from_outside(name: str) -> str:
    """Returns a greeting."""
    return f"Hello {name}."
'''


def test_tasks_and_templates_may_live_outside_the_project(redis_server: RedisServer, tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text(OWN)
    folder = tmp_path / "templates" / "bye"
    folder.mkdir(parents=True)
    (folder / "subject.txt").write_text("Bye {{ name }}")
    (folder / "body.txt").write_text("So long.")
    settings = {"TASKS_FILE": str(tmp_path / "own.py"), "TEMPLATES_DIR": str(folder.parent)}
    with House(tmp_path, redis_server.url, **settings) as house:
        api = house.api()
        house.worker("jobs")
        job = api.post("/jobs", {"task": "greet_from_outside", "args": {"name": "Ada"}}).body["job_id"]
        mail = api.post("/emails", {"to": "ada@example.com", "template": {"id": "bye", "variables": {"name": "Ada"}}})
        assert api.get(f"/emails/{mail.body['id']}").body["subject"] == "Bye Ada"
        assert eventually(lambda: api.get(f"/jobs/{job}").body.get("result")) == "Hello Ada."


CANNOT_BE_IMPORTED = [  # a file of tasks, and what is said of it behind its path
    ("def x(:\n", ", line 1: invalid syntax"),
    ("\n\nimport no_such_module\n", ", line 3: ModuleNotFoundError: No module named 'no_such_module'"),
    ("\nimport beside\n", ", line 2: NameError: name 'later' is not defined"),
    ("import os\nos.environ['NO_SUCH_VARIABLE']\n", ", line 2: KeyError: 'NO_SUCH_VARIABLE'"),
    ("open('/no/such/file')\n", ", line 1: FileNotFoundError: [Errno 2] No such file or directory: '/no/such/file'"),
    ("x = int('hunter2')\n", ", line 1: ValueError was raised"),
]
NO_TASK = [  # what stands on two lines, and what is said
    ("@task\ndef x(a): ...", "x: its argument a must have a type hint, such as a: str"),
    ("@task()\ndef x(*a: int): ...", "x: its argument a must be a plain one"),
    ("@task\ndef x(a: int, /): ...", "x: its argument a must be a plain one"),
    ("@task\ndef x(a: object()): ...", "x: its arguments cannot be read: Unable to generate pydantic-core schema"),
    ("@task\ndef x(_a: int): ...", "x: its argument _a must be a plain one, without * or / or _ before it"),
    ("@task\ndef x(a: 'Nothing'): ...", "NameError: name 'Nothing' is not defined"),
    ("@task('jobs')\ndef x(): ...", "must stand before a function, as @task or with names: @task(timeout=300)"),
    ("@task(queue='email')\ndef x(): ...", "queue must be one that is not pooled: jobs"),
    ("@task(queue='mails')\ndef x(): ...", "queue must be one that is not pooled: jobs"),
    ("@task(timeout='5m')\ndef x(): ...", "timeout must be a whole number of seconds, such as 300 for five minutes"),
    ("@task(timeout=0)\ndef x(): ...", "timeout must be a whole number of seconds, such as 300 for five minutes"),
    ("@task(retry_in=60)\ndef x(): ...", "retry_in must be a tuple of pauses in whole seconds, such as (60, 300)"),
    *(
        (f"@task(cron={wrong!r})\ndef x(): ...", "cron must be five fields as in a crontab that are due some day, such")
        for wrong in ("", "x", "@daily", "0 7 * *", "* * * * * *", "60 * * * *", "0 0 30 2 *", "R 7 * * *", 7)
    ),
    ("@task(cron='0 7 * * *')\ndef x(a: int, b: int = 1): ...", "x: its argument a must have a default: cron gives it"),
    *(
        (f"@task(concurrency={wrong})\ndef x(): ...", "concurrency must be a whole number: how many jobs may run at")
        for wrong in ("-1", "True", "'1'")
    ),
    ("@task(retry_in=('5m',))\ndef x(): ...", "retry_in must be a tuple of pauses in whole seconds, such as (60, 300)"),
]


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The path of a file of tasks; `beside.py` beside it is broken."""
    monkeypatch.setattr(offer, "OFFERED", {})
    monkeypatch.setattr(sys, "path", sys.path.copy())
    (tmp_path / "beside.py").write_text("later\n")
    return tmp_path / "own.py"


@pytest.mark.parametrize(
    ("text", "told"),
    [
        *CANNOT_BE_IMPORTED,
        *((f"from queues.offer import task\n{text}\n", f", line 2: {told}") for text, told in NO_TASK),
    ],
)
def test_a_file_of_tasks_that_cannot_be_used_stops_the_start(own: Path, text: str, told: str) -> None:
    own.write_text(text)
    place, _, reason = told.partition(": ")
    line = place.replace("2", "[23]")  # Python 3.10 is at the function when it decorates it
    with pytest.raises(SettingsError, match=f"^TASKS_FILE: {re.escape(str(own))}{line}: {re.escape(reason)}"):
        load_file(own)


def test_a_task_may_be_written_in_the_ways_of_python(own: Path) -> None:
    """A bare decorator, a coroutine, a dataclass beside postponed hints, a module in the same folder."""
    (own.parent / "beside_it.py").write_text("MORE = 2\n")
    own.write_text(
        "from __future__ import annotations\nfrom dataclasses import dataclass\nfrom beside_it import MORE\n"
        "from queues.offer import task\n@dataclass\nclass Pair:\n    a: int\n"
        "@task\nasync def add(pair: Pair, *, more: int = MORE) -> int:\n    return pair.a + more\n"
    )
    load_file(own)
    assert offer.OFFERED["add"].function(pair={"a": 3}) == 5


@pytest.mark.parametrize("result", [date(2026, 11, 21), {1, 2}, b"x", {(1, 2): 3}, float("nan"), [{"a": object()}]])
def test_a_result_that_is_no_json_fails_the_job(own: Path, result: object) -> None:
    @offer.task
    def give() -> object:
        return result

    with pytest.raises(JobFailed, match="the task has run, but what it returns must be JSON: "):
        give()


def test_a_file_of_tasks_is_a_python_file(tmp_path: Path) -> None:
    (tmp_path / "own.txt").write_text(OWN)
    with pytest.raises(SettingsError, match="must be the path of a file"):
        load_file(tmp_path / "own.txt")
