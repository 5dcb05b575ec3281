"""The way of a mail, end to end: real processes, real Redis or Valkey, real HTTP, a real relay with STARTTLS and AUTH.

What these tests say of a killed worker they say of `kill -9`. Only one thing is not waited for but put forward: the
time after which RQ and our claim give a dead worker up.
"""

from __future__ import annotations

import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import redis
from selenium.webdriver import Chrome

from tests.dashboards import press
from tests.killed_worker import POINTS
from tests.relay import CUT, Relay
from tests.scripted_relay import Line, ScriptedRelay
from tests.servers import Api, House, RedisServer, eventually, free_port


@pytest.fixture
def relay() -> Iterator[Relay]:
    with Relay(tls="starttls", login=("mailer", "smtp-password")) as relay:
        yield relay


@pytest.fixture
def house(redis_server: RedisServer, relay: Relay, tmp_path: Path) -> Iterator[House]:
    redis_server.reset()
    with House(tmp_path, redis_server.url, **relay.environment(tmp_path)) as house:
        yield house


@pytest.fixture
def api(house: House) -> Api:
    return house.api()


def mail(*to: str, **more: object) -> dict[str, object]:
    return {"to": list(to or ["ada@example.com"]), "subject": "Hello", "text": "Hello there.", **more}


def delivered(house: House, api: Api, state: str, *to: str, **more: object) -> dict[str, Any]:
    """Starts a worker and posts a mail. Returns what the API says when it has come to this state."""
    house.worker()
    return api.wait_for(api.submit(mail(*to, **more)), state)


def scripted(house: House, relay: ScriptedRelay) -> None:
    """Makes the workers to come use this relay, which has neither TLS nor a login."""
    house.environment |= {"SMTP_PORT": str(relay.port), "SMTP_SECURITY": "none"}
    house.environment |= {"SMTP_USERNAME": "", "SMTP_PASSWORD": ""}


def killed_at(house: House, point: str) -> None:
    """Runs a worker that dies at this point, and is dead when this returns."""
    assert point in POINTS
    process = house.run("worker-killed", str(Path(__file__).parent / "killed_worker.py"), "email", point)
    assert process.wait(30) == -9, house.log("worker-killed")


def replaced(house: House, client: redis.Redis, mail_id: str) -> None:
    """Starts another worker, as if the dead one's time had run out: its entry in RQ's registry, its claim, its lock."""
    started: list[bytes] = client.zrange("rq:wip:email", 0, -1)  # type: ignore[assignment]
    for entry in started:
        client.zadd("rq:wip:email", {entry: 1})
    client.delete(f"mail:{mail_id}:claim", "rq:scheduler-lock:email")
    house.worker()


def failed_ids(client: redis.Redis) -> list[str]:
    ids: list[bytes] = client.zrange("rq:failed:email", 0, -1)  # type: ignore[assignment]
    return [one.decode() for one in ids]


def test_a_mail_posted_is_a_mail_sent(house: House, api: Api, relay: Relay, client: redis.Redis) -> None:
    seen = delivered(house, api, "sent", "Ada <ada@example.com>", bcc=["eve@example.com"], html="<b>Hello</b>")
    [delivery] = relay.accepted
    assert delivery.recipients == ["ada@example.com", "eve@example.com"]
    assert delivery.sender == "sender@example.com"
    assert delivery.message_id == seen["message_id"]
    assert b"eve@example.com" not in delivery.content
    [attempt] = seen["attempts"]
    assert attempt["verdict"] == "accepted"
    assert re.fullmatch(rf"{re.escape(socket.gethostname())}/[0-9a-f]{{8}}", attempt["worker"])
    assert (attempt["tls"], attempt["bytes"]) == ("TLSv1.3", len(delivery.content))
    assert seen["created_at"] <= attempt["began"] <= attempt["at"]
    assert 0 <= attempt["dot_ms"] <= attempt["took_ms"] < 30_000
    assert (seen["subject"], client.hexists(f"mail:{seen['id']}", "content")) == ("Hello", False)
    eventually(lambda: api.get(f"/jobs/{seen['id']}").body["status"] == "finished")  # a step after the mail is sent


