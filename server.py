"""HTTP/1.1 on sockets: Waitress, stricter, quicker, and polite when it is to end.

Stricter: it refuses also what a proxy before us may read differently, in our own error shape (RFC 9112). Quicker: small
requests are answered where they are read. Polite: `Server.run` ends when all who have sent a request have their answer
and every connection is quiet, so that with a socket of systemd's a restart drops nothing; Waitress's own way cancels
what waits for a thread and cuts what it has not read yet. Knows no route, no key, no mail. Leans on the inside of
Waitress: tests/test_server.py notices when that changes.

Waitress: https://docs.pylonsproject.org/projects/waitress
"""

from __future__ import annotations

import errno
import json
import re
import socket
import threading
import time
import uuid
from collections import deque
from collections.abc import Callable, Iterable
from typing import Any, ClassVar, Protocol

from waitress import wasyncore
from waitress.channel import HTTPChannel
from waitress.parser import HTTPRequestParser, ParsingError
from waitress.receiver import ChunkedReceiver
from waitress.server import BaseWSGIServer, create_server
from waitress.task import ErrorTask, ThreadedTaskDispatcher, WSGITask
from waitress.utilities import BadRequest

import supervisor
from jobs import is_silent
from mail.message import FieldError
from settings import Address

QUICK_BODY = 16 * 1024  # bytes
LONG = 0.1  # seconds for one request; less may be the machine being busy
# Seconds. A process that is to end closes no connection on which a request may be under way: nginx gives up its own
# after 2 seconds of silence (keepalive_timeout in nginx/async-email.conf).
QUIET_AFTER, DRAINED_AFTER = 3, 20
MOST_CONNECTIONS = 400  # of a process, on each socket; each needs a file descriptor, a large body one more
UNREAD_FOR = 30  # seconds in which a client takes nothing of its answer, before the connection is closed


class Application(Protocol):
    """WSGI, and how many requests were answered: to see that it goes on."""

    answered: int

    def __call__(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]: ...


def error_shape(
    status: int, name: str, text: str, request_id: str, errors: Iterable[FieldError] = ()
) -> dict[str, Any]:
    """The one error shape."""
    shape: dict[str, Any] = {"statusCode": status, "name": name, "message": text}
    if errors:
        shape["errors"] = [{"field": error.field, "message": error.message} for error in errors]
    return shape | {"request_id": request_id}


def common_headers(request_id: str) -> list[tuple[str, str]]:
    return [("X-Request-Id", request_id), ("Cache-Control", "no-store"), ("X-Content-Type-Options", "nosniff")]


# The grammar of RFC 9112, with a limit on everything that repeats. Each pattern can match in one way only, so it takes
# time in proportion to what it reads; Waitress's own take the square of it, and see only what these have matched.
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


class JsonErrorTask(ErrorTask):  # type: ignore[misc]
    """Waitress's own refusals (a body over the limit, a header it cannot parse) in our error shape."""

    WORDS: ClassVar = {
        400: ("validation_error", "this is not an HTTP request as RFC 9112 has it"),
        413: ("request_too_large", "the body is larger than is taken here"),
        431: ("request_headers_too_large", "the headers are larger than is taken here"),
        501: ("not_implemented", "of all transfer encodings, only chunked is taken"),
    }

    def execute(self) -> None:
        error, request_id = self.request.error, uuid.uuid4().hex
        name, text = self.WORDS.get(error.code, ("application_error", "this is our fault"))
        body = json.dumps(error_shape(error.code, name, text, request_id)).encode()
        self.status = f"{error.code} {error.reason}"
        self.response_headers += [("Content-Type", "application/json"), *common_headers(request_id)]
        self.set_close_on_finish()
        self.content_length = len(body)
        self.write(body)


class LastTask(WSGITask):  # type: ignore[misc]
    """Of a process that is to end: the answer tells the caller to take a new connection for his next request."""

    def start(self) -> None:
        super().start()
        self.set_close_on_finish()


class Channel(HTTPChannel):  # type: ignore[misc]
    parser_class = Parser
    error_task_class = JsonErrorTask

    def __init__(self, server: BaseWSGIServer, *rest: Any, **how: Any) -> None:
        super().__init__(server, *rest, **how)
        self.waits_since = time.monotonic()
        if len(server.active_channels) > MOST_CONNECTIONS:
            self._make_room()

    def _make_room(self) -> None:
        """Closes the connection that has kept us waiting longest for a whole request, or for its answer to be read. It
        may send a byte now and then: that is no request."""
        channels = [one for one in self.server.active_channels.values() if not one.will_close]
        idle = [one for one in channels if one.total_outbufs_len or not one.requests]
        min(idle, key=lambda one: one.waits_since).will_close = True

    def service(self) -> None:
        super().service()
        self.waits_since = time.monotonic()

    @property
    def is_quiet(self) -> bool:
        """Nobody would miss this connection."""
        idle = time.time() - self.last_activity > QUIET_AFTER
        return idle and not (self.requests or self.request or self.total_outbufs_len)


