"""What a page of another site, open in a developer's browser, gets from bin/dev: nothing."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from contextlib import closing
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any, NamedTuple

import pytest
from redis import Redis
from selenium.webdriver import Chrome
from werkzeug.test import Client

from ops import catcher, dev
from ops.failing import Failures
from process.api_keys import ApiKey
from settings import load
from tests.dashboards import in_process
from tests.http_api import MAIL, app_with, ask
from tests.servers import Api, RedisServer, eventually, free_port
from tests.test_dev import Dev
from tests.test_dev import project as project
from tests.test_dev import running as running
from web.app import ROUTES
from web.hosts import ALLOWED, host_name, is_local

OURS = (
    *(
        "localhost",
        "LOCALHOST:9181",
        "localhost:",
        "127.0.0.1",
        "127.0.0.1:8000",
        "127.1.2.3:80",
        "[::1]",
        "[::1]:8025",
    ),
    *("app.localhost:3000", "mail.test", "MAIL.test:8000"),
)
STRANGERS = (
    *("", "evil.example", "evil.example:8025", "127.0.0.1.evil.example", "localhost.evil.example", "192.168.0.1:8025"),
    *("127.0.0.1@evil.example", "evil.example@127.0.0.1", "evil.example#127.0.0.1", "[::2]:8025", "[::1", "::1", "a b"),
    *("0.0.0.0:8000", "[::]:8000", "localhost:80:80", "localhost/", "127.1", "2130706433", "0x7f.1", "evil.mail.test"),
    *("mail.test.", ".localhost.evil.example", "xlocalhost", "[localhost]", "127.0.0.1,evil.example", "*"),
)


@pytest.mark.parametrize("host", OURS)
def test_a_loopback_name_or_one_that_was_given_is_ours(host: str) -> None:
    assert is_local(host, ["mail.test"])


@pytest.mark.parametrize("host", STRANGERS)
def test_any_other_name_is_not(host: str) -> None:
    assert not is_local(host, ["mail.test"])


@pytest.mark.parametrize("name", ["http://mail.test", "mail.test:8000", "", "*", ".test", "a b", "[::1]"])
def test_what_is_no_name_cannot_be_given(name: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="must be a host's name or address alone"):
        host_name(name)


def test_a_name_that_was_given_is_compared_in_lower_case() -> None:
    assert dev.parse_arguments(["--allow-host=Mail.Test", "--allow-host", "b"]).allow_host == ["mail.test", "b"]


def catcher_app() -> Client:
    inbox = catcher.Inbox()
    inbox.catch("ada@example.com", ["bob@example.com"], b"Content-Type: text/html\r\n\r\na secret")
    return Client(catcher.make_app(inbox, Failures(), "http://127.0.0.1:8000"))


PAGES: dict[str, tuple[Callable[[], Client], tuple[str, ...]]] = {  # programs -> their paths
    "catcher": (catcher_app, ("/", "/messages", "/messages/1.eml", "/messages/1/html", "/nowhere")),
    "dashboard": (
        lambda: in_process(login=False),
        ("/", "/rq/", "/rq/0/data/queues.json", "/rq/static/css/main.css", "/rq/nowhere"),
    ),
}


@pytest.mark.parametrize("program", PAGES)
def test_a_page_answers_another_name_with_a_sentence_and_nothing_else(program: str) -> None:
    made, paths = PAGES[program]
    for path in paths:
        answer = made().get(path, headers={"Host": "evil.example"})
        assert (answer.status_code, ALLOWED[1:] in answer.text, "secret" in answer.text) == (421, True, False), path
    assert made().get(paths[0], headers={"Host": "localhost:1"}).status_code < 400


def test_with_the_key_dev_the_api_answers_to_no_other_name_on_any_path(redis_server: RedisServer) -> None:
    mine = str(ApiKey("mine", "0" * 64, "full"))
    known = app_with(redis_server.url, api_keys=dev.api_keys(load(from_file={}, api_keys=mine)))
    for method, rule, *_ in ROUTES:
        path = rule.replace("<mail_id>", "1").replace("<job_id>", "1")
        answer = ask(known, method, path, HTTP_HOST="evil.example:8000", HTTP_AUTHORIZATION="Bearer dev")
        assert (answer.status, answer.body["type"]) == (421, "misdirected_request"), path
        assert answer.body["message"] == f"with the key dev, {ALLOWED}"
    assert ask(known, "GET", "/healthz", HTTP_HOST="[::1]:8000").status == 200
    assert ask(app_with(redis_server.url), "GET", "/healthz", HTTP_HOST="evil.example").status == 200


# In a browser


class Site(NamedTuple):
    """A stranger's, which hears what is posted to it."""

    url: str
    heard: list[bytes]


