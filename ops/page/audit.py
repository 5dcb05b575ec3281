"""Who did what: noted as the log's event `operator` and in Redis, by bin/top too, which has no pages.

A note has no address and no subject: what names the thing is an id, or words without an @.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator
from contextlib import suppress
from typing import Any, NamedTuple

from mail.store import ACTIONS
from ops.page.words import masked
from process.log import emit
from queues.connection import Redis, RedisError

KEPT = 1000
NAMES = re.compile(r"[ -?A-~]{0,120}")  # printable ASCII without @


class Action(NamedTuple):
    at: float  # seconds since 1970
    who: str
    what: str
    id: str


def note(redis: Redis, who: str, what: str, id: str) -> None:
    """Notes what a person has done, to which mail, job, queue or cause. It is done already, so a Redis that takes no
    note stops nobody: the log has it."""
    action = Action(round(time.time(), 3), masked(who), what, id if NAMES.fullmatch(id) else "")
    emit("operator", who=action.who, what=what, id=action.id)
    with suppress(RedisError), redis.pipeline() as pipe:
        pipe.lpush(ACTIONS, json.dumps(action._asdict()))
        pipe.ltrim(ACTIONS, 0, KEPT - 1)
        pipe.execute()


def actions(redis: Redis, first: int = 0, last: int = -1, only: str = "") -> list[Action]:
    """Returns what was done, the latest first; with `only`, what was done to the thing with this id."""
    lines: Any = redis.lrange(ACTIONS, first, last)
    return list(_read(line for line in lines if only.encode() in line))


def _read(lines: Iterator[bytes]) -> Iterator[Action]:
    for line in lines:
        with suppress(ValueError, TypeError, KeyError):  # one that is damaged spoils no page
            one = json.loads(line)
            yield Action(float(one["at"]), *(str(one[name]) for name in ("who", "what", "id")))
