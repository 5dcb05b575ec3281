"""What is the same for every request: its id, and one line in the log, with nothing that a caller wrote."""

from __future__ import annotations

import re
from typing import Any

import pytest

from tests.http_api import MAIL, app_with, ask
from tests.redis_troubles import configured
from tests.servers import Api, House, RedisServer, eventually

pytestmark = pytest.mark.usefixtures("client")
SETTINGS = {"LOG_LEVEL": "INFO"}


def logged(house: House, request_id: str) -> str:
    [line] = eventually(lambda: [line for line in house.log("api").splitlines() if f"request_id={request_id}" in line])
    return line


def test_a_request_is_one_line_that_names_the_route_and_the_id(house: House, api: Api) -> None:
    answer = api.post("/emails", MAIL, X_Request_Id="order-66.a_b")
    pattern = r".* INFO request method=POST route=/emails status=200 ms=\d+\.\d key=full id={} request_id=order-66.a_b"
    assert re.fullmatch(pattern.format(answer.body["id"]), logged(house, "order-66.a_b"))


def test_slashes_before_a_path_are_one(api: Api) -> None:
    """One RESEND_BASE_URL serves Ruby's SDK, which needs a slash after it, and Node's, which adds one."""
    mail_id = api.post("//emails", MAIL, Idempotency_Key="k").body["id"]
    assert api.post("/emails", MAIL, Idempotency_Key="k").body["id"] == mail_id
    assert api.get(f"//emails/{mail_id}").body["id"] == mail_id
    assert [api.get(path).status for path in ("///healthz", "//", "/emails//x", "//nowhere")] == [200, 200, 404, 404]


def test_a_change_to_a_job_is_logged_with_its_id(house: House, api: Api) -> None:
    mail_id = api.post("/emails", MAIL).body["id"]
    answer = api.call("DELETE", f"/jobs/{mail_id}")
    assert f"id={mail_id}" in logged(house, answer.headers["X-Request-Id"])


def test_the_log_holds_nothing_that_a_caller_wrote(house: House, api: Api) -> None:
    planted = {"to": "planted@example.com", "subject": "planted", "text": "planted", "reply_to": "planted"}
    answers = [
        api.post("/emails?planted=1", planted, Idempotency_Key="planted"),
        api.post("/jobs", {"task": "planted", "args": {"planted": 1}}),
        api.get("/emails/planted@example.com?planted"),
        api.call("DELETE", "/jobs/planted"),
        api.get("/planted"),
        api.call("PLANTED", "/emails"),
        api.call("GET", "/jobs/planted", headers={"Authorization": "Bearer planted", "User-Agent": "planted"}),
    ]
    assert [answer.status for answer in answers] == [422, 422, 404, 404, 404, 405, 403]
    assert all(logged(house, answer.headers["X-Request-Id"]) for answer in answers)
    assert "planted" not in house.log("api").lower()


# fmt: off
REFUSED = [  # a request -> what its line says of it; `planted` stands where a caller may write what he likes
    ("/emails", {"to": "planted", "subject": "s", "text": "t"}, 422, "name=validation_error field=to[0] "),
    ("/emails", {"subject": "s", "text": "t"}, 422, "name=missing_required_field field=to "),
    ("/emails", MAIL | {"from": "planted"}, 422, "name=invalid_from_address field=from "),
    ("/emails", MAIL | {"planted@example.com": 1}, 422, "name=validation_error ms="),
    ("/emails", MAIL | {"to[4917012345678]": 1}, 422, "name=validation_error ms="),
    ("/emails", MAIL | {"headers": {"X-Planted": "a\nb"}}, 422, "name=validation_error field=headers "),
    ("/emails", MAIL | {"attachments": [{"filename": "planted", "content": "?"}]}, 422,
     "name=invalid_attachment field=attachments[0].content "),
    ("/emails/batch", [MAIL, MAIL | {"subject": 1}], 422, "name=validation_error field=[1].subject "),
    ("/jobs", {"task": "why_failed", "args": {"planted": 1}}, 422, "name=validation_error field=args "),
    ("/jobs", {"task": "planted"}, 422, "name=validation_error field=task "),
    ("/emails", "planted", 422, "name=validation_error field=body "),
    ("/healthz", MAIL, 405, "name=method_not_allowed ms="),
    ("/planted", MAIL, 404, "name=not_found ms="),
]
# fmt: on


@pytest.mark.parametrize(("path", "body", "status", "words"), REFUSED)
def test_a_refusal_is_logged_with_the_names_of_error_and_field(
    house: House, api: Api, path: str, body: Any, status: int, words: str
) -> None:
    answer = api.post(path, body)
    line = logged(house, answer.headers["X-Request-Id"])
    assert answer.status == status
    assert " INFO request " in line
    assert f" status={status} {words}" in line
    assert "planted" not in line.lower()
    assert "4917" not in line


def test_a_503_is_a_warning_with_its_reason(house: House, api: Api, redis_server: RedisServer) -> None:
    with configured(redis_server, maxmemory=1):
        answer = api.post("/emails", MAIL)
        ready = api.get("/readyz")
    words = 'status=503 name=service_unavailable reason="Redis is out of memory (maxmemory is reached)" ms='
    assert f" WARNING request method=POST route=/emails {words}" in logged(house, answer.headers["X-Request-Id"])
    assert 'name=not_ready reason="Redis is out of memory: ' in logged(house, ready.headers["X-Request-Id"])


def test_what_went_well_and_only_read_is_not_logged(house: House, api: Api) -> None:
    quiet = api.get("/readyz").headers["X-Request-Id"]
    logged(house, api.get("/nothing").headers["X-Request-Id"])
    assert quiet not in house.log("api")


@pytest.mark.parametrize("given", ["a", "0af7651916cd43dd8448eb211c80319c", "A.b-c_9" * 9])
def test_a_sane_request_id_is_kept(redis_server: RedisServer, given: str) -> None:
    answer = ask(app_with(redis_server.url), "GET", "/nothing", HTTP_X_REQUEST_ID=given)
    assert answer.body["request_id"] == answer.headers["X-Request-Id"] == given


@pytest.mark.parametrize("given", ["", "x" * 65, "two words", "a\nb", "a\n", "<b>", "é", "a, b", 'a" b="c', "%0a"])
def test_any_other_request_id_is_replaced(redis_server: RedisServer, given: str) -> None:
    app = app_with(redis_server.url)
    first, second = (ask(app, "GET", "/nothing", HTTP_X_REQUEST_ID=given) for _ in range(2))
    assert first.body["request_id"] == first.headers["X-Request-Id"] != second.headers["X-Request-Id"]
    assert re.fullmatch("[0-9a-f]{32}", first.body["request_id"])
