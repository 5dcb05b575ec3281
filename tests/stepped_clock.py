"""A program of ours on a machine whose clock is set back or forward while it runs: `stepped_clock.py FILE PROGRAM ...`.

FILE holds how many seconds the clock is off; it is read again at each look at the clock. Only the wall clock steps, and
only for this process and its children: the monotonic clock goes on as it does on a real machine, and Redis has its own.
"""

from __future__ import annotations

import datetime
import runpy
import sys
import time
from pathlib import Path

FILE = Path(sys.argv[1])
real_time = time.time
real_datetime = datetime.datetime


def offset() -> float:
    return float(FILE.read_text() or 0)


class KnowsItsBase(type):
    """What C code makes is of the real class, and must pass for this one."""

    def __instancecheck__(cls, instance: object) -> bool:
        return isinstance(instance, real_datetime)


class SteppedDatetime(real_datetime, metaclass=KnowsItsBase):
    @classmethod
    def now(cls, tz: datetime.tzinfo | None = None) -> SteppedDatetime:
        return cls.fromtimestamp(time.time(), tz)

    @classmethod
    def utcnow(cls) -> SteppedDatetime:
        return cls.now(datetime.timezone.utc).replace(tzinfo=None)


if __name__ == "__main__":
    time.time = lambda: real_time() + offset()
    datetime.datetime = SteppedDatetime  # type: ignore[misc]
    sys.argv = sys.argv[2:]
    sys.path.insert(0, str(Path(sys.argv[0]).parent))
    runpy.run_path(sys.argv[0], run_name="__main__")
