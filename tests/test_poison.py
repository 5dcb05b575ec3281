"""Redis holds damaged values, or another type, at a key of ours: the API never answers 500, workers go on and say so.

Jobs that RQ cannot read are in tests/test_unreadable.py, the dashboard's pages in tests/test_dashboard_jobs.py.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from typing import Any

import pytest
import redis

from mail import sweep
from queues import keys
from queues.table import EMAIL, JOBS, QUEUES
from tests.http_api import JOB, MAIL, WELCOME, app_with, ask
from tests.servers import House, RedisServer, eventually
from web.middleware import Middleware

MAIL_KEYS = {"mail:ID": "hash", "mail:ID:claim": "string", "rq:job:ID": "hash", "rq:results:ID": "stream"}
SHARED = sweep.KINDS | {key: kind for name in QUEUES for key, kind in keys.kinds(name).items()}
FIELDS: tuple[str, ...] = ("state", "created_at", "message_id", "outline", "recipients", "attempts", "next_attempt_at")
FIELDS += ("reason", "expires_at", "on_doubt", "key", "content", "since", "counted", "settled_at", "state_before")
VALUES = (
    b"\xff",
    "garbage",
    "",
    "9" * 5000,
    "[]",
    "null",
    "{}",
    "-1",
    "1e999",
    "nan",
    "[" * 3000,
    '[{"a": 1}]',
    "x" * 9999,
)
Client = Any  # redis-py's types do not tell an answer from a promise of one
ROUTES: list[tuple[str, str, Any]] = [
    *(("GET", path, None) for path in ("/", "/readyz", "/metrics", "/emails/ID", "/jobs/ID")),
    *(("POST", "/emails", MAIL), ("POST", "/emails/batch", [MAIL]), ("POST", "/start-job", WELCOME)),
    *(("POST", "/jobs", JOB), ("POST", "/jobs/ID/requeue", None), ("DELETE", "/jobs/ID", None)),
]
WRITE: dict[str, Callable[[Client, str], object]] = {  # a type, or a value of it that is none of ours
    "string": lambda to, key: to.set(key, b"\xff"),
    "a number": lambda to, key: to.set(key, "9" * 400),
    "list": lambda to, key: to.rpush(key, b"\xff", "x"),
    "set": lambda to, key: to.sadd(key, b"\xff", ""),
    "zset": lambda to, key: to.zadd(key, {b"\xff": 1, "": float("inf")}),
    "hash": lambda to, key: to.hset(
        key, mapping=dict.fromkeys(("open_until", "troubles", "accepted", "at"), "9" * 400)
    ),
    "words": lambda to, key: to.hset(key, mapping=dict.fromkeys((b"\xff", "sent", "at", "since", "mails"), b"\xff")),
    "stream": lambda to, key: to.xadd(key, {"type": "x", b"\xff": "y"}),
}


@pytest.fixture(scope="module")
def app(redis_server: RedisServer) -> Middleware:
    return app_with(redis_server.url)


def assert_no_route_crashes(app: Middleware, mail_id: str) -> None:
    for method, path, body in ROUTES:
        answer = ask(app, method, path.replace("ID", mail_id), body)
        assert answer.status != 500, (method, path)


def accepted(app: Middleware, client: Client, state: str = "") -> str:
    client.flushall()
    mail_id = str(ask(app, "POST", "/emails", MAIL).body["id"])
    if state:
        client.hset(f"mail:{mail_id}", "state", state)
    return mail_id


@pytest.mark.parametrize("field", FIELDS)
def test_a_damaged_field_of_a_mail_makes_no_route_crash(app: Middleware, client: Client, field: str) -> None:
    for value in VALUES:
        mail_id = accepted(app, client, "failed")
        client.hset(f"mail:{mail_id}", field, value)
        assert_no_route_crashes(app, mail_id)


@pytest.mark.parametrize("kind", WRITE)
@pytest.mark.parametrize("key", [*MAIL_KEYS, *SHARED])
def test_a_key_that_holds_something_else_makes_no_route_crash(
    app: Middleware, client: Client, key: str, kind: str
) -> None:
    mail_id = accepted(app, client)
    client.delete(key.replace("ID", mail_id))
    WRITE[kind](client, key.replace("ID", mail_id))
    assert_no_route_crashes(app, mail_id)


@pytest.mark.parametrize("kind", WRITE)
def test_a_damaged_idempotency_key_is_a_503_or_a_conflict(app: Middleware, client: Client, kind: str) -> None:
    client.flushall()
    ask(app, "POST", "/emails", MAIL, HTTP_IDEMPOTENCY_KEY="a")
    [key] = client.keys("idempotency:*")
    client.delete(key)
    WRITE[kind](client, key)
    for path, body in (("/emails", MAIL), ("/emails/batch", [MAIL, 1])):
        answer = ask(app, "POST", path, body, HTTP_IDEMPOTENCY_KEY="a")
        assert answer.status in (409, 422, 503), path


def test_what_cannot_be_read_as_a_mail_is_called_so(app: Middleware, client: Client) -> None:
    mail_id = accepted(app, client)
    client.hset(f"mail:{mail_id}", "recipients", "x")
    answer = ask(app, "GET", f"/emails/{mail_id}")
    assert (answer.status, answer.body["message"]) == (404, "what is stored under this id cannot be read as a mail")


@pytest.mark.parametrize("key", ["mail:totals", "mail:open"])
def test_a_mail_is_accepted_without_its_counter_and_without_the_sweeps_list(
    app: Middleware, client: Client, key: str
) -> None:
    client.flushall()
    client.set(key, "x")
    assert ask(app, "POST", "/emails", MAIL).status == 200


@pytest.mark.parametrize("kind", ["list", "words"])
def test_mail_is_sent_although_every_shared_key_holds_something_else(
    sending: House, client: redis.Redis, kind: str
) -> None:
    """What is of another type is put aside and said; what is in a right one counts as nothing."""
    api, pool = sending.api(), sending.worker()
    api.wait_for(api.submit(MAIL), "sent")
    shared, right = sweep.KINDS | keys.kinds(EMAIL), {"words": "hash"}.get(kind, kind)
    wrong = {key for key in shared if shared[key] != right}
    with client.pipeline() as together:
        for key in wrong | {"relay:breaker", "relay:streak", "mail:totals"}:
            together.delete(key)
            WRITE[kind](together, key)
        together.execute()
    damaged = eventually(lambda: accepted_id(api))
    client.hset(f"mail:{damaged}", "outline", "x")
    api.wait_for(eventually(lambda: accepted_id(api)), "sent", 90)
    assert pool.poll() is None
    said = set(re.findall(r"another type than \w+ at (\S+)\"", sending.log("worker-email")))
    assert said <= wrong | {"relay:breaker", "relay:streak", "mail:totals"}
    assert len(said) > len(wrong) // 3  # others were made anew before anybody looked
    eventually(lambda: api.get("/readyz").status == 200)


def test_a_worker_for_jobs_starts_although_all_that_it_shares_is_of_another_type(
    sending: House, client: redis.Redis
) -> None:
    for key in keys.kinds(JOBS):
        client.set(key, "x")
    api, worker = sending.api(), sending.worker(JOBS)
    job_id = eventually(lambda: api.post("/jobs", JOB).body.get("job_id"))
    eventually(lambda: api.get(f"/jobs/{job_id}").body["status"] == "finished")
    assert worker.poll() is None


def accepted_id(api: Any) -> str:
    answer = api.post("/emails", MAIL)
    assert answer.status in (200, 503)
    time.sleep(0.2)
    return str(answer.body.get("id", ""))
