"""What is accepted, before Redis has it: the acceptances of one request or several, which go there in one round trip.

`queues.jobs` makes them. Each is the call of a script that stores all of it or nothing, and that knows what it has
stored already: it may be made again after a lost reply, and by a client with an idempotency key.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import Any, NamedTuple

from redis.client import Pipeline
from redis.exceptions import ConnectionError, NoScriptError

from queues import keys
from queues.connection import ResponseError, Script, translating_errors
from queues.replication import Replication, Unconfirmed


class IdempotencyConflict(Exception):
    """The idempotency key was used before, for another request."""


class Idempotency(NamedTuple):
    """Says what makes two requests the same: caller, endpoint and key; and by its fingerprint, the body."""

    key: str
    fingerprint: str

    @classmethod
    def of(cls, caller: str, endpoint: str, key: str, body: object) -> Idempotency:
        """Takes `body` as parsed JSON, so that the order of its members does not matter."""
        canonical = json.dumps(body, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
        digest = hashlib.sha256(f"{caller}\n{endpoint}\n{key}".encode()).hexdigest()
        return cls(f"{keys.TAG}idempotency:{digest}", hashlib.sha256(canonical.encode()).hexdigest())


class Accepted(NamedTuple):
    """The jobs of a request, in its order. `replayed`: those of an earlier request with the same idempotency key."""

    ids: tuple[str, ...]
    replayed: bool

    @property
    def id(self) -> str:
        return self.ids[0]


class Acceptance(NamedTuple):
    """Jobs to accept, as the call of a script that is still to be made."""

    script: Script
    keys: list[str]
    args: list[Any]

    def result(self, reply: Any) -> Accepted:
        """Returns what the script's reply says. Raises `IdempotencyConflict`, `Unavailable`."""
        if isinstance(reply, ResponseError):
            with translating_errors():
                raise reply
        if isinstance(reply, Exception):  # there was no reply
            raise reply
        verdict, ids = reply
        if verdict == b"conflict":
            raise IdempotencyConflict
        return Accepted(tuple(ids.decode().split(",")), verdict == b"replayed")


def replies(replication: Replication, several: Sequence[Acceptance]) -> list[Any]:
    """Stores and queues the jobs of several requests, each in a step of its own, in one round trip. Returns of each
    what its `result` takes, which may be an exception. Raises `Unavailable`, also where too few replicas have them."""
    with translating_errors():
        try:
            return _run(replication, several)
        except ConnectionError:
            # A connection died in the pool, or the replies were lost. The script knows its own jobs, so a second
            # call stores nothing twice. A time-out is not repeated: the three seconds are spent.
            return _run(replication, several)


def _run(replication: Replication, several: Sequence[Acceptance]) -> list[Any]:
    replies, are_confirmed = _call(replication, several, by_source=False)
    if any(isinstance(one, NoScriptError) for one in replies):
        replies, are_confirmed = _call(replication, several, by_source=True)
    if not are_confirmed:
        raise Unconfirmed
    return replies


def _call(replication: Replication, several: Sequence[Acceptance], by_source: bool) -> tuple[list[Any], bool]:
    def fill(commands: Pipeline) -> None:
        for script, touched, args in several:
            call, name = (commands.eval, script.source) if by_source else (commands.evalsha, script.digest)
            call(name, len(touched), *touched, *args)

    return replication.run(fill)
