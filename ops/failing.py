"""How mail to the catcher fails, so that retries, doubt, the failed registry and requeueing can be tried.

A recipient fails by its local part, at any domain (`bounced@example.com`, `bounced+2@example.com`), as `KINDS` says.
With chaos, a share of all mails fails in one of these ways at random, each time anew. Codes: RFC 5321 and 3463.
"""

from __future__ import annotations

import random
import re
import time
from argparse import ArgumentTypeError
from collections.abc import Callable
from math import inf
from typing import NamedTuple

SLOWNESS = 20  # seconds
REMEMBERED = 10_000  # addresses


class Kind(NamedTuple):
    name: str  # the local part
    what: str  # for the page
    reply: str = ""
    lasts: float = inf  # seconds from the first time that the address was tried; 0: that time only
    at_dot: bool = False  # it is the answer to the whole mail, not to the recipient


KINDS = {
    kind.name: kind
    for kind in (
        Kind("bounced", "refused for good, and suppressed from then on", "550 5.1.1 there is no such mailbox"),
        Kind("later", "put off once for each address; Clear forgets that", "451 4.7.1 greylisted, try again later", 0),
        Kind("full", "put off each time", "452 4.2.2 the mailbox is full"),
        Kind("throttled", "put off for a minute, once", "450 4.7.1 Error: too much mail from 127.0.0.1", 60),
        Kind("spam", "the whole mail is refused for good", "554 5.7.1 the mail looks like spam", at_dot=True),
        Kind("slow", f"taken after {SLOWNESS} seconds", at_dot=True),
        Kind("doubt", "taken, but the answer is lost the first time: the mail is in doubt", at_dot=True),
    )
}


AT_RANDOM = [kind for kind in KINDS.values() if kind.name != "bounced"]  # which would put good addresses on the list


def percentage(text: str) -> int:
    if not re.fullmatch(r"[0-9]{1,3}", text) or int(text) > 100:
        raise ArgumentTypeError(f"must be a number from 0 to 100, and is {text!r}")
    return int(text)


class Failures:
    """Decides which recipients and mails fail. `chaos` is how many mails of a hundred fail at random."""

    def __init__(self, chaos: int = 0, clock: Callable[[], float] = time.monotonic) -> None:
        self.chaos = chaos
        self._clock = clock
        self._tried: dict[str, float] = {}  # an address -> when it was first

    def draw(self) -> Kind | None:
        return random.choice(AT_RANDOM) if random.random() * 100 < self.chaos else None

    def of_address(self, address: str) -> Kind | None:
        """Returns how this recipient fails at this moment, if it does."""
        kind = KINDS.get(address.rpartition("@")[0].partition("+")[0].lower())
        if not kind or kind.lasts == inf:
            return kind
        is_first = address not in self._tried
        if is_first and len(self._tried) >= REMEMBERED:
            self._tried.clear()
        first = self._tried.setdefault(address, self._clock())
        return kind if is_first or self._clock() - first < kind.lasts else None

    def forget(self) -> None:
        """Makes each address one that was never tried."""
        self._tried.clear()
