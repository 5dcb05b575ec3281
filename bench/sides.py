"""The sides of a measurement: our processes and the peers', as an operator would start each, and what fills its queue.

All read the same variables (REDIS_URL, SMTP_*, MAIL_FROM). The peers live in bench/peers/ and run in an environment of
their own, var/bench/venv, which `make_environment` makes from their pinned, hashed requirements. A peer that cannot be
set up is left out: `missing` says why.
"""

from __future__ import annotations

import hashlib
import subprocess
import sys
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from bench.backlog import fill
from bench.rig import Rig
from tests.servers import ROOT

PEERS = ROOT / "bench" / "peers"
VENV = ROOT / "var" / "bench" / "venv"
KEY = "measured"
COMMON = {
    "MAIL_FROM": "Acme <hello@example.com>",
    "API_KEYS": f"bench:{hashlib.sha256(KEY.encode()).hexdigest()}:full",
    "API_PROCESSES": "2",
    "WORKER_CONCURRENCY": "16",
    "PYTHONDONTWRITEBYTECODE": "1",
}


@dataclass(frozen=True)
class Side:
    """Describes one side. `framework` is None for ours."""

    framework: str | None
    worker: tuple[str, ...] = ()
    processes: int = 1  # of the worker, started beside one another
    warm: bool = False  # keeps an SMTP session per thread, or per process (bench/peers/welcome.py)

    @property
    def python(self) -> str:
        return str(VENV / "bin" / "python") if self.framework else sys.executable

    def environment(self, rig: Rig, **more: str) -> dict[str, str]:
        url = rig.redis_server.url
        return {**COMMON, "REDIS_URL": url, "RQ_REDIS_URL": url, "KEEP_SESSION": "1" if self.warm else "", **more}

    def start_api(self, rig: Rig, port: int) -> subprocess.Popen[bytes]:
        listen = f"127.0.0.1:{port}"
        command = ["-m", "gunicorn", "--workers", "2", "--bind", listen, "flask_app:app"]
        command = command if self.framework else [str(ROOT / "service.py")]
        return rig.start("api", [self.python, *command], self.environment(rig, LISTEN=listen), self._place)

    def start_workers(self, rig: Rig, relay: dict[str, str]) -> list[subprocess.Popen[bytes]]:
        command = [self.python, *(self.worker or [str(ROOT / "worker.py"), "email"])]
        environment = self.environment(rig, **relay)
        return [rig.start(f"worker-{n}", command, environment, self._place) for n in range(self.processes)]

    def fill(self, rig: Rig, mails: int) -> None:
        """Queues mails to m0@example.com, m1@example.com, ..."""
        if not self.framework:
            fill(rig.redis_server.url, mails)
            return
        command = [self.python, "fill.py", self.framework, str(mails)]
        subprocess.run(command, cwd=PEERS, env=self.environment(rig), check=True)

    @property
    def _place(self) -> Path | None:
        return PEERS if self.framework else None


CELERY = ("-m", "celery", "--app", "celery_app", "--quiet", "worker")
CELERY_16 = (*CELERY, "--concurrency", "16")
DRAMATIQ = ("-m", "dramatiq", "--processes", "2", "--threads", "8", "dramatiq_app")
RQ = ("-m", "rq.cli", "worker", "--quiet")
RQ_SIMPLE = (*RQ, "--worker-class", "rq.worker.SimpleWorker")
SIDES = {
    "ours": Side(None),
    "ours2": Side(None, processes=2),
    "celery": Side("celery", CELERY),
    "celery16": Side("celery", CELERY_16),
    "celery16_warm": Side("celery", CELERY_16, warm=True),
    "celery_threads_warm": Side("celery", (*CELERY_16, "--pool", "threads"), warm=True),
    "dramatiq": Side("dramatiq", DRAMATIQ),
    "dramatiq_warm": Side("dramatiq", DRAMATIQ, warm=True),
    "rq": Side("rq", RQ),  # forks for each mail, so there is nothing to keep
    "rq_simple": Side("rq", RQ_SIMPLE),
    "rq_simple_warm": Side("rq", RQ_SIMPLE, warm=True),
}


def make_environment() -> None:
    """Makes the peers' environment, once and again when their pins change. Says so where it cannot."""
    requirements, stamp = PEERS / "requirements.txt", VENV / "made-from"
    wanted = f"{sys.version} {hashlib.sha256(requirements.read_bytes()).hexdigest()}"
    if stamp.exists() and stamp.read_text() == wanted:
        return
    print("Making the peers' environment (once) ...", file=sys.stderr)
    pip = [str(VENV / "bin" / "python"), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    try:
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(VENV)], check=True)
        subprocess.run([*pip, "--require-hashes", "-r", str(requirements)], check=True)
        stamp.write_text(wanted)
    except (OSError, subprocess.CalledProcessError) as error:
        print(f"The peers' environment could not be made: {error}", file=sys.stderr)


@lru_cache
def missing(framework: str | None) -> str:
    """Returns why sides of this framework cannot be set up, and "" where they can."""
    if not framework:
        return ""
    try:
        command = [str(VENV / "bin" / "python"), "-I", "-c", f"import {framework}"]
        ran = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as error:
        return str(error)
    return ran.stderr.strip().rpartition("\n")[2] if ran.returncode else ""
