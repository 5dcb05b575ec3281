"""The doctor: each thing that goes wrong between a laptop and a server, made on purpose, is named with its remedy.

Redis, the relay, its certificates, the name server and the workers are real; systemctl, nginx and timedatectl are small
programs on PATH that say what the real ones say (tests/deploy has the real ones).
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import ssl
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from datetime import datetime, timedelta, timezone
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import trustme
from redis.exceptions import ResponseError

from mail.draft import Draft
from mail.message import compose
from mail.outbox import Outbox
from mail.request import parse
from mail.store import OPEN
from ops import doctor
from ops.checks import configuration, flow, machine, names, packages, relay, replies, store, table, units
from ops.checks.findings import FAULT, NOTE, OK, WARN, Finding, Findings, Place
from ops.checks.table import CHECKS
from queues.connection import connect
from queues.jobs import EMAIL, JOBS, Jobs
from settings import Settings
from smtp.verdict import Phase, Reply
from tests.name_server import NameServer, Zone
from tests.scripted_relay import ScriptedRelay, Step, raw
from tests.servers import ROOT, House, RedisServer, Relay, eventually, free_port

PASSWORD = "planted-Pa55word"
Look = Callable[[Place], Findings]


@pytest.fixture(autouse=True)
def _empty_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in Settings.model_fields:
        monkeypatch.delenv(name.upper(), raising=False)
    monkeypatch.setattr(configuration, "before_sudo", set)
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def place(tmp_path: Path) -> Place:
    """A laptop: nothing is installed."""
    gone = tmp_path / "gone"
    return Place(
        ROOT, etc=gone, opt=gone, nginx=gone, redis_data=gone, systemd=gone, selinux=gone, patience=1, smtp_ports=()
    )


def of(**given: Any) -> Settings:
    return Settings(_env_file=None, **given)


def looked(look: Look, place: Place) -> list[Finding]:
    found = list(look(place))
    assert found, "a check always says something"
    for one in found:
        assert one.level in (OK, NOTE) or one.mend, one
        assert "\n" not in one.found + one.mend
    return found


def worst(look: Look, place: Place) -> Finding:
    order = (FAULT, WARN, NOTE, OK)
    return min(looked(look, place), key=lambda one: order.index(one.level))


def assert_finds(look: Look, place: Place, level: str, found: str, mend: str = "") -> None:
    """Among what the check says is one line that names this and this remedy."""
    said = looked(look, place)
    assert [one for one in said if one.level == level and found in one.found and mend in one.mend], said


def fake(directory: Path, name: str, script: str, monkeypatch: pytest.MonkeyPatch) -> None:
    programs = directory / "programs"
    programs.mkdir(exist_ok=True)
    (programs / name).write_text(f"#!/bin/sh\n{script}\n")
    (programs / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}:/usr/bin:/bin")


# --- packages ---------------------------------------------------------------------------------------------------------


def test_a_package_that_is_missing_or_another_version_is_named(place: Place, tmp_path: Path) -> None:
    pins = "rq==0.1 \\\n    --hash=sha256:00\nnot-there==1.0 \\\nonly-elsewhere==1 ; sys_platform == 'win32' \\\n"
    (tmp_path / "requirements.txt").write_text(pins)
    place.code = tmp_path
    assert_finds(packages.pins, place, FAULT, "rq is 3.0.0 and should be 0.1", "pip install --require-hashes")
    assert_finds(packages.pins, place, FAULT, "not-there is missing", "pip install --require-hashes")
    assert len(looked(packages.pins, place)) == 2


def test_a_package_that_another_needs_and_does_not_declare_is_named(
    place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "needy.py").write_text("import undeclared_thing\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(packages, "PROCESSES", ("needy",))
    assert_finds(packages.imports, place, FAULT, "needy.py does not start: importing undeclared_thing fails", "pip")


def test_a_python_that_is_too_old_is_named(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    assert worst(packages.python, place).level == OK
    monkeypatch.setattr(packages, "OLDEST", (99, 0))
    assert_finds(packages.python, place, FAULT, "is needed", "sudo apt install python3")


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


# --- settings, as the services see them -------------------------------------------------------------------------------

ENV = "SMTP_HOST=127.0.0.1\nMAIL_FROM=Acme <hello@acme.example>\n"
SECRETS = {
    "redis_url": f"redis://:{PASSWORD}@127.0.0.1:1/0\n",
    "api_keys": f"shop:{'ab' * 32}\n",
    "dashboard_password": PASSWORD,
    "smtp_password": "",
}
EACH = {  # what each unit passes, as systemd/ has it
    "async-email-api.service": ("redis_url", "api_keys"),
    "async-email-worker@email.service": ("redis_url", "smtp_password"),
    "async-email-worker@jobs.service": ("redis_url",),
    "async-email-dashboard.service": ("redis_url", "dashboard_password"),
}
HEALTHY = {
    "LoadState": "loaded",
    "ActiveState": "active",
    "SubState": "running",
    "UnitFileState": "enabled",
    "Result": "success",
    "NRestarts": "0",
    "ExecMainStatus": "0",
    "KillMode": "mixed",
    "MainPID": "0",
    "NeedDaemonReload": "no",
}


class Server:
    """A machine on which bin/install has been, in a folder that others may enter, and with a systemctl of ours."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder = folder
        folder.chmod(0o755)
        self.env = self.write("etc/async-email.env", ENV, 0o600)
        for name, value in SECRETS.items():
            self.write(f"etc/credentials/{name}", value, 0o600)
        for name in ("etc", "etc/credentials"):
            (folder / name).chmod(0o700)
        self.write("opt/releases/2.0/worker.py", "")
        self.write("opt/releases/1.0/worker.py", "")
        self.write("opt/releases/2.0/.venv/bin/python", "", 0o755)
        (folder / "opt/current").symlink_to(folder / "opt/releases/2.0")
        (folder / "systemd").mkdir()
        shown, catted = folder / "show", folder / "cat"
        catted.mkdir()
        fake(folder, "systemctl", f'case $1 in show) cat {shown};; cat) cat "{catted}/$2";; esac', monkeypatch)
        for unit, names_passed in EACH.items():
            lines = [f"LoadCredential=async-email.env:{self.env}"]
            lines += [f"LoadCredential={name}:{folder}/etc/credentials/{name}" for name in names_passed]
            (catted / unit).write_text("[Service]\n" + "\n".join(lines) + "\n")
        self.units(*units.UNITS)
        self.place = Place(
            folder / "opt/current",
            etc=folder / "etc",
            opt=folder / "opt",
            nginx=folder / "nginx",
            redis_data=folder,
            systemd=folder / "systemd",
            selinux=folder / "enforce",
            user="nobody",
            owner=os.getuid(),
            patience=1,
        )

    def write(self, name: str, text: str, mode: int = 0o644) -> Path:
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        path.chmod(mode)
        return path

    def units(self, *named: str, **changes: str) -> None:
        blocks = [{"Id": name} | HEALTHY | changes for name in named]
        lines = ["\n".join(f"{key}={value}" for key, value in block.items()) for block in blocks]
        self.write("show", "\n\n".join(lines) + "\n")


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    with tempfile.TemporaryDirectory(prefix="test-doctor-") as folder:
        yield Server(Path(folder), monkeypatch)


