"""Several machines as `bin/install --role` makes them: in folders that stand for them, with real certificates; and as
they then run, on addresses of loopback. tests/deploy/test_three.py has whole machines."""

from __future__ import annotations

import json
import os
import random
import shutil
import ssl
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import redis

from ops import failover, gate, install, redis_server, services, site, smtp_in, webhooks
from ops import machines as several
from ops.server import Fault, Server
from queues.connection import connect
from settings import Settings, from_credentials, from_file
from tests.servers import ROOT, eventually, kill_group, mode, redis_servers, start

ALL = frozenset(several.ROLES)
run = Server.run


@pytest.fixture(autouse=True)
def noted(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The commands that would have been run; openssl is."""
    commands: list[str] = []

    def only_openssl(self: Server, *command: str | Path, may_fail: bool = False) -> bool:
        commands.append(" ".join(map(str, command)))
        return run(self, *command, may_fail=may_fail) if command[0] == "openssl" else True

    monkeypatch.setattr(Server, "run", only_openssl)
    monkeypatch.setattr(Server, "ask", lambda *_, **__: "")
    monkeypatch.setattr(shutil, "chown", lambda *_: None)
    return commands


def machine(under: Path, monkeypatch: pytest.MonkeyPatch, host: str, roles: frozenset[str] = ALL) -> Server:
    monkeypatch.setattr(several, "own", lambda hosts: host if host in hosts else None)
    server = Server(ROOT, under=under)
    server.roles = roles
    return server


def set_up(server: Server) -> None:
    several.set_up_machines(server)
    install.configure(server)
    several.set_up_certificates(server)
    several.start_sentinel(server)
    if "redis" in server.roles:
        redis_server.configure_redis(server)


@pytest.fixture
def machines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Server]:
    """The first makes what the others join."""
    net = f"127.{random.randrange(1, 255)}.{random.randrange(1, 255)}"
    hosts = [f"{net}.{number}" for number in (1, 2, 3)]
    made: list[Server] = []
    for host in hosts:
        server = machine(tmp_path / host[-1], monkeypatch, host)
        if made:
            server.bundle, server.joins = made[0].bundle, True
        else:
            server.hosts = hosts
        set_up(server)
        made.append(server)
    return made


def settings_of(server: Server) -> Settings:
    return Settings(**from_file(server.env) | from_credentials(str(server.credentials)))


def test_what_the_first_makes_the_others_have_too_and_nobody_else_can_read(machines: list[Server]) -> None:
    first, *others = machines
    assert [server.etc.joinpath("machines.json").exists() for server in machines] == [True, False, False]
    secrets = [*(one.redis_conf.parent / "async-email.key" for one in machines), first.bundle, first.operator]
    secrets += [path for one in machines for path in (one.redis_conf, one.sentinel_conf)]
    assert {mode(path) for path in secrets} == {0o600}  # the service is in the group of Redis
    for name in ("redis_url", "api_keys"):
        assert len({(one.credentials / name).read_text() for one in machines}) == 1
    key = hash(first.new_key)
    assert [hash(one.new_key) == key for one in others] == [False, False]
    assert settings_of(others[1]).redis_replicas == 1
    assert [one.redis_conf.read_text().count("\nreplicaof ") for one in machines] == [0, 1, 1]
    before = {path: path.read_bytes() for path in first.etc.parent.rglob("*") if path.is_file()}
    set_up(first)
    assert {path: path.read_bytes() for path in first.etc.parent.rglob("*") if path.is_file()} == before


def test_the_hosts_are_those_of_the_first_time(machines: list[Server]) -> None:
    machines[0].hosts = [*machines[0].hosts, "10.0.0.4"]
    with pytest.raises(Fault, match="--hosts must be 127"):
        several.set_up_machines(machines[0])


def test_a_host_of_the_api_alone_gets_what_a_client_needs(
    machines: list[Server], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = machine(tmp_path / "api", monkeypatch, "10.0.0.9", frozenset({"api"}))
    server.bundle, server.joins = machines[0].bundle, True
    set_up(server)
    url, replicas = settings_of(server).redis_url, settings_of(server).redis_replicas
    assert (url, replicas) == (settings_of(machines[0]).redis_url, 1)
    assert server.redis_ca.read_text() == machines[0].redis_ca.read_text()
    assert not any(path.exists() for path in (server.operator, server.redis_conf, server.etc / "machines.json"))


def test_no_word_in_capitals_is_left_to_fill_in(machines: list[Server]) -> None:
    text = "".join(conf.read_text() for one in machines for conf in (one.redis_conf, one.sentinel_conf))
    told = [line for line in text.splitlines() if not line.startswith("#")]
    for word in ("HOST", "PRIMARY", "QUORUM", "SHA256", "PASSWORD", "MAXMEMORY"):
        assert not [line for line in told if word in line]


@pytest.mark.parametrize(
    ("roles", "hosts", "fault"),
    [
        ("redis,mail", "", "--role must be one or several of redis, sentinel, api, worker; not mail"),
        ("redis", "", "the first machine needs --hosts, and each other --join"),
        ("redis", "10.0.0.1,h2,10.0.0.3", "must be IPv4 addresses of the private network, and h2 is none"),
        ("redis", "10.0.0.1,10.0.0.2", "must be three addresses or more"),
        ("redis", "10.0.0.1,10.0.0.2,10.0.0.3", "must begin with an address of this machine; 10.0.0.1 is none"),
        ("", "10.0.0.1,10.0.0.2,10.0.0.3", "--hosts and --join need --role"),
    ],
)
def test_what_cannot_be_is_said(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    roles: str,
    hosts: str,
    fault: str,
) -> None:
    server = machine(tmp_path, monkeypatch, "10.0.0.9", frozenset())
    monkeypatch.setattr(install, "Server", lambda *_, **__: server)
    monkeypatch.setattr(install, "INSTALL", (("", several.set_up_machines),))
    assert install.main([*(["--role", roles] if roles else []), *(["--hosts", hosts] if hosts else [])]) == 1
    assert fault in capsys.readouterr().err


def test_a_redis_alone_is_not_made_one_of_several_unasked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    server = machine(tmp_path, monkeypatch, "10.0.0.1")
    server.hosts = ["10.0.0.1", "10.0.0.2", "10.0.0.3"]
    server.write(server.redis_conf, "port 0\n", 0o640)
    with pytest.raises(Fault, match="move it away"):
        set_up(server)


def test_one_machine_becomes_the_first_of_three_with_its_keys_and_its_queue(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = machine(tmp_path, monkeypatch, "10.0.0.1", frozenset())
    install.configure(server)
    keys, url = (server.credentials / "api_keys").read_text(), server.credentials / "redis_url"
    assert url.read_text().startswith("unix:")
    server.write(server.redis_data / "appendonlydir/appendonly.aof.1.base.rdb", "the queue", 0o600)
    server.roles, server.hosts = ALL, ["10.0.0.1", "10.0.0.2", "10.0.0.3"]
    set_up(server)
    assert url.read_text().startswith("rediss+sentinel:")
    assert (server.credentials / "api_keys").read_text() == keys
    assert sorted(path.name for path in server.redis_data.iterdir()) == ["appendonlydir", "first-start"]


@pytest.mark.parametrize(
    ("role", "on"),
    [
        ("api", ["async-email-api.service", "async-email-api.socket"]),
        (
            "worker",
            [*("async-email-dashboard.service", "async-email-worker@email.service", "async-email-worker@jobs.service")],
        ),
        ("redis", []),
    ],
)
def test_a_role_turns_on_what_it_needs_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, noted: list[str], role: str, on: list[str]
) -> None:
    server = machine(tmp_path, monkeypatch, "10.0.0.9", frozenset({role}))
    (server.nginx / "sites-enabled").mkdir(parents=True)
    (server.nginx / "sites-available").mkdir()
    server.write(server.env, "SUBMISSION_LISTEN=127.0.0.1:2525\nWEBHOOK_URL=https://a.example\n", 0o600)
    for step in (services.start_services, site.set_up_nginx, smtp_in.set_up_submission, webhooks.set_up_webhooks):
        step(server)
    words = {word for command in noted if " enable" in command for word in command.split() if "." in word}
    beside = {"api": {"nginx.service", smtp_in.SOCKET}, "worker": {webhooks.SERVICE}}.get(role, set())
    assert words == {*on, *beside, "async-email.target"}


def with_tls() -> str:
    for program in [*redis_servers(), shutil.which("redis-server")]:
        if program and "libssl" in subprocess.run(["ldd", program], capture_output=True, text=True).stdout:
            return program
    return pytest.skip("no redis-server with TLS: TEST_REDIS_SERVERS names none")


@pytest.fixture
def running(machines: list[Server]) -> Iterator[dict[Path, subprocess.Popen[bytes]]]:
    """The processes by their configuration."""
    program = with_tls()
    processes = dict[Path, subprocess.Popen[bytes]]()
    for server in machines:
        under = server.etc.parents[1]
        for conf in (server.redis_conf, server.sentinel_conf):
            text = conf.read_text().replace("/etc/", f"{under}/etc/").replace("dir /tmp", f"dir {under}")
            text = text.replace("unixsocket /run/", "#").replace("unixsocketperm", "#")
            conf.write_text(text.replace("/var/lib/", f"{under}/var/lib/"))
            mode_of = ["--sentinel"] if conf == server.sentinel_conf else []
            processes[conf] = start([program, str(conf), *mode_of], conf.with_suffix(".log"))
    try:
        yield processes
    finally:
        for process in processes.values():
            kill_group(process)


def test_under_what_is_written_they_replicate_and_the_primary_can_be_another(
    machines: list[Server], running: dict[Path, subprocess.Popen[bytes]]
) -> None:
    """By TLS, and each user with no more rights than it has."""
    first = machines[0]
    url = settings_of(first).redis_url.get_secret_value()
    sentinels = gate.parse_url(url, str(first.redis_ca))

    def is_whole() -> bool:
        views = gate.ask_all(sentinels)
        return [sum(view.replicas.values()) for view in views] == [2] * 3

    eventually(is_whole)
    with connect(url + f"&ssl_ca_certs={first.redis_ca}", retrying=True) as client:
        client.set("mail", "1")
        assert client.wait(2, 5000) == 2
        forbidden = ("FLUSHALL", "REPLICAOF NO ONE", "CLIENT PAUSE 1", "CONFIG REWRITE", "PUBLISH __sentinel__:hello x")
        for command in forbidden:
            with pytest.raises(redis.exceptions.NoPermissionError):
                client.execute_command(*command.split())
    with gate.conversation(sentinels.addresses[0], (sentinels.user, sentinels.password), sentinels.context) as ask:
        for words in (("SENTINEL", "FAILOVER", "mymaster"), ("SENTINEL", "REMOVE", "mymaster"), ("SHUTDOWN",)):
            with pytest.raises(OSError, match="NOPERM"):
                ask(*words)
    old, new = failover.fail_over(sentinels, json.loads(first.bundle.read_text())["passwords"]["operator"])
    assert (old[0], new != old) == (sentinels.addresses[0][0], True)
    eventually(is_whole)
    with connect(url + f"&ssl_ca_certs={first.redis_ca}", retrying=True) as client:
        assert client.get("mail") == b"1"
        client.set("mail", "2")
        eventually(lambda: client.wait(2, 1000) == 2)  # the old primary gets all of it anew
    eventually(lambda: f"replicaof {new[0]} 6380" in first.redis_conf.read_text())
    kill_group(running[next(one for one in machines if one.etc.parents[1].name == new[0][-1]).redis_conf])
    eventually(lambda: gate.primary_of(gate.ask_all(sentinels), sentinels) not in (None, new))  # they ask each other


def test_certificates_are_such_as_strict_readers_take(machines: list[Server]) -> None:
    """Python 3.13 looks closer than OpenSSL does."""
    for server in machines:
        context = ssl.create_default_context(cafile=str(server.redis_ca))
        context.verify_flags |= ssl.VERIFY_X509_STRICT
        certificate = server.redis_conf.parent / "async-email.crt"
        checked = ["openssl", "verify", "-x509_strict", "-CAfile", str(server.redis_ca), str(certificate)]
        assert subprocess.run(checked, capture_output=True).returncode == 0
        ssl.create_default_context().load_cert_chain(certificate, certificate.with_suffix(".key"))
        assert os.access(server.redis_ca, os.R_OK)
