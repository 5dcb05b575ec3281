"""What a worker sees now and then: how much waits, a restart of Redis, a stepped clock, a release, the breaker."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest

from mail import delivery, figures, observe
from mail.delivery import Delivery
from mail.observe import Observer
from mail.outbox import Outbox
from queues.connection import connect
from queues.jobs import Jobs
from smtp.policy import Phase
from smtp.verdict import Reply
from tests.mails import accept
from tests.servers import RedisServer


def kinds(client: Any) -> list[str]:
    return [one.kind for one in figures.marks(client, 0)]


def test_how_much_waits_is_seen_with_each_sweep(outbox: Outbox, client: Any) -> None:
    waits = [accept(outbox) for _ in range(3)]
    client.hset(f"rq:job:{waits[0]}", "enqueued_at", "2026-01-01T00:00:00.000000Z")
    made = Delivery(outbox)
    for _ in range(2):
        made.sweep()
    highest = figures.together(one.counts for one in figures.minutes(client, 2))
    assert highest["depth"] == 3
    assert highest["oldest"] == pytest.approx(time.time() - 1767225600, abs=60)
    assert kinds(client) == ["redis_restarted"]


def test_a_restart_of_redis_is_marked_once_by_all_who_look(outbox: Outbox, client: Any, tmp_path: Path) -> None:
    with RedisServer(tmp_path) as server:
        for number in (1, 2):
            with connect(server.url) as other:
                for _ in range(2):
                    Observer(Jobs(other)).look()
                seen = figures.marks(other, time.time() - 60)
            assert [one.kind for one in seen] == ["redis_restarted"] * number
            assert seen[0].text.count(".") == 2
            time.sleep(1.1)  # a start is known by its second
            server.kill()
            server.start()


def test_a_step_of_the_clock_and_another_release_are_marked(
    outbox: Outbox, client: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    offsets = iter([100, 100, 101.5, 40, 40])
    monkeypatch.setattr(observe, "offset", lambda: next(offsets))
    looks = Observer(outbox.jobs)
    for release in ("1.0-a", "1.0-a", "1.1-b", "1.1-b"):
        monkeypatch.setattr(observe, "INSTALLED", release)
        looks.look()
    seen = [(one.kind, one.text) for one in figures.marks(client, 0) if one.kind != "redis_restarted"]
    assert sorted(seen) == [("clock", "-62 s"), ("release", "1.0-a"), ("release", "1.1-b")]


def test_that_the_breaker_opens_and_closes_is_marked_without_the_relays_words(outbox: Outbox, client: Any) -> None:
    made = delivery.current()
    for _ in range(4):
        made._tell_breaker(Reply(Phase.AUTH, 535, "ada@example.com unknown"), put_off=False)
    made._tell_breaker(Reply(Phase.DOT, 250, "ok"), put_off=False)
    assert [(one.kind, one.text) for one in figures.marks(client, 0)] == [
        ("breaker_opened", "535 at auth"),
        ("breaker_closed", ""),
    ]
