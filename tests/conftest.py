"""What the tests share: a real Redis or Valkey, a relay that speaks real SMTP, and Chromium."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import redis

from mail.outbox import Outbox
from queues.jobs import Jobs
from settings import Settings
from tests.browser import browser as browser
from tests.servers import RedisServer


@pytest.fixture(scope="module")
def redis_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    """A real, empty Redis or Valkey with its append-only file on, for one test module."""
    with RedisServer(Path(tmp_path_factory.mktemp("redis"))) as server:
        yield server


@pytest.fixture
def client(redis_server: RedisServer) -> Iterator[redis.Redis]:
    """A client of the module's Redis, which is empty and as it was at first."""
    redis_server.reset()
    with redis_server.client() as client:
        yield client


@pytest.fixture
def outbox(client: redis.Redis) -> Outbox:
    return Outbox(Jobs(client), Settings(_env_file=None))
