"""GET /metrics of the real service: what it says of queues, workers and Redis, and that it changes nothing."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families
from rq.utils import now, utcformat

from mail.counters import ACCEPT, DELIVERED, RESULTS, SMTP, VERDICTS
from mail.store import TOTALS
from process.relays import parse_relays
from queues.health import PLACES
from smtp.published import publish
from tests.http_api import MAIL
from tests.redis_troubles import configured
from tests.servers import ROOT, Api, House, RedisServer, eventually


@pytest.fixture
def house(sending: House) -> House:
    return sending


@pytest.fixture
def api(house: House) -> Api:
    return house.api()


def scrape(api: Api) -> str:
    answer = api.get("/metrics")
    assert (answer.status, answer.headers["Content-Type"].startswith("text/plain; version=0.0.4")) == (200, True)
    return str(answer.body)


def figures(api: Api) -> dict[str, float]:
    """Samples, by name without our prefix and the values of the labels."""
    return {
        " ".join([sample.name.removeprefix("async_email_"), *sample.labels.values()]): sample.value
        for family in text_string_to_metric_families(scrape(api))
        for sample in family.samples
    }


def test_jobs_are_counted_where_they_wait_and_the_oldest_grows_older(api: Api, client: Any) -> None:
    mail_id, _ = (api.submit(MAIL) for _ in range(2))
    client.hset(f"rq:job:{mail_id}", "enqueued_at", utcformat(now()).replace("20", "19", 1))  # a century ago
    client.zadd("rq:scheduled:email", {"a": time.time() - 100, "b": time.time() + 100})
    client.zadd("rq:failed:jobs", {"c": 1, "d": 1, "e": 1})
    client.zadd("rq:wip:email", {"f:1": 1})
    client.zadd("rq:deferred:jobs", {"g": 1})
    seen = figures(api)
    states = {name: value for name, value in seen.items() if name.startswith("queue_jobs") and value}
    assert states == {
        "queue_jobs email queued": 2,
        "queue_jobs email scheduled": 2,
        "queue_jobs email started": 1,
        "queue_jobs jobs failed": 3,
        "queue_jobs jobs deferred": 1,
    }
    assert 100 <= seen["overdue_seconds email"] < 160
    assert seen["oldest_queued_seconds email"] > 1e9
    assert seen["overdue_seconds jobs"] == seen["oldest_queued_seconds jobs"] == 0


def test_a_worker_counts_as_long_as_it_gives_signs_of_life(house: House, api: Api, client: Any) -> None:
    assert figures(api)["workers email"] == 0
    house.worker()
    house.worker("jobs")
    eventually(lambda: (figures(api)["workers email"], figures(api)["workers jobs"]) == (1, 1))
    [silent, *_] = client.smembers("rq:workers:jobs")
    house.processes[-1].kill()
    house.processes[-1].wait()
    client.hset(silent, "last_heartbeat", "2026-01-01T00:00:00.000000Z")
    assert figures(api)["workers jobs"] == 0


def test_the_relay_the_store_and_the_sweep_are_seen(api: Api, client: Any, redis_server: RedisServer) -> None:
    seen = figures(api)
    assert (seen["breaker_open"], seen["last_sent_timestamp_seconds"], seen["redis_up"]) == (0, 0, 1)
    assert (seen["redis_append_only"], seen["redis_memory_max_bytes"]) == (1, 0)
    client.hset("relay:breaker", "open_until", 1)
    client.set("mail:last_sent", 1234.5)
    client.hset("mail:swept", mapping={"repaired": 2, "given_up": 1})
    with configured(redis_server, maxmemory=10**9, appendonly="no"):
        seen = figures(api)
    assert (seen["breaker_open"], seen["last_sent_timestamp_seconds"]) == (1, 1234.5)
    assert (seen["redis_append_only"], seen["redis_memory_max_bytes"]) == (0, 10**9)
    assert 100_000 < seen["redis_memory_bytes"] < 10**9
    assert (seen["swept_total repaired"], seen["swept_total given_up"]) == (2, 1)


def test_each_of_several_relays_has_figures_of_its_own(api: Api, client: Any) -> None:
    assert not any("relay_" in name for name in figures(api))
    publish(client, parse_relays('[first]\nhost = "a.example"\nrate = "9/h"\n[second]\nhost = "b.example"'))
    client.hset("relay:first:breaker", "open_until", 1)
    client.lpush("relay:first:gone", round(time.time() * 1000))
    client.hset(TOTALS, "relay:second:accepted", 3)
    seen = figures(api)
    assert (seen["breaker_open"], seen["relay_breaker_open first"], seen["relay_breaker_open second"]) == (0, 1, 0)
    assert (seen["relay_rate_used 9/h first"], seen["relay_attempts_total second accepted"]) == (1, 3)


def test_a_histogram_adds_up(api: Api, client: Any) -> None:
    client.hset(TOTALS, mapping={"accept:0.005": 3, "accept:0.01": 1, "accept:inf": 1, "accept:us": 2_500_000})
    seen = figures(api)
    name = "accept_duration_seconds"
    assert [seen[f"{name}_bucket {bound}"] for bound in ("0.0025", "0.005", "0.01", "2.5", "+Inf")] == [0, 3, 4, 4, 5]
    assert (seen[f"{name}_count"], seen[f"{name}_sum"]) == (5, 2.5)


def test_every_process_answers_with_the_same_figures(house: House, api: Api) -> None:
    first, second = api, house.api()
    house.worker()
    first.wait_for(first.submit(MAIL), "sent")
    second.wait_for(second.submit(MAIL), "sent")

    def counters(api: Api) -> dict[str, float]:
        return {name: value for name, value in figures(api).items() if "_total" in name or "_bucket" in name}

    eventually(lambda: figures(first)["accept_duration_seconds_count"] == 2, 40)
    assert counters(first) == counters(second)
    assert counters(first)["mails_total sent"] == 2


def test_a_scrape_reads_a_few_keys_and_writes_none(api: Api, client: Any) -> None:
    """Whatever is queued, the commands are these; none of them takes longer for a longer queue."""
    with client.pipeline() as pipe:
        for number in range(3000):
            pipe.rpush("rq:queue:email", f"id-{number}")
            pipe.zadd("rq:scheduled:email", {f"later-{number}": time.time() + 1000})
            pipe.zadd("rq:failed:email", {f"failed-{number}": 1})
        pipe.execute()
    scrape(api)
    commands = []
    with client.monitor() as monitor:
        scrape(api)
        client.ping()
        for entry in monitor.listen():
            if entry["command"] == "PING":
                break
            commands.append(entry["command"].split()[0])
    looks = ["LINDEX"] * len(PLACES)
    queue = [
        "LLEN",
        "ZCARD",
        "ZCARD",
        "ZCARD",
        "ZCARD",
        "LLEN",
        *looks,
        "ZRANGE",
        "SMEMBERS",
        "SMEMBERS",
        *["HGET"] * len(PLACES),
    ]
    greeting = ("HELLO", "CLIENT")  # of our own connection
    assert [one for one in commands if one not in greeting] == [
        *("HGETALL", "HMGET", "GET"),
        *queue,
        *queue,
        *("INFO", "HGETALL", "HEXISTS", "HLEN", "HGETALL"),
    ]


def test_while_redis_is_away_the_answer_says_so(tmp_path: Path, api: Api) -> None:
    (tmp_path / "redis").mkdir()
    with RedisServer(tmp_path / "redis") as server, House(tmp_path, server.url) as house:
        api = house.api()
        assert figures(api)["redis_up"] == 1
        server.kill()
        assert {name.split()[0]: value for name, value in figures(api).items()} == {"redis_up": 0, "build_info": 1}
        server.start()
        eventually(lambda: figures(api)["redis_up"] == 1)


def test_the_library_is_not_loaded_before_somebody_asks() -> None:
    """It takes two megabytes of each API process."""
    asked = "import service, sys; print([name for name in sys.modules if name.startswith(('prometheus', 'ops'))])"
    ran = subprocess.run([sys.executable, "-c", asked], cwd=ROOT, capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "[]"


# With Sentinels or REDIS_REPLICAS alone: nobody else asks Redis for them.
REPLICATED = {f"async_email_redis_{name}" for name in ("confirms", "replicas_in_step", "replicas_known")}
REPLICATED |= {"async_email_redis_sentinels", "async_email_redis_sentinels_answering"}


def names(text: str) -> set[str]:
    """Metrics that a text speaks of. Of a histogram all its series are one."""
    found = set(re.findall(r"\basync_email_[a-z_]+", text))
    return {re.sub("_(bucket|sum|count)$", "", name) for name in found}


def test_every_series_is_there_from_the_beginning_and_on_the_page_for_operators(api: Api) -> None:
    """One that begins with 1 has no increase that an alert could see."""
    seen = set(figures(api))
    for one in (ACCEPT, SMTP, DELIVERED):
        assert {f"{one.name}_duration_seconds_bucket {float(bound)}" for bound in one.bounds} <= seen
    assert {f"mails_total {result}" for result in RESULTS} <= seen
    assert {f"attempts_total {verdict}" for verdict in VERDICTS} <= seen
    page = (ROOT / "docs" / "operations.md").read_text()
    listed = names("\n".join(line.split(" | ")[0] for line in page.splitlines() if line.startswith("| `async_email_")))
    assert {one for one in listed if one not in REPLICATED} == names(scrape(api))
    assert listed >= REPLICATED  # tests/test_replicated.py sees them
