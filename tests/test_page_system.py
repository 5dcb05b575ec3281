"""The relay, workers, queues, timed tasks and Redis at /mail/system; what its buttons do, and who may press them."""

from __future__ import annotations

import time
from typing import Any

import pytest
from redis import Redis

from process.relays import parse_relays
from queues.cron import Cron
from queues.jobs import Policy
from smtp.pacing import Pacing
from smtp.policy import Phase
from smtp.published import publish
from smtp.verdict import Reply
from tests.dashboards import contents, email_queue, enqueue, occupy_a_worker
from tests.pages import Pages
from tests.servers import RedisServer

REFUSED = Reply(Phase.AUTH, 535, "5.7.8 not accepted: bob@example.com <b>")


@pytest.fixture
def pages(client: Redis, redis_server: RedisServer) -> Pages:
    return Pages.of(redis_server.url)


def opened(client: Redis, pause: float = 600) -> None:
    Pacing(client, ()).trouble(pause, reply=REFUSED, relay="smtp.example.com:587")


def two(client: Redis) -> None:
    tables = '[first]\nhost = "a.example"\nrate = "9/h"\n[second]\nhost = "b.example"\nport = 465\n'
    publish(client, parse_relays(tables))
    for name in ("first", "second"):
        Pacing(client, (), name).trouble(600, reply=REFUSED, relay="a.example:587")


def test_each_of_several_relays_has_its_row_and_its_button(pages: Pages, client: Redis) -> None:
    two(client)
    shown = pages.text("/mail/system")
    assert "Relay first , a.example:587 Breaker open: all mail waits , in trouble since" in shown
    assert "check username and password" in shown
    assert "used of 9/h" in shown
    assert "Relay second , b.example:465" in shown
    assert "that was a.example:587, and host and port name another now" in shown
    Pacing(client, (), "second").close()
    assert "open: mail goes by another" in pages.text("/mail/system")
    assert 'href="/mail/system/close-breaker:first"' in pages.get("/mail/system")
    pages.get("/mail/system/close-breaker:third", 404)
    assert "because first was in trouble" in pages.text("/mail/system/close-breaker:first")
    pages.get("/mail/system/pause:first", 404)


def test_each_process_is_shown_with_its_workers_and_what_they_do(pages: Pages, client: Redis) -> None:
    for name, host, beat in (("w1", "<b>", ""), ("w2", "<b>", "now"), ("w3", "vm", "")):
        occupy_a_worker(client, enqueue(client, f"{name}-of-many"), name)
        seen: Any = {"hostname": host, "pid": "7", "successful_job_count": 1000, "failed_job_count": "x"}
        seen |= {"last_heartbeat": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())} if beat else {}
        client.hset(f"rq:worker:{name}", mapping=seen)
    client.hset("rq:worker:w3", "queues", "jobs")
    client.sadd("rq:workers", "rq:worker:gone", "rq:worker:odd", b"\xff")
    client.set("rq:worker:odd", "<i>")
    before, shown = contents(client), pages.text("/mail/system")
    assert "email <b> 7 2 01 Jan 00:00:00 1 silent since 01 Jan 00:00:00 w1-of-many" in shown
    assert "2,000 0 jobs vm 7 1" in shown
    page = pages.get("/mail/system")
    assert '<a href="/mail/emails/w1-of-many">' in page
    assert '<a href="/rq/0/view/job/w3-of-many">deliver</a>' in page
    assert not {"<b>", "<i>"} & {page[at : at + 3] for at in range(len(page))}
    assert contents(client) == before


BUTTONS = [
    ("pause", lambda client: None, lambda client: client.exists("rq:suspended"), "All workers are paused"),
    (
        "resume",
        lambda client: client.set("rq:suspended", 1),
        lambda client: not client.exists("rq:suspended"),
        "again.",
    ),
    ("close-breaker:second", two, lambda client: client.keys("relay:*:breaker") == [b"relay:first:breaker"], "closed"),
    ("close-breaker", opened, lambda client: not client.exists("relay:breaker"), "The breaker is closed"),
]


