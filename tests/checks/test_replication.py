"""Sentinels and replicas: what would lose mail, or keep a primary from being replaced, is named with its fix."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from ops import restore
from ops.checks import replication, store
from ops.checks.findings import FAULT, NOTE, OK, WARN
from ops.checks.replication import Node, alike, enough
from ops.checks.target import Target
from ops.restore import must_be_alone
from ops.server import Fault
from process.redis_url import Place
from queues import primary
from tests.checks.support import PASSWORD, Said, assert_finds, listed, of
from tests.sentinels import Server, Set, sentinel_set
from tests.servers import RedisServer, eventually

Change = Callable[[Set], object]
GOOD: dict[str, str | int] = {
    "min-replicas-to-write": 1,
    "min-replicas-max-lag": 3,
    "appendonly": "yes",
    "maxmemory": 0,
}


@pytest.fixture(scope="module")
def started(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Set]:
    with sentinel_set(tmp_path_factory.mktemp("redis")) as servers:
        yield servers


@pytest.fixture
def servers(started: Set, monkeypatch: pytest.MonkeyPatch) -> Set:
    """The set, as it should be; each process that a test before has killed runs again."""
    monkeypatch.setattr(primary, "primary_of", primary.Primary)
    for one in [*started.sentinels, *started.data]:
        if one.process.poll() is not None:
            one.start()
        eventually(one.answers)
    for one in started.data:
        may(one, "+@all")
        for name, value in GOOD.items():
            one.client.config_set(name, value)
    for one in started.sentinels:
        told(one, "quorum", 2, "down-after-milliseconds", 3000)
    eventually(started.is_complete)
    return started


def may(one: Server, *words: str) -> object:
    return one.client.execute_command("ACL", "SETUSER", "default", *words)  # type: ignore[no-untyped-call]


def told(one: Server, *words: Any) -> object:
    return one.client.execute_command("SENTINEL", "SET", "mymaster", *words)  # type: ignore[no-untyped-call]


def test_a_good_set_is_fine_and_a_failover_that_is_planned_is_named(servers: Set, target: Target) -> None:
    settings = of(redis_url=servers.url, redis_replicas=1)
    eventually(lambda: {one.level for one in listed(replication.replicas(target, settings))} == {OK, NOTE})
    assert_finds(replication.sentinels(target, settings), OK, "3 of 3 Sentinels answer, and agree")
    assert_finds(replication.replicas(target, settings), OK, "REDIS_REPLICAS is 1, and Redis has 2 replicas: 1 may be")
    assert_finds(replication.replicas(target, settings), NOTE, "bin/failover")
    assert_finds(store.reachable(target, settings), OK, f"answers at 127.0.0.1:{servers.primary().port}")


@pytest.mark.parametrize(
    ("needed", "change", "said"),
    [
        (0, lambda _: None, (WARN, "a failover loses mail that was acknowledged", "REDIS_REPLICAS=1")),
        (2, lambda _: None, (WARN, "while one is away nothing is accepted", "one fewer")),
        (3, lambda _: None, (FAULT, "nothing is confirmed, so nothing is accepted", "start more")),
        (1, lambda one: told(one.sentinels[1], "quorum", 1), (WARN, "the quorum is 1 and 2: it must be", "quorum 2")),
        (1, lambda one: told(one.sentinels[1], "down-after-milliseconds", 999), (WARN, "milliseconds 999", "3000")),
        (1, lambda one: told(one.sentinels[1], "down-after-milliseconds", 60000), (WARN, "for so long", "3000")),
        (1, lambda one: one.sentinels[1].kill(), (WARN, "does not answer", "firewall")),
        (1, lambda one: [each.kill() for each in one.sentinels[1:]], (FAULT, "only 1 of 3 Sentinels", "firewall")),
        (1, lambda one: one.data[2].client.config_set("appendonly", "no"), (FAULT, "no append-only file", "yes")),
        (1, lambda one: one.data[2].client.config_set("maxmemory", "1gb"), (FAULT, "Redis evicts", "noeviction")),
        (1, lambda one: one.data[2].client.config_set("min-replicas-to-write", 0), (WARN, "goes on taking", "min-")),
        (1, lambda one: one.data[2].client.config_set("min-replicas-max-lag", 60), (WARN, "writes for 60 s", "lag 3")),
        (1, lambda one: one.data[2].kill(), (WARN, "does not answer", "systemctl")),
        (1, lambda one: may(one.primary(), "-config"), (NOTE, "lag cannot be seen", "")),
        (1, lambda one: may(one.primary(), "-wait"), (FAULT, "so nothing is accepted: Redis' ACL", "WAIT")),
    ],
)  # fmt: skip
def test_what_is_amiss_is_named(servers: Set, target: Target, needed: int, change: Change, said: Said) -> None:
    assert servers.data[0] is servers.primary()
    servers.data[2].client.config_set("maxmemory-policy", "allkeys-lru")
    change(servers)
    settings = of(redis_url=servers.url, redis_replicas=needed)
    found = [*replication.sentinels(target, settings)]
    found += replication.replicas(target, settings) if said[1] != "only 1 of 3 Sentinels" else []
    assert_finds(iter(found), *said)


def test_a_sentinel_that_does_not_know_us_is_named(servers: Set, target: Target) -> None:
    for url, said in (
        (servers.url.replace("sentinel%27s", "wrong"), "refuses our login"),
        (servers.url.replace("mymaster", "other"), "knows no primary called other"),
    ):
        assert_finds(replication.sentinels(target, of(redis_url=url)), WARN, said, "REDIS_URL")


def test_a_backup_is_brought_back_only_where_no_other_redis_would_overwrite_it(
    servers: Set, target: Target, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("REDIS_URL", servers.url)
    with pytest.raises(Fault, match=f"127.0.0.1:{servers.data[1].port}.* would overwrite it: on each machine but this"):
        must_be_alone(target)
    for one in servers.data:
        one.kill()
    must_be_alone(target)
    monkeypatch.setattr(restore, "is_of_this_machine", lambda _: False)
    with pytest.raises(Fault, match="which is not on this machine"):
        must_be_alone(target)
    monkeypatch.undo()
    assert restore.is_of_this_machine("127.0.0.1")
    assert not restore.is_of_this_machine("192.0.2.1")


def test_one_redis_without_sentinels_is_asked_only_if_replicas_are_to_confirm(
    redis_server: RedisServer, target: Target
) -> None:
    for needed in (0, 1):
        settings = of(redis_url=redis_server.url, redis_replicas=needed)
        assert [*replication.sentinels(target, settings)] == []
    assert_finds(replication.replicas(target, settings), FAULT, "Redis has 0 replicas: nothing is confirmed", "start")
    assert [*replication.replicas(target, of(redis_url=redis_server.url))] == []


PRIMARY = Node(Place("a", 6379), info={"role": "master", "redis_version": "7.0.15"})
ONE, TWO = (PRIMARY._replace(at=Place(name, 6379), info={"role": "slave", "redis_version": "7.0.15"}) for name in "bc")


@pytest.mark.parametrize(
    ("found", "said"),
    [
        (
            lambda it: enough(it, 1, [ONE, TWO._replace(priority=0)], True),
            (WARN, "c:6379 has replica-prio", "=2"),
        ),
        (lambda it: enough(it, 1, [ONE, TWO._replace(priority=9)], True), (WARN, "differ in replica-priority", "100")),
        (lambda it: alike([PRIMARY, ONE._replace(skew=-1.5)]), (WARN, "clock of the Redis at b:6379 differs", "ntp")),
        (lambda it: alike([PRIMARY, ONE._replace(info={"redis_version": "6.2.1"})]), (WARN, "Redis 6.2.1, Re", "upg")),
    ],
)
def test_what_only_the_answers_show_is_named(target: Target, found: Any, said: Said) -> None:
    assert_finds(found(target), *said)
    assert PASSWORD not in str(found)
