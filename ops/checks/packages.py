"""Checks that Python and its packages are those that requirements.txt pins, and that the processes can import them.

Standard library only, since it must be able to say that everything else is missing. Where a package has several pins,
pip decides which one applies to this Python; only a version that matches none of them is a fault.
"""

from __future__ import annotations

import importlib
import re
import sys
from collections import defaultdict
from importlib import metadata
from pathlib import Path

from ops.checks.findings import Findings, fault, note, ok
from ops.checks.target import Target

OLDEST = (3, 10)
PROCESSES = ("service", "worker", "ops.dashboard")
PIN = re.compile(r"^([A-Za-z0-9_.-]+)==([^\s;\\]+)(\s*;)?", re.MULTILINE)


def python(target: Target) -> Findings:
    version = ".".join(map(str, sys.version_info[:3]))
    if sys.version_info < OLDEST:
        yield fault(f"this is Python {version}, and 3.10 is needed", "sudo apt install python3.11 python3.11-venv")
    elif (made := made_for()) not in ("", here := ".".join(map(str, sys.version_info[:2]))):
        found = f"the .venv was made for Python {made}, and this is {here}: the system has another one now"
        yield fault(found, install(target))
    elif sys.prefix == sys.base_prefix:
        yield note(f"Python {version}, and not that of .venv: {sys.executable}", "run bin/doctor")
    else:
        yield ok(f"Python {version} in {sys.prefix}")


def made_for() -> str:
    """Returns the `3.11` of the Python that has made this .venv; "" if there is nothing that says so."""
    try:
        text = Path(sys.prefix, "pyvenv.cfg").read_text()
    except OSError:
        return ""
    found = re.search(r"^version(?:_info)? = (\d+\.\d+)", text, re.MULTILINE)
    return found[1] if found else ""


def pins(target: Target) -> Findings:
    """Checks each package's version. One that is pinned for some Pythons only may be missing."""
    wanted: dict[str, set[str]] = defaultdict(set)
    needed = set()
    for name, version, conditional in PIN.findall((target.code / "requirements.txt").read_text()):
        wanted[name].add(version)
        needed |= set() if conditional else {name}
    wrong = []
    for name, versions in wanted.items():
        try:
            installed = metadata.version(name)
        except metadata.PackageNotFoundError:
            wrong += [f"{name} is missing"] if name in needed else []
            continue
        if installed not in versions:
            wrong.append(f"{name} is {installed} and should be {' or '.join(sorted(versions))}")
    faults = [fault(f"{one}, says requirements.txt", install(target)) for one in wrong]
    yield from faults or [ok(f"{len(needed)} packages are as requirements.txt pins them")]


def imports(target: Target) -> Findings:
    """Imports what the processes import, and so finds a package that another needs and does not declare."""
    broken = []
    for name in PROCESSES:
        try:
            importlib.import_module(name)
        except Exception as error:
            missing = getattr(error, "name", None) or type(error).__name__
            found = f"{name.replace('.', '/')}.py does not start: importing {missing} fails"
            broken.append(fault(found, install(target)))
    yield from broken or [ok("the API, the workers and the dashboard find everything they import")]


def install(target: Target) -> str:
    if target.installed:
        return "sudo bin/install, in your clone: it makes the release's .venv again"
    return ".venv/bin/pip install --require-hashes -r requirements.txt"
