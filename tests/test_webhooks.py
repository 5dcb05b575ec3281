"""Webhooks: written with the state, in order for each mail, tried again as they should be, signed for both packages."""

from __future__ import annotations

import base64
import json
import random
import time
from collections import defaultdict
from itertools import pairwise
from typing import Any

import pytest
import standardwebhooks
import svix

from mail.outbox import Outbox
from mail.states import EVENTS, RETURNED, State
from process.webhooks import EndpointSettings
from tests.mails import BODY, accept, claim
from webhooks import queue
from webhooks.endpoint import Endpoint
from webhooks.event import WHY, body, headers
from webhooks.post import Answer, judged
from webhooks.queue import LEASED, SCHEDULE, Line, Queue, Taken, standings, want

NEW, OLD = (f"whsec_{base64.b64encode(bytes([one]) * 32).decode()}" for one in (1, 2))
GOOD = Answer(200, "200", False)


class Clock:
    def __init__(self, now: float) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now


class Far:
    """An endpoint whose answers a test decides, on a clock of its own."""

    def __init__(self, client: Any, outbox: Outbox, name: str = "shop", events: str = "", now: float = 0) -> None:
        self.client = client
        seconds, _ = client.time()
        self.clock = Clock(now or float(seconds))
        self.answer: Any = lambda event: GOOD
        self.got: list[tuple[float, str, dict[str, Any]]] = []
        settings = EndpointSettings(name=name, url="https://shop.example/secret", secrets=(NEW, OLD))
        self.endpoint = Endpoint(settings, client, outbox, clock=self.clock, post=self.post)
        want(client, {name: f"shop.example {events or ' '.join(EVENTS.values())}"}, self.clock.now)

    def post(self, body: bytes, signed: dict[str, str]) -> Answer:
        event = json.loads(body)
        answer: Answer = self.answer(event)
        if answer.is_good:
            self.got.append((self.clock.now, signed["webhook-id"], event))
        return answer

    def step(self) -> bool:
        """Posts what is due, or lets time pass until it may be."""
        taken = self.endpoint.queue.take(self.clock.now)
        if isinstance(taken, Taken):
            self.endpoint.deliver(taken)
            return True
        due = [
            at % LEASED
            for _, at in self.client.zrange(f"webhook:due:{self.endpoint.queue.name}", 0, -1, withscores=True)
        ]
        self.clock.now += max(taken, 1, min((at - self.clock.now for at in due), default=600))
        return False

    def run(self, seconds: float) -> None:
        until = self.clock.now + seconds
        while self.clock.now < until:
            self.step()

    def post_all(self) -> None:
        while self.step():
            pass

    def types(self, mail_id: str) -> list[str]:
        return [event["type"] for _, _, event in self.got if event["data"].get("email_id") == mail_id]


@pytest.fixture
def far(client: Any, outbox: Outbox) -> Far:
    return Far(client, outbox)


def end(outbox: Outbox, how: State, mail_id: str = "") -> str:
    mail_id = mail_id or accept(outbox)
    if how == State.CANCELED:
        outbox.cancel(mail_id)
    elif how in RETURNED:
        claim(outbox, mail_id).settle(State.SENT)
        script = "become(ARGV[1], ARGV[2], nil, nil, {'reason', ARGV[3]})"
        outbox.store.run(script, [], [mail_id, how, "550 5.1.1 at rcpt\nx"])
    else:
        claim(outbox, mail_id).settle(how, reason="" if how == State.SENT else "550 5.1.1 at rcpt\nx", next_in=60)
    return mail_id