def test_a_complete_configuration_is_fine_for_each_service(server: Server) -> None:
    assert worst(configuration.values, server.place).level == OK
    assert worst(configuration.shell, server.place).level == OK
    assert worst(configuration.modes, server.place).level == OK
    loaded = configuration.load(server.place)
    assert loaded
    assert loaded.smtp_host == "127.0.0.1"


def test_a_fault_in_the_configuration_is_told_once_with_the_services_that_it_stops(server: Server) -> None:
    server.env.write_text(ENV + "SMTP_PORT=many\n")
    said = looked(configuration.values, server.place)
    assert [one.level for one in said] == [FAULT]
    assert "api and worker@email and worker@jobs and dashboard will not start: SMTP_PORT: input" in said[0].found
    assert "sudoedit" in said[0].mend


def test_what_one_service_cannot_do_without_is_told_for_that_one(server: Server) -> None:
    server.env.write_text("MAIL_FROM=hello@acme.example\n")
    assert_finds(configuration.values, server.place, FAULT, "worker@email will not start: SMTP_HOST is not set")
    server.env.write_text("SMTP_HOST=127.0.0.1\nMAIL_FROM=nobody in particular\n")
    assert_finds(configuration.values, server.place, FAULT, "MAIL_FROM: ")
    server.env.write_text(ENV + "SMTP_PASWORD=x\n")
    assert_finds(configuration.values, server.place, FAULT, "SMTP_PASWORD in async-email.env is not a setting")


def test_a_secret_that_a_unit_does_not_pass_is_missing_for_that_service_alone(server: Server) -> None:
    server.write("etc/credentials/dashboard_password", "", 0o600)
    assert_finds(configuration.values, server.place, FAULT, "dashboard will not start: DASHBOARD_PASSWORD is not set")
    server.write("etc/credentials/dashboard_password", "x", 0o600)
    (server.folder / "etc/credentials/api_keys").unlink()
    assert_finds(configuration.values, server.place, FAULT, "api will not start: what its unit passes", "bin/install")


def test_a_variable_of_the_shell_that_the_services_lack_is_named(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.env.write_text("MAIL_FROM=hello@acme.example\n")
    monkeypatch.setenv("SMTP_HOST", "127.0.0.1")
    monkeypatch.setenv("MAIL_FROM", "in both")
    monkeypatch.setenv("REDIS_URL", "has a file of its own")
    said = looked(configuration.shell, server.place)
    assert [(one.level, one.found.split()[0]) for one in said] == [(WARN, "SMTP_HOST")]
    assert "sudoedit" in said[0].mend
    assert_finds(configuration.values, server.place, FAULT, "SMTP_HOST is not set")  # although it is, here


def test_a_variable_that_sudo_has_dropped_is_still_seen() -> None:
    look = "from ops.checks.configuration import exported; print(sorted(exported()))"
    bare = ["sh", "-c", 'env -i "$0" -c "$1"; true', sys.executable, look]  # sh stands for sudo
    ran = subprocess.run(bare, cwd=ROOT, env={"SMTP_HOST": "x", "SMTP_PORT": ""}, capture_output=True, text=True)
    assert ran.stdout == "['SMTP_HOST']\n", ran.stderr


def test_in_a_checkout_the_environment_counts(place: Place, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    place.code = tmp_path
    assert worst(configuration.values, place).level == NOTE
    monkeypatch.setenv("SMTP_HOST", "127.0.0.1")
    assert_finds(configuration.shell, place, NOTE, "only in this shell, not in .env: SMTP_HOST", ".env")
    (tmp_path / ".env").write_text("SMTP_HOST=127.0.0.1\n")
    (tmp_path / ".env").chmod(0o644)
    assert worst(configuration.shell, place).level == OK
    assert_finds(configuration.modes, place, WARN, "can be read by other users", "chmod 600")
    monkeypatch.setenv("ON_DOUBT", "maybe")
    assert_finds(configuration.values, place, FAULT, "ON_DOUBT: input should be 'retry' or 'hold'", ".env.example")


# --- permissions and ownership ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["etc", "etc/credentials", "etc/async-email.env", "etc/credentials/redis_url"])
def test_a_secret_that_others_may_read_is_a_fault(server: Server, name: str) -> None:
    path = server.folder / name
    path.chmod(path.stat().st_mode | 0o044)
    assert_finds(
        configuration.modes,
        server.place,
        FAULT,
        f"{path} is open to other users",
        f"sudo chmod {7 if path.is_dir() else 6}00 {path}",
    )


def test_a_configuration_without_its_secrets_is_a_fault(server: Server) -> None:
    shutil.rmtree(server.folder / "etc/credentials")
    assert_finds(configuration.modes, server.place, FAULT, "etc/credentials is missing", "sudo bin/install")


def test_who_is_not_root_is_told_that_most_cannot_be_looked_at(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(configuration, "open_to_us", lambda _: False)
    monkeypatch.setenv("SMTP_PORT", "587")
    assert_finds(configuration.values, server.place, WARN, "is for root only", "sudo bin/doctor")
    assert_finds(configuration.shell, server.place, NOTE, "set in this shell", "sudo bin/doctor")
    assert "root's alone" not in worst(configuration.modes, server.place).found


def test_a_configuration_that_is_not_roots_is_a_fault(server: Server) -> None:
    server.place.owner += 1
    assert_finds(configuration.modes, server.place, FAULT, "does not belong to root", "sudo chown root:root")


def test_code_that_the_service_may_change_or_cannot_read_is_a_fault(server: Server) -> None:
    program = server.folder / "opt/releases/2.0/worker.py"
    program.chmod(0o666)
    assert_finds(configuration.modes, server.place, FAULT, "may change the code it runs", "sudo chown -R root:root")
    program.chmod(0o600)
    assert_finds(configuration.modes, server.place, FAULT, "cannot be read by the user nobody", "sudo chmod o+rX")
    server.place.user = "nobody-of-this-name"
    assert_finds(configuration.modes, server.place, FAULT, "there is no user", "sudo bin/install")


def test_a_file_named_in_the_settings_that_the_service_cannot_read_is_a_fault(server: Server) -> None:
    secret = server.write("secret", PASSWORD, 0o600)
    server.place.settings = of(smtp_username="ada", smtp_password_file=secret)
    assert_finds(
        configuration.modes, server.place, FAULT, "SMTP_PASSWORD_FILE: the user nobody cannot read", "credentials"
    )


# --- Redis ------------------------------------------------------------------------------------------------------------


def test_a_good_redis_is_fine_in_every_respect(place: Place, tmp_path: Path) -> None:
    options = ("--maxmemory-policy", "noeviction", "--maxmemory", "64mb")
    with RedisServer(tmp_path, "--requirepass", PASSWORD, *options, password=PASSWORD) as redis:
        place.settings = of(redis_url=redis.url)
        for look in (store.reachable, store.keeps, store.memory, store.clock):
            assert worst(look, place).level == OK


def test_redis_that_is_not_running_is_named_with_how_to_start_it(place: Place, server: Server) -> None:
    place.settings = server.place.settings = of(redis_url=f"redis://127.0.0.1:{free_port()}/0")
    assert_finds(store.reachable, place, FAULT, "connection refused", "bin/dev")
    assert_finds(store.reachable, server.place, FAULT, "connection refused", "sudo systemctl enable --now redis-server")
    place.settings = of(redis_url=f"unix://{server.folder}/none.sock")
    assert_finds(store.reachable, place, FAULT, "no such file", "bin/dev")


@pytest.mark.parametrize(("given", "said"), [("", "wants a password"), (":wrong@", "does not accept our user")])
def test_a_password_that_redis_does_not_take_is_named(place: Place, tmp_path: Path, given: str, said: str) -> None:
    with RedisServer(tmp_path, "--requirepass", PASSWORD, password=PASSWORD) as redis:
        place.settings = of(redis_url=f"redis://{given}127.0.0.1:{redis.port}/0")
        assert_finds(store.reachable, place, FAULT, said, "REDIS_URL")


def test_what_is_not_redis_is_named(place: Place) -> None:
    with ScriptedRelay() as other:
        place.settings = of(redis_url=f"redis://127.0.0.1:{other.port}/0")
        assert_finds(store.reachable, place, FAULT, "does not speak redis://", "correct REDIS_URL")


def test_localhost_that_stands_for_an_address_without_redis_is_named(
    place: Place, redis_server: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    both = [(socket.AF_INET, 1, 6, "", (host, redis_server.port)) for host in ("127.0.0.2", "127.0.0.1")]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: both)
    place.settings = of(redis_url=f"redis://localhost:{redis_server.port}/0")
    assert_finds(store.reachable, place, WARN, "Redis answers only at 127.0.0.1", "write 127.0.0.1 in REDIS_URL")


def test_a_socket_that_the_service_may_not_use_is_named(server: Server) -> None:
    path = server.folder / "redis.sock"
    data = server.folder / "data"
    data.mkdir()
    with RedisServer(data, "--unixsocket", str(path), "--unixsocketperm", "700"):
        server.place.settings = of(redis_url=f"unix://{path}")
        assert_finds(store.reachable, server.place, FAULT, "the user nobody may not use", "unixsocketperm 777")
        path.chmod(0o777)
        assert worst(store.reachable, server.place).level == OK


@pytest.mark.parametrize(
    ("options", "look", "level", "found", "mend"),
    [
        (("--appendonly", "no"), store.keeps, FAULT, "keeps no append-only file", "CONFIG SET appendonly yes"),
        (("--maxmemory-policy", "allkeys-lru"), store.memory, WARN, "drops mail in silence", "noeviction"),
        (
            ("--maxmemory-policy", "allkeys-lru", "--maxmemory", "64mb"),
            *(store.memory, FAULT, "drops mail in silence", "maxmemory-policy noeviction"),
        ),
        (("--maxmemory", "1000"), store.memory, FAULT, "it is full", "raise maxmemory"),
        (("--maxmemory", "1000gb"), store.memory, WARN, "of this machine's", "lower maxmemory"),
        (("--replicaof", "127.0.0.1 1"), store.reachable, FAULT, "a replica", "name the primary"),
    ],
)
def test_a_redis_that_would_lose_mail_is_named(
    place: Place, tmp_path: Path, options: tuple[str, ...], look: Look, level: str, found: str, mend: str
) -> None:
    with RedisServer(tmp_path, *options) as redis:
        place.settings = of(redis_url=redis.url)
        assert_finds(look, place, level, found, mend)


def test_an_old_redis_a_full_disk_and_a_wrong_clock_are_named(
    place: Place, redis_server: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    place.settings = of(redis_url=redis_server.url)
    monkeypatch.setattr(store, "OLDEST", (99, 0))
    assert_finds(store.reachable, place, FAULT, "is too old", "upgrade")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=300 * 2**20))
    assert_finds(store.keeps, place, WARN, "300 MB free", "make room")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=2**20))
    assert_finds(store.keeps, place, FAULT, "will soon refuse mail", "make room")
    now = time.time
    monkeypatch.setattr(time, "time", lambda: now() - 3600)
    assert_finds(store.clock, place, WARN, "60 min from ours", "timedatectl set-ntp true")


