"""What can be the matter with Redis, each made real for as long as a block runs."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress

import redis

from tests.servers import RedisServer, eventually, free_port


@contextmanager
def killed(server: RedisServer) -> Iterator[None]:
    server.kill()
    try:
        yield
    finally:
        server.start()


@contextmanager
def stopped(server: RedisServer) -> Iterator[None]:
    """It holds its port and answers nothing, as behind a network that drops packets."""
    os.kill(server.process.pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(server.process.pid, signal.SIGCONT)


@contextmanager
def configured(server: RedisServer, **settings: str | int) -> Iterator[redis.Redis]:
    """With other settings (an underscore for each dash), and afterwards with those of before."""
    changes = {name.replace("_", "-"): value for name, value in settings.items()}
    with server.client() as client:
        before = {name: client.config_get(name)[name] for name in changes}
        for name, value in changes.items():
            client.config_set(name, value)
        try:
            yield client
        finally:
            for name, value in before.items():
                client.config_set(name, value)
            eventually(lambda: not client.info("persistence")["aof_rewrite_in_progress"])


@contextmanager
def full(server: RedisServer) -> Iterator[None]:
    """It holds as much as it may, and drops nothing to take more."""
    with server.client() as client:
        used: int = client.info("memory")["used_memory"]
    with configured(server, maxmemory=used + 200_000) as client:
        with suppress(redis.exceptions.OutOfMemoryError):
            for number in range(1000):
                client.set(f"filling:{number}", "x" * 5_000)
        yield
        client.delete(*client.keys("filling:*"))


@contextmanager
def replica_of_the_dead(server: RedisServer) -> Iterator[None]:
    with server.client() as client:
        client.replicaof("127.0.0.1", str(free_port()))
        try:
            yield
        finally:
            client.replicaof("NO", "ONE")


@contextmanager
def lonely_replica(server: RedisServer) -> Iterator[None]:
    """The same, and it does not even answer questions."""
    with configured(server, replica_serve_stale_data="no"), replica_of_the_dead(server):
        yield


def without_replicas(server: RedisServer) -> AbstractContextManager[object]:
    return configured(server, min_replicas_to_write=1)


@contextmanager
def disk_refuses(server: RedisServer) -> Iterator[None]:
    """A snapshot fails, since a folder is in its place; Redis then takes no writes (MISCONF)."""
    in_the_way = server.directory / "dump.rdb"
    in_the_way.mkdir()
    with configured(server, save="3600 1") as client:
        client.bgsave()
        eventually(lambda: client.info("persistence")["rdb_last_bgsave_status"] == "err")
        yield
        in_the_way.rmdir()
        client.bgsave()
        eventually(lambda: client.info("persistence")["rdb_last_bgsave_status"] == "ok")


@contextmanager
def access_forbidden(server: RedisServer) -> Iterator[None]:
    with server.client() as client:
        client.acl_setuser("default", enabled=True, nopass=True, commands=["-hset"])
        try:
            yield
        finally:
            client.acl_setuser("default", enabled=True, nopass=True, commands=["+@all"])


Trouble = Callable[[RedisServer], AbstractContextManager[object]]
TROUBLES: list[tuple[Trouble, str]] = [
    (killed, "does not answer"),
    (stopped, "does not answer"),
    (full, "out of memory"),
    (replica_of_the_dead, "read-only replica"),
    (lonely_replica, "replica without its master"),
    (without_replicas, "lacks replicas"),
    (disk_refuses, "cannot write to its disk"),
    (access_forbidden, "ACL"),
]