@pytest.mark.parametrize("state", EVENTS)
def test_each_state_is_told_in_resends_shape(outbox: Outbox, far: Far, state: State) -> None:
    mail_id = end(outbox, state)
    far.post_all()
    *before, (_, _, event) = far.got
    data = event["data"]
    assert len(before) == (state in RETURNED)
    assert (event["type"], data["email_id"], data["to"]) == (EVENTS[state], mail_id, BODY["to"])
    assert (data["from"], data["subject"], data["tags"]) == ("a@example.com", "s", {})
    assert event["created_at"] > data["created_at"]
    if EVENTS[state] in WHY:
        member, text, beside = WHY[EVENTS[state]]
        assert data[member] == {text: "550 5.1.1 at rcpt x", **beside}


@pytest.mark.parametrize(("reason", "kind"), [("bounced: 550 5.1.1", "Permanent"), ("bounced: 452 4.4.7", "Transient")])
def test_what_was_given_up_after_days_is_no_permanent_bounce(outbox: Outbox, reason: str, kind: str) -> None:
    told = json.loads(body(outbox, accept(outbox), Line("email.bounced", 1, reason)))
    assert told["data"]["bounce"] == {"message": reason, "type": kind, "subType": "General"}


def test_nothing_is_written_that_nobody_wants(client: Any, outbox: Outbox) -> None:
    end(outbox, State.SENT)
    assert client.keys("webhook:*") == []
    Far(client, outbox, events="email.failed")
    end(outbox, State.SENT)
    assert client.keys("webhook:waiting:*") == []
    failed = end(outbox, State.FAILED)
    assert client.hkeys("webhook:waiting:shop") == [failed.encode()]
    assert b"example.com" not in client.hget("webhook:waiting:shop", failed)


def test_an_event_outlives_its_mail(client: Any, outbox: Outbox, far: Far) -> None:
    mail_id = end(outbox, State.FAILED)
    client.delete(f"mail:{mail_id}")
    far.post_all()
    assert far.got[0][2]["data"] == {"email_id": mail_id, "failed": {"reason": "550 5.1.1 at rcpt x"}}


@pytest.mark.parametrize("key", ["webhook:wanted", "webhook:totals", "webhook:waiting:shop", "webhook:due:shop"])
def test_a_key_that_holds_something_else_stops_no_mail(client: Any, outbox: Outbox, far: Far, key: str) -> None:
    client.delete(key)
    client.set(key, "x")
    assert outbox.read(end(outbox, State.SENT))["status"] == "sent"


