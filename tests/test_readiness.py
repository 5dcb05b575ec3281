"""GET /healthz and GET /readyz: whether the process answers, and whether mail that it accepts is safe."""

from __future__ import annotations

import time
from datetime import timedelta
from typing import Any

import pytest
import redis
from rq.utils import now, utcformat

from process.version import VERSION
from queues.connection import weaknesses
from tests.http_api import held_to_the_shape, keys, submitted
from tests.redis_troubles import Trouble, configured, replica_of_the_dead, stopped
from tests.servers import Api, RedisServer

pytestmark = pytest.mark.usefixtures("client")


def test_healthz_asks_redis_nothing(api: Api, redis_server: RedisServer) -> None:
    with stopped(redis_server):
        answer = api.call("GET", "/healthz", headers={"Authorization": ""})
    assert (answer.status, answer.body) == (200, {"status": "ok", "version": VERSION})


def test_readyz_tells_how_the_queue_does(api: Api, client: redis.Redis) -> None:
    answer = api.call("GET", "/readyz", headers={"Authorization": ""})
    assert answer.status == 200
    assert answer.body == {
        **{"status": "ready", "reasons": [], "queued": 0, "workers": 0},
        **{"oldest_queued_seconds": None, "overdue_seconds": 0, "last_sent_seconds_ago": None},
        **{"relay_in_trouble": False, "last_sweep_seconds_ago": None, "mails_repaired": 0, "mails_given_up": 0},
    }
    submitted(api, "/emails")
    submitted(api, "/jobs")
    client.set("mail:last_sent", time.time() - 60)
    client.sadd("rq:workers:email", "alive", "killed", "gone")
    for worker, silent_for in (("alive", 5), ("killed", 90)):
        client.hset(worker, "last_heartbeat", utcformat(now() - timedelta(seconds=silent_for)))
    seen = api.get("/readyz").body
    assert (seen["queued"], seen["workers"]) == (1, 1)
    assert 60 <= seen["last_sent_seconds_ago"] < 70
    client.zadd("rq:scheduled:email", {"an-id": time.time() - 100, "another": time.time() + 100})
    client.hset("relay:breaker", "open_until", 1)
    client.hset("mail:swept", mapping={"at": time.time() - 5, "repaired": 2, "given_up": 1})
    seen = api.get("/readyz").body
    assert (seen["relay_in_trouble"], seen["mails_repaired"], seen["mails_given_up"]) == (True, 2, 1)
    assert 100 <= seen["overdue_seconds"] < 110
    assert 5 <= seen["last_sweep_seconds_ago"] < 15


def test_the_oldest_queued_mail_grows_older_until_it_is_taken(api: Api, client: redis.Redis) -> None:
    submitted(api, "/emails")
    first = api.get("/readyz").body["oldest_queued_seconds"]
    time.sleep(0.2)
    submitted(api, "/emails")
    second = api.get("/readyz").body["oldest_queued_seconds"]
    assert 0 <= first < first + 0.2 <= second < 10
    client.lpop("rq:queue:email")
    assert api.get("/readyz").body["oldest_queued_seconds"] < second
    client.delete(*keys(client, "rq:job:*"))
    assert api.get("/readyz").body["oldest_queued_seconds"] is None


@pytest.mark.parametrize(
    ("trouble", "said"),
    [
        (lambda server: configured(server, appendonly="no"), "append-only file"),
        (lambda server: configured(server, maxmemory_policy="allkeys-lru", maxmemory="1gb"), "noeviction"),
        (replica_of_the_dead, "replica"),
    ],
    ids=["no append-only file", "evicts", "replica"],
)
def test_redis_that_may_lose_or_refuse_a_mail_is_not_ready(
    api: Api, redis_server: RedisServer, trouble: Trouble, said: str
) -> None:
    ready = api.get("/readyz")
    with trouble(redis_server):
        answer = api.get("/readyz")
    error = {name: value for name, value in answer.body.items() if name not in ready.body}
    held_to_the_shape(answer._replace(body=error), 503, "not_ready")
    assert answer.body["status"] == "not ready"
    assert answer.body["message"] == "; ".join(answer.body["reasons"])
    assert said in answer.body["message"]
    assert (ready.status, set(ready.body) - set(answer.body)) == (200, set())


SOUND = {"aof_enabled": 1, "role": "master", "maxmemory": 0, "maxmemory_policy": "noeviction", "used_memory": 5}


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({}, None),
        ({"aof_enabled": 0}, "no_aof"),
        ({"aof_last_write_status": "err"}, "aof_failing"),
        ({"maxmemory": 9, "maxmemory_policy": "volatile-ttl"}, "evicting"),
        ({"maxmemory_policy": "volatile-ttl"}, None),
        ({"maxmemory": 5}, "full"),
        ({"maxmemory": 7}, None),
        ({"maxmemory": 128 << 20, "used_memory": 97 << 20}, "full"),  # 32 MB are kept
        ({"maxmemory": 128 << 20, "used_memory": 95 << 20}, None),
        ({"maxmemory": 128 << 20, "used_memory": 97 << 20, "mem_not_counted_for_evict": 2 << 20}, None),
        ({"maxmemory": 1 << 30, "used_memory": 974 << 20}, "full"),  # a twentieth
        ({"maxmemory": 1 << 30, "used_memory": 972 << 20}, None),
        ({"rdb_last_bgsave_status": "err"}, "snapshot_failing"),
        ({"role": "slave"}, "replica"),
    ],
)
def test_a_weakness_of_redis_is_told_from_its_info(change: dict[str, Any], name: str | None) -> None:
    assert [found for found, _ in weaknesses(SOUND | change)] == ([name] if name else [])


def test_the_probes_change_nothing_in_redis(api: Api, client: redis.Redis, redis_server: RedisServer) -> None:
    submitted(api, "/emails")
    known: dict[str, Any] = client.command()
    before = client.dbsize()
    with redis_server.client() as other, other.monitor() as monitor:
        assert {api.get("/healthz").status, api.get("/readyz").status} == {200}
        client.echo("the end")
        heard = []
        while "the end" not in (command := monitor.next_command()["command"]):
            heard.append(command)
    # How long it took to accept mail is handed over every few seconds, and that may be now.
    names = {one.split()[0].lower() for one in heard if not one.startswith("HINCRBY mail:totals accept:")}
    assert "info" in names
    assert not [name for name in names if "write" in known[name]["flags"]]
    assert client.dbsize() == before
