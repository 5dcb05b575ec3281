"""Serves HTTP/1.1 on sockets, with a Waitress that is stricter, quicker, and drained before it ends.

Stricter: it refuses what a proxy before us may read differently, in our own error shape (RFC 9112). Quicker: it answers
small requests in the thread that reads them. Drained: `Server.run` ends when every request has its answer and every
connection is quiet, so that with a socket of systemd's a restart drops nothing; Waitress itself cancels what waits for
a thread and cuts what it has not read yet. Knows no route, no key, no mail. Depends on the inside of Waitress, of which
tests/test_server.py has digests.

Waitress: https://docs.pylonsproject.org/projects/waitress
"""

from __future__ import annotations

import logging
import socket
import threading
import time
import uuid
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import Any, ClassVar, Protocol, TypeVar

from waitress import wasyncore
from waitress.channel import HTTPChannel
from waitress.server import BaseWSGIServer, create_server
from waitress.task import ErrorTask, ThreadedTaskDispatcher, WSGITask

from process.sockets import open_files
from queues.connection import is_silent
from web.errors import as_line, error_shape
from web.grammar import Parser
from web.middleware import common_headers

QUICK_BODY = 16 * 1024  # bytes
TOGETHER = 16  # requests; more would keep the first of them waiting
LONG = 0.1  # seconds for one request; less may be the machine being busy
# Seconds. A draining process closes no connection on which a request may be under way: nginx closes an idle one after 2
# (keepalive_timeout in nginx/async-email.conf).
QUIET_AFTER, DRAINED_AFTER = 3, 20
FEW = 8  # connections of a process; nginx keeps 16
MOST_CONNECTIONS = 400  # of a process, on each socket
PER_CONNECTION, BESIDE = 2, 56  # file descriptors: one more for a large body; Redis, the log, Waitress' own
UNREAD_FOR = 30  # seconds after which a client that reads nothing of its answer is cut off


T = TypeVar("T")


class Application(Protocol):
    """A WSGI application that counts the requests it has answered, which shows progress. It answers several requests
    at once in three steps: `begin` each, `commit` all, and then call it with the environment of each."""

    answered: int

    def begin(self, environ: dict[str, Any]) -> Any:
        return None

    def commit(self, answers: Sequence[Any]) -> None:
        return None

    def __call__(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]: ...


class JsonErrorTask(ErrorTask):  # type: ignore[misc]
    """Writes Waitress's own refusals (a body over the limit, a header it cannot parse) in our error shape."""

    WORDS: ClassVar = {
        400: ("validation_error", "the request must be HTTP as in RFC 9112"),
        413: ("request_too_large", "the body exceeds the limit of {limit} bytes, 4 times MAX_MESSAGE_BYTES"),
        431: ("request_headers_too_large", "the headers exceed the limit"),
        501: ("not_implemented", "the transfer encoding must be chunked"),
    }

    def execute(self) -> None:
        error, request_id = self.request.error, uuid.uuid4().hex
        type_, text = self.WORDS.get(error.code, ("application_error", "internal error"))
        text = text.format(limit=self.channel.adj.max_request_body_size - 1)
        body = as_line(error_shape(error.code, type_, text, request_id)).encode()
        self.status = f"{error.code} {error.reason}"
        self.response_headers += [("Content-Type", "application/json"), *common_headers(request_id)]
        self.set_close_on_finish()
        self.content_length = len(body)
        self.write(body)


class Task(WSGITask):  # type: ignore[misc]
    """Writes an answer, which may have been begun by another task for the same request."""

    wrote_header: bool

    def get_environment(self) -> dict[str, Any]:
        request: Parser = self.request
        request.environ = request.environ or super().get_environment()
        return request.environ

    def write(self, data: bytes) -> None:
        """Sends head and body of an answer in one packet, if that is all of it and small."""
        if self.wrote_header or not self.has_body or not self.content_length == len(data) <= QUICK_BODY:
            super().write(data)
            return
        head = self.build_response_header()
        self.wrote_header, self.content_bytes_written = True, len(data)
        self.channel.write_soon(head + data)


