"""The suppression list: addresses to which no mail is sent any more, since one of them was refused or did not want it.

`mail:suppressed` is a hash: the keyed digest of an address (16 bytes of BLAKE2 with the secret of mail.index, the same
in capitals or not) -> its entry, packed: the entry's id (a UUIDv7, so its time too), a letter for its origin, the id of
the mail that was its source (zeros: none), why; and behind a zero byte the address, if KEEP_SUPPRESSED_ADDRESSES says
so. `mail:suppressions` is a sorted set of scores 0 that lists them by time: id and digest. An entry takes 180 bytes and
stays until somebody deletes it; an address that is on the list already keeps its first one.

Every script that adds calls `suppress(digest, entry)` (mail.states) with the two words that `Suppressions.words` makes
of an address: an attempt does it in the step that settles its mail.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterable
from contextlib import suppress
from typing import Any, NamedTuple

from mail.claim import Claim, iso
from mail.index import LAST, Index, made_at, new_id, raw_id
from mail.states import Status
from mail.store import SUPPRESSED, SUPPRESSIONS, Store
from queues.connection import RedisError, ResponseError, Unavailable, is_wrong_type, translating_errors
from settings import Settings
from smtp.policy import ENHANCED, Phase
from smtp.verdict import Outcome

BOUNCE, COMPLAINT, MANUAL = ORIGINS = ("bounce", "complaint", "manual")
LONGEST_REASON = 40  # bytes
LATEST = 253402300799  # seconds since 1970: an entry that is damaged may say anything
# ARGV: digest, entry, ...
ADD = """
local ids = {}
for at = 1, #ARGV, 2 do ids[#ids + 1] = suppress(ARGV[at], ARGV[at + 1]) end
return ids
"""
# ARGV: digests. Returns of each the entry that was removed, or false.
REMOVE = """
local removed = {}
for at, digest in ipairs(ARGV) do
  local entry = redis.call('HGET', SUPPRESSED, digest)
  if entry then
    redis.call('HDEL', SUPPRESSED, digest)
    redis.call('ZREM', SUPPRESSIONS, string.sub(entry, 1, 16) .. digest)
  end
  removed[at] = entry
