"""What the tests of the HTTP API share: bodies that are accepted, what is stored of them, an API in this process."""

from __future__ import annotations

import io
import json
import re
import signal
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from hashlib import sha256
from typing import Any
from wsgiref.util import setup_testing_defaults

import pytest
import redis
from rq import SimpleWorker
from rq.job import Job, JobStatus
from rq.serializers import JSONSerializer

import tasks
from process.sockets import listen_on
from process.values import Address
from queues.connection import connect
from queues.jobs import Jobs
from settings import load
from tests.servers import Answer, Api, free_port
from web import app as web_app
from web import errors, middleware, server

MAIL: dict[str, Any] = {"to": "ada@example.com", "subject": "Hello", "text": "Hello there."}
WELCOME: dict[str, Any] = {"name": "Ada", "email": "ada@example.com"}
JOB: dict[str, Any] = {"task": "why_failed", "args": {"hours": 1}}
SUBMITTED = {"/emails": MAIL, "/start-job": WELCOME, "/jobs": JOB}
ACCEPTED = {"/emails": 200, "/start-job": 202, "/jobs": 202}
QUEUES = {"/emails": "email", "/start-job": "email", "/jobs": "jobs"}
both_kinds = pytest.mark.parametrize("path", ["/emails", "/jobs"])
# Of errors, as Resend's SDK for PHP 1.10 lists them; an error of another name is to it a success.
NAMES = """application_error concurrent_idempotent_requests daily_quota_exceeded internal_server_error invalid_access
invalid_api_key invalid_attachment invalid_from_address invalid_idempotency_key invalid_idempotent_request
invalid_parameter invalid_region method_not_allowed missing_api_key missing_required_field monthly_quota_exceeded
not_found rate_limit_exceeded restricted_api_key security_error validation_error"""
RESEND_NAMES = set(NAMES.split())
UNKNOWN_ID = "00000000-0000-4000-8000-000000000000"
ANY_ID = [
    ("GET", f"/emails/{UNKNOWN_ID}"),
    ("GET", f"/emails/{UNKNOWN_ID}/attachments"),
    ("POST", f"/emails/{UNKNOWN_ID}/cancel"),
    ("GET", f"/jobs/{UNKNOWN_ID}"),
    ("POST", f"/jobs/{UNKNOWN_ID}/requeue"),
    ("DELETE", f"/jobs/{UNKNOWN_ID}"),
]


def fields(answer: Answer) -> list[str]:
    return [error["field"] for error in answer.body.get("errors", [])]


def keys(client: redis.Redis, pattern: str) -> set[str]:
    found: list[bytes] = client.keys(pattern)  # type: ignore[assignment]
    return {key.decode() for key in found}


def stored(client: redis.Redis) -> set[str]:
    """The ids of the mails in Redis, each of which is there whole and queued once."""
    queued: list[bytes] = client.lrange("rq:queue:email", 0, -1)  # type: ignore[assignment]
    watched: list[bytes] = client.zrange("mail:open", 0, -1)  # type: ignore[assignment]
    mails = {key.removeprefix("mail:") for key in keys(client, "mail:????????-*")}
    assert mails == {one.decode() for one in watched}
    assert mails == {key.removeprefix("rq:job:") for key in keys(client, "rq:job:*")}
    assert sorted(mails) == sorted(one.decode() for one in queued)
    return mails


def submitted(api: Api, path: str) -> str:
    answer = api.post(path, SUBMITTED[path])
    assert answer.status == ACCEPTED[path]
    return str(answer.body.get("id") or answer.body["job_id"])


def refused(api: Api, client: redis.Redis, path: str, body: Any, status: int, *named: str) -> None:
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    answer = api.call("POST", path, raw=raw)
    held_to_the_shape(answer, status)
    assert fields(answer) == list(named), answer
    assert not re.search(r"sys\.|pydantic|Error|__", answer.body["message"])  # Python's own words help no caller
    assert client.dbsize() == 0


