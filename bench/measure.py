"""Measures ours beside theirs: `bench/run` takes the sides in turn and writes docs/benchmarks.md and its plot.

Every trial (bench/trials.py) starts what it needs from nothing, on loopback and free ports, with a Redis and an SMTP
relay of its own. The sides of a measurement take turns within each round, and so do the servers of `--redis`, so that
whatever else the machine does meets all of them. What was measured is kept as it comes (bench/kept.py): a run that is
interrupted can be continued (`--continue`), or reported as it is (`--report`). A short or partial run (`--quick`,
`--only`) is written to var/bench/ and leaves docs/ alone. What cannot be measured is said in the report, as is a peer
that cannot be set up; Ctrl-C leaves nothing running.
"""

from __future__ import annotations

import argparse
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from bench.facts import ceilings, facts, redis_version
from bench.install import install_peers, missing
from bench.kept import Kept, Turn
from bench.plot import plot, plot_name
from bench.progress import Progress
from bench.report import document
from bench.rig import NotMeasured, Rig, nginx_program
from bench.sides import SIDES
from bench.targets import MEASUREMENTS
from bench.trials import QUICK, TRIALS, Figures, Size
from ops.dev import redis_servers
from tests.servers import ROOT

SHORT = ROOT / "var" / "bench"


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="bench/run",
        description="Measures the service beside its peers. Needs nginx; uses wrk, node and npm (for BullMQ) and, as "
        "root, Postfix, where they are installed.",
    )
    parser.add_argument("--rounds", type=int, help="(default 5, with --quick 1)")
    parser.add_argument("--quick", action="store_true", help="little of everything, to see that it works")
    parser.add_argument("--only", metavar="NAME,...", default=",".join(TRIALS), help=f"of {','.join(TRIALS)}")
    parser.add_argument("--queued", type=int, metavar="N", help="the long queue (a million by default)")
    parser.add_argument(
        "--redis", action="append", metavar="PROGRAM", help="a redis-server or valkey-server; may be given repeatedly"
    )
    parser.add_argument("--continue", action="store_true", dest="goes_on", help="measure only what is not kept yet")
    parser.add_argument("--report", action="store_true", help="measure nothing; write the report of what is kept")
    parser.add_argument(
        "--output", type=Path, metavar="DIR", help="(default docs, for a short or partial run var/bench)"
    )
    options = parser.parse_args(arguments)
    options.only = options.only.split(",")
    unknown = set(options.only) - TRIALS.keys()
    if unknown:
        parser.error(f"--only takes {', '.join(TRIALS)}, not {', '.join(unknown)}")
    options.redis = options.redis or redis_servers()[:1]
    if not options.redis or not all(map(shutil.which, options.redis)):
        parser.error("--redis must name a redis-server or valkey-server")
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


def measure(options: argparse.Namespace, size: Size, kept: Kept) -> None:
    """Measures round by round, within each measurement by measurement, and within that side by side on each server."""
    programs = {}
    for program in options.redis:
        Rig.redis_program = program
        programs[redis_version()] = program
    taking_part, left_out = sides_of(options.only)
    for server, Rig.redis_program in programs.items():
        words = ["**A short run, to see that it works: its figures mean nothing.**"] if options.quick else []
        words += facts(server)
        if not options.goes_on:
            kept.forget(server, asdict(size), options.only)
            words += ceilings(options.only)
        kept.begin(server, asdict(size), words, left_out)
    turns = [
        Turn(server, number, name, side)
        for number in range(1, options.rounds + 1)
        for name in options.only
        for side in taking_part[name]
        for server in programs
    ]
    turns = [turn for turn in turns if not (options.goes_on and kept.has(turn))]
    progress = Progress(len(turns))
    for turn in turns:
        progress.begin(turn.title)
        Rig.redis_program = programs[turn.server]
        figures, said = attempt(turn.measurement, turn.side, size)
        kept.add(turn, figures, said)
        progress.step(f"{turn.title}: {said}")


def sides_of(chosen: Sequence[str]) -> tuple[dict[str, list[str]], list[str]]:
    """Returns the sides of each measurement that can be set up, and why the others are left out."""
    taking_part, left_out = {}, dict[str, None]()
    for name in chosen:
        reasons = {side: missing(SIDES[side].framework) for side in MEASUREMENTS[name].sides}
        taking_part[name] = [side for side, reason in reasons.items() if not reason]
        words = "{}: left out, since it could not be set up ({})."
        left_out |= {words.format(MEASUREMENTS[name].sides[side], why): None for side, why in reasons.items() if why}
    return taking_part, list(left_out)


def attempt(name: str, side: str, size: Size) -> tuple[Figures, str]:
    """Returns one trial's figures, and a line about them."""
    with tempfile.TemporaryDirectory(prefix="bench-", ignore_cleanup_errors=True) as place:
        try:
            figures = TRIALS[name](side, size, Path(place))
        except (NotMeasured, OSError, ValueError, AssertionError, subprocess.SubprocessError) as error:
            return {}, f"not measured: {error}"
    return figures, ", ".join(f"{key} {value:,.2f}" for key, value in figures.items())


def write(kept: Kept, output: Path) -> None:
    """Writes the page, and a plot for each server."""
    parts = kept.parts()
    page = document(parts)
    (output / "benchmarks.md").write_text(page)
    (output / "img").mkdir(exist_ok=True)
    for part in parts:
        (output / "img" / plot_name(parts, part)).write_text(plot(part.results))
    print(f"{page}\nWritten to {output / 'benchmarks.md'}, with its plots in img/ and all figures in {kept.path.name}.")


def main() -> int:
    options = parse_arguments()
    for number in (signal.SIGINT, signal.SIGTERM):  # SIGINT is ignored in what a shell script has put behind it
        signal.signal(number, signal.default_int_handler)
    size = QUICK if options.quick else Size()
    size.many = options.queued or size.many
    options.output.mkdir(parents=True, exist_ok=True)
    kept = Kept(options.output / "benchmarks.jsonl")
    try:
        if not options.report:
            check_tools(options.only)
            install_peers()
            measure(options, size, kept)
    except KeyboardInterrupt:
        again = "`--continue` measures the rest, `--report` writes the report of what there is."
        print(f"\nStopped; what was measured is kept in {kept.path}. {again}", file=sys.stderr)
        return 130
    except NotMeasured as error:
        print(error, file=sys.stderr)
        return 1
    if not kept.lines:
        print(f"Nothing is kept in {kept.path}.", file=sys.stderr)
        return 1
    write(kept, options.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
