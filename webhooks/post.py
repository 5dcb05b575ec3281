"""One HTTP POST to an endpoint: over verified TLS, to no private address, without redirects, within DEADLINE.

A name is resolved as the connection is made, and the connection goes to the address that was looked at, so that a name
that changes its address in between gains nothing. Only the answer's status is used, and no more of it read than MOST.
"""

from __future__ import annotations

import logging
import socket
import ssl
import threading
import time
from contextlib import suppress
from datetime import datetime, timezone
from ipaddress import IPv6Address, ip_address, ip_network
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from urllib3.connection import HTTPConnection, HTTPSConnection

from process.values import is_loopback
from process.version import VERSION

TIMEOUT = 10  # seconds for a connection, and for each part of the answer
DEADLINE = 20  # seconds for all of it
MOST = 65536  # bytes of an answer that are read, so that its connection can be used again
LONGEST_PAUSE = 10 * 3600  # seconds that an endpoint may ask for
GONE = 3600  # seconds between two tries at one that answers 410
THIS_EVENT = frozenset({400, 409, 413, 422})  # statuses that say that it does not want this event, not that it is down
logging.getLogger("urllib3").setLevel(logging.CRITICAL + 1)  # of an answer that is garbage it logs URL and headers
TOO_LATE = "it does not answer in time"
TRANSLATED = ip_network("64:ff9b::/96")  # RFC 6052: the last 32 bits are an IPv4 address


class Answer(NamedTuple):
    """What became of a post. `trouble`: others would fail, too. `pause` is what the endpoint asks for, in seconds."""

    status: int = 0
    said: str = ""
    trouble: bool = True
    pause: float = 0

    @property
    def is_good(self) -> bool:
        return 200 <= self.status < 300


class Refused(OSError):
    """The name leads to a private address. The text says what allows that."""


class Poster:
    """Posts to one URL. Each thread has a connection of its own, which is kept."""

    def __init__(self, url: str, private: bool = False, deadline: float = DEADLINE) -> None:
        at = urlsplit(url)
        self.scheme, self.host, self.port = at.scheme, at.hostname or "", at.port
        self.target = (at.path or "/") + (f"?{at.query}" if at.query else "")
        self.private, self.deadline = private or is_loopback(self.host), deadline
        self.context = ssl.create_default_context() if at.scheme == "https" else None
        self.own = threading.local()

    def post(self, body: bytes, headers: dict[str, str]) -> Answer:
        """Never raises, whatever the endpoint does."""
        one, cut = self._connection(), Cut(self.deadline)
        try:
            with cut:
                cut.connection = one
                one.request("POST", self.target, body, HEADERS | headers, preload_content=False)
                if cut.is_done:  # before there was a connection to cut
                    raise TimeoutError
                cut.sock = one.sock  # which the connection lets go where it ends with the answer
                answer = one.getresponse()
                is_read = len(answer.read(MOST + 1)) <= MOST
                answer.close() if not is_read else answer.release_conn()
            if not is_read:
                one.close()
            if cut.is_done:
                one.close()
                return Answer(0, TOO_LATE)
            return judged(answer.status, answer.headers.get("Retry-After", ""))
        except Exception as error:  # whatever garbage leads to
            one.close()
            return Answer(0, TOO_LATE if cut.is_done else why(error))

    def _connection(self) -> Any:
        one = getattr(self.own, "connection", None)
        if one is None:
            one = self.own.connection = self._new()
        elif not one.is_connected:
            one.close()
        return one

    def _new(self) -> HTTPConnection:
        if self.context:
            one: HTTPConnection = Guarded[True](self.host, self.port, timeout=TIMEOUT, ssl_context=self.context)
        else:
            one = Guarded[False](self.host, self.port, timeout=TIMEOUT)
        one.private = self.private  # type: ignore[attr-defined]
        return one

    def close(self) -> None:
        """Closes this thread's connection."""
        if one := getattr(self.own, "connection", None):
            one.close()


