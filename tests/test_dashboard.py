"""ops/dashboard.py over HTTP and in Chromium: who may ask, from where, what is refused, and how it starts and ends.

The requests that must be refused are made for every route that Flask knows of, so that a route which a new rq-dashboard
brings along is refused too, or noticed here.
"""

from __future__ import annotations

import base64
import hmac
import re
import signal
import socket
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest
from redis import Redis
from selenium.webdriver import Chrome
from selenium.webdriver.common.by import By

from process import guesses as guessing
from tests.dashboards import (
    CHANGING,
    LOOKING,
    PASSWORD,
    REDIS_PASSWORD,
    SAME_ORIGIN,
    Running,
    contents,
    fail,
    in_process,
    queued,
    running,
)
from tests.dashboards import served as served
from tests.servers import ROOT, House, eventually

# The login


@pytest.mark.parametrize("path", [*LOOKING, *CHANGING, "/rq/99/view", "/rq/nowhere", "/nowhere"])
def test_without_a_login_every_path_is_401_and_redis_is_not_asked(served: Running, client: Redis, path: str) -> None:
    def asks_nothing() -> bool:
        client.config_resetstat()
        for method in ("GET", "POST"):
            answer = served.ask(method, path, SAME_ORIGIN, password=None)
            assert answer.status == 401
            assert answer.headers["Www-Authenticate"] == 'Basic realm="dashboard", charset="UTF-8"'
        return set(client.info("commandstats")) <= {"cmdstat_config|resetstat", "cmdstat_info"}

    eventually(asks_nothing, seconds=10)  # its watch looks now and then


LOGINS = [b"admin", b"\xff:\xff", f"root:{PASSWORD}".encode(), f"admin:{PASSWORD}x".encode()]
BASIC = [f"Basic {base64.b64encode(login).decode()}" for login in LOGINS]


@pytest.mark.parametrize("authorization", ["", "Basic", "Basic !!!", f"Bearer {PASSWORD}", *BASIC])
def test_a_wrong_login_is_refused(authorization: str) -> None:
    assert in_process(login=True).get("/rq/", headers={"Authorization": authorization}).status_code == 401


def test_of_a_thousand_guesses_ten_are_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    looked_at: list[bytes] = []
    compare = hmac.compare_digest

    def count(given: bytes, right: bytes) -> bool:
        looked_at.append(given)
        return compare(given, right)

    monkeypatch.setattr(hmac, "compare_digest", count)
    dashboard = in_process(login=True)
    with ThreadPoolExecutor(8) as threads:
        guess = partial(dashboard.application.test_client().get, "/")
        seen = Counter(one.status_code for one in threads.map(lambda n: guess(auth=("admin", str(n))), range(1000)))
    assert seen == {401: guessing.TRIES, 429: 1000 - guessing.TRIES}
    assert len(looked_at) == 2 * guessing.TRIES
    refused = dashboard.get("/", auth=("admin", PASSWORD))
    assert (refused.status_code, refused.headers["Retry-After"]) == (429, "10")
    assert dashboard.get("/").status_code == 401
    assert dashboard.get("/", auth=("admin", PASSWORD), environ_base={"REMOTE_ADDR": "10.0.0.1"}).status_code == 302


def test_right_logins_are_not_limited_and_wrong_ones_are_forgotten_one_by_one() -> None:
    now = [0.0]
    guesses = guessing.Guesses(lambda: now[0])
    for _ in range(100):
        assert guesses.take("192.0.2.1")
        guesses.give_back("192.0.2.1")
    taken = [guesses.take("192.0.2.1") for _ in range(2 * guessing.TRIES)]
    assert taken == [True] * guessing.TRIES + [False] * guessing.TRIES
    now[0] += 2 * guessing.PAUSE
    assert [guesses.take("192.0.2.1") for _ in "123"] == [True, True, False]


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("127.0.0.1", "127.9.9.9"),
        ("127.0.0.1", "::1"),
        ("localhost", "::1"),
        ("2001:db8::1", "2001:db8::ffff:1"),
        ("127.0.0.1", "::ffff:127.0.0.1"),
    ],
)
def test_addresses_of_which_one_guesser_has_many_count_as_one(one: str, other: str) -> None:
    assert guessing.network(one) == guessing.network(other)
    assert guessing.network("192.0.2.1") != guessing.network("192.0.2.2")


