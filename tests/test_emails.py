"""POST /emails and POST /start-job, of a real process and a real Redis: what is accepted is stored whole."""

from __future__ import annotations

from datetime import datetime, timedelta, timezone
from typing import Any

import pytest
import redis

from tests.http_api import MAIL, WELCOME, fields, refused, stored
from tests.servers import Api, eventually

pytestmark = pytest.mark.usefixtures("client")


def test_a_mail_is_accepted_with_its_id_and_stored_whole(api: Api, client: redis.Redis) -> None:
    answer = api.post("/emails", MAIL)
    assert answer.status == 200
    assert answer.body == {"id": answer.body["id"], "status": "queued"}
    assert stored(client) == {answer.body["id"]}
    assert api.get(f"/jobs/{answer.body['id']}").body["task"] == "deliver"


def use(**variables: Any) -> dict[str, Any]:
    return {"to": "ada@example.com", "template": {"id": "welcome", "variables": variables}}


@pytest.mark.parametrize(
    ("path", "body", "named"),
    [
        ("/emails", MAIL | {"to": 1}, ["to"]),
        ("/emails", MAIL | {"to": "a@b.example, c@d.example", "subject": "x" * 999}, ["to[0]", "subject"]),
        ("/emails", MAIL | use(name="Ada"), ["template"]),
        ("/emails", {"to": "ada@example.com", "template": {"id": "nothing"}}, ["template.id"]),
        ("/emails", use(Name="Ada"), ["template.variables.name"]),
        ("/emails", use(name="Ada\r\nBcc: eve@example.com"), ["template.subject"]),
        ("/emails", use(name="x" * 1000), ["template.subject"]),
        ("/emails", use(name="a\x1bb"), ["template.subject", "template.text", "template.html"]),
        *(
            ("/start-job", WELCOME | {"name": name}, ["name"])
            for name in ("", 1, None, "x" * 201, "Ada\r\nBcc: eve@example.com")
        ),
        *(
            ("/start-job", WELCOME | {"email": bad}, ["email"])
            for bad in ("nobody", "a@b.example, c@d.example", ["a@b.example"], None)
        ),
        ("/start-job", WELCOME | {"subject": "mine"}, ["subject"]),
        ("/start-job", {"email": "ada@example.com"}, ["name"]),
        ("/start-job", {"name": "Ada"}, ["email"]),
    ],
)
def test_a_mail_that_cannot_be_sent_as_asked_is_refused_by_field(
    api: Api, client: redis.Redis, path: str, body: dict[str, Any], named: list[str]
) -> None:
    refused(api, client, path, body, 422, *named)


def test_a_repeat_of_a_request_whose_mail_has_expired_since_is_answered_as_the_first(api: Api) -> None:
    soon = datetime.now(timezone.utc) + timedelta(seconds=2)
    body = {**MAIL, "expires_at": soon.isoformat(timespec="milliseconds")}
    first = api.post("/emails", body, Idempotency_Key="a code")
    eventually(lambda: datetime.now(timezone.utc) > soon)
    again = api.post("/emails", body, Idempotency_Key="a code")
    assert (again.status, again.body, again.headers["Idempotent-Replayed"]) == (200, first.body, "true")
    assert api.post("/emails", {**body, "subject": "another"}, Idempotency_Key="a code").status == 409
    late = api.post("/emails", body, Idempotency_Key="another code")
    assert (late.status, fields(late)) == (422, ["expires_at"])


# fmt: off
NAMES = [
    "Ada <eve@example.com>", "eve@example.com, ", "Lovelace, Ada", '"', "\\", '\\"' * 100, "<", ">" * 200, "a: b;",
    "=?utf-8?q?x?=", "   ", "é" * 200, "\N{INCOMING ENVELOPE}" * 200, "\N{RIGHT-TO-LEFT OVERRIDE}x",
]
# fmt: on


@pytest.mark.parametrize("name", NAMES)
def test_a_welcome_mail_greets_any_name_and_goes_to_nobody_else(api: Api, client: redis.Redis, name: str) -> None:
    answer = api.post("/start-job", {"name": name, "email": "ada@example.com"})
    assert (answer.status, answer.body) == (202, {"job_id": answer.body.get("job_id"), "status": "queued"})
    assert stored(client) == {answer.body["job_id"]}
    seen = api.email(answer.body["job_id"])
    assert [one["address"] for one in seen["recipients"]] == ["ada@example.com"]
    assert seen["subject"] == f"Welcome, {name}"


def test_a_welcome_mail_is_addressed_by_name(api: Api) -> None:
    answer = api.post("/start-job", {"name": 'Ada "Countess" Lovelace', "email": "ada@example.com"})
    assert api.email(answer.body["job_id"])["to"] == [r'"Ada \"Countess\" Lovelace" <ada@example.com>']
