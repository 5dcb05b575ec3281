"""Checks Redis or Valkey: whether it answers the service, keeps what it is given, and has room for more.

Sends only INFO, PING, TIME and, where the ACL allows it, CONFIG GET: monitoring must not change anything.
https://redis.io/docs/latest/operate/oss_and_stack/management/persistence/
"""

from __future__ import annotations

import errno
import re
import shutil
import socket
import stat
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from redis import Redis
from redis.exceptions import AuthenticationError, BusyLoadingError, NoPermissionError, RedisError, ResponseError
from redis.exceptions import TimeoutError as NoAnswer

from ops.checks import system
from ops.checks.findings import FAULT, Finding, Findings, fault, lasting, note, ok, sized, warn
from ops.checks.system import denied_at, find_user, run
from ops.checks.target import Target
from process.values import is_loopback
from queues.connection import CANNOT_NOW, connect, is_full, weaknesses, why_unavailable
from queues.primary import BEING_REPLACED, NO_MAJORITY
from settings import Settings

OUR_CONF, OUR_SOCKETS = "/etc/redis/redis-async-email.conf", "/run/redis-async-email"
OLDEST = (6, 2)  # has BLMOVE, without which a killed worker loses the job it has just popped
OUR_UNIT = "redis-server@async-email.service"
LITTLE = 512 * 2**20  # bytes of disk
LOOK = "df -h; sudo journalctl -u 'redis*' -n 20 says why"
MAX_SKEW = 5  # seconds between two clocks


class Address(NamedTuple):
    """REDIS_URL without its secrets."""

    host: str
    port: int
    path: str  # of a unix socket, or ""
    encrypted: bool

    def __str__(self) -> str:
        return self.path or f"{self.host}:{self.port}"

    @property
    def is_here(self) -> bool:
        return bool(self.path) or is_loopback(self.host)

    @property
    def is_our_own(self) -> bool:
        """Returns whether it is the instance that bin/install makes."""
        return self.path.startswith(OUR_SOCKETS)

    @property
    def cli(self) -> str:
        return f"redis-cli -s {self.path}" if self.path else f"redis-cli -h {self.host} -p {self.port}"


def address(settings: Settings) -> Address:
    """Returns where Redis is; of several, the primary that the Sentinels name, or named last."""
    url = settings.redis
    kwargs = connect(url).connection_pool.connection_kwargs
    host, port = kwargs.get("host", "localhost"), int(kwargs.get("port", 6379))
    if primary := kwargs.get("primary"):
        with suppress(RedisError):
            primary.look()
        host, port = primary.at or (primary.sentinels.name, port)
    return Address(host, port, kwargs.get("path", ""), url.startswith("rediss"))


def client(settings: Settings) -> Redis:
    return connect(settings.redis)


def reachable(target: Target, settings: Settings) -> Findings:
    """Checks the connection, then the password, then the version, each with a fix of its own."""
    if primary := client(settings).connection_pool.connection_kwargs.get("primary"):
        primary.find()  # else there is nothing to check; replication.py says why
    at = address(settings)
    troubles = list(connection_trouble(at, target))
    yield from troubles
    if any(one.level == FAULT for one in troubles):
        return
    with client(settings) as redis:
        trouble = refused(redis, at, target)
        if trouble:
            yield trouble
            return
        info: dict[str, Any] = redis.info()
    yield ok(f"{program(info)} answers at {at}")
    numbers = tuple(int(number) for number in info["redis_version"].split(".")[:2])
    if numbers < OLDEST:
        found = f"{program(info)} is too old: 6.2 is needed, or a killed worker loses a mail"
        yield fault(found, "upgrade it: https://redis.io/docs/latest/operate/oss_and_stack/install/")
    yield from weak(info, at, target, "replica")


def connection_trouble(at: Address, target: Target) -> Findings:
    """Tries the socket, or every address of the name as clients do, one after the other."""
    places: list[tuple[int, Any]] = [(socket.AF_UNIX, (at.path,))]
    if not at.path:
        try:
            places = [(one[0], one[4]) for one in socket.getaddrinfo(at.host, at.port, type=socket.SOCK_STREAM)]
        except OSError:
            yield fault(f"REDIS_URL: the name {at.host} cannot be resolved", f"correct it in {target.file}")
            return
    answering, refusing = [], {}
    for family, place in places:
        with socket.socket(family) as sock:
            sock.settimeout(target.timeout / len(places))
            try:
                sock.connect(at.path or place)
                answering.append(place[0])
            except OSError as error:
                refusing[place[0]] = error
    if not answering:
        first = next(iter(refusing.values()))
        silent = isinstance(first, TimeoutError)
        why = "it is silent" if silent else (first.strerror or type(first).__name__).lower()
        yield fault(f"Redis does not answer at {at}: {why}", how_to_reach(first, at, target))
        return
    if refusing:
        found = f"{at.host} means {', '.join([*answering, *refusing])}, and Redis answers only at {answering[0]}"
        yield warn(found, f"write {answering[0]} in REDIS_URL instead of {at.host}: {target.file}")
    user = find_user(target.user) if at.path and target.installed else None
    closed = denied_at(user, Path(at.path), 2) if user else None
    if closed:
        is_socket = stat.S_ISSOCK(closed.stat().st_mode)
        fix = f"sudo usermod -aG redis {target.user}; write unixsocketperm 770 into {OUR_CONF}, and restart it"
        found = f"the user {target.user} may not use {at}: {closed} denies it"
        yield fault(found, fix if is_socket else f"sudo chmod o+x {closed}")


