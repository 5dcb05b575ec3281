"""What the tests share: a real Redis or Valkey, a relay that speaks real SMTP, and Chromium."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import redis

from mail import delivery
from mail.outbox import Outbox
from queues.jobs import Jobs
from settings import load
from tests.browser import browser as browser
from tests.deploy.figures import pytest_sessionfinish as pytest_sessionfinish
from tests.deploy.figures import pytest_terminal_summary as pytest_terminal_summary
from tests.deploy.figures import pytest_testnodedown as pytest_testnodedown
from tests.servers import Api, House, RedisServer


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
def api(house: House) -> Api:
    return house.api()


@pytest.fixture
def client(redis_server: RedisServer) -> Iterator[redis.Redis]:
    """A client of the module's Redis, emptied."""
    with redis_server.client() as client:
        client.flushall()
        yield client


@pytest.fixture
def outbox(client: redis.Redis, monkeypatch: pytest.MonkeyPatch) -> Outbox:
    """What tasks that run in this process use."""
    made = Outbox(Jobs(client), load(_env_file=None))
    monkeypatch.setattr(delivery, "outbox", lambda: made)
    return made
