"""Everything that is not answered well is answered in one shape, whoever refuses: a route, Bottle, Waitress or a crash.

The tests that take each route in turn take it from `web_app.ROUTES`, so that a new route is held to the same. All that
Waitress refuses is in tests/test_http_grammar.py.
"""

from __future__ import annotations

import gc
import io
import json
import logging
import re
import socket
from pathlib import Path
from types import TracebackType
from typing import Any

import pytest
import redis

from process.version import VERSION
from tests.http_api import MAIL, SUBMITTED, UNKNOWN_ID, app_with, ask, held_to_the_shape, served, spoken
from tests.servers import Api, House, RedisServer, free_port
from web import app as web_app
from web.middleware import Middleware

LIMIT = 100_000  # bytes
SETTINGS = {"MAX_MESSAGE_BYTES": str(LIMIT)}
BODIES: dict[str, Any] = {**SUBMITTED, "/emails/batch": [MAIL]}  # what each route that takes a body accepts
BODIES |= {"/inbound/dsn": {}}  # which is no report, nor its type
BODIES |= {"/suppressions": {"email": "ada@example.com"}}
BODIES |= {f"/suppressions/batch/{act}": {"emails": ["ada@example.com"]} for act in ("add", "remove")}
SECRET = "ada@example.com says: my password is 1234"
EACH = [(method, path) for method, path, _, _ in web_app.ROUTES]


# --- what the routes and Bottle refuse --------------------------------------------------------------------------------


# fmt: off
CASES: dict[str, tuple[int, str, str, str, bytes | None, dict[str, str]]] = {
    "bad idempotency key": (400, "invalid_idempotency_key", "POST", "/emails", b"{}", {"Idempotency-Key": "x" * 257}),
    "key that may not": (401, "restricted_api_key", "GET", "/jobs/x", None, {"Authorization": "Bearer send-key"}),
    "no such path": (404, "not_found", "GET", "/nothing", None, {}),
    "no such mail": (404, "not_found", "GET", f"/emails/{UNKNOWN_ID}", None, {}),
    "no such job": (404, "not_found", "GET", f"/jobs/{UNKNOWN_ID}", None, {}),
    "path that is not UTF-8 at its end": (404, "not_found", "POST", "/emails%ff", b"{}", {}),
    "path that is not UTF-8": (404, "not_found", "GET", "/%ff%fe", None, {}),
    "unheard-of method": (405, "method_not_allowed", "BREW", "/emails", None, {}),
    "compressed": (415, "unsupported_media_type", "POST", "/emails", b"{}", {"Content-Encoding": "gzip"}),
    "other media type": (415, "unsupported_media_type", "POST", "/emails", b"{}", {"Content-Type": "text/plain"}),
    "field that is missing": (422, "missing_required_field", "POST", "/emails", b"{}", {}),
    "body that is not JSON": (400, "validation_error", "POST", "/emails", b"{", {}),
    "field that is wrong": (422, "validation_error", "POST", "/emails", b'{"to": 1}', {}),
    "bad sender": (422, "invalid_from_address", "POST", "/emails", json.dumps(MAIL | {"from": "x"}).encode(), {}),
    "bad attachment": (
        422, "invalid_attachment", "POST", "/emails", json.dumps(MAIL | {"attachments": [1]}).encode(), {},
    ),
}
# fmt: on


@pytest.mark.parametrize(("status", "name", "method", "path", "raw", "headers"), CASES.values(), ids=CASES)
def test_a_refusal_has_the_one_shape(
    api: Api, status: int, name: str, method: str, path: str, raw: bytes | None, headers: dict[str, str]
) -> None:
    held_to_the_shape(api.call(method, path, raw=raw, headers=headers), status, name)


def test_a_conflict_has_the_one_shape(api: Api, client: redis.Redis) -> None:
    assert api.post("/emails", MAIL, Idempotency_Key="one").status == 200
    answer = api.post("/emails", {**MAIL, "subject": "Other"}, Idempotency_Key="one")
    held_to_the_shape(answer, 409, "invalid_idempotent_request")
    job_id = api.post("/jobs", BODIES["/jobs"]).body["job_id"]
    held_to_the_shape(api.post(f"/jobs/{job_id}/requeue", None), 409, "not_possible")


@pytest.mark.parametrize(
    ("method", "path", "status", "told"),
    [
        ("POST", "/domains", 405, "; `from` may have any domain that the relay takes"),
        ("POST", "/contacts", 404, "no such path"),
    ],
)
def test_what_a_client_of_resend_asks_for_in_vain_has_its_replacement_told(
    app_without_redis: Middleware, method: str, path: str, status: int, told: str
) -> None:
    path, _, query = path.partition("?")
    answer = ask(app_without_redis, method, path, None, QUERY_STRING=query)
    assert (answer.status, answer.body["message"].endswith(told)) == (status, True)


