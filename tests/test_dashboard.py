"""ops/dashboard.py over HTTP and in Chromium, as a process of its own before a real Redis.

The requests that must be refused are made for every route that Flask knows of, so that a route which a new rq-dashboard
brings along is refused too, or noticed here.
"""

from __future__ import annotations

import base64
import hmac
import http.client
import json
import pickle
import re
import signal
import socket
import subprocess
import sys
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from flask import url_for
from redis import Redis
from rq import Queue
from rq.command import send_kill_horse_command
from rq.executions import Execution
from rq.job import Job, JobStatus
from rq.registry import FailedJobRegistry
from rq.results import Result
from rq.serializers import JSONSerializer
from selenium.common.exceptions import StaleElementReferenceException
from selenium.webdriver import Chrome
from selenium.webdriver.common.by import By
from selenium.webdriver.support.wait import WebDriverWait

from ops import dashboard
from settings import load
from tests.servers import RedisServer, free_port

ROOT = Path(__file__).parent.parent
PASSWORD, REDIS_PASSWORD = "dashboard-secret", "redis-secret"
SETTINGS = load(_env_file=None, dashboard_password=PASSWORD)
SAME_ORIGIN = {"Sec-Fetch-Site": "same-origin"}
MARKUP = "<img src=x onerror=\"document.title='pwned'\">"
SAMPLES = {  # one value for each variable in a route
    "instance_number": 0,
    "queue_name": "email",
    "registry_name": "failed",
    "per_page": 8,
    "order": "asc",
    "page": 1,
    "job_id": "a",
    "filename": "css/main.css",
}


class Answer(NamedTuple):
    status: int
    headers: http.client.HTTPMessage
    body: str


class Running(NamedTuple):
    """A dashboard in a process of its own."""

    process: subprocess.Popen[bytes]
    port: int
    output: Path

    def ask(self, method: str, path: str, headers: dict[str, str] | None = None, password: str = PASSWORD) -> Answer:
        login = base64.b64encode(f"admin:{password}".encode()).decode()
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=10)
        try:
            connection.request(method, path, headers={"Authorization": f"Basic {login}"} | (headers or {}))
            answer = connection.getresponse()
            return Answer(answer.status, answer.headers, answer.read().decode(errors="replace"))
        finally:
            connection.close()

    def post(self, path: str, **headers: str) -> Answer:
        return self.ask("POST", path, headers or SAME_ORIGIN)

    def get(self, path: str) -> Answer:
        return self.ask("GET", path)

    def page(self, path: str) -> str:
        """The address to type into a browser, which logs in with it."""
        return f"http://admin:{PASSWORD}@127.0.0.1:{self.port}{path}"


def start(output: Path, *options: str, **environment: str) -> subprocess.Popen[bytes]:
    """Starts a dashboard with this environment and no other."""
    output.parent.mkdir(exist_ok=True)
    with output.open("wb") as file:
        command = [sys.executable, "-m", "ops.dashboard", *options]
        environment = {"PYTHONPATH": str(ROOT), **environment}
        return subprocess.Popen(command, cwd=output.parent, env=environment, stdout=file, stderr=subprocess.STDOUT)


