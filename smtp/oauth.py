"""One request to a token server, and what it says: RFC 6749. Bounded in time and size, whatever it is that answers.

Of a refusal only its code is told (`invalid_grant`), and Microsoft's number (`AADSTS700082`): its sentences may name
an account. Over https, or on loopback.
"""

from __future__ import annotations

import json
import logging
import re
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from typing import Any, NamedTuple
from urllib.parse import urlencode

from process.values import SAFE_URL, is_safe_url

LIMIT: float = 10  # seconds for one request, all of it
PATIENCE: float = 5  # seconds for a connection, and for the next octets
LARGEST = 64 * 1024  # bytes of an answer; a token has 2,000 to 4,000
TOKEN = re.compile(r"[!-~]{1,16384}")
LIFE = 3600  # seconds of a token whose server does not say
LONGEST_LIFE = 7 * 86400


class NoToken(ValueError):
    """There is none now. The text says why, without a secret."""


class Refused(NoToken):
    """The token server has answered, and will not. `code` is what it says, such as `invalid_grant`."""

    def __init__(self, code: str, number: str = "", again_in: str = "") -> None:
        hint = f"; retry after {again_in}s" if again_in else ""
        super().__init__(f"no token: {' '.join(filter(None, (code, number)))}{hint}")
        self.code = code


class Token(NamedTuple):
    text: str
    life: float  # seconds
    refresh_token: str  # that takes the place of the one it was made with; "" for none


def ask(url: str, fields: Mapping[str, str]) -> dict[str, Any]:
    """Posts a form and returns the object that is answered. Raises `Refused`, or another `NoToken`."""
    if not is_safe_url(url):
        raise NoToken(f"no token: token_url {SAFE_URL}")
    answers: list[tuple[int, Mapping[str, str], bytes] | NoToken] = []
    thread = threading.Thread(target=lambda: answers.append(_post(url, fields)), name="token", daemon=True)
    thread.start()
    thread.join(LIMIT)  # each step has a limit of its own, and all of them together only this
    if not answers:
        raise NoToken("no token: the token server does not answer in time")
    if isinstance(answers[0], NoToken):
        raise answers[0]
    status, headers, body = answers[0]
    said = _object(body)
    if status == 200 and said:
        return said
    again = str(headers.get("Retry-After", ""))
    again_in = again if status in (429, 503) and re.fullmatch(r"[0-9]{1,5}", again) else ""
    number = re.search(r"\bAADSTS[0-9]{4,8}\b", str(said.get("error_description", ""))[:2000])
    code = str(said.get("error", ""))
    known = code if re.fullmatch(r"[a-z_]{1,40}", code) else f"the token server answers {status}"
    raise Refused(known, number[0] if number else "", again_in)


def token_from(url: str, fields: Mapping[str, str]) -> Token:
    """Returns a new token. Raises `NoToken`."""
    said = ask(url, fields)
    text, refresh = said.get("access_token"), said.get("refresh_token") or ""
    if not isinstance(text, str) or not TOKEN.fullmatch(text):
        raise NoToken("no token: the token server's answer holds none")
    life = 0.0
    with suppress(TypeError, ValueError, OverflowError):
        life = min(float(said.get("expires_in", LIFE)), LONGEST_LIFE)
    if not life > 0:
        raise NoToken("no token: the token server's answer holds one that has ended")
    return Token(text, life, refresh if isinstance(refresh, str) and TOKEN.fullmatch(refresh) else "")


def _post(url: str, fields: Mapping[str, str]) -> tuple[int, Mapping[str, str], bytes] | NoToken:
    import urllib3  # here, since only who logs in by token needs its megabytes

    logging.getLogger("urllib3").setLevel(logging.CRITICAL)  # it would log the headers of an answer that is garbage
    headers = {"Content-Type": "application/x-www-form-urlencoded", "Accept": "application/json"}
    with urllib3.PoolManager() as pool:
        try:
            answer = pool.request(
                "POST", url, body=urlencode(fields), headers=headers, timeout=PATIENCE, retries=False,
                redirect=False, preload_content=False,
            )  # fmt: skip
            body, until = b"", time.monotonic() + LIMIT
            while len(body) <= LARGEST and time.monotonic() < until and (more := answer.read1(LARGEST)):
                body += more
            answer.close()
        except (OSError, ValueError, urllib3.exceptions.HTTPError) as error:
            return NoToken(f"no token: the token server does not answer ({type(error).__name__})")
    if len(body) > LARGEST:
        return NoToken("no token: the token server's answer is too large")
    return answer.status, answer.headers, body


def _object(body: bytes) -> dict[str, Any]:
    try:
        said = json.loads(body)
    except (ValueError, RecursionError):
        return {}
    return said if isinstance(said, dict) else {}
