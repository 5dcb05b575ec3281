"""Sets up the peers in var/bench/: those in Python in a virtual environment, BullMQ beside its packages from npm.

Each is made once, from pinned and hashed files (requirements.txt, package-lock.json), and again when those change. What
cannot be set up is left out of the measurements: `missing` says why.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

from tests.servers import ROOT

PEERS = ROOT / "bench" / "peers"
VENV = ROOT / "var" / "bench" / "venv"
BULLMQ = ROOT / "var" / "bench" / "bullmq"


def install_peers() -> None:
    _once(VENV, [PEERS / "requirements.txt"], sys.version, _make_environment)
    if shutil.which("npm"):
        _once(BULLMQ, sorted((PEERS / "bullmq").iterdir()), "", _install_bullmq)


def _once(place: Path, sources: list[Path], version: str, make: Callable[[], None]) -> None:
    """Makes a place, unless it is made from these sources already. Says so where it cannot."""
    stamp = place / "made-from"
    wanted = f"{version} {hashlib.sha256(b''.join(path.read_bytes() for path in sources)).hexdigest()}"
    if stamp.exists() and stamp.read_text() == wanted:
        return
    print(f"Making {place.relative_to(ROOT)} (once) ...", file=sys.stderr)
    try:
        make()
        stamp.write_text(wanted)
    except (OSError, subprocess.CalledProcessError) as error:
        print(f"{place.relative_to(ROOT)} could not be made: {error}", file=sys.stderr)


def _make_environment() -> None:
    pip = [str(VENV / "bin" / "python"), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    subprocess.run([sys.executable, "-m", "venv", "--clear", str(VENV)], check=True)
    subprocess.run([*pip, "--require-hashes", "-r", str(PEERS / "requirements.txt")], check=True)


def _install_bullmq() -> None:
    shutil.rmtree(BULLMQ, ignore_errors=True)
    shutil.copytree(PEERS / "bullmq", BULLMQ)
    subprocess.run(["npm", "ci", "--ignore-scripts", "--no-audit", "--no-fund", "--silent"], cwd=BULLMQ, check=True)


@lru_cache
def missing(framework: str | None) -> str:
    """Returns why sides of this framework cannot be set up, and "" where they can."""
    if not framework:
        return ""
    if framework == "postfix":
        return "" if postfix_tool("postfix") and os.geteuid() == 0 else "it must be installed, and started by root"
    command = [str(VENV / "bin" / "python"), "-I", "-c", f"import {framework}"]
    if framework == "bullmq":
        command = ["node", "-e", f"require('{BULLMQ}/node_modules/bullmq')"]
    try:
        ran = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as error:
        return str(error)
    lines = ran.stderr.strip().splitlines() or ["?"]
    return next((line for line in lines if "Error" in line), lines[-1]) if ran.returncode else ""


def postfix_tool(name: str) -> str | None:
    """Finds a program of Postfix also where Debian has it, which is not on everybody's PATH."""
    return shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin:/usr/local/sbin")
