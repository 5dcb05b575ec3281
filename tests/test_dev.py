"""`bin/dev` as a user runs it: everything up, a mail on the catcher's page, everything down, the queue kept."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import settings
from ops import dev
from tests.checks.support import fake
from tests.http_api import MAIL
from tests.servers import Api, copy_project, eventually, free_port


class Dev:
    """`python -m ops.dev` on free ports, in a copy of the project so that its var/dev is its own."""

    def __init__(self, project: Path) -> None:
        self.project = project
        self.ports = {name: free_port() for name in ("api", "dashboard", "smtp", "mail", "redis")}

    def start(self, **environment: str) -> subprocess.Popen[str]:
        flags = [f"--{name}-port={port}" for name, port in self.ports.items()]
        self.process = subprocess.Popen(
            [sys.executable, "-m", "ops.dev", *flags],
            cwd=self.project,
            env={"PATH": os.environ["PATH"], **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        return self.process

    def start_and_read_the_welcome(self) -> str:
        assert self.start().stdout
        said = ""
        for line in self.process.stdout or ():
            said += line
            if "/start-job" in said and line.strip().startswith("-H"):
                return said
        raise AssertionError(said)

    def stop(self) -> str:
        self.process.send_signal(signal.SIGINT)
        rest, _ = self.process.communicate(timeout=60)
        return rest

    def left_over(self) -> list[str]:
        """Processes whose command line names this copy of the project or one of its ports."""
        marks = [str(self.project), *map(str, self.ports.values())]
        listed = subprocess.run(["ps", "-ww", "-eo", "pid,args"], capture_output=True, text=True, check=True).stdout
        return [line for line in listed.splitlines() if any(mark in line.split(maxsplit=1)[1] for mark in marks)]


@pytest.fixture
def project(tmp_path: Path) -> Path:
    return copy_project(tmp_path)


@pytest.fixture
def running(project: Path) -> Iterator[Dev]:
    running = Dev(project)
    yield running
    if running.process.poll() is None:
        running.stop()


def test_the_curl_that_it_prints_puts_a_mail_on_the_catchers_page_and_prints_a_line_per_event(running: Dev) -> None:
    said = running.start_and_read_the_welcome()
    curl = re.search(r"curl -X POST .*?\n.*", said)
    assert curl
    posted = subprocess.run(["bash", "-c", curl[0].replace("curl", "curl -sSf")], check=True, capture_output=True)
    catcher = Api(running.ports["mail"])
    [message] = eventually(lambda: catcher.get("/messages").body["messages"])
    assert message["subject"] == "Welcome, Ada"
    for name, port in running.ports.items():
        assert name in ("smtp", "redis") or f"http://127.0.0.1:{port}" in said
    Api(running.ports["api"], key="dev").wait_for(json.loads(posted.stdout)["job_id"], "sent")
    lines = [line for line in running.stop().splitlines() if line and line != "Stopping ..."]
    assert sorted(line.split()[0] for line in lines) == ["api", "catcher", "email"], lines
    assert "ada@example.com" not in "".join(lines)


def test_ctrl_c_stops_everything_and_the_next_start_finds_the_queue(running: Dev) -> None:
    running.start_and_read_the_welcome()
    api = Api(running.ports["api"], key="dev")
    mail_id = api.submit(MAIL)
    api.wait_for(mail_id, "sent")
    running.stop()
    assert running.process.returncode == 0
    assert running.left_over() == []
    running.start_and_read_the_welcome()
    assert api.email(mail_id)["status"] == "sent"
    api.submit(MAIL)


def test_a_transaction_that_a_crash_left_unfinished_is_cut_off_first(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """By what makes the command that starts Redis; tests/test_aof.py has what is cut."""
    log = tmp_path / "appendonly.aof"
    log.write_bytes(b"*1\r\n$5\r\nMULTI\r\n*3\r\n$3\r\nSET\r\n$4\r\nhalf\r\n$1\r\n1\r\n*1\r")
    server = dev.find_redis_server()
    assert server
    assert str(tmp_path) in dev.redis_command(server, 6380, tmp_path)
    assert capsys.readouterr().out.startswith(f"redis      {log}: cut off the last transaction")
    assert log.read_bytes() == b""


def test_a_taken_port_is_one_sentence_that_names_the_flag(project: Path) -> None:
    running = Dev(project)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", running.ports["mail"]))
        taken.listen()
        said, _ = running.start().communicate(timeout=60)
    assert said == f"Port {running.ports['mail']} is taken: stop what uses it, or choose another with --mail-port.\n"
    assert running.process.returncode == 1


def test_no_redis_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dev, "find_redis_server", lambda: None)
    with pytest.raises(dev.Failed, match=r"install one \(Debian, Ubuntu: sudo apt install redis-server\)"):
        dev.run(dev.Stack(), dev.parse_arguments([]))


def test_a_wrong_setting_is_told_before_anything_starts(project: Path) -> None:
    said, _ = Dev(project).start(SMTP_PORT="x").communicate(timeout=60)
    assert said.splitlines()[0].startswith("SMTP_PORT: ")
    assert "Traceback" not in said


def test_a_part_that_dies_takes_the_rest_with_it_and_is_named(running: Dev) -> None:
    running.start_and_read_the_welcome()
    victim = next(line.split()[0] for line in running.left_over() if "ops.catcher" in line)
    os.kill(int(victim), signal.SIGKILL)
    rest, _ = running.process.communicate(timeout=60)
    assert "catcher stopped by itself" in rest
    assert running.process.returncode == 1
    assert running.left_over() == []


def test_a_python_without_venv_is_one_sentence(project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Debian's python3 without python3-venv: `import ensurepip` fails."""
    fake(tmp_path, "python3", f'case "$*" in *ensurepip*) exit 1;; esac\nexec {sys.executable} "$@"', monkeypatch)
    ran = subprocess.run([project / "bin/dev"], capture_output=True, text=True, timeout=60)
    assert ran.returncode == 1
    assert ran.stderr.startswith("Python's venv module is missing: install it (Debian, Ubuntu: sudo apt install")
    assert ran.stderr.count("\n") == 1


def test_with_a_relay_in_the_environment_there_is_no_catcher(monkeypatch: pytest.MonkeyPatch) -> None:
    ports = dev.parse_arguments([])
    monkeypatch.setenv("SMTP_HOST", "relay.example.com")
    configured = settings.load()
    assert "SMTP_HOST" not in dev.child_settings(ports, configured)
    assert "mail goes to relay.example.com:587" in dev.welcome(ports, configured)
