"""The processes of the API: who replaces whom, who ends with whom; a restart under systemd drops no request."""

from __future__ import annotations

import http.client
import json
import os
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, suppress
from pathlib import Path

import pytest

from tests.http_api import WELCOME
from tests.servers import ROOT, House, RedisServer, eventually, free_port


@pytest.fixture
def house(redis_server: RedisServer, tmp_path: Path) -> Iterator[House]:
    with House(tmp_path, redis_server.url, API_PROCESSES="2") as house:
        yield house


def both(of: subprocess.Popen[bytes]) -> set[int]:
    """The processes that serve, once they are two."""
    eventually(lambda: len(children(of.pid)) == 2)
    return children(of.pid)


def children(of: int) -> set[int]:
    return set(map(int, Path(f"/proc/{of}/task/{of}/children").read_text().split()))


def is_running(process: int) -> bool:
    with suppress(OSError):
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


def test_a_process_that_is_killed_is_replaced_and_the_other_goes_on(house: House) -> None:
    api = house.api()
    [parent] = house.processes
    before = both(parent)
    killed = min(before)
    os.kill(killed, signal.SIGKILL)
    assert api.post("/start-job", WELCOME).status == 202
    eventually(lambda: len(children(parent.pid) - {killed}) == 2)
    assert children(parent.pid) & before == before - {killed}


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGQUIT, signal.SIGKILL])
def test_all_end_with_the_parent(house: House, number: signal.Signals) -> None:
    house.api()
    [parent] = house.processes
    served_by = both(parent)
    parent.send_signal(number)
    parent.wait(10)
    eventually(lambda: not any(map(is_running, served_by)), 10)


def short_timeout_api(house: House) -> subprocess.Popen[bytes]:
    """The API, whose processes may be silent for five seconds."""
    source = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import service; from process import prefork; "
    source += "prefork.STUCK_AFTER = 5; "
    house.environment["LISTEN"] = f"127.0.0.1:{free_port()}"
    return house.run("api", "-c", source + "sys.exit(service.main())")


def test_a_process_that_stands_still_is_killed_and_replaced(house: House) -> None:
    parent = short_timeout_api(house)
    before = both(parent)
    stuck = min(before)
    os.kill(stuck, signal.SIGSTOP)
    eventually(lambda: len(children(parent.pid) - {stuck}) == 2 and stuck not in children(parent.pid))
    assert children(parent.pid) & before == before - {stuck}
    assert f"stuck process={stuck}" in house.log("api")


def test_a_process_that_stands_still_does_not_keep_the_others_from_ending(house: House) -> None:
    parent = short_timeout_api(house)
    os.kill(min(both(parent)), signal.SIGSTOP)
    parent.terminate()
    assert parent.wait(20) == 0


def test_after_all_of_them_stood_still_together_nobody_is_killed(house: House) -> None:
    parent = short_timeout_api(house)
    before = both(parent)
    os.killpg(parent.pid, signal.SIGSTOP)
    time.sleep(8)
    os.killpg(parent.pid, signal.SIGCONT)
    time.sleep(3)
    assert children(parent.pid) == before


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2])
def test_a_signal_that_asks_for_nothing_here_is_ignored(house: House, number: signal.Signals) -> None:
    api = house.api()
    [parent] = house.processes
    before = both(parent)
    for process in (parent.pid, *before):
        os.kill(process, number)
    time.sleep(1.5)
    assert children(parent.pid) == before
    assert api.post("/start-job", WELCOME).status == 202


def test_systemd_is_told_that_it_begins_goes_on_and_ends(house: House, tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd:
        systemd.bind(str(tmp_path / "notify"))
        systemd.settimeout(20)
        house.environment["NOTIFY_SOCKET"] = str(tmp_path / "notify")
        parent = short_timeout_api(house)
        for _ in range(2):
            assert systemd.recv(100) == b"READY=1\nWATCHDOG=1"
        parent.terminate()
        eventually(lambda: systemd.recv(100) == b"STOPPING=1")
        assert parent.wait(20) == 0


ACTIVATE = """
import os, sys
os.dup2(int(sys.argv[1]), 3)
os.environ.update(LISTEN_FDS="1", LISTEN_PID=str(os.getpid()))
os.execv(sys.executable, [sys.executable, *sys.argv[2:]])
"""


def activated(house: House, listener: socket.socket) -> subprocess.Popen[bytes]:
    number = listener.fileno()
    return house.run("api", "-c", ACTIVATE, str(number), str(ROOT / "service.py"), pass_fds=[number])


def ask(port: int, enough: threading.Event, answers: list[object]) -> None:
    """As a proxy does: on a connection that is kept until an answer says that it will be closed."""
    headers = {"Authorization": "Bearer full-key", "Content-Type": "application/json"}
    with closing(http.client.HTTPConnection("127.0.0.1", port, timeout=20)) as connection:
        while not enough.wait(0.05):
            try:
                connection.request("POST", "/start-job", json.dumps(WELCOME), headers)
                answer = connection.getresponse()
                answer.read()
                answers.append(answer.status)
            except (OSError, http.client.HTTPException) as error:
                answers.append(repr(error))
                connection.close()


def test_a_restart_under_systemd_drops_no_request(house: House) -> None:
    """systemd goes on listening while nobody serves."""
    heard, enough = [list[object]() for _ in range(4)], threading.Event()
    with socket.create_server(("127.0.0.1", 0)) as listener, ThreadPoolExecutor(4) as clients, ExitStack() as stack:
        stack.callback(enough.set)
        running = activated(house, listener)
        asking = [clients.submit(ask, listener.getsockname()[1], enough, answers) for answers in heard]
        for _ in range(3):
            seen = [len(answers) for answers in heard]
            eventually(lambda seen=seen: all(len(some) > n + 5 for some, n in zip(heard, seen, strict=True)))  # type: ignore[misc]
            running.terminate()
            assert running.wait(20) == 0
            running = activated(house, listener)
    assert [one.result() for one in asking] == [None] * 4
    assert {answer for answers in heard for answer in answers} == {202}
