"""Redis or Valkey: does it answer the service, does it keep what it is given, and has it room for more?

Only INFO, PING, TIME and, where the ACL lets us, CONFIG GET are sent: rule 11 of the design, looking changes nothing.
https://redis.io/docs/latest/operate/oss_and_stack/management/persistence/
"""

from __future__ import annotations

import errno
import shutil
import socket
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from redis import Redis
from redis.exceptions import (
    AuthenticationError,
    BusyLoadingError,
    NoPermissionError,
    RedisError,
    ResponseError,
)

from ops.checks.findings import Finding, Findings, Place, fault, lasting, may, note, ok, run, sized, warn, who_is
from queues.connection import connect
from settings import is_loopback

OUR_CONF, OUR_SOCKETS = "/etc/redis/redis-async-email.conf", "/run/redis-async-email"
OUR_UNIT = "redis-server@async-email.service"
OLDEST = (6, 2)  # RQ's BLMOVE, without which a worker that is killed loses the job it has just popped
LITTLE = 512 * 2**20  # bytes of disk
SECONDS_APART = 5


class Where(NamedTuple):
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


def where(place: Place) -> Where:
    assert place.settings
    url = place.settings.redis_url.get_secret_value()
    kwargs = connect(url).connection_pool.connection_kwargs
    host, port = kwargs.get("host", "localhost"), int(kwargs.get("port", 6379))
    return Where(host, port, kwargs.get("path", ""), url.startswith("rediss:"))


def client(place: Place) -> Redis:
    assert place.settings
    return connect(place.settings.redis_url.get_secret_value())


@contextmanager
def asked(place: Place) -> Iterator[Redis]:
    with client(place) as redis:
        yield redis


def reachable(place: Place) -> Findings:
    """A connection, then the password, then its kind, each with its own remedy."""
    at = where(place)
    refusals = list(socket_trouble(at, place) if at.path else network_trouble(at, place))
    yield from refusals
    if any(one.level == "fault" for one in refusals):
        return
    with asked(place) as redis:
        trouble = refused(redis, at, place)
        if trouble:
            yield trouble
            return
        info: dict[str, Any] = redis.info()
    yield ok(f"{program(info)} answers at {at}")
    yield from fits(info, place)


def socket_trouble(at: Where, place: Place) -> Findings:
    path = Path(at.path)
    with socket.socket(socket.AF_UNIX) as line:
        line.settimeout(place.patience)
        try:
            line.connect(at.path)
        except OSError as error:
            yield fault(f"Redis does not answer at {at}: {reason(error)}", hint(error, at, place))
            return
    user = who_is(place.user) if place.installed else None
    closed = may(user, path, 2) if user else None
    if closed:
        yield fault(f"the user {place.user} may not use {at}: {closed} keeps it out", opened(closed))


def opened(closed: Path) -> str:
    if stat.S_ISSOCK(closed.stat().st_mode):
        return (
            "write unixsocketperm 777 into /etc/redis/redis-async-email.conf (its password guards it), and restart it"
        )
    return f"sudo chmod o+x {closed}"


def network_trouble(at: Where, place: Place) -> Findings:
    """A name may stand for several addresses; the clients try one after the other."""
    try:
        addresses = socket.getaddrinfo(at.host, at.port, type=socket.SOCK_STREAM)
    except OSError:
        yield fault(f"REDIS_URL: the name {at.host} cannot be resolved", f"correct it in {place.file}")
        return
    answering, refusing = [], {}
    for family, _, _, _, address in addresses:
        with socket.socket(family) as line:
            line.settimeout(place.patience / len(addresses))
            try:
                line.connect(address)
                answering.append(str(address[0]))
            except OSError as error:
                refusing[str(address[0])] = error
    if not answering:
        first = next(iter(refusing.values()))
        yield fault(f"Redis does not answer at {at}: {reason(first)}", hint(first, at, place))
    elif refusing:
        found = f"{at.host} stands for {', '.join([*answering, *refusing])}, and Redis answers only at {answering[0]}"
        yield warn(found, f"write {answering[0]} in REDIS_URL instead of {at.host}: {place.file}")


def reason(error: OSError) -> str:
    return "it is silent" if isinstance(error, TimeoutError) else (error.strerror or type(error).__name__).lower()


