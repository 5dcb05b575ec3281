"""Redis holds damaged values: no page at /mail/ answers 500, and the sentence about the service is judged."""

from __future__ import annotations

import time
from typing import Any

import pytest

from mail.states import State
from ops.condition import look
from tests.mails import claim
from tests.pages import Pages
from tests.servers import RedisServer
from tests.test_poison import FIELDS, VALUES

PATHS: tuple[str, ...] = ("", "?span=3d", "activity", "activity?q=to:b@example.com", "scheduled", "failures", "system")
PATHS += ("actions", "emails/ID", "emails/ID/requeue")
MOMENTS = ("", "x", "nan", "inf", "9e14", "1e22")


@pytest.fixture
def pages(client: object, redis_server: RedisServer) -> Pages:
    return Pages.of(redis_server.url, smtp_host="relay.example", smtp_rate="5/s")


def assert_no_page_crashes(pages: Pages, mail_id: str, what: object) -> None:
    for path in PATHS:
        answer = pages.browser.get(f"/mail/{path.replace('ID', mail_id)}", follow_redirects=True)
        assert answer.status_code != 500, (path, what)
    assert look(pages.outbox).level


@pytest.mark.parametrize("field", FIELDS)
def test_a_damaged_field_of_a_mail_makes_no_page_crash(pages: Pages, client: Any, field: str) -> None:
    mail_id = pages.accept()
    claim(pages.outbox, mail_id).settle(State.FAILED, reason="550 at rcpt")
    stored = client.hgetall(f"mail:{mail_id}")
    for value in VALUES:
        client.hset(f"mail:{mail_id}", mapping=stored | {field: value})
        assert_no_page_crashes(pages, mail_id, value)


@pytest.mark.parametrize("written", MOMENTS)
def test_what_is_no_moment_makes_no_page_crash(pages: Pages, client: Any, written: str) -> None:
    mail_id = pages.accept()
    client.hset("relay:breaker", mapping={"open_until": written, "since": written, "phase": "auth", "code": written})
    client.lpush("relay:told", written)
    client.set("mail:last_sent", written)
    client.lpush("mail:actions", f'{{"at": "{written}", "who": "a", "what": "b", "id": "c"}}')
    at = float(written) if written.endswith(("4", "2", "inf")) else time.time()
    client.zadd("mail:marks", {f"{written} release {written}": at})
    assert_no_page_crashes(pages, mail_id, written)
