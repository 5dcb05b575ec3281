"""A second release and the way back, and the system's own upgrades, while applications go on posting: no request fails
that need not, no mail is lost or doubled."""

from __future__ import annotations

import shlex

import pytest

from tests.deploy.server import CLONE, REDIS, Load, Server
from tests.servers import eventually

pytestmark = pytest.mark.deploy

CURRENT = "readlink /opt/async-email/current"
SUBJECT = f"{CLONE}/templates/welcome/subject.txt"
FIRST_LAYOUT = "203588c"  # the last commit before the rooms, with most files on top
COMMIT = "git -c user.name=Admin -c user.email=admin@shop.internal commit -q"


def sent_once(server: Server, load: Load) -> None:
    assert load.refused == []
    assert len(load.taken) > 20
    server.arrives(*load.taken, seconds=120)
    assert server.copies() == dict.fromkeys(load.taken, 1)


def subject(server: Server) -> str:
    recipient = server.delivers()
    mail = next(mail for mail in server.relay.accepted if recipient in mail.recipients)
    return next(line for line in mail.content.decode().splitlines() if line.startswith("Subject:"))


def test_an_upgrade_and_a_rollback_under_load(server: Server) -> None:
    first = server.machine.says(CURRENT)
    # A commit on top that can be seen from outside.
    server.machine.admin(f"echo 'Welcome back, {{{{ name }}}}' > {SUBJECT} && cd {CLONE} && {COMMIT} -a -m 'Back'")
    with Load(server) as load:
        server.install()
    second = server.machine.says(CURRENT)
    assert second != first
    sent_once(server, load)
    assert subject(server) == "Subject: Welcome back, Ada"

    server.relay.accepted.clear()
    with Load(server) as load:
        server.install("--rollback")
    assert server.machine.says(CURRENT) == first
    sent_once(server, load)
    assert subject(server) == "Subject: Welcome, Ada"
    eventually(lambda: server.doctor().exit < 2)
    server.machine.admin(f"cd {CLONE} && git reset -q --hard HEAD^")


def test_an_upgrade_from_the_first_layout_under_load(server: Server) -> None:
    """Old and new processes work side by side on the same Redis, on the way there and back."""
    for commit in (FIRST_LAYOUT, "-"):
        server.machine.admin(f"cd {CLONE} && git checkout -q {commit}")
        with Load(server) as load:
            server.install()
        sent_once(server, load)
        server.relay.accepted.clear()


def test_the_systems_own_upgrades_under_load(server: Server) -> None:
    """Redis, nginx and a library are replaced, and needrestart restarts whatever still runs the old ones, as it does
    behind unattended-upgrades. Nothing was new here, so the same versions are installed again."""
    with Load(server) as load:
        ours = "redis-server redis-tools nginx $(dpkg-query -Wf '${Package} ' 'libssl3*')"
        apt_get(server, f"install --reinstall {ours}")
        [found] = [one for one in server.doctor().troubles() if "still runs a program that was replaced" in one.found]
        assert found.fix == f"sudo systemctl restart {REDIS}"
        apt_get(server, "install needrestart")
        server.machine.run("needrestart -q -r a")
        eventually(server.is_up, 60)
    assert {one.split("(")[0] for one in load.refused} <= {"ConnectionRefusedError", "Response"}, load.refused
    server.arrives(*load.taken, seconds=120)
    assert server.copies() == dict.fromkeys(load.taken, 1)
    assert not [one for one in server.doctor().troubles() if "still runs" in one.found]


def apt_get(server: Server, what: str) -> None:
    server.machine.run(f"DEBIAN_FRONTEND=noninteractive apt-get -y -qq --no-install-recommends {what}")


def test_an_installation_waits_for_an_upgrade_that_is_at_work(server: Server) -> None:
    apt_get(server, "remove logrotate")
    lock = "fcntl.lockf(open('/var/lib/dpkg/lock-frontend', 'w'), fcntl.LOCK_EX)"
    holds = f"import fcntl, time; held = {lock}; open('/run/held', 'w'); time.sleep(5)"
    server.machine.run(f"setsid python3 -c {shlex.quote(holds)} > /dev/null 2>&1 &")
    eventually(lambda: server.machine.run("rm /run/held", check=False).returncode == 0)
    server.install()
    server.machine.run("test -x /usr/sbin/logrotate")


def test_a_pull_that_meets_local_changes_stops_before_the_installation(server: Server) -> None:
    """git keeps the operator's edit, and what runs is not touched. (TEMPLATES_DIR is the place for such edits.)"""
    running, current = server.main_pids(), server.machine.says(CURRENT)
    server.machine.admin(f"git clone -q {CLONE} theirs && echo Theirs > {SUBJECT.replace(CLONE, 'theirs')}")
    server.machine.admin(f"cd theirs && {COMMIT} -a -m Theirs && echo Ours > ~/{SUBJECT}")
    try:
        ran = server.machine.admin(f"cd {CLONE} && git pull -q ../theirs && sudo bin/install", check=False)
        assert ran.returncode == 1
        assert "would be overwritten by merge" in ran.stderr
        assert server.machine.says(f"cat ~admin/{SUBJECT}") == "Ours"
        assert (server.main_pids(), server.machine.says(CURRENT)) == (running, current)
    finally:
        server.machine.admin(f"rm -rf theirs; cd {CLONE} && git checkout -q {SUBJECT.replace(f'{CLONE}/', '')}")


def test_a_release_whose_requirements_do_not_exist_is_not_installed_and_nobody_notices(server: Server) -> None:
    running, current = server.main_pids(), server.machine.says(CURRENT)
    server.machine.admin(f"sed -i 's/^bottle==.* /bottle==99.99 /' {CLONE}/requirements.txt")
    try:
        ran = server.machine.admin(f"cd {CLONE} && sudo bin/install", check=False)
    finally:
        server.machine.admin(f"cd {CLONE} && git checkout -q requirements.txt")
    assert ran.returncode == 1
    assert "bottle==99.99" in ran.stderr
    assert (server.main_pids(), server.machine.says(CURRENT)) == (running, current)
