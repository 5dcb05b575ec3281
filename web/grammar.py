"""The grammar of an HTTP/1.1 request, stricter than Waitress's own and bounded.

Refuses what a proxy before us may read differently (RFC 9112): two Hosts or none, lines that do not end in CRLF, folded
fields, framing that is said in two ways. Every pattern can match in one way only and every repetition has a limit, so
reading takes time in proportion to what is read; Waitress's own patterns take the square of it, and see only what these
have matched. Leans on the inside of Waitress: tests/test_server.py has a digest of each piece.
"""

from __future__ import annotations

import re
from typing import Any

from waitress.parser import HTTPRequestParser, ParsingError
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

    line = b""  # as much of it as has come
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
            self.error = BadRequest("a line or the trailers are too long")
        elif part.endswith(b"\n"):
            found = self.awaited.fullmatch(self.line)
            self.error = None if found else BadRequest("a chunk is not as RFC 9112 has it")
            if found:
                self._obey(found)
            self.line = b""

    def _obey(self, line: re.Match[bytes]) -> None:
        if self.awaited is CHUNK:
            self.chunk_remainder = int(line[1], 16)
            self.awaited, self.in_lines = CHUNK_END if self.chunk_remainder else TRAILER, 0
        elif self.awaited is CHUNK_END:
            self.awaited = CHUNK
        else:
            self.completed = line[0] == b"\r\n"


class Parser(HTTPRequestParser):  # type: ignore[misc]
    """Waitress's parser, refusing also what a proxy before us may read differently, or what would crash it."""

    body_rcv: Any
    blank = 0  # bytes of the one empty line that may come first

    def received(self, data: bytes) -> int:
        if not self.header_plus and self.body_rcv is None:
            if self.blank < 2 and data[0] == b"\r\n"[self.blank]:  # RFC 9112, 2.2
                self.blank += 1
                return 1
            if self.blank == 1 or not data[:1].isupper():  # Waitress would strip it
                self.error, self.completed = BadRequest("it does not begin with a method"), True
                return len(data)
        consumed: int = super().received(data)
        if self.completed:  # refused, or without a body. After "100 Continue" Waitress would go on with this parser
            self.expect_continue = False
        return consumed

    def parse_header(self, header_plus: bytes) -> None:
        if not HEAD.fullmatch(header_plus):
            raise ParsingError("a line of it is not as RFC 9112 has it")
        try:
            super().parse_header(header_plus)
        except ValueError:  # a Content-Length of 5000 digits, a URL that urllib cannot split
            raise ParsingError("a number or URL in it cannot be read") from None
        # Waitress joins the values of fields of one name with a comma.
        if not HOST.fullmatch(self.headers.get("HOST", "" if self.version == "1.0" else ",")):
            raise ParsingError("it does not have one Host")
        # Waitress leaves Transfer-Encoding there if it did not obey it. RFC 9112, 6.1: the framing is faulty.
        if "TRANSFER_ENCODING" in self.headers or (self.chunked and "CONTENT_LENGTH" in self.headers):
            raise ParsingError("it says in two ways where its body ends")
        if self.chunked:
            if [coding.strip(b" \t\r").lower() for coding in CODINGS.findall(header_plus)] != [b"chunked"]:
                raise ParsingError("it is chunked more than once")
            self.body_rcv = Chunks(self.body_rcv.getbuf())
