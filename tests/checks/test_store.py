"""Redis: one that does not answer, does not accept us, would lose mail or has no room is named."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
from redis import Redis
from redis.exceptions import ResponseError

from ops.checks import flow, store
from ops.checks.findings import FAULT, NOTE, OK, WARN, Findings
from ops.checks.target import Target
from queues.connection import weaknesses
from settings import Settings
from tests.checks.support import PASSWORD, Said, Server, assert_finds, listed, of, worst
from tests.redis_troubles import disk_refuses
from tests.scripted_relay import ScriptedRelay, raw
from tests.servers import RedisServer, eventually, free_port

Check = Callable[[Target, Settings], Findings]


def at(port: int, login: str = "") -> Settings:
    return of(redis_url=f"redis://{login}127.0.0.1:{port}/0")


def test_a_good_redis_is_fine_in_every_respect(target: Target, tmp_path: Path) -> None:
    options = ("--maxmemory-policy", "noeviction", "--maxmemory", "64mb")
    with RedisServer(tmp_path, "--requirepass", PASSWORD, *options, password=PASSWORD) as redis:
        for check in (store.reachable, store.append_only_file, store.memory, store.clock):
            assert worst(check(target, of(redis_url=redis.url))).level == OK


def test_redis_that_is_not_running_is_named_with_how_to_start_it(target: Target, server: Server) -> None:
    settings = at(free_port())
    assert_finds(store.reachable(target, settings), FAULT, "connection refused", "bin/dev")
    assert_finds(store.reachable(server.target, settings), FAULT, "connection refused", "enable --now redis-server")
    settings = of(redis_url=f"unix://{server.folder}/none.sock")
    assert_finds(store.reachable(target, settings), FAULT, "no such file", "bin/dev")


@pytest.mark.parametrize(("given", "said"), [("", "wants a password"), (":wrong@", "does not accept our user")])
def test_a_password_that_redis_does_not_take_is_named(target: Target, tmp_path: Path, given: str, said: str) -> None:
    with RedisServer(tmp_path, "--requirepass", PASSWORD, password=PASSWORD) as redis:
        assert_finds(store.reachable(target, at(redis.port, given)), FAULT, said, "REDIS_URL")


def test_what_is_not_redis_is_named(target: Target) -> None:
    with ScriptedRelay() as other:
        said = store.reachable(target, at(other.port))
        assert_finds(said, FAULT, "does not speak redis://", "correct REDIS_URL")


def test_localhost_that_stands_for_an_address_without_redis_is_named(
    target: Target, redis_server: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    both = [(socket.AF_INET, 1, 6, "", (host, redis_server.port)) for host in ("127.0.0.2", "127.0.0.1")]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: both)
    settings = of(redis_url=f"redis://localhost:{redis_server.port}/0")
    assert_finds(store.reachable(target, settings), WARN, "answers only at 127.0.0.1", "write 127.0.0.1 in REDIS_URL")


def test_a_socket_that_the_service_may_not_use_is_named(server: Server, tmp_path: Path) -> None:
    path = server.folder / "redis.sock"
    with RedisServer(tmp_path, "--unixsocket", str(path), "--unixsocketperm", "700"):
        settings = of(redis_url=f"unix://{path}")
        assert_finds(store.reachable(server.target, settings), FAULT, "nobody may not use", "usermod -aG redis nobody")
        path.chmod(0o777)
        assert worst(store.reachable(server.target, settings)).level == OK


EVICTING = "--maxmemory-policy allkeys-lru"


@pytest.mark.parametrize(
    ("options", "check", "said"),
    [
        ("--appendonly no", store.append_only_file, (FAULT, "keeps no append-only file", "CONFIG SET appendonly")),
        (EVICTING, store.memory, (WARN, "drops mail silently", "noeviction")),
        (f"{EVICTING} --maxmemory 64mb", store.memory, (FAULT, "evicts mail", "noeviction")),
        ("--maxmemory 1000", store.memory, (FAULT, "out of memory", "raise maxmemory")),
        ("--maxmemory 1000gb", store.memory, (WARN, "of this machine's", "lower maxmemory")),
        ("--replicaof 127.0.0.1 1", store.reachable, (FAULT, "a replica", "name the primary")),
    ],
)
def test_a_redis_that_would_lose_mail_is_named(
    target: Target, tmp_path: Path, options: str, check: Check, said: Said
) -> None:
    with RedisServer(tmp_path, *options.split()) as redis:
        assert_finds(check(target, at(redis.port)), *said)


def test_every_weakness_of_redis_has_a_fix(target: Target) -> None:
    failing = {"aof_last_write_status": "err", "rdb_last_bgsave_status": "err"}
    info = {"maxmemory": 1, "used_memory": 1, "role": "slave", **failing}
    names = [name for name, _ in weaknesses(info)]
    assert len(names) == 6
    for url in ("redis://10.0.0.5/0", "unix:///run/redis-async-email/redis.sock"):
        assert len(listed(store.weak(info, store.address(of(redis_url=url)), target, *names))) == 6


def test_a_redis_that_runs_half_a_transaction_is_named(server: Server) -> None:
    """But not Valkey from version 9 on, nor our own where its unit cuts that off first."""
    redis, valkey = {"redis_version": "7.0.15"}, {"redis_version": "7.2.4", "valkey_version": "9.1.2"}
    theirs, ours = "redis://10.0.0.5/0", "unix:///run/redis-async-email/redis.sock"

    def found(info: dict[str, str], url: str) -> list[str]:
        return [one.level for one in store.half_run(info, store.address(of(redis_url=url)), server.target)]

    assert found(redis, theirs) == found(valkey | {"valkey_version": "8.1.0"}, theirs) == [NOTE]
    assert found(valkey, theirs) == []
    assert found(redis, ours) == [WARN]
    server.write("show", "ExecStartPre={ path=/usr/bin/setpriv ; argv[]=setpriv python3 /opt/async-email/aof.py }\n")
    assert found(redis, ours) == [WARN]  # it has the unit, and not what this runs
    server.write("opt/aof.py", "")
    assert found(redis, ours) == []


def test_an_old_redis_a_full_disk_and_a_wrong_clock_are_named(
    target: Target, redis_server: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = at(redis_server.port)
    monkeypatch.setattr(store, "OLDEST", (99, 0))
    assert_finds(store.reachable(target, settings), FAULT, "is too old", "upgrade")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=300 * 2**20))
    assert_finds(store.append_only_file(target, settings), WARN, "300 MB free", "make room")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=2**20))
    assert_finds(store.append_only_file(target, settings), FAULT, "will soon refuse mail", "make room")
    now = time.time
    monkeypatch.setattr(time, "time", lambda: now() - 3600)
    assert_finds(store.clock(target, settings), WARN, "differs from ours by 60 min", "timedatectl set-ntp true")


def test_a_redis_that_cannot_write_its_files_is_named(target: Target, tmp_path: Path) -> None:
    with RedisServer(tmp_path) as redis, redis.client() as client:
        settings = at(redis.port)
        with disk_refuses(redis):
            assert_finds(store.append_only_file(target, settings), FAULT, "cannot write its snapshot", "df -h")
        shutil.rmtree(tmp_path / "appendonlydir")
        (tmp_path / "appendonlydir").touch()
        with pytest.raises(ResponseError, match="server logs"):
            client.bgrewriteaof()
        eventually(lambda: client.info()["aof_last_bgrewrite_status"] == "err")
        assert_finds(store.append_only_file(target, settings), FAULT, "cannot rewrite its append-only file", "df -h")


def test_a_redis_that_takes_no_more_is_named(target: Target, tmp_path: Path) -> None:
    with RedisServer(tmp_path) as redis, redis.client() as client:
        client.config_set("maxmemory", int(client.info()["used_memory"] * 1.2))
        assert_finds(store.memory(target, at(redis.port)), FAULT, "out of memory", "let the workers drain")
        client.config_set("maxmemory", 150 << 20)
        for number in range(10):
            client.set(f"filling:{number}", "x" * (10 << 20))
        assert_finds(store.memory(target, at(redis.port)), WARN, "it is nearly full", "raise maxmemory")
        client.config_set("maxclients", 1)
        assert_finds(store.reachable(target, at(redis.port)), FAULT, "as many clients as it allows", "maxclients")


def test_a_redis_that_refuses_to_tell_is_named(target: Target, tmp_path: Path) -> None:
    with RedisServer(tmp_path) as redis, redis.client() as client:
        client.execute_command("ACL", "SETUSER", "ada", "on", f">{PASSWORD}", "~*", "+@all", "-info")
        settings = at(redis.port, f"ada:{PASSWORD}@")
        assert_finds(store.reachable(target, settings), FAULT, "ACL refuses us PING or INFO", "+info")
    for said, found in ((b"-LOADING it reads\r\n" * 9, "still reading"), (b"-ERR no\r\n" * 9, "refuses PING or INFO")):
        with ScriptedRelay({"GREETING": raw(said)}) as there:
            assert_finds(store.reachable(target, at(there.port)), FAULT, found, "journalctl")
    settings = of(redis_url="redis://redis.nowhere.invalid/0")
    assert_finds(store.reachable(target, settings), FAULT, "redis.nowhere.invalid cannot be resolved", "correct it")


def test_a_redis_that_hangs_reads_or_cannot_write_is_called_that(
    target: Target, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They were called another protocol, a Redis without a file, and a refusal of PING."""
    with RedisServer(tmp_path) as redis:
        os.kill(redis.process.pid, signal.SIGSTOP)
        assert_finds(store.reachable(target, at(redis.port)), FAULT, "does not answer", "swapping")
        os.kill(redis.process.pid, signal.SIGCONT)
    with monkeypatch.context() as patch:
        patch.setattr(Redis, "info", lambda *_: {"redis_version": "7.0.15", "loading": 1, "aof_enabled": 0})
        said = listed(store.append_only_file(target, at(1)))
    assert [(one.level, "still reading" in one.found) for one in said] == [(NOTE, True)]
    with RedisServer(tmp_path) as redis, disk_refuses(redis):
        assert worst(store.reachable(target, at(redis.port))).level == OK
        assert_finds(store.append_only_file(target, at(redis.port)), FAULT, "cannot write its snapshot", "df -h")


def test_an_acl_without_dangerous_commands_is_enough_for_the_doctor(target: Target, tmp_path: Path) -> None:
    rules = f"async-email on >{PASSWORD} ~* &* +@all -@dangerous -@admin +info"
    with RedisServer(tmp_path, "--maxmemory-policy", "noeviction") as redis, redis.client() as client:
        client.execute_command("ACL", "SETUSER", *rules.split())
        settings = at(redis.port, f"async-email:{PASSWORD}@")
        for check in (store.reachable, store.append_only_file, store.memory, store.clock, flow.waiting):
            assert worst(check(target, settings)).level in (OK, NOTE)
