"""What starts first: a Redis with replicas, or another as the primary. The table of ops/gate.py, and real Sentinels."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
import redis

from ops import gate
from tests.servers import ROOT, RedisServer, eventually, free_port, kill_group, start

ME, OTHER, THIRD = ("10.0.0.1", 6380), ("10.0.0.2", 6380), ("10.0.0.3", 6380)


def view(primary: gate.Address = ME, up: bool = True, epoch: int = 0, **replicas: bool) -> gate.View:
    known = {"other": OTHER, "third": THIRD, "me": ME}
    return gate.View(epoch, primary, up, {known[name]: is_up for name, is_up in replicas.items()})


HEALTHY = view(OTHER, me=False, third=True)
GONE = view(ME, up=False, other=False, third=False)
TURN = view(ME, up=False, other=True, third=False)


@pytest.mark.parametrize(
    ("primary", "views", "has_data", "waited", "expected"),
    [
        (OTHER, [HEALTHY, HEALTHY], True, 0, OTHER),
        (OTHER, [HEALTHY, HEALTHY], False, 0, OTHER),
        (OTHER, [view(OTHER, up=False)] * 3, True, 59, "must be up before"),
        (OTHER, [HEALTHY, view(OTHER, up=False), view(ME, up=True)], True, 0, "must be up before"),
        (OTHER, [view(OTHER, up=False)] * 3, True, 61, OTHER),
        (ME, [TURN, GONE, GONE], True, 29, "another must be promoted if any can"),
        (ME, [TURN, GONE, GONE], True, 31, None),
        (ME, [view(ME, up=True, other=True)] * 2, True, 0, "another must be promoted if any can"),
        (ME, [GONE] * 3, True, 0, None),
        (ME, [view(ME, me=True)] * 3, True, 0, None),
        (ME, [view(ME)] * 2, False, 0, None),
        (ME, [GONE] * 3, False, 999, "has no data"),
        (ME, [TURN] * 3, False, 999, "has no data"),
    ],
)
def test_what_a_redis_starts_as(
    primary: gate.Address, views: list[gate.View], has_data: bool, waited: float, expected: gate.Address | str | None
) -> None:
    if isinstance(expected, str):
        with pytest.raises(gate.Wait, match=expected):
            gate.decide(primary, views, ME, has_data, waited)
    else:
        assert gate.decide(primary, views, ME, has_data, waited) == expected


def test_most_sentinels_must_answer_and_the_latest_epoch_decides() -> None:
    sentinels = gate.parse_url("redis+sentinel://u:p@a,b:1,c/the%20name/0?sentinel_username=s&sentinel_password=t", "")
    assert sentinels.addresses == (("a", 26379), ("b", 1), ("c", 26379))
    assert sentinels[1:4] == ("the name", "s", "t")
    assert gate.primary_of([view(ME)], sentinels) is None
    assert gate.primary_of([view(ME, epoch=2), view(OTHER, epoch=3)], sentinels) == OTHER


@pytest.mark.parametrize("primary", [OTHER, None])
def test_the_configuration_is_changed_in_one_line_and_keeps_its_mode(
    tmp_path: Path, primary: gate.Address | None
) -> None:
    path = tmp_path / "redis.conf"
    path.write_text('port 0\ntls-port 6380\nreplicaof 10.0.0.9 1\nreplica-announce-ip "10.0.0.1"\nsave 1 1\n')
    path.chmod(0o640)
    assert gate.address_in(path.read_text()) == ME
    gate.make_replica_of(primary, path)
    line = "replicaof 10.0.0.2 6380\n" if primary else ""
    assert path.read_text() == f'port 0\ntls-port 6380\nreplica-announce-ip "10.0.0.1"\nsave 1 1\n{line}'
    assert path.stat().st_mode & 0o777 == 0o640


class Host(RedisServer):
    """A Redis that is started through the gate, by a configuration that is its own."""

    def __init__(self, directory: Path, replica_of: Host | None = None) -> None:
        directory.mkdir()
        super().__init__(directory)
        self.configuration = directory / "redis.conf"
        lines = [f"port {self.port}", "bind 127.0.0.1", "replica-announce-ip 127.0.0.1", f"dir {directory}", 'save ""']
        lines += ["appendonly yes", "repl-diskless-sync-delay 0"]
        lines += [f"replicaof 127.0.0.1 {replica_of.port}"] if replica_of else []
        self.configuration.write_text("\n".join(lines) + "\n")

    def arguments(self) -> list[str]:
        return [str(self.configuration)]

    def role(self) -> str:
        with self.client() as client:
            return str(client.info("replication")["role"])


class Three:
    def __init__(self, directory: Path, undo: ExitStack) -> None:
        self.directory, self.undo = directory, undo
        self.first = Host(directory / "first")
        self.hosts = [self.first, *(Host(directory / name, self.first) for name in ("second", "third"))]
        for host in self.hosts:
            undo.enter_context(host)
        self.ports = [free_port() for _ in range(3)]
        self.url = directory / "url"
        self.url.write_text(f"redis+sentinel://:@{','.join(f'127.0.0.1:{port}' for port in self.ports)}/mymaster/0\n")
        self.sentinels = [self.sentinel(port) for port in self.ports]
        eventually(self.is_whole)

    def sentinel(self, port: int) -> subprocess.Popen[bytes]:
        file = self.directory / f"sentinel-{port}.conf"
        lines = [f"port {port}", "bind 127.0.0.1", f"sentinel monitor mymaster 127.0.0.1 {self.first.port} 2"]
        options = {"down-after-milliseconds": 2000, "failover-timeout": 5000}
        file.write_text("\n".join([*lines, *(f"sentinel {name} mymaster {ms}" for name, ms in options.items()), ""]))
        process = start([self.first.program or "", str(file), "--sentinel"], file.with_suffix(".log"))
        self.undo.callback(kill_group, process)
        return process

    def views(self) -> list[gate.View]:
        return gate.ask_all(gate.parse_url(self.url.read_text().strip(), ""))

    def is_whole(self) -> bool:
        """Each Sentinel knows the other two and both replicas."""
        views = self.views()
        known = [redis.Redis(port=port).sentinel_sentinels("mymaster") for port in self.ports]
        others = [len(list(one)) for one in known if isinstance(one, list)]
        return others == [2] * 3 and [sum(one.replicas.values()) for one in views] == [2] * 3

    def gate(self, host: Host) -> subprocess.Popen[bytes]:
        arguments = [str(self.url), "", str(host.configuration), str(host.directory)]
        command = [sys.executable, "-I", str(ROOT / "ops/gate.py"), *arguments]
        process = start(command, host.directory / "gate.log")
        self.undo.callback(kill_group, process)
        return process

    def start(self, *hosts: Host) -> None:
        """Each as soon as its gate lets it."""
        gates = {host: self.gate(host) for host in hosts}
        while gates:
            host = eventually(lambda: next((host for host, one in gates.items() if one.poll() is not None), None))
            assert host
            assert gates.pop(host).returncode == 0, (host.directory / "gate.log").read_text()
            host.start()


@pytest.fixture
def three(tmp_path: Path) -> Iterator[Three]:
    with ExitStack() as undo:
        yield Three(tmp_path, undo)


def test_a_primary_that_crashed_comes_back_as_a_replica_of_the_next(three: Three) -> None:
    three.first.kill()
    three.start(three.first)
    assert three.first.role() == "slave"
    eventually(lambda: sorted(host.role() for host in three.hosts) == ["master", "slave", "slave"])
    assert "another must be promoted if any can" in (three.first.directory / "gate.log").read_text()


def test_after_a_power_cut_the_old_primary_is_first_and_has_all_of_it(three: Three) -> None:
    """Its replicas wait for it, however much earlier they are there."""
    with three.first.client() as client:
        client.set("mail", "1")
        assert client.wait(2, 5000) == 2
    for host in three.hosts:
        host.kill()
    three.start(*reversed(three.hosts))
    assert [host.role() for host in three.hosts] == ["master", "slave", "slave"]
    with three.first.client() as client:
        assert client.get("mail") == b"1"


def test_where_most_sentinels_do_not_answer_nothing_starts(three: Three) -> None:
    three.first.kill()
    for process in three.sentinels[1:]:
        kill_group(process)
    waiting = three.gate(three.first)
    eventually(lambda: "most of the 3 Sentinels" in (three.first.directory / "gate.log").read_text())
    assert waiting.poll() is None
    (three.first.directory / "first-start").touch()
    assert waiting.wait(30) == 0
