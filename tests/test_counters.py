"""Each total is counted once: by real processes over a real Redis that loses replies, with a real relay.

A reply is lost in bench.proxy, behind the script: what was asked for is done, who asked cannot know it and asks again.
"""

from __future__ import annotations

import signal
from collections import Counter
from collections.abc import Iterator
from datetime import datetime, timedelta, timezone
from typing import Any
from unittest.mock import Mock

import pytest
import redis
from redis.exceptions import ConnectionError

from chaos.proxy import Proxy
from mail.counters import ACCEPT, DELIVERED, SMTP, Gathered
from mail.outbox import Outbox
from mail.states import State
from mail.store import TOTALS
from tests.http_api import MAIL
from tests.mails import accept, claim
from tests.redis_troubles import configured
from tests.relay import CUT, Relay
from tests.servers import Api, House, RedisServer, eventually
from tests.test_delivery import replaced
from tests.test_metrics import figures

CONVERSATIONS = "smtp_duration_seconds_count"


@pytest.fixture
def proxy(redis_server: RedisServer) -> Iterator[Proxy]:
    with Proxy(redis_server.port) as proxy:
        yield proxy


@pytest.fixture
def house(sending: House, proxy: Proxy) -> House:
    sending.environment["REDIS_URL"] = f"redis://127.0.0.1:{proxy.port}/0"
    return sending


def scraped(api: Api) -> dict[str, float]:
    """Counters by name and label, and of each histogram how much it has counted."""
    return {name: value for name, value in figures(api).items() if name.split()[0].endswith(("_total", "_count"))}


def since(before: dict[str, float], now: dict[str, float]) -> dict[str, float]:
    return {name: value - before[name] for name, value in now.items() if value != before[name]}


def warmed_up(house: House) -> Api:
    """A mail has gone the whole way, so Redis knows the scripts: else the reply that gets lost is that it does not."""
    api = house.api()
    house.worker()
    api.wait_for(api.submit(MAIL), "sent")
    return api


# fmt: off
OUTCOMES = {  # the replies to the final dot, the state in which the mail ends, what is counted beside its acceptance
    "sent": ([], "sent", {"attempts_total accepted": 1, "mails_total sent": 1, CONVERSATIONS: 1}),
    "failed": (["554 5.7.1 spam"], "failed", {"attempts_total refused": 1, "mails_total failed": 1, CONVERSATIONS: 1}),
    "delayed": (["451 4.7.1 later"], "sent", {"attempts_total accepted": 1, "mails_total sent": 1, CONVERSATIONS: 2,
                                              "attempts_total try_again": 1, "delayed_total": 1}),
    "in doubt": ([CUT], "sent", {"attempts_total accepted": 1, "mails_total sent": 1, CONVERSATIONS: 2,
                                 "attempts_total in_doubt": 1, "in_doubt_total": 1, "delayed_total": 1}),
}
# fmt: on


@pytest.mark.parametrize("lost", [0, 3])
@pytest.mark.parametrize("outcome", OUTCOMES)
def test_each_outcome_is_counted_once_however_often_it_is_written(
    house: House, relay: Relay, proxy: Proxy, lost: int, outcome: str
) -> None:
    replies, state, counted = OUTCOMES[outcome]
    api = warmed_up(house)
    before = scraped(api)
    relay.data = list(replies)
    proxy.lose((b"settled_at",), lost)
    api.wait_for(api.submit(MAIL), state)
    eventually(lambda: proxy.left == 0)
    assert proxy.lost == lost
    changed = since(before, scraped(api))
    changed.pop("accept_duration_seconds_count", None)  # it comes when it comes
    sent = {"delivered_duration_seconds_count": 1} if state == "sent" else {}
    assert changed == {"mails_accepted_total": 1, **counted, **sent}


def test_a_mail_whose_acceptance_was_asked_for_twice_is_counted_once(house: House, proxy: Proxy) -> None:
    api = house.api()
    api.submit(MAIL)
    proxy.lose((b"tasks.deliver",), 1)
    api.submit(MAIL)
    assert proxy.lost == 1
    assert scraped(api)["mails_accepted_total"] == 2


def test_every_mail_of_a_batch_is_counted_and_no_replay(house: House) -> None:
    api = house.api()
    for _ in range(2):
        assert api.post("/emails/batch", [MAIL] * 3, Idempotency_Key="a").status == 200
    assert scraped(api)["mails_accepted_total"] == 3


