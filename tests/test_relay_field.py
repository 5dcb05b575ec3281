"""`relay`: which one of several a mail must go by, for those who may say so."""

from __future__ import annotations

from typing import Any

import pytest

from process.relays import parse_relays
from smtp.published import publish
from tests.http_api import MAIL, fields
from tests.servers import Api

TWO = """[first]
host = "a.example"
[second]
host = "b.example"
"""


@pytest.mark.parametrize(
    ("key", "relay", "status", "told"),
    [
        ("full-key", "second", 200, ""),
        ("full-key", "third", 422, "must be one of first, second"),
        ("full-key", "relay", 422, "must be one of first, second"),
        ("full-key", "Second", 422, "must match"),
        ("send-key", "second", 403, "only an API key of scope full"),
        ("send-key", "third", 403, "only an API key of scope full"),
    ],
)
def test_a_key_of_scope_full_may_choose_a_relay_that_workers_know(
    api: Api, client: Any, key: str, relay: str, status: int, told: str
) -> None:
    publish(client, parse_relays(TWO))
    for path, body in (("/emails", MAIL | {"relay": relay}), ("/emails/batch", [MAIL, MAIL | {"relay": relay}])):
        answer = api.post(path, body, Authorization=f"Bearer {key}")
        assert answer.status == status
        if status == 200:
            mail_id = answer.body.get("id") or answer.body["data"][1]["id"]
            assert api.email(mail_id)["relay"] == relay
        else:
            assert told in answer.body["message"]
    assert api.email(api.submit(MAIL))["relay"] is None


def test_where_there_is_one_relay_its_name_is_relay(api: Api, client: Any) -> None:
    assert api.post("/emails", MAIL | {"relay": "relay"}).status == 200
    answer = api.post("/emails", MAIL | {"relay": "first"})
    assert (answer.status, fields(answer)) == (422, ["relay"])
