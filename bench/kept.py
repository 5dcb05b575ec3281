"""Keeps all that was measured in `benchmarks.jsonl` beside the report: a line of JSON for each trial, as it ends.

So a run that is interrupted loses nothing and can be continued, figures can be looked at again, and rounds on several
servers come together in one report. The other lines, one for each run, say what was measured on what.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from bench.rig import NotMeasured
from bench.targets import MEASUREMENTS
from bench.trials import Figures

Results = dict[str, dict[str, list[Figures]]]  # by measurement and side, round by round; empty where there are none


class Turn(NamedTuple):
    """Names one trial."""

    server: str  # with its version
    round: int
    measurement: str
    side: str

    @property
    def title(self) -> str:
        measurement = MEASUREMENTS[self.measurement]
        return f"Round {self.round}, {self.server}, {measurement.title}: {measurement.sides[self.side]}"


class Part(NamedTuple):
    """Holds what was measured on one server."""

    server: str
    results: Results
    size: dict[str, Any]
    facts: list[str]
    notes: list[str]


class Kept:
    def __init__(self, path: Path) -> None:
        self.path = path
        self.lines: list[dict[str, Any]] = []
        if path.exists():
            self.lines = [json.loads(line) for line in path.read_text().splitlines()]

    def begin(self, server: str, size: dict[str, Any], facts: Sequence[str], notes: Sequence[str]) -> None:
        """Begins a run, or goes on with one. Raises `NotMeasured` where that one measured more or less in a trial."""
        if self._has_other_size(server, size):
            raise NotMeasured(f"{self.path} has trials of another size on {server}: run without --continue")
        self._add({"server": server, "size": size, "facts": facts, "notes": notes})

    def add(self, turn: Turn, figures: Figures, said: str) -> None:
        self._add({**turn._asdict(), "figures": figures, "said": said})

    def _add(self, line: dict[str, Any]) -> None:
        self.lines.append(line)
        with self.path.open("a") as file:
            file.write(json.dumps(line, ensure_ascii=False) + "\n")

    def forget(self, server: str, size: dict[str, Any], measurements: Sequence[str]) -> None:
        """Makes room for a new run: drops those measurements on a server, or all of it if of another size."""
        other = [line for line in self.lines if line["server"] != server]
        left = [line for line in self.lines if line["server"] == server and line.get("measurement") not in measurements]
        keep = not self._has_other_size(server, size) and any("measurement" in line for line in left)
        self.lines = other + (left if keep else [])
        self.path.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in self.lines))

    def _has_other_size(self, server: str, size: dict[str, Any]) -> bool:
        return any(line["server"] == server and line.get("size", size) != size for line in self.lines)

    def turns(self) -> dict[Turn, dict[str, Any]]:
        """Returns the line of each trial: of one that was tried again, the last."""
        lines = [line for line in self.lines if "measurement" in line]
        return {Turn(*(line[name] for name in Turn._fields)): line for line in lines}

    def has(self, turn: Turn) -> bool:
        return bool(self.turns().get(turn, {}).get("figures"))

    def parts(self) -> list[Part]:
        servers = list(dict.fromkeys(line["server"] for line in self.lines))
        return [self._part(server, self.turns()) for server in servers]

    def _part(self, server: str, turns: dict[Turn, dict[str, Any]]) -> Part:
        runs = [line for line in self.lines if line["server"] == server and "measurement" not in line]
        mine = {turn: line for turn, line in turns.items() if turn.server == server}
        numbers = range(1, 1 + max((turn.round for turn in mine), default=0))
        sides = sorted({turn[2:] for turn in mine}, key=_place_in_report)
        results: Results = {}
        for name, side in sides:
            lines = [mine.get(Turn(server, number, name, side), {}) for number in numbers]
            results.setdefault(name, {})[side] = [line.get("figures", {}) for line in lines]
        facts = [fact for run in runs for fact in run["facts"]]
        notes = [note for run in runs for note in run["notes"]]
        notes += [f"{turn.title}: {line['said']}" for turn, line in mine.items() if not line["figures"]]
        return Part(server, results, runs[-1]["size"], facts, notes)


def _place_in_report(of: tuple[str, str]) -> tuple[int, int]:
    name, side = of
    return list(MEASUREMENTS).index(name), list(MEASUREMENTS[name].sides).index(side)
