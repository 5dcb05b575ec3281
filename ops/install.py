"""Makes this machine an async-email server, or brings one up to date: `sudo bin/install`.

It is a list of steps (INSTALL and ROLLBACK, at the end). Each looks first and does only what is still missing: a second
run changes nothing, and goes on where one has failed half-way. What runs is left running until the new release is
complete.

Never overwritten: what you may have edited (/etc/async-email, Redis' configuration except `appendonly yes`, the nginx
site). Never touched: the queue. Secrets are made here, stored in files that only root reads, and never printed, except
the new API key, once. `--dry-run` says what would be done and changes nothing. Standard library only: there is no .venv
yet.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import os
import platform
import re
import secrets
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from urllib.parse import unquote, urlsplit

from ops.checks.system import memory
from ops.release import CLEAN_ENVIRONMENT, MARK, copy_files, release_id
from ops.server import Fault, Server, text_of
from ops.site import set_up_nginx
from ops.smtp_in import SERVICE as SUBMISSION
from ops.smtp_in import SOCKET as SUBMISSION_SOCKET
from ops.smtp_in import set_up_submission
from ops.webhooks import SERVICE as WEBHOOKS
from ops.webhooks import set_up_webhooks
from queues.table import QUEUES

KNOWN = {"debian 12", "debian 13"}  # tests/deploy has passed on them
KEPT = 3  # releases
WORKERS = tuple(f"async-email-worker@{queue}.service" for queue in QUEUES)
WORKER = "async-email-worker@.service"
API = "async-email-api.service"
DASHBOARD = "async-email-dashboard.service"
SOCKET = "async-email-api.socket"
TARGET = "async-email.target"
REDIS = "redis-server@async-email.service"
REDIS_SOCKET = "/run/redis-async-email/redis.sock"


def check_machine(server: Server) -> None:
    release = platform.freedesktop_os_release()
    name = f"{release.get('ID', '?')} {release.get('VERSION_ID', '?')}"
    server.say(name if name in KNOWN else f"{name}: not tried (tried: {', '.join(sorted(KNOWN))}); going on")
    if os.geteuid() != 0:
        server.stop_here("it needs root: sudo bin/install")
        server.say("without root some of what is there cannot be seen; sudo bin/install --dry-run sees all")
    if not shutil.which("apt-get"):
        server.stop_here("there is no apt-get here; the steps in ops/install.py can be done by hand")
    if not os.path.isdir("/run/systemd/system"):
        server.stop_here("this machine is not run by systemd, and the units in systemd/ need it")


def install_packages(server: Server) -> None:
    own_redis = not server.is_set("REDIS_URL")
    there = {
        "redis-server": bool(shutil.which("redis-server")) or not own_redis,
        "nginx": bool(shutil.which("nginx")),
        "python3-venv": importlib.util.find_spec("ensurepip") is not None,
        "logrotate": bool(shutil.which("logrotate")),  # nginx only recommends it, and its logs would grow for ever
        "ca-certificates": os.path.exists("/etc/ssl/certs/ca-certificates.crt"),
    }
    missing = [package for package, is_there in there.items() if not is_there]
    if missing:
        apt_get_install(server, *missing)
    if "redis-server" in missing:  # nobody uses the instance that the package brings; ours has no port
        server.run("systemctl", "disable", "--now", "redis-server.service")
    version = redis_version(server)
    if own_redis and not server.dry and version < (6, 2):
        raise Fault(
            f"Redis {version[0]}.{version[1]} is too old: RQ needs 6.2 to keep the jobs of a worker that is killed. "
            "Ubuntu 22.04 has nothing newer.\nFollow 'Install Redis on Linux' at redis.io for Redis' own packages, or "
            "set REDIS_URL in /etc/async-email/async-email.env to a Redis elsewhere; then: sudo bin/install"
        )


def apt_get_install(server: Server, *packages: str) -> None:
    """Installs packages; waits some minutes for unattended-upgrades, which is often at work on a new machine."""
    for _ in range(20):
        if server.run("apt-get", "update", "-qq", may_fail=True):
            break
        time.sleep(15)
    how = ("--yes", "-qq", "--no-install-recommends", "-o", "DPkg::Lock::Timeout=300")
    server.run("env", "DEBIAN_FRONTEND=noninteractive", "apt-get", "install", *how, *packages)


def make_user(server: Server) -> None:
    if not server.ask("id", "-u", "async-email"):
        home = ("--home-dir", "/nonexistent", "--no-create-home")
        server.run("useradd", "--system", "--user-group", *home, "--shell", "/usr/sbin/nologin", "async-email")


def make_release(server: Server) -> None:
    release = server.releases / release_id(server.source, server.say)
    python = f"Python {sys.version_info[0]}.{sys.version_info[1]}"
    if text_of(release / MARK) not in (None, python):  # what runs may run from it, so it stays as it is
        release = release.with_name(f"{release.name}-{python.lower().replace(' ', '')}")
    server.release = release
    if text_of(release / MARK) == python:
        server.say(f"{release} is there already")
        return
    if os.path.exists(release) and server.announce("remove what a failed installation has left of it"):
        shutil.rmtree(release)
    if server.announce(f"copy this clone to {release}"):
        copy_files(server.source, release)
    server.run(sys.executable, "-m", "venv", release / ".venv")
    pip = (release / ".venv/bin/pip", "install", "--quiet", "--disable-pip-version-check", "--require-hashes")
    server.run(*pip, "-r", release / "requirements.txt")
    server.run(release / ".venv/bin/python", "-m", "compileall", "-q", "-x", r"/\.venv/", release)
    server.write(release / MARK, python, 0o644)


RELAYS = """\
# Several relays, in order: a mail goes by the first that is well. Unset SMTP_HOST and its like in async-email.env then.
# What each may have is in docs/operations.md, "Several relays"; then: sudo systemctl restart async-email.target
#
# [first]
# host = "smtp.example.com"
# username = "acme"
# password = "..."
#
# [second]
# host = "smtp.example.net"
# port = 465
# username = "acme"
# password = "..."
"""


def configure(server: Server) -> None:
    server.folder(server.etc, 0o700)
    server.folder(server.credentials, 0o700)
    if text_of(server.env) is None:
        server.write(server.env, (server.source / ".env.example").read_text(), 0o600)
    if text_of(server.relays) is None:  # without a table there is none, but systemd wants the file
        server.write(server.relays, "" if server.is_set("RELAYS") else RELAYS, 0o600)
    made: dict[str, Callable[[], str]] = {
        "redis_url": lambda: f"unix://async-email:{secrets.token_urlsafe(32)}@{REDIS_SOCKET}",
        "api_keys": lambda: make_key(server),
        "dashboard_password": lambda: secrets.token_urlsafe(16),
        "smtp_password": lambda: "",  # the operator's, here or in async-email.env; as are the next
        "smtp_oauth": lambda: "",
        "dkim_key": lambda: "",
        "alert_url": lambda: "",
        "bounce_imap_url": lambda: "",
        "doubt_imap_url": lambda: "",
        "webhook_url": lambda: "",
        "webhook_secret": lambda: "",
    }
    for name, make in made.items():
        if text_of(server.credentials / name) is None:  # empty counts as not set, but systemd wants the file
            value = "" if server.is_set(name.upper()) else make()
            server.write(server.credentials / name, f"{value}\n" if value else "", 0o600)
    if text_of(server.webhooks) is None:
        server.write(server.webhooks, "", 0o600)


def make_key(server: Server) -> str:
    server.new_key = secrets.token_urlsafe(32)
    return f"default:{hashlib.sha256(server.new_key.encode()).hexdigest()}"


def start_redis(server: Server) -> None:
    if server.is_set("REDIS_URL"):
        server.say("REDIS_URL is set in async-email.env, so none is needed here")
        return
    is_new = text_of(server.redis_conf) is None
    if is_new:
        server.write(server.redis_conf, redis_configuration(server), 0o640, group="redis")
    server.folder(server.redis_data, 0o750, owner="redis")
    if "redis" not in server.ask("id", "-nG", "async-email").split():  # whose socket it may use
        server.run("usermod", "--append", "--groups", "redis", "async-email")
    copy_redis_unit(server)
    if is_new or not server.is_on(REDIS):
        server.run("systemctl", "enable", REDIS)
        server.run("systemctl", "restart", REDIS)
    if server.dry:
        return
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


def copy_redis_unit(server: Server) -> None:
    """Copies the unit, and what it runs first: beside the releases, since there may be none yet, or one without it."""
    server.copy("ops/aof.py", server.opt / "aof.py")
    server.copy_units("redis-server@async-email.service.d/async-email.conf")


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
    server.write(server.redis_conf, f"{text}appendonly yes\n", 0o640, group="redis")
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
    return text if redis_version(server) >= (7, 0) else text.replace("\nshutdown-on-sigterm force\n", "\n")


def most_memory() -> int:
    """Returns how many bytes Redis may use of this machine."""
    machine = memory()
    return machine * 2 // 5 if machine >= 2**30 else machine // 4


def ask_redis(server: Server, *words: str) -> str:
    command = ("redis-cli", "-s", REDIS_SOCKET, "--user", "async-email", *words)
    return server.ask(*command, env={**CLEAN_ENVIRONMENT, "REDISCLI_AUTH": redis_password(server)})


def install_units(server: Server) -> None:
    server.copy_units(*(path.name for path in sorted((server.tree / "systemd").glob("async-email*"))))


def switch(server: Server) -> None:
    now = os.readlink(server.current) if server.current.is_symlink() else ""
    to = f"releases/{server.release.name}"
    if now not in ("", to):
        server.link(server.previous, now)
    server.link(server.current, to)


def start_services(server: Server) -> None:
    enabled = [unit for unit in WORKERS if server.ask("systemctl", "is-enabled", unit) == "enabled"]
    if server.ask("systemctl", "is-enabled", TARGET) != "enabled":
        server.run("systemctl", "enable", TARGET, SOCKET, *WORKERS, API, DASHBOARD)
    elif enabled and WORKER in server.changed_units:  # it may have another [Install] now
        server.run("systemctl", "enable", *enabled)
    if SOCKET in server.changed_units and server.ask("systemctl", "is-active", SOCKET) == "active":
        server.say("its unit has changed, so the API's socket is opened anew; for a moment requests are refused")
        server.run("systemctl", "restart", SOCKET)
    # A reader of the queue must understand what is written to it: new workers know the old jobs, not the reverse.
    order = (API, *WORKERS, DASHBOARD) if server.going_back else (*WORKERS, API, DASHBOARD)
    beside = (SUBMISSION, WEBHOOKS)
    for unit in (*beside, *order) if server.going_back else (*order, *beside):
        if runs_something_else(server, unit):
            server.run("systemctl", "restart", unit, may_fail=True)
    server.run("systemctl", "start", TARGET)
    if server.release / MARK in server.written:  # that they could not start without it counts no longer
        server.run("systemctl", "reset-failed", *order)
    if server.dry:
        return
    waiting = [unit for unit in order if server.ask("systemctl", "is-active", unit) != "active"]
    for unit in order:
        server.say(f"{unit}: not running yet. {last_words(server, unit)}" if unit in waiting else f"{unit}: running")
    if waiting and server.previous.is_symlink() and not server.going_back:
        server.say("the previous release is still there: sudo bin/install --rollback")


def runs_something_else(server: Server, unit: str) -> bool:
    """Returns whether it runs, but not this release, not as its unit says, or with a file that has been made anew."""
    pid = server.ask("systemctl", "show", "--property=MainPID", "--value", unit)
    if pid in ("", "0"):
        return False
    template = re.sub("@.*", "@.service", unit)
    if any(f"/{path.name}\n" in (text_of(server.units / template) or "") for path in server.written):
        return True
    try:
        return template in server.changed_units or os.readlink(f"/proc/{pid}/cwd") != str(server.release)
    except OSError:
        return True


def last_words(server: Server, unit: str) -> str:
    """Returns the last line of the unit's log."""
    name = unit.removesuffix(".service").replace("@", "-")
    return server.ask("journalctl", "--identifier", name, "--lines=1", "--output=cat")


