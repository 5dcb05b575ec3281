"""`bin/dev` as a user runs it: everything up, a mail on the catcher's page, everything down, the queue kept."""

from __future__ import annotations

import errno
import json
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

import settings
import tasks
from mail.address import Mailbox
from mail.draft import prepare
from ops import dev, lock
from queues import offer
from tests.checks.support import fake
from tests.http_api import MAIL
from tests.servers import Api, copy_project, eventually, free_port


class Dev:
    """`python -m ops.dev` on free ports, in a copy of the project so that its var/dev is its own."""

    def __init__(self, project: Path) -> None:
        self.project = project
        self.ports = {name: free_port() for name in ("api", "submission", "dashboard", "smtp", "mail", "redis")}

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
        """Processes, by pid and command, that run in this copy of the project."""
        found = []
        for process in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):
                if (process / "cwd").readlink().is_relative_to(self.project):
                    found.append(f"{process.name} {(process / 'cmdline').read_text()}")
        return found


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
        assert name in ("smtp", "redis") or f" {'' if name == 'submission' else 'http://'}127.0.0.1:{port}" in said
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


@pytest.mark.parametrize("how", ["kill -9", "closed terminal", "head"])
def test_nothing_runs_on_however_it_ends(running: Dev, how: str) -> None:
    running.start_and_read_the_welcome()
    assert running.process.stdout
    if how != "kill -9":
        running.process.stdout.close()  # then nothing can be printed any more
    if how == "head":
        Api(running.ports["api"], key="dev").submit(MAIL)  # of which a line would be printed
    else:
        running.process.send_signal(signal.SIGKILL if how == "kill -9" else signal.SIGHUP)
    assert running.process.wait(60) == (-signal.SIGKILL if how == "kill -9" else 0)
    running.process.stdout.close()
    eventually(lambda: running.left_over() == [], 30)


def test_a_second_one_on_other_ports_leaves_the_queue_to_the_first(running: Dev) -> None:
    """Two servers that append to one file send mail twice, and leave it unreadable."""
    running.start_and_read_the_welcome()
    said, _ = Dev(running.project).start().communicate(timeout=60)
    folder, pid = running.project / "var/dev/catcher", running.process.pid
    assert said == f"{folder} is in use by bin/dev (process {pid}): only one may write there, so end that one first\n"


def test_a_redis_that_outlives_its_bin_dev_still_holds_the_queue(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lock, "PATIENCE", 0.1)
    with lock.take(tmp_path) as held:
        lock.write(held, lock.Holder(dev=2**22 + 1, redis=os.getpid(), port=6380))
        inherited = os.dup(held.fileno())
    with pytest.raises(lock.Held, match=rf"by the Redis of an earlier bin/dev \(process {os.getpid()}\): only one"):
        lock.take(tmp_path)
    os.close(inherited)
    lock.take(tmp_path).close()


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


def test_each_taken_port_is_one_sentence_that_names_the_flag(project: Path) -> None:
    running = Dev(project)
    with socket.socket() as one, socket.socket() as other:
        for taken, name in ((one, "api"), (other, "mail")):
            taken.bind(("127.0.0.1", running.ports[name]))
            taken.listen()
        said, _ = running.start().communicate(timeout=60)
    assert said == "".join(
        f"Port {running.ports[name]} is taken: stop what uses it, or choose another with --{name}-port.\n"
        for name in ("api", "mail")
    )
    assert running.process.returncode == 1