def test_an_answer_to_HEAD_has_the_headers_and_no_body(api: Api) -> None:
    answer = api.call("HEAD", "/nothing")
    assert (answer.status, answer.body) == (404, None)
    assert answer.headers["Content-Type"] == "application/json"
    assert answer.headers["X-Request-Id"]


@pytest.mark.parametrize("raw", [b"{", b"\xff", b"[" * 99, b'{"to": 1}', b'{"a": 1, "a": 2}', b"[1e999]"])
def test_a_refused_body_is_held_by_nothing(raw: bytes) -> None:
    """A hundred of 10 MB would take the machine down until the garbage collector finds the cycle of a traceback."""
    app = app_with(f"redis://127.0.0.1:{free_port()}")
    gc.collect()
    before = tracebacks()
    gc.disable()
    try:
        given = {"wsgi.input": io.BytesIO(raw + b" " * LIMIT), "CONTENT_LENGTH": str(len(raw) + LIMIT)}
        answer = ask(app, "POST", "/emails", CONTENT_TYPE="application/json", **given)  # type: ignore[arg-type]
        after = tracebacks()
    finally:
        gc.enable()
    assert (400 <= answer.status < 500, after <= before) == (True, True)


def tracebacks() -> set[int]:
    return {id(one) for one in gc.get_objects() if isinstance(one, TracebackType)}


# --- every route in turn ----------------------------------------------------------------------------------------------


def filled(path: str) -> str:
    return re.sub(r"<.*?>", UNKNOWN_ID, path)


def body_for(method: str, path: str) -> Any:
    if method == "PATCH":
        return {"scheduled_at": "in 1 hour"}
    return BODIES[path] if method in ("POST", "PUT", "PATCH") and "<" not in path else None


@pytest.fixture
def app_without_redis() -> Middleware:
    return app_with(f"redis://127.0.0.1:{free_port()}")


@pytest.mark.parametrize(("method", "path"), [route[:2] for route in web_app.ROUTES if route[3]])
def test_no_route_but_the_probes_answers_without_a_key(app_without_redis: Middleware, method: str, path: str) -> None:
    for given, status, name in (("", 401, "missing_api_key"), ("Bearer x", 403, "invalid_api_key")):
        answer = ask(app_without_redis, method, filled(path), body_for(method, path), HTTP_AUTHORIZATION=given)
        held_to_the_shape(answer, status, name)


def test_only_the_description_the_probes_and_the_metrics_need_no_key() -> None:
    open_to_all = {path for _, path, _, scope in web_app.ROUTES if not scope}
    assert open_to_all == {"/", "/openapi.json", "/docs", "/docs/<name>", "/healthz", "/readyz", "/metrics"}


@pytest.mark.parametrize("path", sorted({path for _, path in EACH}))
def test_every_route_says_which_methods_it_takes(app_without_redis: Middleware, path: str) -> None:
    answer = ask(app_without_redis, "PUT", filled(path))
    held_to_the_shape(answer, 405, "method_not_allowed")
    takes = {
        method
        for method, other in EACH
        if re.fullmatch(re.sub("<.*?>", "[^/]+", re.sub("<.*:path>", ".+", other)), path)
    }
    assert takes == set(re.findall("[A-Z]+", answer.headers["Allow"])) - {"HEAD"}
    assert answer.headers["Allow"] in answer.body["message"]


IN_REDIS = re.compile("/start-job|/emails.*|/jobs.*|/suppressions[a-z/]*|/readyz")


@pytest.mark.parametrize(("method", "path"), [one for one in EACH if IN_REDIS.fullmatch(one[1])])
def test_every_route_that_needs_redis_says_when_it_is_away(
    app_without_redis: Middleware, method: str, path: str
) -> None:
    answer = ask(app_without_redis, method, filled(path), body_for(method, path))
    held_to_the_shape(answer, 503, "service_unavailable")
    assert answer.headers["Retry-After"] == "5"


@pytest.mark.parametrize(("method", "path"), EACH)
def test_a_route_that_crashes_tells_neither_the_caller_nor_the_log_what_it_was_doing(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, method: str, path: str
) -> None:
    def crash(*_: object, **__: object) -> None:
        raise RuntimeError(SECRET)

    monkeypatch.setattr(web_app, "ROUTES", tuple((*route[:2], crash, route[3]) for route in web_app.ROUTES))
    with caplog.at_level(logging.DEBUG):
        answer = ask(app_with("redis://127.0.0.1:9"), method, filled(path), body_for(method, path))
    held_to_the_shape(answer, 500, "application_error")
    told = json.dumps(answer.body) + caplog.text
    assert all(word not in told for word in ("Traceback", SECRET, "password", "ada@", UNKNOWN_ID))
    assert "RuntimeError" not in json.dumps(answer.body)
    assert f"request_id={answer.body['request_id']}" in caplog.text
    assert re.search(r'crashed .*where="RuntimeError .*test_error_shape\.py:\d+', caplog.text)


