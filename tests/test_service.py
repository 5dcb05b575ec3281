"""The process that HTTP comes into: how it ends, and why it does not begin."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from redis import Redis

from tests.http_api import MAIL, stored
from tests.redis_troubles import stopped
from tests.servers import ROOT, Api, House, RedisServer, copy_project, eventually, free_port

pytestmark = pytest.mark.usefixtures("client")
Process = tuple[subprocess.Popen[bytes], Api]


@pytest.fixture
def process(redis_server: RedisServer, tmp_path: Path) -> Iterator[Process]:
    with House(tmp_path, redis_server.url) as house:
        api = house.api()
        yield house.processes[0], api


def test_a_request_in_flight_at_SIGTERM_is_answered(process: Process, redis_server: RedisServer, client: Redis) -> None:
    running, api = process
    with ThreadPoolExecutor() as pool:
        with stopped(redis_server):
            asked = pool.submit(api.post, "/emails", MAIL)
            time.sleep(0.3)
            assert not asked.done()
            running.terminate()
            time.sleep(0.2)
        answer = asked.result()
    assert answer.status == 200
    assert stored(client) == {answer.body["id"]}
    assert running.wait(10) == 0


def test_a_vain_wait_for_redis_at_SIGTERM_is_answered(process: Process, redis_server: RedisServer) -> None:
    running, api = process
    with ThreadPoolExecutor() as pool, stopped(redis_server):
        asked = pool.submit(api.post, "/emails", MAIL)
        time.sleep(0.3)
        running.terminate()
        assert asked.result().status == 503
        assert running.wait(10) == 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_an_idle_process_ends_at_once(process: Process, number: signal.Signals) -> None:
    running, _ = process
    running.send_signal(number)
    assert running.wait(3) == 0


def refusal(tmp_path: Path, **changes: str | None) -> list[str]:
    """The lines of a service that does not get as far as to serve."""
    usual = House(tmp_path, "redis://127.0.0.1:9").environment | {"LISTEN": f"127.0.0.1:{free_port()}"}
    environment = {name: value for name, value in (usual | changes).items() if value is not None}
    command = [sys.executable, str(ROOT / "service.py")]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (2, "")
    return done.stderr.splitlines()


def test_an_address_that_cannot_be_listened_on_is_said_in_one_sentence(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        taken = f"127.0.0.1:{other.getsockname()[1]}"
        said = refusal(tmp_path, LISTEN=taken, PYTHONWARNINGS=None)
    assert said == [f"LISTEN: cannot listen on {taken}: Address already in use"]
    nowhere = "999.999.999.999:8000"
    assert refusal(tmp_path, LISTEN=nowhere) == [f"LISTEN: cannot listen on {nowhere}: there is no such host"]


def test_settings_that_are_missing_are_named_all_at_once(tmp_path: Path) -> None:
    said = refusal(tmp_path, API_KEYS=None, MAIL_FROM=None)
    assert [line.partition(": ")[0] for line in said] == ["API_KEYS is not set", "MAIL_FROM is not set"]


@pytest.mark.parametrize("sender", ["nobody", "a@b.example, c@d.example", "A\tB <a@b.example>"])
def test_a_sender_that_no_mail_could_have_is_refused_at_the_start(tmp_path: Path, sender: str) -> None:
    (line,) = refusal(tmp_path, MAIL_FROM=sender)
    assert line.startswith("MAIL_FROM: ")


def test_it_starts_while_redis_is_away(tmp_path: Path) -> None:
    with House(tmp_path, f"redis://127.0.0.1:{free_port()}") as house:
        assert house.api().post("/emails", MAIL).status == 503


def test_a_broken_template_stops_the_start_with_one_sentence(house: House, tmp_path: Path) -> None:
    root = copy_project(tmp_path)
    (root / "templates" / "welcome" / "body.txt").write_text("Hello\n{{ name\n")
    command = [sys.executable, str(root / "service.py")]
    ran = subprocess.run(command, env=house.environment, cwd=house.directory, capture_output=True, text=True)
    assert (ran.returncode, ran.stdout) == (2, "")
    assert ran.stderr.startswith("templates/welcome/body.txt, line 2: unexpected end of template")
    assert ran.stderr.count("\n") == 1


def test_a_template_broken_while_it_runs_is_named_in_the_answer_and_in_the_log(house: House, tmp_path: Path) -> None:
    house.root = copy_project(tmp_path)
    port = free_port()
    house.environment["LISTEN"] = f"127.0.0.1:{port}"
    house.run("api-reload", str(house.root / "service.py"), "--reload-templates")
    api = Api(port)
    eventually(lambda: api.answers("/healthz"))
    welcome = {"to": "ada@example.com", "template": {"id": "welcome", "variables": {"name": "Ada"}}}
    assert api.post("/emails", welcome).status == 200
    (house.root / "templates" / "welcome" / "body.txt").write_text("Hello {{ name }")
    answer = api.post("/emails", welcome)
    assert (answer.status, answer.body["name"]) == (500, "application_error")
    assert answer.body["message"] == "templates/welcome/body.txt, line 1: unexpected '}'"
    crashed = f'crashed request_id={answer.body["request_id"]} where="{answer.body["message"]}"'
    assert crashed in house.log("api-reload")