def hint(error: OSError, at: Where, place: Place) -> str:
    if error.errno == errno.EACCES:
        return f"run as root: sudo bin/doctor (or open {at} to this user)"
    if isinstance(error, TimeoutError):
        return "let this machine through in Redis' firewall or security group, port " + str(at.port)
    if is_our_own(place):
        return (
            "sudo systemctl enable --now redis-server@async-email; journalctl -u redis-server@async-email says why not"
        )
    if at.is_here:
        if place.installed:
            return "sudo systemctl enable --now redis-server (or valkey-server)"
        yours = "REDIS_URL=redis://127.0.0.1:6380/0 bin/doctor"
        return f"bin/dev brings one of its own, and {yours} looks at that; on a server sudo bin/install does"
    return f"start Redis there, or correct REDIS_URL in {place.file}"


def refused(redis: Redis, at: Where, place: Place) -> Finding | None:
    try:
        redis.ping()
        redis.info()
    except AuthenticationError:
        given = redis.connection_pool.connection_kwargs.get("password")
        trouble = "does not accept our user and password" if given else "wants a password and REDIS_URL has none"
        return fault(f"Redis at {at} {trouble}", password(place))
    except NoPermissionError:
        return fault("Redis' ACL refuses us PING or INFO", "give the user +@all -@dangerous -@admin +info: ACL SETUSER")
    except ResponseError:
        return fault(f"Redis at {at} refuses PING or INFO", "see its log: journalctl -u 'redis*'")
    except BusyLoadingError:
        return fault("Redis is still reading its append-only file", "wait, and look again; journalctl -u 'redis*' -f")
    except (RedisError, OSError) as error:
        if "max number of clients" in str(error):  # of which redis-py makes a ConnectionError like any other
            return fault("Redis has as many clients as it takes", "raise its maxclients, or lower WORKER_CONCURRENCY")
        protocol = "rediss://" if at.encrypted else "redis://"
        return fault(f"what answers at {at} does not speak {protocol}", f"correct REDIS_URL in {place.file}")
    return None


def password(place: Place) -> str:
    if place.installed:
        return (
            f"put the right one into {place.etc}/credentials/redis_url; or move /etc/redis/redis-async-email.conf "
            "away, restart Redis after sudo bin/install, which writes it anew (the queue stays)"
        )
    return "REDIS_URL=redis://USER:PASSWORD@HOST:PORT/0, with / # ? : @ in the password as %2F %23 %3F %3A %40"


def program(info: dict[str, Any]) -> str:
    return f"Valkey {info['valkey_version']}" if "valkey_version" in info else f"Redis {info['redis_version']}"


def fits(info: dict[str, Any], place: Place) -> Findings:
    numbers = tuple(int(number) for number in info["redis_version"].split(".")[:2])
    if numbers < OLDEST:
        found = f"{program(info)} is too old: 6.2 is needed, or a worker that is killed loses a mail"
        yield fault(found, "upgrade it: https://redis.io/docs/latest/operate/oss_and_stack/install/")
    if info.get("role", "master") != "master":
        yield fault("Redis here is a replica and takes no writes", f"name the primary in REDIS_URL: {place.file}")


def keeps(place: Place) -> Findings:
    """The append-only file is on, written, and has room."""
    with asked(place) as redis:
        info: dict[str, Any] = redis.info()
        if not info.get("aof_enabled"):
            found = "it keeps no append-only file, so a crash loses up to an hour of accepted mail"
            yield fault(found, append_only(place))
        elif info.get("aof_last_write_status") != "ok" or info.get("aof_last_bgrewrite_status") == "err":
            yield fault("it cannot write its append-only file", "df -h; journalctl -u 'redis*' -n 20 says why")
        else:
            yield ok(f"the append-only file is on and written, {sized(info.get('aof_current_size', 0))}")
            yield from half_run(info, place)
        if info.get("rdb_last_bgsave_status") != "ok":
            yield fault("it cannot write its snapshot, and may refuse writes", "df -h; journalctl -u 'redis*' -n 20")
        if where(place).is_here:
            yield from disk(folder(redis, place), info.get("aof_current_size", 0))


