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
from pathlib import Path

import pytest
from redis import Redis
from selenium.webdriver import Chrome
from selenium.webdriver.common.by import By

from ops import dashboard
from tests.dashboards import (
    CHANGING,
    LOOKING,
    PASSWORD,
    REDIS_PASSWORD,
    SAME_ORIGIN,
    SETTINGS,
    Running,
    contents,
    fail,
    queued,
    running,
    start,
)
from tests.dashboards import served as served
from tests.dashboards import store as store
from tests.servers import eventually

# The login


@pytest.mark.parametrize("path", [*LOOKING, *CHANGING, "/rq/99/view", "/rq/nowhere", "/nowhere"])
def test_without_a_login_every_path_answers_401_and_redis_is_not_asked(
    served: Running, store: Redis, path: str
) -> None:
    store.config_resetstat()
    answer = served.ask("POST" if path in CHANGING else "GET", path, SAME_ORIGIN, password="")
    assert answer.status == 401
    assert answer.headers["WWW-Authenticate"] == 'Basic realm="dashboard", charset="UTF-8"'
    assert set(store.info("commandstats")) <= {"cmdstat_config|resetstat", "cmdstat_info"}


@pytest.mark.parametrize(
    "authorization",
    [
        "",
        "Basic",
        "Basic !!!",
        "Basic " + base64.b64encode(b"admin").decode(),
        "Basic " + base64.b64encode(b"\xff:\xff").decode(),
        "Basic " + base64.b64encode(f"root:{PASSWORD}".encode()).decode(),
        "Basic " + base64.b64encode(f"admin:{PASSWORD}x".encode()).decode(),
        f"Bearer {PASSWORD}",
    ],
)
def test_a_wrong_login_is_refused(served: Running, authorization: str) -> None:
    assert served.ask("GET", "/rq/", {"Authorization": authorization}).status == 401


def test_both_fields_are_compared_in_constant_time_even_if_the_first_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    compared = []
    monkeypatch.setattr(hmac, "compare_digest", lambda given, right: compared.append((given, right)))
    app = dashboard.make_app(SETTINGS, login=True)
    app.test_client().get("/rq/", auth=("nobody", "guess"))
    assert compared == [(b"nobody", b"admin"), (b"guess", PASSWORD.encode())]


def test_the_front_page_leads_to_the_queues(served: Running, store: Redis) -> None:
    answer = served.get("/")
    assert (answer.status, answer.headers["Location"]) == (302, "/rq/")
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
        "/rq/job/a/delete",
        "/rq/job/a/requeue",
        "/rq/queue/email/compact",
        "/rq/queue/email/failed/empty",
        "/rq/requeue/email",
    ]


@pytest.mark.parametrize("path", CHANGING)
def test_neither_another_site_nor_a_link_or_an_image_can_change_anything(
    served: Running, store: Redis, path: str
) -> None:
    fail(store, "a")
    before = contents(store)
    for headers in ELSEWHERE:
        assert served.ask("POST", path, headers).status == 403, headers
    for method in ("GET", "HEAD"):
        assert served.ask(method, path, SAME_ORIGIN).status == 405
    assert contents(store) == before


@pytest.mark.parametrize("headers", [SAME_ORIGIN, {"Host": "d.example", "Origin": "https://d.example"}], ids=str)
def test_a_request_from_the_same_origin_requeues(served: Running, store: Redis, headers: dict[str, str]) -> None:
    fail(store, "a")
    assert served.ask("POST", "/rq/job/a/requeue", headers).status == 200
    assert queued(store) == ["a"]


@pytest.mark.browser
def test_another_site_cannot_requeue_with_the_login_that_the_browser_remembers(
    served: Running, store: Redis, browser: Chrome
) -> None:
    fail(store, "a")
    browser.get(served.page("/rq/"))
    address = f"http://127.0.0.1:{served.port}/rq/requeue/email"
    browser.get(f"data:text/html,<img src='{address}'><form method=post action='{address}'><button>win</button></form>")
    browser.find_element(By.TAG_NAME, "button").click()
    eventually(lambda: "must come from one of the dashboard's own pages" in browser.page_source)
    assert queued(store) == []


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST:9181", "127.0.0.1", "127.0.0.1:9181", "[::1]", "[::1]:9181"])
def test_without_a_login_loopback_names_are_answered(host: str) -> None:
    app = dashboard.make_app(SETTINGS, login=False)
    assert app.test_client().get("/", headers={"Host": host}).status_code == 302


