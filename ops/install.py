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

from ops.machines import (
    ROLES,
    Machines,
    parse_hosts,
    parse_roles,
    read_machines,
    set_up_certificates,
    set_up_machines,
    start_sentinel,
)
from ops.redis_server import REDIS_SOCKET, is_wanted, redis_version, start_redis
from ops.release import KEPT, find_previous_release, make_release, remove_old_releases, switch
from ops.server import Fault, Server, text_of
from ops.services import TARGET, install_units, start_services, stop_what_is_newer
from ops.site import set_up_nginx
from ops.smtp_in import set_up_submission
from ops.webhooks import set_up_webhooks

KNOWN = {"debian 12", "debian 13"}  # tests/deploy has passed on them


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
    own_redis = is_wanted(server)
    there = {
        "redis-server": bool(shutil.which("redis-server")) or not own_redis,
        "redis-sentinel": bool(shutil.which("redis-sentinel")) or "sentinel" not in server.roles,
        "openssl": bool(shutil.which("openssl")) or not server.roles,
        "nginx": bool(shutil.which("nginx")) or not server.has_role("api"),
        "python3-venv": importlib.util.find_spec("ensurepip") is not None,
        "logrotate": bool(shutil.which("logrotate")),  # nginx only recommends it, and its logs would grow for ever
        "ca-certificates": os.path.exists("/etc/ssl/certs/ca-certificates.crt"),
    }
    missing = [package for package, is_there in there.items() if not is_there]
    if missing:
        apt_get_install(server, *missing)
    for package in {"redis-server", "redis-sentinel"}.intersection(missing):
        server.run("systemctl", "disable", "--now", f"{package}.service")  # nobody uses what the package starts
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
    machines = read_machines(server) if server.roles else None
    if machines:
        name_the_machines(server)
    if text_of(server.relays) is None:  # without a table there is none, but systemd wants the file
        server.write(server.relays, "" if server.is_set("RELAYS") else RELAYS, 0o600)
    made: dict[str, Callable[[], str]] = {
        "redis_url": lambda: redis_url(server, machines),
        "api_keys": lambda: (machines and machines.api_keys) or (server.make_key() if server.has_role("api") else ""),
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


def redis_url(server: Server, machines: Machines | None) -> str:
    if machines:
        return machines.url
    return "" if server.roles else f"unix://async-email:{secrets.token_urlsafe(32)}@{REDIS_SOCKET}"


def name_the_machines(server: Server) -> None:
    """Writes where the authority is and how many replicas must confirm, and forgets the Redis that this machine had."""
    settings = {"REDIS_CA_FILE": str(server.redis_ca), "REDIS_REPLICAS": "1"}
    missing = "".join(f"{name}={value}\n" for name, value in settings.items() if not server.is_set(name))
    if missing:
        text = (text_of(server.env) or "").rstrip("\n")
        server.write(server.env, f"{text}\n\n# Several machines: docs/scale.md\n{missing}", 0o600)
    url = server.credentials / "redis_url"
    if (text_of(url) or "").startswith("unix://async-email:") and server.announce(f"remove {url}, of a Redis alone"):
        url.unlink()


def run_doctor(server: Server) -> None:
    doctor = server.current / "bin/doctor"
    if (server.dry or doctor.exists()) and server.announce(f"$ {doctor}"):
        subprocess.run([doctor], stdin=subprocess.DEVNULL)


Step = tuple[str, Callable[[Server], None]]  # what is printed when it runs, and what runs
MACHINE = ("This machine: Debian or Ubuntu, run by systemd, and you are root", check_machine)
SWITCH = (
    ("The systemd units", install_units),
    ("The switch: /opt/async-email/current is this release from now on", switch),
    ("The services: what runs another release is restarted, one by one; no request is refused", start_services),
)
SEVERAL = (
    ("Several machines: what this one is, and what they share", set_up_machines),
    ("Several machines: certificates for what is between them", set_up_certificates),
    ("Several machines: a Sentinel", start_sentinel),
)
INSTALL = (
    MACHINE,
    ("The system's packages: Redis, nginx, Python's venv and the certificate authorities", install_packages),
    ("The user that the service runs as: async-email, which owns nothing and cannot log in", make_user),
    ("The release: a copy of this clone under /opt/async-email/releases, with a .venv of its own", make_release),
    SEVERAL[0],
    ("Configuration and secrets, in /etc/async-email: what is there stays", configure),
    *SEVERAL[1:],
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
    needed = [*(["SMTP_HOST"] if server.has_role("worker") and not several else [])]
    needed += ["MAIL_FROM"] if server.has_role("worker") or server.has_role("api") else []
    missing = [name for name in needed if not server.is_set(name)]
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
    if server.hosts:
        lines += [next_machine(server)]
    if server.has_role("api"):
        key = server.new_key or "YOUR-API-KEY"
        lines += [
            "\nTry it:\n",
            f"    curl -X POST http://127.0.0.1/start-job -H 'Authorization: Bearer {key}' \\",
            '         -H \'Content-Type: application/json\' -d \'{"name": "Ada", "email": "you@example.com"}\'',
        ]
    lines += [
        "\nKnown from guides: `systemctl status async-email-worker`, `sudo journalctl -u async-email-api -f`.",
        f"Instead of `redis-cli ping`, which asks another Redis than ours: sudo {server.current}/bin/doctor",
        f"\nTLS, backup, and what to do at night: {server.current}/docs/operations.md",
    ]
    return "\n".join(lines)


def next_machine(server: Server) -> str:
    roles = ",".join(role for role in ROLES if role in server.roles)
    others = ", ".join(server.hosts[1:])
    return (
        f"\nNext, on {others}, one after the other, with {server.bundle}, which holds\n"
        "passwords: copy it so that root alone can read it, and remove the copies afterwards.\n\n"
        f"    sudo bin/install --role {roles} --join machines.json"
    )


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
    parser.add_argument("--role", action="append", default=[], help="of several machines: redis, sentinel, api, worker")
    parser.add_argument(
        "--hosts", default="", help="on the first of them: the addresses of those with Redis or Sentinel"
    )
    parser.add_argument("--join", type=Path, metavar="FILE", help="on each other: the first one's machines.json")
    asked = parser.parse_args(arguments)
    os.umask(0o022)
    server = Server(Path(__file__).resolve().parent.parent, dry=asked.dry_run)
    try:
        server.roles = parse_roles(asked.role) or server.roles
        server.hosts = parse_hosts(asked.hosts) if asked.hosts else []
        server.bundle, server.joins = asked.join or server.bundle, bool(asked.join)
        if (server.hosts or server.joins) and not server.roles:
            raise Fault("--hosts and --join need --role")
        steps = ROLLBACK if asked.rollback else INSTALL
        run(server, [step for step in steps if server.roles or step not in SEVERAL])
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
