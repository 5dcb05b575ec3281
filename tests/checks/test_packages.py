"""Python and its packages: a wrong version, a missing one, or none at all is named."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from ops.checks import packages
from ops.checks.findings import FAULT, OK
from ops.checks.target import Target
from tests.checks.support import assert_finds, listed, worst
from tests.servers import ROOT


def test_a_package_that_is_missing_or_another_version_is_named(target: Target, tmp_path: Path) -> None:
    pins = "rq==0.1 \\\n    --hash=sha256:00\nnot-there==1.0 \\\nonly-elsewhere==1 ; sys_platform == 'win32' \\\n"
    (tmp_path / "requirements.txt").write_text(pins)
    target.code = tmp_path
    assert_finds(packages.pins(target), FAULT, "rq is 3.0.0 and should be 0.1", "pip install --require-hashes")
    assert_finds(packages.pins(target), FAULT, "not-there is missing", "pip install --require-hashes")
    assert len(listed(packages.pins(target))) == 2


def test_a_package_that_another_needs_and_does_not_declare_is_named(
    target: Target, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "needy.py").write_text("import undeclared_thing\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(packages, "PROCESSES", ("needy",))
    assert_finds(packages.imports(target), FAULT, "needy.py does not start: importing undeclared_thing fails", "pip")


def test_a_python_that_is_too_old_is_named(target: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    assert worst(packages.python(target)).level == OK
    monkeypatch.setattr(packages, "OLDEST", (99, 0))
    assert_finds(packages.python(target), FAULT, "is needed", "sudo apt install python3")


def test_without_any_package_the_doctor_still_says_so(tmp_path: Path) -> None:
    ran = subprocess.run([sys.executable, "-S", "-m", "ops.doctor"], cwd=ROOT, capture_output=True, text=True)
    assert ran.returncode == 2, ran.stderr
    assert "fault  packages: pydantic is missing" in ran.stdout
    assert "Traceback" not in ran.stdout + ran.stderr


def test_without_a_venv_bin_doctor_still_says_so(tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    shutil.copy(ROOT / "bin" / "doctor", tmp_path / "bin")
    ran = subprocess.run([tmp_path / "bin" / "doctor"], capture_output=True, text=True)
    assert ran.returncode == 2
    assert "there is no .venv here" in ran.stdout
    assert "sudo bin/install" in ran.stdout
