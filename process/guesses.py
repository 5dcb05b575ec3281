"""Counts wrong logins by address, so that guessing is slow.

An address that was wrong ten times gets one more try every ten seconds, and meanwhile a refusal, also with the right
password: an answer that differs would be the guess. All of loopback counts as one address.
"""

from __future__ import annotations

import ipaddress
import time
from collections.abc import Callable
from threading import Lock

TRIES = 10  # at once
PAUSE = 10  # seconds, for one more
REMEMBERED = 10_000  # addresses


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
    try:
        one = ipaddress.ip_address(address)
    except ValueError:  # a socket file has none
        return "loopback" if address == "localhost" else address
    one = getattr(one, "ipv4_mapped", None) or one  # what a socket for both versions makes of IPv4
    if one.is_loopback:
        return "loopback"
    return str(one) if one.version == 4 else str(ipaddress.ip_network(f"{one}/64", strict=False))
