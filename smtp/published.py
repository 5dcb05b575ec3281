"""The relays by name, as the worker that started last knows them: for the API and the pages, which may not see RELAYS.

`relay:names` is a hash: name -> JSON of its kind, where it is, its rates and its place in the order. No secret, no
login. Where there is none, the one relay is that of SMTP_HOST.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import suppress
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from process.relays import NAME, ONLY, RelaySettings
from process.values import Rate, parse_rates
from queues import keys
from queues.connection import Redis, is_wrong_type, translating_errors

NAMES = f"{keys.TAG}relay:names"
MOST = 50  # relays


class Published(NamedTuple):
    """One relay as others may know it. `where` is host:port, or the host of a URL; "" if nobody has said."""

    name: str
    kind: str = "smtp"
    where: str = ""
    rate: tuple[Rate, ...] = ()
    serves_all: bool = True  # not only some domains

    @property
    def host(self) -> str:
        return self.where.rpartition(":")[0] or self.where

    @property
    def is_only(self) -> bool:
        """Returns whether it is the one of SMTP_HOST."""
        return self.name == ONLY


def where(one: RelaySettings) -> str:
    """Returns where a relay is, without a login that its URL may hold."""
    return f"{one.host}:{one.port}" if one.kind == "smtp" else urlsplit(one.url or "").hostname or ""


def publish(redis: Redis, relays: Sequence[RelaySettings]) -> None:
    """Writes down the relays of RELAYS; none if there are none."""
    named = [one for one in relays if one.name != ONLY]
    with redis.pipeline() as commands:
        commands.delete(NAMES)
        for place, one in enumerate(named):
            said: dict[str, Any] = {"place": place, "kind": one.kind, "where": where(one)}
            said |= {"rate": ",".join(map(str, one.rate)), "serves_all": not one.domains}
            commands.hset(NAMES, one.name, json.dumps(said))
        commands.execute()


def published(redis: Redis) -> list[Published]:
    """Returns the relays in their order. Raises `Unavailable`."""
    stored: Any = {}
    with translating_errors():
        try:
            stored = redis.hgetall(NAMES)
        except Exception as error:
            if not is_wrong_type(error):
                raise
    return read(stored)


def read(stored: dict[bytes, bytes]) -> list[Published]:
    """Returns what the hash says; what cannot be read is left out."""
    found: list[tuple[int, Published]] = []
    for name, value in list(stored.items())[:MOST]:
        with suppress(ValueError, TypeError, KeyError, AttributeError):
            said, known = json.loads(value), name.decode()
            rate = parse_rates(said["rate"]) if said["rate"] else ()
            if NAME.fullmatch(known):
                one = Published(known, str(said["kind"]), str(said["where"])[:300], rate, bool(said["serves_all"]))
                found.append((int(said["place"]), one))
    return [one for _, one in sorted(found)] or [Published(ONLY)]
