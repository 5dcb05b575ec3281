"""The dashboard as a process of its own before a real Redis, and jobs as workers leave them."""

from __future__ import annotations

import base64
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from flask.testing import FlaskClient
from redis import Redis
from rq import Queue
from rq.executions import Execution
from rq.job import Job, JobStatus
from rq.registry import FailedJobRegistry
from rq.results import Result
from rq.serializers import JSONSerializer
from selenium.webdriver import Chrome
from selenium.webdriver.common.by import By

from ops import dashboard
from settings import load
from tests.browser import wait_for
from tests.servers import ROOT, Answer, Api, House, RedisServer, eventually, free_port

PASSWORD, REDIS_PASSWORD = "dashboard-secret", "redis-secret"
SETTINGS = load(from_file={}, dashboard_password=PASSWORD)
SAME_ORIGIN = {"Sec-Fetch-Site": "same-origin"}
# One value for each variable in a route.
SAMPLES: dict[str, Any] = {"instance_number": 0, "per_page": 8, "order": "asc", "page": 1, "job_id": "a"}
SAMPLES |= {"queue_name": "email", "registry_name": "failed", "filename": "css/main.css", "name": "page.css"}
SAMPLES |= {"act": "pause", "template_id": "welcome", "entry_id": "01a21b29-4e1c-7a05-9d3f-2f9a3c1be5d8"}
SAMPLES |= {"mail_id": "01a21b29-4e1c-7a05-9d3f-2f9a3c1be5d7", "action": "requeue"}  # of no mail


class Running(NamedTuple):
    """A dashboard in a process of its own."""

    process: subprocess.Popen[bytes]
    port: int
    output: Path

    def ask(
        self, method: str, path: str, headers: dict[str, str] | None = None, password: str | None = PASSWORD
    ) -> Answer:
        login = base64.b64encode(f"admin:{password}".encode()).decode()
        given = {"Authorization": f"Basic {login}" if password else ""}
        return Api(self.port).call(method, path, headers=given | (headers or {}))

    def post(self, path: str) -> Answer:
        return self.ask("POST", path, SAME_ORIGIN)

    def get(self, path: str) -> Answer:
        return self.ask("GET", path)

    def page(self, path: str) -> str:
        """The address to type into a browser, which logs in with it."""
        return f"http://admin:{PASSWORD}@127.0.0.1:{self.port}{path}"


@contextmanager
def running(directory: Path, redis_url: str, *options: str, **environment: str) -> Iterator[Running]:
    port = free_port()
    environment |= {"DASHBOARD_LISTEN": f"127.0.0.1:{port}"}
    with House(directory, redis_url, PYTHONPATH=str(ROOT), PYTHONWARNINGS="", **environment) as house:
        process = house.run("dashboard", "-m", "ops.dashboard", *options)
        eventually(lambda: Api(port).answers("/", 302 if options else 401))
        yield Running(process, port, directory / "dashboard.log")


@pytest.fixture(scope="module")
def served(redis_server: RedisServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """The dashboard that most tests ask. Its Redis wants a password, so that the tests can look for a leak of it."""
    with redis_server.client() as client:
        client.acl_setuser("dash", enabled=True, passwords=[f"+{REDIS_PASSWORD}"], keys=["*"], commands=["+@all"])
    url = f"{redis_server.url}?username=dash&password={REDIS_PASSWORD}"  # rq-dashboard itself hides user:password@ only
    with running(tmp_path_factory.mktemp("dashboard"), url, DASHBOARD_PASSWORD=PASSWORD) as served:
        yield served


def email_queue(client: Redis) -> Queue:
    return Queue("email", connection=client, serializer=JSONSerializer)


def queued(client: Redis) -> list[str]:
    return email_queue(client).get_job_ids()


def enqueue(client: Redis, job_id: str, **more: Any) -> Job:
    return email_queue(client).enqueue("tasks.deliver", job_id, job_id=job_id, **more)


def fail(client: Redis, job_id: str, error: str = "Traceback: no luck", **more: Any) -> Job:
    """A failed job, as a worker leaves it."""
    job = enqueue(client, job_id, **more)
    email_queue(client).remove(job)
    job.set_status(JobStatus.FAILED)
    FailedJobRegistry(queue=email_queue(client)).add(job, ttl=1000)
    Result.create_failure(job, ttl=1000, exc_string=error)
    return job


def occupy_a_worker(client: Redis, job: Job, name: str = "w1") -> None:
    """What Redis holds while a worker is busy with this job."""
    started = "2026-01-01T00:00:00.000000Z"
    client.sadd("rq:workers", f"rq:worker:{name}")
    client.hset(
        f"rq:worker:{name}",
        mapping={"state": "busy", "queues": "email", "birth": started, "last_heartbeat": started, "pid": 1},
    )
    with client.pipeline() as pipe:
        Execution.create(job, ttl=1000, pipeline=pipe, worker_name=name)
        pipe.execute()


def contents(client: Redis) -> dict[Any, bytes | None]:
    """Returns all but what the dashboard's watch writes."""
    own = (b"mail:minute:", b"mail:hour:", b"mail:marks", b"mail:watch")
    return {key: client.dump(key) for key in client.scan_iter() if not key.startswith(own)}


def press(browser: Chrome, selector: str) -> None:
    """Clicks, again if the page has drawn itself anew between finding and clicking."""

    def click(page: Chrome) -> bool:
        page.find_element(By.CSS_SELECTOR, selector).click()
        return True

    wait_for(browser, click)


def confirm(browser: Chrome) -> None:
    modal = browser.find_element(By.ID, "confirmation-modal")
    eventually(lambda: "show" in (modal.get_attribute("class") or "").split())
    time.sleep(0.5)  # while it slides in, a click misses it
    press(browser, "#confirmation-modal-yes")
    eventually(lambda: not modal.is_displayed())


def in_process(login: bool) -> FlaskClient:
    return dashboard.make_app(SETTINGS, login).test_client()


def routes() -> tuple[list[str], list[str]]:
    """Every path that Flask answers on: those that only look, and those that change something."""
    app = in_process(login=True).application
    looking: list[str] = []
    changing: list[str] = []
    adapter = app.url_map.bind("localhost")
    with app.test_request_context():
        for rule in app.url_map.iter_rules():
            path = adapter.build(rule.endpoint, {name: SAMPLES[name] for name in rule.arguments})
            (changing if (rule.methods or set()) - dashboard.READING else looking).append(path)
    return looking, changing


LOOKING, CHANGING = routes()
