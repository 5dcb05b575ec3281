"""The units as systemd reads them, and the traps of systemd that each of them must avoid."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from settings import SECRETS, Settings
from tests.programs import program
from tests.servers import ROOT

UNITS = sorted(path for path in (ROOT / "systemd").rglob("*") if path.is_file())
SIGNPOST = ROOT / "systemd" / "async-email-worker.service"  # runs nothing
SERVICES = [path for path in UNITS if path.suffix == ".service" and path != SIGNPOST]
PROGRAMS = {  # service -> what it runs, and the secrets that this needs
    "async-email-api.service": ("service.py", {"redis_url", "api_keys"}),
    "async-email-submission.service": ("-m submission", {"redis_url", "api_keys"}),
    "async-email-webhooks.service": ("-m webhooks", {"redis_url", "webhook_url", "webhook_secret", "webhooks"}),
    "async-email-worker@.service": (
        "worker.py %i",
        {"redis_url", "smtp_password", "smtp_oauth", "dkim_key", "relays", "bounce_imap_url", "doubt_imap_url"},
    ),
    "async-email-dashboard.service": (
        "-m ops.dashboard",
        {"redis_url", "dashboard_password", "alert_url", "smtp_password", "smtp_oauth", "dkim_key", "relays"},
    ),
}
# Names of Redis or Valkey on Debian and Ubuntu; redis.service is an alias that is there only where it is enabled.
STORES = {"redis-server@async-email.service", "redis-server.service", "redis.service", "valkey-server.service"}

all_units = pytest.mark.parametrize("unit", UNITS, ids=lambda path: path.name)
all_services = pytest.mark.parametrize("unit", SERVICES, ids=lambda path: path.name)


def directives(unit: Path, section: str) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for block in re.split(r"^\[", unit.read_text(), flags=re.MULTILINE)[1:]:
        head, _, body = block.partition("]\n")
        for line in body.splitlines() if head == section else ():
            if line and not line.startswith("#"):
                name, _, value = line.partition("=")
                found.setdefault(name, []).append(value)
    return found


def words(unit: Path, section: str, name: str) -> set[str]:
    return {word for value in directives(unit, section).get(name, []) for word in value.split()}


def analyze(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [program("REQUIRE_SYSTEMD", "systemd-analyze"), *arguments]
    return subprocess.run(command, capture_output=True, text=True)


def test_every_service_is_among_those_looked_at_here() -> None:
    assert {path.name for path in SERVICES} == set(PROGRAMS)


@pytest.mark.parametrize("unit", [path for path in UNITS if path.suffix != ".conf"], ids=lambda path: path.name)
def test_systemd_understands_every_line(unit: Path) -> None:
    """An unknown key, or one in the wrong section, is ignored with a warning that nobody reads."""
    ran = analyze("verify", unit)
    about_it = [line for line in (ran.stdout + ran.stderr).splitlines() if str(unit.parent) in line]
    assert about_it == []
    assert ran.returncode == 0


@all_services
def test_a_service_may_do_little(unit: Path) -> None:
    ran = analyze("security", "--offline=true", "--threshold=15", unit)
    assert ran.returncode == 0, ran.stdout[-2000:] + ran.stderr


@all_units
def test_every_directive_has_a_reason_above_it(unit: Path) -> None:
    """A few that belong together may share one."""
    head, _, rest = unit.read_text().partition("\n\n")
    assert all(line.startswith("#") for line in head.splitlines()), "the file does not say what it is for"
    rest = re.sub(r"^(\[.*|Description=.*|WantedBy=.*|)\n", "", rest, flags=re.MULTILINE)  # these need none
    without, *groups = re.split(r"(?:^#.*\n)+", rest, flags=re.MULTILINE)
    assert without == ""
    assert all(len(group.splitlines()) <= 8 for group in groups)


@all_services
def test_a_service_comes_back_whatever_ended_it(unit: Path) -> None:
    service = directives(unit, "Service")
    assert service["Restart"] == ["always"]  # RQ's worker exits with 0 when Redis is away for long
    assert int(service["RestartSec"][0]) <= 10
    assert directives(unit, "Unit")["StartLimitIntervalSec"] == ["0"]  # in [Service] it would be ignored


@all_services
def test_a_stop_lets_what_is_in_hand_finish(unit: Path) -> None:
    service = directives(unit, "Service")
    assert service["KillMode"] == ["mixed"]  # by default RQ's work horse gets SIGTERM too, and dies at once
    needed = Settings().job_timeout if "worker" in unit.name else 10
    assert int(service["TimeoutStopSec"][0]) > needed
    assert "ExecStop" not in service  # a second SIGTERM makes RQ kill the job


@all_services
def test_a_service_waits_for_redis_but_does_not_stop_with_it(unit: Path) -> None:
    assert words(unit, "Unit", "After") >= STORES
    for name in ("Requires", "Requisite", "BindsTo"):
        assert not words(unit, "Unit", name) & STORES


@all_services
def test_a_service_runs_its_own_release_as_the_services_user(unit: Path) -> None:
    service = directives(unit, "Service")
    program, _ = PROGRAMS[unit.name]
    assert service["ExecStart"] == [f"/usr/bin/env .venv/bin/python {program}"]
    assert service["WorkingDirectory"] == ["/opt/async-email/current"]
    assert (service["User"], service["Group"]) == (["async-email"], ["async-email"])
    file = program.split()[0] if program.endswith((".py", "%i")) else f"{program.split()[1].replace('.', '/')}.py"
    assert (ROOT / file).exists() or (ROOT / file).with_suffix("").joinpath("__main__.py").exists()


def file_of(secret: str) -> str:
    return f"{secret}.toml" if secret in ("webhooks", "relays") else f"credentials/{secret}"


@all_services
def test_a_service_gets_the_secrets_that_it_needs_and_no_others(unit: Path) -> None:
    service = directives(unit, "Service")
    _, needed = PROGRAMS[unit.name]
    folder = "/etc/async-email"
    assert sorted(service["LoadCredential"]) == sorted(
        [f"async-email.env:{folder}/async-email.env", *(f"{name}:{folder}/{file_of(name)}" for name in needed)]
    )
    assert needed <= set(SECRETS)
    assert "EnvironmentFile" not in service  # what is in the environment, every child and D-Bus can read


def test_the_watchdog_watches_those_that_mail_depends_on() -> None:
    for name in PROGRAMS.keys() - {"async-email-dashboard.service"}:
        service = directives(ROOT / "systemd" / name, "Service")
        assert (service["Type"], service["NotifyAccess"]) == (["notify"], ["main"])
        assert int(service["WatchdogSec"][0]) >= 60  # longer than Redis may take to answer, several times


def test_only_nginx_may_use_the_apis_socket_and_a_restart_leaves_it_open() -> None:
    unit = ROOT / "systemd" / "async-email-api.socket"
    socket = directives(unit, "Socket")
    assert (socket["SocketMode"], socket["SocketGroup"]) == (["0660"], ["www-data"])
    site = (ROOT / "nginx" / "async-email.conf").read_text()
    assert f"server unix:{socket['ListenStream'][0]};" in site
    assert not directives(unit, "Unit").keys() & {"PartOf", "BindsTo"}
    assert words(unit, "Unit", "StopPropagatedFrom") == {"async-email.target"}


def test_only_this_machine_may_submit_by_smtp_until_somebody_says_otherwise() -> None:
    unit = ROOT / "systemd" / "async-email-submission.socket"
    assert directives(unit, "Socket")["ListenStream"] == ["127.0.0.1:2525"]
    assert not directives(unit, "Unit").keys() & {"PartOf", "BindsTo"}


def test_redis_reads_its_file_only_after_an_unfinished_transaction_is_cut_off() -> None:
    unit = directives(ROOT / "systemd" / "redis-server@async-email.service.d" / "async-email.conf", "Service")
    [step] = unit["ExecStartPre"]
    assert step.startswith("-+/usr/bin/setpriv --reuid=redis --regid=redis --clear-groups ")
    where = re.findall(r"^dir (\S+)$", (ROOT / "deploy" / "redis" / "async-email.conf").read_text(), re.MULTILINE)
    assert step.split()[-3:] == ["/opt/async-email/aof.py", "/usr/bin/redis-server", *where]


def test_redis_is_waited_for_while_it_reads_but_not_for_ever_when_it_is_to_stop() -> None:
    """It refuses to stop as long as it cannot write its snapshot, and Debian's unit waits for that without end."""
    unit = directives(ROOT / "systemd" / "redis-server@async-email.service.d" / "async-email.conf", "Service")
    assert (unit["TimeoutStartSec"], unit["TimeoutStopSec"]) == (["infinity"], ["3min"])


def test_the_target_starts_and_restarts_all_of_it() -> None:
    for unit in UNITS:
        all_workers = {SIGNPOST.name} if "worker@" in unit.name else set()
        if unit.name.endswith((".service", ".socket")) and unit != SIGNPOST:
            assert words(unit, "Install", "WantedBy") == {"async-email.target"} | all_workers, unit.name
        if unit.suffix == ".service":
            assert words(unit, "Unit", "PartOf") == {"async-email.target"} | all_workers, unit.name


def test_the_workers_have_the_name_that_guides_use_and_it_starts_none_by_itself() -> None:
    """`systemctl status async-email-worker` was "Unit could not be found"."""
    assert words(ROOT / "systemd" / "async-email.target", "Unit", "Wants") == {SIGNPOST.name}
    assert not directives(SIGNPOST, "Unit").keys() & {"Wants", "Requires", "BindsTo", "Upholds"}
    service = directives(SIGNPOST, "Service")
    assert (service["Type"], service["RemainAfterExit"]) == (["oneshot"], ["yes"])
    [says] = service["ExecStart"]
    assert "async-email-worker@*" in says
