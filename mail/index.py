"""The index of all mails: by state and key, by recipient, by tag, and by what keeps them; each newest first.

`mail:index` is a sorted set in which every score is 0, so that Redis orders the members by their bytes. A member ends
with the 16 bytes of a mail's id, which is a UUIDv7 and so begins with the time:

    s  a letter for the state  4 bytes made of the API key's name  id     exactly one of each mail
    t  8 bytes made of a recipient's address                       id     one of each recipient
    g  8 bytes made of a tag                                       id     one of each tag
    r  a letter for the state  8 bytes made of its reason          id     one while it is failed, unknown or delayed

`accept` writes them, and BECOME moves a mail from state to state (mail.states), within their own scripts. An address is
in it as a keyed digest (BLAKE2, RFC 7693: an HMAC takes three times as long) with a secret that is in Redis, too
(`mail:secret`): who sees a member does not see an address. `mail:keys` holds the names of all keys. `trim` drops what
belongs to mails that are no longer kept, and sets right what workers of an earlier version know nothing of (`r`). A
mail accepted before there was an index has another kind of id, and is in no list.
"""

from __future__ import annotations

import hashlib
import secrets
import time
import uuid
from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import Any

from mail.message import Draft
from mail.states import CAUSED, LETTERS, SCHEDULED, State
from mail.store import INDEX, KEY_NAMES, SECRET, SWEPT, Store, mail_key
from queues.connection import Redis, translating_errors

LAST = b"\xff" * 16  # an id behind all others
SECRET_FOR = 60  # seconds for which a process relies on what it has read or noted: a FLUSHALL takes it away

# ARGV: mail id, one of its members, ...
SET_CAUSES_RIGHT = """
for at = 1, #ARGV, 2 do
  local state, reason = unpack(redis.pcall('HMGET', MAIL .. ARGV[at], 'state', 'reason'))
  local noted = ARGV[at + 1]
  local cause = by_cause(string.sub(noted, -16), state, reason)
  if cause then redis.pcall('ZADD', INDEX, 0, cause) end
  if string.sub(noted, 1, 1) == 'r' and noted ~= cause then redis.pcall('ZREM', INDEX, noted) end
end
"""
WITH_CAUSE = (b"r", *(b"s" + LETTERS[state].encode() for state in CAUSED))  # how their members begin


