"""Which relay a mail goes to: the first that serves it; only trouble before the dot moves it to the next."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import Mock

import pytest
import redis

import worker
from mail import delivery, routes
from mail.outbox import Outbox
from mail.states import Status
from mail.sweep import sweep
from queues.connection import connect
from queues.jobs import Jobs
from queues.running import Retry
from settings import load
from smtp.published import Published, published
from tests.mails import draft
from tests.scripted_relay import Script, ScriptedRelay, hang_up, reset
from tests.servers import RedisServer, free_port

pytestmark = pytest.mark.usefixtures("client")
DOWN: Any = None
TROUBLE = {"MAIL": "421 4.3.2 closing"}


class Two:
    """A delivery with the relays `first` and `second`, each as its script says, or down."""

    def __init__(self, redis_url: str, relays: list[ScriptedRelay | None], lines: str = "", **given: str) -> None:
        tables = (
            f'[{name}]\nhost = "127.0.0.1"\nsecurity = "none"\nport = {relay.port if relay else free_port()}\n{line}\n'
            for name, relay, line in zip(("first", "second"), relays, [*lines.split("|"), ""], strict=False)
        )
        current = load(from_file={}, relays="".join(tables), smtp_timeout="2s", retry_schedule="1s,1s", **given)
        self.outbox = Outbox(Jobs(connect(redis_url)), current)
        self.delivery = delivery.Delivery(self.outbox)
        self.delivery.routes.start()
        self.pacing = [way.pacing for way in self.delivery.routes.ways]

    def accept(self, **changes: Any) -> str:
        return self.outbox.accept([draft()._replace(**changes)]).id

    def attempt(self, mail_id: str) -> str:
        """Makes an attempt. Returns the mail's state, the relay if one was asked, and "moved" if it goes to another."""
        before = len(self.outbox.read(mail_id)["attempts"])
        try:
            said = self.delivery.deliver(mail_id)
        except delivery.Failed:
            said = ""
        seen = self.outbox.read(mail_id)
        last = seen["attempts"][-1] if len(seen["attempts"]) > before else {}
        state: Any = self.outbox.jobs.redis.hget(f"mail:{mail_id}", "state")
        moved = "moved" if last.get("moved") else ""
        assert not moved or (isinstance(said, Retry) and said.intervals == [1])
        return " ".join(filter(None, (state.decode(), last.get("relay_name"), moved)))


@contextmanager
def two(server: RedisServer, *scripts: Script | None, lines: str = "", **given: str) -> Iterator[tuple[Two, Any]]:
    with ExitStack() as stack:
        relays = [None if one is DOWN else stack.enter_context(ScriptedRelay(one)) for one in scripts]
        made = Two(server.url, relays, lines, **given)
        stack.callback(made.delivery.pool.close_all)
        yield made, relays


@pytest.mark.parametrize(
    ("first", "second", "attempts", "counted"),
    [
        ({}, {}, "sent first", 0),
        (DOWN, {}, "delayed first moved, sent second", 0),
        ({"GREETING": "554 not you"}, {}, "delayed first moved, sent second", 0),
        (TROUBLE, {}, "delayed first moved, sent second", 0),
        ({"RCPT": ["250 ok", "451 4.3.0 busy"]}, {}, "delayed first moved, sent second", 0),
        ({"DATA": "452 4.3.1 full"}, DOWN, "delayed first moved, delayed second, delayed first moved", 0),
        (DOWN, DOWN, "delayed first moved, delayed second, delayed first moved", 0),
        # What is said of the mail, and what may have been taken, stays where it is.
        ({"RCPT": "550 5.1.1 no"}, {}, "failed first", 0),
        ({"DATA": "451 greylisted"}, {}, "delayed first, delayed first", 2),
        ({"BODY": reset}, {}, "delayed first, delayed first", 2),
        ({".": "421 4.3.2 closing"}, {}, "delayed first, delayed first", 0),
        ({".": hang_up}, {}, "delayed first, delayed first", 2),
    ],
)
def test_only_trouble_before_the_dot_moves_a_mail(
    redis_server: RedisServer, first: Script | None, second: Script | None, attempts: str, counted: int
) -> None:
    with two(redis_server, first, second) as (made, relays):
        mail_id = made.accept()
        assert ", ".join(made.attempt(mail_id) for _ in attempts.split(",")) == attempts
        assert int(made.outbox.jobs.redis.hget(f"mail:{mail_id}", "counted") or 0) == counted
        if "second" not in attempts:
            assert relays[1].connections == 0