@pytest.mark.parametrize(("act", "given", "is_done", "told"), BUTTONS, ids=[one[0] for one in BUTTONS])
def test_a_button_asks_first_and_then_does_it(
    pages: Pages, client: Redis, act: str, given: Any, is_done: Any, told: str
) -> None:
    given(client)
    before = contents(client)
    assert act.partition("-")[0].capitalize() in pages.text(f"/mail/system/{act}")
    assert pages.browser.post(f"/mail/system/{act}", headers={"Sec-Fetch-Site": "cross-site"}).status_code == 403
    assert contents(client) == before
    answer = pages.post(f"/mail/system/{act}")
    assert answer.status_code == 303
    assert is_done(client)
    assert told in pages.text(answer.headers["Location"])
    pages.get("/mail/system/none", 404)
    assert pages.post("/mail/system/none").status_code == 404


def test_paused_workers_take_nothing_and_the_page_says_so(pages: Pages, client: Redis) -> None:
    pages.post("/mail/system/pause")
    pages.accept()
    assert "All workers are paused: nothing is sent" in pages.text("/mail/system")
    assert "email 1 0 0 0 0" in pages.text("/mail/system")
    assert len(email_queue(client)) == 1


def test_an_open_breaker_is_shown_with_its_last_reply_its_meaning_and_its_fix(
    redis_server: RedisServer, client: Redis
) -> None:
    opened(client)
    client.hset("relay:breaker", "text", REFUSED.text)  # as if another had written it
    pages = Pages.of(
        redis_server.url, smtp_host="smtp.example.com", show_addresses=False, mail_redirect_to="a@b.example"
    )
    shown = pages.text("/mail/system")
    assert "open: all mail waits , in trouble since" in shown
    assert "next try in 10 min" in shown
    assert "535 at auth: 5.7.8 not accepted: b…@example.com <b>" in shown
    assert "the relay does not accept this login What fixes it check SMTP_USERNAME" in shown
    assert "all mail goes to MAIL_REDIRECT_TO" in shown
    assert "that was smtp.example.com:587" in Pages.of(redis_server.url, smtp_host="other").text("/mail/system")
    client.hset("relay:breaker", "open_until", 1)
    assert "a mail may try now" in pages.text("/mail/system")


def test_sessions_the_rate_tasks_and_redis_are_shown(redis_server: RedisServer, client: Redis) -> None:
    pages = Pages.of(redis_server.url, smtp_rate="14/s,2000/d")
    client.hset("relay:sessions", mapping={"a:1": f"3 2 {time.time():.0f}", "b:2": "9 9 1", "c:3": "<i>"})
    client.rpush("relay:gone", *(1000 * (time.time() - age) for age in (5, 10, 20)))
    Cron(client, "jobs", {"tasks.report": ("0 7 * * *", Policy(1, (), 1, 1))}).tick()
    client.config_set("maxmemory-policy", "allkeys-lru")
    client.config_set("maxmemory", 10**9)
    try:
        shown = pages.text("/mail/system")
    finally:
        client.config_set("maxmemory", 0)
        client.config_set("maxmemory-policy", "noeviction")
    assert "3 busy with a mail, 2 kept for the next" in shown
    assert "0 used of 14/s 3 used of 2000/d" in shown
    assert "report 0 7 * * * " in shown
    assert "07:00:00" in shown.partition("report 0 7")[2]
    assert "of 954 MB" in shown
    assert "Redis evicts mail when memory is short" in shown
    client.hset("rq:cron_scheduler:jobs", "cron_jobs", '[{"queue_name": 1, "func_name": "x", "cron": "<i>"}]')
    assert "No task has a time of its own" in pages.text("/mail/system")


def test_a_redis_that_forbids_info_has_its_page_too(redis_server: RedisServer, client: Any) -> None:
    client.execute_command("ACL", "SETUSER", "guest", "reset", "on", ">pw", "~*", "&*", "+@all", "-info")
    try:
        shown = Pages.of(redis_server.url.replace("//", "//guest:pw@")).text("/mail/system")
    finally:
        client.execute_command("ACL", "DELUSER", "guest")
    assert "Pause all workers" in shown
    assert "forbids INFO" in shown
