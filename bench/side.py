"""One side of a measurement: its processes, as an operator would start them, and what fills its queue.

All read the same variables (REDIS_URL, SMTP_*, MAIL_FROM). The peers live in bench/peers/; bench/install.py sets them
up.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from bench.backlog import fill
from bench.install import BULLMQ, PEERS, VENV
from bench.rig import Rig
from tests.servers import ROOT

KEY = "measured"
SENDERS = 16  # mails at once
COMMON = {
    "MAIL_FROM": "Acme <hello@example.com>",
    "API_KEYS": f"bench:{hashlib.sha256(KEY.encode()).hexdigest()}:full",
    "API_PROCESSES": "2",
    "PYTHONDONTWRITEBYTECODE": "1",
}


@dataclass(frozen=True)
class Side:
    """Describes one side. `framework` is None for ours."""

    framework: str | None
    worker: tuple[str, ...] = ()  # {each}: how many mails a process sends at once; {number}: of the command
    processes: int = 1
    commands: int = 1  # started beside one another; together they have those processes
    warm: bool = False  # keeps SMTP sessions (bench/peers/)

    @property
    def program(self) -> str:
        if self.framework == "bullmq":
            return "node"
        return str(VENV / "bin" / "python") if self.framework else sys.executable

    @property
    def place(self) -> Path | None:
        return BULLMQ if self.framework == "bullmq" else PEERS if self.framework else None

    def environment(self, rig: Rig, **more: str) -> dict[str, str]:
        url = rig.redis_server.url
        return {**COMMON, "REDIS_URL": url, "RQ_REDIS_URL": url, "KEEP_SESSION": "1" if self.warm else "", **more}

    def start_api(self, rig: Rig, port: int) -> subprocess.Popen[bytes]:
        listen = f"127.0.0.1:{port}"
        command = ["-m", "gunicorn", "--workers", "2", "--bind", listen, "flask_app:app"]
        command = command if self.framework else [str(ROOT / "service.py")]
        return rig.start("api", [self.program, *command], self.environment(rig, LISTEN=listen), self.place)

    def start_workers(
        self, rig: Rig, relay: Mapping[str, str], senders: int = SENDERS
    ) -> list[subprocess.Popen[bytes]]:
        each = str(senders // self.processes)
        forks = {
            "WORKER_CONCURRENCY": each if self.framework else str(senders),
            "WORKER_PROCESSES": str(self.processes),
        }
        environment = self.environment(rig, **forks, **relay)
        commands = [[part.format(each=each, number=number) for part in self.worker] for number in range(self.commands)]
        return [
            rig.start(f"worker-{number}", [self.program, *command], environment, self.place)
            for number, command in enumerate(commands)
        ]

    def fill(self, rig: Rig, mails: int) -> None:
        """Queues mails to m0@example.com, m1@example.com, ..."""
        if not self.framework:
            fill(rig.redis_server.url, mails)
            return
        script = ["fill.js"] if self.framework == "bullmq" else ["fill.py", self.framework]
        environment = {"PATH": os.environ["PATH"], **self.environment(rig)}
        subprocess.run([self.program, *script, str(mails)], cwd=self.place, env=environment, check=True)