def half_run(info: dict[str, Any], place: Place) -> Findings:
    """Says where nothing cuts an unfinished transaction off the file before Redis starts; Valkey 9 does so itself."""
    if not place.installed or int(info.get("valkey_version", "0").split(".")[0]) >= 9:
        return
    found = f"{program(info)}, if a crash cuts its file within a transaction, runs half of it at its second start"
    if not is_our_own(place):
        yield note(
            f"{found}, and mail may go out twice", "Valkey 9 does not; or run ops/aof.py before each of its starts"
        )
        return
    shown = run("systemctl", "show", "-p", "ExecStartPre", OUR_UNIT)
    if not (shown and "aof.py" in shown.stdout and (place.opt / "aof.py").exists()):
        yield warn(f"{found}, and mail goes out twice", "sudo bin/install, in your clone: it has that cut off first")


def append_only(place: Place) -> str:
    """Redis, started anew with the file on, reads the file and nothing else: what it had before would be gone."""
    if is_our_own(place):
        return "sudo bin/install, in your clone: it switches it on without losing what is there; do not restart Redis"
    return f"{cli(place)} CONFIG SET appendonly yes, and the same in its file; never only in the file"


def no_eviction(place: Place) -> str:
    if is_our_own(place):  # whose ACL lets nobody CONFIG SET
        line = "s/^maxmemory-policy .*/maxmemory-policy noeviction/"
        return f"sudo sed -i '{line}' {OUR_CONF} && sudo systemctl restart redis-server@async-email"
    return f"{cli(place)} CONFIG SET maxmemory-policy noeviction, and the same in its file"


def is_our_own(place: Place) -> bool:
    """The instance that bin/install makes."""
    return where(place).path.startswith(OUR_SOCKETS)


def cli(place: Place) -> str:
    at = where(place)
    return f"redis-cli -s {at.path}" if at.path else f"redis-cli -h {at.host} -p {at.port}"


def folder(redis: Redis, place: Place) -> Path | None:
    try:
        told: dict[Any, Any] = redis.config_get("dir")
        return Path(told["dir"])
    except (RedisError, KeyError):  # our own ACL forbids it
        return place.redis_data if place.redis_data.is_dir() else None


def disk(path: Path | None, file: int) -> Findings:
    """Rewriting the append-only file takes its size once more."""
    if path is None or not path.parent.exists():
        yield note("where its append-only file lies cannot be seen from here, nor how full that disk is")
        return
    usage = shutil.disk_usage(path)
    free = f"{sized(usage.free)} free where its append-only file lies"
    if usage.free < max(LITTLE / 4, file):
        yield fault(f"{free}: it will soon refuse mail", f"make room: sudo du -xh {path} | sort -h | tail")
    elif usage.free < max(LITTLE, 3 * file):
        yield warn(f"{free}, which is little", f"make room: sudo du -xh {path} | sort -h | tail")
    else:
        yield ok(free)


def memory(place: Place) -> Findings:
    with asked(place) as redis:
        info: dict[str, Any] = redis.info()
    used, most, policy = info["used_memory"], info.get("maxmemory", 0), info.get("maxmemory_policy", "")
    machine = info.get("total_system_memory", 0)
    if policy != "noeviction":
        level = fault if most else warn
        yield level(f"maxmemory-policy is {policy}: when memory is short it drops mail in silence", no_eviction(place))
    if most and used >= most:
        yield fault(
            f"it is full: {sized(used)} of {sized(most)}", "let the workers drain the queue, or raise maxmemory"
        )
    elif most and used > 0.8 * most:
        yield warn(f"it is nearly full: {sized(used)} of {sized(most)}", "see why the queue grows, or raise maxmemory")
    elif machine and (most or used) > 0.75 * machine:
        found = f"it may take {sized(most or used)} of this machine's {sized(machine)}, and needs more while it saves"
        yield warn(found, "lower maxmemory to half of the memory")
    else:
        limit = f"of {sized(most)}" if most else f"and no maxmemory on a machine with {sized(machine)}"
        yield ok(f"uses {sized(used)} {limit}")


def clock(place: Place) -> Findings:
    """Retries and signs of life are moments: two machines must agree on them."""
    with asked(place) as redis:
        before = time.time()
        seconds, micros = redis.time()
    apart = seconds + micros / 1e6 - before
    if abs(apart) > SECONDS_APART:
        yield warn(
            f"Redis' clock is {lasting(abs(apart))} from ours", "sudo timedatectl set-ntp true, on both machines"
        )
    else:
        yield ok("Redis' clock agrees with ours")
