"""What is the same for every request: its id, and one line in the log, with nothing that a caller wrote."""

from __future__ import annotations

import re

import pytest

from tests.http_api import MAIL, app_with, ask
from tests.servers import Api, House, RedisServer, eventually

pytestmark = pytest.mark.usefixtures("client")
SETTINGS = {"LOG_LEVEL": "INFO"}


def logged(house: House, request_id: str) -> str:
    [line] = eventually(lambda: [line for line in house.log("api").splitlines() if f"request_id={request_id}" in line])
    return line


def test_a_request_is_one_line_that_names_the_route_and_the_id(house: House, api: Api) -> None:
    answer = api.post("/emails", MAIL, X_Request_Id="order-66.a_b")
    pattern = r".* INFO request method=POST route=/emails status=202 ms=\d+\.\d key=full id={} request_id=order-66.a_b"
    assert re.fullmatch(pattern.format(answer.body["id"]), logged(house, "order-66.a_b"))


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