@pytest.mark.parametrize("crashed", [True, False])
def test_a_mail_in_doubt_waits_for_the_relay_that_may_have_it(redis_server: RedisServer, crashed: bool) -> None:
    with two(redis_server, {".": [hang_up, "250 ok"]}, {}) as (made, relays):
        mail_id = made.accept()
        if crashed:
            claim: Any = made.outbox.claim(mail_id, 0)
            claim.mark_in_doubt({}, "first")
            made.outbox.jobs.redis.delete(f"mail:{mail_id}:claim")
        else:
            assert made.attempt(mail_id) == "delayed first"
        made.pacing[0].trouble(60)
        assert made.attempt(mail_id) == ("delayed first" if crashed else "delayed")  # where its worker died
        assert made.outbox.read(mail_id)["reason"] == "the relay is in trouble"
        made.pacing[0].close()
        assert made.attempt(mail_id) in ("sent first", "delayed first")
        assert relays[1].connections == 0


def test_a_mail_that_a_person_asks_for_again_is_held_to_no_relay(
    redis_server: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    with two(redis_server, {}, {}, on_doubt="hold") as (made, _):
        mail_id = made.accept()
        claim: Any = made.outbox.claim(mail_id, 0)
        claim.mark_in_doubt(dict.fromkeys(claim.message.recipients, Status.IN_DOUBT), "first")
        made.outbox.jobs.redis.delete(f"mail:{mail_id}:claim")
        assert made.attempt(mail_id).startswith("unknown")
        monkeypatch.setattr(delivery, "queued_at", lambda: 1e10)
        for pacing in made.pacing:
            pacing.trouble(60)
        assert made.attempt(mail_id) == "delayed"
        made.pacing[1].close()
        assert made.attempt(mail_id) == "sent second"


def test_while_the_breaker_of_the_first_is_open_mail_goes_to_the_second_and_one_probes(
    redis_server: RedisServer, client: redis.Redis
) -> None:
    with two(redis_server, DOWN, {}) as (made, _):
        assert [made.attempt(made.accept()) for _ in range(4)] == ["delayed first moved"] * 3 + ["sent second"]
        assert not made.delivery.routes.is_closed
        client.hset("relay:first:breaker", "open_until", 1)  # its pause is over
        assert [made.attempt(made.accept()) for _ in range(2)] == ["delayed first moved", "sent second"]
        assert not made.outbox.relay_in_trouble()
        made.pacing[1].trouble(60)
        assert made.attempt(made.accept()) == "delayed"
        assert made.delivery.routes.is_closed
        assert made.outbox.relay_in_trouble()


@pytest.mark.parametrize(
    ("lines", "changes", "expected"),
    [
        ('domains = ["acme.example"]', {}, "sent second"),
        ('domains = ["example.com"]', {}, "sent first"),
        ("", {"relay": "second"}, "sent second"),
        ('domains = ["acme.example"]', {"relay": "first"}, "sent first"),  # the mail's word goes first
        ("", {"relay": "third"}, "delayed: relay third is configured no more"),
        ('domains = ["a.example"]|domains = ["b.example"]', {}, "delayed: no relay takes mail from this domain"),
    ],
)
def test_a_mail_goes_by_a_relay_that_serves_it(
    redis_server: RedisServer, lines: str, changes: dict[str, Any], expected: str
) -> None:
    with two(redis_server, {}, {}, lines=lines, trouble_for="5s") as (made, _):
        mail_id = made.accept(**changes)
        reason = (made.attempt(mail_id), made.outbox.read(mail_id)["reason"])
        assert ": ".join(filter(None, reason)) == expected
        if "delayed" in expected:
            made.outbox.jobs.redis.hset(f"mail:{mail_id}", "since", "2020-01-01T00:00:00+00:00")
            assert made.attempt(mail_id) == "failed"


@pytest.mark.parametrize(("named", "state"), [("second", "delayed"), ("relay", "sent")])
def test_a_mail_for_a_relay_that_is_gone_does_not_go_by_smtp_host(
    redis_server: RedisServer, named: str, state: str
) -> None:
    with ScriptedRelay() as relay, two(redis_server, DOWN, DOWN) as (made, _):
        given: Any = {"smtp_host": "127.0.0.1", "smtp_port": relay.port, "smtp_security": "none"}
        made.delivery = delivery.Delivery(Outbox(made.outbox.jobs, load(from_file={}, **given)))
        assert made.attempt(made.accept(relay=named)) == state
        assert bool(relay.connections) == (state == "sent")


def test_a_rate_that_is_reached_moves_no_mail_and_its_turn_is_kept_there(redis_server: RedisServer) -> None:
    with two(redis_server, {}, {}, lines='rate = "1/h"') as (made, _):
        ids = [made.accept() for _ in range(2)]
        assert [made.attempt(one) for one in ids] == ["sent first", "delayed"]
        assert made.outbox.read(ids[1])["reason"] == "the rate of relay first is reached"
        stored: Any = made.outbox.jobs.redis.hget(f"mail:{ids[1]}", "in_line")
        assert stored == b"first"


def test_a_relay_has_no_more_mails_at_a_time_than_its_concurrency(
    redis_server: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(routes, "SLOT_WAIT", 0.05)
    with two(redis_server, {}, {}, lines="concurrency = 5") as (made, _):
        first, mail_id = made.delivery.routes.ways[0], made.accept()
        made.delivery.routes.share(1, 3)
        with first.slot() as one, first.slot() as another, first.slot() as third:
            assert (one, another, third) == (True, True, False)
            assert made.attempt(mail_id) == "delayed"
            assert made.outbox.read(mail_id)["reason"] == "the concurrency of relay first is reached"
        assert made.attempt(mail_id) == "sent first"


def test_a_key_of_a_named_relay_that_holds_something_else_is_set_aside(
    redis_server: RedisServer, client: redis.Redis
) -> None:
    with two(redis_server, {}, {}) as (made, _):
        for key in ("relay:first:breaker", "relay:names"):
            client.delete(key)
            client.set(key, "x")
        assert list(sweep(made.outbox)) == []
        assert client.exists("relay:first:breaker", "relay:names") == 0
        assert made.attempt(made.accept()) == "sent first"


@pytest.mark.parametrize(
    ("concurrency", "given", "expected"),
    [
        (("", ""), {}, (16, 4)),
        ((8, ""), {}, (16, 4)),
        ((8, 3), {}, (11, 2)),
        ((8, 1), {}, (9, 1)),
        ((8, 3), {"worker_concurrency": 4, "worker_processes": 4}, (4, 3)),
    ],
)
def test_processes_divide_what_relays_take_at_a_time(
    monkeypatch: pytest.MonkeyPatch, concurrency: tuple[Any, Any], given: dict[str, int], expected: tuple[int, int]
) -> None:
    monkeypatch.setattr(worker, "cores", lambda: 4)
    lines = (f"concurrency = {one}" if one else "" for one in concurrency)
    relays = "".join(f'[r{number}]\nhost = "a.example"\n{line}\n' for number, line in enumerate(lines))
    assert worker.division(load(from_file={}, relays=relays, **given)) == expected


def test_where_no_relay_is_in_trouble_redis_is_not_asked_before_a_mail_goes(
    redis_server: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    with two(redis_server, {}, {}) as (made, _):
        admit = Mock(return_value=[b"go", 1, 0])
        monkeypatch.setattr(made.pacing[0], "_admit", admit)
        assert (made.attempt(made.accept()), admit.called) == ("sent first", False)
        made.outbox.jobs.redis.hset("relay:second:breaker", "open_until", 1)
        assert (made.attempt(made.accept()), admit.called) == ("sent first", True)


def test_workers_publish_the_relays_that_they_know_and_none_of_their_secrets(
    redis_server: RedisServer, client: redis.Redis
) -> None:
    login = 'username = "ada"\npassword = "s3cret"\nrate = "14/s,9/h"'
    with two(redis_server, DOWN, DOWN, lines=login) as (made, _):
        [first, second] = made.outbox.relays()
        assert (first.name, first.kind, str(first.rate[0]), second.name) == ("first", "smtp", "14/s", "second")
        assert first.where.startswith("127.0.0.1:")
        assert not any(word in str(client.hgetall("relay:names")) for word in ("ada", "s3cret"))
    delivery.Delivery(Outbox(Jobs(connect(redis_server.url)), load(from_file={}, smtp_host="a.example"))).routes.start()
    assert published(client) == [Published("relay")]
    for damaged in (b"x", b"[]", b'{"place": "x"}', b'{"place": 1, "kind": 2, "where": 3, "rate": "x"}'):
        client.hset("relay:names", "odd", damaged)
        assert published(client) == [Published("relay")]
