"""What starts first: a Redis with replicas, or another as the primary. The table of ops/gate.py, and real Sentinels."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from ops import gate
from tests.sentinels import Server, Set, sentinel_set
from tests.servers import ROOT, eventually, kill_group, start

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


class Gates:
    """Lets each Redis of a set start, as soon as its gate does."""

    def __init__(self, servers: Set, directory: Path) -> None:
        self.servers, self.directory = servers, directory
        (directory / "url").write_text(f"{servers.url}\n")

    def log(self, server: Server) -> Path:
        return self.directory / f"gate-{server.port}.log"

    def open(self, server: Server) -> subprocess.Popen[bytes]:
        arguments = [str(self.directory / "url"), "", str(server.file), str(server.file.parent)]
        return start([sys.executable, "-I", str(ROOT / "ops/gate.py"), *arguments], self.log(server))

    def start(self, *servers: Server) -> None:
        gates = {server: self.open(server) for server in servers}
        try:
            while gates:
                server = eventually(lambda: next((one for one, gate in gates.items() if gate.poll() is not None), None))
                assert server
                assert gates.pop(server).returncode == 0, self.log(server).read_text()
                server.start()
                eventually(server.answers)
        finally:
            for process in gates.values():
                kill_group(process)

    def roles(self) -> list[str]:
        return [str(server.client.info("replication")["role"]) for server in self.servers.data]


@pytest.fixture
def gates(tmp_path: Path) -> Iterator[Gates]:
    with sentinel_set(tmp_path, down_after=2000) as servers:
        yield Gates(servers, tmp_path)


def test_a_primary_that_crashed_comes_back_as_a_replica_of_the_next(gates: Gates) -> None:
    first = gates.servers.data[0]
    first.kill()
    gates.start(first)
    eventually(lambda: (gates.roles()[0], sorted(gates.roles())) == ("slave", ["master", "slave", "slave"]))
    assert "another must be promoted if any can" in gates.log(first).read_text()


def test_after_a_power_cut_the_old_primary_is_first_and_has_all_of_it(gates: Gates) -> None:
    """Its replicas wait for it, however much earlier they are there."""
    first, *others = gates.servers.data
    first.client.set("mail", "1")
    assert first.client.wait(2, 5000) == 2
    for server in gates.servers.data:
        server.kill()
    gates.start(*others, first)
    assert gates.roles() == ["master", "slave", "slave"]
    assert first.client.get("mail") == "1"


def test_where_most_sentinels_do_not_answer_nothing_starts(gates: Gates) -> None:
    first = gates.servers.data[0]
    for server in (first, *gates.servers.sentinels[1:]):
        server.kill()
    waiting = gates.open(first)
    try:
        eventually(lambda: "most of the 3 Sentinels must answer, and 1 did" in gates.log(first).read_text())
        assert waiting.poll() is None
        (first.file.parent / "first-start").touch()
        assert waiting.wait(30) == 0
    finally:
        kill_group(waiting)
