"""The dashboard's login: HTTP Basic (RFC 7617), compared in constant time and slow to guess.

An address that was wrong ten times gets one more try every ten seconds, and meanwhile 429 with Retry-After (RFC 6585),
also with the right password: an answer that differs would be the guess. All of loopback counts as one address, and so
do all who come through a proxy.
"""

from __future__ import annotations

import hmac
import ipaddress
import logging
import time
from collections.abc import Callable
from threading import Lock

from flask import Response, request

from process.log import emit
from settings import Settings, is_loopback

TRIES = 10  # at once
PAUSE = 10  # seconds, for one more
REMEMBERED = 10_000  # addresses
CHALLENGE = {"WWW-Authenticate": 'Basic realm="dashboard", charset="UTF-8"'}


class Guesses:
    """Counts the wrong logins of each address, and forgets one every `PAUSE` seconds."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._forgotten_at: dict[str, float] = {}  # an address -> when its last wrong login will be forgotten
        self._lock = Lock()

    def take(self, address: str) -> bool:
        """Counts a login before it is looked at, so that many at once are counted, too. Returns whether it may be."""
        key, now = network(address), self._clock()
        with self._lock:
            until = max(now, self._forgotten_at.pop(key, now)) + PAUSE
            admitted = until - now <= TRIES * PAUSE
            self._forgotten_at[key] = until if admitted else until - PAUSE
            if len(self._forgotten_at) > REMEMBERED:
                self._forgotten_at.pop(next(iter(self._forgotten_at)))
        return admitted

    def give_back(self, address: str) -> None:
        """Takes back that a login was counted: it was right."""
        with self._lock:
            key = network(address)
            self._forgotten_at[key] = self._forgotten_at.get(key, 0) - PAUSE


def network(address: str) -> str:
    """Returns what one guesser can have as many addresses of as he likes."""
    if is_loopback(address):
        return "loopback"
    return str(ipaddress.ip_network(f"{address}/64", strict=False)) if ":" in address else address


class Login:
    """Admits who has the username and the password of the settings. Raises PermissionError if there is no password."""

    def __init__(self, settings: Settings) -> None:
        if settings.dashboard_password is None:
            raise PermissionError("DASHBOARD_PASSWORD must be set")
        self.username = settings.dashboard_username.encode()
        self.password = settings.dashboard_password.get_secret_value().encode()
        self.guesses = Guesses()

    def demand(self) -> Response | None:
        """Returns what a request without the right login is answered. Always compares both fields, in constant time, so
        that the delay reveals nothing."""
        given, address = request.authorization, request.remote_addr or "127.0.0.1"
        if given is None:
            return refusal(401, "Log in with DASHBOARD_USERNAME and DASHBOARD_PASSWORD.", CHALLENGE)
        if not self.guesses.take(address):
            text = f"There were too many wrong logins from this address; wait {PAUSE} seconds."
            return refusal(429, text, {"Retry-After": str(PAUSE)})
        right_username = hmac.compare_digest((given.username or "").encode(), self.username)
        right_password = hmac.compare_digest((given.password or "").encode(), self.password)
        if right_username & right_password:
            self.guesses.give_back(address)
            return None
        emit("login_refused", logging.WARNING)
        return refusal(401, "Log in with DASHBOARD_USERNAME and DASHBOARD_PASSWORD.", CHALLENGE)


def refusal(status: int, text: str, headers: dict[str, str]) -> Response:
    return Response(f"{text}\n", status, headers, mimetype="text/plain")