def test_of_three_recipients_each_meets_his_own_fate(house: House, api: Api, relay: Relay) -> None:
    relay.rcpt["gone@example.com"] = ["550 5.1.1 no such user"] * 9
    relay.rcpt["later@example.com"] = ["450 4.2.1 mailbox busy"]
    seen = delivered(house, api, "failed", "ada@example.com", "gone@example.com", "later@example.com")
    assert [d.recipients for d in relay.accepted] == [["ada@example.com"], ["later@example.com"]]
    assert {d.message_id for d in relay.accepted} == {seen["message_id"]}
    assert relay.seen_rcpt == ["ada@example.com", "gone@example.com", "later@example.com", "later@example.com"]
    fates = [(one["status"], one["code"]) for one in seen["recipients"]]
    assert fates == [("accepted", 250), ("refused", 550), ("accepted", 250)]


@pytest.mark.parametrize("way", ["rq requeue", "API"])
def test_a_mail_whose_attempts_are_used_up_is_in_the_failed_registry_and_a_requeue_sends_it(
    house: House, api: Api, relay: Relay, client: redis.Redis, redis_server: RedisServer, way: str
) -> None:
    relay.rcpt["ada@example.com"] = ["450 4.2.1 try later"] * 4  # RETRY_SCHEDULE=1s,1s gives three attempts
    seen = delivered(house, api, "failed")
    mail_id = seen["id"]
    assert len(seen["attempts"]) == 3
    assert not relay.accepted
    eventually(lambda: failed_ids(client) == [mail_id])
    if way == "API":
        assert api.post(f"/jobs/{mail_id}/requeue", {}).status == 202
    else:
        rq = [str(Path(sys.executable).parent / "rq"), "requeue", "-u", redis_server.url]
        subprocess.run([*rq, "--queue", "email", "--all", "-S", "json"], check=True)
    # The fourth 450 shows that a requeue gives all attempts back, not one.
    api.wait_for(mail_id, "sent")
    assert [d.message_id for d in relay.accepted] == [seen["message_id"]]
    assert len(api.email(mail_id)["attempts"]) == 5
    assert failed_ids(client) == []


@pytest.mark.browser
def test_the_dashboards_button_sends_a_failed_mail_and_its_state_follows(
    house: House, api: Api, relay: Relay, client: redis.Redis, browser: Chrome
) -> None:
    relay.data = ["554 5.7.1 not today"]
    port = free_port()
    house.environment |= {"DASHBOARD_LISTEN": f"127.0.0.1:{port}", "PYTHONPATH": str(house.root)}
    mail_id = delivered(house, api, "failed")["id"]
    eventually(lambda: failed_ids(client) == [mail_id])
    house.run("dashboard", "-m", "ops.dashboard", "--no-login")
    eventually(lambda: "dashboard_started" in house.log("dashboard"))
    browser.get(f"http://127.0.0.1:{port}/rq/0/view/jobs/email/failed/8/asc/1")
    press(browser, f"tr[data-job-id='{mail_id}'] [data-role=requeue-job-btn]")
    api.wait_for(mail_id, "sent")
    assert len(relay.accepted) == 1
    assert failed_ids(client) == []


def test_a_delayed_mail_says_when_it_is_tried_next_and_has_its_crashes_forgotten(
    house: House, api: Api, relay: Relay, client: redis.Redis
) -> None:
    house.environment["RETRY_SCHEDULE"] = "1h"
    relay.data = ["451 4.7.1 not now"]
    mail_id = api.submit(mail())
    client.hset(f"rq:job:{mail_id}", "retries_left", 1)
    house.worker()
    eventually(lambda: client.hget(f"rq:job:{mail_id}", "status") == b"scheduled")
    assert client.hget(f"rq:job:{mail_id}", "retries_left") == b"3"
    seen = api.email(mail_id)
    assert seen["next_attempt_at"] > seen["attempts"][0]["at"]
    assert (seen["status"], seen["reason"]) == ("delayed", "451 at dot")


def test_while_the_relay_is_in_trouble_workers_take_no_mail_and_then_it_all_goes(
    house: House, api: Api, relay: Relay, client: redis.Redis
) -> None:
    good = house.environment["SMTP_PORT"]
    house.environment |= {"SMTP_PORT": str(free_port()), "WORKER_CONCURRENCY": "1"}
    worker = house.worker()
    ids = [api.submit(mail()) for _ in range(20)]
    eventually(lambda: api.get("/readyz").body["relay_in_trouble"])
    delayed = eventually(lambda: [one for one in ids if api.email(one)["status"] == "delayed"])
    time.sleep(2)  # no other is taken
    assert len(delayed) == 3
    assert client.llen("rq:queue:email") == 17
    assert "breaker_opened" in house.log("worker-email")
    worker.terminate()
    assert worker.wait(20) == 0
    house.environment["SMTP_PORT"] = good
    client.hset("relay:breaker", "open_until", 1)  # as if its half minute were over
    house.worker()
    for one in set(ids) - set(delayed):
        api.wait_for(one, "sent")
    assert not api.get("/readyz").body["relay_in_trouble"]
    assert "breaker_closed" in house.log("worker-email")