@pytest.mark.parametrize("port", ["0", "65536", "99999", "-1", "80a", "", "1e3", "٨٠"])
def test_what_is_no_port_is_one_sentence(port: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        dev.parse_arguments([f"--mail-port={port}"])
    said = capsys.readouterr().err.splitlines()[-1]
    assert said == f"bin/dev: error: argument --mail-port: must be a number from 1 to 65535, and is {port!r}"


@pytest.mark.parametrize(
    ("number", "said"),
    [
        (
            errno.EACCES,
            "Port 80 cannot be opened (Permission denied): choose another with --api-port. Those below 1024",
        ),
        (errno.EPERM, "Port 80 cannot be opened (Operation not permitted): choose another with --api-port."),
        (errno.EADDRNOTAVAIL, "Port 80 cannot be opened (Cannot assign requested address): choose another"),
        (errno.EADDRINUSE, "Port 80 is taken: stop what uses it, or choose another with --api-port."),
    ],
)
def test_a_port_is_called_taken_only_if_it_is(number: int, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def bind(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(socket.socket, "bind", bind)
    with pytest.raises(dev.Failed, match=re.escape(said)):
        dev.check_ports({"--api-port": 80})


def test_a_port_given_twice_is_one_sentence() -> None:
    port = free_port()
    with pytest.raises(
        dev.Failed, match=rf"^Port {port} is given twice: choose another with --api-port or --mail-port"
    ):
        dev.check_ports({"--api-port": port, "--mail-port": port})


def written_by(folder: Path, base: bytes) -> Path:
    (folder / "appendonlydir").mkdir()
    (folder / "appendonlydir" / "appendonly.aof.1.base.rdb").write_bytes(base)
    return folder


def test_a_queue_that_no_server_here_can_read_is_one_sentence_with_the_folder_and_the_remedy(tmp_path: Path) -> None:
    """As Redis 7.0 finds what Valkey 9 wrote: `VALKEY080` where it looks for `REDIS`."""
    folder = written_by(tmp_path, b"KEYDB999" + bytes(80))
    with pytest.raises(dev.Failed, match=rf" cannot read {folder}: a newer server wrote it, .* rm -r {folder}$"):
        dev.find_redis_server(folder)


def test_of_two_servers_that_one_starts_which_can_read_the_queue(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Somebody installed redis-server after the bundled Valkey had written the folder."""
    older = tmp_path / "redis-server"
    older.write_text('#!/bin/sh\n! grep -q ^VALKEY "$1"\n')
    older.chmod(0o755)
    monkeypatch.setattr(dev, "redis_servers", lambda: [str(older), "/bin/true"])
    assert dev.find_redis_server(tmp_path) == str(older)
    written_by(tmp_path, b"VALKEY080")
    assert dev.find_redis_server(tmp_path) == "/bin/true"


def test_no_redis_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dev, "redis_servers", lambda: [])
    with pytest.raises(dev.Failed, match=r"install one \(Debian, Ubuntu: sudo apt install redis-server\)"):
        dev.run(dev.Stack(), dev.parse_arguments([]))


def test_data_that_cannot_be_written_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "var").touch()
    with pytest.raises(dev.Failed, match=r"/var/dev cannot be written \(Not a directory\): run bin/dev as the user"):
        dev.Stack().begin(tmp_path / "var/dev")


def test_a_wrong_setting_is_told_before_anything_starts(project: Path) -> None:
    said, _ = Dev(project).start(SMTP_PORT="x").communicate(timeout=60)
    assert said.splitlines()[0].startswith("SMTP_PORT: ")
    assert "Traceback" not in said


@pytest.mark.parametrize(("part", "word"), [("catcher", "ops.catcher"), ("redis", "-server 127.0.0.1")])
def test_a_part_that_dies_takes_the_rest_with_it_and_is_named(running: Dev, part: str, word: str) -> None:
    running.start_and_read_the_welcome()
    victim = next(line.split()[0] for line in running.left_over() if word in line)
    os.kill(int(victim), signal.SIGKILL)
    rest, _ = running.process.communicate(timeout=20)  # without Redis nothing can finish, so that is not waited for
    assert f"{part} was killed by signal 9. Stopping the rest." in rest
    assert running.process.returncode == 1
    assert running.left_over() == []


def test_a_python_without_venv_is_one_sentence(project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Debian's python3 without python3-venv: `import ensurepip` fails."""
    fake(tmp_path, "python3", f'case "$*" in *ensurepip*) exit 1;; esac\nexec {sys.executable} "$@"', monkeypatch)
    ran = subprocess.run([project / "bin/dev"], capture_output=True, text=True, timeout=60)
    assert ran.returncode == 1
    assert ran.stderr.startswith("Python's venv module is missing: install it (Debian, Ubuntu: sudo apt install")
    assert ran.stderr.count("\n") == 1


def test_a_key_that_bin_key_made_opens_the_api_beside_dev(running: Dev) -> None:
    made = [sys.executable, "-c", "from ops.key import main; main()", "new", "dev", "--file", ".env"]
    key = subprocess.run(made, cwd=running.project, capture_output=True, text=True, check=True).stdout.strip()
    assert "key: dev (and those in .env: dev)" in running.start_and_read_the_welcome()
    mail_id = Api(running.ports["api"], key).submit(MAIL)
    assert Api(running.ports["api"], "dev").email(mail_id)["id"] == mail_id
    assert Api(running.ports["api"], key).get(f"/jobs/{mail_id}").body["name"] == "restricted_api_key"


def venv(project: Path, tmp_path: Path, *arguments: str) -> list[str]:
    """What bin/venv says, and the files that it has installed, with a pip that only says so."""
    ran = subprocess.run([project / "bin/venv", *arguments], capture_output=True, text=True, timeout=60)
    log = tmp_path / "pip.log"
    installed = log.read_text().split() if log.exists() else []
    log.unlink(missing_ok=True)
    return [*ran.stderr.splitlines(), *ran.stdout.splitlines(), *(name for name in installed if name.endswith(".txt"))]


@pytest.fixture
def _no_pip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pip = tmp_path / "pip"
    pip.write_text(f"#!/bin/sh\necho $* >>{tmp_path}/pip.log; echo Collecting six==1.0 from here\n")
    pip.chmod(0o755)
    fake(
        tmp_path,
        "python3",
        f'case "$*" in *--clear*) mkdir -p .venv/bin && cp {pip} .venv/bin; exit;; esac\nexec {sys.executable} "$@"',
        monkeypatch,
    )


@pytest.mark.usefixtures("_no_pip")
def test_bin_dev_installs_only_what_it_runs_and_bin_test_the_rest(project: Path, tmp_path: Path) -> None:
    run = ["requirements.txt", "requirements-dev.txt"]
    assert venv(project, tmp_path) == ["Making .venv (once; it takes about half a minute):", "  six==1.0", *run]
    assert venv(project, tmp_path) == []
    more = ["Adding to .venv what the tests need (once):", "  six==1.0", *run, "requirements-test.txt"]
    assert venv(project, tmp_path, "--tests") == more
    assert venv(project, tmp_path, "--tests") == venv(project, tmp_path) == []
    (project / "requirements-test.txt").write_text("")
    assert venv(project, tmp_path)[-2:] == run


@pytest.mark.usefixtures("_no_pip")
def test_a_venv_is_made_anew_only_for_a_reason_that_is_said_and_not_while_bin_dev_runs(
    project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert venv(project, tmp_path, "--help")[0].startswith("Makes .venv")
    own = project / ".venv/bin/python"
    own.parent.mkdir(parents=True)
    own.write_text(f"#!/bin/sh\necho {tmp_path}/programs/python3\n")
    own.chmod(0o755)
    assert venv(project, tmp_path)[0].startswith("Making .venv (anew, since it is not complete; it takes")
    (tmp_path / "other/programs").mkdir(parents=True)
    fake(tmp_path / "other", "python3", f'[ $# = 2 ] && exec {sys.executable} "$@"; echo another', monkeypatch)
    assert venv(project, tmp_path) == []  # it keeps its own Python
    (project / "requirements.txt").write_text("six==1.1\n")
    (project / "var/dev/relay").mkdir(parents=True)
    with lock.take(project / "var/dev/relay"):
        [said] = venv(project, tmp_path)
    why = "anew, since its Python or the requirements have changed"
    assert (
        said == f"Making .venv ({why}) must wait until nothing runs from it: end bin/dev (process {os.getpid()}) first."
    )
    assert venv(project, tmp_path)[0].startswith(f"Making .venv ({why}; it takes")


@pytest.mark.parametrize("name", ["breaker", "restore"])
def test_a_command_without_its_venv_says_what_makes_one(project: Path, name: str) -> None:
    ran = subprocess.run([project / "bin" / name], capture_output=True, text=True)
    assert (ran.returncode, ran.stderr.partition(":")[0]) == (1, "there is no .venv here")


def test_bin_test_says_at_once_how_to_use_it(project: Path) -> None:
    ran = subprocess.run([project / "bin/test", "-x", "--help"], capture_output=True, text=True, timeout=5, check=True)
    assert "Arguments go to pytest" in ran.stdout
    assert not (project / ".venv").exists()


def test_with_a_relay_in_the_environment_there_is_no_catcher_and_no_sender_of_ours(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    ports = dev.parse_arguments([])
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SMTP_HOST", "relay.example.com")
    with pytest.raises(settings.SettingsError, match=r"^MAIL_FROM is not set: name the sender"):
        dev.run(dev.Stack(), ports)
    monkeypatch.setenv("MAIL_FROM", "Acme <hello@acme.example>")
    configured = settings.load()
    assert "SMTP_HOST" not in dev.child_settings(ports, configured)
    assert dev.child_settings(ports, configured)["REDIS_REPLICAS"] == "0"
    assert "Mail goes to   relay.example.com:587, from Acme <hello@acme.example>" in dev.welcome(ports, configured)


def test_the_tasks_with_cron_are_told_the_next_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(offer, "OFFERED", {})
    monkeypatch.setattr(tasks, "OFFERED", offer.OFFERED)
    monkeypatch.setattr(sys, "path", sys.path.copy())
    (tmp_path / "own.py").write_text(
        "from queues.offer import task\n"
        "@task\ndef never() -> None: ...\n"
        "@task(cron='0 7 29 2 *')\ndef rare() -> None: ...\n"
        "@task(cron='* * * * *')\ndef often() -> None: ...\n"
    )
    said = dev.welcome(dev.parse_arguments([]), settings.Settings(tasks_file=tmp_path / "own.py"))
    rows = re.findall(r"^  Cron +(\w+): next at \d{4}-\d\d-\d\d \d\d:\d\d$", said, re.MULTILINE)
    assert rows == ["often", "rare"]


def test_the_curl_needs_no_template_that_there_is_not(tmp_path: Path) -> None:
    ports, own = dev.parse_arguments([]), settings.Settings(templates_dir=tmp_path)
    said = dev.welcome(ports, own)
    body = json.loads(re.findall(r"/emails .*\n.* -d '(.*)'", said)[0])
    assert prepare(body, default_sender=Mailbox("", "a@example.com"), max_recipients=1)
    (tmp_path / "welcome").mkdir()
    assert "/start-job" in dev.welcome(ports, own)