def test_a_crash_on_the_way_to_redis_is_answered_and_leaves_the_next_request_alone(redis_server: RedisServer) -> None:
    app = app_with(redis_server.url)
    replies = app.replies
    for broken in (lambda _: [None], lambda _: []):
        app.replies = broken
        crashed = ask(app, "POST", "/emails", MAIL)
        held_to_the_shape(crashed, 500, "application_error")
    app.replies = replies
    assert ask(app, "POST", "/emails", MAIL).status == 200


def test_a_crash_in_a_real_process_is_told_in_one_line_that_quotes_nothing(tmp_path: Path) -> None:
    broken = tmp_path / "broken.py"
    code = f"from mail.outbox import Outbox\ndef read(*_):\n    raise OSError({SECRET!r})\nOutbox.read = read\n"
    broken.write_text(code)
    with House(tmp_path, "redis://127.0.0.1:1/0", TASKS_FILE=str(broken)) as house:
        answer = house.api().get(f"/emails/{UNKNOWN_ID}")
        log = house.log("api")
    held_to_the_shape(answer, 500, "application_error")
    crashed, requested = [line for line in log.splitlines() if answer.body["request_id"] in line]
    assert re.search(r' ERROR crashed request_id=\w+ where="OSError [^"]*broken\.py:3', crashed)
    assert "status=500" in requested
    assert "Traceback" not in log
    assert SECRET not in log


# --- what Waitress refuses --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("status", "name", "sent"),
    [
        (400, "validation_error", b"nonsense\r\n\r\n"),
        (413, "request_too_large", b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % (4 * LIMIT + 1)),
        (431, "request_headers_too_large", b"GET / HTTP/1.1\r\nHost: x\r\nX: " + b"x" * 40_000),
        (501, "not_implemented", b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: gzip\r\n\r\n"),
    ],
)
def test_what_waitress_refuses_is_answered_in_the_one_shape(
    house: House, api: Api, status: int, name: str, sent: bytes
) -> None:
    [answer] = spoken(api.port, sent)
    held_to_the_shape(answer, status, name)
    assert "Traceback" not in house.log("api")
    assert "uncaptured" not in house.log("api")


def test_a_body_of_exactly_the_limit_is_read(api: Api, client: redis.Redis) -> None:
    whole = json.dumps(MAIL).encode().ljust(LIMIT)
    assert api.call("POST", "/emails", raw=whole).status == 200
    answer = api.call("POST", "/emails", raw=whole + b" ")
    held_to_the_shape(answer, 413, "request_too_large")
    assert answer.body["message"] == f"the body exceeds the limit of {LIMIT} bytes"


def test_a_name_with_two_addresses_is_served_alike_on_both(monkeypatch: pytest.MonkeyPatch) -> None:
    real, both = socket.getaddrinfo, ("127.0.0.1", "127.0.0.2")

    def found(host: str, *rest: Any, **how: Any) -> list[Any]:
        return [one for address in (both if host == "localhost" else [host]) for one in real(address, *rest, **how)]

    monkeypatch.setattr(socket, "getaddrinfo", found)
    with served(app_with("redis://127.0.0.1:9"), "localhost") as api:
        for address in both:
            [answer] = spoken(api.port, b"nonsense\r\n\r\n", host=address)
            held_to_the_shape(answer, 400, "validation_error")


@pytest.mark.parametrize(
    "request_line", ["GET / HTTP/1.1", "GET /nowhere HTTP/1.1", "GET /healthz HTTP/1.1", "G ET / HTTP/1.1"]
)
def test_every_answer_in_json_ends_with_a_line(api: Api, request_line: str) -> None:
    with socket.create_connection(("127.0.0.1", api.port), timeout=10) as connection:
        connection.sendall(f"{request_line}\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode())
        raw = b"".join(iter(lambda: connection.recv(65536), b""))
    assert raw.endswith(b"}\n")


def test_the_first_page_says_what_this_is(api: Api) -> None:
    answer = api.call("GET", "/", headers={"Authorization": ""})
    told = {"name": "async-email", "version": VERSION, "docs": "/docs", "openapi": "/openapi.json"}
    assert answer.body == told