end
return removed
"""


class Entry(NamedTuple):
    """Says of an address that is not served since when, and why. `email` is "" where it is not kept."""

    id: str
    origin: str
    source_id: str = ""  # the mail that was refused or complained of
    reason: str = ""
    email: str = ""

    @property
    def created_at(self) -> str:
        return iso(min(made_at(self.id), LATEST))

    def packed(self) -> bytes:
        source = raw_id(self.source_id) or bytes(16)
        why = self.reason.encode()[:LONGEST_REASON].replace(b"\0", b"")
        named = b"\0" + self.email.encode() if self.email else b""
        return (raw_id(self.id) or bytes(16)) + self.origin[0].encode() + source + why + named

    @classmethod
    def unpacked(cls, stored: bytes) -> Entry:
        origin = next((one for one in ORIGINS if one[0].encode() == stored[16:17]), MANUAL)
        source = _id(stored[17:33]) if stored[17:33].strip(b"\0") else ""
        reason, _, email = stored[33:].partition(b"\0")
        return cls(_id(stored[:16]), origin, source, *(one.decode(errors="replace") for one in (reason, email)))


class Suppressions:
    """The list. Raises `Unavailable` where Redis cannot answer."""

    def __init__(self, store: Store, index: Index, settings: Settings) -> None:
        self.store, self.redis, self.index = store, store.redis, index
        self.keep_addresses = settings.keep_suppressed_addresses
        self.redirect_to = settings.mail_redirect_to  # which stands for other addresses

    def words(self, address: str, origin: str, source_id: str = "", reason: str = "") -> list[bytes]:
        """Returns what a script's `suppress` takes. `reason` must be without an address: a code, a phase."""
        email = address.lower() if self.keep_addresses else ""
        return [self._digest(address), Entry(new_id(), origin, source_id, reason, email).packed()]

    def add(self, address: str, origin: str, source_id: str = "", reason: str = "") -> str:
        """Adds an address, and returns the id of its entry: an earlier one, if it is on the list already."""
        return self.add_all([address], origin, source_id, reason)[0]

    def add_all(self, addresses: Iterable[str], origin: str, source_id: str = "", reason: str = "") -> list[str]:
        words = [word for one in addresses for word in self.words(one, origin, source_id, reason)]
        with translating_errors():
            return list(map(_id, self.store.confirmed(ADD, [], words)))

    def obey(self, claim: Claim) -> bool:
        """Leaves those on the list out of an attempt. Returns whether there were any."""
        waiting = [one for one in claim.recipients if one.status == Status.PENDING] if claim.suppressing else []
        found = self.among([one.address for one in waiting])
        for one in waiting:
            if one.address in found:
                one.status, one.code, one.text = Status.SUPPRESSED, None, "on the suppression list"
        return bool(found)

    def note_refused(self, claim: Claim, outcome: Outcome) -> None:
        """Has the step that settles a mail add the addresses of which the relay has said that there are none. Where
        Redis is away now, what the relay has said is not to be lost for that."""
        alone = len(outcome.recipients) == 1
        for address, reply in outcome.recipients.items():
            if reply.is_no_address and (alone or reply.phase is Phase.RCPT) and address != self.redirect_to:
                found = ENHANCED.match(reply.text)
                why = " ".join(filter(None, [str(reply.code), found and found[1], "at", reply.phase.value]))
                with suppress(Unavailable, RedisError):
                    claim.suppress += self.words(address, BOUNCE, claim.id, why)

    def among(self, addresses: list[str]) -> set[str]:
        """Returns those of the addresses that are on the list. Raises redis-py's errors."""
        return set(self.entries(addresses))

    def entries(self, addresses: list[str]) -> dict[str, Entry]:
        """Returns the entries of those of the addresses that are on the list. Raises redis-py's errors."""
        try:
            stored: Any = self.redis.hmget(SUPPRESSED, list(map(self._digest, addresses))) if addresses else []
        except ResponseError as error:
            if not is_wrong_type(error):
                raise
            return {}  # mail goes on; the sweep sets aside what is there
        return {who: Entry.unpacked(entry) for who, entry in zip(addresses, stored, strict=True) if entry}

    def find(self, id_or_email: str) -> Entry | None:
        """Returns the entry with this id, or of this address, which it then names."""
        found = self._digest_of(id_or_email)
        if not found:
            return None
        with translating_errors():
            stored: Any = self.redis.hget(SUPPRESSED, found)
        entry = Entry.unpacked(stored) if stored else None
        return entry._replace(email=id_or_email.lower()) if entry and "@" in id_or_email else entry

    def remove(self, *ids_or_emails: str) -> list[str]:
        """Takes addresses off the list. Returns the ids of those entries that were there."""
        digests = [found for one in ids_or_emails if (found := self._digest_of(one))]
        with translating_errors():
            removed = self.store.confirmed(REMOVE, [], digests) if digests else []
        return [Entry.unpacked(entry).id for entry in removed if entry]

    def page(self, limit: int, *, above: bytes = b"", below: bytes = LAST, upwards: bool = False) -> list[Entry]:
        """Returns up to `limit` entries whose ids are between these two, in bytes, the newest first: the greatest of
        them; or `upwards`, the least ones."""
        low, high = b"(" + above + LAST if above else b"-", b"(" + below
        with translating_errors():
            members: Any = (
                self.redis.zrangebylex(SUPPRESSIONS, low, high, 0, limit)[::-1]
                if upwards
                else self.redis.zrevrangebylex(SUPPRESSIONS, high, low, 0, limit)
            )
            stored: Any = self.redis.hmget(SUPPRESSED, [one[16:] for one in members]) if members else []
        return [Entry.unpacked(one) for one in stored if one]

    def size(self) -> int:
        with translating_errors():
            return int(self.redis.hlen(SUPPRESSED))

    def _digest(self, address: str) -> bytes:
        return bytes.fromhex(self.index.sealed(address.strip(), 16))

    def _digest_of(self, id_or_email: str) -> bytes | None:
        """Returns the digest of an address, or of the address of the entry with this id."""
        if "@" in id_or_email:
            return self._digest(id_or_email)
        own = raw_id(id_or_email)
        if not own:
            return None
        with translating_errors():
            found: Any = self.redis.zrangebylex(SUPPRESSIONS, b"[" + own, b"(" + own + LAST + b"\xff", 0, 1)
        return bytes(found[0][16:]) if found else None


def _id(own: bytes) -> str:
    return str(uuid.UUID(bytes=own[:16].ljust(16, b"\0")))
