"""Everything that is not answered well is answered in one shape, whoever refuses: a route, Bottle, Waitress or a crash.

What is said of a refusal that Waitress makes is said over raw sockets, of a real process. The tests that take each
route in turn take it from `web_app.ROUTES`, so that a new route is held to the same.
"""

from __future__ import annotations

import gc
import io
import json
import logging
import re
import socket
from collections.abc import Iterator
from hashlib import sha256
from types import TracebackType
from typing import Any, NamedTuple
from wsgiref.util import setup_testing_defaults

import pytest
import redis

import tasks
from queues.connection import connect
from queues.jobs import Jobs
from settings import load
from tests.servers import ROOT, Answer, Api, House, RedisServer, eventually, free_port
from web import app as web_app
from web import middleware

LIMIT = 100_000  # bytes
UNKNOWN_ID = "00000000-0000-4000-8000-000000000000"
MAIL = {"to": "ada@example.com", "subject": "Hello", "text": "Hello there."}
BODIES: dict[str, Any] = {  # what each route that takes a body accepts
    "/start-job": {"name": "Ada", "email": "ada@example.com"},
    "/emails": MAIL,
    "/emails/batch": [MAIL],
    "/jobs": {"task": "why_failed"},
}
SECRET = "ada@example.com says: my password is 1234"
KEYED = [(method, path) for method, path, _, scope in web_app.ROUTES if scope]


