"""Settings as the services see them, and the owners and modes of files."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from ops import lock
from ops.checks import configuration
from ops.checks.findings import FAULT, NOTE, OK, WARN
from ops.checks.system import User, denied_at, find_user
from ops.checks.target import Target
from tests.checks.support import ENV, PASSWORD, Server, assert_finds, listed, worst
from tests.servers import ROOT


def test_a_complete_configuration_is_fine_for_each_service(server: Server) -> None:
    for check in (configuration.values, configuration.shell, configuration.modes):
        assert worst(check(server.target)).level == OK
    loaded = configuration.load(server.target)
    assert loaded
    assert loaded.smtp_host == "127.0.0.1"


def test_a_fault_in_the_configuration_is_told_once_with_the_services_that_it_stops(server: Server) -> None:
    server.env.write_text(ENV + "SMTP_PORT=many\n")
    said = listed(configuration.values(server.target))
    assert [one.level for one in said] == [FAULT]
    assert "api and worker@email and worker@jobs and dashboard will not start: SMTP_PORT: input" in said[0].found
    assert "sudoedit" in said[0].fix


def test_what_one_service_cannot_do_without_is_told_for_that_one(server: Server) -> None:
    server.env.write_text("MAIL_FROM=hello@acme.example\n")
    assert_finds(configuration.values(server.target), FAULT, "worker@email will not start: SMTP_HOST is not set")
    server.env.write_text("SMTP_HOST=127.0.0.1\nMAIL_FROM=nobody in particular\n")
    assert_finds(configuration.values(server.target), FAULT, "MAIL_FROM: ")
    server.env.write_text(ENV + "SMTP_PASWORD=x\n")
    assert_finds(configuration.values(server.target), FAULT, "SMTP_PASWORD is not a setting; did you mean")


def test_a_secret_that_a_unit_does_not_pass_is_missing_for_that_service_alone(server: Server) -> None:
    server.write("etc/credentials/dashboard_password", "", 0o600)
    assert_finds(configuration.values(server.target), FAULT, "dashboard will not start: DASHBOARD_PASSWORD is not set")
    server.write("etc/credentials/dashboard_password", "x", 0o600)
    (server.folder / "etc/credentials/api_keys").unlink()
    assert_finds(configuration.values(server.target), FAULT, "api will not start: what its unit passes", "bin/install")


def test_a_variable_of_the_shell_that_the_services_lack_is_named(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.env.write_text("MAIL_FROM=hello@acme.example\n")
    monkeypatch.setenv("SMTP_HOST", "127.0.0.1")
    monkeypatch.setenv("MAIL_FROM", "in both")
    monkeypatch.setenv("REDIS_URL", "has a file of its own")
    said = listed(configuration.shell(server.target))
    assert [(one.level, one.found.split()[0]) for one in said] == [(WARN, "SMTP_HOST")]
    assert "sudoedit" in said[0].fix
    assert_finds(configuration.values(server.target), FAULT, "SMTP_HOST is not set")  # although it is, here


def test_a_variable_that_sudo_has_dropped_is_still_seen() -> None:
    look = "from ops.checks.configuration import exported; print(sorted(exported()))"
    bare = ["sh", "-c", 'env -i "$0" -c "$1"; true', sys.executable, look]  # sh stands for sudo
    ran = subprocess.run(bare, cwd=ROOT, env={"SMTP_HOST": "x", "SMTP_PORT": ""}, capture_output=True, text=True)
    assert ran.stdout == "['SMTP_HOST']\n", ran.stderr


def test_in_a_checkout_the_environment_counts(target: Target, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    target.code = tmp_path
    assert worst(configuration.values(target)).level == NOTE
    monkeypatch.setenv("SMTP_HOST", "127.0.0.1")
    assert_finds(configuration.shell(target), NOTE, "only in this shell, not in .env: SMTP_HOST", ".env")
    (tmp_path / ".env").write_text("SMTP_HOST=127.0.0.1\n")
    (tmp_path / ".env").chmod(0o644)
    assert worst(configuration.shell(target)).level == OK
    assert_finds(configuration.modes(target), WARN, "can be read by other users", "chmod 600")
    monkeypatch.setenv("ON_DOUBT", "maybe")
    assert_finds(configuration.values(target), FAULT, "ON_DOUBT: input should be 'retry' or 'hold'", ".env.example")


def test_several_relays_are_one_as_far_as_a_server_needs_it(target: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RELAYS", '[first]\nhost = "smtp.example.com"')
    monkeypatch.setenv("MAIL_FROM", "hello@acme.example")
    assert_finds(configuration.values(target), NOTE, "not set: API_KEYS, DASHBOARD_PASSWORD;")


@pytest.mark.parametrize(
    ("environment", "said"),
    [
        ({"SMTP_USERNAME": "ada"}, "SMTP_USERNAME and SMTP_PASSWORD go together"),
        ({"SMTP_HOST": "smtp.example.com"}, "MAIL_FROM is not set"),
        ({"MAIL_FROM": "root@localhost"}, "MAIL_FROM: must have a domain with a dot"),
        ({"TEMPLATES_DIR": "own"}, "own/x/body.txt, line 1"),
        ({"TASKS_FILE": "own/tasks.py"}, "own/tasks.py, line 2"),
    ],
)
def test_what_stops_the_start_of_a_checkout_is_a_fault(
    target: Target, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, environment: dict[str, str], said: str
) -> None:
    (tmp_path / "own/x").mkdir(parents=True)
    (tmp_path / "own/x/subject.txt").write_text("Hello")
    (tmp_path / "own/x/body.txt").write_text("{{ name")
    (tmp_path / "own/tasks.py").write_text("import os\nbut not so\n")
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert_finds(configuration.values(target), FAULT, said, ".env")


def test_a_template_that_cannot_work_stops_the_api_of_a_server_alone(server: Server) -> None:
    server.write("own/x/body.txt", "{{ name")
    server.env.write_text(f"{ENV}TEMPLATES_DIR={server.folder}/own\n")
    assert_finds(
        configuration.values(server.target),
        FAULT,
        f"api will not start: {server.folder}/own/x/body.txt, line 1",
        "sudoedit",
    )


def test_in_a_checkout_the_redis_of_the_bin_dev_that_runs_is_the_one(
    target: Target, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def url() -> str:
        loaded = configuration.load(target)
        return loaded.redis if loaded else ""

    target.code, usual = tmp_path, url()
    relay, catcher = folders = [tmp_path / "var/dev" / name for name in ("relay", "catcher")]
    for folder in folders:
        folder.mkdir(parents=True)
    with lock.take(relay) as held, lock.take(catcher) as other:
        assert url() == usual  # neither is there yet
        lock.write(held, lock.Holder(os.getpid(), os.getpid(), 6381))
        assert url() == "redis://127.0.0.1:6381/0"
        lock.write(other, lock.Holder(os.getpid(), os.getpid(), 6382))
        assert url() == "redis://127.0.0.1:6382/0"
        monkeypatch.setenv("SMTP_HOST", "smtp.example.com")
        assert url() == "redis://127.0.0.1:6381/0"
        monkeypatch.setenv("REDIS_URL", "redis://127.0.0.1:6383/0")
        assert url() == "redis://127.0.0.1:6383/0"
    monkeypatch.delenv("REDIS_URL")
    assert url() == usual


@pytest.mark.parametrize("name", ["etc", "etc/credentials", "etc/async-email.env", "etc/credentials/redis_url"])
def test_a_secret_that_others_may_read_is_a_fault(server: Server, name: str) -> None:
    path = server.folder / name
    path.chmod(path.stat().st_mode | 0o044)
    fix = f"sudo chmod {7 if path.is_dir() else 6}00 {path}"
    assert_finds(configuration.modes(server.target), FAULT, f"{path} is open to other users", fix)


def test_without_root_the_doctor_says_that_most_cannot_be_checked(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(configuration, "is_readable", lambda _: False)
    monkeypatch.setenv("SMTP_PORT", "587")
    assert_finds(configuration.values(server.target), WARN, "is for root only", "sudo bin/doctor")
    assert_finds(configuration.shell(server.target), NOTE, "set in this shell", "sudo bin/doctor")
    assert "only root" not in worst(configuration.modes(server.target)).found


def test_a_configuration_without_its_secrets_or_that_is_not_roots_is_a_fault(server: Server) -> None:
    shutil.rmtree(server.folder / "etc/credentials")
    assert_finds(configuration.modes(server.target), FAULT, "etc/credentials is missing", "sudo bin/install")
    server.target.owner += 1
    assert_finds(configuration.modes(server.target), FAULT, "does not belong to root", "sudo chown root:root")


def test_code_that_the_service_may_change_or_cannot_read_is_a_fault(server: Server) -> None:
    program = server.folder / "opt/releases/2.0/worker.py"
    program.chmod(0o666)
    assert_finds(configuration.modes(server.target), FAULT, "may change the code it runs", "sudo chown -R root:root")
    program.chmod(0o600)
    assert_finds(configuration.modes(server.target), FAULT, "cannot be read by the user nobody", "sudo chmod o+rX")
    server.target.user = "nobody-of-this-name"
    assert_finds(configuration.modes(server.target), FAULT, "there is no user", "sudo bin/install")


def test_a_user_reads_what_one_of_its_groups_may(server: Server) -> None:
    user = find_user("root")
    assert user
    assert 0 in user.gids
    path = server.write("secret", "", 0o640)
    assert denied_at(User(-1, [path.stat().st_gid]), path, 4) is None
    assert denied_at(User(-1, []), path, 4) == path


@pytest.mark.parametrize(
    ("name", "remedy"),
    [
        ("SMTP_PASSWORD_FILE", "credentials"),
        ("TASKS_FILE", "sudo chmod -R go+rX"),
        ("TEMPLATES_DIR", "sudo chmod -R go+rX"),
    ],
)
def test_what_is_named_in_the_settings_and_the_service_cannot_read_is_a_fault(
    server: Server, name: str, remedy: str
) -> None:
    named = server.write("secret/file", PASSWORD, 0o600)
    named.parent.chmod(0o700)
    server.env.write_text(f"{ENV}SMTP_USERNAME=ada\n{name}={named if name.endswith('FILE') else named.parent}\n")
    assert_finds(configuration.modes(server.target), FAULT, f"{name}: the user nobody cannot read", remedy)
