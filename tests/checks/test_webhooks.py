"""Whether what becomes of mails is delivered, as the doctor sees it."""

from __future__ import annotations

import time
from typing import Any

from ops.checks import webhooks
from ops.checks.findings import FAULT, NOTE, OK, WARN
from ops.checks.target import Target
from tests.checks.support import assert_finds, listed, of
from tests.servers import RedisServer
from tests.test_webhooks import NEW
from webhooks.queue import GIVEN_UP, STATE, want


def test_each_endpoint_is_looked_at_and_its_url_is_not_shown(
    target: Target, client: Any, redis_server: RedisServer
) -> None:
    assert_finds(webhooks.delivered(target, of()), NOTE, "no application is told")
    settings = of(redis_url=redis_server.url, webhook_url="https://shop.example/planted", webhook_secret=(NEW,))

    def finds(level: str, found: str, fix: str = "") -> None:
        assert_finds(webhooks.delivered(target, settings), level, found, fix)

    finds(FAULT, "no process posts to the endpoint webhook at shop.example", "journalctl -u async-email-webhooks")
    want(client, {"webhook": "shop.example email.sent"}, time.time() - 600)
    finds(FAULT, "no process posts to the endpoint webhook at shop.example")
    want(client, {"webhook": "shop.example email.sent"}, time.time())
    finds(OK, "the endpoint webhook at shop.example is told what becomes of mails; 0 mails with events that wait")
    client.hset(f"{STATE}webhook", mapping={"since": time.time() - 900, "until": 1, "reply": "HTTP 502"})
    client.rpush(f"{GIVEN_UP}webhook", "x")
    finds(WARN, "at shop.example has failed for 15 min: HTTP 502", "once it answers")
    finds(WARN, "1 event for webhook was given up", "/mail/webhooks")
    assert "planted" not in repr(listed(webhooks.delivered(target, settings)))