@pytest.mark.parametrize("host", ["evil.example", "127.0.0.1.evil.example", "localhost.evil.example:9181", "10.0.0.1"])
@pytest.mark.parametrize("path", ["/", "/rq/", "/rq/0/data/queues.json", "/rq/static/css/main.css"])
def test_without_a_login_a_rebound_name_is_refused(host: str, path: str) -> None:
    app = dashboard.make_app(SETTINGS, login=False)
    assert app.test_client().get(path, headers={"Host": host}).status_code == 403


@pytest.mark.parametrize("path", ["/", "/rq/", "/rq/static/css/main.css", "/rq/nowhere", "/rq/0/data/queues.json"])
@pytest.mark.parametrize("password", [PASSWORD, "wrong"])
def test_every_answer_forbids_framing_and_sniffing(served: Running, store: Redis, path: str, password: str) -> None:
    headers = served.ask("GET", path, password=password).headers
    assert headers["X-Frame-Options"] == "DENY"
    assert "frame-ancestors 'none'" in headers["Content-Security-Policy"]
    assert headers["X-Content-Type-Options"] == "nosniff"
    assert headers["Referrer-Policy"] == "same-origin"
    assert headers["Server"] is None
    assert ("static" in path) or headers["Cache-Control"] == "no-store"


def test_inline_script_runs_only_with_a_nonce_that_is_new_on_every_page(served: Running, store: Redis) -> None:
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


def test_the_password_of_redis_is_nowhere_to_be_seen(served: Running, store: Redis) -> None:
    fail(store, "a")
    for path in LOOKING:
        assert REDIS_PASSWORD not in served.get(path).body, path
    assert REDIS_PASSWORD.encode() not in Path(f"/proc/{served.process.pid}/cmdline").read_bytes()
    assert REDIS_PASSWORD not in served.output.read_text()


SWITCHED_OFF = ["/rq/job/a/delete", "/rq/queue/email/failed/empty"]
NEEDING_REDIS = [path for path in LOOKING if path == "/rq/" or path.startswith("/rq/0/")]
NEEDING_REDIS += [path for path in CHANGING if path not in SWITCHED_OFF]


@pytest.mark.parametrize(
    ("silent", "paths"),
    [(False, NEEDING_REDIS), (True, ["/rq/", "/rq/0/data/workers.json", "/rq/requeue/email"])],
    ids=["refused", "silent"],
)
def test_without_redis_a_page_or_button_answers_a_plain_503_within_three_seconds(
    silent: bool, paths: list[str], tmp_path: Path
) -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        if silent:
            listener.listen()
        assert_all_answer_503(f"redis://:{REDIS_PASSWORD}@127.0.0.1:{listener.getsockname()[1]}/0", paths, tmp_path)


def assert_all_answer_503(url: str, paths: list[str], directory: Path) -> None:
    with running(directory, url, DASHBOARD_PASSWORD=PASSWORD) as served:
        for path in paths:
            asked = time.monotonic()
            answer = served.post(path) if path in CHANGING else served.get(path)
            assert time.monotonic() - asked < 3
            assert (answer.status, answer.body) == (503, "Redis does not answer\n"), path
            assert answer.headers["Content-Type"] == "text/plain; charset=utf-8"
        assert served.get("/").status == 302
        output = served.output.read_text()
    assert "Traceback" not in output
    assert REDIS_PASSWORD not in output


# The process


def test_it_refuses_to_start_with_one_sentence_that_names_the_setting(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = f"127.0.0.1:{taken.getsockname()[1]}"
        refusals: dict[tuple[str, ...], str] = {  # listen, password, options -> what is printed
            ("127.0.0.1:1", ""): "DASHBOARD_PASSWORD is not set",
            ("0.0.0.0:9181", "", "--no-login"): "DASHBOARD_LISTEN: 0.0.0.0:9181 is not loopback; --no-login is for",
            (port, PASSWORD): f"DASHBOARD_LISTEN: cannot listen on {port}: Address already in use",
            ("no.such.invalid:1", PASSWORD): "DASHBOARD_LISTEN: cannot listen on no.such.invalid:1: there is no",
        }
        for (address, password, *options), printed in refusals.items():
            output = tmp_path / "output"
            with start(output, *options, DASHBOARD_LISTEN=address, DASHBOARD_PASSWORD=password) as process:
                assert process.wait(timeout=30) == 2
            assert output.read_text().startswith(printed)
            assert output.read_text().count("\n") == 1


@pytest.mark.parametrize("stop", [signal.SIGTERM, signal.SIGINT])
def test_it_ends_cleanly_on_a_signal(tmp_path: Path, stop: signal.Signals) -> None:
    with running(tmp_path, "redis://127.0.0.1:1/0", "--no-login") as served:
        assert served.get("/").status == 302
        served.process.send_signal(stop)
        assert served.process.wait(timeout=30) == 0
        assert "Traceback" not in served.output.read_text()
