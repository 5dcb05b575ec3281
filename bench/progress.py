"""Shows how far a long run has come: a bar on a terminal, a line for each step elsewhere, and how long it still takes.

On stderr, so that the report on stdout can be kept by itself.
"""

from __future__ import annotations

import shutil
import sys
import threading
import time


class Progress:
    """Counts steps, which may end in any thread."""

    def __init__(self, total: int) -> None:
        self.total = total
        self.done = 0
        self.began = time.monotonic()
        self.lock = threading.Lock()

    def begin(self, line: str) -> None:
        """Says on a terminal what runs now."""
        with self.lock:
            if sys.stderr.isatty():
                self._draw(line)

    def step(self, line: str) -> None:
        """Counts one more step; `line` has its result."""
        with self.lock:
            self.done += 1
            if sys.stderr.isatty():
                self._draw(line.strip("| "))
            else:
                print(f"{self.done}/{self.total}{self._left()} {line}", file=sys.stderr, flush=True)

    def _draw(self, line: str) -> None:
        bar = f"[{'#' * (30 * self.done // self.total):<30}] {self.done}/{self.total}{self._left()} "
        room = shutil.get_terminal_size().columns - len(bar) - 1
        end = "\n" * (self.done == self.total)
        print(f"\r{bar}{line[: max(room, 0)]}\033[K", end=end, file=sys.stderr, flush=True)

    def _left(self) -> str:
        if not 0 < self.done < self.total:
            return ""
        minutes = (time.monotonic() - self.began) * (self.total - self.done) / self.done / 60
        return f" (about {minutes:.0f} min left)" if minutes >= 1 else " (less than 1 min left)"
