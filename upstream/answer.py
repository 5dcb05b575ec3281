"""Status, headers and body of an upstream's answer -> one `Reply`; what that means is smtp.policy's alone. Pure.

Bears anything: the answer may be of a proxy or a captive portal on the way. Of what is no answer of the API, no word is
taken over.
Resend: https://resend.com/docs/api-reference/errors  RFC 9110 10.2.3 (Retry-After), 15 (status codes)
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from smtp.policy import NO_API, TAKEN, Phase
from smtp.verdict import LONGEST_HINT, Reply

LONGEST_TEXT = 500  # characters of a reply


def reply_of(status: int, headers: Mapping[str, str], body: bytes, wanted: str = "id") -> Reply:
    """Returns the reply: the id of the mail there, or the error's name and message, and the pause that is asked for. A
    good answer has the member that is `wanted`."""
    said = _object(body)
    if 200 <= status < 300:
        own = said.get(wanted)
        is_id = isinstance(own, str) and re.fullmatch(r"[!-~]{1,200}", own)
        return Reply(Phase.HTTP, status, f"{TAKEN} {own}" if is_id else NO_API)
    name, message = said.get("name"), said.get("message")
    named = name if isinstance(name, str) and re.fullmatch(r"[a-z_]{1,60}", name) else ""
    pause = _pause(status, headers)
    wait = f"(retry after {pause} s)" if pause else ""
    words = " ".join(message.split()) if isinstance(message, str) and named else "" if named else NO_API
    start = " ".join(filter(None, (named, wait)))
    return Reply(Phase.HTTP, status, ": ".join(filter(None, (start, words)))[:LONGEST_TEXT])


def _object(body: bytes) -> dict[str, Any]:
    with suppress(ValueError, RecursionError):
        said = json.loads(body)
        return said if isinstance(said, dict) else {}
    return {}


def _pause(status: int, headers: Mapping[str, str]) -> int:
    """Returns for how many seconds an upstream that puts us off asks to be left alone; 0 if it does not say. A date,
    which only proxies write there, is none: clocks differ."""
    if status not in (429, 503):
        return 0
    for name in ("retry-after", "ratelimit-reset"):
        written = headers.get(name, "")
        if re.fullmatch(r"[0-9]{1,6}(\.[0-9]{1,6})?", written):
            return min(LONGEST_HINT, math.ceil(float(written)))
    return 0
