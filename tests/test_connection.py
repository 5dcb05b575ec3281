"""The client and what Redis' errors mean: silence, refusals, a script that is forgotten; and the heartbeats' thread."""

from __future__ import annotations

import socket
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import fakeredis
import pytest
from redis import exceptions
from redis.exceptions import InvalidResponse, NoScriptError, ResponseError

from chaos.proxy import Proxy
from queues import connection, heartbeat
from queues.connection import Script, Unavailable, connect
from tests.redis_troubles import stopped
from tests.servers import RedisServer, eventually


@pytest.fixture
def server(redis_server: RedisServer) -> RedisServer:
    redis_server.reset()
    return redis_server


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (exceptions.ConnectionError("refused"), "does not answer"),
        (exceptions.TimeoutError("timed out"), "does not answer"),
        (exceptions.BusyLoadingError("loading"), "loading its data"),
        (ResponseError("MOVED 866 127.0.0.1:7001"), "cluster"),
        (ResponseError("DB index is out of range"), "no database of the number"),
        (exceptions.ConnectionError("Error 1. [SSL: CERTIFICATE_VERIFY_FAILED] self-signed"), "not trusted"),
        (exceptions.ConnectionError("Error 1. [SSL: WRONG_VERSION_NUMBER] wrong version"), "does not speak TLS"),
        (exceptions.ConnectionError("max number of clients reached"), "maxclients"),
        (InvalidResponse('Protocol error, got "H" as reply type byte'), "not Redis"),
        (exceptions.AuthenticationError("invalid username-password pair"), "password"),
        (exceptions.OutOfMemoryError("command not allowed", status_code="OOM"), "out of memory"),
        (exceptions.ReadOnlyError("You can't write", status_code="READONLY"), "read-only replica"),
        (exceptions.NoPermissionError("this user has no permissions", status_code="NOPERM"), "ACL"),
        (ResponseError("MISCONF Redis is configured to save RDB snapshots"), "disk"),
        (ResponseError("NOREPLICAS Not enough good replicas to write."), "replicas"),
        (ResponseError("BUSY Redis is busy running a script."), "busy"),
        (ResponseError("Error running script (call to f_1): @user_script:13: -OOM command not allowed"), "memory"),
        (ResponseError("WRONGTYPE Operation against a key"), "something else at one of our keys"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
)
def test_what_redis_says_when_it_cannot_work_is_told_as_such(error: Exception, said: str) -> None:
    with pytest.raises(Unavailable, match=said), connection.translating_errors():
        raise error


@pytest.mark.parametrize(
    "error",
    [ResponseError("unknown command"), ValueError("x")],
)
def test_a_mistake_of_ours_stays_what_it_is(error: Exception) -> None:
    with pytest.raises(type(error)) as raised, connection.translating_errors():
        raise error
    assert raised.value is error


def test_once_redis_is_silent_one_caller_finds_out_and_the_others_do_not_wait() -> None:
    def ask() -> None:
        with connection.translating_errors():
            pass

    def is_another_refused() -> bool:
        with ThreadPoolExecutor(1) as another_thread:
            return isinstance(another_thread.submit(ask).exception(), Unavailable)

    def wait_in_vain() -> None:
        with connection.translating_errors():
            refused.append(is_another_refused())
            raise exceptions.TimeoutError

    refused: list[bool] = []
    for _ in range(2):  # each in a thread of its own: the first has let go of the probe
        with ThreadPoolExecutor(1) as one_thread, pytest.raises(Unavailable):
            one_thread.submit(wait_in_vain).result()
    for _ in range(2):
        with connection.translating_errors():
            refused.append(is_another_refused())
    assert refused == [False, True, True, False]


def test_an_error_that_redis_answers_with_shows_that_it_is_there() -> None:
    connection._silent.set()
    with pytest.raises(ResponseError), connection.translating_errors():
        raise ResponseError("unknown command")
    assert not connection.is_silent()


def test_the_apis_connection_gives_up_in_time_and_the_workers_outlasts_a_restart(server: RedisServer) -> None:
    with connection.connect(server.url) as api, connection.connect(server.url, retrying=True) as worker:
        assert api.ping()
        assert worker.ping()
        server.kill()
        with pytest.raises(exceptions.ConnectionError):
            api.ping()
        restart = threading.Timer(0.5, server.start)
        restart.start()
        assert worker.ping()
        restart.join()
        assert api.ping()


def test_a_redis_that_takes_connections_and_says_nothing_is_given_up_in_time(server: RedisServer) -> None:
    with stopped(server), connection.connect(server.url) as client:
        started = time.monotonic()
        with pytest.raises(Unavailable, match="does not answer"), connection.translating_errors():
            client.ping()
        assert time.monotonic() - started < 2


def test_nothing_is_sent_a_second_time_by_the_client_itself(server: RedisServer) -> None:
    """redis-py's own retries would queue a mail twice, since they repeat whole transactions."""
    with Proxy(server.port) as proxy, connection.connect(f"redis://127.0.0.1:{proxy.port}/0") as client:
        proxy.lose((b"INCR",), 1)
        with pytest.raises(exceptions.ConnectionError):
            client.incr("x")
        assert client.get("x") == b"1"


def test_a_password_that_is_wrong_is_said_without_showing_it(tmp_path: Path) -> None:
    with RedisServer(tmp_path) as server:
        with server.client() as client:
            client.config_set("requirepass", "right")
        for url in (server.url, server.url.replace("127", ":wrong-password@127")):
            with (
                connection.connect(url) as client,
                pytest.raises(Unavailable, match="does not accept our password") as told,
                connection.translating_errors(),
            ):
                client.ping()
            assert "wrong-password" not in str(told.value)


def test_a_script_that_redis_forgets_again_and_again_is_run_all_the_same() -> None:
    class Forgetful(fakeredis.FakeRedis):
        def evalsha(self, *_: Any) -> Any:
            raise NoScriptError

    assert Script(Forgetful(), "return KEYS[1] .. ARGV[1]")(["a"], ["b"]) == b"ab"


def test_a_heartbeat_that_fails_keeps_no_other_back_and_each_ends_with_its_block(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(heartbeat, "HEARTBEAT_SECONDS", 0.02)
    calls: Counter[str] = Counter()

    def fail() -> None:
        calls["failed"] += 1
        raise ValueError

    with heartbeat.on_heartbeat(fail), heartbeat.on_heartbeat(lambda: calls.update(["given"])):
        eventually(lambda: calls["failed"] > 1 and calls["given"] > 1)
    given = calls["given"]
    with heartbeat.on_heartbeat(lambda: calls.update(["later"])):
        eventually(lambda: calls["later"] > 3)
    assert calls["given"] <= given + 1  # one may have been under way


def test_a_heartbeat_does_not_wait_for_a_connection_that_has_gone_silent() -> None:
    """A retrying client would try for minutes; the limit here is not a measurement."""
    with socket.create_server(("127.0.0.1", 0)) as silent, ThreadPoolExecutor() as pool:
        url = f"redis://127.0.0.1:{silent.getsockname()[1]}"
        asked = pool.submit(connection.fail_fast(connect(url, retrying=True)).ping)
        with pytest.raises(exceptions.TimeoutError):
            asked.result(timeout=10)
