"""HTTP/1.1 as raw bytes on a socket (RFC 9110, 9112): what is read, what is refused, and what that costs."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import pytest

import server
from settings import Address
from tests.servers import free_port

LIMIT = 2**20  # bytes of a body


class Echo:
    """An application that answers with what it was asked."""

    answered = 0

    def __call__(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        body = environ["wsgi.input"].read().decode("latin-1")
        headers = {name[5:]: value for name, value in environ.items() if name.startswith("HTTP_")}
        start_response("200 OK", [("Content-Type", "application/json")])
        seen = {"method": environ["REQUEST_METHOD"], "uri": environ["REQUEST_URI"], "headers": headers, "body": body}
        return [json.dumps(seen).encode()]


class Heard(NamedTuple):
    status: int
    body: Any


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    port = free_port()
    running = server.Server(Echo(), LIMIT, server.listen_on(Address("127.0.0.1", port)))
    loop = threading.Thread(target=running.run, daemon=True)
    loop.start()
    yield port
    running.stop()
    loop.join(30)


def asked(port: int, *packets: bytes) -> list[Heard]:
    """The answers to these bytes, each packet sent when the one before has been read; then we say no more."""
    with socket.create_connection(("127.0.0.1", port), timeout=10) as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        heard = b""
        connection.settimeout(0.3)
        for packet in packets:
            try:
                connection.sendall(packet)
                while data := connection.recv(2**20):
                    heard += data
            except (TimeoutError, ConnectionError):
                pass
    return list(answers(heard))


def answers(heard: bytes) -> Iterator[Heard]:
    while heard:
        head, _, heard = heard.partition(b"\r\n\r\n")
        first, *lines = head.decode("latin-1").split("\r\n")
        length = int(dict(line.split(": ", 1) for line in lines).get("Content-Length", 0))
        yield Heard(int(first.split()[1]), json.loads(heard[:length] or "null"))
        heard = heard[length:]


def get(*headers: str, path: str = "/") -> bytes:
    return "\r\n".join([f"GET {path} HTTP/1.1", "Host: a", *headers, "", ""]).encode("latin-1")


def post(*headers: str, body: bytes = b"") -> bytes:
    return "\r\n".join(["POST / HTTP/1.1", "Host: a", *headers, "", ""]).encode("latin-1") + body


# --- Expect: 100-continue ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [[], ["Content-Length: 0"]], ids=["no length", "length 0"])
def test_a_request_without_a_body_is_answered_whatever_it_expects(port: int, length: list[str]) -> None:
    first = get("Expect: 100-continue", "Authorization: Bearer secret", *length)
    one, two = asked(port, first, get("X-Second: 1"))
    assert (one.status, one.body["headers"]["AUTHORIZATION"]) == (200, "Bearer secret")
    assert (two.status, two.body["headers"]) == (200, {"HOST": "a", "X_SECOND": "1"})


def test_a_body_that_is_announced_is_asked_for(port: int) -> None:
    head = post("Expect: 100-continue", "Content-Length: 2")
    go_on, answer, other = asked(port, head, b"hi", get())
    assert (go_on.status, answer.status, answer.body["body"]) == (100, 200, "hi")
    assert (other.status, other.body["headers"], other.body["body"]) == (200, {"HOST": "a"}, "")