def how_to_reach(error: OSError, at: Address, target: Target) -> str:
    if error.errno == errno.EACCES:
        return f"run as root: sudo bin/doctor (or open {at} to this user)"
    if isinstance(error, TimeoutError):
        return f"allow this machine in Redis' firewall or security group, port {at.port}"
    if at.is_our_own:
        return (
            "sudo systemctl enable --now redis-server@async-email; sudo journalctl -u redis-server@async-email says why"
        )
    if at.is_here:
        if target.installed:
            return "sudo systemctl enable --now redis-server (or valkey-server)"
        return "bin/dev brings one of its own, which is then looked at; on a server sudo bin/install does"
    return f"start Redis there, or correct REDIS_URL in {target.file}"


def refused(redis: Redis, at: Address, target: Target) -> Finding | None:
    try:
        redis.ping()
        redis.info()
    except AuthenticationError:
        given = redis.connection_pool.connection_kwargs.get("password")
        trouble = "does not accept our user and password" if given else "wants a password and REDIS_URL has none"
        return fault(f"Redis at {at} {trouble}", password(target))
    except NoPermissionError:
        return fault("Redis' ACL refuses us PING or INFO", "give the user +@all -@dangerous -@admin +info: ACL SETUSER")
    except ResponseError as error:
        if "MISCONF" in f"{error.status_code} {error}":  # it answers; what it cannot write is said by the next check
            return None
        return fault(f"Redis at {at} refuses PING or INFO", "see its log: sudo journalctl -u 'redis*'")
    except BusyLoadingError:
        return fault(
            "Redis is still reading its append-only file", "wait, and try again; sudo journalctl -u 'redis*' -f"
        )
    except NoAnswer:
        fix = "systemctl status 'redis*', top: it may be stopped, swapping, or busy with one command"
        return fault(f"Redis at {at} takes a connection and does not answer", fix)
    except (RedisError, OSError) as error:
        if "max number of clients" in str(error):  # redis-py makes it a ConnectionError like any other
            return fault("Redis has as many clients as it allows", "raise its maxclients, or lower WORKER_CONCURRENCY")
        if (why := why_unavailable(error)) in (BEING_REPLACED, NO_MAJORITY, CANNOT_NOW["READONLY"]):
            return fault(f"{why} ({at})", "wait half a minute, and look again")
        protocol = "rediss://" if at.encrypted else "redis://"
        return fault(f"what answers at {at} does not speak {protocol}", f"correct REDIS_URL in {target.file}")
    return None


def password(target: Target) -> str:
    if target.installed:
        return (
            f"put the right one into {target.etc}/credentials/redis_url; or move {OUR_CONF} away, and restart Redis "
            "after sudo bin/install, which writes a new one (the queue stays)"
        )
    return "REDIS_URL=redis://USER:PASSWORD@HOST:PORT/0, with / # ? : @ in the password as %2F %23 %3F %3A %40"


def program(info: dict[str, Any]) -> str:
    return f"Valkey {info['valkey_version']}" if "valkey_version" in info else f"Redis {info['redis_version']}"


def weak(info: dict[str, Any], at: Address, target: Target, *names: str) -> Findings:
    """Yields those of `weaknesses` that have one of these names, each with its fix here."""
    for name, sentence in weaknesses(info):
        if name in names:
            yield fault(re.split("[:;] ", sentence)[0], fix_of(name, at, target))


def append_only_file(target: Target, settings: Settings) -> Findings:
    """Checks that it is on, that it is written, and that it has room."""
    at = address(settings)
    with client(settings) as redis:
        info: dict[str, Any] = redis.info()
        if info.get("loading"):  # it says aof_enabled:0 until it is done
            yield note("Redis is still reading its append-only file", "wait, and look again")
            return
        wrong = list(weak(info, at, target, "no_aof", "aof_failing"))
        if not wrong and info.get("aof_last_bgrewrite_status") == "err":
            wrong = [fault("Redis cannot rewrite its append-only file", LOOK)]
        yield from wrong or [ok(f"the append-only file is on and written, {sized(info.get('aof_current_size', 0))}")]
        if not wrong:
            yield from half_run(info, at, target)
        yield from weak(info, at, target, "snapshot_failing")
        if at.is_here:
            yield from disk(folder(redis, target), info.get("aof_current_size", 0))


