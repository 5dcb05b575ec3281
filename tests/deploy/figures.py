"""How long what took on the machine, for the end of the test run.

pytest-xdist runs the tests in processes of its own: the one with the machine hands its figures to the one that reports.
tests/conftest.py has these hooks, because a process that only reports reads no conftest.py further down.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest


class Figures:
    def __init__(self) -> None:
        self.lines: list[str] = []

    @contextmanager
    def timed(self, what: str) -> Iterator[None]:
        started = time.monotonic()
        yield
        self.say(f"{what}: {time.monotonic() - started:.0f} s")

    def say(self, line: str) -> None:
        self.lines.append(line)


FIGURES = Figures()


def pytest_sessionfinish(session: pytest.Session) -> None:
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["figures"] = FIGURES.lines


@pytest.hookimpl(optionalhook=True)  # pytest-xdist's
def pytest_testnodedown(node: Any) -> None:
    FIGURES.lines += getattr(node, "workeroutput", {}).get("figures", [])  # none from one that crashed


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if FIGURES.lines:
        terminalreporter.section("deploying")
        for line in FIGURES.lines:
            terminalreporter.write_line(line)
