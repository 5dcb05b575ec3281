"""Which tests stay together when pytest-xdist runs them in several processes: those that share what is slow to set up.

Every other test goes to whichever process is free. This is not done with `--dist=loadgroup` and its marks, because
pytest-xdist 3.8 finds no group under pytest 9.2 and says nothing: two processes would boot a machine each.
"""

from __future__ import annotations

import re
from typing import Any

import pytest
from xdist.scheduler import LoadScopeScheduling

TOGETHER = ("tests/test_chaos.py", "tests/test_privacy.py", "tests/ha/")


class SideBySide(LoadScopeScheduling):  # type: ignore[misc]
    """Begins with the largest group."""

    def _split_scope(self, nodeid: str) -> str:
        if machine := re.match(r"tests/deploy/.*?\[(debian-\d+)", nodeid):
            return machine[1]
        return next((place for place in TOGETHER if nodeid.startswith(place)), nodeid)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> SideBySide:
    return SideBySide(config, log)
