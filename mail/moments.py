"""Reads moments as clients write them: a time with its zone (RFC 3339), or `in 5 minutes`. Pure: no clock.

Any other text is refused. A service that sends at once what it cannot read sends what nobody asked for.
"""

from __future__ import annotations

import re
from datetime import datetime, timedelta

# RFC 3339, and what is as clear: a blank for the T (Python), +0200 (PHP), any number of digits in a fraction (Go).
TIME = re.compile(
    r"(\d{4}-\d\d-\d\d)[Tt ](\d\d:\d\d:\d\d)(?:\.(\d{1,6})\d{0,6})?(?:([Zz])|([+-]\d\d):?(\d\d))", re.ASCII
)
DELAY = re.compile(r"in (\d{1,6}) (min(?:ute)?|hour|day)s?", re.ASCII | re.IGNORECASE)
UNITS = {"min": timedelta(minutes=1), "minute": timedelta(minutes=1)}
UNITS |= {"hour": timedelta(hours=1), "day": timedelta(days=1)}
LONGEST_DELAY = timedelta(days=30)  # until a mail's scheduled_at


def time_with_zone(text: object) -> datetime:
    """Returns a time with its zone. Raises `ValueError`."""
    found = TIME.fullmatch(text) if isinstance(text, str) else None
    try:
        if found:
            day, clock, fraction, _, hours, minutes = found.groups()
            zone = f"{hours}:{minutes}" if hours else "+00:00"
            return datetime.fromisoformat(f"{day}T{clock}.{(fraction or '0').ljust(6, '0')}{zone}")
    except ValueError:  # the 31st of February
        pass
    raise ValueError("must be a time with its zone, such as 2026-11-21T12:30:00Z")


def time_or_delay(text: object) -> datetime | timedelta:
    """Returns a time, or from `in 5 minutes` how long after now it is. Raises `ValueError`."""
    found = DELAY.fullmatch(text) if isinstance(text, str) else None
    if found:
        return int(found[1]) * UNITS[found[2].lower()]
    try:
        return time_with_zone(text)
    except ValueError as error:
        raise ValueError(f"{error}, or a delay such as in 5 minutes, in 2 hours, in 3 days") from None
