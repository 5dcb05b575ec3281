"""systemd's units: why one does not run is explained."""

from __future__ import annotations

import subprocess
import time

import pytest

from ops.checks import machine, units
from ops.checks.findings import FAULT, NOTE, OK, WARN
from ops.checks.target import Target
from tests.checks.support import Server, assert_finds, listed, worst

WORKER = "async-email-worker@email.service"
DEAD = {"ActiveState": "failed", "SubState": "failed", "Result": "exit-code"}


def test_units_that_run_are_fine(server: Server) -> None:
    assert worst(units.running(server.target)).level == OK


# fmt: off
UNWELL = [
    ({**DEAD, "ExecMainStatus": "203"}, FAULT, "203/EXEC", "/opt/async-email"),
    ({**DEAD, "ExecMainStatus": "127"}, FAULT, "no .venv", "sudo bin/install"),
    ({**DEAD, "ExecMainStatus": "226"}, FAULT, "226/NAMESPACE", f"journalctl -u {WORKER}"),
    ({**DEAD, "ExecMainStatus": "243"}, FAULT, "243/CREDENTIALS", "/etc/async-email/credentials"),
    ({**DEAD, "ExecMainStatus": "217"}, FAULT, "217/USER", "sudo bin/install"),
    ({**DEAD, "ExecMainStatus": "2"}, FAULT, "refuses its settings", "settings"),
    ({**DEAD, "ExecMainStatus": "77"}, FAULT, "last exit code was 77", f"journalctl -u {WORKER} -n 50"),
    ({**DEAD, "Result": "start-limit-hit", "ExecMainStatus": "1"}, FAULT, "systemd gave up", "reset-failed"),
    ({**DEAD, "Result": "oom-kill", "ExecMainStatus": "9"}, FAULT, "out of memory", "WORKER_CONCURRENCY"),
    ({**DEAD, "ExecMainStatus": "2", "Restart": "always"}, FAULT, "gave up, and it refuses", "reset-failed"),
    ({"ActiveState": "activating", "SubState": "auto-restart", "ExecMainStatus": "1"}, FAULT, "auto-restart", "Redis"),
    ({"ActiveState": "activating", "SubState": "start"}, WARN, "just starting", "look again"),
    ({"ActiveState": "inactive", "SubState": "dead"}, FAULT, "not started", f"sudo systemctl start {WORKER}"),
    ({"LoadState": "not-found"}, FAULT, "not installed: async", "sudo bin/install"),
    ({"LoadState": "bad-setting"}, FAULT, "bad-setting", "systemd-analyze verify"),
    ({"LoadState": "masked"}, FAULT, "masked", f"sudo systemctl unmask {WORKER}"),
    ({"UnitFileState": "disabled"}, WARN, "gone after the next reboot", f"sudo systemctl enable {WORKER}"),
    ({"KillMode": "control-group"}, FAULT, "a restart kills the jobs", "KillMode=mixed"),
    ({"NeedDaemonReload": "yes"}, WARN, "changed on disk", "daemon-reload"),
]
# fmt: on


@pytest.mark.parametrize(("changes", "level", "found", "fix"), UNWELL)
def test_a_unit_that_is_not_well_is_explained(
    server: Server, changes: dict[str, str], level: str, found: str, fix: str
) -> None:
    server.units(WORKER, **changes)
    assert_finds(units.running(server.target), level, found, fix)


def test_what_is_wrong_with_all_units_is_one_line(server: Server) -> None:
    server.units(*units.UNITS, ActiveState="inactive", UnitFileState="disabled")
    said = listed(units.running(server.target))
    assert [one.level for one in said] == [FAULT, WARN]
    assert said[0].fix == f"sudo systemctl start {' '.join(units.UNITS)}"


def test_a_unit_that_was_restarted_often_and_lately_is_named(server: Server) -> None:
    since = int(time.monotonic() * 1e6)
    server.units(WORKER, NRestarts="12", ActiveEnterTimestampMonotonic=str(since))
    assert_finds(units.running(server.target), WARN, "after 12 restarts", "journalctl")
    server.units(WORKER, NRestarts="12", ActiveEnterTimestampMonotonic=str(since - 7200 * 10**6))
    assert worst(units.running(server.target)).level == OK


def test_a_unit_that_still_runs_the_last_release_is_named(server: Server) -> None:
    for release, level in (("1.0", WARN), ("2.0", OK)):
        folder = server.folder / "opt/releases" / release
        with subprocess.Popen(["sleep", "60"], cwd=folder) as process:
            server.units(WORKER, MainPID=str(process.pid))
            said = worst(units.running(server.target))
            process.kill()
        assert said.level == level, said
    assert "still runs" not in said.found


def test_where_there_is_no_systemd_nginx_or_timedatectl_nothing_is_wrong(
    target: Target, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.units(*units.UNITS, LoadState="not-found")
    target.systemd = server.target.systemd
    assert_finds(units.running(target), NOTE, "not installed as services here")
    monkeypatch.setenv("PATH", "/nowhere")
    assert_finds(units.running(target), NOTE, "skipped")
    target.systemd = server.folder / "none"
    for check in (units.running, machine.nginx, machine.clock):
        assert_finds(check(target), NOTE, "skipped")
