"""Measures what REDIS_REPLICAS costs: `.venv/bin/python -m bench.replicas`, on one machine.

A primary, two replicas and three Sentinels run on loopback, and all share the machine's cores with the service, the
relay and the load; REDIS_REPLICAS=0 and 1 take turns within each round. What hosts of their own add is the way to the
replica and back, once a mail that is accepted, and twice one that is sent.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

from bench.rig import Rig
from bench.side import COMMON
from bench.trials import TRIALS, Figures, Size
from tests.sentinels import Set
from tests.servers import eventually

FIGURES = {"accept": ("rate", "p99"), "send20": ("rate", "cpu"), "send0": ("rate", "cpu"), "idle": ("p50", "p99")}


class Replicated:
    """Stands where a rig has its Redis."""

    def __init__(self, directory: Path, *_: str, program: str | None = None) -> None:
        self.directory, self.program = directory, program

    def start(self) -> None:
        self.servers = Set(self.directory, program=self.program or "")
        eventually(self.servers.is_complete)
        self.url = self.servers.url

    def kill(self) -> None:
        self.servers.stop()


def measured(name: str, replicas: int, size: Size) -> Figures:
    COMMON["REDIS_REPLICAS"] = str(replicas)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as directory:  # a child of Redis may write yet
        return TRIALS[name]("ours", size, Path(directory))


def main() -> None:
    parser = argparse.ArgumentParser(prog="bench.replicas", description=str(__doc__).partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--redis", metavar="PROGRAM", help="a redis-server or valkey-server")
    options = parser.parse_args()
    rig: Any = Rig
    rig.redis_program, rig.server = options.redis, Replicated
    size = Size(seconds=6, mails=2000, single=100)
    print("| measured | figure | REDIS_REPLICAS=0 | =1 | ratio |\n|---|---|---:|---:|---:|")
    for name, figures in FIGURES.items():
        rounds = [[measured(name, replicas, size) for replicas in (0, 1)] for _ in range(options.rounds)]
        for figure in figures:
            without, with_one = (median(one[side][figure] for one in rounds) for side in (0, 1))
            print(f"| {name} | {figure} | {without:.1f} | {with_one:.1f} | {with_one / without:.2f} |", flush=True)


if __name__ == "__main__":
    main()