def run_doctor(server: Server) -> None:
    doctor = server.current / "bin/doctor"
    if (server.dry or doctor.exists()) and server.announce(f"$ {doctor}"):
        subprocess.run([doctor], stdin=subprocess.DEVNULL)


def remove_old_releases(server: Server) -> None:
    made = sorted(server.releases.glob("*"), key=lambda path: path.stat().st_mtime, reverse=True)
    used = {link.resolve() for link in (server.current, server.previous) if link.exists()}
    others = [path for path in made if path.resolve() not in used]
    for release in others[max(0, KEPT - len(used)) :]:
        if server.announce(f"remove {release}"):
            shutil.rmtree(release)


def find_previous_release(server: Server) -> None:
    if not server.previous.is_symlink():
        raise Fault(f"there is none: {server.previous} does not exist")
    server.release = server.tree = server.previous.resolve()
    if text_of(server.release / MARK) is None:
        raise Fault(f"{server.release} is incomplete; install the commit you want: git checkout, sudo bin/install")
    server.going_back = True
    server.say(str(server.release))


def stop_what_is_newer(server: Server) -> None:
    """Turns off what the release does not have, and could only fail at, again and again; an upgrade turns it on."""
    for unit, *others in ((SUBMISSION_SOCKET, SUBMISSION), (WEBHOOKS,)):
        is_known = (server.tree / "systemd" / unit).exists()
        if not is_known and server.ask("systemctl", "is-enabled", unit) == "enabled":
            server.run("systemctl", "disable", "--now", unit, *others)