def held_to_the_shape(answer: Answer, status: int, type_: str = "") -> None:
    body, headers = answer.body, answer.headers
    assert (answer.status, body["statusCode"]) == (status, status), answer
    assert body["type"] == (type_ or body["type"])
    assert body["name"] in RESEND_NAMES & {errors.NAMES.get(body["type"], body["type"])}
    assert set(body) - {"errors"} == {"statusCode", "name", "type", "message", "request_id"}
    assert all(set(error) == {"field", "message"} and all(error.values()) for error in body.get("errors", []))
    assert isinstance(body["message"], str)
    assert body["message"]
    assert body["request_id"] == headers["X-Request-Id"]
    assert headers["Content-Type"] == "application/json"
    assert headers["Cache-Control"] == "no-store"
    assert headers["X-Content-Type-Options"] == "nosniff"


def spoken(port: int, *packets: bytes, host: str = "127.0.0.1") -> list[Answer]:
    """The answers to these bytes, each packet sent when the one before has been read; then we say no more."""
    with socket.create_connection((host, port), timeout=10) as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        heard = b""
        connection.settimeout(0.3)
        for packet in packets:
            with suppress(TimeoutError, ConnectionError):
                connection.sendall(packet)
                while data := connection.recv(2**20):
                    heard += data
    return list(answers_in(heard))


def answers_in(heard: bytes) -> Iterator[Answer]:
    while heard:
        head, _, heard = heard.partition(b"\r\n\r\n")
        first, *lines = head.decode("latin-1").split("\r\n")
        headers = dict(line.split(": ", 1) for line in lines)
        length = int(headers.get("Content-Length", 0))
        yield Answer(int(first.split()[1]), json.loads(heard[:length] or "null"), headers)
        heard = heard[length:]


def job_of(client: redis.Redis, job_id: str) -> Job:
    return Job.fetch(job_id, client, serializer=JSONSerializer)


def fail(client: redis.Redis, job: Job) -> Job:
    """As the last attempt of a job leaves it."""
    job.retries_left = 0
    job.started_at = job.ended_at = job.created_at
    job.save()
    job.set_status(JobStatus.FAILED)
    client.lrem(f"rq:queue:{job.origin}", 0, job.id)
    client.zadd(f"rq:failed:{job.origin}", {job.id: time.time() + 1000})
    return job


def work(client: redis.Redis, queue: str) -> None:
    """Runs what is queued, in this process."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        SimpleWorker([queue], connection=client, serializer=JSONSerializer).work(burst=True, logging_level=None)
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def app_with(redis_url: str, **settings: Any) -> middleware.Middleware:
    given = {"api_keys": f"full:{sha256(b'full-key').hexdigest()}", "mail_from": "sender@example.com", **settings}
    made = load(from_file={}, redis_url=redis_url, **given)
    return web_app.make_app(made, Jobs(connect(redis_url)), tasks.OFFERED)


def ask(app: middleware.Middleware, method: str, path: str, body: object = None, **environ: str) -> Answer:
    """One request to the application, without a server. Headers are written as in WSGI: `HTTP_X_REQUEST_ID`."""
    raw = body if isinstance(body, bytes) else json.dumps(body).encode() if body is not None else b""
    asked: dict[str, Any] = {"REQUEST_METHOD": method, "PATH_INFO": path, "wsgi.input": io.BytesIO(raw)}
    asked |= {"CONTENT_TYPE": "application/json", "CONTENT_LENGTH": str(len(raw))} if raw else {}
    asked |= {"HTTP_AUTHORIZATION": "Bearer full-key", **environ}
    setup_testing_defaults(asked)
    heard: list[Any] = []
    text = b"".join(app(asked, lambda status, headers, _=None: heard.append((status, headers))))
    [(status, headers)] = heard
    is_json = dict(headers)["Content-Type"] == "application/json"
    return Answer(int(status.split()[0]), json.loads(text) if is_json else text.decode(), dict(headers))


@contextmanager
def running(
    app: server.Application, limit: int = 2**20, host: str = "127.0.0.1"
) -> Iterator[tuple[server.Server, threading.Thread]]:
    """The real Waitress, and the thread of its loop, in this process, for what must be looked at from inside."""
    made = server.Server(app, limit, listen_on(Address(host, free_port())))
    loop = threading.Thread(target=made.run, name="loop", daemon=True)
    loop.start()
    try:
        yield made, loop
    finally:
        made.stop()
        loop.join(30)
        assert not loop.is_alive()


@contextmanager
def served(app: middleware.Middleware, host: str = "127.0.0.1") -> Iterator[Api]:
    with running(app, load(from_file={}).max_message_bytes, host) as (made, _):
        yield Api(made.listeners[0].effective_port)