def test_two_workers_keep_the_rate_together_and_mail_over_it_waits_without_losing_an_attempt(
    house: House, api: Api, relay: Relay, client: redis.Redis
) -> None:
    house.environment["SMTP_RATE"] = "3/s"
    moments: list[float] = []
    relay.on_data = lambda: moments.append(time.monotonic())
    ids = [api.submit(mail()) for _ in range(12)]
    house.worker()
    house.worker()
    for one in ids:
        api.wait_for(one, "sent", seconds=30)
    gone: list[bytes] = client.lrange("relay:gone", 0, -1)  # type: ignore[assignment]
    assert len(gone) == 3
    assert moments[-1] - moments[0] >= 2.5  # twelve at three a second
    assert {client.hget(f"mail:{one}", "counted") for one in ids} == {b"0"}
    assert "SMTP_RATE is reached" in house.log("worker-email")


def test_a_mail_that_is_in_no_list_any_more_is_found_and_sent(house: House, api: Api, client: redis.Redis) -> None:
    mail_id = api.submit(mail())
    client.delete("rq:queue:email")  # popped by something that died
    client.zadd("mail:open", {mail_id: 1})
    house.worker()
    api.wait_for(mail_id, "sent")
    assert f'repaired id={mail_id} reason="its job was queued and in no list"' in house.log("worker-email")
    assert api.get("/readyz").body["mails_repaired"] == 1


def test_a_delayed_mail_is_sent_although_redis_was_restarted_meanwhile(
    house: House, api: Api, relay: Relay, redis_server: RedisServer
) -> None:
    house.environment["RETRY_SCHEDULE"] = "4s"
    relay.data = ["451 4.7.1 not now"]
    mail_id = delivered(house, api, "delayed")["id"]
    redis_server.kill()
    time.sleep(1)
    redis_server.start()
    api.wait_for(mail_id, "sent", seconds=15)  # sooner than RQ would have replaced a scheduler that died of it


# fmt: off
KILLED = [  # where, what the relay says to RCPT first, the mail's state meanwhile and at last, what attempts come to
    ("after claim", [], "sending", "sent", ["interrupted", "accepted"]),
    ("before the final dot", [], "sending", "sent", ["interrupted", "accepted"]),
    ("after the marker, before RQ's bookkeeping", [], "sent", "sent", ["accepted"]),
    ("after the mail is delayed, before RQ's bookkeeping", ["450 4.2.1 later"], "delayed", "sent",
     ["try again", "accepted"]),
    ("after RQ says scheduled, before it schedules", ["450 4.2.1 later"], "delayed", "sent", ["try again", "accepted"]),
    # Shown as queued, since the job of a failed mail runs on as far as RQ knows.
    ("after the mail is given up, before RQ's bookkeeping", ["550 5.1.1 no"], "queued", "failed", ["refused"]),
]
# fmt: on


@pytest.mark.parametrize(("point", "replies", "meanwhile", "state", "verdicts"), KILLED, ids=[one[0] for one in KILLED])
def test_a_mail_whose_worker_is_killed_comes_to_its_end_and_is_not_sent_twice(
    house: House, api: Api, relay: Relay, client: redis.Redis,
    point: str, replies: list[str], meanwhile: str, state: str, verdicts: list[str],
) -> None:  # fmt: skip
    relay.rcpt["ada@example.com"] = list(replies)
    mail_id = api.submit(mail())
    killed_at(house, point)
    assert api.email(mail_id)["status"] == meanwhile
    assert len(relay.accepted) == (meanwhile == "sent")
    replaced(house, client, mail_id)
    ended = "finished" if state == "sent" else "failed"
    eventually(lambda: api.get(f"/jobs/{mail_id}").body["status"] == ended)
    seen = api.email(mail_id)
    assert (seen["status"], [one["verdict"] for one in seen["attempts"]]) == (state, verdicts)
    assert len(relay.accepted) == (state == "sent")
    assert len(relay.seen_rcpt) == len(verdicts) - (point == "after claim")


