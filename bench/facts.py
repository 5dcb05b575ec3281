"""Tells on what it was measured, and how much the instruments can do at most."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import tempfile
from collections.abc import Sequence
from datetime import date
from importlib.metadata import version
from pathlib import Path

from bench.install import PEERS, missing, postfix_tool
from bench.load import generator
from bench.rig import Rig
from bench.side import COMMON, SENDERS
from bench.trials import load_ceiling, relay_ceiling, relay_ceiling_kept
from ops.checks.store import program

THEIRS = ("flask", "gunicorn", "celery", "dramatiq", "taskiq", "aiosmtplib", "rq")


def facts(server: str) -> list[str]:
    """Returns what is true before anything is measured."""
    system = platform.freedesktop_os_release()["PRETTY_NAME"] if Path("/etc/os-release").exists() else platform.system()
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    ours = ", ".join(f"{name} {version(name)}" for name in ("waitress", "bottle", "rq"))
    return [
        f"{date.today()}: {processor()}, {os.cpu_count()} cores, {memory:.0f} GB, {system}. "
        "Client, relay and Redis share the machine with what is measured.",
        f"Python {platform.python_version()}; {server} with `appendfsync everysec`, one for each trial.",
        f"Ours: {ours}, `API_PROCESSES={COMMON['API_PROCESSES']}`, `WORKER_CONCURRENCY={SENDERS}`, in one process "
        f"or shared by two. Theirs: {', '.join(peers())}.",
    ]


def peers() -> list[str]:
    listed = {line.split("==")[0]: line.split()[0] for line in (PEERS / "requirements.txt").open() if "==" in line}
    names = [listed[name].replace("==", " ") for name in THEIRS]
    if not missing("bullmq"):
        locked = json.loads((PEERS / "bullmq" / "package.json").read_text())["dependencies"]
        names += [f"{name} {locked[name]}" for name in ("bullmq", "nodemailer")]
        names[-1] += f" (node {run_text('node', '--version').strip().lstrip('v')})"
    if not missing("postfix"):
        names.append(f"Postfix {run_text(str(postfix_tool('postconf')), '-dhx', 'mail_version').strip()}")
    return names


def run_text(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def ceilings(chosen: Sequence[str]) -> list[str]:
    """Measures the instruments of these measurements."""
    said = []
    with tempfile.TemporaryDirectory(prefix="bench-") as place:
        if "accept" in chosen:
            rate = load_ceiling(Path(place))
            said.append(f"Requests come from {generator()}, which makes {rate:,.0f} a second of nginx alone.")
    with tempfile.TemporaryDirectory(prefix="bench-") as place:
        if any(name.startswith("send") for name in chosen):
            kept = f"{relay_ceiling_kept(Path(place)):,.0f} mails a second over one connection"
            if not missing("dramatiq"):
                each = f"{relay_ceiling(Path(place)):,.0f} where each has a session of its own with STARTTLS and AUTH"
                kept = f"{kept}, {each}"
            said.append(f"One core of the relay simulator takes {kept}. How busy it was stands in the tables.")
    return said


def processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def redis_version() -> str:
    with tempfile.TemporaryDirectory(prefix="bench-") as place, Rig(Path(place)) as rig:
        return program(rig.redis_server.client().info("server"))
