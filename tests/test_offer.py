"""A task: its arguments are made from its type hints and checked."""

from __future__ import annotations

from datetime import date
from pathlib import Path
from typing import Annotated

import pytest
from pydantic import Field, ValidationError

from queues import offer
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


def test_a_task_is_not_offered_on_a_pooled_queue_where_nothing_could_interrupt_it() -> None:
    with pytest.raises(ValueError, match="must run on a queue that is not pooled"):
        offer.task(queue="email")


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


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("def x(:\n", r"own.py, line 1: invalid syntax"),
        ("\n\nimport no_such_module\n", r"own.py cannot be imported: ModuleNotFoundError .*own.py:3"),
        (
            "from queues.offer import task\n@task(queue='email')\ndef x() -> None: ...\n",
            r"cannot be imported: ValueError",
        ),
    ],
)
def test_a_file_of_tasks_that_cannot_be_imported_stops_the_start(tmp_path: Path, text: str, told: str) -> None:
    (tmp_path / "own.py").write_text(text)
    with pytest.raises(SettingsError, match=told):
        load_file(tmp_path / "own.py")


def test_a_file_of_tasks_is_a_python_file(tmp_path: Path) -> None:
    (tmp_path / "own.txt").write_text(OWN)
    with pytest.raises(SettingsError, match="must be the path of a file"):
        load_file(tmp_path / "own.txt")
