"""Which thread answers a request: the one that has read it, if that is quick; another, if it may take long."""

from __future__ import annotations

import json
import re
import resource
import socket
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, closing, suppress
from http.client import HTTPConnection
from typing import Any

import pytest
import redis

from queues import connection
from queues.acceptance import Acceptance
from queues.connection import Unavailable
from tests import http_api
from tests.http_api import MAIL
from tests.servers import Api, House, RedisServer, eventually
from tests.test_structure import digest_of
from web import server


class Naming(server.Application):
    """An application that answers with the name of the thread that it runs in."""

    answered = 0
    pause = 0.0
    more = b""  # at the end of each answer
    started = 0

    def __call__(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        self.started += 1
        environ["wsgi.input"].read()
        time.sleep(self.pause)
        start_response("200 OK", [("Content-Type", "application/json")])
        return [f'"{threading.current_thread().name}"'.encode() + self.more]


@pytest.fixture
def app() -> Naming:
    return Naming()


@pytest.fixture
def running(app: Naming) -> Iterator[tuple[server.Server, threading.Thread]]:
    with http_api.running(app) as made:
        yield made


@pytest.fixture
def api(running: tuple[server.Server, threading.Thread]) -> Api:
    return Api(running[0].listeners[0].effective_port)


def test_stop_writes_nothing_into_a_trigger_that_the_loop_has_closed(
    running: tuple[server.Server, threading.Thread], monkeypatch: pytest.MonkeyPatch
) -> None:
    made, loop = running
    trigger = made.listeners[0].trigger
    pull, pulled = trigger.pull_trigger, []

    def late() -> None:
        loop.join(1.5)  # long enough for the loop to look whether it shall stop
        pulled.append(loop.is_alive())
        pull()

    monkeypatch.setattr(trigger, "pull_trigger", late)
    made.stop()
    loop.join(30)
    made.stop()
    assert pulled == [True]


def test_a_small_request_is_answered_where_it_is_read(api: Api) -> None:
    assert api.post("/", {}).body == "loop"


def test_a_large_request_is_left_to_the_threads(api: Api) -> None:
    assert api.post("/", "x" * 2 * server.QUICK_BODY).body.startswith("waitress")
    assert api.post("/", {}).body == "loop"


def test_after_one_that_took_long_requests_wait_side_by_side(api: Api, app: Naming) -> None:
    app.pause = 2 * server.LONG
    assert api.post("/", {}).body == "loop"
    assert api.post("/", {}).body.startswith("waitress")


def test_while_redis_is_silent_requests_wait_side_by_side(api: Api) -> None:
    connection._silent.set()
    assert api.post("/", {}).body.startswith("waitress")


@pytest.mark.parametrize("fails", [False, True])
def test_requests_that_are_ready_together_go_to_redis_together_and_have_each_its_own_answer(
    redis_server: RedisServer, monkeypatch: pytest.MonkeyPatch, fails: bool
) -> None:
    monkeypatch.setattr(server, "LONG", 60)
    app, sizes, sent = http_api.app_with(redis_server.url), list[int](), threading.Event()
    replies = app.replies

    def slow(several: list[Acceptance]) -> list[Any]:
        sizes.append(len(several))
        sent.wait(60)
        if fails and len(sizes) == 2:
            raise Unavailable("Redis does not answer")
        return replies(several)

    app.replies = slow
    headers = {"Authorization": "Bearer full-key", "Content-Type": "application/json"}
    with http_api.served(app) as api, ExitStack() as stack:
        asking = [stack.enter_context(closing(HTTPConnection("127.0.0.1", api.port))) for _ in range(5)]
        for one in asking:
            one.request("GET", "/healthz")
            one.getresponse().read()
        for one, body in zip(asking, [MAIL, MAIL, {}, MAIL, [MAIL] * 2], strict=True):
            one.request("POST", "/emails/batch" if isinstance(body, list) else "/emails", json.dumps(body), headers)
            eventually(lambda: sizes)
        sent.set()
        then = 503 if fails else 200
        assert [one.getresponse().status for one in asking] == [200, then, 422, then, then]
    assert sizes == [1, 3]


@pytest.mark.parametrize("drips", [b"", b"G", b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 9\r\n\r\n"])
def test_connections_that_bring_no_request_lock_nobody_out(
    api: Api, monkeypatch: pytest.MonkeyPatch, drips: bytes
) -> None:
    monkeypatch.setattr(server, "MOST_CONNECTIONS", 20)
    with ExitStack() as stack:
        idle = []
        for _ in range(60):
            idle.append(stack.enter_context(connected(api)))
            idle[-1].sendall(drips)
        assert [api.get("/").status for _ in range(5)] == [200] * 5
        left = sum(is_open(connection) for connection in idle)
        assert 10 < left < 20


def connected(api: Api) -> socket.socket:
    return socket.create_connection(("127.0.0.1", api.port), timeout=20)


def is_open(connection: socket.socket) -> bool:
    connection.settimeout(0.05)
    try:
        return connection.recv(1) != b""
    except TimeoutError:
        return True
    except ConnectionResetError:  # closed with something unread
        return False


def test_of_many_connections_the_one_that_has_asked_last_is_kept(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "MOST_CONNECTIONS", 3)
    with ExitStack() as stack:
        old, other, third = (stack.enter_context(connected(api)) for _ in range(3))
        old.sendall(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n")
        assert old.recv(1000)
        assert api.get("/").status == 200
        assert [is_open(one) for one in (old, other, third)] == [True, False, True]


def pipelined(count: int) -> bytes:
    one = b"GET / HTTP/1.1\r\nHost: a\r\n"
    return (one + b"\r\n") * (count - 1) + one + b"Connection: close\r\n\r\n"


def test_of_two_requests_in_one_packet_the_second_may_be_left_to_the_threads(api: Api, app: Naming) -> None:
    app.pause = 2 * server.LONG
    with connected(api) as connection:
        connection.sendall(pipelined(2))
        heard = connection.makefile("rb").read()
    assert [part[:5] for part in heard.split(b'"')[1::2]] == [b"loop", b"waitr"]


@pytest.mark.parametrize("quick", [True, False], ids=["in the loop", "in the threads"])
def test_clients_that_pipeline_and_do_not_read_keep_nobody_waiting(
    api: Api, app: Naming, monkeypatch: pytest.MonkeyPatch, quick: bool
) -> None:
    monkeypatch.setattr(server, "QUICK_BODY", server.QUICK_BODY if quick else -1)
    app.more = b" " * 2**20
    count = 40  # answers, more than Waitress keeps for a client before it waits for him
    with ExitStack() as stack:
        silent = [stack.enter_context(connected(api)) for _ in range(9)]
        for connection in silent:
            connection.sendall(pipelined(count))
        assert [api.get("/").status for _ in range(20)] == [200] * 20
        assert silent[0].makefile("rb").read().count(b"HTTP/1.1 200 OK") == count


def test_a_client_that_takes_nothing_of_its_answer_is_left(
    api: Api, app: Naming, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server, "UNREAD_FOR", 0.5)
    app.more = b" " * 2**24
    with connected(api) as connection:
        connection.sendall(pipelined(3))
        time.sleep(3)
        assert len(connection.makefile("rb").read()) < 2**24


def test_a_client_that_pipelines_has_one_turn_in_each_round(api: Api, app: Naming) -> None:
    app.pause = server.LONG / 4
    with connected(api) as connection:
        connection.sendall(pipelined(40))
        assert api.get("/").status == 200
        before = app.started
        connection.makefile("rb").read()
    assert before < 20


def test_a_newcomer_waits_for_two_rounds_and_not_for_a_round_for_each_before_him(api: Api, app: Naming) -> None:
    app.pause = 0.005
    with ExitStack() as stack:
        for _ in range(20):
            stack.enter_context(connected(api)).sendall(pipelined(200))
        eventually(lambda: app.started > 20)
        idle = [stack.enter_context(connected(api)) for _ in range(40)]
        before = app.started
        assert api.get("/").status == 200
        assert app.started - before < 20 * 10
        assert all(is_open(one) for one in idle)


@pytest.mark.parametrize(
    ("soft", "hard", "sockets", "room", "raised"),
    [
        (1024, 524_288, 1, 400, None),
        (1024, 524_288, 2, 400, 1656),
        (256, 524_288, 1, 400, 856),
        (256, -1, 1, 400, 856),
        (-1, -1, 2, 400, None),
        (256, 256, 1, 100, 256),
        (256, 512, 2, 114, 512),
        (50, 50, 1, 1, 50),
    ],
)
def test_as_many_connections_are_taken_as_there_are_descriptors_for(
    monkeypatch: pytest.MonkeyPatch, soft: int, hard: int, sockets: int, room: int, raised: int | None
) -> None:
    asked: list[tuple[int, int]] = []
    monkeypatch.setattr(resource, "getrlimit", lambda _: (soft, hard))
    monkeypatch.setattr(resource, "setrlimit", lambda _, limits: asked.append(limits))
    assert min(server.room_for(sockets), server.MOST_CONNECTIONS) == room
    assert asked == ([(raised, hard)] if raised else [])


def test_with_256_descriptors_it_serves_and_says_so(house: House, client: redis.Redis) -> None:
    api = house.api(preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (256, 256)))
    begun = b"POST /emails HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\nContent-Length: 9000000\r\n\r\n"
    with ExitStack() as stack:
        for number in range(600):
            with suppress(ConnectionError):  # closed already, for one that came later
                stack.enter_context(connected(api)).sendall(begun + bytes(number % 2 * 600_000))
        assert [api.post("/emails", http_api.MAIL).status for _ in range(5)] == [200] * 5
    log = house.log("api")
    assert log.count("few_descriptors connections=100") == 1
    assert not re.search("Too many open files|accept|crashed", log)


LEANT_ON = {  # what server.py overrides or calls beyond Waitress's documentation -> its source in 3.0.2
    "waitress.channel:HTTPChannel": "aa3da44fa1741b69",
    "waitress.parser:HTTPRequestParser": "f2b09de756c11493",
    "waitress.parser:split_uri": "2959428735d45cbf",
    "waitress.parser:get_header_lines": "968a7db45a59f12c",
    "waitress.parser:crack_first_line": "5ef0eba51166e715",
    "waitress.receiver:ChunkedReceiver": "7d4fd7a3f8c53daa",
    "waitress.receiver:FixedStreamReceiver": "434997a7017f1336",
    "waitress.rfc7230": "0f5fe455e0896b71",
    "waitress.server:create_server": "2e506b208edceac2",
    "waitress.server:BaseWSGIServer": "82ab2f37dc852df3",
    "waitress.task:Task": "407d67e516390fb5",
    "waitress.task:ErrorTask": "50756541cbe4e25b",
    "waitress.task:WSGITask": "9d14cf12c73aa868",
    "waitress.task:ThreadedTaskDispatcher": "541f30c57f083fdf",
    "waitress.trigger:trigger": "48bf86fea4c84cec",
    "waitress.wasyncore:loop": "9c04aac11e1c336c",
    "waitress.wasyncore:poll2": "f2ea2bd150ff2600",
    "waitress.wasyncore:readwrite": "2467235cc3f4eb51",
}


@pytest.mark.parametrize("name", LEANT_ON)
def test_what_the_server_leans_on_in_waitress_is_as_it_was(name: str) -> None:
    """If this fails after an upgrade: read what changed in Waitress against server.py, then write the new digest."""
    assert digest_of(name) == LEANT_ON[name]
