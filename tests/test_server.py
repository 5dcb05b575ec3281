"""Which thread answers a request: the one that has read it, if that is quick; another, if it may take long."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import pytest

from queues import connection
from settings import Address
from tests.servers import Api, free_port
from web import server


class Naming:
    """An application that answers with the name of the thread that it runs in."""

    answered = 0
    pause = 0.0

    def __call__(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        environ["wsgi.input"].read()
        time.sleep(self.pause)
        start_response("200 OK", [("Content-Type", "application/json")])
        return [f'"{threading.current_thread().name}"'.encode()]


@pytest.fixture
def app() -> Naming:
    return Naming()


@pytest.fixture
def api(app: Naming) -> Iterator[Api]:
    port = free_port()
    running = server.Server(app, 2**20, server.listen_on(Address("127.0.0.1", port)))
    loop = threading.Thread(target=running.run, name="loop")
    loop.start()
    yield Api(port)
    running.stop()
    loop.join()


def test_a_small_request_is_answered_where_it_is_read(api: Api) -> None:
    assert api.post("/", {}).body == "loop"


def test_a_large_request_is_left_to_the_threads(api: Api) -> None:
    assert api.post("/", "x" * 2 * server.QUICK_BODY).body.startswith("waitress")
    assert api.post("/", {}).body == "loop"


def test_after_one_that_took_long_requests_wait_side_by_side(api: Api, app: Naming) -> None:
    app.pause = 2 * server.LONG
    assert api.post("/", {}).body == "loop"
    assert api.post("/", {}).body.startswith("waitress")


def test_while_redis_is_silent_requests_wait_side_by_side(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    silent = threading.Event()
    silent.set()
    monkeypatch.setattr(connection, "_silent", silent)
    assert api.post("/", {}).body.startswith("waitress")


def test_of_two_requests_in_one_packet_the_second_may_be_left_to_the_threads(api: Api, app: Naming) -> None:
    app.pause = 2 * server.LONG
    with socket.create_connection(("127.0.0.1", api.port), timeout=20) as connection:
        connection.sendall(b"GET / HTTP/1.1\r\n\r\nGET / HTTP/1.1\r\nConnection: close\r\n\r\n")
        heard = connection.makefile("rb").read()
    assert [part[:5] for part in heard.split(b'"')[1::2]] == [b"loop", b"waitr"]
