"""Times, numbers and addresses as a person reads them: the filters of the pages' templates. Pure."""

from __future__ import annotations

import re
import time
from datetime import datetime
from email.utils import parseaddr

from markupsafe import Markup, escape

from ops.checks.findings import lasting

PAGE = re.compile(r"/mail/(?:[a-z]+)?")
# In a relay's words, too. Begins only where what may be an address does: a header may have 64,000 characters.
ADDRESS = re.compile(r"(?<![^\s<>()\[\],;:\"'])[^\s<>()\[\],;:\"']+@([A-Za-z0-9.-]*[A-Za-z0-9])")


def moment(given: str | float | datetime | None) -> datetime | None:
    """Returns a moment, given as ISO 8601 or in seconds since 1970, in the machine's time zone; None for none, and for
    what is none: a mail that is damaged is one of many on a page."""
    if not given:
        return None
    try:
        if isinstance(given, str):
            given = datetime.fromisoformat(given.replace("Z", "+00:00"))
        return (given if isinstance(given, datetime) else datetime.fromtimestamp(given).astimezone()).astimezone()
    except (ValueError, OverflowError, OSError):
        return None


def time_of_day(given: str | float | datetime | None, *, milliseconds: bool = False) -> str:
    """Returns the time of day, and before it the day where that is not today; "" for none."""
    at = moment(given)
    if not at:
        return ""
    today = datetime.now().astimezone().date()
    day = "" if at.date() == today else f"{at:%d %b} " if at.year == today.year else f"{at:%d %b %Y} "
    return f"{day}{at:%H:%M:%S}" + (f".{at.microsecond // 1000:03d}" if milliseconds else "")


def clock(given: str | float | datetime | None, *, milliseconds: bool = False) -> str:
    """Returns an HTML `time` with what `time_of_day` returns."""
    at, text = moment(given), time_of_day(given, milliseconds=milliseconds)
    written = at.isoformat(timespec="milliseconds") if at else ""
    return Markup('<time datetime="{0}" title="{0}">{1}</time>').format(written, text) if at else ""


def ago(given: str | float | datetime | None, due: str = "") -> str:
    """Returns `12 min ago`, or what is given as `due`, or `in 3 h`; "" for none. The script of the page counts on."""
    at = moment(given)
    if not at:
        return ""
    seconds = at.timestamp() - time.time()
    text = f"in {lasting(seconds)}" if seconds > 0 else due or f"{lasting(-seconds)} ago"
    return Markup('<time datetime="{}" data-ago="{}">{}</time>').format(
        at.isoformat(timespec="milliseconds"), due, text
    )


def soon(given: str | float | datetime | None) -> str:
    """Returns `in 3 h`, or `now` for what is due; "" for none."""
    return ago(given, "now")


def zone() -> str:
    """Returns the name of the machine's time zone."""
    return time.strftime("%Z")


def took(seconds: float) -> str:
    """Returns `12 ms`, `1.5 s`, `12 min`."""
    return f"{seconds * 1000:.0f} ms" if seconds < 1 else f"{seconds:.1f} s" if seconds < 10 else lasting(seconds)


def number(count: float) -> str:
    return f"{count:,.0f}"


def masked(text: str) -> str:
    """Returns a text in which of each address only the first letter and the domain are left: `a…@example.com`."""
    return ADDRESS.sub(lambda found: f"{found[0][0]}…@{found[1]}", text)


def mailbox(text: str, show: bool) -> str:
    """Returns a mailbox as it is shown: whole, or without its name and with its address masked."""
    if show:
        return text
    address = parseaddr(text)[1]
    return masked(address if "@" in address else text)


def linked(text: str) -> str:
    """Returns a text in which each path of a page leads there."""
    return Markup(PAGE.sub(r'<a href="\g<0>">\g<0></a>', str(escape(text))))


def chip(state: str) -> str:
    """Returns the mark that a state has on every page."""
    label = {"unknown": "in doubt"}.get(state, state)
    return Markup('<span class="chip {}">{}</span>').format(escape(state), label)


def fate(status: str) -> str:
    """Returns the mark of what became of a recipient."""
    look = {"accepted": "sent", "refused": "failed", "in_doubt": "unknown"}.get(status, status)
    return Markup('<span class="chip {}">{}</span>').format(look, status.replace("_", " "))


def is_id(text: str) -> bool:
    """Returns whether it is an id such as mails and jobs have."""
    return bool(re.fullmatch(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", text))