@pytest.fixture
def site() -> Iterator[Site]:
    heard: list[bytes] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Type", "text/html")
            self.end_headers()
            self.wfile.write(b"<title>A stranger's page</title>")

        def do_POST(self) -> None:
            heard.append(self.rfile.read(int(self.headers["Content-Length"])))
            self.do_GET()

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", free_port()), Handler) as server:
        Thread(target=server.serve_forever).start()
        yield Site(f"http://evil.rebound.example:{server.server_port}", heard)
        server.shutdown()


FETCH = """
const [url, options, done] = arguments;
fetch(url, options).then(async one => done([one.status, await one.text()]), error => done([0, String(error)]));
"""


def fetch(browser: Chrome, url: str, **options: Any) -> tuple[int, str]:
    """What the page that is open can read: a status and a text, or 0 and an error."""
    status, text = browser.execute_async_script(FETCH, url, options)
    return status, text


KEYED = {"Authorization": "Bearer dev", "Content-Type": "application/json"}
SMTP = "EHLO x\r\nMAIL FROM:<a@evil.example>\r\nRCPT TO:<b@evil.example>\r\nDATA\r\n\r\nforged\r\n.\r\n"


@pytest.mark.browser
def test_a_strangers_page_in_a_real_browser_reads_and_changes_nothing(
    running: Dev, browser: Chrome, site: Site
) -> None:
    running.start_and_read_the_welcome()
    ports = running.ports
    api, caught = Api(ports["api"], key="dev"), Api(ports["mail"])
    api.wait_for(api.submit(MAIL), "sent")
    api.wait_for(api.submit(MAIL | {"to": "bounced@example.com"}), "failed")
    before = state(ports, caught)

    for part in ("api", "mail", "dashboard"):  # DNS rebinding: the page's own name leads here now
        here = f"http://evil.rebound.example:{ports[part]}"
        browser.get(here)
        assert "the Host must be localhost" in browser.page_source.replace("The Host", "the Host")
        for path in ("/emails", "/clear", "/rq/requeue/email"):
            status, _ = fetch(browser, here + path, method="POST", headers=KEYED, body=json.dumps(MAIL))
            assert status in (404, 421), (part, path)
        for path in ("/metrics", "/messages", "/rq/0/data/queues.json"):
            assert fetch(browser, here + path)[0] in (404, 421), (part, path)

    browser.get(site.url)
    targets = [(ports["api"], "/emails"), (ports["api"], "/start-job"), (ports["mail"], "/clear")]
    targets += [(ports["mail"], "/chaos"), (ports["dashboard"], "/rq/requeue/email"), (ports["smtp"], "/")]
    for host in ("127.0.0.1", "localhost", "0.0.0.0"):  # and to our own names, across sites
        for port, path in [*targets, (ports["redis"], "/")]:
            url = f"http://{host}:{port}{path}"
            body = "FLUSHALL\r\n" if port == ports["redis"] else SMTP if port == ports["smtp"] else "percent=100"
            assert fetch(browser, url, method="POST", headers=KEYED, body=json.dumps(MAIL))[0] == 0, url
            fetch(browser, url, method="POST", mode="no-cors", credentials="include", body=body)
            assert fetch(browser, url)[0] == 0, url
    fetch(browser, site.url, method="POST", mode="no-cors", body=SMTP)
    assert site.heard == [SMTP.encode()]  # so it does send such bodies
    eventually(lambda: state(ports, caught) == before, 5)


def state(ports: dict[str, int], caught: Api) -> tuple[object, ...]:
    """What a page could have changed: mails and jobs in Redis, what was done with them, and what the catcher holds."""
    with closing(Redis(port=ports["redis"])) as client:
        jobs: Any = sorted(client.keys("rq:job:*")), client.zcard("rq:failed:email"), client.hgetall("mail:totals")
    return *jobs, len(caught.get("/messages").body["messages"]), "% of all mails fail" in caught.get("/").body
