"""What the tests share: a real Redis or Valkey, a relay that speaks real SMTP, and Chromium."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.browser import browser as browser
from tests.deploy.figures import pytest_sessionfinish as pytest_sessionfinish
from tests.deploy.figures import pytest_terminal_summary as pytest_terminal_summary
from tests.deploy.figures import pytest_testnodedown as pytest_testnodedown
from tests.servers import RedisServer
from tests.side_by_side import pytest_xdist_make_scheduler as pytest_xdist_make_scheduler


@pytest.fixture(scope="module")
def redis_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    """A real, empty Redis or Valkey with its append-only file on, for one test module."""
    with RedisServer(Path(tmp_path_factory.mktemp("redis"))) as server:
        yield server