def test_a_redis_that_cannot_write_its_files_is_named(place: Place, tmp_path: Path) -> None:
    with RedisServer(tmp_path) as redis, redis.client() as client:
        place.settings = of(redis_url=redis.url)
        (tmp_path / "dump.rdb" / "in the way").mkdir(parents=True)
        client.bgsave()
        eventually(lambda: client.info()["rdb_last_bgsave_status"] == "err")
        assert_finds(store.keeps, place, FAULT, "cannot write its snapshot", "df -h")
        shutil.rmtree(tmp_path / "appendonlydir")
        (tmp_path / "appendonlydir").touch()
        with pytest.raises(ResponseError, match="server logs"):
            client.bgrewriteaof()
        eventually(lambda: client.info()["aof_last_bgrewrite_status"] == "err")
        assert_finds(store.keeps, place, FAULT, "cannot write its append-only file", "df -h")


def test_a_redis_that_takes_no_more_is_named(place: Place, tmp_path: Path) -> None:
    with RedisServer(tmp_path) as redis, redis.client() as client:
        place.settings = of(redis_url=redis.url)
        client.config_set("maxmemory-policy", "noeviction")
        client.config_set("maxmemory", int(client.info()["used_memory"] * 1.1))
        assert_finds(store.memory, place, WARN, "it is nearly full", "raise maxmemory")
        client.config_set("maxclients", 1)
        assert_finds(store.reachable, place, FAULT, "as many clients as it takes", "maxclients")


def test_a_redis_that_refuses_to_tell_is_named(place: Place, tmp_path: Path) -> None:
    with RedisServer(tmp_path) as redis, redis.client() as client:
        client.execute_command("ACL", "SETUSER", "async-email", "on", f">{PASSWORD}", "~*", "+@all", "-info")
        place.settings = of(redis_url=f"redis://async-email:{PASSWORD}@127.0.0.1:{redis.port}/0")
        assert_finds(store.reachable, place, FAULT, "ACL refuses us PING or INFO", "+info")
    for said, found in ((b"-LOADING it reads\r\n" * 9, "still reading"), (b"-ERR no\r\n" * 9, "refuses PING or INFO")):
        with ScriptedRelay({"GREETING": raw(said)}) as there:
            place.settings = of(redis_url=f"redis://127.0.0.1:{there.port}/0")
            assert_finds(store.reachable, place, FAULT, found, "journalctl")
    place.settings = of(redis_url="redis://redis.nowhere.invalid/0")
    assert_finds(store.reachable, place, FAULT, "redis.nowhere.invalid cannot be resolved", "correct it")


