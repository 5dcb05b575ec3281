"""A second release and the way back, while applications go on posting: no request fails, no mail is lost or doubled."""

from __future__ import annotations

import pytest

from tests.deploy.server import CLONE, Load, Server
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
