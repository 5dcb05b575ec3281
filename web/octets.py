"""Reads a request's body, and takes each list of octets in it for the base64 of the same file.

Python's `list(bytes)`, Go's []int, Ruby's .bytes and Node's Buffer write a file as `"content": [37,80,68]`: up to five
bytes an octet, and eight more once parsed. Such a list never lies in memory here: a mark stands for it in the JSON, and
what counts against the limit is what the mail will hold.
"""

from __future__ import annotations

import json
import re
import uuid
from base64 import b64decode, b64encode
from collections.abc import Iterator
from typing import Any, Protocol

from web.errors import Refusal, bad_request

MAX_VALUES = 10_000  # in one body, names counted; checking a million addresses would keep every other caller waiting
ON_THE_WIRE = 4  # times its base64: so long is a list at most, of octets of three digits, each with comma and space
PIECE = 64 * 1024  # bytes
# In JSON, this is a name and the begin of its list, for a quote inside a string has a backslash before it. What stands
# before is looked at apart: a pattern that begins with the quote is found ten times as fast.
START = re.compile(rb'"(?:content|data)"[ \t\r\n]{0,9}:[ \t\r\n]{0,9}\[')
LONGEST_START = 64
BEFORE_A_NAME = b"{, \t\r\n"
INSIDE = re.compile(rb"[0-9, \t\r\n]*")


def too_many_values() -> Refusal:
    return bad_request("body", f"must not contain more than {MAX_VALUES} values")


class File(Protocol):
    def read(self, size: int, /) -> bytes: ...


def read(file: File, size: int, limit: int) -> tuple[str, dict[str, str]]:
    """Reads `size` bytes. Returns the JSON, with a mark in place of each list of octets, and the base64 of these by
    their marks. Raises `Refusal` if that is longer than `limit`, `UnicodeDecodeError`."""
    reader = Reader(file, size, limit)
    while reader.to_next_list() or reader.read_more():
        pass
    reader.write(reader.ahead)
    return reader.text.decode(), reader.lists


class Reader:
    """Turns a body into `text` and `lists`, piece by piece. What is read and not yet looked at is `ahead`."""

    def __init__(self, file: File, size: int, limit: int) -> None:
        self.file, self.unread = file, size
        self.limit = self.left = limit
        self.ahead, self.found = b"", 0
        self.text = bytearray()
        self.lists: dict[str, str] = {}
        self.mark = uuid.uuid4().hex  # no caller can know it

    def read_more(self) -> bool:
        piece = self.file.read(min(PIECE, self.unread))
        self.unread -= len(piece)
        self.ahead += piece
        return bool(piece)

    def _count(self, size: int) -> None:
        self.left -= size
        if self.left < 0:
            raise Refusal(413, "request_too_large", f"the body exceeds the limit of {self.limit} bytes")

    def write(self, piece: bytes) -> None:
        self._count(len(piece))
        self.text += piece

    def to_next_list(self) -> bool:
        """Writes what is ahead, and the next list. Returns whether there may be another."""
        found = START.search(self.ahead)
        end = found.end() - 1 if found else max(0, len(self.ahead) - LONGEST_START)
        self.write(self.ahead[:end])
        self.ahead = self.ahead[end:]
        self.found += bool(found)
        if self.found > MAX_VALUES:
            raise too_many_values()
        if found and found.start() and found.string[found.start() - 1] in BEFORE_A_NAME:
            self._fold()
        return bool(found)

    def _fold(self) -> None:
        """Writes a mark in place of a list of octets. Any other list is left to the parser."""
        self.ahead = self.ahead[1:]
        packed, rest, count = bytearray(), b"", 0
        try:
            for octets in self._octets():
                rest += octets
                count += len(octets)
                whole = len(rest) // 3 * 3
                packed += b64encode(rest[:whole])
                rest = rest[whole:]
                self._count(whole * 4 // 3)
        except ValueError:
            if count > MAX_VALUES:
                raise too_many_values() from None
            before = b64decode(packed) + rest
            self.write(b"[" + "".join(f"{octet}," for octet in before).encode())
            return
        mark = f"{self.mark}{len(self.lists)}"
        packed += b64encode(rest)
        self.lists[mark] = packed.decode()
        self.write(f'"{mark}"'.encode())

    def _octets(self) -> Iterator[bytes]:
        """Yields what is in a list of octets, and takes it from what is ahead. Raises `ValueError` at anything else,
        also where nothing is: `[]`, `[1,]`."""
        ends = False
        while not ends:
            found = INSIDE.match(self.ahead)
            end = found.end() if found else 0
            ends = end < len(self.ahead)
            if ends and self.ahead[end] != ord("]"):
                raise ValueError
            end = end if ends else self.ahead.rfind(b",")
            if end >= 0:
                yield bytes(json.loads(b"[%b,0]" % self.ahead[:end]))[:-1]
                self.ahead = self.ahead[end + 1 :]
            elif len(self.ahead) > PIECE or not self.read_more():
                raise ValueError


def with_files(body: Any, lists: dict[str, str]) -> Any:
    """Returns a parsed body with base64 for each list that is the content of a file, and any other list as it came.
    Raises `Refusal`."""
    for one in files_in(body) if lists else ():
        content = one.get("content")
        if isinstance(content, dict) and set(content) == {"type", "data"} and content["type"] == "Buffer":
            content = content["data"]
        if isinstance(content, str) and content in lists:
            one["content"] = lists.pop(content)
    if 3 * sum(map(len, lists.values())) > 4 * MAX_VALUES:
        raise too_many_values()
    return with_lists(body, lists) if lists else body


def files_in(body: Any) -> Iterator[dict[str, Any]]:
    for mail in body if isinstance(body, list) else [body]:
        files = mail.get("attachments") if isinstance(mail, dict) else None
        yield from [one for one in files if isinstance(one, dict)] if isinstance(files, list) else ()


def with_lists(value: Any, lists: dict[str, str]) -> Any:
    if isinstance(value, dict):
        return {name: with_lists(one, lists) for name, one in value.items()}
    if isinstance(value, list):
        return [with_lists(one, lists) for one in value]
    return list(b64decode(lists[value])) if isinstance(value, str) and value in lists else value
