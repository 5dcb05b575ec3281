"""The dashboard's login: HTTP Basic (RFC 7617), compared in constant time and slow to guess.

An address that was wrong too often (process.guesses) gets 429 with Retry-After (RFC 6585). All who come through a proxy
count as one address.
"""

from __future__ import annotations

import hmac
import logging

from flask import Response, request

from process.guesses import PAUSE, Guesses
from process.log import emit
from settings import Settings

CHALLENGE = {"WWW-Authenticate": 'Basic realm="dashboard", charset="UTF-8"'}


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
