"""Checks the grammar of an HTTP/1.1 request, stricter than Waitress itself and bounded.

Refuses what a proxy before us may read differently (RFC 9112): two Hosts or none, lines that do not end in CRLF, folded
fields, framing given twice. Every pattern can match in one way only and every repetition has a limit, so the time grows
with the size of the request; Waitress's own patterns take its square, and see only what these have matched. Depends on
the inside of Waitress: tests/test_server.py has a digest of each piece.
"""

from __future__ import annotations

import re
from typing import Any

from waitress.parser import HTTPRequestParser, ParsingError
from waitress.proxy_headers import PROXY_HEADERS
from waitress.receiver import ChunkedReceiver
from waitress.utilities import BadRequest

TOKEN = rb"[!#$%&'*+.^_`|~0-9A-Za-z-]"
FIELD = TOKEN + rb"{1,256}:[ \t]{0,8}(?:[!-~\x80-\xff][\t -~\x80-\xff]{0,32767})?\r\n"
HEAD = re.compile(rb"[A-Z]{1,32} [!\"$-~]{1,32768} HTTP/1\.[01]\r\n(?:" + FIELD + rb"){0,100}(?:\r\n)?")
EXTENSION = rb";" + TOKEN + rb"+(?:=(?:" + TOKEN + rb"+|\"[\t !#-\[\]-~]*\"))?"
CHUNK = re.compile(rb"([0-9A-Fa-f]{1,16})(?:" + EXTENSION + rb")*\r\n")
CHUNK_END = re.compile(rb"\r\n")
TRAILER = re.compile(FIELD + rb"|\r\n")
HOST = re.compile(r"[A-Za-z0-9._~%!$&'()*+;=:\[\]-]*")
CODINGS = re.compile(rb"(?im)^transfer-encoding:(.*)$")
MOST_IN_LINES = 1024  # bytes: the line that opens a chunk; all trailers together


class Chunks(ChunkedReceiver):  # type: ignore[misc]
    """Receives a body in chunks (RFC 9112, 7.1). Checks extensions and trailers, and forgets them."""

    line = b""  # what has come of it
    awaited = CHUNK
    in_lines = 0  # bytes

    def received(self, data: bytes) -> int:
        at = 0
        while at < len(data) and not (self.completed or self.error):
            if self.chunk_remainder:
                piece = data[at : at + self.chunk_remainder]
                self.buf.append(piece)
                self.chunk_remainder -= len(piece)
                at += len(piece)
            else:
                end = data.find(b"\n", at) + 1 or len(data)
                self._read(data[at:end])
                at = end
        return at

    def _read(self, part: bytes) -> None:
        self.in_lines += len(part)
        self.line += part[:MOST_IN_LINES]
        if self.in_lines > MOST_IN_LINES:
            self.error = BadRequest("a chunk's first line and the trailers must not exceed 1024 bytes")
        elif part.endswith(b"\n"):
            found = self.awaited.fullmatch(self.line)
            self.error = None if found else BadRequest("a chunk must be as in RFC 9112")
            if found:
                self._apply(found)
            self.line = b""

    def _apply(self, line: re.Match[bytes]) -> None:
        if self.awaited is CHUNK:
            self.chunk_remainder = int(line[1], 16)
            self.awaited, self.in_lines = CHUNK_END if self.chunk_remainder else TRAILER, 0
        elif self.awaited is CHUNK_END:
            self.awaited = CHUNK
        else:
            self.completed = line[0] == b"\r\n"


class Parser(HTTPRequestParser):  # type: ignore[misc]
    """Refuses also what a proxy before us may read differently, and what would crash Waitress's parser."""

    body_rcv: Any
    blank = 0  # bytes of the one empty line that may come first
    environ: dict[str, Any] | None = None  # once the answer is begun

    def received(self, data: bytes) -> int:
        if not self.header_plus and self.body_rcv is None:
            if self.blank < 2 and data[0] == b"\r\n"[self.blank]:  # RFC 9112, 2.2
                self.blank += 1
                return 1
            if self.blank == 1 or not data[:1].isupper():  # Waitress would strip it
                self.error, self.completed = BadRequest("it must begin with a method"), True
                return len(data)
        consumed: int = super().received(data)
        if self.completed:  # refused, or without a body. After "100 Continue" Waitress would go on with this parser
            self.expect_continue = False
        return consumed

    def parse_header(self, header_plus: bytes) -> None:
        if not HEAD.fullmatch(header_plus):
            raise ParsingError("its lines must be as in RFC 9112")
        try:
            super().parse_header(header_plus)
        except ValueError:  # a Content-Length of 5000 digits, a URL that urllib cannot split
            raise ParsingError("its numbers and its URL must be readable") from None
        # Waitress joins the values of fields of one name with a comma.
        if not HOST.fullmatch(self.headers.get("HOST", "" if self.version == "1.0" else ",")):
            raise ParsingError("it must have exactly one Host")
        codings = [coding.strip(b" \t\r").lower() for coding in CODINGS.findall(header_plus)]
        if codings and (self.version == "1.0" or "CONTENT_LENGTH" in self.headers):  # RFC 9112, 6.1: faulty framing
            raise ParsingError("its body must end in one way only")
        if codings not in ([], [b"chunked"]):  # Waitress takes one that is empty for none
            raise ParsingError("it must be chunked once only")
        if codings:
            self.body_rcv = Chunks(self.body_rcv.getbuf())
        for name in PROXY_HEADERS & self.headers.keys():  # anybody may write them
            del self.headers[name]
