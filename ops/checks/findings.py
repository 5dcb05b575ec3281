"""What a check of the doctor finds: one line with its level, what is found, and the command or edit that fixes it.

    ok     as it should be
    note   nothing to fix: not here, not checked, or good to know
    warn   works today; will not after the next reboot, in a month, or for some recipients
    fault  does not work, or is not safe

It never holds a secret, an address or a relay's own words. Standard library only, like system.py and target.py, so that
the doctor can say so when everything else is missing.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import NamedTuple

OK, NOTE, WARN, FAULT = "ok", "note", "warn", "fault"


class Finding(NamedTuple):
    level: str
    found: str
    fix: str = ""


Findings = Iterator[Finding]
ok, note, warn, fault = (partial(Finding, level) for level in (OK, NOTE, WARN, FAULT))


def counted(number: int, thing: str) -> str:
    return f"{number} {thing}{'' if number == 1 else 's'}"


def lasting(seconds: float) -> str:
    """Returns `7 s`, `12 min`, `3 h` or `2 days`."""
    for unit, length in (("days", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {unit}"
    return f"{seconds:.0f} s"


def sized(count: float) -> str:
    """Returns a number of bytes as `3.5 GB`, `120 MB`, `7 KB` or `312 bytes`."""
    for size, unit, digits in ((2**30, "GB", 1), (2**20, "MB", 0)):
        if count >= size:
            return f"{count / size:.{digits}f} {unit}"
    return f"{count / 1024:.0f} KB" if not 0 < count < 1024 else counted(round(count), "byte")
