"""Programs of the system that some tests need: nginx, systemd-analyze, promtool, Chromium, mail programs.

Nothing is downloaded. Where a program is missing the test is skipped, but with REQUIRE_NGINX=1, REQUIRE_SYSTEMD=1,
REQUIRE_PROMTOOL=1, REQUIRE_CLIENTS=1, REQUIRE_HA=1 or REQUIRE_BROWSER=1 (as in CI) it fails, so that these tests
cannot vanish unnoticed.
"""

from __future__ import annotations

import os
import shutil
from typing import NoReturn

import pytest

SYSTEM = "/usr/local/sbin:/usr/sbin:/sbin"  # where nginx is, and what an ordinary user has not on PATH


def program(variable: str, *names: str) -> str:
    """The first of these programs. Skips the test, or fails it if `variable` says that they must be there."""
    for name in names:
        if path := shutil.which(name) or shutil.which(name, path=SYSTEM):
            return path
    missing(variable, f"there is no {names[0]} on PATH")


def missing(variable: str, reason: str) -> NoReturn:
    """Skips the test, or fails it if `variable` says that what it needs must be there."""
    if os.environ.get(variable) == "1":
        pytest.fail(reason)
    pytest.skip(reason)