def test_only_so_many_addresses_are_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guessing, "REMEMBERED", 100)
    guesses = guessing.Guesses()
    for number in range(1000):
        guesses.take(f"192.0.{number >> 8}.{number & 255}")
    guesses.give_back("192.0.0.0")
    assert len(guesses._forgotten_at) <= 101


def test_both_fields_are_compared_in_constant_time_even_if_the_first_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    compared = []
    monkeypatch.setattr(hmac, "compare_digest", lambda given, right: compared.append((given, right)))
    in_process(login=True).get("/rq/", auth=("nobody", "guess"))
    assert compared == [(b"nobody", b"admin"), (b"guess", PASSWORD.encode())]


def test_the_front_page_leads_to_the_mails(served: Running, client: Redis) -> None:
    answer = served.get("/")
    assert (answer.status, answer.headers["Location"]) == (302, "/mail/")
    assert served.get("/rq/").status == 200


# Requests from elsewhere

ELSEWHERE = [
    {"Sec-Fetch-Site": "cross-site"},
    {"Sec-Fetch-Site": "same-site"},
    {"Sec-Fetch-Site": "none"},
    {"Sec-Fetch-Site": "cross-site", "Host": "d.example", "Origin": "http://d.example"},
    {"Host": "d.example", "Origin": "http://evil.example"},
    {"Host": "d.example", "Origin": "http://d.example:8080"},
    {"Host": "d.example", "Origin": "null"},
    {"Host": "", "Origin": "null"},
    {},
]


def test_these_are_all_the_routes_that_change_something() -> None:
    assert sorted(CHANGING) == [
        "/mail/emails/01a21b29-4e1c-7a05-9d3f-2f9a3c1be5d7/requeue",
        "/mail/failures/jobs",
        "/mail/failures/mails",
        "/mail/search",
        "/mail/suppressions",
        "/mail/suppressions/01a21b29-4e1c-7a05-9d3f-2f9a3c1be5d8",
        "/mail/system/pause",
        "/mail/templates/welcome",
        "/mail/webhooks/page.css/pause",
        "/rq/job/a/delete",
        "/rq/job/a/requeue",
        "/rq/queue/email/compact",
        "/rq/queue/email/failed/empty",
        "/rq/requeue/email",
    ]


@pytest.mark.parametrize("path", CHANGING)
def test_no_other_site_link_or_image_can_change_anything(served: Running, client: Redis, path: str) -> None:
    fail(client, "a")
    before = contents(client)
    for headers in ELSEWHERE:
        assert served.ask("POST", path, headers).status == 403, headers
    for method in () if path in LOOKING else ("GET", "HEAD"):  # the pages at /mail/ ask at the same path
        assert served.ask(method, path, SAME_ORIGIN).status == 405
    assert contents(client) == before


@pytest.mark.parametrize("headers", [SAME_ORIGIN, {"Host": "d.example", "Origin": "https://d.example"}], ids=str)
def test_a_request_from_the_same_origin_requeues(served: Running, client: Redis, headers: dict[str, str]) -> None:
    fail(client, "a")
    assert served.ask("POST", "/rq/job/a/requeue", headers).status == 200
    assert queued(client) == ["a"]


@pytest.mark.browser
def test_no_other_site_can_use_the_login_that_a_browser_keeps(served: Running, client: Redis, browser: Chrome) -> None:
    fail(client, "a")
    browser.get(served.page("/rq/"))
    address = f"http://127.0.0.1:{served.port}/rq/requeue/email"
    browser.get(f"data:text/html,<img src='{address}'><form method=post action='{address}'><button>win</button></form>")
    browser.find_element(By.TAG_NAME, "button").click()
    eventually(lambda: "must come from one of the dashboard's own pages" in browser.page_source)
    assert queued(client) == []


@pytest.mark.parametrize("path", ["/", "/rq/", "/rq/static/css/main.css", "/rq/nowhere", "/rq/0/data/queues.json"])
@pytest.mark.parametrize("password", [PASSWORD, None])
def test_every_answer_forbids_framing_and_sniffing(
    served: Running, client: Redis, path: str, password: str | None
) -> None:
    headers = served.ask("GET", path, password=password).headers
    fixed = {"X-Frame-Options": "DENY", "X-Content-Type-Options": "nosniff", "Referrer-Policy": "same-origin"}
    assert headers.items() >= fixed.items()
    assert "frame-ancestors 'none'" in headers["Content-Security-Policy"]
    assert "Server" not in headers
    assert ("static" in path) or headers["Cache-Control"] == "no-store"


