"""What shares a machine, or a costly scene, is not spread over the processes of pytest-xdist."""

from __future__ import annotations

import os
import re
import subprocess
import sys

from tests.servers import ROOT
from tests.side_by_side import TOGETHER


def test_the_tests_of_the_booted_machine_stay_in_one_process() -> None:
    """Without REQUIRE_DEPLOY they are skipped, each where it would have run."""
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith("PYTEST_") and name != "REQUIRE_DEPLOY"
    }
    command = [sys.executable, "-m", "pytest", "-n", "2", "-v", "-p", "no:cacheprovider", "tests/deploy"]
    ran = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    processes = re.findall(r"\[(gw\d)\].* SKIPPED tests/deploy/", ran.stdout)
    assert len(processes) > 50
    assert len(set(processes)) == 1


def test_what_is_to_stay_together_is_there() -> None:
    assert all((ROOT / place).exists() for place in TOGETHER)
