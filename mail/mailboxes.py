"""The two mailboxes that are looked into each minute: what came back, and what the relay has sent.

BOUNCE_IMAP_URL: each mail that is new is read, in order, and noted as read in Redis by its number (`mail:mailbox`), so
that it does not matter whether a person has opened it. One that cannot be read or believed yet is noted as well, and
read again, and keeps no other. One that was a report about a mail of ours is marked as read; all others stay unread,
for a person. None is moved or deleted.

DOUBT_IMAP_URL: a mail in doubt whose Message-ID is in that folder has arrived, and is settled, unless it had gone to
others before. That it is not there proves nothing, and changes nothing.
"""

from __future__ import annotations

import hashlib
import logging
import random
import time
import uuid
from collections import Counter
from typing import Any

from mail import imap, reports
from mail.bounces import Bounces, Found
from mail.claim import timestamp
from mail.index import LAST, of_state
from mail.outbox import Outbox
from mail.states import SERVED, State
from mail.store import MAILBOX
from process.log import emit, where
from queues.connection import RedisError, Unavailable, translating_errors
from queues.jobs import NotFound, NotPossible

AT_ONCE = 200  # reports read, or mails looked for, in one go
LONGEST = 30  # seconds for that: the worker for `jobs` has other jobs
LOOKED_FOR = 2 * 86400  # seconds after its last attempt for which a mail is looked for: its copy comes with the mail
FOUND = "it is in the folder of sent mail, by its Message-ID"


def read_reports(outbox: Outbox) -> dict[str, Any]:
    """Reads what is new in the mailbox of BOUNCE_IMAP_URL. Returns how many mails were what."""
    url = outbox.settings.bounce_imap_url
    counts: Counter[str] = Counter()
    try:
        if url:
            with imap.opened(url.get_secret_value()) as folder:
                _read_new(folder, outbox, hashlib.sha256(url.get_secret_value().encode()).hexdigest()[:16], counts)
    except imap.Unreachable as error:
        emit("mailbox_unreachable", logging.WARNING, at="BOUNCE_IMAP_URL", reason=error)
        return {**counts, "error": str(error)}
    return dict(counts)


def _read_new(folder: imap.Folder, outbox: Outbox, box: str, counts: Counter[str]) -> None:
    bounces, redis, until = Bounces(outbox), outbox.jobs.redis, time.monotonic() + LONGEST
    with translating_errors():
        known: Any = redis.hmget(MAILBOX, "of", "uid", "later")
    numbered = f"{box}:{folder.validity}"
    if known[0] != numbered.encode():
        known = [b"", b"0", b""]
    last, again = int(known[1] or 0), list(map(int, (known[2] or b"").split()))
    for one in [*again, *folder.newer_than(last)[:AT_ONCE]]:
        if time.monotonic() > until:
            return
        is_read = _read(folder, one, bounces, counts)
        last, again = max(last, one), [*(other for other in again if other != one), *([] if is_read else [one])]
        noted: Any = {"of": numbered, "uid": last, "later": " ".join(map(str, again[-AT_ONCE:]))}
        with translating_errors():
            redis.hset(MAILBOX, mapping=noted)


def _read(folder: imap.Folder, uid: int, bounces: Bounces, counts: Counter[str]) -> bool:
    """Reads one mail of the mailbox. Returns whether that is done with; whatever the connection raises goes on: a mail
    that has not come is not read."""
    data = folder.fetch(uid, reports.SIZE)
    try:
        found = Found(later=True) if data is None else bounces.take(data)
    except (Unavailable, RedisError):
        raise
    except Exception as error:  # one mail must not keep all others from being read
        emit("crashed", logging.ERROR, where=where(error))
        counts["unread"] += 1
        return True
    counts["later" if found.later else found.kind or "other"] += 1
    counts["noted"] += found.noted
    if found.mail_id and not found.later:
        folder.mark_read(uid)
    return not found.later


def resolve_doubt(outbox: Outbox) -> dict[str, Any]:
    """Settles those mails in doubt that are in the folder of DOUBT_IMAP_URL. Returns how many of how many."""
    url, settled, until = outbox.settings.doubt_imap_url, 0, time.monotonic() + LONGEST
    waiting = in_doubt(outbox) if url else []
    random.shuffle(waiting)  # so that none is always behind those for which there is time
    try:
        if url and waiting:
            with imap.opened(url.get_secret_value(), readonly=True) as folder:
                for mail in waiting:
                    if time.monotonic() > until:
                        break
                    settled += folder.has(mail["message_id"]) and _settle(outbox, mail["id"])
    except imap.Unreachable as error:
        emit("mailbox_unreachable", logging.WARNING, at="DOUBT_IMAP_URL", reason=error)
        return {"settled": settled, "in_doubt": len(waiting), "error": str(error)}
    return {"settled": settled, "in_doubt": len(waiting)}


def in_doubt(outbox: Outbox) -> list[dict[str, Any]]:
    """Returns the mails that are in doubt and held since not long ago, the newest first."""
    names = outbox.index.names() | {key.name for key in outbox.settings.api_keys}
    ids = outbox.index.nearest([of_state(State.UNKNOWN, name) for name in names], b"", LAST, AT_ONCE, upwards=False)
    return [
        mail
        for mail in outbox.read_all([str(uuid.UUID(bytes=one)) for one in ids])
        if mail["status"] == State.UNKNOWN and _last_attempt(mail) > time.time() - LOOKED_FOR and not _went_before(mail)
    ]


def _went_before(mail: dict[str, Any]) -> bool:
    """Returns whether others were served: in an attempt before that in doubt, so its copy may be of that one."""
    return any(one["status"] in SERVED for one in mail["recipients"])


def _last_attempt(mail: dict[str, Any]) -> float:
    return max((timestamp(one["at"]) for one in mail["attempts"]), default=time.time())


def _settle(outbox: Outbox, mail_id: str) -> bool:
    try:
        outbox.arrived(mail_id, FOUND)
    except (NotFound, NotPossible):  # a person was faster
        return False
    emit("sent", id=mail_id, reason=FOUND)
    return True
