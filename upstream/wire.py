"""Connections to an upstream, kept for the next request, with one deadline for all of it.

Imported where the first mail leaves by HTTP: it takes two megabytes. Certificates are verified; no redirect is
followed, nothing is taken from the environment (proxies), and nothing is asked for twice here.
"""

from __future__ import annotations

import http.client
import io
import logging
import socket
import ssl
import threading
import time
from collections.abc import Mapping
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from urllib3 import HTTPConnectionPool, HTTPSConnectionPool, Timeout
from urllib3.connection import HTTPConnection, HTTPSConnection
from urllib3.exceptions import HTTPError, NameResolutionError

from smtp.verdict import TIMED_OUT

LONGEST_ANSWER = 64 * 1024  # bytes; what is longer is none of the API
KEPT = 64  # connections; a process has so many threads at most
# So that an idle connection is not dropped on the way without a word, or that it is known.
ALIVE = [
    (socket.IPPROTO_TCP, socket.TCP_NODELAY, 1),
    (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
    (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 20),
    (socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 5),
    (socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 3),
]
logging.getLogger("urllib3").setLevel(logging.CRITICAL)  # it would log what somebody else has answered
mine = threading.local()  # of this thread's request: `deadline`, `connected`


class Silent(Exception):
    """There was no answer. `connected`: the upstream may have the request all the same. The text is why, in words of
    ours or of the system."""

    def __init__(self, why: str, connected: bool) -> None:
        super().__init__(why)
        self.connected = connected


class Answer(NamedTuple):
    status: int
    headers: Mapping[str, str]
    body: bytes


class _Reader(io.RawIOBase):
    """Reads a socket as long as the deadline allows: an answer that comes a byte a second is over then, too."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.raw = sock.makefile("rb", buffering=0)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int | None:
        left = mine.deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError
        self.sock.settimeout(left)
        return self.raw.readinto(buffer)

    def close(self) -> None:
        self.raw.close()
        super().close()


class _Readable:
    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock

    def makefile(self, _: str) -> io.BufferedReader:
        return io.BufferedReader(_Reader(self.sock))


class _Response(http.client.HTTPResponse):
    def __init__(self, sock: Any, *args: Any, **how: Any) -> None:
        super().__init__(_Readable(sock), *args, **how)  # type: ignore[arg-type]


class _Noting:
    """Notes whether a request has got as far as a connection."""

    response_class = _Response

    def connect(self) -> None:
        super().connect()  # type: ignore[misc]
        mine.connected = True

    def request(self, *args: Any, **how: Any) -> None:
        mine.connected = mine.connected or self.sock is not None  # type: ignore[attr-defined]
        super().request(*args, **how)  # type: ignore[misc]


class _Plain(_Noting, HTTPConnection):  # type: ignore[misc]
    pass


class _Secure(_Noting, HTTPSConnection):  # type: ignore[misc]
    pass


class Wire:
    """All connections of this process to one host."""

    def __init__(self, url: str) -> None:
        at = urlsplit(url)
        how: dict[str, Any] = {"maxsize": KEPT, "block": False, "retries": False, "socket_options": ALIVE}
        if at.scheme == "https":
            self.pool: HTTPConnectionPool = HTTPSConnectionPool(
                at.hostname or "", at.port, ssl_context=ssl.create_default_context(), **how
            )
            self.pool.ConnectionCls = _Secure
        else:
            self.pool = HTTPConnectionPool(at.hostname or "", at.port, **how)
            self.pool.ConnectionCls = _Plain
        self.path = at.path.rstrip("/")

    def ask(
        self, method: str, path: str, headers: Mapping[str, str], body: bytes | None, timeout: float, deadline: float
    ) -> Answer:
        """Makes one request, which is over at `deadline` (of time.monotonic()). Raises `Silent`."""
        mine.deadline, mine.connected = deadline, False
        left = max(0.001, deadline - time.monotonic())
        patience = Timeout(connect=min(timeout, left), read=left)
        try:
            response = self.pool.urlopen(
                method, self.path + path, body, headers, redirect=False, timeout=patience, preload_content=False
            )
            try:
                read = response.read(LONGEST_ANSWER + 1, decode_content=False)
                is_whole = len(read) <= LONGEST_ANSWER
                return Answer(response.status, response.headers, read if is_whole else b"")
            finally:
                response.close()  # it was given back already if it was read whole
        except (HTTPError, OSError, http.client.HTTPException, ValueError) as error:
            raise Silent(_reason(error), mine.connected) from None

    def close(self) -> None:
        self.pool.close()


def _reason(error: BaseException) -> str:
    """Returns why there was no answer, in words of ours or of the system, never of the mail or of a URL."""
    causes = [error, *(one for one in error.args if isinstance(one, BaseException)), error.__cause__, error.__context__]
    for cause in filter(None, causes):
        if isinstance(cause, ssl.SSLCertVerificationError):
            return f"the upstream's certificate is not valid: {cause.verify_message}"
        if isinstance(cause, NameResolutionError):
            return "its name cannot be resolved"
        if isinstance(cause, TimeoutError) or "Timeout" in type(cause).__name__:
            return TIMED_OUT
        if isinstance(cause, OSError) and cause.strerror:
            return cause.strerror
    return "the upstream closed the connection"