def test_an_acl_without_dangerous_commands_is_enough_for_the_doctor(place: Place, tmp_path: Path) -> None:
    rules = f"user async-email on >{PASSWORD} ~* &* +@all -@dangerous -@admin +info"
    (tmp_path / "redis.conf").write_text(f"{rules}\nmaxmemory-policy noeviction\n")
    with RedisServer(tmp_path) as redis, redis.client() as client:
        client.execute_command("ACL", "SETUSER", *rules.split()[1:])
        client.config_set("maxmemory-policy", "noeviction")
        place.settings = of(redis_url=f"redis://async-email:{PASSWORD}@127.0.0.1:{redis.port}/0")
        for look in (store.reachable, store.keeps, store.memory, store.clock, flow.waiting):
            assert worst(look, place).level in (OK, NOTE)


# --- the relay --------------------------------------------------------------------------------------------------------

GMAIL, M365, SES = "smtp.gmail.com", "smtp.office365.com", "email-smtp.eu-west-1.amazonaws.com"


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    return trustme.CA()


@pytest.fixture
def ca_file(authority: trustme.CA, tmp_path: Path) -> Path:
    path = tmp_path / "ca.pem"
    authority.cert_pem.write_to_path(str(path))
    return path


def context(authority: trustme.CA, name: str = "127.0.0.1", **options: Any) -> ssl.SSLContext:
    made = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert(name, **options).configure_cert(made)
    return made


def at(port: int, **given: Any) -> Settings:
    return of(**{"smtp_host": "127.0.0.1", "smtp_port": port, "smtp_security": "none", **given})


LOGIN = {"smtp_username": "ada@acme.example", "smtp_password": PASSWORD}


def test_a_relay_that_lets_us_in_is_fine_and_gets_no_mail(place: Place, tmp_path: Path) -> None:
    with Relay(login=("ada", PASSWORD), tls="starttls") as there:
        given = {name.lower(): value for name, value in there.environment(tmp_path).items()}
        place.settings = of(**given)
        said = looked(relay.lets_us_in, place)
        assert [one.level for one in said] == [OK, OK, OK]
        assert "accepts our login" in said[-1].found
        assert there.connections
        assert not there.seen_rcpt + there.accepted


def test_after_the_login_nothing_but_quit_is_said(place: Place, authority: trustme.CA, ca_file: Path) -> None:
    with ScriptedRelay(offers=["STARTTLS", "AUTH PLAIN"], tls=context(authority)) as there:
        place.settings = at(there.port, smtp_security="starttls", smtp_ca_file=ca_file, **LOGIN)
        assert worst(relay.lets_us_in, place).level == OK
    assert [command.split()[0].upper() for command in there.commands] == ["EHLO", "STARTTLS", "EHLO", "AUTH", "QUIT"]


def test_a_port_that_refuses_is_named_with_one_that_answers(place: Place) -> None:
    with ScriptedRelay() as there:
        place.settings, place.smtp_ports = at(free_port()), (there.port,)
        assert_finds(relay.lets_us_in, place, FAULT, "refused, nothing listens there", f"SMTP_PORT={there.port} and")
    assert_finds(relay.lets_us_in, place, FAULT, "refused", "no other usual port answers either: correct SMTP_HOST")


@pytest.fixture
def silent_port() -> Iterator[int]:
    """Its queue of connections is full, so the next one is neither taken nor refused."""
    with socket.socket() as deaf, socket.socket() as first, socket.socket() as second:
        deaf.bind(("127.0.0.1", 0))
        deaf.listen(0)
        for caller in (first, second):
            caller.setblocking(False)
            caller.connect_ex(deaf.getsockname())
        yield deaf.getsockname()[1]


def test_a_port_that_a_firewall_closes_is_told_from_one_that_refuses(place: Place, silent_port: int) -> None:
    place.settings = at(silent_port)
    assert_finds(relay.lets_us_in, place, FAULT, "silent, as behind a firewall", "security group")


