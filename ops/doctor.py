"""Finds what goes wrong between a laptop and a server: `bin/doctor [--json] [--send-to ADDRESS]
[--test-alert]`.

Examines the service that bin/install has put on this machine, and needs root for that; without one, the checkout it is
in. Prints one line per finding, with the command or edit that fixes it. It changes nothing and prints no secret; with
--send-to it sends one mail the whole way, with --test-alert a test to ALERT_URL and ALERT_TO. Exit code: 0 fine, 1
warnings, 2 faults.

The checks and their table are in ops/checks/. Standard library only in this file: the first thing to find may be that
nothing else is installed.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from ops.checks import packages
from ops.checks.findings import FAULT, WARN, Finding, counted
from ops.checks.target import Target

ROOT = Path(__file__).parent.parent
FIRST = (("python", packages.python), ("packages", packages.pins), ("packages", packages.imports))
COLOURS = {"ok": 32, "note": 36, "warn": 33, "fault": 31}

Named = tuple[str, Finding]  # the check's name first


def examine(target: Target) -> Iterator[Named]:
    broken = False
    for name, check in FIRST:
        for finding in check(target):
            broken |= finding.level == FAULT
            yield name, finding
        if broken and check is packages.python:
            return  # no package can be found then
    try:
        from ops.checks import table
    except Exception:
        if not broken:
            raise
        return  # what is missing has been reported
    yield from table.examine(target)


def line(name: str, finding: Finding) -> str:
    level = f"{finding.level:<5}"
    if sys.stdout.isatty():
        level = f"\033[{COLOURS[finding.level]}m{level}\033[0m"
    return f"{level}  {name}: {finding.found}" + (f"  ->  {finding.fix}" if finding.fix else "")


def report(found: Iterable[Named], as_json: bool) -> Counter[str]:
    """Prints each finding at once, since some checks take seconds; as JSON, one list at the end. Counts the levels."""
    kept = []
    for name, finding in found:
        kept.append((name, finding))
        if not as_json:
            print(line(name, finding), flush=True)
    if as_json:
        print(json.dumps([{"check": name, **finding._asdict()} for name, finding in kept], indent=2))
    return Counter(finding.level for _, finding in kept)


def summary(levels: Counter[str]) -> str:
    counts = [counted(levels[level], word) for level, word in ((FAULT, "fault"), (WARN, "warning")) if levels[level]]
    if not counts:
        return "\nAll is well."
    return f"\n{' and '.join(counts)}. Begin with the first: one often causes the next."


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="bin/doctor", description="Finds what is wrong, and says what fixes it.")
    parser.add_argument("--json", action="store_true", help="a list of {check, level, found, fix}")
    parser.add_argument("--send-to", default="", metavar="ADDRESS", help="send one mail there, through queue and relay")
    parser.add_argument("--test-alert", action="store_true", help="send a test to ALERT_URL and to ALERT_TO")
    asked = parser.parse_args(arguments)
    target = Target(ROOT, send_to=asked.send_to, test_alert=asked.test_alert)
    installed = f"The service on this machine: {target.opt / 'current'}, {target.file}\n"
    checkout = f"This checkout, {target.code}: no service is installed on this machine\n"
    if not asked.json:
        print(installed if target.installed else checkout, flush=True)
    levels = report(examine(target), asked.json)
    if not asked.json:
        print(summary(levels))
    return 2 if levels[FAULT] else 1 if levels[WARN] else 0


if __name__ == "__main__":
    sys.exit(main())