HEADERS = {"Content-Type": "application/json", "User-Agent": f"async-email/{VERSION}", "Accept-Encoding": "identity"}


class Guard:
    """Connects to the first address of a name that answers, and to none that is private."""

    host: str
    port: int
    private = False

    def _new_conn(self) -> socket.socket:
        found = socket.getaddrinfo(self.host, self.port, type=socket.SOCK_STREAM)
        allowed = [one for one in found if self.private or is_public(str(one[4][0]))]
        if not allowed:
            raise Refused("its name leads to a private address, which `private = true` in WEBHOOKS allows")
        problem: OSError = OSError("no address")
        for family, kind, protocol, _, address in allowed[:4]:
            sock = socket.socket(family, kind, protocol)
            sock.settimeout(TIMEOUT / 2)
            try:
                sock.connect(address)
            except OSError as error:
                sock.close()
                problem = error
                continue
            sock.settimeout(TIMEOUT)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            return sock
        raise problem


Guarded = {
    True: type("GuardedHTTPSConnection", (Guard, HTTPSConnection), {}),
    False: type("GuardedHTTPConnection", (Guard, HTTPConnection), {}),
}


def is_public(address: str) -> bool:
    """Returns whether it is an address of the Internet, as is any IPv4 address within it."""
    one = ip_address(address.partition("%")[0])
    if isinstance(one, IPv6Address):
        translated = ip_address(int(one) & 0xFFFFFFFF) if one in TRANSLATED else None
        within = [one.ipv4_mapped, one.sixtofour, translated, *(one.teredo or ())]
        if found := [str(other) for other in within if other]:
            return all(map(is_public, found))
        if one.is_site_local:
            return False
    return one.is_global and not (one.is_multicast or one.is_reserved or one.is_unspecified)


class Cut:
    """Ends a connection if the body takes longer, also where a byte comes now and then."""

    def __init__(self, seconds: float) -> None:
        self.connection: Any = None
        self.sock: Any = None
        self.is_done = False
        self.timer = threading.Timer(seconds, self.cut)
        self.timer.daemon = True

    def cut(self) -> None:
        self.is_done = True
        with suppress(OSError, TypeError):  # there is none yet, or no more
            socket.socket.shutdown(self.sock or self.connection.sock, socket.SHUT_RDWR)

    def __enter__(self) -> None:
        self.timer.start()

    def __exit__(self, *_: object) -> None:
        self.timer.cancel()


def judged(status: int, retry_after: str) -> Answer:
    """Returns what a status means."""
    if 200 <= status < 300:
        return Answer(status, str(status), False)
    pause = GONE if status == 410 else seconds_of(retry_after) if status in (429, 503) else 0
    return Answer(status, f"HTTP {status}", status not in THIS_EVENT, min(pause, LONGEST_PAUSE))


def seconds_of(retry_after: str) -> float:
    """Returns what Retry-After asks for, in seconds or as a date (RFC 9110 10.2.3); 0 for anything else."""
    text = retry_after.strip()
    if text.isascii() and text.isdigit():
        return float(text[:9])
    try:
        at = datetime.strptime(text, "%a, %d %b %Y %H:%M:%S GMT").replace(tzinfo=timezone.utc)
    except ValueError:
        return 0
    return max(0.0, at.timestamp() - time.time())


def why(error: BaseException | None) -> str:
    """Returns why there was no answer, without a word of the endpoint's or of its URL."""
    found = type(error).__name__
    while error:
        match error:
            case Refused():
                return str(error)
            case ssl.SSLCertVerificationError():
                return "its certificate is not valid"
            case ssl.SSLError():
                return "it speaks no TLS that we know"
            case socket.gaierror():
                return "its name has no address"
            case TimeoutError():
                return TOO_LATE
            case OSError(strerror=str(text)):
                return text
        found = type(error).__name__
        error = error.__cause__ or error.__context__
    return f"its answer is no HTTP ({found})"
