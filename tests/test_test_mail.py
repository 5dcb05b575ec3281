"""Mail of a key of scope `test`: answered, stored and queued as any mail, and sent by no worker of any version."""

from __future__ import annotations

import time
from hashlib import sha256
from typing import Any

import fakeredis
import pytest
import redis

from mail import delivery
from mail.outbox import Outbox
from mail.states import State
from queues.jobs import Jobs
from settings import load
from tests.conversations import served
from tests.http_api import MAIL, WELCOME, app_with, ask
from tests.mails import claim, draft
from tests.servers import RedisServer
from tests.test_deliver import delivers


@pytest.mark.parametrize("known", [True, False], ids=["this version", "an earlier version"])
@pytest.mark.parametrize("before", [State.QUEUED, State.SENDING, State.DELAYED, State.FAILED, State.UNKNOWN])
def test_no_worker_asks_relay_rate_or_breaker_for_a_test_whatever_became_of_it(
    before: State, known: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    client: Any = fakeredis.FakeRedis()
    outbox = Outbox(Jobs(client), load(from_file={}))
    mail_id = outbox.accept([draft()._replace(test=True)]).id
    if before == State.SENDING:
        claim(outbox, mail_id)
        client.delete(f"mail:{mail_id}:claim")  # its worker has died
    elif before != State.QUEUED:
        claim(outbox, mail_id).settle(before, reason="its job was deleted")
    if not known:
        client.hdel(f"mail:{mail_id}", "test")  # which an earlier version does not look at
    monkeypatch.setattr(delivery, "queued_at", lambda: time.time() + 1)  # of one that was asked for again
    with caplog.at_level(0), served() as (there, to):
        made = delivers(outbox, to)
        monkeypatch.setattr(made.pacing, "admit", lambda *_: pytest.fail("asked"))
        assert made.deliver(mail_id) == "sent"
    assert there.connections == 0
    seen = outbox.read(mail_id)
    assert (seen["status"], seen["test"], {one["status"] for one in seen["recipients"]}) == (
        "sent",
        known,
        {"accepted"},
    )
    assert client.hget("mail:totals", "test" if known else "sent") == b"1"
    if known:
        assert f"sent id={mail_id} test=True" in caplog.text
        assert outbox.last_sent() is None  # what tells whether the relay works
        assert client.hget("mail:totals", "sent") is None


def test_a_test_is_answered_as_any_mail_and_is_no_answer_to_a_repeat_that_is_meant_to_send(
    redis_server: RedisServer, client: redis.Redis
) -> None:
    key = sha256(b"a-key").hexdigest()
    test, send = (app_with(redis_server.url, api_keys=f"shop:{key}:{scope}") for scope in ("test", "send"))
    once = {"HTTP_IDEMPOTENCY_KEY": "1", "HTTP_AUTHORIZATION": "Bearer a-key", "HTTP_X_REQUEST_ID": "1"}
    for path, body in (("/emails", MAIL), ("/start-job", WELCOME), ("/emails/batch", [MAIL, MAIL]), ("/emails", {})):
        first, replayed, real = (ask(one, "POST", path, body, **once) for one in (test, test, send))
        assert first.status == real.status
        assert (first.body == real.body) == (first.status == 422)
        assert replayed.body == first.body
        assert "Idempotent-Replayed" not in real.headers
        for answer, marked in [(first, True), (real, False)] if path == "/emails" and body else []:
            shown = ask(test, "GET", f"/emails/{answer.body['id']}", **once).body
            assert (shown["test"], shown["key"]) == (marked, "shop")
    assert ask(test, "POST", "/jobs", {}, **once).body["type"] == "restricted_api_key"
