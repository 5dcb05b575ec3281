"""What goes wrong on servers, made on purpose one after the other: the doctor names each, with what fixes it.

To add one: a row in FAILURES with the shell command that breaks it (as root), words of what the doctor must say and
words of its remedy. Where the remedy is a command it is run as it stands, and what was said must not be said again;
where it is advice, the row has a command that follows it.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from typing import NamedTuple

import pytest

from tests.deploy.server import CA_FILE, CLONE, COMMANDS, DASHBOARD, EMAIL, ENV, JOBS, REDIS, Server
from tests.servers import eventually

pytestmark = pytest.mark.deploy

SECRETS = "/etc/async-email/credentials"
REDIS_CONF = "/etc/redis/redis-async-email.conf"
CURRENT = "/opt/async-email/current"
SITE = "/etc/nginx/sites-available/async-email"
PACKAGES = f"{CURRENT}/.venv/lib/python3*/site-packages"


class Failure(NamedTuple):
    name: str
    breaks: str
    found: str
    remedy: str = "sudo"
    fixes: str = ""  # nothing: the remedy is run as it stands, up to its semicolon
    level: str = "fault"


def setting(name: str, line: str, found: str, remedy: str = ENV) -> Failure:
    """A line of the one file that is wrong."""
    variable = line.split("=")[0]
    return edit(name, ENV, f"/^{variable}=/d; $a {line}", found, remedy)


def edit(name: str, path: str, sed: str, found: str, remedy: str, then: str = "true") -> Failure:
    """A file that was edited, and is put back."""
    breaks = f"cp -p {path} /var/tmp/kept && sed -i '{sed}' {path} && {then}"
    return Failure(name, breaks, found, remedy, f"cp -p /var/tmp/kept {path} && {then}")


FAILURES = (
    # requirements that do not exist, or are not those that were tried
    Failure(
        "a package is missing",
        f"cd {PACKAGES} && mv bottle.py bottle-*.dist-info /var/tmp",
        "bottle is missing",
        "sudo bin/install",
        f"cd {PACKAGES} && mv /var/tmp/bottle* .",
    ),
    Failure(
        "a package of another version",
        f"cd {PACKAGES} && mv bottle-*.dist-info /var/tmp && cp -r /var/tmp/bottle-*.dist-info bottle-0.1.dist-info"
        " && sed -i 's/^Version: .*/Version: 0.1/' bottle-0.1.dist-info/METADATA",
        "bottle is 0.1 and should be",
        "sudo bin/install",
        f"cd {PACKAGES} && rm -r bottle-0.1.dist-info && mv /var/tmp/bottle-*.dist-info .",
    ),
    # Redis: not running, another password, or not made to keep mail
    Failure("Redis is stopped", f"systemctl stop {REDIS}", "Redis does not answer"),
    edit("another Redis password", f"{SECRETS}/redis_url", "s/async-email:/async-email:x/", "password", "redis_url"),
    Failure(
        "Redis evicts",
        f"sed -i 's/^maxmemory-policy .*/maxmemory-policy allkeys-lru/' {REDIS_CONF} && systemctl restart {REDIS}",
        "evicts mail when memory is short",
        REDIS_CONF,
    ),
    # settings
    setting("a name that is none", "SMTP_HOTS=smtp.shop.internal", "SMTP_HOTS"),
    setting("a value that is none", "SMTP_TIMEOUT=soon", "SMTP_TIMEOUT"),
    setting("no sender", "MAIL_FROM=", "MAIL_FROM is not set"),
    # the relay, which nobody had ever tried
    setting("a wrong password", "SMTP_PASSWORD=wrong", "535", "SMTP_PASSWORD"),
    setting("a closed port", "SMTP_PORT=2587", "does not answer on port 2587", "SMTP_PORT=587"),
    setting("a name without an address", "SMTP_HOST=smtp.shpo.internal", "cannot be resolved", "SMTP_HOST"),
    setting("an authority that nobody knows", "SMTP_CA_FILE=", "certificate", "SMTP_CA_FILE"),
    # permissions and ownership
    Failure("a secret that all may read", f"chmod 644 {SECRETS}/redis_url", "open to other users (mode 644)"),
    Failure("the one file, which all may read", f"chmod 644 {ENV}", "open to other users (mode 644)"),
    Failure("a secret of somebody else's", f"chown admin {SECRETS}/api_keys", "does not belong to root"),
    Failure("code that the service may change", f"chown async-email {CURRENT}/worker.py", "may change the code"),
    Failure("an authority that it cannot read", f"chmod 600 {CA_FILE}", "cannot read", CA_FILE, f"chmod 644 {CA_FILE}"),
    # what an upgrade of the system leaves behind, and what fills up
    Failure(
        "another Python than the one that made the .venv, and a /tmp that runs no program",
        f"mount -t tmpfs -o noexec tmpfs /tmp && cd {CURRENT}/.venv && mv lib/python3.* lib/python3.9"
        " && sed -i 's/^version = .*/version = 3.9.2/' pyvenv.cfg && printf 'Python 3.9' > complete"
        " && systemctl restart async-email.target",
        "made for Python 3.9",
        "sudo bin/install",
        f"cd ~admin/{CLONE} && bin/install && umount -l /tmp",
    ),
    Failure(
        "no room for logs",
        "mount -t tmpfs -o size=2m tmpfs /var/log && mkdir /var/log/nginx && ! head -c 4m /dev/zero > /var/log/full",
        "0 KB free for logs",
        "du -xh /var/log",
        "umount -l /var/log",
        level="warn",
    ),
    Failure("nobody rotates logs", "apt-get remove -y -qq logrotate", "no logrotate", "apt install", level="warn"),
    # what ran by hand and not as a service, and which log to read
    Failure("a worker is stopped", f"systemctl stop {JOBS}", JOBS),
    Failure("a worker is not enabled", f"systemctl disable {EMAIL}", "not enabled", level="warn"),
    Failure("a worker is masked", f"systemctl mask --now {EMAIL}", "masked"),
    Failure(
        "a worker that was killed",
        f"kill -9 $(systemctl show --value -p MainPID {EMAIL})",
        "killed by a signal",
        f"journalctl -u {EMAIL}",
        f"systemctl restart {EMAIL}",
    ),
    Failure("nginx is stopped", "systemctl stop nginx", "nothing answers on port 80"),
    Failure("the site is not enabled", "rm /etc/nginx/sites-enabled/async-email", "site is not enabled"),
    edit("nginx refuses its site", SITE, "$a nonsense", "nginx refuses its configuration", "nginx -t"),
    # a port that is open and should not be
    setting(
        "a dashboard for everybody", "DASHBOARD_LISTEN=0.0.0.0:9181", "for everybody", "DASHBOARD_LISTEN=127.0.0.1"
    )._replace(fixes=f"cp -p /var/tmp/kept {ENV} && systemctl restart {DASHBOARD}"),
)


@pytest.fixture(scope="module")
def sound(configured: Server) -> Iterator[Server]:
    """A server of which the doctor has nothing to say. Its clock is the host's, and the machine may not ask about that,
    so the question is answered here."""
    clock = "/usr/local/bin/timedatectl"
    configured.machine.run(f"printf '#!/bin/sh\\necho yes\\n' > {clock} && chmod 755 {clock}")
    configured.restart()  # which forgets the restarts before the first edit
    yield configured
    configured.machine.run(f"rm {clock}")


def test_of_a_server_that_works_it_has_nothing_to_say(sound: Server, server: Server) -> None:
    diagnosis = server.doctor()
    assert diagnosis.troubles() == []
    assert diagnosis.exit == 0


@pytest.mark.parametrize("failure", FAILURES, ids=lambda failure: failure.name)
def test_it_finds_what_is_wrong_and_how_it_is_fixed(sound: Server, server: Server, failure: Failure) -> None:
    server.machine.run(failure.breaks)
    fixes = failure.fixes
    try:
        if DASHBOARD in fixes:
            server.machine.run(f"systemctl restart {DASHBOARD}")
        diagnosis = server.doctor()
        named = [one for one in diagnosis.troubles() if failure.found in one.found and failure.remedy in one.fix]
        assert [one.level for one in named][:1] == [failure.level], diagnosis.text
        assert diagnosis.exit == (2 if failure.level == "fault" else 1)
        fixes = fixes or named[0].fix.split(";")[0]
    finally:
        server.machine.admin(f"sudo bash -c {shlex.quote(fixes)}" if failure.fixes else fixes)
    eventually(lambda: server.doctor().troubles() == [], 60)


def test_redis_without_its_file_is_found_and_gets_one_that_has_the_queue(sound: Server, server: Server) -> None:
    with server.relay_away():
        posted = dict(server.post() for _ in range(3))
        server.machine.run(f"sed -i 's/^appendonly yes/appendonly no/' {REDIS_CONF} && systemctl restart {REDIS}")
        eventually(server.is_up)
        posted |= dict(server.post() for _ in range(3))
        (found,) = [
            one for one in server.doctor().troubles() if one.found.startswith("Redis keeps no append-only file")
        ]
        assert "sudo bin/install" in found.fix
        server.install()
        server.machine.run(f"systemctl kill -s KILL {REDIS}")
        eventually(server.is_up)
    server.arrives(*posted, seconds=120)
    assert server.copies() == dict.fromkeys(posted, 1)
    assert server.doctor().troubles() == []


def test_it_sees_a_variable_that_only_this_shell_has(sound: Server, server: Server) -> None:
    ran = server.machine.admin(f"export SMTP_RATE=14/s && sudo {COMMANDS}/doctor", check=False)
    (line,) = [line for line in ran.stdout.splitlines() if "SMTP_RATE" in line]
    assert line.startswith("warn")
    assert ENV in line
    assert ran.returncode == 1


def test_a_mail_to_order_goes_the_whole_way(sound: Server, server: Server) -> None:
    ran = server.machine.admin(f"sudo {COMMANDS}/doctor --send-to ada@customers.example")
    server.arrives("ada@customers.example")
    assert "accepted by the relay" in ran.stdout


def test_it_shows_no_secret(sound: Server, server: Server) -> None:
    shown = server.machine.admin(f"sudo {COMMANDS}/doctor; sudo {COMMANDS}/doctor --json", check=False).stdout
    stored = server.machine.admin(f"sudo sh -c 'cat {SECRETS}/dashboard_password {SECRETS}/redis_url'").stdout.split()
    assert server.relay.login
    for secret in (*stored, server.relay.login[1], "hello@shop"):
        assert secret not in shown


def test_it_changes_nothing(sound: Server, server: Server) -> None:
    before = server.machine.files()
    server.doctor()
    changed = {line for line in before ^ server.machine.files() if not line.startswith("/var/lib/redis-async-email")}
    assert changed == set()