def test_inline_script_runs_only_with_a_nonce_that_is_new_on_every_page(served: Running, client: Redis) -> None:
    nonces = set()
    for _ in range(2):
        answer = served.get("/rq/")
        policy = re.search(r"script-src ([^;]*);", answer.headers["Content-Security-Policy"])
        assert policy
        assert "unsafe-inline" not in policy[1]
        nonces |= {re.findall("'nonce-(.+?)'", policy[1])[0], *re.findall('<script nonce="(.+?)">', answer.body)}
    assert len(nonces) == 2


def test_a_body_that_no_button_sends_is_refused(served: Running) -> None:
    assert served.ask("POST", "/rq/requeue/email", SAME_ORIGIN | {"Content-Length": "70000"}).status == 413


# Redis, and its password


def test_the_password_of_redis_is_nowhere_to_be_seen(served: Running, client: Redis) -> None:
    fail(client, "a")
    for path in LOOKING:
        assert REDIS_PASSWORD not in str(served.get(path).body), path
    assert REDIS_PASSWORD.encode() not in Path(f"/proc/{served.process.pid}/cmdline").read_bytes()
    assert REDIS_PASSWORD not in served.output.read_text()


SWITCHED_OFF = (
    "/rq/job/a/delete",
    "/rq/queue/email/failed/empty",
    "/mail/search",
    "/mail/templates/welcome",
)  # or asks for nothing
NEEDING_REDIS = [path for path in LOOKING if path == "/rq/" or path.startswith("/rq/0/")]
NEEDING_REDIS += [path for path in CHANGING if path not in SWITCHED_OFF]


@pytest.mark.parametrize("silent", [False, True])
def test_without_redis_a_page_or_button_answers_a_plain_503_within_three_seconds(silent: bool, tmp_path: Path) -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        if silent:
            listener.listen()
        url = f"redis://:{REDIS_PASSWORD}@127.0.0.1:{listener.getsockname()[1]}/0"
        with running(tmp_path, url, DASHBOARD_PASSWORD=PASSWORD) as served:
            for path in ["/rq/", "/rq/0/data/workers.json", "/rq/requeue/email"] if silent else NEEDING_REDIS:
                asked = time.monotonic()
                answer = served.post(path) if path in CHANGING else served.get(path)
                assert time.monotonic() - asked < 3
                assert (answer.status, answer.body) == (503, "Redis does not answer\n"), path
                assert answer.headers["Content-Type"] == "text/plain; charset=utf-8"
            assert served.get("/").status == 302
            assert not re.search(f"Traceback|{REDIS_PASSWORD}", served.output.read_text())


# The process


def test_it_refuses_to_start_with_one_sentence_that_names_the_setting(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = f"127.0.0.1:{taken.getsockname()[1]}"
        refusals: list[tuple[str, str, list[str], str]] = [  # listen, password, options, what is printed
            ("127.0.0.1:1", "", [], "DASHBOARD_PASSWORD is not set"),
            ("0.0.0.0:9181", "", ["--no-login"], "DASHBOARD_LISTEN: 0.0.0.0:9181 is not loopback; --no-login is for"),
            (port, PASSWORD, [], f"DASHBOARD_LISTEN: cannot listen on {port}: Address already in use"),
            ("no.such.invalid:1", PASSWORD, [], "DASHBOARD_LISTEN: cannot listen on no.such.invalid:1: there is no"),
        ]
        with House(tmp_path, "redis://127.0.0.1:1/0", PYTHONPATH=str(ROOT), PYTHONWARNINGS="") as house:
            for listen, password, options, _ in refusals:
                house.environment |= {"DASHBOARD_LISTEN": listen, "DASHBOARD_PASSWORD": password}
                assert house.run("refusals", "-m", "ops.dashboard", *options).wait(timeout=30) == 2
    for line, (*_, printed) in zip(house.log("refusals").splitlines(), refusals, strict=True):
        assert line.startswith(printed)


@pytest.mark.parametrize("stop", [signal.SIGTERM, signal.SIGINT])
def test_it_ends_cleanly_on_a_signal(tmp_path: Path, stop: signal.Signals) -> None:
    with running(tmp_path, "redis://127.0.0.1:1/0", "--no-login") as served:
        assert served.get("/").status == 302
        served.process.send_signal(stop)
        assert served.process.wait(timeout=30) == 0
        assert "Traceback" not in served.output.read_text()
