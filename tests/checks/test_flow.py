"""Workers, queue and breaker, and one mail sent to order."""

from __future__ import annotations

import json
import time
from datetime import datetime, timedelta, timezone
from typing import Any

import pytest

from mail.draft import compose
from mail.message import Draft
from mail.outbox import Outbox
from mail.request import parse
from mail.store import OPEN
from ops.checks import flow, table
from ops.checks.findings import FAULT, NOTE, OK, WARN
from ops.checks.target import Target
from queues.connection import connect
from queues.jobs import Jobs
from queues.table import EMAIL, JOBS
from settings import Settings
from tests.checks.support import GMAIL, Server, assert_finds, listed, of, worst
from tests.servers import RedisServer


@pytest.fixture
def settings(redis_server: RedisServer) -> Settings:
    return of(redis_url=redis_server.url, smtp_host=GMAIL, mail_from="hello@acme.example")


@pytest.fixture
def redis(redis_server: RedisServer) -> Any:
    redis_server.reset()
    return connect(redis_server.url)


def register(redis: Any, queue: str, queues: str = "", silent_for: float = 0) -> None:
    """As RQ's worker does."""
    heard = datetime.now(timezone.utc) - timedelta(seconds=silent_for)
    written = heard.strftime("%Y-%m-%dT%H:%M:%S.%fZ")
    redis.hset(f"rq:worker:w-{queue}", mapping={"last_heartbeat": written, "queues": queues or queue})
    redis.sadd(f"rq:workers:{queue}", f"rq:worker:w-{queue}")
    redis.set(f"rq:scheduler-lock:{queue}", "1")


def test_workers_that_are_missing_dead_or_take_from_two_queues_are_named(
    target: Target, redis: Any, settings: Settings, server: Server
) -> None:
    assert_finds(flow.workers(target, settings), FAULT, "no worker takes from the queue email", "worker.py email")
    register(redis, EMAIL, silent_for=600)
    assert_finds(flow.workers(target, settings), FAULT, "the last heartbeat was 10 min ago", "bin/dev")
    assert_finds(
        flow.workers(server.target, settings), FAULT, "queue email", "systemctl restart async-email-worker@email"
    )
    register(redis, EMAIL, queues="email,jobs")
    assert_finds(flow.workers(target, settings), FAULT, "with more than one queue", "one `worker.py QUEUE` for each")
    register(redis, EMAIL)
    register(redis, JOBS)
    assert worst(flow.workers(target, settings)).level == OK
    redis.delete("rq:scheduler-lock:email")
    assert_finds(flow.workers(target, settings), FAULT, "no scheduler for the queue email", "worker.py email")


def queued(redis: Any, settings: Settings, seconds_ago: float = 0) -> str:
    """A mail in the queue, put there a while ago."""
    asked = parse(
        {"from": "a@acme.example", "to": ["ada@acme.example"], "subject": "planted-subject", "text": "planted-body"},
        default_sender=None,
        max_recipients=1,
    )
    mail_id = Outbox(Jobs(redis), settings).accept([Draft(compose(asked))]).id
    moment = datetime.now(timezone.utc) - timedelta(seconds=seconds_ago)
    redis.hset(f"rq:job:{mail_id}", "enqueued_at", moment.strftime("%Y-%m-%dT%H:%M:%S.%fZ"))
    return mail_id


def test_mail_that_nothing_drains_is_named(target: Target, redis: Any, settings: Settings) -> None:
    assert worst(flow.waiting(target, settings)).level == OK
    mail_id = queued(redis, settings, seconds_ago=3600)
    assert_finds(flow.waiting(target, settings), WARN, "1 mail in the queue, the oldest for 60 min", "worker")
    redis.zadd("rq:scheduled:email", {mail_id: time.time() - 3600})
    assert_finds(flow.waiting(target, settings), FAULT, "should have been tried 60 min ago", "worker.py email")
    redis.zadd(OPEN, {mail_id: time.time() - 3600})
    assert_finds(flow.waiting(target, settings), FAULT, "has been stuck for 60 min", "worker.py email")
    redis.set("rq:suspended", "1")
    assert_finds(flow.waiting(target, settings), FAULT, "workers are suspended", "rq resume")
    redis.zadd("rq:failed:email", {mail_id: 1})
    assert_finds(flow.waiting(target, settings), NOTE, "1 mail failed for good", "requeue")
    redis.zadd("jobs:unreadable", {"odd": time.time(), "long ago": 1})
    assert_finds(flow.waiting(target, settings), NOTE, "unreadable jobs set aside: 1", "HGETALL jobs:unreadable:ID")


def test_an_open_breaker_is_explained_by_what_the_last_attempt_met_with(
    target: Target, redis: Any, settings: Settings
) -> None:
    redis.hset("relay:breaker", mapping={"troubles": 3, "open_until": int(time.time() * 1000) + 20_000})
    assert_finds(flow.waiting(target, settings), FAULT, "all mail waits", "journalctl")
    mail_id = queued(redis, settings)
    attempt = {"verdict": "trouble", "phase": "auth", "code": 534, "text": "5.7.9 planted words"}
    redis.hset(f"mail:{mail_id}", "attempts", json.dumps([attempt]))
    assert_finds(flow.waiting(target, settings), FAULT, "534 at auth: Google wants an app password", "apppasswords")
    assert "planted" not in repr(listed(flow.waiting(target, settings)))


def test_the_checks_change_nothing_in_redis(
    target: Target, redis: Any, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    register(redis, EMAIL)
    mail_id = queued(redis, settings, seconds_ago=3600)
    redis.zadd("rq:wip:email", {f"{mail_id}:1": 1})  # RQ's own listings would clean this up
    redis.zadd("rq:failed:email", {"gone": 1})
    redis.hset("relay:breaker", "open_until", "1")

    read = {  # DUMP would write the members of a hash in an order that changes by itself
        b"hash": redis.hgetall,
        b"list": lambda key: redis.lrange(key, 0, -1),
        b"set": redis.smembers,
        b"string": redis.get,
        b"zset": lambda key: redis.zrange(key, 0, -1, withscores=True),
    }

    def everything() -> dict[bytes, Any]:
        return {key: (read[redis.type(key)](key), redis.ttl(key) > 0) for key in redis.scan_iter()}

    before = everything()
    monkeypatch.setenv("REDIS_URL", settings.redis_url.get_secret_value())
    names = [name for name, _ in table.examine(target)]
    assert {"redis", "redis file", "redis memory", "redis clock", "workers", "queue"} <= set(names)
    assert everything() == before


def test_a_mail_to_order_that_does_not_arrive_is_explained(
    target: Target, redis: Any, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    target.send_to = "not an address"
    assert_finds(flow.canary(target, settings), FAULT, "--send-to", "ada@example.com")
    target.send_to = "ada@acme.shop"
    monkeypatch.setattr(flow, "CANARY_TIMEOUT", 0.2)
    assert_finds(flow.canary(target, settings), FAULT, "no worker has taken it", "worker.py email")
    refused = {"status": "failed", "attempts": [{"phase": "dot", "code": 550, "text": "5.4.5 Daily limit"}]}
    assert_finds(flow.what_became_of("id", refused, target, settings), FAULT, "last 24 hours")
    waits = {"status": "delayed", "attempts": [], "reason": "SMTP_RATE is reached"}
    assert_finds(flow.what_became_of("id", waits, target, settings), WARN, "has to wait: SMTP_RATE is reached")