@pytest.fixture(scope="module")
def house(redis_server: RedisServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[House]:
    with House(tmp_path_factory.mktemp("house"), redis_server.url, MAX_MESSAGE_BYTES=str(LIMIT)) as house:
        yield house


@pytest.fixture(scope="module")
def api(house: House) -> Api:
    return house.api()


@pytest.fixture
def client(redis_server: RedisServer) -> Iterator[redis.Redis]:
    with redis_server.client() as client:
        client.flushall()
        yield client


def held_to_the_shape(answer: Answer, status: int, name: str = "") -> None:
    body, headers = answer.body, answer.headers
    assert (answer.status, body["statusCode"]) == (status, status), answer
    assert body["name"] == (name or body["name"])
    assert re.fullmatch("[a-z]+(_[a-z]+)+", body["name"])
    assert set(body) - {"errors"} == {"statusCode", "name", "message", "request_id"}
    assert all(set(error) == {"field", "message"} and all(error.values()) for error in body.get("errors", []))
    assert isinstance(body["message"], str)
    assert body["message"]
    assert body["request_id"] == headers["X-Request-Id"]
    assert headers["Content-Type"] == "application/json"
    assert headers["Cache-Control"] == "no-store"
    assert headers["X-Content-Type-Options"] == "nosniff"


# --- what the routes and Bottle refuse --------------------------------------------------------------------------------


class Case(NamedTuple):
    status: int
    name: str
    method: str
    path: str
    raw: bytes | None = None
    headers: dict[str, str] | None = None


CASES = {
    "body that is not JSON": Case(400, "validation_error", "POST", "/emails", b"{"),
    "bad idempotency key": Case(
        400, "invalid_idempotency_key", "POST", "/emails", b"{}", {"Idempotency-Key": "x" * 257}
    ),
    "no key": Case(401, "missing_api_key", "GET", "/jobs/x", headers={"Authorization": ""}),
    "key that may not": Case(401, "restricted_api_key", "GET", "/jobs/x", headers={"Authorization": "Bearer send-key"}),
    "unknown key": Case(403, "invalid_api_key", "GET", "/jobs/x", headers={"Authorization": "Bearer else"}),
    "no such path": Case(404, "not_found", "GET", "/nothing"),
    "no such mail": Case(404, "not_found", "GET", f"/emails/{UNKNOWN_ID}"),
    "no such job": Case(404, "not_found", "GET", f"/jobs/{UNKNOWN_ID}"),
    "path that is not UTF-8": Case(404, "not_found", "GET", "/%ff%fe"),
    "other method": Case(405, "method_not_allowed", "PUT", "/emails"),
    "unheard-of method": Case(405, "method_not_allowed", "BREW", "/emails"),
    "body too large for its route": Case(413, "request_too_large", "POST", "/jobs", b"x" * 70_000),
    "other media type": Case(415, "unsupported_media_type", "POST", "/emails", b"{}", {"Content-Type": "text/plain"}),
    "field that is missing": Case(422, "missing_required_field", "POST", "/emails", b"{}"),
    "field that is wrong": Case(422, "invalid_parameter", "POST", "/emails", b'{"to": 1}'),
    "bad sender": Case(422, "invalid_from_address", "POST", "/emails", json.dumps({**MAIL, "from": "x"}).encode()),
    "bad attachment": Case(
        422, "invalid_attachment", "POST", "/emails", json.dumps({**MAIL, "attachments": [1]}).encode()
    ),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_a_refusal_has_the_one_shape(api: Api, case: Case) -> None:
    answer = api.call(case.method, case.path, raw=case.raw, headers=case.headers)
    held_to_the_shape(answer, case.status, case.name)


def test_a_conflict_of_idempotency_keys_has_the_one_shape(api: Api, client: redis.Redis) -> None:
    assert api.post("/emails", MAIL, Idempotency_Key="one").status == 202
    answer = api.post("/emails", {**MAIL, "subject": "Other"}, Idempotency_Key="one")
    held_to_the_shape(answer, 409, "invalid_idempotent_request")


def test_a_conflict_of_states_has_the_one_shape(api: Api, client: redis.Redis) -> None:
    job_id = api.post("/jobs", BODIES["/jobs"]).body["job_id"]
    held_to_the_shape(api.post(f"/jobs/{job_id}/requeue", None), 409, "not_possible")


def test_a_server_that_is_not_ready_says_so_in_the_one_shape_and_more(api: Api, client: redis.Redis) -> None:
    client.config_set("maxmemory", "1gb")
    client.config_set("maxmemory-policy", "allkeys-lru")
    try:
        answer = api.get("/readyz")
    finally:
        client.config_set("maxmemory-policy", "noeviction")
        client.config_set("maxmemory", 0)
    more = {"status", "reasons", "queued", "workers", "oldest_queued_seconds", "overdue_seconds"}
    more |= {"last_sent_seconds_ago", "relay_in_trouble", "last_sweep_seconds_ago", "mails_repaired", "mails_given_up"}
    assert more <= set(answer.body)
    shape = {name: value for name, value in answer.body.items() if name not in more}
    held_to_the_shape(answer._replace(body=shape), 503, "not_ready")


def test_an_answer_to_HEAD_has_the_headers_and_no_body(api: Api) -> None:
    answer = api.call("HEAD", "/nothing")
    assert (answer.status, answer.body) == (404, None)
    assert answer.headers["Content-Type"] == "application/json"
    assert answer.headers["X-Request-Id"]


# --- every route in turn ----------------------------------------------------------------------------------------------


def ask(app: middleware.Edge, method: str, path: str, body: object = None, **environ: str) -> Answer:
    """One request to the application, without a server. Headers are written as in WSGI: `HTTP_X_REQUEST_ID`."""
    raw = json.dumps(body).encode() if body is not None else b""
    asked: dict[str, Any] = {"REQUEST_METHOD": method, "PATH_INFO": path, "wsgi.input": io.BytesIO(raw)}
    asked |= {"CONTENT_TYPE": "application/json", "CONTENT_LENGTH": str(len(raw))} if raw else {}
    asked |= {"HTTP_AUTHORIZATION": "Bearer full-key", **environ}
    setup_testing_defaults(asked)
    heard: list[Any] = []
    text = b"".join(app(asked, lambda status, headers, _=None: heard.append((status, headers))))
    [(status, headers)] = heard
    return Answer(int(status.split()[0]), json.loads(text), dict(headers))


def make_app(redis_url: str) -> middleware.Edge:
    keys = f"full:{sha256(b'full-key').hexdigest()}"
    settings = load(_env_file=None, redis_url=redis_url, api_keys=keys, mail_from="sender@example.com")
    return web_app.make_app(settings, Jobs(connect(redis_url)), tasks.OFFERED)


def filled(path: str) -> str:
    return re.sub(r"<\w+>", UNKNOWN_ID, path)


def body_for(method: str, path: str) -> Any:
    return BODIES[path] if method in ("POST", "PUT", "PATCH") and "<" not in path else None


@pytest.fixture
def app_without_redis() -> middleware.Edge:
    return make_app(f"redis://127.0.0.1:{free_port()}")


@pytest.mark.parametrize(("method", "path"), KEYED)
@pytest.mark.parametrize(
    ("given", "status", "name"),
    [
        ("", 401, "missing_api_key"),
        ("Basic ZnVsbC1rZXk=", 401, "missing_api_key"),
        ("Bearer x", 403, "invalid_api_key"),
    ],
)
def test_no_route_but_the_probes_answers_without_a_key(
    app_without_redis: middleware.Edge, method: str, path: str, given: str, status: int, name: str
) -> None:
    answer = ask(app_without_redis, method, filled(path), body_for(method, path), HTTP_AUTHORIZATION=given)
    held_to_the_shape(answer, status, name)


def test_only_the_probes_and_the_metrics_need_no_key() -> None:
    assert {path for _, path, _, scope in web_app.ROUTES if not scope} == {"/healthz", "/readyz", "/metrics"}


@pytest.mark.parametrize("path", sorted({path for _, path, _, _ in web_app.ROUTES}))
def test_every_route_says_which_methods_it_takes(app_without_redis: middleware.Edge, path: str) -> None:
    answer = ask(app_without_redis, "PUT", filled(path))
    held_to_the_shape(answer, 405, "method_not_allowed")
    takes = {method for method, other, _, _ in web_app.ROUTES if re.fullmatch(re.sub(r"<\w+>", "[^/]+", other), path)}
    assert takes == set(re.findall("[A-Z]+", answer.headers["Allow"])) - {"HEAD"}
    assert answer.headers["Allow"] in answer.body["message"]


SAYS_IT_ELSEWISE = ("/healthz", "/metrics")


@pytest.mark.parametrize(("method", "path"), [one[:2] for one in web_app.ROUTES if one[1] not in SAYS_IT_ELSEWISE])
def test_every_route_that_needs_redis_says_when_it_is_away(
    app_without_redis: middleware.Edge, method: str, path: str
) -> None:
    answer = ask(app_without_redis, method, filled(path), body_for(method, path))
    held_to_the_shape(answer, 503, "service_unavailable")
    assert answer.headers["Retry-After"] == "5"


@pytest.mark.parametrize(("method", "path"), [route[:2] for route in web_app.ROUTES])
def test_a_route_that_crashes_tells_neither_the_caller_nor_the_log_what_it_was_doing(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, method: str, path: str
) -> None:
    def crash(*_: object, **__: object) -> None:
        raise RuntimeError(SECRET)

    routes = tuple((route[0], route[1], crash, route[3]) for route in web_app.ROUTES)
    monkeypatch.setattr(web_app, "ROUTES", routes)
    with caplog.at_level(logging.DEBUG):
        answer = ask(make_app("redis://127.0.0.1:9"), method, filled(path), body_for(method, path))
    held_to_the_shape(answer, 500, "application_error")
    told = json.dumps(answer.body) + caplog.text
    assert all(word not in told for word in ("Traceback", SECRET, "1234", "ada@", UNKNOWN_ID))
    assert "RuntimeError" not in json.dumps(answer.body)
    assert f"request_id={answer.body['request_id']}" in caplog.text
    assert re.search(r'crashed .*where="RuntimeError .*test_error_shape\.py:\d+', caplog.text)


def test_a_crash_in_a_real_process_is_told_in_one_line_that_quotes_nothing(
    house: House, api: Api, client: redis.Redis
) -> None:
    client.set(f"mail:{UNKNOWN_ID}", SECRET)  # not the hash it should be
    answer = api.get(f"/emails/{UNKNOWN_ID}")
    held_to_the_shape(answer, 500, "application_error")
    lines = [line for line in house.log("api").splitlines() if answer.body["request_id"] in line]
    crashed, requested = lines
    assert re.search(r' ERROR crashed request_id=\w+ where="ResponseError [^"]*outbox\.py:\d+', crashed)
    assert "status=500" in requested
    assert "Traceback" not in house.log("api")
    assert "wrong kind of value" not in house.log("api")


@pytest.mark.parametrize("given", ["a", "0af7651916cd43dd8448eb211c80319c", "A.b-c_9" * 9])
def test_a_sane_request_id_is_kept(app_without_redis: middleware.Edge, given: str) -> None:
    answer = ask(app_without_redis, "GET", "/nothing", HTTP_X_REQUEST_ID=given)
    assert answer.body["request_id"] == answer.headers["X-Request-Id"] == given


@pytest.mark.parametrize("given", ["", "x" * 65, "two words", "a\nb", "a\n", "<b>", "é", "a, b", 'a" b="c', "%0a"])
def test_any_other_request_id_is_replaced(app_without_redis: middleware.Edge, given: str) -> None:
    answer = ask(app_without_redis, "GET", "/nothing", HTTP_X_REQUEST_ID=given)
    assert answer.body["request_id"] == answer.headers["X-Request-Id"]
    assert re.fullmatch("[0-9a-f]{32}", answer.body["request_id"])


@pytest.mark.parametrize(
    "body",
    [
        b"{" + b" " * 100_000,
        b"\xff" * 100_000,
        b"[" * 100_000,
        b'{"to": 1}',
        b'[{"to": 1}]',
        b'{"a": 1, "a": 2}',
        b"[1e999]",
    ],
    ids=["cut off", "not UTF-8", "too deep", "wrong field", "list", "member given twice", "number too large"],
)
@pytest.mark.parametrize("path", BODIES)
def test_a_refused_body_is_forgotten_at_once(app_without_redis: middleware.Edge, path: str, body: bytes) -> None:
    """And not when the garbage collector comes: a hundred bodies of 10 MB would take the machine down until then."""
    headers = {"CONTENT_LENGTH": str(len(body)), "CONTENT_TYPE": "application/json"}
    gc.collect()
    gc.disable()
    try:
        answer = ask(app_without_redis, "POST", path, **headers, **{"wsgi.input": io.BytesIO(body)})  # type: ignore[arg-type]
        left = [one for one in gc.get_objects() if isinstance(one, TracebackType)]
    finally:
        gc.enable()
    assert 400 <= answer.status < 500
    assert left == []


def test_two_requests_have_two_ids(app_without_redis: middleware.Edge) -> None:
    ids = {ask(app_without_redis, "GET", "/healthz").headers["X-Request-Id"] for _ in range(2)}
    assert len(ids) == 2


# --- what Waitress refuses --------------------------------------------------------------------------------------------


def spoken(port: int, sent: bytes) -> bytes:
    """All that a server says to these bytes until it closes the connection."""
    with socket.create_connection(("127.0.0.1", port), timeout=10) as connection:
        connection.sendall(sent)
        heard = b""
        try:
            while data := connection.recv(65536):
                heard += data
        except ConnectionResetError:  # it closed before it had read all that we sent
            pass
        return heard


def answers_in(heard: bytes) -> list[Answer]:
    found = []
    while heard:
        head, _, rest = heard.partition(b"\r\n\r\n")
        first, *lines = head.decode("latin-1").split("\r\n")
        headers = dict(line.split(": ", 1) for line in lines)
        length = int(headers["Content-Length"])
        found.append(Answer(int(first.split()[1]), json.loads(rest[:length]), headers))
        heard = rest[length:]
    return found


def post(path: str, *headers: str, body: bytes = b"", version: str = "1.1") -> bytes:
    lines = [f"POST {path} HTTP/{version}", "Host: x", "Authorization: Bearer full-key", *headers]
    return "\r\n".join([*lines, "Content-Type: application/json", "", ""]).encode("latin-1") + body


CHUNKED = "Transfer-Encoding: chunked"
EMPTY_CHUNK = b"0\r\n\r\n"
SMUGGLED = post("/emails", f"Content-Length: {len(json.dumps(MAIL))}", body=json.dumps(MAIL).encode())

REFUSED_BY_WAITRESS = {
    "line that is no request": (b"nonsense\r\n\r\n", 400, "validation_error"),
    "method in lower case": (b"get / HTTP/1.1\r\nHost: x\r\n\r\n", 400, "validation_error"),
    "HTTP/0.9": (b"GET /healthz\r\n\r\n", 400, "validation_error"),
    "HTTP/1.2": (post("/jobs", CHUNKED, body=EMPTY_CHUNK, version="1.2"), 400, "validation_error"),
    "HTTP/2": (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 400, "validation_error"),
    "URL that cannot be split": (b"GET http://[ HTTP/1.1\r\nHost: x\r\n\r\n", 400, "validation_error"),
    "header without a colon": (b"GET / HTTP/1.1\r\nHost: x\r\nnonsense\r\n\r\n", 400, "validation_error"),
    "space before the colon": (b"GET / HTTP/1.1\r\nHost: x\r\nX : 1\r\n\r\n", 400, "validation_error"),
    "NUL in a header": (b"GET / HTTP/1.1\r\nHost: x\r\nX: a\0b\r\n\r\n", 400, "validation_error"),
    "bare LF in a header": (b"GET / HTTP/1.1\r\nHost: x\r\nX: a\nY: b\r\n\r\n", 400, "validation_error"),
    "headers of 40 kB": (
        b"GET / HTTP/1.1\r\nHost: x\r\nX: " + b"x" * 40_000 + b"\r\n\r\n",
        431,
        "request_headers_too_large",
    ),
    "headers without an end": (b"GET / HTTP/1.1\r\nHost: x\r\nX: " + b"x" * 40_000, 431, "request_headers_too_large"),
    **{
        f"Content-Length: {length[:9]}": (post("/jobs", f"Content-Length: {length}"), 400, "validation_error")
        for length in ("-1", "+5", "five", "1_0", "0x10", "1, 1", "", "1" * 5000, "²")
    },
    "two Content-Lengths": (
        post("/jobs", "Content-Length: 2", "Content-Length: 3", body=b"{}x"),
        400,
        "validation_error",
    ),
    "Content-Length one over the limit": (
        post("/emails", f"Content-Length: {LIMIT + 1}"),
        413,
        "request_too_large",
    ),
    "the same with Expect: 100-continue": (
        post("/emails", f"Content-Length: {LIMIT + 1}", "Expect: 100-continue"),
        413,
        "request_too_large",
    ),
    "chunks over the limit": (
        post("/emails", CHUNKED, body=b"%x\r\n" % (LIMIT + 1) + b" " * LIMIT),
        413,
        "request_too_large",
    ),
    "chunk without a size": (post("/jobs", CHUNKED, body=b"zz\r\n{}\r\n" + EMPTY_CHUNK), 400, "validation_error"),
    "chunks in HTTP/1.0": (post("/jobs", CHUNKED, body=EMPTY_CHUNK, version="1.0"), 400, "validation_error"),
    "both in HTTP/1.0": (
        post(
            "/emails",
            f"Content-Length: {len(json.dumps(MAIL))}",
            CHUNKED,
            body=json.dumps(MAIL).encode(),
            version="1.0",
        ),
        400,
        "validation_error",
    ),
    "gzip": (post("/jobs", "Transfer-Encoding: gzip"), 501, "not_implemented"),
    "gzip, chunked": (post("/jobs", "Transfer-Encoding: gzip, chunked"), 501, "not_implemented"),
    "xchunked": (post("/jobs", "Transfer-Encoding: xchunked"), 501, "not_implemented"),
    "chunked after a tab that is none": (post("/jobs", "Transfer-Encoding: \x0bchunked"), 400, "validation_error"),
    "smuggled by Content-Length and chunks": (
        post("/jobs", f"Content-Length: {len(EMPTY_CHUNK + SMUGGLED)}", CHUNKED, body=EMPTY_CHUNK + SMUGGLED),
        400,
        "validation_error",
    ),
    "smuggled by chunks and Content-Length": (
        post("/jobs", CHUNKED, "Content-Length: 5", body=EMPTY_CHUNK + SMUGGLED),
        400,
        "validation_error",
    ),
    "smuggled behind a bad length": (post("/jobs", "Content-Length: -1", body=SMUGGLED), 400, "validation_error"),
    "smuggled behind a body too large": (
        post("/emails", f"Content-Length: {LIMIT + 1}", body=SMUGGLED),
        413,
        "request_too_large",
    ),
}


@pytest.mark.parametrize(("sent", "status", "name"), REFUSED_BY_WAITRESS.values(), ids=REFUSED_BY_WAITRESS)
def test_what_waitress_refuses_is_answered_once_in_the_one_shape_and_the_connection_closed(
    house: House, api: Api, client: redis.Redis, sent: bytes, status: int, name: str
) -> None:
    [answer] = answers_in(spoken(api.port, sent))
    held_to_the_shape(answer, status, name)
    assert answer.headers["Connection"] == "close"
    assert client.dbsize() == 0
    assert "Traceback" not in house.log("api")
    assert "uncaptured" not in house.log("api")


def test_a_body_of_exactly_the_limit_is_read(api: Api, client: redis.Redis) -> None:
    whole = json.dumps(MAIL).encode().ljust(LIMIT)
    assert api.call("POST", "/emails", raw=whole).status == 202
    held_to_the_shape(api.call("POST", "/emails", raw=whole + b" "), 413, "request_too_large")


def test_a_chunked_body_is_read(api: Api, client: redis.Redis) -> None:
    body = json.dumps(MAIL).encode()
    sent = post("/emails", CHUNKED, "Connection: close", body=b"%x\r\n%b\r\n" % (len(body), body) + EMPTY_CHUNK)
    [answer] = answers_in(spoken(api.port, sent))
    assert answer.status == 202


def test_two_requests_in_one_packet_have_their_answers_in_order(api: Api) -> None:
    sent = b"GET /healthz HTTP/1.1\r\nHost: x\r\nX-Request-Id: %b\r\n%b\r\n"
    heard = answers_in(spoken(api.port, sent % (b"one", b"") + sent % (b"two", b"Connection: close\r\n")))
    assert [answer.headers["X-Request-Id"] for answer in heard] == ["one", "two"]


TWO_ADDRESSES = """
import socket, sys
sys.path.insert(0, {root!r})
real = socket.getaddrinfo
def both(host, *rest, **how):
    return [found for each in ("127.0.0.1", "127.0.0.2") for found in real(each, *rest, **how)]
socket.getaddrinfo = both
import service
sys.exit(service.main())
"""


def test_a_name_with_two_addresses_is_served_alike_on_both(house: House, api: Api) -> None:
    port = free_port()
    house.environment["LISTEN"] = f"localhost:{port}"
    house.run("two-addresses", "-c", TWO_ADDRESSES.format(root=str(ROOT)))
    for address in ("127.0.0.1", "127.0.0.2"):
        eventually(lambda address=address: answers_on(address, port))  # type: ignore[misc]
        with socket.create_connection((address, port), timeout=10) as connection:
            connection.sendall(b"nonsense\r\n\r\n")
            [answer] = answers_in(connection.makefile("rb").read())
        held_to_the_shape(answer, 400, "validation_error")


def answers_on(address: str, port: int) -> bool:
    with socket.socket() as connection:
        return connection.connect_ex((address, port)) == 0