def listen_on(listen: Address) -> list[socket.socket]:
    """What systemd has opened for us, or else the address; a name such as localhost has two. Raises OSError."""
    given = supervisor.sockets()
    if given:
        return given
    try:
        found = socket.getaddrinfo(*listen, type=socket.SOCK_STREAM)
    except (OSError, ValueError):
        raise OSError(errno.EADDRNOTAVAIL, "there is no such host") from None
    return [bound(family, address) for family, _, _, _, address in found]


def bound(family: int, address: Any) -> socket.socket:
    one = socket.socket(family, socket.SOCK_STREAM)
    one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    if family == socket.AF_INET6:
        one.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
    one.bind(address)
    return one


class Dispatcher(ThreadedTaskDispatcher):  # type: ignore[misc]
    """Waitress's threads, for what may take long. A small request is answered by the thread that has read it, since
    handing it over and back costs as much as answering it. Where that took long once (a disk that is slow to sync, a
    Redis that hangs) the threads have the next second, so that requests wait side by side.

    A request waits here until the answer before it on its connection has been sent. So no thread waits for a client
    that does not read, a connection holds one answer at most, and who pipelines has one turn in each round.
    """

    def __init__(self) -> None:
        super().__init__()
        self.set_thread_count(8)
        self.waiting: deque[Channel] = deque()
        self.threads_until = 0.0  # time.monotonic()

    def add_task(self, task: Channel) -> None:
        self.waiting.append(task)

    @property
    def is_behind(self) -> bool:
        """Whether `answer` has something to do at once."""
        return any(not channel.total_outbufs_len for channel in self.waiting)

    def answer(self) -> None:
        """Answers one request of each connection, or hands it to the threads. Called by the thread of the loop."""
        for _ in range(len(self.waiting)):
            channel = self.waiting.popleft()
            if not channel.total_outbufs_len:
                self._answer(channel)
            elif time.time() - channel.last_activity < UNREAD_FOR:
                self.waiting.append(channel)
            else:
                channel.cancel()

    def _answer(self, channel: Channel) -> None:
        started = time.monotonic()
        small = channel.requests[0].body_bytes_received <= QUICK_BODY
        if not small or started < self.threads_until or is_silent():
            super().add_task(channel)
            return
        channel.service()
        if time.monotonic() - started > LONG:
            self.threads_until = time.monotonic() + 1


class Server:
    """Waitress on some sockets, refusing a body over the limit when it sees Content-Length."""

    def __init__(self, app: Application, max_body: int, sockets: list[socket.socket]) -> None:
        self.app = app
        self.map: dict[int, Any] = {}  # what Waitress watches
        self.dispatcher = Dispatcher()
        self.waitress = create_server(
            app,
            map=self.map,
            sockets=sockets,
            _dispatcher=self.dispatcher,
            ident="async-email",
            max_request_body_size=max_body + 1,  # Waitress refuses what reaches it
            max_request_header_size=32 * 1024,
            channel_timeout=UNREAD_FOR,
            connection_limit=2 * MOST_CONNECTIONS,  # there Waitress takes no other until one of these ends
            outbuf_high_watermark=2**40,  # bytes; never reached: there Waitress would wait for the client
            clear_untrusted_proxy_headers=True,
        )
        self.listeners = [one for one in self.map.values() if isinstance(one, BaseWSGIServer)]
        for one in self.listeners:
            one.channel_class = Channel
            one.pull_trigger = self._wake
        self.stopping = False
        self.loop = threading.get_ident()

    def stop(self, *_: object) -> None:
        """Also from a signal handler or another thread."""
        self.stopping = True
        self.listeners[0].trigger.pull_trigger()

    def _wake(self) -> None:
        """Wakes the loop for another thread. The loop itself looks at every connection before it waits again."""
        if threading.get_ident() != self.loop:
            self.listeners[0].trigger.pull_trigger()

    def run(self, alive: Callable[[], None] = lambda: None) -> None:
        """Until `stop`, and until whoever has sent a request by then has his answer. Calls `alive` once a second while
        requests are answered."""
        answered, self.loop = -1, threading.get_ident()
        while not self.stopping:
            self._turn(seconds=1)
            if self.app.answered != answered or not self.dispatcher.queue:
                answered = self.app.answered
                alive()
        self._drain(time.monotonic() + DRAINED_AFTER, alive)

    def _turn(self, seconds: float) -> None:
        """Waits for so long at most, and does what there is to do."""
        wasyncore.loop(timeout=0 if self.dispatcher.is_behind else seconds, use_poll=True, map=self.map, count=1)
        self.dispatcher.answer()

    def _drain(self, deadline: float, alive: Callable[[], None]) -> None:
        """Others go on accepting on these sockets, or will soon."""
        for one in self.listeners:
            one.accepting = False
        channels = [one for one in self.map.values() if isinstance(one, Channel)]
        for one in channels:
            one.task_class = LastTask
        while not all(one.is_quiet for one in self.map.values() if isinstance(one, Channel)):
            if time.monotonic() > deadline:
                break
            self._turn(seconds=0.1)
            alive()
        self.waitress.close()