def test_a_worker_killed_at_the_final_dot_is_an_attempt_in_doubt(
    house: House, relay: Relay, client: redis.Redis
) -> None:
    api = house.api()
    worker = house.worker()
    relay.on_data = worker.kill
    mail_id = api.submit(MAIL)
    worker.wait(20)
    relay.on_data = lambda: None
    replaced(house, client, mail_id)
    api.wait_for(mail_id, "sent", 60)
    seen = scraped(api)
    assert (seen["attempts_total interrupted"], seen["in_doubt_total"], seen["attempts_total accepted"]) == (1, 1, 1)
    assert (seen["mails_total sent"], seen["smtp_duration_seconds_count"]) == (1, 1)
    assert seen["delivered_duration_seconds_count"] == 1


def test_what_is_held_expires_or_is_canceled_is_counted_as_such(house: House, relay: Relay) -> None:
    house.environment["ON_DOUBT"] = "hold"
    api = house.api()
    canceled = api.submit(MAIL)
    for _ in range(2):
        assert api.call("DELETE", f"/jobs/{canceled}").status == 200
    soon = datetime.now(timezone.utc) + timedelta(seconds=1)
    expired = api.submit(MAIL | {"expires_at": soon.isoformat()})
    eventually(lambda: datetime.now(timezone.utc) > soon)
    relay.data = [CUT]
    unknown = api.submit(MAIL)
    house.worker()
    api.wait_for(unknown, "unknown")
    api.wait_for(expired, "failed")
    eventually(lambda: scraped(api)["mails_total expired"])
    changed = {name: value for name, value in scraped(api).items() if name.startswith("mails_") and value}
    ends = dict.fromkeys(("mails_total canceled", "mails_total expired", "mails_total unknown"), 1)
    assert changed == {"mails_accepted_total": 3, **ends}


def totals(client: Any) -> dict[str, int]:
    return {name.decode(): int(value) for name, value in client.hgetall(TOTALS).items()}


def test_how_long_the_api_took_is_handed_over_when_it_ends_at_the_latest(house: House, client: Any) -> None:
    api = house.api()
    for _ in range(3):
        api.submit(MAIL)
    assert api.post("/emails", {}).status == 422
    house.processes[0].send_signal(signal.SIGTERM)
    assert house.processes[0].wait(20) == 0
    counts = totals(client)
    assert sum(counts.get(field, 0) for field in ACCEPT.fields) == 3
    assert counts[ACCEPT.sum_field] > 0


def test_a_mail_that_two_attempts_have_sent_is_one_mail_and_two_attempts(outbox: Outbox, client: Any) -> None:
    mail_id = accept(outbox)
    first = claim(outbox, mail_id)
    client.delete(f"mail:{mail_id}:claim")  # its worker stood still for too long
    second = claim(outbox, mail_id)
    for one in (first, second):
        one.counts["attempt:accepted"] += 1
        one.settle(State.SENT)
    assert totals(client) == {"accepted": 1, "sent": 1, "attempt:accepted": 2}


def test_on_a_full_redis_a_sent_mail_is_counted_all_the_same(
    redis_server: RedisServer, outbox: Outbox, client: Any
) -> None:
    mail_id = accept(outbox)
    taken = claim(outbox, mail_id)
    client.delete(TOTALS)
    with configured(redis_server, maxmemory=1):
        SMTP.note(0.3, taken.counts)
        taken.settle(State.SENT)
    assert totals(client) == {"sent": 1, "smtp:0.5": 1, "smtp:us": 300_000}


def test_figures_that_redis_does_not_take_are_kept_for_the_next_time(
    redis_server: RedisServer, client: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    gathered = Gathered(client, ACCEPT)
    gathered.add(0.02)
    with monkeypatch.context() as patched:
        patched.setattr(client, "pipeline", Mock(side_effect=ConnectionError))
        with pytest.raises(ConnectionError):
            gathered.hand_over()
    gathered.add(3)
    gathered.hand_over()
    gathered.hand_over()
    assert totals(client) == {"accept:0.025": 1, "accept:inf": 1, "accept:us": 3_020_000}


def test_each_observation_is_in_the_first_bucket_that_holds_it() -> None:
    for histogram in (SMTP, ACCEPT, DELIVERED):
        counts: Counter[str] = Counter()
        for bound in histogram.bounds:
            histogram.note(bound, counts)
        histogram.note(100_000, counts)
        assert [counts[field] for field in histogram.fields] == [1] * len(histogram.fields)
        assert list(histogram.bounds) == sorted(histogram.bounds)