def new_id() -> str:
    """Returns a UUIDv7 (RFC 9562 5.7, 6.2 method 3): of two, the one made later is the greater."""
    milliseconds, rest = divmod(time.time_ns(), 1_000_000)
    number = milliseconds << 80 | 7 << 76 | (rest * 4096 // 1_000_000) << 64 | 2 << 62 | secrets.randbits(62)
    digits = f"{number:032x}"
    return f"{digits[:8]}-{digits[8:12]}-{digits[12:16]}-{digits[16:20]}-{digits[20:]}"


def made_at(mail_id: str) -> float:
    """Returns when an id was made, in seconds since 1970: the middle of its millisecond, which no rounding leaves."""
    return (int(mail_id.replace("-", "")[:12], 16) + 0.5) / 1000


def first_id(moment: float) -> bytes:
    """Returns the least id that could be made at `moment`, in seconds since 1970."""
    return max(0, round(moment * 1000)).to_bytes(6, "big") + bytes(10)


def raw_id(mail_id: str) -> bytes | None:
    """Returns the bytes of an id, or None for one of a mail that cannot be in the index."""
    try:
        found = uuid.UUID(mail_id)
    except ValueError:
        return None
    return found.bytes if found.version == 7 and str(found) == mail_id else None


@lru_cache(maxsize=1000)
def of_state(state: str, key: str) -> bytes:
    """Returns how each member of a mail in this state begins that the key of this name has submitted."""
    return b"s" + LETTERS[state].encode() + digest(key, 31)


def digest(text: str, factor: int) -> bytes:
    """Returns four bytes made of a text, as REINDEX does."""
    total = 0
    for octet in text.encode():
        total = (total * factor + octet) % 2**32
    return total.to_bytes(4, "big")


def of_tag(tag: str) -> bytes:
    """Returns how each member of a mail with this tag (`name:value`) begins."""
    return b"g" + hashlib.sha256(tag.encode()).digest()[:8]


def of_sealed(digest: str) -> bytes:
    """Returns how each member of a mail begins that is to the address with this digest (`Index.sealed`)."""
    return b"t" + bytes.fromhex(digest)


class Index:
    """Says what the index has of a mail, and finds mails by it. Raises `Unavailable` where Redis cannot answer."""

    def __init__(self, redis: Redis) -> None:
        self.redis = redis
        self._secret = (b"", 0.0)  # and when it was read, of time.monotonic()
        self._noted: set[str] = set()  # names of keys that are in KEY_NAMES

    def members(self, mail_id: str, draft: Draft) -> list[bytes]:
        """Returns what `accept` writes: a member for its state, each recipient and each tag. Raises
        `Unavailable`."""
        mail = bytes.fromhex(mail_id.replace("-", ""))
        state = SCHEDULED if draft.scheduled_at else State.QUEUED.value
        prefixes = [self.of_address(address) for address in draft.message.recipients]
        prefixes += [of_tag(f"{tag['name']}:{tag['value']}") for tag in draft.message.tags]
        if draft.key not in self._noted:
            with translating_errors():
                self.redis.sadd(KEY_NAMES, draft.key)
            self._noted.add(draft.key)
        return [prefix + mail for prefix in (of_state(state, draft.key), *prefixes)]

    def of_address(self, address: str) -> bytes:
        """Returns how each member of a mail to this address begins, whether in capitals or not. Raises
        `Unavailable`."""
        return of_sealed(self.sealed(address))

    def sealed(self, text: str, size: int = 8) -> str:
        """Returns a text's keyed digest of so many bytes in hex, the same whether it is in capitals or not. Raises
        `Unavailable`."""
        return hashlib.blake2b(text.lower().encode(), key=self._key(), digest_size=size).hexdigest()

    def proof(self, mail_id: str) -> bytes:
        """Returns ten bytes that stand for a mail, and that nobody else can compute. Raises `Unavailable`."""
        kind = b"return path"  # so that no digest of an address is one
        return hashlib.blake2b(mail_id.encode(), key=self._key(), digest_size=10, person=kind).digest()

    def _key(self) -> bytes:
        secret, read_at = self._secret
        if not secret or time.monotonic() - read_at > SECRET_FOR:
            with translating_errors():
                known: Any = self.redis.get(SECRET)  # a full Redis would refuse the rest
                if not known:
                    self.redis.set(SECRET, secret or secrets.token_bytes(32), nx=True)
                    known = self.redis.get(SECRET)
            secret = known[:64]  # BLAKE2 takes no longer one
            self._secret, self._noted = (secret, time.monotonic()), set()
        return secret

    def names(self) -> set[str]:
        """Returns the names of all keys that have submitted mail; "" is for mail without one."""
        with translating_errors():
            known: Any = self.redis.smembers(KEY_NAMES)
        return {"", *(name.decode(errors="replace") for name in known)}

    def size(self, prefixes: Iterable[bytes]) -> int:
        """Returns how many members begin with one of these."""
        with translating_errors(), self.redis.pipeline(transaction=False) as pipe:
            for prefix in prefixes:
                pipe.zlexcount(INDEX, b"[" + prefix, b"(" + prefix + LAST + b"\xff")
            return sum(pipe.execute())

    def nearest(self, prefixes: Iterable[bytes], above: bytes, below: bytes, most: int, upwards: bool) -> list[bytes]:
        """Returns the ids between `above` and `below` that begin with one of the prefixes: the `most` greatest, from
        there down; or `upwards`, the least ones."""
        with translating_errors(), self.redis.pipeline(transaction=False) as pipe:
            for prefix in prefixes:
                low, high = b"(" + prefix + above, b"(" + prefix + below
                if upwards:
                    pipe.zrangebylex(INDEX, low, high, 0, most)
                else:
                    pipe.zrevrangebylex(INDEX, high, low, 0, most)
            found = {member[-16:] for members in pipe.execute() for member in members}
        return sorted(found, reverse=not upwards)[:most]


def trim(store: Store, older_than: float) -> None:
    """Looks at the next hundredth of the index, and drops the members of mails that were accepted before `older_than`
    (seconds since 1970) and are no longer kept. Goes on where the last call has ended."""
    redis = store.redis
    left: int = max(1000, redis.zcard(INDEX) // 100)
    at: Any = redis.hget(SWEPT, "index")
    while left > 0:
        members: Any = redis.zrangebylex(INDEX, b"(" + at if at else b"-", b"+", 0, min(left, 1000))
        whole = [one for one in members if len(one) > 16]
        gone = _gone(redis, [one for one in whole if one[-16:] < first_id(older_than)])
        gone += [one for one in members if len(one) <= 16]  # no member of ours
        if gone:
            redis.zrem(INDEX, *gone)
        caused = [word for one in whole if one.startswith(WITH_CAUSE) for word in (_id(one), one)]
        for start in range(0, len(caused), 400):  # a script keeps all others waiting
            store.run(SET_CAUSES_RIGHT, [], caused[start : start + 400])
        left -= len(members) or left
        at = members[-1] if members else b""
    redis.hset(SWEPT, "index", at)


def _gone(redis: Redis, members: Sequence[bytes]) -> list[bytes]:
    with redis.pipeline(transaction=False) as pipe:
        for member in members:
            pipe.exists(mail_key(_id(member)))
        return [member for member, kept in zip(members, pipe.execute(), strict=True) if not kept]


def _id(member: bytes) -> str:
    return str(uuid.UUID(bytes=member[-16:]))