def wait_until(happened: Callable[[], object], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < deadline, f"not within {seconds} s"
        time.sleep(0.05)


def accepts_connections(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


@contextmanager
def running(directory: Path, redis_url: str, *options: str, **environment: str) -> Iterator[Running]:
    port = free_port()
    environment = {"REDIS_URL": redis_url, "DASHBOARD_LISTEN": f"127.0.0.1:{port}", **environment}
    process = start(directory / "output", *options, **environment)
    try:
        wait_until(lambda: accepts_connections(port) or process.poll() is not None)
        yield Running(process, port, directory / "output")
    finally:
        process.terminate()
        process.wait(timeout=20)


@pytest.fixture(scope="module")
def served(redis_server: RedisServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """The dashboard that most tests ask. Its Redis wants a password, so that the tests can look for a leak of it."""
    with redis_server.client() as client:
        client.acl_setuser("dash", enabled=True, passwords=[f"+{REDIS_PASSWORD}"], keys=["*"], commands=["+@all"])
    url = f"{redis_server.url}?username=dash&password={REDIS_PASSWORD}"  # rq-dashboard itself hides user:password@ only
    with running(tmp_path_factory.mktemp("dashboard"), url, DASHBOARD_PASSWORD=PASSWORD) as served:
        yield served


@pytest.fixture
def store(redis_server: RedisServer) -> Iterator[Redis]:
    with redis_server.client() as client:
        client.flushall()
        yield client


def email_queue(store: Redis) -> Queue:
    return Queue("email", connection=store, serializer=JSONSerializer)


def queued(store: Redis) -> list[str]:
    return email_queue(store).get_job_ids()


def enqueue(store: Redis, job_id: str, **more: Any) -> Job:
    return email_queue(store).enqueue("tasks.deliver", job_id, job_id=job_id, **more)


def fail(store: Redis, job_id: str, error: str = "Traceback: no luck", **more: Any) -> Job:
    """A failed job, as a worker leaves it."""
    job = enqueue(store, job_id, **more)
    email_queue(store).remove(job)
    job.set_status(JobStatus.FAILED)
    FailedJobRegistry(queue=email_queue(store)).add(job, ttl=1000)
    Result.create_failure(job, ttl=1000, exc_string=error)
    return job


def occupy_a_worker(store: Redis, job: Job, name: str = "w1") -> None:
    """What Redis holds while a worker is busy with this job."""
    started = "2026-01-01T00:00:00.000000Z"
    store.sadd("rq:workers", f"rq:worker:{name}")
    store.hset(
        f"rq:worker:{name}",
        mapping={"state": "busy", "queues": "email", "birth": started, "last_heartbeat": started, "pid": 1},
    )
    with store.pipeline() as pipe:
        Execution.create(job, ttl=1000, pipeline=pipe, worker_name=name)
        pipe.execute()


def contents(store: Redis) -> dict[Any, bytes | None]:
    return {key: store.dump(key) for key in store.scan_iter()}


def routes() -> tuple[list[str], list[str]]:
    """Every path that Flask answers on: those that only look, and those that change something."""
    app = dashboard.make_app(SETTINGS, login=True)
    looking: list[str] = []
    changing: list[str] = []
    with app.test_request_context():
        for rule in app.url_map.iter_rules():
            samples: dict[str, Any] = {name: SAMPLES[name] for name in rule.arguments}
            path = url_for(rule.endpoint, **samples)
            (changing if (rule.methods or set()) - dashboard.READING else looking).append(path)
    return looking, changing


LOOKING, CHANGING = routes()


# The login


@pytest.mark.parametrize("path", [*LOOKING, "/rq/99/view", "/rq/nowhere", "/nowhere"])
def test_without_a_login_every_path_answers_401_and_redis_is_not_asked(
    served: Running, store: Redis, path: str
) -> None:
    store.config_resetstat()
    answer = served.ask("GET", path, password="")
    assert answer.status == 401
    assert answer.headers["WWW-Authenticate"] == 'Basic realm="dashboard", charset="UTF-8"'
    assert set(store.info("commandstats")) <= {"cmdstat_config|resetstat", "cmdstat_info"}


@pytest.mark.parametrize("path", CHANGING)
def test_without_a_login_nothing_can_be_changed(served: Running, store: Redis, path: str) -> None:
    fail(store, "a")
    before = contents(store)
    assert served.ask("POST", path, SAME_ORIGIN, password="").status == 401
    assert contents(store) == before


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
@pytest.mark.parametrize("headers", ELSEWHERE, ids=str)
def test_a_cross_site_request_cannot_change_anything(
    served: Running, store: Redis, path: str, headers: dict[str, str]
) -> None:
    fail(store, "a")
    before = contents(store)
    assert served.ask("POST", path, headers).status == 403
    assert contents(store) == before


@pytest.mark.parametrize("path", CHANGING)
@pytest.mark.parametrize("method", ["GET", "HEAD"])
def test_a_link_or_an_image_cannot_change_anything(served: Running, store: Redis, path: str, method: str) -> None:
    fail(store, "a")
    before = contents(store)
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
    wait_until(lambda: "must come from one of the dashboard's own pages" in browser.page_source)
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


# What comes from Redis is data


@pytest.mark.browser
def test_markup_in_a_job_is_shown_as_text_and_runs_nothing(served: Running, store: Redis, browser: Chrome) -> None:
    job = fail(store, "a", error=f"error {MARKUP}", description=f"description {MARKUP}", meta={"note": MARKUP})
    for page in ("/rq/0/view/job/a", "/rq/0/view/jobs/email/failed/8/asc/1"):
        browser.get(served.page(page))
        wait_until(lambda: f"error {MARKUP}" in browser.find_element(By.TAG_NAME, "body").text)
        assert f"description {MARKUP}" in browser.find_element(By.TAG_NAME, "body").text
        assert_nothing_ran(browser)
    Result.create(job, Result.Type.SUCCESSFUL, ttl=1000, return_value={"result": MARKUP})
    browser.get(served.page("/rq/0/view/job/a"))
    wait_until(lambda: json.dumps({"result": MARKUP}, indent=2) in browser.find_element(By.ID, "job-data").text)
    assert json.dumps({"note": MARKUP}) in browser.find_element(By.ID, "job-data").text
    assert_nothing_ran(browser)


def assert_nothing_ran(browser: Chrome) -> None:
    browser.implicitly_wait(0)
    assert browser.find_elements(By.TAG_NAME, "img") == []
    assert browser.title == "RQ dashboard"
    assert [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"] == []  # type: ignore[no-untyped-call]


@pytest.mark.browser
def test_markup_in_the_name_of_a_queue_or_a_worker_runs_nothing(served: Running, store: Redis, browser: Chrome) -> None:
    name = f"<b>{MARKUP}"
    store.sadd("rq:queues", f"rq:queue:{name}")
    occupy_a_worker(store, enqueue(store, "a", description=MARKUP), name)
    for page in ("/rq/", "/rq/0/view/workers"):
        browser.get(served.page(page))
        wait_until(lambda: name in browser.find_element(By.TAG_NAME, "table").text)
        assert_nothing_ran(browser)


@pytest.mark.browser
@pytest.mark.parametrize("name", ["');document.title='pwned';('", "</script><script>document.title='pwned'</script>"])
def test_a_link_with_script_for_a_queue_name_runs_nothing(
    served: Running, store: Redis, browser: Chrome, name: str
) -> None:
    path = "/rq/0/view/jobs/" + name.replace("/", "%252F").replace("<", "%3C").replace(">", "%3E") + "/queued/8/asc/1"
    browser.get(served.page(path))
    field = browser.find_element(By.ID, "select-queue")
    field.click()
    browser.execute_script("$('#select-queue').trigger('mouseleave')")
    assert field.get_attribute("value") == name.replace("/", "%2F")
    assert_nothing_ran(browser)


def test_an_rq_dashboard_whose_templates_have_changed_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for mends in (dashboard.MENDS[1:], [mend._replace(times=mend.times + 1) for mend in dashboard.MENDS]):
        monkeypatch.setattr(dashboard, "MENDS", mends)
        with pytest.raises(RuntimeError, match="rq-dashboard"):
            dashboard.make_app(SETTINGS, login=True)


class Bomb:
    """Pickled, it makes whoever un-pickles it write a file."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Any, tuple[Path]]:
        return Path.touch, (self.trace,)


def test_no_request_makes_the_dashboard_un_pickle_anything(served: Running, store: Redis, tmp_path: Path) -> None:
    trace = tmp_path / "exploded"
    bomb = pickle.dumps(Bomb(trace))
    pickle.loads(bomb)
    assert trace.exists()
    trace.unlink()
    for path in [*LOOKING, *CHANGING, *CHANGING[:1]]:
        job = fail(store, "a")
        occupy_a_worker(store, job)
        store.xadd("rq:results:a", {"type": Result.Type.SUCCESSFUL.value, "return_value": base64.b64encode(bomb)})
        store.hset("rq:job:a", mapping={"data": zlib.compress(bomb), "meta": bomb, "result": bomb})
        answer = served.get(path) if path in LOOKING else served.post(path)
        assert answer.status in (200, 302), path
        assert not trace.exists(), path
        store.flushdb()


@pytest.mark.parametrize("path", ["job/pickled.json", "jobs/email/failed/8/asc/1.json", "workers.json"])
def test_a_job_that_is_not_json_does_not_break_a_page(served: Running, store: Redis, path: str) -> None:
    job = Queue("email", connection=store).enqueue("tasks.deliver", job_id="pickled", meta={"note": 1})
    job.set_status(JobStatus.FAILED)
    FailedJobRegistry("email", connection=store).add(job, ttl=1000)
    Result.create(job, Result.Type.SUCCESSFUL, ttl=1000, return_value={"pickled": True})
    occupy_a_worker(store, job)
    answer = served.get(f"/rq/0/data/{path}")
    assert answer.status == 200
    assert '"pickled"' in answer.body


# The buttons


@pytest.mark.browser
def test_the_requeue_button_of_a_job_puts_it_back_into_its_queue(
    served: Running, store: Redis, browser: Chrome
) -> None:
    fail(store, "a")
    browser.get(served.page("/rq/0/view/job/a"))
    button = browser.find_element(By.ID, "requeue-job-btn")
    wait_until(button.is_displayed)
    button.click()
    wait_until(lambda: queued(store) == ["a"])
    assert FailedJobRegistry("email", connection=store).get_job_ids() == []


@pytest.mark.browser
def test_the_failed_page_lists_a_job_and_its_buttons_requeue(served: Running, store: Redis, browser: Chrome) -> None:
    for job_id in ("a", "b", "c"):
        fail(store, job_id, error=f"error of {job_id}")
    browser.get(served.page("/rq/0/view/jobs/email/failed/8/asc/1"))
    wait_until(lambda: "error of a" in browser.find_element(By.ID, "jobs").text)
    press(browser, "tr[data-job-id=a] [data-role=requeue-job-btn]")
    wait_until(lambda: queued(store) == ["a"])
    press(browser, "#requeue-all-btn")
    confirm(browser)
    wait_until(lambda: queued(store) == ["a", "b", "c"])


@pytest.mark.browser
def test_the_button_that_compacts_works_and_there_is_none_that_deletes(
    served: Running, store: Redis, browser: Chrome
) -> None:
    for job_id in ("a", "b", "c"):
        enqueue(store, job_id)
    email_queue(store).push_job_id("gone")
    browser.get(served.page("/rq/0/view/jobs/email/queued/8/asc/1"))
    press(browser, "#compact-btn")
    confirm(browser)
    wait_until(lambda: queued(store) == ["a", "b", "c"])
    assert not browser.find_elements(By.CSS_SELECTOR, "[data-role=delete-job-btn], #empty-btn")


@pytest.mark.parametrize("path", ["/rq/job/a/delete", "/rq/queue/email/queued/empty", "/rq/queue/email/failed/empty"])
def test_a_mail_cannot_be_deleted_behind_the_back_of_its_record(served: Running, store: Redis, path: str) -> None:
    enqueue(store, "a")
    before = contents(store)
    assert json.loads(served.ask("POST", path, SAME_ORIGIN).body) == {"status": "DISABLED"}
    assert contents(store) == before


def press(browser: Chrome, selector: str) -> None:
    """Clicks, again if the page has drawn itself anew between finding and clicking."""

    def click(_: Chrome) -> bool:
        browser.find_element(By.CSS_SELECTOR, selector).click()
        return True

    WebDriverWait(browser, 10, ignored_exceptions=[StaleElementReferenceException]).until(click)


def confirm(browser: Chrome) -> None:
    modal = browser.find_element(By.ID, "confirmation-modal")
    wait_until(lambda: "show" in (modal.get_attribute("class") or "").split())
    time.sleep(0.5)  # while it slides in, a click misses it
    press(browser, "#confirmation-modal-yes")
    wait_until(lambda: not modal.is_displayed())


def test_requeue_gives_a_job_all_its_attempts_again(served: Running, store: Redis) -> None:
    job = fail(store, "a")
    job.retry_intervals, job.retries_left = [1, 2, 3], 0
    job.save()
    served.post("/rq/job/a/requeue")
    assert Job.fetch("a", store, JSONSerializer).retries_left == 3


def test_requeue_all_passes_over_an_id_whose_job_is_gone(served: Running, store: Redis) -> None:
    for job_id in ("a", "gone", "z"):
        fail(store, job_id)
    store.delete("rq:job:gone")
    answer = served.post("/rq/requeue/email")
    assert (answer.status, json.loads(answer.body)) == (200, {"status": "OK", "count": 2})
    assert sorted(queued(store)) == ["a", "z"]


def test_requeue_all_leaves_the_failed_jobs_of_another_program_alone(served: Running, store: Redis) -> None:
    job = Queue("theirs", connection=store).enqueue("their.function", job_id="x")
    job.set_status(JobStatus.FAILED)
    FailedJobRegistry("theirs", connection=store).add(job, ttl=1000)
    before = contents(store)
    assert json.loads(served.post("/rq/requeue/theirs").body) == {"status": "OK", "count": 0}
    assert contents(store) == before


def test_compacting_never_takes_the_queue_away(served: Running, store: Redis) -> None:
    enqueue(store, "a")
    email_queue(store).push_job_id("gone")
    store.config_resetstat()
    assert served.post("/rq/queue/email/compact").status == 200
    assert queued(store) == ["a"]
    assert not {"cmdstat_rename", "cmdstat_lpop"} & set(store.info("commandstats"))


@pytest.mark.parametrize(("job_id", "status"), [("nowhere", 404), ("waiting", 409)])
def test_a_job_that_has_not_failed_is_not_requeued(served: Running, store: Redis, job_id: str, status: int) -> None:
    enqueue(store, "waiting")
    assert served.post(f"/rq/job/{job_id}/requeue").status == status
    assert queued(store) == ["waiting"]


# Looking


@pytest.mark.parametrize("registry", ["queued", "started", "finished", "failed", "deferred", "scheduled", "canceled"])
def test_looking_changes_nothing_not_even_ids_that_lead_nowhere(served: Running, store: Redis, registry: str) -> None:
    occupy_a_worker(store, enqueue(store, "a"))
    fail(store, "gone")
    email_queue(store).push_job_id("gone")
    store.delete("rq:job:gone")
    store.sadd("rq:workers", "rq:worker:gone")
    store.sadd("rq:worker:w1:executions", "gone:1")
    before = contents(store)
    for path in [*LOOKING, f"/rq/0/data/jobs/email/{registry}/8/dsc/1.json"]:
        assert served.get(path).status in (200, 302), path
    assert contents(store) == before


def test_a_page_that_only_looks_has_a_client_that_cannot_write(store: Redis) -> None:
    reader = dashboard.ReadOnlyRedis(connection_pool=store.connection_pool)
    with pytest.raises(PermissionError, match="SET"):
        reader.set("key", "value")
    with reader.pipeline() as pipe, pytest.raises(PermissionError, match="RPUSH"):
        pipe.rpush("key", "value")
    assert contents(store) == {}


@pytest.mark.parametrize("path", ["/rq/99/view", "/rq/1/data/queues.json", "/rq/0/view/job/nowhere"])
def test_what_is_not_there_is_answered_with_404(served: Running, store: Redis, path: str) -> None:
    assert served.get(path).status == 404


def test_a_fault_is_logged_by_its_place_and_not_by_its_text(served: Running, store: Redis) -> None:
    store.set("rq:job:a", "not what RQ keeps there")
    answer = served.get("/rq/0/view/job/a")
    assert answer.status == 500
    assert 'crashed where="ResponseError' in served.output.read_text()
    assert "WRONGTYPE" not in served.output.read_text() + answer.body


@pytest.fixture
def busy_worker(redis_server: RedisServer, store: Redis) -> Iterator[None]:
    """A real forking worker in the middle of a job."""
    email_queue(store).enqueue("time.sleep", 60, job_id="slow")
    options = ["--url", redis_server.url, "--serializer", "json", "--name", "w1", "--quiet"]
    worker = subprocess.Popen([sys.executable, "-m", "rq.cli", "worker", "email", *options], cwd=ROOT)
    try:
        wait_until(lambda: store.hget("rq:worker:w1", "state") == b"busy")
        wait_until(lambda: store.hget("rq:job:slow", "status") == b"started")
        yield
    finally:
        send_kill_horse_command(store, "w1")
        worker.terminate()
        worker.wait(timeout=10)


def test_a_worker_busy_with_a_json_job_is_listed(served: Running, store: Redis, busy_worker: None) -> None:
    answer = served.get("/rq/0/data/workers.json")
    assert answer.status == 200
    [worker] = json.loads(answer.body)["workers"]
    assert (worker["name"], worker["state"], worker["current_job"]["job_id"]) == ("w1", "busy", "slow")


@pytest.mark.browser
def test_the_workers_page_shows_a_busy_worker(
    served: Running, store: Redis, busy_worker: None, browser: Chrome
) -> None:
    browser.get(served.page("/rq/0/view/workers"))
    wait_until(lambda: "time.sleep(60)" in browser.find_element(By.ID, "workers").text)
    assert browser.find_elements(By.CSS_SELECTOR, "tr[data-role=worker] a[href='/rq/0/view/job/slow']")


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


def refusal(output: Path, *options: str, **environment: str) -> str:
    """Everything that a dashboard prints which does not want to start."""
    with start(output, *options, **environment) as process:
        try:
            assert process.wait(timeout=20) == 2
        finally:
            process.kill()
    return output.read_text()


def test_it_does_not_start_without_a_password(tmp_path: Path) -> None:
    printed = refusal(tmp_path / "output")
    assert printed.startswith("DASHBOARD_PASSWORD is not set")
    assert len(printed.splitlines()) == 1


def test_it_does_not_start_without_a_login_on_an_address_that_others_reach(tmp_path: Path) -> None:
    address = f"0.0.0.0:{free_port()}"
    printed = refusal(tmp_path / "output", "--no-login", DASHBOARD_LISTEN=address)
    assert printed == f"DASHBOARD_LISTEN: {address} is not loopback; --no-login is for loopback only\n"


def test_it_names_the_setting_when_its_port_is_taken(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        printed = refusal(tmp_path / "output", DASHBOARD_LISTEN=address, DASHBOARD_PASSWORD=PASSWORD)
    assert printed == f"DASHBOARD_LISTEN: cannot listen on {address}: Address already in use\n"


def test_it_names_the_setting_when_its_host_is_unknown(tmp_path: Path) -> None:
    printed = refusal(tmp_path / "output", DASHBOARD_LISTEN="no.such.invalid:9181", DASHBOARD_PASSWORD=PASSWORD)
    assert printed == "DASHBOARD_LISTEN: cannot listen on no.such.invalid:9181: there is no such host\n"


@pytest.mark.parametrize("stop", [signal.SIGTERM, signal.SIGINT])
def test_it_ends_cleanly_and_quickly_when_it_is_told_to(tmp_path: Path, stop: signal.Signals) -> None:
    with running(tmp_path, "redis://127.0.0.1:1/0", "--no-login") as served:
        assert served.get("/").status == 302
        served.process.send_signal(stop)
        assert served.process.wait(timeout=20) == 0
        assert "Traceback" not in served.output.read_text()