class LastTask(Task):
    """Closes the connection after this response, so that the client reconnects elsewhere: used while draining."""

    def start(self) -> None:
        super().start()
        self.set_close_on_finish()


class Channel(HTTPChannel):  # type: ignore[misc]
    parser_class = Parser
    task_class = Task
    error_task_class = JsonErrorTask

    def __init__(self, server: BaseWSGIServer, *rest: Any, **how: Any) -> None:
        super().__init__(server, *rest, **how)
        self.waits_since = time.monotonic()
        if len(server.active_channels) > min(MOST_CONNECTIONS, server.room):
            self._make_room()

    def _make_room(self) -> None:
        """Closes the connection that has waited longest for a whole request, or for its client to read. A byte now and
        then is no request."""
        channels = [one for one in self.server.active_channels.values() if not one.will_close]
        idle = [one for one in channels if one.total_outbufs_len or not one.requests]
        min(idle, key=lambda one: one.waits_since).will_close = True

    def begin(self) -> Any:
        """Begins the answer to the next request, which `service` writes; not to one that Waitress refuses."""
        request = self.requests[0]
        if self.connected and not request.error:
            return self.server.application.begin(self.task_class(self, request).get_environment())

    def service(self) -> None:
        super().service()
        self.waits_since = time.monotonic()

    @property
    def is_quiet(self) -> bool:
        """Returns whether the connection can be closed without cutting off a request."""
        idle = time.time() - self.last_activity > QUIET_AFTER
        return idle and not (self.requests or self.request or self.total_outbufs_len)


