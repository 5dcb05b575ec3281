"""Webhooks at /mail/webhooks: endpoints, what was posted to them, and what is posted again."""

from __future__ import annotations

from typing import Any

import pytest

from mail.outbox import Outbox
from mail.states import State
from tests.pages import Pages
from tests.servers import RedisServer
from tests.test_webhooks import Far, end
from webhooks.post import judged
from webhooks.queue import standings


@pytest.fixture
def pages(client: Any, redis_server: RedisServer) -> Pages:
    return Pages.of(redis_server.url)


def test_without_webhooks_the_page_says_how_to_have_one(pages: Pages) -> None:
    assert "WEBHOOK_URL and WEBHOOK_SECRET name one" in pages.text("/mail/webhooks")


def test_what_was_posted_is_shown_with_its_answer_and_posted_again(client: Any, outbox: Outbox, pages: Pages) -> None:
    far = Far(client, outbox)
    mail_id = end(outbox, State.SENT)
    far.post_all()
    assert "email.sent" in pages.text("/mail/webhooks")
    assert "/secret" not in pages.get("/mail/webhooks")
    assert "email.sent shop" in pages.text(f"/mail/emails/{mail_id}")
    line = next(far.endpoint.queue.log()).line
    assert pages.post("/mail/webhooks/shop/again", mail=mail_id, line="email.sent 1 x").status_code == 404
    for _ in range(2):
        assert pages.post("/mail/webhooks/shop/again", mail=mail_id, line=line).status_code == 303
    assert "email.sent shop waits" in pages.text(f"/mail/emails/{mail_id}")
    far.post_all()
    assert len(far.got) == 2
    assert len({event_id for _, event_id, _ in far.got}) == 1
    assert "webhook again" in pages.text("/mail/actions")


def test_an_endpoint_that_is_down_is_said_to_be_and_what_was_given_up_is_replayed(
    client: Any, outbox: Outbox, pages: Pages
) -> None:
    far = Far(client, outbox)
    far.answer = lambda event: judged(500, "")
    mail_id = end(outbox, State.SENT)
    far.run(400)
    text = pages.text("/mail/webhooks")
    assert "down since" in text
    assert "HTTP 500" in text
    far.answer = lambda event: judged(400, "")
    far.run(2 * 86400)
    assert standings(client)[0].given_up == 1
    far.answer = lambda event: judged(200, "")
    far.clock.now = float(client.time()[0])  # it waits from now on
    assert pages.post("/mail/webhooks/shop/replay").status_code == 303
    far.run(60)
    assert far.types(mail_id) == ["email.sent"]


def test_a_test_is_posted_and_nothing_else_is_done_by_another_name(client: Any, outbox: Outbox, pages: Pages) -> None:
    far = Far(client, outbox)
    assert pages.post("/mail/webhooks/shop/test").status_code == 303
    assert [pages.post(path).status_code for path in ("/mail/webhooks/x/test", "/mail/webhooks/shop/x")] == [404, 404]
    far.post_all()
    [(_, _, event)] = far.got
    assert (event["type"], event["data"]) == ("webhook.test", {})
