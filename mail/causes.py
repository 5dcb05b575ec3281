"""The causes that keep mails from being sent, each with its mails: `535 at auth`, 212 mails.

A cause is a state (failed, unknown, delayed) and a reason. The members `r` of the index (mail.index) lie together by
cause, so a script goes from one cause to the next without a look at the mails between: it takes as long for a hundred
thousand of them as for ten. The reason itself stands in the mails.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from mail.index import LAST, digest, made_at
from mail.outbox import Outbox
from mail.states import CAUSED, LETTERS
from mail.store import INDEX, mail_key
from queues.connection import Script, is_wrong_type, translating_errors

MOST = 1000  # causes; the system's words at connect are free text
AT_ONCE = 1000  # ids read in one go
STATES = {LETTERS[state].encode(): state.value for state in CAUSED}
# KEYS: index. ARGV: the most causes that are returned. Returns of each its number of mails, and the first and last
# member.
FIND = """
local found, behind = {}, 'r'
while #found < tonumber(ARGV[1]) do
  local first = redis.call('ZRANGEBYLEX', KEYS[1], '(' .. behind, '(s', 'LIMIT', 0, 1)[1]
  if not first then break end
  local prefix = string.sub(first, 1, 10)
  behind = prefix .. string.rep('\\255', 17)
  local mails = redis.call('ZLEXCOUNT', KEYS[1], '[' .. prefix, '(' .. behind)
  local last = redis.call('ZREVRANGEBYLEX', KEYS[1], '(' .. behind, '[' .. prefix, 'LIMIT', 0, 1)[1]
  found[#found + 1] = {mails, first, last}
end
return found
"""


class Cause(NamedTuple):
    """Has the same state and reason in so many `mails`, accepted between `first` and `last` (seconds since 1970)."""

    state: str
    reason: str
    mails: int
    first: float
    last: float


def of_cause(state: str, reason: str) -> bytes:
    """Returns how each member of a mail begins that this keeps in this state."""
    return b"r" + LETTERS[state].encode() + digest(reason, 31) + digest(reason, 65599)


def causes(outbox: Outbox) -> list[Cause]:
    """Returns all causes, the one of most mails first. A mail that was queued again is among them until a worker takes
    it. Raises `Unavailable`."""
    redis = outbox.jobs.redis
    with translating_errors():
        found: Any = Script(redis, FIND)([INDEX], [MOST])
        with redis.pipeline(transaction=False) as pipe:
            for _, *ends in found:
                for member in ends:
                    pipe.hget(mail_key(_id(member)), "reason")
            reasons: list[Any] = pipe.execute(raise_on_error=False)
        for error in reasons:
            if isinstance(error, Exception) and not is_wrong_type(error):
                raise error
    known = [_cause(mails, first, last, reasons[2 * at :][:2]) for at, (mails, first, last) in enumerate(found)]
    return sorted(filter(None, known), key=lambda cause: (-cause.mails, -cause.last))


def ids(outbox: Outbox, state: str, reason: str, below: bytes = LAST) -> Iterator[str]:
    """Yields the mails of a cause, the newest first, from that before the id `below` on. Raises `Unavailable`."""
    while found := outbox.index.nearest([of_cause(state, reason)], b"", below, AT_ONCE, upwards=False):
        yield from (_id(one) for one in found)
        below = found[-1]


def newest(outbox: Outbox, wanted: Sequence[Cause], most: int) -> list[list[str]]:
    """Returns the newest mails of each cause, up to `most`. Raises `Unavailable`."""
    with translating_errors(), outbox.jobs.redis.pipeline(transaction=False) as pipe:
        for cause in wanted:
            prefix = of_cause(cause.state, cause.reason)
            pipe.zrevrangebylex(INDEX, b"(" + prefix + LAST, b"(" + prefix, 0, most)
        return [[_id(member) for member in members] for members in pipe.execute()]


def left(outbox: Outbox, state: str, reason: str, below: bytes) -> int:
    """Returns how many mails of a cause come before the id `below`. Raises `Unavailable`."""
    prefix = of_cause(state, reason)
    with translating_errors():
        return int(outbox.jobs.redis.zlexcount(INDEX, b"[" + prefix, b"(" + prefix + below))


def _cause(mails: int, first: bytes, last: bytes, reasons: list[Any]) -> Cause | None:
    """Returns a cause, or None where neither its first mail nor its last one is kept with the reason by which it is in
    the index."""
    state = STATES.get(first[1:2], "")
    for reason in reasons:
        words = reason.decode(errors="replace") if isinstance(reason, bytes) else ""
        if state and first.startswith(of_cause(state, words)):
            return Cause(state, words, mails, made_at(_id(first)), made_at(_id(last)))
    return None


def _id(member: bytes) -> str:
    return str(uuid.UUID(bytes=member[-16:]))
