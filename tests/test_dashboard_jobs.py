"""The dashboard and jobs: nothing from Redis becomes code or markup, buttons work, looking changes nothing."""

from __future__ import annotations

import base64
import json
import pickle
import subprocess
import sys
import zlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from redis import Redis
from rq import Queue
from rq.command import send_kill_horse_command
from rq.job import Job, JobStatus
from rq.registry import FailedJobRegistry
from rq.results import Result
from selenium.webdriver import Chrome
from selenium.webdriver.common.by import By

from ops import dashboard
from tests.dashboards import (
    CHANGING,
    LOOKING,
    SAME_ORIGIN,
    Running,
    confirm,
    contents,
    email_queue,
    enqueue,
    fail,
    in_process,
    occupy_a_worker,
    press,
    queued,
)
from tests.dashboards import served as served
from tests.servers import ROOT, RedisServer, eventually
from tests.test_unreadable import KINDS as JOB_KINDS
from tests.test_unreadable import poison

MARKUP = "<img src=x onerror=\"document.title='pwned'\">"


@pytest.mark.browser
def test_markup_in_a_job_is_shown_as_text_and_runs_nothing(served: Running, client: Redis, browser: Chrome) -> None:
    job = fail(client, "a", error=f"error {MARKUP}", description=f"description {MARKUP}", meta={"note": MARKUP})
    for page in ("/rq/0/view/job/a", "/rq/0/view/jobs/email/failed/8/asc/1"):
        browser.get(served.page(page))
        eventually(lambda: f"error {MARKUP}" in browser.find_element(By.TAG_NAME, "body").text)
        assert f"description {MARKUP}" in browser.find_element(By.TAG_NAME, "body").text
        assert_nothing_ran(browser)
    Result.create(job, Result.Type.SUCCESSFUL, ttl=1000, return_value={"result": MARKUP})
    browser.get(served.page("/rq/0/view/job/a"))
    eventually(lambda: json.dumps({"result": MARKUP}, indent=2) in browser.find_element(By.ID, "job-data").text)
    assert json.dumps({"note": MARKUP}) in browser.find_element(By.ID, "job-data").text
    assert_nothing_ran(browser)


@pytest.mark.browser
@pytest.mark.parametrize("path", ["", "0/view/workers", "0/view/jobs/email/failed/8/asc/1", "0/view/job/a"])
def test_a_page_fits_a_phone_and_is_dark_where_the_reader_wants_it(
    served: Running, client: Redis, browser: Chrome, path: str
) -> None:
    fail(client, "a", error="mail.delivery.Failed: 550 at rcpt, 451 at rcpt\n")
    phone = {"width": 380, "height": 700, "deviceScaleFactor": 1, "mobile": True}
    dark = {"features": [{"name": "prefers-color-scheme", "value": "dark"}]}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", phone)
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", dark)
    try:
        browser.get(served.page(f"/rq/{path}"))
        eventually(lambda: "Loading..." not in browser.find_element(By.TAG_NAME, "body").text)
        assert browser.execute_script("return [document.documentElement.scrollWidth, innerWidth]") == [380, 380]
        for table in browser.find_elements(By.CSS_SELECTOR, "table"):
            assert table.rect["x"] + table.rect["width"] <= 380
        colour = browser.find_element(By.CSS_SELECTOR, ".container").value_of_css_property("background-color")
        assert colour == "rgba(27, 30, 33, 1)"
    finally:
        browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})


def test_both_queues_are_there_before_their_first_job_and_the_jobs_are_those_of_the_first(
    served: Running, client: Redis
) -> None:
    told = served.ask("GET", "/rq/0/data/queues.json").body["queues"]
    assert [(queue["name"], queue["count"]) for queue in told] == [("email", 0), ("jobs", 0)]
    Queue("theirs", connection=client).enqueue("os.getcwd")
    told = served.ask("GET", "/rq/0/data/queues.json").body["queues"]
    assert [queue["name"] for queue in told] == ["email", "jobs", "theirs"]
    page = served.ask("GET", "/rq/0/view/jobs").body
    assert 'id="select-queue" title="Queue name" value="email"' in page
    assert '<option value="jobs">' in page
    assert "'default'" not in page
    page = served.ask("GET", "/rq/0/view/jobs/jobs/failed/8/asc/1").body
    assert "contains the failed jobs on queue <strong>jobs</strong>" in page


