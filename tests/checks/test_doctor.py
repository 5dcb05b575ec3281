"""`bin/doctor`, the command: its lines, JSON and exit code, what it never prints, and what it says without packages."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from ops import doctor
from ops.checks import machine, packages, table
from ops.checks.findings import FAULT, NOTE, OK, WARN, Finding, Findings
from ops.checks.target import Target
from tests.checks.support import PASSWORD, assert_finds, listed, worst
from tests.relay import Relay
from tests.scripted_relay import ScriptedRelay, Step
from tests.servers import ROOT, House, RedisServer, eventually, free_port


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "ops.doctor", *arguments]
    bare = {"PATH": os.environ["PATH"], **environment}
    return subprocess.run(command, cwd=ROOT, env=bare, capture_output=True, text=True)


def test_a_mail_to_order_goes_the_whole_way(client: Any, redis_server: RedisServer, tmp_path: Path) -> None:
    with (
        Relay(login=("ada", PASSWORD), tls="starttls") as there,
        House(tmp_path, redis_server.url, **there.environment(tmp_path)) as house,
    ):
        for queue in ("email", "jobs"):
            house.worker(queue)
            eventually(partial(client.exists, f"rq:workers:{queue}"))
            eventually(partial(client.exists, f"rq:scheduler-lock:{queue}"))
        ran = run("--json", "--send-to", "victim@acme.shop", **house.environment)
        assert [one.recipients for one in there.accepted] == [["victim@acme.shop"]]
    said = {(one["check"], one["level"]) for one in json.loads(ran.stdout)}
    assert {("canary", OK), ("workers", OK), ("queue", OK), ("relay", OK), ("redis", OK)} <= said
    assert not [one for one in said if one[1] == FAULT], ran.stdout
    assert "victim" not in ran.stdout


@pytest.mark.parametrize(
    "config", ["version = 3.9.2\n", "home = /usr/bin\nversion = 3.9.18\n", "version_info = 3.9.0.final.0\n"]
)
def test_another_python_under_the_venv_is_one_finding(
    target: Target, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, config: str
) -> None:
    """It was thirty, one a package, after an upgrade of the system."""
    (tmp_path / "pyvenv.cfg").write_text(config)
    monkeypatch.setattr(sys, "prefix", str(tmp_path))
    [(name, finding)] = list(doctor.examine(target))
    assert (name, finding.level) == ("python", FAULT)
    assert finding.found.startswith("the .venv was made for Python 3.9, and this is 3.")


@pytest.mark.parametrize(
    ("levels", "code", "end"),
    [
        ((OK, NOTE), 0, "All is well."),
        ((OK, WARN, WARN), 1, "2 warnings. "),
        ((FAULT, WARN, OK), 2, "1 fault and 1 warning. "),
    ],
)
def test_the_exit_code_and_the_last_line_are_the_worst_of_what_was_found(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], levels: list[str], code: int, end: str
) -> None:
    monkeypatch.setattr(doctor, "examine", lambda _: [("check", Finding(level, "")) for level in levels])
    assert doctor.main([]) == code
    assert capsys.readouterr().out.splitlines()[-1].startswith(end)


def test_every_finding_is_one_line_and_json_says_the_same() -> None:
    nowhere = {"REDIS_URL": f"redis://127.0.0.1:{free_port()}/0"}
    plain, as_json = run(**nowhere), run("--json", **nowhere)
    assert (plain.returncode, as_json.returncode) == (2, 2)
    found = json.loads(as_json.stdout)
    assert all(one.keys() == {"check", "level", "found", "fix"} for one in found)
    lines = plain.stdout.splitlines()
    assert len([line for line in lines if line.split("  ")[0] in (OK, NOTE, WARN, FAULT)]) == len(found)
    redis = next(one for one in found if one["check"] == "redis")
    assert f"fault  redis: {redis['found']}  ->  {redis['fix']}" in lines
    assert lines[-1].startswith("1 fault.")


def test_a_check_that_breaks_is_a_finding_and_stops_no_other(target: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(_: Target, __: object) -> Findings:
        raise ValueError(PASSWORD)
        yield

    monkeypatch.setattr(table, "CHECKS", {"first": broken, "second": table.alone(machine.clock)})
    said = list(table.examine(target))
    assert [name for name, _ in said] == ["first", "second"]
    assert "ValueError" in said[0][1].found
    assert "test_doctor.py" in said[0][1].found
    assert PASSWORD not in repr(said)


def test_no_output_ever_holds_a_secret_or_an_address(tmp_path: Path, redis_server: RedisServer) -> None:
    planted = ("planted", "aaaaaaaa", "ada@acme")
    secrets = {
        "SMTP_USERNAME": "ada@planted.example",
        "SMTP_PASSWORD": "planted-smtp",
        "DASHBOARD_PASSWORD": "planted-dashboard",
        "API_KEYS": f"shop:{'a' * 64}",
        "MAIL_FROM": "Ada <ada@acme.test>",
        "SMTP_HOST": "127.0.0.1",
        "SMTP_SECURITY": "none",
    }
    echo: dict[str, Step] = {"AUTH": "535 5.7.8 ada@planted.example planted-smtp is wrong", "GREETING": "220 planted"}
    with (
        RedisServer(tmp_path, "--requirepass", "planted-redis", password="planted-redis") as redis,
        ScriptedRelay(echo, offers=["AUTH PLAIN"]) as refusing,
    ):
        secrets["SMTP_PORT"] = str(refusing.port)
        outputs = [
            run(*arguments, **secrets | changes)
            for arguments in ((), ("--json",), ("--send-to", "ada@planted .example"))
            for changes in (
                {"REDIS_URL": redis.url},
                {"REDIS_URL": f"redis://ada:planted-wrong@127.0.0.1:{redis.port}/0"},
                {"REDIS_URL": "redis://:planted/wrong@127.0.0.1/0", "SMTP_PORT": "planted"},
                {"REDIS_URL": f"redis://:planted-redis@127.0.0.1:{refusing.port}/0", "API_KEYS": "planted"},
            )
        ]
    assert any("535 at auth (5.7.8): the relay does not accept this login" in one.stdout for one in outputs)
    for one in outputs:
        assert one.returncode == 2
        assert not one.stderr
        for word in planted:
            assert word not in one.stdout, one.stdout


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


def test_a_service_that_cannot_be_imported_hides_no_other_finding(tmp_path: Path) -> None:
    (tmp_path / "bottle.py").write_text("raise ImportError('broken', name='bottle')")
    found = json.loads(run("--json", PYTHONPATH=str(tmp_path)).stdout)
    assert "service.py does not start: importing bottle fails" in [one["found"] for one in found]
    assert {one["check"] for one in found} >= {"settings", "redis", "relay"}


def test_without_any_package_the_doctor_still_says_so() -> None:
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
