"""The log of real processes, in both forms: what is a line, and that both tell the same."""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import redis
from rq import Queue
from rq.serializers import JSONSerializer

from process.log import EVENTS
from tests.http_api import MAIL
from tests.relay import Relay
from tests.servers import ROOT, House, RedisServer, eventually
from tests.test_structure import modules


@pytest.fixture
def house(redis_server: RedisServer, tmp_path: Path) -> Iterator[House]:
    redis_server.reset()
    with Relay() as relay, House(tmp_path, redis_server.url, **relay.environment(tmp_path)) as house:
        house.environment["LOG_LEVEL"] = "INFO"
        relay.rcpt["gone@example.com"] = ["550 5.1.1 no such user"]
        yield house


def happen(house: House) -> None:
    """A mail is sent, one is refused, and RQ warns of a job that has no place here."""
    api = house.api()
    house.worker()
    for to, state in (("ada@example.com", "sent"), ("gone@example.com", "failed")):
        api.wait_for(api.submit(MAIL | {"to": to}), state)
    with redis.Redis.from_url(house.environment["REDIS_URL"]) as client:
        Queue("email", connection=client, serializer=JSONSerializer).enqueue("os.getcwd")
    eventually(lambda: "Traceback" in house.log("worker-email"))  # RQ tells of each job that should not fail


def test_every_event_that_is_told_is_known() -> None:
    calls = [node for tree in modules().values() for node in ast.walk(tree) if isinstance(node, ast.Call)]
    named = [one.args[0] for one in calls if ast.unparse(one.func) == "emit" and one.args]
    assert {one.value for arg in named for one in ast.walk(arg) if isinstance(one, ast.Constant)} <= EVENTS
    assert len(named) > 15


def lines(house: House, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in house.log(name).splitlines()]


def test_as_json_every_line_is_an_object_with_time_level_and_event(house: House) -> None:
    house.environment["LOG_FORMAT"] = "json"
    happen(house)
    for line in lines(house, "api") + lines(house, "worker-email"):
        assert datetime.fromisoformat(line["time"]).utcoffset() == timedelta(0)
        assert line["level"] in ("INFO", "WARNING", "ERROR")
        assert line["event"] in EVENTS if "event" in line else line.keys() >= {"logger", "message"}
    started, *requests = lines(house, "api")
    assert started["event"] == "api_started"
    first = requests[0]
    assert (first["event"], first["route"], first["status"], first["key"]) == ("request", "/emails", "200", "full")
    assert isinstance(first["ms"], float)
    failed = next(line for line in lines(house, "worker-email") if line.get("event") == "failed")
    assert failed["reason"] == "550 at rcpt"
    narrated = [line for line in lines(house, "worker-email") if "logger" in line]
    assert any(line["logger"].startswith("rq.") for line in narrated)


SAYS = """
import logging
from process.log import emit, say_why_not, set_up
say_why_not("first\\nsecond")
set_up("DEBUG", {form!r})
for level in (logging.DEBUG, logging.INFO, logging.WARNING, logging.ERROR, logging.CRITICAL):
    emit("busy", level)
try:
    1 / 0
except ZeroDivisionError:
    logging.getLogger("rq").exception("two\\nlines")
"""


@pytest.mark.parametrize("form", ["plain", "json"])
@pytest.mark.parametrize("redirected", [False, True])
def test_in_the_journal_each_line_has_its_priority_and_elsewhere_none(
    tmp_path: Path, form: str, redirected: bool
) -> None:
    """`journalctl -p warning` showed nothing: all that we say was `info`."""
    with (tmp_path / "log").open("w+") as log:
        seen = os.fstat(log.fileno())
        environment = {"JOURNAL_STREAM": f"{seen.st_dev}:{seen.st_ino + redirected}", "PYTHONPATH": str(ROOT)}
        command = [sys.executable, "-c", SAYS.format(form=form)]
        subprocess.run(command, stdout=log, stderr=log, env=environment, check=True)
        log.seek(0)
        written = log.read().splitlines()
    found = [re.match(r"<(\d)>", line) for line in written]
    if redirected:
        assert not any(found)
        return
    priorities = [int(one[1]) for one in found if one]
    assert len(priorities) == len(written)
    assert sorted(set(priorities)) == [2, 3, 4, 6, 7]
    assert priorities.count(3) >= 4  # also each line of a traceback, and of why a process does not start
    if form == "json":
        assert all(json.loads(line[3:]) for line in written[2:] if "first" not in line and "second" not in line)


def test_plain_is_a_line_of_words_per_event(house: House) -> None:
    happen(house)
    log = house.log("worker-email")
    assert re.search(r'^\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3} INFO failed id=\S+ reason="550 at rcpt"$', log, re.M)
    assert re.search(
        r"^\S+ \S+ INFO request method=POST route=/emails status=200 ms=\d+\.\d key=full id=", house.log("api"), re.M
    )
