"""The files of a stored mail: their names, types and sizes, read without unpacking what they hold."""

from __future__ import annotations

import json
import re
import uuid
import zlib
from collections.abc import Iterator
from typing import Any

from mail.reader import MAIL_ID, NO_MAIL
from mail.store import mail_key
from queues.connection import Redis, is_wrong_type, translating_errors
from queues.jobs import NotFound
from queues.quarantine import DAMAGED

PACKED = 16 * 1024  # bytes that are unpacked at a time, to PIECE at most
PIECE = 256 * 1024
# A quote inside a string has a backslash before it, so these are names of the stored JSON. Its files come last in it.
FILES, CONTENT, END = re.compile(rb',"attachments":\['), re.compile(rb'"content":"'), re.compile(b'"')
LONGEST = 32  # bytes of these


def stored_size(redis: Redis, mail_id: str) -> int:
    """Returns how many bytes `listed` has to fetch; 0 once the content is dropped. Raises `NotFound`, `Unavailable`."""
    if not MAIL_ID.fullmatch(mail_id):
        raise NotFound
    with translating_errors():
        pipe = redis.pipeline(transaction=False)  # a full Redis refuses a transaction, even to read
        pipe.hexists(mail_key(mail_id), "state")
        pipe.hstrlen(mail_key(mail_id), "content")
        is_there, size = pipe.execute(raise_on_error=False)
        if isinstance(is_there, Exception):
            if is_wrong_type(is_there):
                raise NotFound(NO_MAIL)
            raise is_there
    if not is_there:
        raise NotFound
    return int(size)


def listed(redis: Redis, mail_id: str) -> list[dict[str, Any]]:
    """Returns the files of a mail as `GET /emails/{id}/attachments` shows them, none once its content is dropped.
    Raises `NotFound`, `Unavailable`."""
    with translating_errors():
        content: Any = redis.hget(mail_key(mail_id), "content")
    try:
        files = json.loads(with_sizes(unpacked(content)))["attachments"] if content else []
        return [_shown(mail_id, number, file) for number, file in enumerate(files)]
    except (zlib.error, *DAMAGED):
        raise NotFound(NO_MAIL) from None


def _shown(mail_id: str, number: int, file: dict[str, Any]) -> dict[str, Any]:
    return {
        "id": str(uuid.uuid5(uuid.UUID(mail_id), str(number))),
        "filename": file["filename"],
        "size": file["content"],
        "content_type": file["content_type"],
        "content_disposition": "inline" if "content_id" in file else "attachment",
        "content_id": file.get("content_id"),
        **dict.fromkeys(("download_url", "expires_at")),  # the content is never shown
    }


def unpacked(packed: bytes) -> Iterator[bytes]:
    unpack = zlib.decompressobj()
    for start in range(0, len(packed), PACKED):
        rest = packed[start : start + PACKED]
        while rest:
            yield unpack.decompress(rest, PIECE)
            rest = unpack.unconsumed_tail
    yield unpack.flush()


def with_sizes(pieces: Iterator[bytes]) -> bytes:
    """Returns the stored JSON with its files alone, each with its size in place of its base64."""
    text, ahead, last, length, wanted = b"{", b"", b"", 0, FILES
    for piece in pieces:
        ahead += piece
        while found := wanted.search(ahead):
            before, ahead = ahead[: found.start()], ahead[found.end() :]
            if wanted is END:
                length, last = length + len(before), (last + before)[-2:]
                text += b"%d" % (length // 4 * 3 - last.count(b"="))
            else:
                text += before + b'"content":' if wanted is CONTENT else b'"attachments":['
            length, last, wanted = 0, b"", END if wanted is CONTENT else CONTENT
        if wanted is END:
            length, last, ahead = length + len(ahead), (last + ahead)[-2:], b""
        elif wanted is FILES:
            ahead = ahead[-LONGEST:]
    return text + ahead