def half_run(info: dict[str, Any], at: Address, target: Target) -> Findings:
    """Says where nothing cuts an unfinished transaction off the file before Redis starts; Valkey 9 does so itself."""
    if not target.installed or int(info.get("valkey_version", "0").split(".")[0]) >= 9:
        return
    found = f"{program(info)}, if a crash cuts its file within a transaction, runs half of it at its second start"
    if not at.is_our_own:
        fix = "Valkey 9 does not; or run ops/aof.py before each of its starts"
        yield note(f"{found}, and mail may go out twice", fix)
        return
    cuts = "aof.py" in run("systemctl", "show", "-p", "ExecStartPre", OUR_UNIT).stdout
    if not (cuts and (target.opt / "aof.py").exists()):
        yield warn(f"{found}, and mail goes out twice", "sudo bin/install, in your clone: it has that cut off first")


def fix_of(weakness: str, at: Address, target: Target) -> str:
    # Without a restart: Redis, started with the file on, reads the file and nothing else.
    switch_on = f"{at.cli} CONFIG SET appendonly yes, and the same in its file; never only in the file"
    no_eviction = f"{at.cli} CONFIG SET maxmemory-policy noeviction, and the same in its file"
    if at.is_our_own:  # its ACL forbids CONFIG SET
        switch_on = "sudo bin/install, in your clone: it switches it on and loses nothing; do not restart Redis"
        line = "s/^maxmemory-policy .*/maxmemory-policy noeviction/"
        no_eviction = f"sudo sed -i '{line}' {OUR_CONF} && sudo systemctl restart redis-server@async-email"
    return {
        "no_aof": switch_on,
        "aof_failing": LOOK,
        "snapshot_failing": LOOK,
        "evicting": no_eviction,
        "full": "let the workers drain the queue, or raise maxmemory",
        "replica": f"name the primary in REDIS_URL, or the Sentinels that know it: {target.file}",
    }[weakness]


def folder(redis: Redis, target: Target) -> Path | None:
    try:
        configured: dict[Any, Any] = redis.config_get("dir")
        return Path(configured["dir"])
    except (RedisError, KeyError):  # our own ACL forbids it
        return target.redis_data if target.redis_data.is_dir() else None


def disk(path: Path | None, file: int) -> Findings:
    """Checks the space for the append-only file; rewriting it takes its size once more."""
    if path is None or not path.parent.exists():
        yield note("the folder of its append-only file cannot be seen from here, nor how full that disk is")
        return
    free = shutil.disk_usage(path).free
    found, fix = f"{sized(free)} free for its append-only file", f"make room: sudo du -xh {path} | sort -h | tail"
    if free < max(LITTLE / 4, file):
        yield fault(f"{found}: it will soon refuse mail", fix)
    elif free < max(LITTLE, 3 * file):
        yield warn(f"{found}, which is little", fix)
    else:
        yield ok(found)


def memory(target: Target, settings: Settings) -> Findings:
    with client(settings) as redis:
        info: dict[str, Any] = redis.info()
    at, used, most = address(settings), info["used_memory"], info.get("maxmemory", 0)
    policy, machine = info.get("maxmemory_policy", ""), info.get("total_system_memory", 0)
    if at.is_here:  # Redis sees the machine, and not the container around both
        machine = min(machine or sys.maxsize, system.memory())
    yield from weak(info, at, target, "evicting", "full")
    if not most and policy != "noeviction":
        found = f"maxmemory-policy is {policy}: as soon as there is a limit, Redis drops mail silently"
        yield warn(found, fix_of("evicting", at, target))
    if is_full(most, used - info.get("mem_not_counted_for_evict", 0)):
        yield note(f"uses {sized(used)} of {sized(most)}")
    elif most and used > 0.7 * most:
        yield warn(f"it is nearly full: {sized(used)} of {sized(most)}", "see why the queue grows, or raise maxmemory")
    elif machine and (most or used) > 0.75 * machine:
        found = f"it may use {sized(most or used)} of this machine's {sized(machine)}, and needs more while it saves"
        yield warn(found, "lower maxmemory to half of the memory")
    else:
        limit = f"of {sized(most)}" if most else f"and no maxmemory on a machine with {sized(machine)}"
        yield ok(f"uses {sized(used)} {limit}")


def clock(target: Target, settings: Settings) -> Findings:
    """Checks that Redis' clock agrees with ours: retries and heartbeats are times on both machines."""
    with client(settings) as redis:
        before = time.time()
        seconds, micros = redis.time()
    skew = abs(seconds + micros / 1e6 - before)
    if skew > MAX_SKEW:
        fix = "sudo timedatectl set-ntp true, on both machines"
        yield warn(f"Redis' clock differs from ours by {lasting(skew)}", fix)
    else:
        yield ok("Redis' clock agrees with ours")
