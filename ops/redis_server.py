"""The Redis of this machine: its configuration, written once, its unit, and that it keeps an append-only file.

What may have been edited is never overwritten, except `appendonly yes`. Standard library only, as ops/install.py.
"""

from __future__ import annotations

import hashlib
import re
import shutil
import sys
import time
from urllib.parse import unquote, urlsplit

from ops.checks.system import memory
from ops.machines import read_machines, replicated_part
from ops.release import CLEAN_ENVIRONMENT
from ops.server import Fault, Server, text_of

REDIS = "redis-server@async-email.service"
FIRST_START = "first-start"  # which ops/gate.py knows, too
REDIS_SOCKET = "/run/redis-async-email/redis.sock"


def is_wanted(server: Server) -> bool:
    """Returns whether this machine has a Redis: it has the role, or no role and no REDIS_URL of its own."""
    return "redis" in server.roles if server.roles else not server.is_set("REDIS_URL")


def start_redis(server: Server) -> None:
    if not is_wanted(server):
        why = "this machine has another role" if server.roles else "REDIS_URL is set in async-email.env"
        server.say(f"{why}, so none is needed here")
        return
    is_new = configure_redis(server)
    if "redis" not in server.ask("id", "-nG", "async-email").split():  # whose socket it may use
        server.run("usermod", "--append", "--groups", "redis", "async-email")
    copy_redis_unit(server)
    if is_new or not server.is_on(REDIS):
        server.run("systemctl", "enable", REDIS)
        server.run("systemctl", "restart", REDIS)
    if server.dry:
        return
    (server.redis_data / FIRST_START).unlink(missing_ok=True)
    said = ask_redis(server, "info", "persistence")
    if "loading:1" in said:  # it says aof_enabled:0 until it is done
        raise Fault(f"{REDIS} is still reading its append-only file; wait, and then again: sudo bin/install")
    if "aof_enabled:0" in said:
        switch_on_file(server)
    if "aof_enabled:1" not in ask_redis(server, "info", "persistence"):
        raise Fault(
            f"{REDIS} does not answer as it should: it is not running (sudo journalctl -u {REDIS}), has no append-only "
            f"file, or knows another password than the one in {server.credentials / 'redis_url'}.\nIf you changed "
            f"{server.redis_conf}, put it right; or move it away, and the next run makes a new one. The queue stays."
        )


def configure_redis(server: Server) -> bool:
    """Writes its configuration if there is none, and makes its folder. Returns whether it is new."""
    before = text_of(server.redis_conf)
    if before is None:
        write_configuration(server, redis_configuration(server))
    elif server.roles and "replica-announce-ip" not in before:
        server.stop_here(
            f"{server.redis_conf} is that of a Redis alone: move it away, and the next run makes one with replicas. "
            "The queue stays; docs/scale.md has more"
        )
    server.folder(server.redis_data, 0o750, owner="redis")
    first_start = server.redis_data / FIRST_START
    if before is None and server.roles and server.announce(f"make {first_start}: there may be no Sentinels yet"):
        first_start.touch()
    return before is None


def write_configuration(server: Server, text: str) -> None:
    """Writes it so that Redis can read it. One of several machines holds a password, which the service, since it is in
    the group, must not see; and Redis writes it anew whenever Sentinel says so."""
    owner, mode = ("redis", 0o600) if server.roles else (None, 0o640)
    server.write(server.redis_conf, text, mode, group="redis", owner=owner)


def copy_redis_unit(server: Server) -> None:
    """Copies the unit, and what it runs first: beside the releases, since there may be none yet, or one without it."""
    server.copy("ops/aof.py", server.opt / "aof.py")
    server.copy_units("redis-server@async-email.service.d/async-email.conf")
    if server.roles:
        server.copy("ops/gate.py", server.opt / "gate.py")
        server.copy_units("redis-server@async-email.service.d/replicated.conf")


def switch_on_file(server: Server) -> None:
    """Switches the append-only file on again. Redis, started with the file on, reads the file and nothing else, so the
    file begins as a copy of the snapshot that Redis writes when it is stopped."""
    if len(ask_redis(server, "config", "get", "save").splitlines()) < 2:
        raise Fault(
            f"{REDIS} keeps neither an append-only file nor snapshots: a restart would lose the queue.\nWait until it "
            f"is empty (bin/doctor), put `appendonly yes` and `save 3600 1` into {server.redis_conf}, and restart it."
        )
    server.run("systemctl", "stop", REDIS)
    file = server.redis_data / "appendonly.aof"  # the one file of Redis before 7, of which Redis 7 makes its folder
    for old in (server.redis_data / "appendonlydir", file):
        if old.exists():
            old.rename(f"{old}.{time.strftime('%Y%m%d-%H%M%S')}")
    server.say("begin the append-only file with what is there")
    shutil.copyfile(server.redis_data / "dump.rdb", file)
    shutil.chown(file, "redis", "redis")
    file.chmod(0o640)
    text = re.sub(r"^appendonly .*\n", "", text_of(server.redis_conf) or "", flags=re.MULTILINE)
    write_configuration(server, f"{text}appendonly yes\n")
    server.run("systemctl", "start", REDIS)


def redis_password(server: Server) -> str:
    return unquote(urlsplit((text_of(server.credentials / "redis_url") or "").strip()).password or "")


def redis_version(server: Server) -> tuple[int, int]:
    """Returns that of the system's Redis; the newest imaginable where there is none to ask."""
    found = re.search(r"v=(\d+)\.(\d+)", server.ask("redis-server", "--version"))
    return (int(found[1]), int(found[2])) if found else (sys.maxsize, 0)


def redis_configuration(server: Server) -> str:
    text = (server.tree / "deploy/redis/async-email.conf").read_text()
    digest = hashlib.sha256(redis_password(server).encode()).hexdigest()
    text = text.replace("#SHA256", f"#{digest}").replace("maxmemory MAXMEMORY", f"maxmemory {most_memory() >> 20}mb")
    machines = read_machines(server) if server.roles else None
    text += replicated_part(server, machines) if machines else ""
    return text if redis_version(server) >= (7, 0) else text.replace("\nshutdown-on-sigterm force\n", "\n")


def most_memory() -> int:
    """Returns how many bytes Redis may use of this machine."""
    machine = memory()
    return machine * 2 // 5 if machine >= 2**30 else machine // 4


def ask_redis(server: Server, *words: str) -> str:
    command = ("redis-cli", "-s", REDIS_SOCKET, "--user", "async-email", *words)
    return server.ask(*command, env={**CLEAN_ENVIRONMENT, "REDISCLI_AUTH": redis_password(server)})
