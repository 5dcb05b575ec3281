"""What happens to a server in its life: processes killed, one that hangs, reboots. Nobody comes to help."""

from __future__ import annotations

import pytest

from tests.deploy.server import API, DASHBOARD, EMAIL, JOBS, NGINX, REDIS, Load, Server
from tests.servers import eventually

pytestmark = pytest.mark.deploy


def restarted(server: Server, unit: str, was: int) -> bool:
    return server.main_pid(unit) not in (0, was) and server.is_up()


@pytest.mark.parametrize("unit", [API, EMAIL, JOBS, DASHBOARD, REDIS, NGINX])
def test_a_killed_service_comes_back_and_no_mail_is_lost(server: Server, unit: str) -> None:
    before = dict(server.post() for _ in range(5))
    if unit == REDIS:
        server.arrives(*before)  # a mail that is being sent meanwhile is in doubt, and sent again two minutes later
    was = server.main_pid(unit)
    server.machine.run(f"kill -9 {was}")
    eventually(lambda: restarted(server, unit, was), 60)
    after, _ = server.post()
    server.arrives(*before, after, seconds=150)
    eventually(lambda: {server.api.email(mail_id)["status"] for mail_id in before.values()} == {"sent"})


def test_each_process_of_the_api_is_replaced(server: Server) -> None:
    main, before = server.main_pid(API), set(server.processes(API))
    assert len(before) > 2
    for process in before - {main}:
        server.machine.run(f"kill -9 {process}")
        eventually(lambda: is_taken(server), 5)
    eventually(lambda: len(set(server.processes(API)) - before) == len(before) - 1)
    assert server.main_pid(API) == main


def is_taken(server: Server) -> bool:
    """False for a request that still went to a process which had just been killed: nginx says 502, and to try again."""
    answer = server.api.post("/start-job", {"name": "Ada", "email": server.somebody()})
    assert answer.status in (202, 502), answer
    return answer.status == 202


def test_a_worker_that_hangs_is_found_by_the_watchdog(server: Server) -> None:
    """With a watchdog of ten seconds instead of two minutes, which the worker learns from systemd."""
    folder = f"/run/systemd/system/{EMAIL}.d"
    server.machine.run(f"mkdir -p {folder} && printf '[Service]\\nWatchdogSec=10\\n' > {folder}/test.conf")
    try:
        server.machine.run(f"systemctl daemon-reload && systemctl restart {EMAIL}")
        hung = server.main_pid(EMAIL)
        server.machine.run(f"kill -STOP {hung}")
        recipient, _ = server.post()
        eventually(lambda: restarted(server, EMAIL, hung), 90)
        server.arrives(recipient, seconds=150)
        assert "watchdog" in server.machine.says(f"journalctl --no-pager -u {EMAIL} -n 100").lower()
    finally:
        server.machine.run(f"rm -r {folder} && systemctl daemon-reload && systemctl restart {EMAIL}")


@pytest.mark.parametrize("unit", [API, EMAIL, REDIS])
def test_of_what_was_taken_while_a_service_is_killed_nothing_is_lost(server: Server, unit: str) -> None:
    with Load(server) as load:
        was = server.main_pid(unit)
        server.machine.run(f"kill -9 {was}")
        eventually(lambda: restarted(server, unit, was), 60)
    assert unit != EMAIL or load.refused == []  # the others tell their clients to come again
    server.arrives(*load.taken, seconds=200)


def test_half_a_transaction_that_a_crash_left_is_cut_off_and_never_run(server: Server) -> None:
    log = server.machine.says("ls /var/lib/redis-async-email/appendonlydir/*.incr.aof")
    before = server.machine.says(f"stat -c '%U %a' {log}")
    half = r"*1\r\n$5\r\nMULTI\r\n*3\r\n$3\r\nSET\r\n$4\r\nhalf\r\n$1\r\n1\r\n*3\r\n$3"
    was = server.main_pid(REDIS)
    server.machine.run(f"kill -STOP {was} && printf '{half}' >> {log} && kill -9 {was}")
    eventually(lambda: restarted(server, REDIS, was), 60)
    lost = len(half.encode().decode("unicode_escape"))
    said = f"{log}: cut off the last transaction, which is not finished: {lost} bytes"
    assert said in server.machine.says(f"journalctl --no-pager -o cat -u {REDIS}")
    server.delivers(150)
    was = server.main_pid(REDIS)
    server.machine.run(f"systemctl restart {REDIS}")
    eventually(lambda: restarted(server, REDIS, was), 60)
    assert "CRITICAL" not in server.machine.says(f"journalctl --no-pager -o cat -u {REDIS}")
    assert server.machine.says(f"stat -c '%U %a' {log}") == before


@pytest.mark.parametrize("how", ["rebooted", "cut off"])
def test_after_a_reboot_all_is_as_before_and_each_mail_is_sent_once(server: Server, how: str) -> None:
    """Cut off: every process is killed at once. What a power cut does to a disk's own cache cannot be done here."""
    with server.relay_away():
        posted = dict(server.post() for _ in range(20))
        if how == "rebooted":
            server.machine.reboot()
        else:
            server.machine.kill()
            server.machine.boot()
        eventually(server.is_up, 60)
        eventually(lambda: {server.api.email(one)["status"] for one in posted.values()} <= {"queued", "delayed"})
    server.arrives(*posted, seconds=120)
    eventually(lambda: {server.api.email(mail_id)["status"] for mail_id in posted.values()} == {"sent"})
    copies = server.copies()  # also of what the test before had in doubt
    assert {recipient: copies[recipient] for recipient in posted} == dict.fromkeys(posted, 1)
