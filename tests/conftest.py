"""What the tests share: a real Redis or Valkey, a certificate authority, Chromium."""

from __future__ import annotations

import gc
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import redis
import trustme

from mail import delivery
from mail.outbox import Outbox
from queues import connection
from queues.jobs import Jobs
from settings import load
from tests.browser import browser as browser
from tests.conversations import POOL, server_context, write_ca
from tests.relay import Relay
from tests.servers import Api, House, RedisServer, eventually
from tests.side_by_side import pytest_xdist_make_scheduler as pytest_xdist_make_scheduler


@pytest.fixture(scope="module")
def redis_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    """A real, empty Redis or Valkey with its append-only file on, for one test module."""
    with RedisServer(Path(tmp_path_factory.mktemp("redis"))) as server:
        yield server


@pytest.fixture(scope="module")
def house(
    redis_server: RedisServer, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> Iterator[House]:
    """The service's processes for one test module, with what it sets in SETTINGS."""
    settings = getattr(request.module, "SETTINGS", {})
    with House(tmp_path_factory.mktemp("house"), redis_server.url, **settings) as house:
        yield house


@pytest.fixture(scope="module")
def far() -> Iterator[Relay]:
    """A relay that all tests of a module share."""
    with Relay() as relay:
        yield relay


@pytest.fixture
def relay() -> Iterator[Relay]:
    with Relay() as relay:
        yield relay


@pytest.fixture
def sending(redis_server: RedisServer, relay: Relay, tmp_path: Path) -> Iterator[House]:
    """The service's processes for one test, which begins with an empty Redis and sends through `relay`."""
    redis_server.reset()
    with House(tmp_path, redis_server.url, **relay.environment(tmp_path)) as house:
        yield house


@pytest.fixture(scope="module")
def api(house: House) -> Api:
    return house.api()


@pytest.fixture(autouse=True)
def forget_silence() -> None:
    """Forgets whether the Redis of a test before this one was silent."""
    connection._silent.clear()


@pytest.fixture
def client(redis_server: RedisServer) -> Iterator[redis.Redis]:
    """A client of the module's Redis, emptied."""
    with redis_server.client() as client:
        client.flushall()
        yield client


@pytest.fixture
def outbox(client: redis.Redis, monkeypatch: pytest.MonkeyPatch) -> Outbox:
    """What tasks that run in this process use."""
    made = Outbox(Jobs(client), load(from_file={}))
    monkeypatch.setattr(delivery, "current", lambda: delivery.Delivery(made))
    return made


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    return trustme.CA()


@pytest.fixture(scope="module")
def ca_file(authority: trustme.CA, tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_ca(authority, tmp_path_factory.mktemp("ca"))


@pytest.fixture
def certified(authority: trustme.CA, ca_file: str) -> dict[str, Any]:
    """What a relay needs to offer TLS, and what a client needs to trust it."""
    return {"tls": server_context(authority), "ca_file": ca_file}


@pytest.fixture(scope="module")
def collecting_is_quick() -> Iterator[None]:
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture
def nothing_is_left_open(collecting_is_quick: None) -> Iterator[None]:
    """No thread, no socket; an unclosed one that is collected here warns, and warnings are errors."""
    threads, handles = set(threading.enumerate()), len(os.listdir("/dev/fd"))
    yield
    POOL.close_all()
    gc.collect()
    eventually(lambda: set(threading.enumerate()) <= threads)  # one of an earlier test may end meanwhile
    assert len(os.listdir("/dev/fd")) == handles