Step = tuple[str, Callable[[Server], None]]  # what is printed when it runs, and what runs
MACHINE = ("This machine: Debian or Ubuntu, run by systemd, and you are root", check_machine)
SWITCH = (
    ("The systemd units", install_units),
    ("The switch: /opt/async-email/current is this release from now on", switch),
    ("The services: what runs another release is restarted, one by one; no request is refused", start_services),
)
INSTALL = (
    MACHINE,
    ("The system's packages: Redis, nginx, Python's venv and the certificate authorities", install_packages),
    ("The user that the service runs as: async-email, which owns nothing and cannot log in", make_user),
    ("The release: a copy of this clone under /opt/async-email/releases, with a .venv of its own", make_release),
    ("Configuration and secrets, in /etc/async-email: what is there stays", configure),
    ("Redis: an instance of its own, with an append-only file, without a port", start_redis),
    ("nginx: the one site of this machine, in front of the API", set_up_nginx),
    *SWITCH,
    ("Mail by SMTP, if SUBMISSION_LISTEN is set", set_up_submission),
    ("Webhooks, if WEBHOOK_URL or an endpoint in webhooks.toml is set", set_up_webhooks),
    ("The doctor: what is still wrong or missing", run_doctor),
    (f"Old releases: the last {KEPT} stay", remove_old_releases),
)
ROLLBACK = (
    MACHINE,
    ("The previous release", find_previous_release),
    ("Mail by SMTP and webhooks, if it has none yet", stop_what_is_newer),
    *SWITCH,
)


