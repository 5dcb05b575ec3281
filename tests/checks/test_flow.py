"""Workers, queue and breaker, and one mail sent to order."""

from __future__ import annotations

import time
from datetime import timedelta
from typing import Any

import pytest
from rq.utils import now, utcformat

from mail.outbox import Outbox
from mail.store import LAST_SENT, OPEN
from ops.checks import flow, table
from ops.checks.findings import FAULT, NOTE, OK, WARN
from ops.checks.target import Target
from queues.cron import Cron
from queues.jobs import Jobs, Policy
from queues.table import EMAIL, JOBS
from settings import Settings
from smtp.pacing import Pacing
from smtp.policy import Phase
from smtp.verdict import Reply
from tests.checks.support import GMAIL, Server, assert_finds, listed, of, worst
from tests.mails import accept
from tests.servers import RedisServer


@pytest.fixture
def settings(redis_server: RedisServer) -> Settings:
    return of(redis_url=redis_server.url, smtp_host=GMAIL, mail_from="hello@acme.example")


def ago(seconds: float) -> str:
    return utcformat(now() - timedelta(seconds=seconds))


def register(client: Any, queue: str, queues: str = "", silent_for: float = 0) -> None:
    """As RQ's worker does."""
    client.hset(f"rq:worker:w-{queue}", mapping={"last_heartbeat": ago(silent_for), "queues": queues or queue})
    client.sadd(f"rq:workers:{queue}", f"rq:worker:w-{queue}")
    client.set(f"rq:scheduler-lock:{queue}", "1")


def test_workers_that_are_missing_dead_or_take_from_two_queues_are_named(
    target: Target, client: Any, settings: Settings, server: Server
) -> None:
    assert_finds(flow.workers(target, settings), FAULT, "no worker takes from the queue email", "worker.py email")
    register(client, EMAIL, silent_for=600)
    assert_finds(flow.workers(target, settings), FAULT, "the last heartbeat was 10 min ago", "bin/dev")
    assert_finds(flow.workers(server.target, settings), FAULT, "queue email", "restart async-email-worker@email")
    register(client, EMAIL, queues="email,jobs")
    assert_finds(flow.workers(target, settings), FAULT, "with more than one queue", "one `worker.py QUEUE` for each")
    register(client, EMAIL)
    register(client, JOBS)
    Cron(client, JOBS, {"tasks.report": ("0 7 * * *", Policy(60, (), 0, 0))}).tick()
    assert worst(flow.workers(target, settings)).level == OK
    assert_finds(flow.workers(target, settings), OK, "report: cron queues it next at 20")
    client.delete("rq:scheduler-lock:email")
    assert_finds(flow.workers(target, settings), FAULT, "no scheduler for the queue email", "worker.py email")


def queued(client: Any, settings: Settings, seconds_ago: float = 0) -> str:
    """A mail in the queue, put there a while ago."""
    mail_id = accept(Outbox(Jobs(client), settings))
    client.hset(f"rq:job:{mail_id}", "enqueued_at", ago(seconds_ago))
    return mail_id


def test_mail_that_nothing_drains_is_named(target: Target, client: Any, settings: Settings) -> None:
    assert worst(flow.waiting(target, settings)).level == OK
    mail_id = queued(client, settings, seconds_ago=3600)
    assert_finds(flow.waiting(target, settings), WARN, "1 mail in the queue, the oldest for 60 min", "worker")
    client.rpush("rq:queue:bulk", "one", "two")
    assert_finds(flow.waiting(target, settings), WARN, "queue and 2 of priority bulk, the oldest", "worker")
    client.set(LAST_SENT, time.time())
    assert worst(flow.waiting(target, settings)).level == OK
    client.zadd("rq:scheduled:email", {mail_id: time.time() - 3600})
    assert_finds(flow.waiting(target, settings), FAULT, "should have been tried 60 min ago", "worker.py email")
    client.zadd(OPEN, {mail_id: time.time() - 3600})
    assert_finds(flow.waiting(target, settings), FAULT, "has been stuck for 60 min", "worker.py email")
    client.set("rq:suspended", "1")
    assert_finds(flow.waiting(target, settings), FAULT, "workers are suspended", "rq resume")
    client.zadd("rq:failed:email", {mail_id: 1, "gone": 1, "gone too": 1})
    assert_finds(flow.waiting(target, settings), NOTE, "1 mail failed, or is", "requeue")
    assert_finds(flow.waiting(target, settings), NOTE, "2 failed jobs without a mail", "nothing to send")
    client.zadd("jobs:unreadable", {"odd": time.time(), "long ago": 1})
    assert_finds(flow.waiting(target, settings), NOTE, "unreadable jobs set aside: 1", "HGETALL jobs:unreadable:ID")


def test_an_open_breaker_is_explained_by_the_last_trouble(target: Target, client: Any, settings: Settings) -> None:
    client.hset("relay:breaker", mapping={"troubles": 3, "open_until": int(time.time() * 1000) + 20_000})
    assert_finds(flow.waiting(target, settings), FAULT, "all mail waits", "journalctl")  # by an earlier version
    reply = Reply(Phase.AUTH, 534, "5.7.9 planted words")
    Pacing(client, ()).trouble(reply=reply, relay=f"{GMAIL}:587")
    assert_finds(flow.waiting(target, settings), FAULT, "534 at auth: Google wants an app password", "apppasswords")
    assert "planted" not in repr(listed(flow.waiting(target, settings)))
    corrected = settings.model_copy(update={"smtp_host": "relay.example.com"})
    assert_finds(flow.waiting(target, corrected), FAULT, f"that was {GMAIL}:587, and SMTP_HOST", "bin/breaker close")


def test_the_checks_change_nothing_in_redis(
    target: Target, client: Any, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    register(client, EMAIL)
    mail_id = queued(client, settings, seconds_ago=3600)
    client.zadd("rq:wip:email", {f"{mail_id}:1": 1})  # RQ's own listings would clean this up
    client.zadd("rq:failed:email", {"gone": 1})
    client.hset("relay:breaker", "open_until", "1")
    before = client.info("persistence")["rdb_changes_since_last_save"]  # grows with each change, and nothing is saved
    monkeypatch.setenv("REDIS_URL", settings.redis)
    names = [name for name, _ in table.examine(target)]
    assert {"redis", "redis file", "redis memory", "redis clock", "workers", "queue"} <= set(names)
    assert client.info("persistence")["rdb_changes_since_last_save"] == before


def test_a_mail_to_order_that_does_not_arrive_is_explained(
    target: Target, client: Any, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    target.send_to = "not an address"
    assert_finds(flow.canary(target, settings), FAULT, "--send-to", "ada@example.com")
    target.send_to = "ada@acme.shop"
    unset = settings.model_copy(update={"mail_from": None})
    assert_finds(flow.canary(target, unset), FAULT, "--send-to: from: is required", "MAIL_FROM: edit ")
    monkeypatch.setattr(flow, "CANARY_TIMEOUT", 0.2)
    assert_finds(flow.canary(target, settings), FAULT, "no worker has taken it", "worker.py email")
    refused = {"status": "failed", "attempts": [{"phase": "dot", "code": 550, "text": "5.4.5 Daily limit"}]}
    assert_finds(flow.what_became_of("id", refused, target, settings), FAULT, "last 24 hours")
    waits = {"status": "delayed", "attempts": [], "reason": "SMTP_RATE is reached"}
    assert_finds(flow.what_became_of("id", waits, target, settings), WARN, "has to wait: SMTP_RATE is reached")
