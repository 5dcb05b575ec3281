"""The processes of one trial: started on loopback and free ports, weighed, and stopped by their ids.

A `Rig` has a Redis of its own and an empty folder, so no trial finds what another left. CPU seconds and memory (PSS,
which divides shared pages among their users) are those of a process and all that descend from it, from /proc.
"""

from __future__ import annotations

import getpass
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, ClassVar

from tests.servers import RedisServer, free_port, kill_group, start

PATIENCE = 30  # seconds for a part to answer
Processes = Sequence[subprocess.Popen[Any]]
TICKS = os.sysconf("SC_CLK_TCK")
NGINX = """
daemon off;
worker_processes 1;
user {user};
pid {place}/nginx.pid;
error_log {place}/nginx.log warn;
events {{ worker_connections 256; }}
http {{
  access_log off;
  client_body_temp_path {place}/body;
  proxy_temp_path {place}/proxy;
  fastcgi_temp_path {place}/fastcgi;
  uwsgi_temp_path {place}/uwsgi;
  scgi_temp_path {place}/scgi;
  keepalive_requests 1000000;
  upstream api {{ server 127.0.0.1:{api}; keepalive 16; keepalive_requests 1000000; }}
  server {{
    listen 127.0.0.1:{port};
    location = /nothing {{ return 200 "nothing"; }}
    location / {{
      proxy_pass http://api;
      proxy_http_version 1.1;
      proxy_set_header Connection "";
      proxy_set_header Host $host;
    }}
  }}
}}
"""


REDIS = ("--hash-max-ziplist-value", "2048")  # as docs/settings.md says, for both sides


class NotMeasured(Exception):
    """A trial has no figures; the text says why, in a sentence."""


class Rig:
    redis_program: ClassVar[str | None] = None  # chosen once for a whole run; None: the first that there is
    server: ClassVar[type[RedisServer]] = RedisServer

    def __init__(self, directory: Path, *redis_options: str) -> None:
        self.directory = directory
        options = ("--appendfsync", "everysec", *REDIS, *redis_options)
        self.redis_server = self.server(directory, *options, program=self.redis_program)
        self.processes: dict[str, subprocess.Popen[bytes]] = {}

    def __enter__(self) -> Rig:
        self.redis_server.start()
        return self

    def __exit__(self, *_: object) -> None:
        for process in reversed(self.processes.values()):
            kill_group(process)
        self.redis_server.kill()

    def start(
        self, name: str, command: Sequence[str], environment: Mapping[str, str], cwd: Path | None = None
    ) -> subprocess.Popen[bytes]:
        environment = {"PATH": os.environ["PATH"], **environment}
        log = self.directory / f"{name}.log"
        self.processes[name] = start(command, log, cwd=cwd or self.directory, env=environment)
        return self.processes[name]

    def nginx(self, api_port: int) -> int:
        """Starts nginx in front of an API. Returns the port on which it listens."""
        port = free_port()
        config = self.directory / "nginx.conf"
        config.write_text(NGINX.format(place=self.directory, user=getpass.getuser(), api=api_port, port=port))
        program = str(nginx_program())
        self.start("nginx", [program, "-p", str(self.directory), "-c", str(config), "-e", "nginx.log"], {})
        return port

    def wait_until(self, what: Callable[[], bool], words: str, seconds: float = PATIENCE) -> None:
        """Waits for a condition. Raises `NotMeasured` where it does not come about, or a process ends."""
        deadline = time.monotonic() + seconds
        while not what():
            dead = [name for name, process in self.processes.items() if process.poll() is not None]
            if dead or time.monotonic() > deadline:
                reason = f"{dead[0]} ended" if dead else "it took too long"
                raise NotMeasured(f"{words}: {reason}; its last words: {self.last_words()}")
            time.sleep(0.05)

    def last_words(self) -> str:
        lines = [line for log in self.directory.glob("*.log") for line in log.read_text().splitlines()[-2:]]
        return " / ".join(lines)[-500:] or "none"


def nginx_program() -> str | None:
    """Finds nginx also where Debian has it, which is not on everybody's PATH."""
    return shutil.which("nginx", path=f"{os.environ['PATH']}:/usr/sbin:/usr/local/sbin")


# --- /proc ------------------------------------------------------------------------------------------------------------


def descendants(processes: Processes) -> list[int]:
    """Returns the ids of these processes and of all below them."""
    found = [process.pid for process in processes]
    for pid in found:
        for children in Path(f"/proc/{pid}/task").glob("*/children"):
            with suppress(OSError):
                found += map(int, children.read_text().split())
    return found


def cpu_seconds(processes: Processes) -> float:
    """Returns user and system time, with that of children that have ended and were waited for."""
    total = 0
    for pid in descendants(processes):
        with suppress(OSError):
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()  # behind a name of any characters
            total += sum(map(int, fields[11:15]))
    return total / TICKS


def pss(processes: Processes) -> float:
    """Returns megabytes."""
    kilobytes = 0
    for pid in descendants(processes):
        with suppress(OSError):
            lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
            kilobytes += next(int(line.split()[1]) for line in lines if line.startswith("Pss:"))
    return kilobytes / 1024