def test_what_was_sent_is_written_down_even_if_redis_is_full_by_then(
    house: House, api: Api, relay: Relay, client: redis.Redis
) -> None:
    mail_id = api.submit(mail())
    relay.on_data = lambda: client.config_set("maxmemory", 1)
    house.worker()
    api.wait_for(mail_id, "sent")
    client.config_set("maxmemory", 0)
    assert len(relay.accepted) == 1


def test_a_mail_whose_job_was_deleted_can_be_queued_again_or_canceled(
    house: House, api: Api, relay: Relay, client: redis.Redis
) -> None:
    first, second = api.submit(mail()), api.submit(mail())
    client.delete(f"rq:job:{first}", f"rq:job:{second}", "rq:queue:email")  # as `rq empty email` does
    assert api.email(first)["reason"] == "its job was deleted"
    assert api.post(f"/jobs/{first}/requeue", {}).status == 202
    assert api.call("DELETE", f"/jobs/{second}").status == 200
    client.rpush("rq:queue:email", second)  # as if a worker had popped it at that moment
    house.worker()
    api.wait_for(first, "sent")
    assert api.email(second)["status"] == "canceled"
    assert not client.hexists(f"mail:{second}", "content")
    assert len(relay.accepted) == 1


@pytest.mark.parametrize("doubt", ["killed before the marker", "the relay hangs up"])
@pytest.mark.parametrize(
    ("operator", "sender", "state"), [("hold", None, "unknown"), ("retry", None, "sent"), ("retry", "hold", "unknown")]
)
def test_a_mail_in_doubt_goes_out_again_with_its_message_id_or_is_held_as_was_chosen(
    house: House, api: Api, relay: Relay, client: redis.Redis, operator: str, sender: str | None, state: str, doubt: str
) -> None:
    house.environment |= {"ON_DOUBT": operator, "WORKER_CONCURRENCY": "1"}
    mail_id = api.submit(mail(**({"on_doubt": sender} if sender else {})))
    if doubt == "the relay hangs up":
        relay.data = [CUT]
        client.rpush("rq:queue:email", mail_id)  # its job is run twice
        house.worker()
        eventually(lambda: f"nothing_to_do id={mail_id}" in house.log("worker-email"))
    else:
        killed_at(house, "after 250, before the marker")
        replaced(house, client, mail_id)
    seen = api.wait_for(mail_id, state)
    assert [d.message_id for d in relay.accepted] == [seen["message_id"]] * (2 if state == "sent" else 1)
    if state == "unknown":
        assert seen["recipients"][0]["status"] == "in_doubt"
        eventually(lambda: failed_ids(client) == [mail_id])
    if doubt == "the relay hangs up":
        assert seen["attempts"][0]["verdict"] == "in doubt"


def test_a_job_that_is_queued_twice_sends_one_mail(house: House, api: Api, relay: Relay, client: redis.Redis) -> None:
    mail_id = api.submit(mail())
    client.rpush("rq:queue:email", mail_id)
    house.worker()
    house.worker()
    api.wait_for(mail_id, "sent")
    eventually(lambda: client.llen("rq:queue:email") == 0)
    eventually(lambda: api.get(f"/jobs/{mail_id}").body["status"] == "finished")
    assert len(relay.accepted) == 1


def test_a_worker_that_ends_takes_leave_of_the_relay(house: House, api: Api) -> None:
    with ScriptedRelay() as relay:
        scripted(house, relay)
        worker = house.worker()
        for one in [api.submit(mail()) for _ in range(3)]:
            api.wait_for(one, "sent")
        assert "QUIT" not in relay.commands
        worker.terminate()
        assert worker.wait(20) == 0
        eventually(lambda: relay.commands.count("QUIT") == relay.connections, 2)


def test_a_second_sigterm_does_not_make_a_mail_of_doubt(house: House, api: Api) -> None:
    at_dot, answer = threading.Event(), threading.Event()

    def hold(line: Line) -> str:
        at_dot.set()
        answer.wait(20)
        return line.say("250 2.0.0 queued")

    with ScriptedRelay({".": hold}) as relay:
        scripted(house, relay)
        worker = house.worker()
        mail_id = api.submit(mail())
        assert at_dot.wait(20)
        worker.terminate()
        time.sleep(1.2)  # RQ takes a second signal within one second for an echo of the first
        worker.terminate()
        time.sleep(0.5)
        answer.set()
        assert worker.wait(20) == 0
        seen = api.email(mail_id)
    assert seen["status"] == "sent"
    assert [one["verdict"] for one in seen["attempts"]] == ["accepted"]