def farewell(server: Server) -> str:
    several = server.is_set("RELAYS") or re.search(r"^\s*\[", text_of(server.relays) or "", re.MULTILINE)
    missing = [name for name in (*(() if several else ("SMTP_HOST",)), "MAIL_FROM") if not server.is_set(name)]
    lines = [f"\n{server.release.name} is installed."]
    if server.new_key:
        lines += [f"\nThe API key, which is shown only this once:\n\n    {server.new_key}"]
    if missing:
        lines += [
            f"\nStill missing: {' and '.join(missing)}. Write them, and your relay's login, into\n\n    {server.env}\n",
            "The services are tried every few seconds and come up by themselves once you have saved it. After any",
            f"later change: sudo systemctl restart {TARGET}",
            f"What may be wrong, and what fixes it: sudo {server.current}/bin/doctor",
        ]
    lines += [
        "\nTry it:\n",
        f"    curl -X POST http://127.0.0.1/start-job -H 'Authorization: Bearer {server.new_key or 'YOUR-API-KEY'}' \\",
        '         -H \'Content-Type: application/json\' -d \'{"name": "Ada", "email": "you@example.com"}\'',
        "\nKnown from guides: `systemctl status async-email-worker`, `sudo journalctl -u async-email-api -f`.",
        f"Instead of `redis-cli ping`, which asks another Redis than ours: sudo {server.current}/bin/doctor",
        f"\nTLS, backup, and what to do at night: {server.current}/docs/operations.md",
    ]
    return "\n".join(lines)


def run(server: Server, steps: Sequence[Step]) -> None:
    for says, step in steps:
        print(f"==> {says}", flush=True)
        said_before = server.lines_said
        step(server)
        if server.lines_said == said_before:
            server.say("nothing to do")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="sudo bin/install", description="Installs async-email here, or upgrades it.")
    parser.add_argument("--dry-run", action="store_true", help="say what would be done, and change nothing")
    parser.add_argument("--rollback", action="store_true", help="go back to the previous release, and restart")
    asked = parser.parse_args(arguments)
    os.umask(0o022)
    server = Server(Path(__file__).resolve().parent.parent, dry=asked.dry_run)
    try:
        run(server, ROLLBACK if asked.rollback else INSTALL)
    except (Fault, OSError, KeyboardInterrupt) as fault:  # OSError: the disk is full, a program is not there
        print(f"\nStopped: {str(fault) or 'as you wished; the next run goes on from here.'}", file=sys.stderr)
        if server.new_key and not server.dry:
            print(f"\nThe API key, which is shown only this once: {server.new_key}")
        return 1
    if asked.dry_run:
        print("\nNothing was changed.")
    elif not asked.rollback:
        print(farewell(server))
    return 0
