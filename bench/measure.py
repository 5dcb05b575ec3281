"""Measures ours beside theirs: `bench/run` takes the sides in turn and writes docs/benchmarks.md and its plot.

Every trial (bench/trials.py) starts what it needs from nothing, on loopback and free ports, with a Redis and an SMTP
relay of its own. The sides of a measurement take turns within each round, so that whatever else the machine does meets
all of them. A short or partial run (`--quick`, `--only`) is written to var/bench/ and leaves docs/ alone. What cannot
be measured is said in the report, as is a peer that cannot be set up; Ctrl-C leaves nothing running.
"""

from __future__ import annotations

import argparse
import os
import platform
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from datetime import date
from importlib.metadata import version
from pathlib import Path

from bench.load import generator
from bench.progress import Progress
from bench.report import Results, document, plot
from bench.rig import NotMeasured, Rig, nginx_program
from bench.sides import COMMON, PEERS, SIDES, make_environment, missing
from bench.targets import MEASUREMENTS
from bench.trials import QUICK, TRIALS, Figures, Size, load_ceiling, relay_ceiling, relay_ceiling_kept
from ops.checks.store import program
from tests.servers import ROOT

SHORT = ROOT / "var" / "bench"


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="bench/run", description="Measures the service beside its peers.")
    parser.add_argument("--rounds", type=int, help="(default 5, with --quick 1)")
    parser.add_argument("--quick", action="store_true", help="little of everything, to see that it works")
    parser.add_argument("--only", metavar="NAME,...", default=",".join(TRIALS), help=f"of {','.join(TRIALS)}")
    parser.add_argument("--queued", type=int, metavar="N", help="the long queue (a million by default)")
    parser.add_argument(
        "--output", type=Path, metavar="DIR", help="(default docs, for a short or partial run var/bench)"
    )
    options = parser.parse_args()
    options.only = options.only.split(",")
    unknown = set(options.only) - TRIALS.keys()
    if unknown:
        parser.error(f"--only takes {', '.join(TRIALS)}, not {', '.join(unknown)}")
    options.rounds = options.rounds or (1 if options.quick else 5)
    options.output = options.output or (SHORT if options.quick or len(options.only) < len(TRIALS) else ROOT / "docs")
    return options


def check_tools(chosen: Sequence[str]) -> None:
    if "accept" in chosen and not nginx_program():
        raise SystemExit(
            "nginx is missing: install it (Debian, Ubuntu: sudo apt install nginx-light), or leave out accept"
        )
    if not sys.platform.startswith("linux"):
        raise SystemExit("memory and CPU are read from /proc: this runs on Linux only")


def measure(chosen: Sequence[str], rounds: int, size: Size) -> Results:
    """Measures round by round, and within each round side by side."""
    results = {name: {side: list[Figures]() for side in taking_part(name, size)} for name in chosen}
    progress = Progress(rounds * sum(len(sides) for sides in results.values()))
    for number in range(1, rounds + 1):
        for name, sides in results.items():
            for side, measured in sides.items():
                title = f"{MEASUREMENTS[name].title}: {MEASUREMENTS[name].sides[side]}"
                figures, said = attempt(name, side, size)
                measured.append(figures)
                if not figures:
                    size.note(f"Round {number}, {title}: {said}")
                progress.step(f"round {number}, {title}: {said}")
    return results


def taking_part(name: str, size: Size) -> list[str]:
    """Returns the sides of a measurement that can be set up, and notes the others."""
    sides = MEASUREMENTS[name].sides
    reasons = {side: missing(SIDES[side].framework) for side in sides}
    for side, reason in reasons.items():
        if reason:
            size.note(f"{sides[side]}: left out, since it could not be set up ({reason}).")
    return [side for side, reason in reasons.items() if not reason]


def attempt(name: str, side: str, size: Size) -> tuple[Figures, str]:
    """Returns one trial's figures, and a line about them."""
    with tempfile.TemporaryDirectory(prefix="bench-", ignore_cleanup_errors=True) as place:
        try:
            figures = TRIALS[name](side, size, Path(place))
        except (NotMeasured, OSError, ValueError, AssertionError, subprocess.SubprocessError) as error:
            return {}, f"not measured: {error}"
    return figures, ", ".join(f"{key} {value:,.2f}" for key, value in figures.items())


def facts(options: argparse.Namespace) -> list[str]:
    """Returns on what it was measured, and with what."""
    system = platform.freedesktop_os_release()["PRETTY_NAME"] if Path("/etc/os-release").exists() else platform.system()
    listed = {line.split("==")[0]: line.split()[0] for line in (PEERS / "requirements.txt").open() if "==" in line}
    peers = ", ".join(listed[name].replace("==", " ") for name in ("flask", "gunicorn", "celery", "dramatiq", "rq"))
    ours = ", ".join(f"{name} {version(name)}" for name in ("waitress", "bottle", "rq"))
    ours += "".join(f", `{name}={COMMON[name]}`" for name in ("API_PROCESSES", "WORKER_CONCURRENCY"))
    said = [
        f"{date.today()}, {options.rounds} round(s): {processor()}, {os.cpu_count()} cores, "
        f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**30:.0f} GB, {system}. "
        "Client, relay and Redis share the machine with what is measured.",
        f"Python {platform.python_version()}; {redis_version()} with `appendfsync everysec`, one for each trial.",
        f"Ours: {ours}. Theirs: {peers}.",
    ]
    short = ["**A short run, to see that it works: its figures mean nothing.**"] if options.quick else []
    return short + said + ceilings(options.only)


def ceilings(chosen: Sequence[str]) -> list[str]:
    """Returns how much the instruments can do at most."""
    said = []
    with tempfile.TemporaryDirectory(prefix="bench-") as place:
        if "accept" in chosen:
            rate = load_ceiling(Path(place))
            said.append(f"Requests come from {generator()}, which makes {rate:,.0f} a second of nginx alone.")
    with tempfile.TemporaryDirectory(prefix="bench-") as place:
        if {"send20", "send0"} & set(chosen):
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


def main() -> int:
    options = parse_arguments()
    check_tools(options.only)
    for number in (signal.SIGINT, signal.SIGTERM):  # SIGINT is ignored in what a shell script has put behind it
        signal.signal(number, signal.default_int_handler)
    size = QUICK if options.quick else Size()
    size.many = options.queued or size.many
    try:
        make_environment()
        said = facts(options)
        results = measure(options.only, options.rounds, size)
    except KeyboardInterrupt:
        print("\nStopped; nothing was written.", file=sys.stderr)
        return 130
    except NotMeasured as error:
        print(error, file=sys.stderr)
        return 1
    (options.output / "img").mkdir(parents=True, exist_ok=True)
    page = document(results, asdict(size), said, size.notes)
    (options.output / "benchmarks.md").write_text(page)
    (options.output / "img" / "benchmarks.svg").write_text(plot(results))
    print(f"{page}\nWritten to {options.output / 'benchmarks.md'} and img/benchmarks.svg beside it.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
