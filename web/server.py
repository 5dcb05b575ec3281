"""HTTP/1.1 on sockets: Waitress, stricter, quicker, and drained before it ends.

Stricter: it refuses also what a proxy before us may read differently, in our own error shape (RFC 9112). Quicker: small
requests are answered where they are read. Drained: `Server.run` ends when all who have sent a request have their answer
and every connection is quiet, so that with a socket of systemd's a restart drops nothing; Waitress's own way cancels
what waits for a thread and cuts what it has not read yet. Knows no route, no key, no mail.

Waitress: https://docs.pylonsproject.org/projects/waitress
"""

from __future__ import annotations

import errno
import json
import socket
import time
import uuid
from collections import deque
from collections.abc import Callable, Iterable
from typing import Any, ClassVar, Protocol

from waitress import wasyncore
from waitress.channel import HTTPChannel
from waitress.parser import HTTPRequestParser, ParsingError
from waitress.server import BaseWSGIServer, create_server
from waitress.task import ErrorTask, ThreadedTaskDispatcher, WSGITask

from process import sd_daemon
from queues.connection import is_silent
from settings import Address
from web.errors import error_shape
from web.middleware import common_headers

QUICK_BODY = 16 * 1024  # bytes
LONG = 0.1  # seconds for one request; less may be the machine being busy
# Seconds. A process that is to end closes no connection on which a request may be under way: nginx gives up its own
# after 2 seconds of silence (keepalive_timeout in nginx/async-email.conf).
QUIET_AFTER, DRAINED_AFTER = 3, 20


class Application(Protocol):
    """WSGI, and how many requests were answered: to see that it goes on."""

    answered: int

    def __call__(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]: ...


class Parser(HTTPRequestParser):  # type: ignore[misc]
    """Waitress's parser, refusing also what a proxy before us may read differently, or what would crash it."""

    def parse_header(self, header_plus: bytes) -> None:
        try:
            super().parse_header(header_plus)
        except ValueError:  # a Content-Length of 5000 digits, a URL that urllib cannot split
            raise ParsingError("a number or URL in it cannot be read") from None
        if self.version not in ("1.0", "1.1"):
            raise ParsingError("only HTTP/1.0 and HTTP/1.1 are spoken here")
        # Waitress leaves Transfer-Encoding there if it did not obey it. RFC 9112, 6.1: the framing is faulty.
        if "TRANSFER_ENCODING" in self.headers or (self.chunked and "CONTENT_LENGTH" in self.headers):
            raise ParsingError("it says in two ways where its body ends")

    def received(self, data: bytes) -> int:
        consumed: int = super().received(data)
        if self.error:
            self.expect_continue = False  # else "100 Continue" would ask for the body that was just refused
        return consumed


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

    def answer_here(self) -> None:
        """In the thread of the loop, which need not be woken then, and may write at once. Should another thread wake it
        just now, that is lost and not missed: the loop looks at every connection before it waits again."""
        self.server.pull_trigger = lambda: None
        try:
            self.service()
        finally:
            del self.server.pull_trigger
        if self.writable():
            self.handle_write()

    @property
    def is_quiet(self) -> bool:
        """Nobody would miss this connection."""
        idle = time.time() - self.last_activity > QUIET_AFTER
        return idle and not (self.requests or self.request or self.total_outbufs_len)


def listen_on(listen: Address) -> list[socket.socket]:
    """What systemd has opened for us, or else the address; a name such as localhost has two. Raises OSError."""
    given = sd_daemon.sockets()
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
    Redis that hangs) the threads have the next second, so that requests wait side by side."""

    def __init__(self) -> None:
        super().__init__()
        self.set_thread_count(8)
        self.quick: deque[Channel] = deque()
        self.threads_until = 0.0  # time.monotonic()

    def add_task(self, task: Channel) -> None:
        small = task.requests[0].body_bytes_received <= QUICK_BODY
        if small and time.monotonic() > self.threads_until and not is_silent():
            self.quick.append(task)
        else:
            super().add_task(task)

    def answer_quick_ones(self) -> None:
        while self.quick:
            channel, started = self.quick.popleft(), time.monotonic()
            channel.answer_here()
            if time.monotonic() - started > LONG:
                self.threads_until = time.monotonic() + 1
                while self.quick:
                    super().add_task(self.quick.popleft())


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
            channel_timeout=30,
            clear_untrusted_proxy_headers=True,
        )
        self.listeners = [one for one in self.map.values() if isinstance(one, BaseWSGIServer)]
        for one in self.listeners:
            one.channel_class = Channel
        self.stopping = False

    def stop(self, *_: object) -> None:
        """Also from a signal handler or another thread."""
        self.stopping = True
        self.listeners[0].pull_trigger()

    def run(self, alive: Callable[[], None] = lambda: None) -> None:
        """Until `stop`, and until whoever has sent a request by then has his answer. Calls `alive` once a second while
        requests are answered."""
        answered = -1
        while not self.stopping:
            self._turn(seconds=1)
            if self.app.answered != answered or not self.dispatcher.queue:
                answered = self.app.answered
                alive()
        self._drain(time.monotonic() + DRAINED_AFTER)

    def _turn(self, seconds: float) -> None:
        """Waits for so long at most, and does what there is to do."""
        wasyncore.loop(timeout=seconds, use_poll=True, map=self.map, count=1)
        self.dispatcher.answer_quick_ones()

    def _drain(self, deadline: float) -> None:
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
        self.waitress.close()