def assert_nothing_ran(browser: Chrome) -> None:
    browser.implicitly_wait(0)
    assert browser.find_elements(By.TAG_NAME, "img") == []
    assert browser.title == "RQ dashboard"
    assert [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"] == []  # type: ignore[no-untyped-call]


@pytest.mark.browser
def test_markup_in_the_name_of_a_queue_or_worker_runs_nothing(served: Running, client: Redis, browser: Chrome) -> None:
    name = f"<b>{MARKUP}"
    client.sadd("rq:queues", f"rq:queue:{name}")
    occupy_a_worker(client, enqueue(client, "a", description=MARKUP), name)
    for page in ("/rq/", "/rq/0/view/workers"):
        browser.get(served.page(page))
        eventually(lambda: name in browser.find_element(By.TAG_NAME, "table").text)
        assert_nothing_ran(browser)


@pytest.mark.browser
@pytest.mark.parametrize("name", ["');document.title='pwned';('", "</script><script>document.title='pwned'</script>"])
def test_a_link_with_script_in_it_runs_nothing(served: Running, client: Redis, browser: Chrome, name: str) -> None:
    path = "/rq/0/view/jobs/" + name.replace("/", "%252F").replace("<", "%3C").replace(">", "%3E") + "/queued/8/asc/1"
    browser.get(served.page(path))
    field = browser.find_element(By.ID, "select-queue")
    field.click()
    browser.execute_script("$('#select-queue').trigger('mouseleave')")
    assert field.get_attribute("value") == name.replace("/", "%2F")
    assert_nothing_ran(browser)


def test_an_rq_dashboard_whose_templates_have_changed_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for patches in (dashboard.PATCHES[1:], [(*patch, times + 1) for *patch, times in dashboard.PATCHES]):
        monkeypatch.setattr(dashboard, "PATCHES", patches)
        with pytest.raises(RuntimeError, match="rq-dashboard"):
            in_process(login=True)


class Bomb(NamedTuple):
    """Pickled, it makes whoever un-pickles it write a file."""

    trace: Path

    def __reduce__(self) -> tuple[Any, tuple[Path]]:
        return Path.touch, (self.trace,)


def test_no_request_makes_the_dashboard_un_pickle_anything(served: Running, client: Redis, tmp_path: Path) -> None:
    trace = tmp_path / "exploded"
    bomb = pickle.dumps(Bomb(trace))
    pickle.loads(bomb)
    assert trace.exists()
    trace.unlink()
    asked = [*(("GET", path) for path in LOOKING), *(("POST", path) for path in [*CHANGING, *CHANGING[:1]])]
    for method, path in asked:
        job = fail(client, "a")
        occupy_a_worker(client, job)
        client.xadd("rq:results:a", {"type": Result.Type.SUCCESSFUL.value, "return_value": base64.b64encode(bomb)})
        client.hset("rq:job:a", mapping={"data": zlib.compress(bomb), "meta": bomb, "result": bomb})
        answer = served.ask(method, path, SAME_ORIGIN)
        assert answer.status in (200, 302, 303, 400, 404), path
        assert not trace.exists(), path
        client.flushdb()


@pytest.mark.parametrize("path", ["job/pickled.json", "jobs/email/failed/8/asc/1.json", "workers.json"])
def test_a_job_that_is_not_json_does_not_break_a_page(served: Running, client: Redis, path: str) -> None:
    job = Queue("email", connection=client).enqueue("tasks.deliver", job_id="pickled", meta={"note": 1})
    job.set_status(JobStatus.FAILED)
    FailedJobRegistry("email", connection=client).add(job, ttl=1000)
    Result.create(job, Result.Type.SUCCESSFUL, ttl=1000, return_value={"pickled": True})
    occupy_a_worker(client, job)
    answer = served.get(f"/rq/0/data/{path}")
    assert answer.status == 200
    assert "'pickled'" in str(answer.body)


# The buttons


@pytest.mark.browser
def test_the_requeue_button_puts_a_job_back_into_its_queue(served: Running, client: Redis, browser: Chrome) -> None:
    fail(client, "a")
    browser.get(served.page("/rq/0/view/job/a"))
    button = browser.find_element(By.ID, "requeue-job-btn")
    eventually(button.is_displayed)
    button.click()
    eventually(lambda: queued(client) == ["a"])
    assert FailedJobRegistry("email", connection=client).get_job_ids() == []


@pytest.mark.browser
def test_the_failed_page_lists_a_job_and_its_buttons_requeue(served: Running, client: Redis, browser: Chrome) -> None:
    for job_id in ("a", "b", "c"):
        fail(client, job_id, error=f"error of {job_id}")
    browser.get(served.page("/rq/0/view/jobs/email/failed/8/asc/1"))
    eventually(lambda: "error of a" in browser.find_element(By.ID, "jobs").text)
    press(browser, "tr[data-job-id=a] [data-role=requeue-job-btn]")
    eventually(lambda: queued(client) == ["a"])
    press(browser, "#requeue-all-btn")
    confirm(browser)
    eventually(lambda: queued(client) == ["a", "b", "c"])


@pytest.mark.browser
def test_a_button_compacts_and_none_deletes(served: Running, client: Redis, browser: Chrome) -> None:
    for job_id in ("a", "b", "c"):
        enqueue(client, job_id)
    email_queue(client).push_job_id("gone")
    browser.get(served.page("/rq/0/view/jobs/email/queued/8/asc/1"))
    press(browser, "#compact-btn")
    confirm(browser)
    eventually(lambda: queued(client) == ["a", "b", "c"])
    assert not browser.find_elements(By.CSS_SELECTOR, "[data-role=delete-job-btn], #empty-btn")


@pytest.mark.parametrize("path", ["/rq/job/a/delete", "/rq/queue/email/queued/empty", "/rq/queue/email/failed/empty"])
def test_a_mail_cannot_be_deleted_behind_the_back_of_its_record(served: Running, client: Redis, path: str) -> None:
    enqueue(client, "a")
    before = contents(client)
    assert served.post(path).body == {"status": "DISABLED"}
    assert contents(client) == before


def test_requeue_all_passes_over_an_id_whose_job_is_gone(served: Running, client: Redis) -> None:
    for job_id in ("a", "gone", "z"):
        fail(client, job_id)
    client.delete("rq:job:gone")
    answer = served.post("/rq/requeue/email")
    assert (answer.status, answer.body) == (200, {"status": "OK", "count": 2})
    assert sorted(queued(client)) == ["a", "z"]


def test_requeue_all_leaves_the_failed_jobs_of_another_program_alone(served: Running, client: Redis) -> None:
    job = Queue("theirs", connection=client).enqueue("their.function", job_id="x")
    job.set_status(JobStatus.FAILED)
    FailedJobRegistry("theirs", connection=client).add(job, ttl=1000)
    before = contents(client)
    assert served.post("/rq/requeue/theirs").body == {"status": "OK", "count": 0}
    assert contents(client) == before


def test_compacting_never_takes_the_queue_away(served: Running, client: Redis) -> None:
    enqueue(client, "a")
    email_queue(client).push_job_id("gone")
    client.config_resetstat()
    assert served.post("/rq/queue/email/compact").status == 200
    assert queued(client) == ["a"]
    assert not {"cmdstat_rename", "cmdstat_lpop"} & set(client.info("commandstats"))


@pytest.mark.parametrize(("job_id", "status"), [("nowhere", 404), ("waiting", 409)])
def test_a_job_that_has_not_failed_is_not_requeued(served: Running, client: Redis, job_id: str, status: int) -> None:
    enqueue(client, "waiting")
    assert served.post(f"/rq/job/{job_id}/requeue").status == status
    assert queued(client) == ["waiting"]


# Looking


@pytest.mark.parametrize("registry", ["queued", "started", "finished", "failed", "deferred", "scheduled", "canceled"])
def test_looking_changes_nothing_not_even_ids_that_lead_nowhere(served: Running, client: Redis, registry: str) -> None:
    occupy_a_worker(client, enqueue(client, "a"))
    fail(client, "gone")
    email_queue(client).push_job_id("gone")
    client.delete("rq:job:gone")
    client.sadd("rq:workers", "rq:worker:gone")
    client.sadd("rq:worker:w1:executions", "gone:1")
    before = contents(client)
    for path in [*LOOKING, f"/rq/0/data/jobs/email/{registry}/8/dsc/1.json"]:
        assert served.get(path).status in (200, 302, 303, 404), path
    assert contents(client) == before


def test_a_page_that_only_looks_has_a_client_that_cannot_write(client: Redis) -> None:
    reader = dashboard.ReadOnlyRedis(connection_pool=client.connection_pool)
    with pytest.raises(PermissionError, match="SET"):
        reader.set("key", "value")
    with reader.pipeline() as pipe, pytest.raises(PermissionError, match="RPUSH"):
        pipe.rpush("key", "value")
    assert contents(client) == {}


@pytest.mark.parametrize("path", ["/rq/99/view", "/rq/1/data/queues.json", "/rq/0/view/job/nowhere"])
def test_what_is_not_there_is_answered_with_404(served: Running, client: Redis, path: str) -> None:
    assert served.get(path).status == 404


GOOD_WORKER = {"state": "busy", "queues": "email", "pid": "1", "birth": "2026-01-01T00:00:00.000000Z"}
POISON: dict[str, Callable[[Any], object]] = {  # what is written beside good jobs and workers
    **{f"a job: {kind}": partial(poison, job_id="odd", kind=kind) for kind in JOB_KINDS},
    "a job: no description": lambda to: to.hset("rq:job:odd", mapping={"data": "[1]", "description": ""}),
    "a job: a description of no text": lambda to: to.hset("rq:job:odd", "description", b"\xff"),
    "its result: a string": lambda to: to.set("rq:results:odd", "x"),
    "its result: no type": lambda to: to.xadd("rq:results:odd", {"x": "y"}),
    "its result: no base64": lambda to: to.xadd("rq:results:odd", {"type": "1", "return_value": "!"}),
    "its result: no zlib": lambda to: to.xadd("rq:results:odd", {"type": "2", "exc_string": "!"}),
    "its result: no number": lambda to: Result.create(
        Job.fetch("odd", to), Result.Type.SUCCESSFUL, ttl=9, return_value=float("nan")
    ),
    "its meta": lambda to: to.hset("rq:job:odd", "meta", b"\xff"),
    "a worker: a string": lambda to: to.set("rq:worker:odd", "x"),
    "a worker: empty": lambda to: to.hset("rq:worker:odd", "x", "y"),
    **{
        f"a worker: {field}": partial(
            lambda to, field: to.hset("rq:worker:odd", mapping=GOOD_WORKER | {field: b"\xff"}), field=field
        )
        for field in (*GOOD_WORKER, "last_heartbeat", "failed_job_count", "total_working_time", "version")
    },
    "a worker: no number": lambda to: to.hset("rq:worker:odd", mapping={"total_working_time": "nan"}),
    "a worker: of no queue": lambda to: to.hset("rq:worker:odd", mapping={"queues": ",", "pid": "x" * 9999}),
    "a worker: its executions": lambda to: to.set("rq:worker:odd:executions", "x"),
    "a worker: an execution": lambda to: to.sadd("rq:worker:odd:executions", b"\xff", "a", "a:b:c", "odd:1"),
    "the set of workers": lambda to: to.sadd("rq:workers", b"\xff", "", "x", "rq:worker:"),
    "the set of queues": lambda to: to.sadd("rq:queues", b"\xff", "", "x", "rq:queue:"),
    "the queue": lambda to: to.rpush("rq:queue:email", b"\xff", "", "a:b:c", "x" * 99_999),
    "a registry": lambda to: to.zadd("rq:failed:email", {b"\xff": 1, "": 2, "a:b:c": 3}),
    "those started": lambda to: to.zadd("rq:wip:email", {b"\xff": 1, "": 2, "a:b:c": 3}),
}


@pytest.mark.parametrize("kind", POISON)
def test_what_is_damaged_spoils_no_page(served: Running, client: Redis, kind: str) -> None:
    occupy_a_worker(client, enqueue(client, "a"))
    fail(client, "a")
    occupy_a_worker(client, fail(client, "odd"), "odd")
    POISON[kind](client)
    for path in [
        *LOOKING,
        "/rq/0/data/job/odd.json",
        "/rq/0/view/job/odd",
        "/rq/0/data/jobs/email/queued/8/asc/1.json",
    ]:
        answer = served.get(path)
        assert answer.status in (200, 302, 303, 404), path
        assert ": nan" not in str(answer.body)  # which no browser reads
    assert served.get("/rq/0/data/jobs/email/failed/8/asc/1.json").body["jobs"][0]["id"] == "a"
    assert "w1" in [worker["name"] for worker in served.get("/rq/0/data/workers.json").body["workers"]]
    for path in CHANGING:
        assert served.post(path).status in (200, 303, 400, 404, 409), path


@pytest.mark.parametrize("key", ["rq:queue:email", "rq:failed:email", "rq:queues", "rq:workers"])
def test_a_key_of_rqs_with_something_else_is_a_plain_503_and_logged_by_its_place(
    served: Running, client: Redis, key: str
) -> None:
    client.set(key, "a secret")
    seen = [served.get(path) for path in LOOKING]
    assert {answer.status for answer in seen} <= {200, 302, 303, 404, 503}
    assert any(answer.body == "Redis holds something else at one of RQ's keys\n" for answer in seen)
    assert 'crashed where="ResponseError' in served.output.read_text()
    assert "WRONGTYPE" not in served.output.read_text()


@pytest.mark.parametrize("per_page", ["0", "-1", "-8", "1001", "10000000000", "x", "1.5", "", "%00"])
@pytest.mark.parametrize("page", ["1", "0", "-7", "x", "99999999999999999999"])
def test_a_page_is_of_1_to_1000_jobs(served: Running, client: Redis, per_page: str, page: str) -> None:
    for number in range(3):
        fail(client, str(number))
    for path in (f"data/jobs/email/failed/{per_page}/asc/{page}.json", f"view/jobs/email/queued/{per_page}/dsc/{page}"):
        assert served.get(f"/rq/0/{path}").status in (200, 400, 404), path


def test_a_worker_busy_with_a_json_job_is_listed(served: Running, redis_server: RedisServer, client: Redis) -> None:
    email_queue(client).enqueue("time.sleep", 60, job_id="slow")
    options = ["--url", redis_server.url, "--serializer", "json", "--name", "w1", "--quiet"]
    with subprocess.Popen([sys.executable, "-m", "rq.cli", "worker", "email", *options], cwd=ROOT) as process:
        try:
            eventually(lambda: client.hget("rq:worker:w1", "state") == b"busy")
            eventually(lambda: client.hget("rq:job:slow", "status") == b"started")
            answer = served.get("/rq/0/data/workers.json")
        finally:
            send_kill_horse_command(client, "w1")
            process.terminate()
    assert answer.status == 200
    [worker] = answer.body["workers"]
    assert (worker["name"], worker["state"], worker["current_job"]["job_id"]) == ("w1", "busy", "slow")
    assert worker["current_job"]["call_string"] == "time.sleep(60)"