def test_what_waits_is_bounded_and_what_is_beyond_is_counted(
    client: Any, outbox: Outbox, far: Far, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mail.states.MOST_WAITING", 2)
    small = Outbox(outbox.jobs, outbox.settings)
    for _ in range(3):
        end(small, State.SENT)
    [seen] = standings(client)
    assert (seen.waiting, seen.counts) == (2, {"dropped": 1})
    mail_id = accept(outbox)
    for _ in range(3):
        end(outbox, State.DELAYED, mail_id)
    assert [line.type for line in far.endpoint.queue.waiting_of(mail_id)] == ["email.delivery_delayed"]


@pytest.mark.parametrize("keys", [[NEW], [NEW, OLD]])
def test_both_packages_verify_the_signature_with_any_secret(keys: list[str]) -> None:
    settings = EndpointSettings(name="a", url="https://a.example", secrets=keys)
    signed = headers(settings.keys, "evt_1", b'{"a":1}', time.time())
    for secret in keys:
        for verify in (standardwebhooks.Webhook(secret).verify, svix.Webhook(secret).verify):
            verify(b'{"a":1}', signed)
    with pytest.raises(standardwebhooks.WebhookVerificationError):
        standardwebhooks.Webhook(keys[0]).verify(b'{"a":2}', signed)
    if len(keys) == 1:
        with pytest.raises(svix.WebhookVerificationError):
            svix.Webhook(OLD).verify(b'{"a":1}', signed)


def test_an_event_that_is_not_wanted_is_tried_after_each_pause_and_then_given_up(
    client: Any, outbox: Outbox, far: Far
) -> None:
    tries: list[float] = []
    first, second = end(outbox, State.DELAYED), end(outbox, State.SENT)

    def answer(event: dict[str, Any]) -> Answer:
        if event["type"] != "email.delivery_delayed":
            return GOOD
        tries.append(far.clock.now)
        return judged(400, "")

    far.answer = answer
    far.post_all()
    due = client.zscore("webhook:due:shop", first)
    end(outbox, State.FAILED, first)
    assert client.zscore("webhook:due:shop", first) == due > 0  # behind the one that is put off
    assert far.types(second) == ["email.sent"]
    assert far.types(first) == []
    far.run(30 * 3600)
    pauses = [round(then - before) for before, then in pairwise(tries)]
    assert pauses == [pytest.approx(one, abs=2) for one in SCHEDULE]
    assert far.types(first) == ["email.failed"]
    [seen] = standings(client)
    assert (seen.waiting, seen.given_up, seen.counts) == (0, 1, {"delivered": 2, "failed": 8, "given_up": 1})
    far.answer = lambda event: GOOD
    assert far.endpoint.queue.replay(10) == 1
    far.post_all()
    assert far.types(first) == ["email.failed", "email.delivery_delayed"]


def test_a_receiver_that_is_down_for_a_day_gets_all_in_order_once_it_is_back(
    client: Any, outbox: Outbox, far: Far
) -> None:
    tries: list[float] = []

    def down(event: dict[str, Any]) -> Answer:
        tries.append(far.clock.now)
        return random.choice([judged(500, ""), judged(502, ""), Answer(0, "Connection refused")])

    far.answer = down
    expected: dict[str, list[str]] = defaultdict(list)
    for _ in range(24):
        for number in range(10):
            mail_id = accept(outbox)
            states = [State.DELAYED, State.SENT] if number % 2 else [State.DELAYED, State.FAILED]
            for state in states:
                end(outbox, state, mail_id)
                expected[mail_id].append(EVENTS[state])
        far.run(3600)
    assert far.got == []
    assert 23 * 60 < len(tries) < 24 * 60 + 20  # about one a minute, however much waits
    [seen] = standings(client)
    assert (seen.is_down, seen.waiting) == (True, 240)
    back, far.answer = far.clock.now, lambda event: GOOD
    far.run(120)
    assert {mail_id: far.types(mail_id) for mail_id in expected} == expected
    assert len({event_id for _, event_id, _ in far.got}) == len(far.got) == 480
    assert max(at for at, _, _ in far.got) < back + 61
    [seen] = standings(client)
    assert (seen.is_down, seen.waiting, seen.since, seen.counts["delivered"]) == (False, 0, 0, 480)


@pytest.mark.parametrize(
    ("answer", "least"),
    [(judged(503, "900"), 900), (judged(429, "120"), 120), (judged(410, ""), 3600), (judged(503, "999999999"), 36000)],
)
def test_an_endpoint_that_asks_for_a_pause_gets_it(outbox: Outbox, far: Far, answer: Answer, least: int) -> None:
    tries: list[float] = []

    def asks(_: dict[str, Any]) -> Answer:
        tries.append(far.clock.now)
        return answer

    far.answer = asks
    for _ in range(5):
        end(outbox, State.SENT)
    far.run(least + 2)
    assert [round(one - tries[0]) for one in tries] == [0, pytest.approx(least, abs=1)]


def test_of_two_processes_one_takes_an_event_and_the_other_has_it_if_that_dies(
    client: Any, outbox: Outbox, far: Far
) -> None:
    end(outbox, State.SENT)
    other = Queue(client, "shop")
    taken = other.take(far.clock.now)
    assert isinstance(taken, Taken)
    assert far.endpoint.queue.take(far.clock.now) == 1.0
    far.run(queue.LEASE + 2)
    assert len(far.got) == 1
    other.failed(taken, far.clock.now, queue.Post(0, "", "", 0, "", 0), False, 0)  # it was not dead: too late
    assert standings(client)[0].waiting == 0
    mail_id = end(outbox, State.DELAYED)
    end(outbox, State.SENT, mail_id)
    taken = other.take(far.clock.now)
    assert isinstance(taken, Taken)
    far.clock.now += queue.LEASE + 1
    assert far.step()
    for late in (other.failed, other.delivered):
        more: Any = (False, 0) if late == other.failed else ()
        late(taken, far.clock.now, queue.Post(0, "", "", 0, "", 0), *more)
    far.run(10)
    assert far.types(mail_id) == ["email.delivery_delayed", "email.sent"]


def test_while_an_endpoint_is_down_one_event_is_tried_at_a_time(client: Any, outbox: Outbox, far: Far) -> None:
    far.answer = lambda event: judged(500, "")
    old, *_ = [end(outbox, State.SENT) for _ in range(5)]
    [line] = far.endpoint.queue.waiting_of(old)
    client.hset("webhook:waiting:shop", old, f"6 {int(far.clock.now)}\n{line}")  # after six tries
    far.run(1)
    assert standings(client)[0].is_down
    assert client.zscore("webhook:due:shop", old) > far.clock.now + 3600  # it failed before the endpoint was down
    far.clock.now += 10
    assert isinstance(far.endpoint.queue.take(far.clock.now), Taken)
    assert far.endpoint.queue.take(far.clock.now) == queue.LEASE
    far.answer = lambda event: GOOD
    far.run(queue.LEASE + 10)
    assert len(far.got) == 5


def test_a_mail_that_is_sent_twice_is_told_once(client: Any, outbox: Outbox, far: Far) -> None:
    mail_id = accept(outbox)
    late = claim(outbox, mail_id)
    client.delete(f"mail:{mail_id}:claim")
    for attempt in (claim(outbox, mail_id), late):
        attempt.settle(State.SENT)
    far.post_all()
    assert far.types(mail_id) == ["email.sent"]


def test_a_full_redis_is_emptied_of_events(client: Any, outbox: Outbox, far: Far) -> None:
    """And a mail that was sent is written down on it with its event."""
    attempt = claim(outbox, accept(outbox))
    refused = end(outbox, State.FAILED)
    client.config_set("maxmemory", 1)
    try:
        attempt.settle(State.SENT)
        far.answer = lambda event: GOOD if event["type"] == "email.sent" else judged(400, "")
        far.post_all()
        far.run(10)
        assert far.types(attempt.id) == ["email.sent"]
        assert [line.type for line in far.endpoint.queue.waiting_of(refused)] == ["email.failed"]
        far.answer = lambda event: GOOD
        far.run(600)
        assert standings(client)[0].waiting == 0
    finally:
        client.config_set("maxmemory", 0)


def test_an_endpoint_that_is_in_no_settings_is_forgotten(client: Any, outbox: Outbox, far: Far) -> None:
    end(outbox, State.SENT)
    want(client, {"other": "o.example email.sent"}, far.clock.now + 10)
    assert [one.name for one in standings(client)] == ["other", "shop"]
    want(client, {"other": "o.example email.sent"}, far.clock.now + 3700)
    assert [one.name for one in standings(client)] == ["other"]
    assert client.keys("webhook:*shop") == []


def test_what_is_in_redis_and_no_event_of_ours_is_passed_over(client: Any, outbox: Outbox, far: Far) -> None:
    for number, value in enumerate(
        ["", "x", "0 0", "0 0\n", "0 0\nx y z", "\xff\n\n", "0 0\nemail.sent 99999999999999999999999 "]
    ):
        client.hset("webhook:waiting:shop", f"m{number}", value)
        client.zadd("webhook:due:shop", {f"m{number}": 0})
    client.zadd("webhook:due:shop", {"nothing": 0})
    good = end(outbox, State.SENT)
    far.run(10)
    assert far.types(good) == ["email.sent"]
    assert Line.parse("email.sent 12 a b") == ("email.sent", 12, "a b")