def room_for(sockets: int) -> int:
    """Returns how many connections the limit of file descriptors leaves on each socket. Raises it first as far as may
    be."""
    may_open = open_files(PER_CONNECTION * MOST_CONNECTIONS * sockets + BESIDE)
    return max(1, (may_open - BESIDE) // PER_CONNECTION // sockets)


class Dispatcher(ThreadedTaskDispatcher):  # type: ignore[misc]
    """Answers small requests in the thread that has read them, since handing one over and back costs as much as
    answering it, and leaves others to Waitress's threads. After one that took long (a slow disk, a Redis that hangs)
    the threads get all for a second, so that requests wait side by side.

    Small requests that are ready together are answered together, so that Redis is asked once for all of them.

    Keeps a request until the answer before it on its connection has been sent. So no thread waits for a client that
    does not read, a connection holds one answer at most, and a client that pipelines has one turn in each round.
    """

    def __init__(self, app: Application) -> None:
        super().__init__()
        self.set_thread_count(8)
        self.app = app
        self.waiting: deque[Channel] = deque()
        self.threads_until = 0.0  # time.monotonic()

    def add_task(self, task: Channel) -> None:
        self.waiting.append(task)

    @property
    def is_behind(self) -> bool:
        """Returns whether `answer` has something to do now."""
        return any(not channel.total_outbufs_len for channel in self.waiting)

    def answer(self) -> None:
        """Answers one request of each connection, or hands it to the threads. Runs in the loop's thread."""
        begun: list[tuple[Channel, Any]] = []
        for _ in range(len(self.waiting)):
            channel = self.waiting.popleft()
            if channel.total_outbufs_len:
                if time.time() - channel.last_activity < UNREAD_FOR:
                    self.waiting.append(channel)
                else:
                    channel.cancel()
            elif self._is_quick(channel):
                begun.append((channel, self._timed(channel.begin)))
            else:
                super().add_task(channel)
            if len(begun) == TOGETHER:
                self._complete(begun)
                begun = []
        self._complete(begun)

    def _is_quick(self, channel: Channel) -> bool:
        small = channel.requests[0].body_bytes_received <= QUICK_BODY
        return small and time.monotonic() >= self.threads_until and not is_silent()

    def _complete(self, begun: list[tuple[Channel, Any]]) -> None:
        if is_silent():  # since one of them has asked
            for channel, _ in begun:
                super().add_task(channel)
            return
        self._timed(lambda: self.app.commit([answer for _, answer in begun if answer]))
        for channel, _ in begun:
            self._timed(channel.service)

    def _timed(self, step: Callable[[], T]) -> T:
        started = time.monotonic()
        done = step()
        if time.monotonic() - started > LONG:
            self.threads_until = time.monotonic() + 1
        return done


class Server:
    """Runs Waitress on some sockets. Refuses a body over the limit when it reads Content-Length."""

    def __init__(self, app: Application, max_body: int, sockets: list[socket.socket]) -> None:
        self.app = app
        self.map: dict[int, Any] = {}  # what Waitress watches
        self.dispatcher = Dispatcher(app)
        logging.getLogger("waitress.queue").setLevel(logging.ERROR)  # under load it warns at every request
        self.waitress = create_server(
            app,
            map=self.map,
            sockets=sockets,
            _dispatcher=self.dispatcher,
            ident="async-email",
            max_request_body_size=max_body + 1,  # Waitress refuses what reaches it
            max_request_header_size=32 * 1024,
            channel_timeout=UNREAD_FOR,
            connection_limit=2 * MOST_CONNECTIONS,  # above, Waitress accepts none until one ends
            outbuf_high_watermark=2**40,  # bytes, never reached: Waitress would wait for the client
            clear_untrusted_proxy_headers=False,  # it would do so too late: Parser drops them
        )
        self.listeners = [one for one in self.map.values() if isinstance(one, BaseWSGIServer)]
        for one in self.listeners:
            one.channel_class = Channel
            one.pull_trigger = self._wake
            one.room = room_for(len(sockets))
        self.stopping = False
        self.loop = threading.get_ident()

    @property
    def channels(self) -> list[Channel]:
        return [one for one in self.map.values() if isinstance(one, Channel)]

    def stop(self, *_: object) -> None:
        """Makes `run` drain and return. May be called by a signal handler or another thread."""
        if not self.stopping:
            self.listeners[0].trigger.pull_trigger()  # first: once `stopping` is set, the loop may close the trigger
            self.stopping = True

    def _wake(self) -> None:
        """Wakes the loop for another thread; the loop itself looks at every connection before it waits."""
        if threading.get_ident() != self.loop:
            self.listeners[0].trigger.pull_trigger()

    def run(self, alive: Callable[[], None] = lambda: None) -> None:
        """Serves until `stop`, and until every request sent by then has its answer. Calls `alive` once a second while
        requests are answered."""
        answered, self.loop = -1, threading.get_ident()
        while not self.stopping:
            self._turn(seconds=1)
            if self.app.answered != answered or not self.dispatcher.queue:
                answered = self.app.answered
                alive()
        self._drain(time.monotonic() + DRAINED_AFTER, alive)

    def _turn(self, seconds: float) -> None:
        """Waits at most `seconds` for something to do, and does it."""
        wasyncore.loop(timeout=0 if self.dispatcher.is_behind else seconds, use_poll=True, map=self.map, count=1)
        self._accept_more()
        self.dispatcher.answer()

    def _accept_more(self) -> None:
        """Accepts as many connections as there are, or half of those that there may be. Waitress takes one in a round,
        so the last of many newcomers would wait for as many rounds, each of which serves all that are in. So do the
        first few, but they wait for other processes, too: whoever has less to do accepts them."""
        for one in self.listeners:
            for _ in range(min(len(one.active_channels) - FEW, one.room // 2, 50)):
                before = len(one.active_channels)
                if one.readable():
                    one.handle_accept()
                if len(one.active_channels) == before:
                    break

    def _drain(self, deadline: float, alive: Callable[[], None]) -> None:
        """Answers what is under way and accepts nothing more: others do, on the same sockets, or will soon."""
        for one in self.listeners:
            one.accepting = False
        for one in self.channels:
            one.task_class = LastTask
        while time.monotonic() < deadline and not all(one.is_quiet for one in self.channels):
            self._turn(seconds=0.1)
            alive()
        self.waitress.close()
