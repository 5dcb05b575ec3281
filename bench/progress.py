"""Shows how far a long run has come: a bar on a terminal, a line for each step elsewhere.

On stderr, so that the report on stdout can be kept by itself.
"""

from __future__ import annotations

import sys
import threading


class Progress:
    """Counts steps, which may end in any thread."""

    def __init__(self, total: int) -> None:
        self.total = total
        self.done = 0
        self.lock = threading.Lock()

    def step(self, line: str) -> None:
        """Counts one more step; `line` has its result."""
        with self.lock:
            self.done += 1
            if sys.stderr.isatty():
                bar = "#" * (40 * self.done // self.total)
                end = "\n" * (self.done == self.total)
                print(f"\r[{bar:<40}] {self.done}/{self.total} {line.strip('| ')[:60]}\033[K", end=end, file=sys.stderr)
            else:
                print(f"{self.done}/{self.total} {line}", file=sys.stderr, flush=True)