def test_port_25_on_a_cloud_is_named(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(relay, "connect", lambda *_: relay.SILENT)
    place.settings = at(25)
    assert_finds(relay.lets_us_in, place, FAULT, "does not answer on port 25", "SMTP_PORT=587: Amazon EC2")


def test_a_server_without_a_relay_is_named(place: Place, server: Server) -> None:
    place.settings = server.place.settings = of()
    assert worst(relay.lets_us_in, place).level == NOTE
    assert_finds(relay.lets_us_in, server.place, FAULT, "SMTP_HOST is not set", "sudoedit")


def test_a_name_that_does_not_exist_is_named(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(*_: object, **__: object) -> list[Any]:
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    place.settings = at(587, smtp_host="smtp.acme.example")
    assert_finds(relay.lets_us_in, place, FAULT, "smtp.acme.example cannot be resolved", "SMTP_HOST")


YESTERDAY = datetime.now(timezone.utc) - timedelta(days=1)


@pytest.mark.parametrize(
    ("name", "options", "found", "mend"),
    [
        ("other.example", {}, "for another name than SMTP_HOST", "into SMTP_HOST"),
        ("127.0.0.1", {"not_after": YESTERDAY}, "this machine's clock is wrong", "timedatectl"),
    ],
)
def test_a_certificate_that_is_not_right_is_named(
    place: Place, authority: trustme.CA, ca_file: Path, name: str, options: dict[str, Any], found: str, mend: str
) -> None:
    if "not_after" in options:
        options = {"not_before": YESTERDAY - timedelta(days=9), **options}
    with ScriptedRelay(offers=["STARTTLS"], tls=context(authority, name, **options)) as there:
        place.settings = at(there.port, smtp_security="starttls", smtp_ca_file=ca_file)
        assert_finds(relay.lets_us_in, place, FAULT, found, mend)


def test_a_certificate_of_an_unknown_authority_or_one_that_ends_soon_is_named(
    place: Place, authority: trustme.CA, ca_file: Path
) -> None:
    soon = datetime.now(timezone.utc) + timedelta(days=3)
    with ScriptedRelay(implicit=True, tls=context(authority, not_after=soon)) as there:
        place.settings = at(there.port, smtp_security="tls")
        assert_finds(
            relay.lets_us_in, place, FAULT, "from an authority that this machine does not know", "SMTP_CA_FILE"
        )
        place.settings = at(there.port, smtp_security="tls", smtp_ca_file=ca_file)
        assert_finds(relay.lets_us_in, place, WARN, "ends in 2 days", "tell the relay's operator")


def test_tls_where_the_relay_does_not_begin_with_it_and_the_reverse_are_named(
    place: Place, authority: trustme.CA
) -> None:
    with ScriptedRelay() as there:
        place.settings = at(there.port, smtp_security="tls")
        assert_finds(relay.lets_us_in, place, FAULT, "does not begin with TLS on this port", "SMTP_SECURITY=starttls")
        place.settings = at(there.port, smtp_security="starttls")
        assert_finds(relay.lets_us_in, place, FAULT, "offers no STARTTLS", "SMTP_SECURITY=tls and SMTP_PORT=465")
    with ScriptedRelay(implicit=True, tls=context(authority)) as there:
        place.settings = at(there.port, smtp_security="starttls")
        assert_finds(relay.lets_us_in, place, FAULT, "says nothing, as it does where it waits for TLS", "=tls")


def test_a_relay_that_drips_does_not_hold_the_doctor(place: Place) -> None:
    def drips(line: Any) -> str:
        while not line.relay.over.wait(0.05):
            line.say(b"2")
        return ""

    place.patience = 0.2
    with ScriptedRelay({"GREETING": drips}) as there:
        place.settings = at(there.port)
        assert worst(relay.lets_us_in, place).level == FAULT


@pytest.mark.parametrize(
    ("host", "reply", "found", "mend"),
    [
        (GMAIL, "534 5.7.9 Application-specific password required.", "an app password", "apppasswords"),
        (GMAIL, "535 5.7.8 Username and Password not accepted.", "the whole address", "apppasswords"),
        (GMAIL, "454 4.7.0 Too many login attempts", "too many logins", "wait"),
        (
            M365,
            "535 5.7.139 Authentication unsuccessful, SmtpClientAuthentication is disabled for the Tenant.",
            *("SMTP AUTH switched off", "Set-CASMailbox"),
        ),
        (M365, "535 5.7.3 Authentication unsuccessful", "second factor", "SMTP_PASSWORD"),
        (M365, "550 5.7.30 Basic authentication is not supported", "has ended logins", "another relay"),
        (
            M365,
            "432 4.3.2 Concurrent connections limit exceeded",
            "3 connections",
            "WORKER_CONCURRENCY=3",
        ),
        (
            SES,
            "535 Authentication Credentials Invalid",
            "not an IAM key",
            "SMTP settings",
        ),
        (
            SES,
            "454 Throttling failure: Maximum sending rate",
            "per second",
            "SMTP_RATE",
        ),
        (
            SES,
            "454 Throttling failure: Daily message quota",
            "daily quota",
            "limit incr",
        ),
        ("smtp.acme.example", "535 5.7.8 no", "does not accept this login", "SMTP_USERNAME and SMTP_PASSWORD"),
        ("smtp.acme.example", "530 5.7.0 Must issue a STARTTLS command first", "wants TLS", "SMTP_SECURITY"),
        ("smtp.acme.example", "454 4.7.0 Temporary authentication failure", "cannot check logins now", "wait"),
    ],
)
def test_a_refused_login_is_explained_for_the_relay_that_refused_it(
    place: Place,
    authority: trustme.CA,
    ca_file: Path,
    monkeypatch: pytest.MonkeyPatch,
    host: str,
    reply: str,
    found: str,
    mend: str,
) -> None:
    resolve = socket.getaddrinfo
    monkeypatch.setattr(
        socket, "getaddrinfo", lambda name, *rest, **more: resolve("127.0.0.1" if name == host else name, *rest, **more)
    )
    told = {"AUTH": f"{reply} ada@acme.example {PASSWORD}"}
    with ScriptedRelay(told, offers=["STARTTLS", "AUTH LOGIN PLAIN"], tls=context(authority, host)) as there:
        place.settings = at(there.port, smtp_host=host, smtp_security="starttls", smtp_ca_file=ca_file, **LOGIN)
        assert_finds(relay.lets_us_in, place, FAULT, found, mend)
        said = repr(looked(relay.lets_us_in, place))
    assert reply[:3] in said
    assert "acme.example" not in said.replace("smtp.acme.example", "")
    assert PASSWORD not in said


def test_what_can_be_seen_of_a_wrong_password_is_said_without_it(place: Place) -> None:
    spaces = at(587, smtp_host=GMAIL, smtp_security="starttls", smtp_username="a", smtp_password="abcd efgh")
    assert "has spaces in it" in next(iter(relay.password_looks(spaces))).found
    iam = at(587, smtp_host=SES, smtp_security="tls", smtp_username="AKIA", smtp_password="x" * 40)
    assert "looks like an IAM key" in next(iter(relay.password_looks(iam))).found


def test_more_connections_than_microsoft_365_takes_are_a_warning(
    place: Place, authority: trustme.CA, ca_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    resolve = socket.getaddrinfo
    monkeypatch.setattr(socket, "getaddrinfo", lambda _, *rest, **more: resolve("127.0.0.1", *rest, **more))
    with ScriptedRelay(offers=["STARTTLS"], tls=context(authority, M365)) as there:
        place.settings = at(there.port, smtp_host=M365, smtp_security="starttls", smtp_ca_file=ca_file)
        assert_finds(relay.lets_us_in, place, WARN, "a mailbox have 3 connections", "WORKER_CONCURRENCY=3")
        place.settings = at(there.port, smtp_host=M365, smtp_security="none")
        assert_finds(relay.lets_us_in, place, WARN, "mail goes to the relay in clear", "SMTP_SECURITY=starttls")
    with ScriptedRelay(offers=["AUTH PLAIN"]) as there:
        place.settings = at(there.port, smtp_host=M365, smtp_security="none")
        assert_finds(relay.lets_us_in, place, WARN, "SMTP_USERNAME is not set", "SMTP_USERNAME and SMTP_PASSWORD")


def test_the_sandbox_of_ses_and_a_sender_that_may_not_are_explained() -> None:
    refused = Reply(Phase.DOT, 554, "Message rejected: Email address is not verified.")
    assert "sandbox" in replies.explain("email-smtp.us-east-1.amazonaws.com", refused)[0]
    assert "MAIL_FROM" in replies.explain("smtp.acme.example", Reply(Phase.MAIL, 553, "5.7.1 not owned"))[1]


@pytest.mark.parametrize("phase", Phase)
@pytest.mark.parametrize("code", [None, -1, 421, 450, 454, 500, 530, 535, 550, 554])
def test_every_refusal_has_a_meaning_and_a_remedy(phase: Phase, code: int | None) -> None:
    for host in (GMAIL, M365, SES, "mx.acme.example"):
        assert all(replies.explain(host, Reply(phase, code, "")))


# --- units ------------------------------------------------------------------------------------------------------------

WORKER = "async-email-worker@email.service"
DEAD = {"ActiveState": "failed", "SubState": "failed", "Result": "exit-code"}


def test_units_that_run_are_fine(server: Server) -> None:
    assert worst(units.running, server.place).level == OK


@pytest.mark.parametrize(
    ("changes", "level", "found", "mend"),
    [
        ({**DEAD, "ExecMainStatus": "203"}, FAULT, "203/EXEC", "/opt/async-email"),
        ({**DEAD, "ExecMainStatus": "127"}, FAULT, "no .venv", "sudo bin/install"),
        ({**DEAD, "ExecMainStatus": "226"}, FAULT, "226/NAMESPACE", f"journalctl -u {WORKER}"),
        ({**DEAD, "ExecMainStatus": "243"}, FAULT, "243/CREDENTIALS", "/etc/async-email/credentials"),
        ({**DEAD, "ExecMainStatus": "217"}, FAULT, "217/USER", "sudo bin/install"),
        ({**DEAD, "ExecMainStatus": "2"}, FAULT, "refuses its settings", "settings"),
        ({**DEAD, "ExecMainStatus": "77"}, FAULT, "last exit code was 77", f"journalctl -u {WORKER} -n 50"),
        (
            {**DEAD, "Result": "start-limit-hit", "ExecMainStatus": "1"},
            FAULT,
            "systemd gave up",
            "reset-failed",
        ),
        ({**DEAD, "Result": "oom-kill", "ExecMainStatus": "9"}, FAULT, "out of memory", "WORKER_CONCURRENCY"),
        (
            {"ActiveState": "activating", "SubState": "auto-restart", "ExecMainStatus": "1"},
            FAULT,
            "auto-restart",
            "Redis",
        ),
        ({"ActiveState": "inactive", "SubState": "dead"}, FAULT, "not started", f"sudo systemctl start {WORKER}"),
        ({"LoadState": "not-found"}, FAULT, "not installed: async", "sudo bin/install"),
        ({"ActiveState": "activating", "SubState": "start"}, WARN, "just starting", "look again"),
        (
            {**DEAD, "ExecMainStatus": "2", "Restart": "always"},
            FAULT,
            "gave up, and it refuses",
            "reset-failed",
        ),
        ({"LoadState": "bad-setting"}, FAULT, "bad-setting", "systemd-analyze verify"),
        ({"UnitFileState": "disabled"}, WARN, "gone after the next reboot", f"sudo systemctl enable {WORKER}"),
        ({"KillMode": "control-group"}, FAULT, "a restart kills the jobs", "KillMode=mixed"),
        ({"NeedDaemonReload": "yes"}, WARN, "changed on disk", "daemon-reload"),
    ],
)
def test_a_unit_that_is_not_well_is_explained(
    server: Server, changes: dict[str, str], level: str, found: str, mend: str
) -> None:
    server.units(WORKER, **changes)
    assert_finds(units.running, server.place, level, found, mend)


def test_what_is_wrong_with_all_units_is_one_line(server: Server) -> None:
    server.units(*units.UNITS, ActiveState="inactive", UnitFileState="disabled")
    said = looked(units.running, server.place)
    assert [one.level for one in said] == [FAULT, WARN]
    assert said[0].mend == f"sudo systemctl start {' '.join(units.UNITS)}"


def test_a_unit_that_was_restarted_often_and_lately_is_named(server: Server) -> None:
    since = int(time.monotonic() * 1e6)
    server.units(WORKER, NRestarts="12", ActiveEnterTimestampMonotonic=str(since))
    assert_finds(units.running, server.place, WARN, "after 12 restarts", "journalctl")
    server.units(WORKER, NRestarts="12", ActiveEnterTimestampMonotonic=str(since - 7200 * 10**6))
    assert worst(units.running, server.place).level == OK


def test_a_unit_that_still_runs_the_last_release_is_named(server: Server) -> None:
    for release, level in (("1.0", WARN), ("2.0", OK)):
        folder = server.folder / "opt/releases" / release
        with subprocess.Popen(["sleep", "60"], cwd=folder) as process:
            server.units(WORKER, MainPID=str(process.pid))
            said = worst(units.running, server.place)
            process.kill()
        assert said.level == level, said
    assert "still runs" not in said.found


def test_where_there_is_no_systemd_nginx_or_timedatectl_nothing_is_wrong(
    place: Place, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.units(*units.UNITS, LoadState="not-found")
    place.systemd = server.place.systemd
    assert_finds(units.running, place, NOTE, "not installed as services here")
    monkeypatch.setenv("PATH", "/nowhere")
    assert_finds(units.running, place, NOTE, "skipped")
    place.systemd = server.folder / "none"
    for look in (units.running, machine.nginx, machine.clock):
        assert_finds(look, place, NOTE, "skipped")


# --- workers and queue ------------------------------------------------------------------------------------------------


@pytest.fixture
def redis(redis_server: RedisServer, place: Place) -> Any:
    redis_server.reset()
    place.settings = of(redis_url=redis_server.url, smtp_host=GMAIL, mail_from="hello@acme.example")
    return connect(redis_server.url)


def register(redis: Any, queue: str, queues: str = "", silent_for: float = 0) -> None:
    """As RQ's worker does."""
    heard = datetime.now(timezone.utc) - timedelta(seconds=silent_for)
    written = heard.strftime("%Y-%m-%dT%H:%M:%S.%fZ")
    redis.hset(f"rq:worker:w-{queue}", mapping={"last_heartbeat": written, "queues": queues or queue})
    redis.sadd(f"rq:workers:{queue}", f"rq:worker:w-{queue}")
    redis.set(f"rq:scheduler-lock:{queue}", "1")


def test_workers_that_are_missing_dead_or_greedy_are_named(place: Place, redis: Any, server: Server) -> None:
    assert_finds(flow.workers, place, FAULT, "no worker takes from the queue email", "worker.py email")
    register(redis, EMAIL, silent_for=600)
    assert_finds(flow.workers, place, FAULT, "the last one was heard 10 min ago", "bin/dev")
    server.place.settings = place.settings
    assert_finds(flow.workers, server.place, FAULT, "queue email", "sudo systemctl restart async-email-worker@email")
    register(redis, EMAIL, queues="email,jobs")
    assert_finds(flow.workers, place, FAULT, "with more than one queue", "one `worker.py QUEUE` for each")
    register(redis, EMAIL)
    register(redis, JOBS)
    assert worst(flow.workers, place).level == OK
    redis.delete("rq:scheduler-lock:email")
    assert_finds(flow.workers, place, FAULT, "no scheduler for the queue email", "worker.py email")


def queued(redis: Any, place: Place, seconds_ago: float = 0) -> str:
    """A mail in the queue, put there a while ago."""
    assert place.settings
    asked = parse(
        {"from": "a@acme.example", "to": ["ada@acme.example"], "subject": "planted-subject", "text": "planted-body"},
        default_sender=None,
        max_recipients=1,
    )
    mail_id = Outbox(Jobs(redis), place.settings).accept([Draft(compose(asked))]).id
    moment = datetime.now(timezone.utc) - timedelta(seconds=seconds_ago)
    redis.hset(f"rq:job:{mail_id}", "enqueued_at", moment.strftime("%Y-%m-%dT%H:%M:%S.%fZ"))
    return mail_id


def test_mail_that_nothing_drains_is_named(place: Place, redis: Any) -> None:
    assert worst(flow.waiting, place).level == OK
    mail_id = queued(redis, place, seconds_ago=3600)
    assert_finds(flow.waiting, place, WARN, "1 mail in the queue, the oldest for 60 min", "worker")
    redis.zadd("rq:scheduled:email", {mail_id: time.time() - 3600})
    assert_finds(flow.waiting, place, FAULT, "should have been tried 60 min ago", "worker.py email")
    redis.zadd(OPEN, {mail_id: time.time() - 3600})
    assert_finds(flow.waiting, place, FAULT, "is stuck for 60 min", "worker.py email")
    redis.set("rq:suspended", "1")
    assert_finds(flow.waiting, place, FAULT, "workers are suspended", "rq resume")
    redis.zadd("rq:failed:email", {mail_id: 1})
    assert_finds(flow.waiting, place, NOTE, "1 mail failed for good", "requeue")


def test_an_open_breaker_is_explained_by_what_the_last_attempt_met_with(place: Place, redis: Any) -> None:
    redis.hset("relay:breaker", mapping={"troubles": 3, "open_until": int(time.time() * 1000) + 20_000})
    assert_finds(flow.waiting, place, FAULT, "all mail waits", "journalctl")
    mail_id = queued(redis, place)
    attempt = {"verdict": "trouble", "phase": "auth", "code": 534, "text": "5.7.9 planted words"}
    redis.hset(f"mail:{mail_id}", "attempts", json.dumps([attempt]))
    assert_finds(flow.waiting, place, FAULT, "534 at auth: Google takes an app password", "apppasswords")
    assert "planted" not in repr(looked(flow.waiting, place))


def test_looking_changes_nothing_in_redis(place: Place, redis: Any) -> None:
    register(redis, EMAIL)
    mail_id = queued(redis, place, seconds_ago=3600)
    redis.zadd("rq:wip:email", {f"{mail_id}:1": 1})  # RQ's own listings would tidy this up
    redis.zadd("rq:failed:email", {"gone": 1})
    redis.hset("relay:breaker", "open_until", "1")

    read = {  # DUMP would write the members of a hash in an order that changes by itself
        b"hash": redis.hgetall,
        b"list": lambda key: redis.lrange(key, 0, -1),
        b"set": redis.smembers,
        b"string": redis.get,
        b"zset": lambda key: redis.zrange(key, 0, -1, withscores=True),
    }

    def everything() -> dict[bytes, Any]:
        return {key: (read[redis.type(key)](key), redis.ttl(key) > 0) for key in redis.scan_iter()}

    before = everything()
    for check in CHECKS:
        if check.needs == "redis":
            looked(check.look, place)
    assert everything() == before


# --- nginx, ports, clock ----------------------------------------------------------------------------------------------


class Front(BaseHTTPRequestHandler):
    """Stands for nginx: what it answers is the server's to say."""

    def do_GET(self) -> None:
        status, body, location = self.server.says  # type: ignore[attr-defined]
        self.send_response(status)
        self.send_header("Location", location)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None: ...


@pytest.fixture
def front(server: Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    fake(server.folder, "nginx", "exit 0", monkeypatch)
    server.write("nginx/sites-enabled/async-email", "")
    with HTTPServer(("127.0.0.1", 0), Front) as http:
        http.says = (200, b'{"status": "ok"}', "")  # type: ignore[attr-defined]
        server.place.http_port = http.server_port
        thread = threading.Thread(target=http.serve_forever, args=[0.05])
        thread.start()
        yield http
        http.shutdown()
        thread.join()


def test_nginx_in_front_is_asked_as_anybody_would(server: Server, front: Any) -> None:
    assert worst(machine.nginx, server.place).level == OK
    front.says = (301, b"", "https://acme.example/healthz")
    assert worst(machine.nginx, server.place).level == OK
    front.says = (502, b"", "")
    assert_finds(machine.nginx, server.place, FAULT, "nginx answers 502", "sudo systemctl restart async-email-api")
    server.write("enforce", "1\n")
    assert_finds(machine.nginx, server.place, FAULT, "SELinux", "httpd_can_network_connect 1")
    front.says = (404, b"", "")
    assert_finds(machine.nginx, server.place, FAULT, "another site", "sites-enabled/default")


def test_nginx_that_is_not_set_up_is_named(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    assert_finds(machine.nginx, server.place, WARN, "nginx is not installed", "sudo bin/install")
    server.write("nginx/nginx.conf", "")
    server.place.http_port = free_port()
    said = 'nginx: [emerg] unknown directive "lisen" in /etc/nginx/sites-enabled/async-email:3'
    fake(server.folder, "nginx", f"echo '{said}' >&2; exit 1", monkeypatch)
    assert_finds(machine.nginx, server.place, FAULT, "the nginx site is not enabled", "sudo ln -s")
    assert_finds(machine.nginx, server.place, FAULT, "nothing answers on port", "sudo systemctl restart nginx")
    if os.geteuid() == 0:
        assert_finds(machine.nginx, server.place, FAULT, 'unknown directive "lisen" in /etc/nginx', "sudo nginx -t")


def test_a_port_of_ours_that_is_open_to_everybody_is_a_fault(place: Place) -> None:
    with socket.create_server(("0.0.0.0", 0)) as everybody, socket.create_server(("127.0.0.1", 0)) as loopback:
        api, dashboard = everybody.getsockname()[1], loopback.getsockname()[1]
        place.settings = of(listen=f"0.0.0.0:{api}", dashboard_listen=f"127.0.0.1:{dashboard}")
        assert_finds(machine.ports, place, FAULT, f"the API listens on port {api} for everybody", "LISTEN=127.0.0.1")
        place.settings = of(dashboard_listen=f"127.0.0.1:{api}", listen=f"127.0.0.1:{dashboard}")
        assert_finds(machine.ports, place, FAULT, "the dashboard listens", "DASHBOARD_LISTEN=127.0.0.1")
        place.settings = of(redis_url=f"redis://127.0.0.1:{api}/0", listen=f"127.0.0.1:{dashboard}")
        assert_finds(machine.ports, place, FAULT, "Redis listens on port", "bind 127.0.0.1")
        place.settings = of(listen=f"127.0.0.1:{dashboard}")
        assert_finds(machine.ports, place, NOTE, f"{api}", "ss -ltnp")
        assert_finds(machine.ports, place, OK, "nothing of ours listens")


@pytest.mark.parametrize(
    ("line", "local"),
    [
        ("0100007F", True),
        ("00000000", False),
        ("00000000000000000000000001000000", True),
        ("00000000000000000000000000000000", False),
        ("0000000000000000FFFF00000100007F", True),
    ],
)
@pytest.mark.skipif(sys.byteorder != "little", reason="the kernel of another machine writes them otherwise")
def test_addresses_are_read_as_the_kernel_writes_them(line: str, local: bool) -> None:
    assert machine.is_local(line) is local


def test_a_clock_that_nobody_sets_is_named(place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake(tmp_path, "timedatectl", "echo no", monkeypatch)
    assert_finds(machine.clock, place, WARN, "not synchronised", "sudo timedatectl set-ntp true")
    fake(tmp_path, "timedatectl", "echo yes", monkeypatch)
    assert worst(machine.clock, place).level == OK


# --- DNS --------------------------------------------------------------------------------------------------------------

GOOD: Zone = {
    ("acme.shop", "MX"): ["10 mx.acme.shop."],
    ("acme.shop", "TXT"): ['"v=spf1 include:spf.relay.shop ~all"', '"something else"'],
    ("spf.relay.shop", "TXT"): ['"v=spf1 a mx ip4:192.0.2.1 -all"'],
    ("_dmarc.acme.shop", "TXT"): ['"v=DMARC1; p=quarantine"'],
}


def about(place: Place, **changes: list[str] | None) -> list[Finding]:
    """What is said of acme.shop with another record; `dmarc`, `spf`, `mx`."""
    keys = {"mx": ("acme.shop", "MX"), "spf": ("acme.shop", "TXT"), "dmarc": ("_dmarc.acme.shop", "TXT")}
    zone = GOOD | {keys[name]: records or [] for name, records in changes.items()}
    zone |= {(f"s{number}.shop", "TXT"): [f'"v=spf1 include:s{number + 1}.shop -all"'] for number in range(20)}
    with NameServer({key: records for key, records in zone.items() if records}) as there:
        place.name_server = there.address
        place.settings = of(mail_from="Acme <hello@acme.shop>", smtp_host=SES)
        return looked(names.sender, place)


def test_a_domain_with_spf_and_dmarc_is_fine_and_dkim_is_said_to_be_unseen(place: Place) -> None:
    said = about(place, spf=['"v=spf1 include:amazonses.com ~all"'])
    assert [one.level for one in said] == [OK, OK, OK, NOTE]
    assert "DKIM" in said[-1].found


@pytest.mark.parametrize(
    ("changes", "found", "mend"),
    [
        ({"spf": ['"something else"']}, "has no SPF record", "v=spf1 include:amazonses.com ~all"),
        ({"spf": ['"v=spf1 a -all"', '"v=spf1 mx -all"']}, "has 2 SPF records", "merge"),
        ({"spf": ['"v=spf1 include:s0.shop -all"']}, "takes 21 lookups", "take out the includes"),
        ({"spf": ['"v=spf1 +all"']}, "lets everybody send", "~all"),
        ({"spf": ['"v=spf1 all"']}, "lets everybody send", "~all"),
        ({"dmarc": None}, "has no DMARC record", "v=DMARC1; p=none"),
        ({"dmarc": ['"v=DMARC1; p=none"', '"v=DMARC1; p=reject"']}, "has 2 DMARC records", "keep one"),
        ({"dmarc": ['"v=DMARC1"']}, "without a policy", "p=none"),
        ({"mx": ["0 ."]}, "takes no mail", "MX"),
        ({"mx": None}, "has neither MX nor address", "MX"),
    ],
)
def test_what_the_dns_lacks_is_named_with_the_record_to_write(
    place: Place, changes: dict[str, list[str] | None], found: str, mend: str
) -> None:
    said = [one for one in about(place, **changes) if one.level == WARN]
    assert [one for one in said if found in one.found and mend in one.mend], said
    assert len(said) == 1


def test_an_spf_record_that_does_not_name_the_relay_is_a_note(place: Place) -> None:
    assert any(one.level == NOTE and "does not name this relay" in one.found for one in about(place))


def test_lookups_are_counted_as_rfc_7208_does() -> None:
    def ask(name: str, kind: str) -> list[str]:
        return ["v=spf1 a:x.example mx/24 ip4:192.0.2.0/24 redirect=loop.example"] if name == "loop.example" else []

    count = names.count_lookups("v=spf1 ip6:2001:db8::/32 -a ?ptr exists:%{i}.x include:loop.example -all", ask, set())
    assert count == 4 + 3
    assert names.count_lookups("v=spf1 include:all.example amx.example ~all", ask, set()) == 1


def test_a_domain_that_does_not_exist_or_cannot_be_asked_about_is_named(place: Place) -> None:
    with NameServer({}) as there:
        place.name_server, place.settings = there.address, of(mail_from="hello@acme.shop")
        assert_finds(names.sender, place, FAULT, "acme.shop, of MAIL_FROM, does not exist", "edit")
    with NameServer({}, silent=True) as there:
        place.name_server = there.address
        assert_finds(names.sender, place, WARN, "the name server does not answer", "resolv")
    with NameServer({}, fails=True) as there:
        place.name_server = there.address
        assert_finds(names.sender, place, WARN, "has no proper answer about acme.shop", "dig")
    place.settings = of(mail_from="hello@example.com")
    assert_finds(names.sender, place, WARN, "a name for examples", "edit")


# --- the command ------------------------------------------------------------------------------------------------------


def run(directory: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "ops.doctor", *arguments],
        cwd=ROOT,
        env={"PATH": os.environ["PATH"], **environment},
        capture_output=True,
        text=True,
    )


def test_a_mail_to_order_goes_the_whole_way(place: Place, redis_server: RedisServer, tmp_path: Path) -> None:
    redis_server.reset()
    with Relay(login=("ada", PASSWORD), tls="starttls") as there:
        with House(tmp_path, redis_server.url, **there.environment(tmp_path)) as house:
            house.worker()
            house.worker("jobs")
            redis = redis_server.client()
            eventually(lambda: redis.scard("rq:workers:email") and redis.scard("rq:workers:jobs"))
            eventually(lambda: redis.exists("rq:scheduler-lock:email", "rq:scheduler-lock:jobs") == 2)
            redis.close()
            ran = run(tmp_path, "--json", "--send-to", "victim@acme.shop", **house.environment)
            said = {(one["check"], one["level"]) for one in json.loads(ran.stdout)}
        assert [one.recipients for one in there.accepted] == [["victim@acme.shop"]]
    assert {("canary", OK), ("workers", OK), ("queue", OK), ("relay", OK), ("redis", OK)} <= said
    assert not [one for one in said if one[1] == FAULT], ran.stdout
    assert "victim" not in ran.stdout


def test_a_mail_to_order_that_does_not_arrive_is_explained(
    place: Place, redis: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    place.send_to = "not an address"
    assert_finds(flow.canary, place, FAULT, "--send-to", "ada@example.com")
    place.send_to = "ada@acme.shop"
    monkeypatch.setattr(flow, "CANARY_FOR", 0.2)
    assert_finds(flow.canary, place, FAULT, "no worker has taken it", "worker.py email")
    refused = {"status": "failed", "attempts": [{"phase": "dot", "code": 550, "text": "5.4.5 Daily limit"}]}
    said = next(iter(flow.told("id", refused, place)))
    assert said.level == FAULT
    assert "last 24 hours" in said.found
    waits = {"status": "delayed", "attempts": [], "reason": "SMTP_RATE is reached"}
    assert next(iter(flow.told("id", waits, place))).level == WARN


def test_the_exit_code_is_the_worst_of_what_was_found() -> None:
    one = {level: Finding(level, "") for level in (OK, NOTE, WARN, FAULT)}
    assert doctor.verdict([one[OK], one[NOTE]]) == 0
    assert doctor.verdict([one[OK], one[WARN]]) == 1
    assert doctor.verdict([one[FAULT], one[WARN], one[OK]]) == 2


def test_every_finding_is_one_line_and_json_says_the_same(tmp_path: Path) -> None:
    nowhere = {"REDIS_URL": f"redis://127.0.0.1:{free_port()}/0"}
    plain, as_json = run(tmp_path, **nowhere), run(tmp_path, "--json", **nowhere)
    assert (plain.returncode, as_json.returncode) == (2, 2)
    found = json.loads(as_json.stdout)
    assert all(one.keys() == {"check", "level", "found", "mend"} for one in found)
    lines = plain.stdout.splitlines()
    assert len([line for line in lines if line.split("  ")[0] in (OK, NOTE, WARN, FAULT)]) == len(found)
    redis = next(one for one in found if one["check"] == "redis")
    assert f"fault  redis: {redis['found']}  ->  {redis['mend']}" in lines
    assert lines[-1].startswith("1 fault.")


def test_a_check_that_breaks_is_a_finding_and_stops_no_other(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(_: Place) -> Findings:
        raise ValueError(PASSWORD)
        yield

    monkeypatch.setattr(table, "CHECKS", (table.Check("first", broken), table.Check("second", machine.clock)))
    said = list(table.examine(place))
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
            run(tmp_path, *arguments, **secrets | changes)
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
