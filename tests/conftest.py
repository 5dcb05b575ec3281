"""What the tests share: a real Redis or Valkey, a certificate authority, Chromium."""

from __future__ import annotations

import gc
import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import trustme

from tests.browser import browser as browser
from tests.conversations import POOL, write_ca
from tests.servers import RedisServer, eventually


@pytest.fixture(scope="module")
def redis_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    """A real, empty Redis or Valkey with its append-only file on, for one test module."""
    with RedisServer(Path(tmp_path_factory.mktemp("redis"))) as server:
        yield server


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    return trustme.CA()


@pytest.fixture(scope="module")
def ca_file(authority: trustme.CA, tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_ca(authority, tmp_path_factory.mktemp("ca"))


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
    eventually(lambda: set(threading.enumerate()) == threads)
    assert len(os.listdir("/dev/fd")) == handles
