"""What shares a machine, or a costly scene, is not spread over the processes of pytest-xdist."""

from __future__ import annotations

import os
import re
import subprocess
import sys

from tests.deploy.machine import SUITES
from tests.servers import ROOT
from tests.side_by_side import TOGETHER


def test_the_tests_of_each_booted_machine_stay_in_one_process() -> None:
    """Without REQUIRE_DEPLOY they are skipped, each where it would have run."""
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith("PYTEST_") and name != "REQUIRE_DEPLOY"
    }
    command = [sys.executable, "-m", "pytest", "-n", "2", "-v", "-p", "no:cacheprovider", "tests/deploy"]
    ran = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    places = re.findall(r"\[(gw\d)\].* SKIPPED tests/deploy/\S*\[(debian-\d+)", ran.stdout)
    assert len(places) > 100
    assert {machine for _, machine in set(places)} == set(SUITES)
    assert len(set(places)) == len(SUITES)


def test_what_is_to_stay_together_is_there() -> None:
    assert all((ROOT / place).exists() for place in TOGETHER)
