"""Each thing that goes wrong between a laptop and a server, made on purpose, is named with its fix.

Redis, the relay, its certificates, the name server and the workers are real; systemctl, nginx and timedatectl are small
programs on PATH that say what the real ones say (tests/deploy has the real ones).
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from ops.checks import configuration
from ops.checks.target import Target
from settings import Settings
from tests.checks.support import Server
from tests.servers import ROOT


@pytest.fixture(autouse=True)
def _empty_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in Settings.model_fields:
        monkeypatch.delenv(name.upper(), raising=False)
    monkeypatch.setattr(configuration, "before_sudo", set)
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def target(tmp_path: Path) -> Target:
    """A laptop: nothing is installed."""
    gone = tmp_path / "gone"
    return Target(
        ROOT, etc=gone, opt=gone, nginx=gone, redis_data=gone, systemd=gone, selinux=gone, timeout=1, smtp_ports=()
    )


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    with tempfile.TemporaryDirectory(prefix="test-doctor-") as folder:
        yield Server(Path(folder), monkeypatch)
