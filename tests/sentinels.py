"""A primary, replicas and Sentinels that a test starts for itself, on loopback and free ports."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import redis

from tests.servers import REDIS_SERVER, eventually, free_port

COMMON = """
bind 127.0.0.1
port {port}
dir {directory}
logfile {directory}/log
protected-mode no
"""
DATA = """
appendonly yes
save ""
repl-diskless-sync-delay 0
repl-ping-replica-period 1
requirepass secret
masterauth secret
{replicaof}
"""
SENTINEL = """
sentinel monitor mymaster 127.0.0.1 {primary} 2
sentinel auth-pass mymaster secret
sentinel down-after-milliseconds mymaster {down_after}
sentinel failover-timeout mymaster 10000
requirepass "sentinel's"
sentinel sentinel-pass "sentinel's"
"""


class Server:
    """One redis-server, a Sentinel or not."""

    def __init__(self, place: Path, port: int, words: str, *, is_sentinel: bool, program: str) -> None:
        place.mkdir()
        self.port, self.program, self.is_sentinel = port, program, is_sentinel
        self.file = place / "redis.conf"
        self.file.write_text(COMMON.format(port=port, directory=place) + words)
        password = "sentinel's" if is_sentinel else "secret"
        self.client = redis.Redis(port=port, password=password, socket_timeout=2, decode_responses=True)
        self.start()

    def start(self) -> None:
        words = [self.program, str(self.file), *(["--sentinel"] if self.is_sentinel else [])]
        self.process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def answers(self) -> bool:
        try:
            return bool(self.client.ping())
        except redis.RedisError:
            return False

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()


class Set:
    """Three Redis, the first of which is the primary, and three Sentinels."""

    def __init__(self, directory: Path, *, replicas: int = 2, down_after: int = 3000, program: str = "") -> None:
        program = program or str(REDIS_SERVER)
        ports = [free_port() for _ in range(replicas + 1)]
        self.data, self.sentinels = list[Server](), list[Server]()
        try:
            for port in ports:
                words = DATA.format(replicaof=f"replicaof 127.0.0.1 {ports[0]}" if self.data else "")
                self.data.append(Server(directory / f"{port}", port, words, is_sentinel=False, program=program))
            eventually(self.replicates)  # a Sentinel that sees no replica at first looks again after ten seconds
            words = SENTINEL.format(primary=ports[0], down_after=down_after)
            for port in [free_port() for _ in range(3)]:
                self.sentinels.append(Server(directory / f"{port}", port, words, is_sentinel=True, program=program))
        except BaseException:
            self.stop()
            raise

    @property
    def url(self) -> str:
        places = ",".join(f"127.0.0.1:{one.port}" for one in self.sentinels)
        return f"redis+sentinel://:secret@{places}/mymaster/0?sentinel_password=sentinel%27s"

    def replicates(self) -> bool:
        try:
            states: list[Any] = [one.client.info("replication") for one in self.data[1:]]
        except redis.RedisError:
            return False
        return all(one["master_link_status"] == "up" for one in states)

    def is_complete(self) -> bool:
        """Returns whether replicas are in step, and each Sentinel knows all others and all replicas."""
        expected = len(self.data) - 1, len(self.sentinels) - 1
        try:
            known: list[Any] = [one.client.sentinel_master("mymaster") for one in self.sentinels]
        except (redis.RedisError, KeyError):
            return False
        return self.replicates() and all((one["num-slaves"], one["num-other-sentinels"]) == expected for one in known)

    def primary(self) -> Server:
        """Returns the one that the Sentinels name."""
        place: Any = self.sentinels[-1].client.sentinel_get_master_addr_by_name("mymaster")
        return next(one for one in self.data if one.port == int(place[1]))

    def stop(self) -> None:
        for one in [*self.sentinels, *self.data]:
            one.kill()
            one.client.close()


@contextmanager
def sentinel_set(directory: Path, **how: Any) -> Iterator[Set]:
    started = Set(directory, **how)
    try:
        eventually(started.is_complete)
        yield started
    finally:
        started.stop()
