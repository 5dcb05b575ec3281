"""The way of a mail, end to end: real processes, real Redis or Valkey, real HTTP, a real relay with STARTTLS and AUTH.

What these tests say of a killed worker they say of `kill -9`. Only one thing is not waited for but put forward: the
time after which RQ and our claim give a dead worker up.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from datetime import datetime, timedelta, timezone
from pathlib import Path

import pytest
import redis
from selenium.webdriver import Chrome

from tests.killed_worker import POINTS
from tests.scripted_relay import Line, ScriptedRelay
from tests.servers import CUT, Api, House, RedisServer, Relay, eventually, free_port
from tests.test_dashboard import press


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
def client(redis_server: RedisServer) -> Iterator[redis.Redis]:
    with redis_server.client() as client:
        yield client


def mail(*to: str, **more: object) -> dict[str, object]:
    return {"to": list(to or ["ada@example.com"]), "subject": "Hello", "text": "Hello there.", **more}


def submit(api: Api, body: dict[str, object]) -> str:
    answer = api.post("/emails", body)
    assert answer.status == 202, answer
    return str(answer.body["id"])


def failed_ids(client: redis.Redis) -> list[str]:
    ids: list[bytes] = client.zrange("rq:failed:email", 0, -1)  # type: ignore[assignment]
    return [one.decode() for one in ids]


def put_the_clock_forward(client: redis.Redis, mail_id: str) -> None:
    """As if the dead worker's time had run out: its entry in RQ's registry of started jobs, its claim, its lock."""
    started: list[bytes] = client.zrange("rq:wip:email", 0, -1)  # type: ignore[assignment]
    for entry in started:
        client.zadd("rq:wip:email", {entry: 1})
    client.delete(f"mail:{mail_id}:claim", "rq:scheduler-lock:email")


def rq(command: str, redis_url: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    tool = str(Path(sys.executable).parent / "rq")
    return subprocess.run([tool, command, "-u", redis_url, *arguments], capture_output=True, text=True, check=True)


def test_a_mail_posted_is_a_mail_sent(house: House, relay: Relay) -> None:
    api = house.api()
    house.worker()
    mail_id = submit(api, mail("Ada <ada@example.com>", bcc=["eve@example.com"], html="<b>Hello</b>"))
    seen = api.wait_for(mail_id, "sent")
    [delivery] = relay.accepted
    assert delivery.recipients == ["ada@example.com", "eve@example.com"]
    assert delivery.sender == "sender@example.com"
    assert delivery.message_id == seen["message_id"]
    assert b"eve@example.com" not in delivery.content
    assert [one["verdict"] for one in seen["attempts"]] == ["accepted"]
    assert api.get(f"/jobs/{mail_id}").body["status"] == "finished"


def test_start_job_sends_the_welcome_mail(house: House, relay: Relay) -> None:
    api = house.api()
    house.worker()
    answer = api.post("/start-job", {"name": "Ada", "email": "ada@example.com"})
    assert answer.status == 202
    api.wait_for(answer.body["job_id"], "sent")
    assert b"Subject: Welcome, Ada\r\n" in relay.accepted[0].content


def test_the_content_of_a_sent_mail_is_dropped_and_its_outline_kept(
    house: House, relay: Relay, client: redis.Redis
) -> None:
    api = house.api()
    house.worker()
    mail_id = submit(api, mail(attachments=[{"filename": "a.txt", "content": "aGVsbG8="}]))
    assert client.hexists(f"mail:{mail_id}", "content")
    api.wait_for(mail_id, "sent")
    assert not client.hexists(f"mail:{mail_id}", "content")
    assert 0 < int(client.ttl(f"mail:{mail_id}")) <= 3 * 86400 + 3600
    assert api.email(mail_id)["subject"] == "Hello"


def test_of_three_recipients_each_meets_his_own_fate(house: House, relay: Relay) -> None:
    relay.rcpt["gone@example.com"] = ["550 5.1.1 no such user"] * 9
    relay.rcpt["later@example.com"] = ["450 4.2.1 mailbox busy"]
    api = house.api()
    house.worker()
    mail_id = submit(api, mail("ada@example.com", "gone@example.com", "later@example.com"))
    seen = api.wait_for(mail_id, "failed")
    assert [(d.recipients, d.message_id) for d in relay.accepted] == [
        (["ada@example.com"], seen["message_id"]),
        (["later@example.com"], seen["message_id"]),
    ]
    assert relay.seen_rcpt == ["ada@example.com", "gone@example.com", "later@example.com", "later@example.com"]
    assert {one["address"]: one["status"] for one in seen["recipients"]} == {
        "ada@example.com": "accepted",
        "gone@example.com": "refused",
        "later@example.com": "accepted",
    }
    refused = next(one for one in seen["recipients"] if one["status"] == "refused")
    assert refused["code"] == 550


def test_a_refused_mail_fails_at_once_and_is_not_tried_again(house: House, relay: Relay, client: redis.Redis) -> None:
    relay.data = ["554 5.7.1 message refused as spam"]
    api = house.api()
    house.worker()
    mail_id = submit(api, mail())
    seen = api.wait_for(mail_id, "failed")
    assert seen["reason"] == "554 at dot"
    assert len(seen["attempts"]) == 1
    eventually(lambda: failed_ids(client) == [mail_id])


@pytest.mark.parametrize("way", ["rq requeue", "API"])
def test_a_mail_whose_attempts_are_used_up_is_in_the_failed_registry_and_a_requeue_sends_it(
    house: House, relay: Relay, client: redis.Redis, redis_server: RedisServer, way: str
) -> None:
    relay.rcpt["ada@example.com"] = ["450 4.2.1 try later"] * 4  # RETRY_SCHEDULE=1s,1s gives three attempts
    api = house.api()
    house.worker()
    mail_id = submit(api, mail())
    seen = api.wait_for(mail_id, "failed")
    assert len(seen["attempts"]) == 3
    assert not relay.accepted
    eventually(lambda: failed_ids(client) == [mail_id])
    if way == "API":
        assert api.post(f"/jobs/{mail_id}/requeue", {}).status == 202
    else:
        rq("requeue", redis_server.url, "--queue", "email", "--all", "-S", "json")
    # The fourth 450 shows that a requeue gives all attempts back, not one.
    api.wait_for(mail_id, "sent")
    assert [d.message_id for d in relay.accepted] == [seen["message_id"]]
    assert len(api.email(mail_id)["attempts"]) == 5
    assert failed_ids(client) == []


@pytest.mark.browser
def test_the_dashboards_button_sends_a_failed_mail_and_its_state_follows(
    house: House, relay: Relay, client: redis.Redis, browser: Chrome
) -> None:
    relay.data = ["554 5.7.1 not today"]
    port = free_port()
    house.environment |= {"DASHBOARD_LISTEN": f"127.0.0.1:{port}", "PYTHONPATH": str(house.root)}
    api = house.api()
    house.worker()
    mail_id = submit(api, mail())
    api.wait_for(mail_id, "failed")
    eventually(lambda: failed_ids(client) == [mail_id])
    house.run("dashboard", "-m", "ops.dashboard", "--no-login")
    eventually(lambda: "dashboard_started" in house.log("dashboard"))
    browser.get(f"http://127.0.0.1:{port}/rq/0/view/jobs/email/failed/8/asc/1")
    press(browser, f"tr[data-job-id='{mail_id}'] [data-role=requeue-job-btn]")
    api.wait_for(mail_id, "sent")
    assert len(relay.accepted) == 1
    assert failed_ids(client) == []


def test_a_requeued_mail_is_shown_as_queued_before_a_worker_takes_it(house: House, relay: Relay) -> None:
    relay.data = ["554 5.7.1 no"]
    api = house.api()
    worker = house.worker()
    mail_id = submit(api, mail())
    api.wait_for(mail_id, "failed")
    eventually(lambda: api.get(f"/jobs/{mail_id}").body["status"] == "failed")
    worker.terminate()
    worker.wait(20)
    api.post(f"/jobs/{mail_id}/requeue", {})
    assert api.email(mail_id)["status"] == "queued"


def test_a_delayed_mail_says_when_it_is_tried_next(house: House, relay: Relay) -> None:
    house.environment["RETRY_SCHEDULE"] = "1h"
    relay.data = ["451 4.3.0 not now"]
    api = house.api()
    house.worker()
    mail_id = submit(api, mail())
    seen = api.wait_for(mail_id, "delayed")
    assert seen["next_attempt_at"] > seen["attempts"][0]["at"]
    assert seen["reason"] == "451 at dot"


def test_an_attempt_that_ends_well_enough_forgets_the_crashes_before_it(
    house: House, relay: Relay, client: redis.Redis
) -> None:
    house.environment["RETRY_SCHEDULE"] = "1h"
    relay.data = ["451 4.3.0 not now"]
    api = house.api()
    mail_id = submit(api, mail())
    client.hset(f"rq:job:{mail_id}", "retries_left", 1)
    house.worker()
    eventually(lambda: client.hget(f"rq:job:{mail_id}", "status") == b"scheduled")
    assert client.hget(f"rq:job:{mail_id}", "retries_left") == b"3"


def test_trouble_with_the_relay_costs_a_mail_no_attempt(house: House, relay: Relay, client: redis.Redis) -> None:
    house.environment["SMTP_PASSWORD"] = "wrong"
    api = house.api()
    house.worker()
    mail_id = submit(api, mail())
    seen = api.wait_for(mail_id, "delayed")
    assert seen["reason"] == "535 at auth"
    assert client.hget(f"mail:{mail_id}", "counted") == b"0"
    assert not relay.accepted


def test_while_the_relay_is_in_trouble_workers_take_no_mail_and_then_it_all_goes(
    house: House, relay: Relay, client: redis.Redis
) -> None:
    good = house.environment["SMTP_PORT"]
    house.environment |= {"SMTP_PORT": str(free_port()), "WORKER_CONCURRENCY": "1"}
    api = house.api()
    worker = house.worker()
    ids = [submit(api, mail()) for _ in range(20)]
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
    house: House, relay: Relay, client: redis.Redis
) -> None:
    house.environment["SMTP_RATE"] = "3/s"
    moments: list[float] = []
    relay.on_data = lambda: moments.append(time.monotonic())
    api = house.api()
    ids = [submit(api, mail()) for _ in range(12)]
    house.worker()
    house.worker()
    for one in ids:
        api.wait_for(one, "sent", seconds=30)
    gone: list[bytes] = client.lrange("relay:gone", 0, -1)  # type: ignore[assignment]
    assert len(gone) == 3
    assert moments[-1] - moments[0] >= 2.5  # twelve at three a second
    assert {client.hget(f"mail:{one}", "counted") for one in ids} == {b"0"}
    assert "SMTP_RATE is reached" in house.log("worker-email")


def test_a_mail_that_expires_while_it_waits_is_not_sent(house: House, relay: Relay, client: redis.Redis) -> None:
    api = house.api()
    soon = datetime.now(timezone.utc) + timedelta(seconds=3)
    mail_id = submit(api, mail(expires_at=soon.isoformat()))
    api.wait_for(mail_id, "failed")
    house.worker()
    eventually(lambda: failed_ids(client) == [mail_id])
    seen = api.email(mail_id)
    assert (seen["status"], seen["reason"], seen["attempts"]) == ("failed", "expired", [])
    assert api.post(f"/jobs/{mail_id}/requeue", {}).status == 409
    assert relay.connections == 0


def test_a_mail_whose_next_attempt_would_come_too_late_fails_at_once(house: House, relay: Relay) -> None:
    house.environment["RETRY_SCHEDULE"] = "1h"
    relay.data = ["451 4.3.0 not now"]
    api = house.api()
    house.worker()
    soon = datetime.now(timezone.utc) + timedelta(minutes=10)
    mail_id = submit(api, mail(expires_at=soon.isoformat()))
    seen = api.wait_for(mail_id, "failed")
    assert seen["reason"] == "expired"
    assert [one["code"] for one in seen["attempts"]] == [451]


def test_a_mail_that_expires_while_its_body_goes_out_gets_no_final_dot(house: House) -> None:
    soon = datetime.now(timezone.utc) + timedelta(seconds=4)

    def wait(_: Line) -> str:
        time.sleep(5)
        return ""

    with ScriptedRelay({"BODY": wait}) as relay:
        house.environment |= {"SMTP_PORT": str(relay.port), "SMTP_SECURITY": "none", "SMTP_USERNAME": ""}
        house.environment["SMTP_PASSWORD"] = ""
        api = house.api()
        house.worker()
        mail_id = submit(api, mail(text="x" * 2_000_000, expires_at=soon.isoformat()))
        seen = api.wait_for(mail_id, "failed")
    assert seen["reason"] == "expired"
    assert relay.commands[-1].startswith("DATA")
    assert not relay.accepted


def test_a_mail_may_say_for_itself_that_doubt_is_held(house: House, relay: Relay) -> None:
    relay.data = [CUT]
    api = house.api()
    house.worker()
    mail_id = submit(api, mail(on_doubt="hold"))
    api.wait_for(mail_id, "unknown")
    assert len(relay.accepted) == 1


def test_a_mail_that_is_in_no_list_any_more_is_found_and_sent(house: House, relay: Relay, client: redis.Redis) -> None:
    api = house.api()
    mail_id = submit(api, mail())
    client.delete("rq:queue:email")  # popped by something that died
    client.zadd("mail:open", {mail_id: 1})
    house.worker()
    api.wait_for(mail_id, "sent")
    assert f"repaired id={mail_id}" in house.log("worker-email")
    assert api.get("/readyz").body["mails_repaired"] == 1


def test_a_delayed_mail_is_sent_although_redis_was_restarted_meanwhile(
    house: House, relay: Relay, redis_server: RedisServer
) -> None:
    house.environment["RETRY_SCHEDULE"] = "4s"
    relay.data = ["451 4.3.0 not now"]
    api = house.api()
    house.worker()
    mail_id = submit(api, mail())
    api.wait_for(mail_id, "delayed")
    redis_server.kill()
    time.sleep(1)
    redis_server.start()
    api.wait_for(mail_id, "sent", seconds=15)  # sooner than RQ would have replaced a scheduler that died of it


@pytest.mark.parametrize("point", ["after claim", "before the final dot"])
def test_a_worker_killed_before_the_final_dot_leaves_a_mail_that_is_sent_once(
    house: House, relay: Relay, client: redis.Redis, point: str
) -> None:
    api = house.api()
    mail_id = submit(api, mail())
    killed_at(house, point)
    assert not relay.accepted
    put_the_clock_forward(client, mail_id)
    house.worker()
    seen = api.wait_for(mail_id, "sent")
    assert len(relay.accepted) == 1
    assert [one["verdict"] for one in seen["attempts"]] == ["interrupted", "accepted"]


def test_a_worker_killed_between_the_250_and_rqs_bookkeeping_sends_no_second_mail(
    house: House, relay: Relay, client: redis.Redis
) -> None:
    api = house.api()
    mail_id = submit(api, mail())
    killed_at(house, "after the marker, before RQ's bookkeeping")
    assert len(relay.accepted) == 1
    assert api.get(f"/jobs/{mail_id}").body["status"] == "started"
    put_the_clock_forward(client, mail_id)
    house.worker()
    eventually(lambda: api.get(f"/jobs/{mail_id}").body["status"] == "finished")
    assert api.email(mail_id)["status"] == "sent"
    assert len(relay.accepted) == 1


@pytest.mark.parametrize(
    "point", ["after the mail is delayed, before RQ's bookkeeping", "after RQ says scheduled, before it schedules"]
)
def test_a_worker_killed_while_a_mail_is_put_off_leaves_it_to_be_sent_once(
    house: House, relay: Relay, client: redis.Redis, point: str
) -> None:
    relay.data = ["451 4.3.0 not now"]
    api = house.api()
    mail_id = submit(api, mail())
    killed_at(house, point)
    assert api.email(mail_id)["status"] == "delayed"
    put_the_clock_forward(client, mail_id)
    house.worker()
    api.wait_for(mail_id, "sent")
    assert len(relay.accepted) == 1


def test_a_worker_killed_after_it_gave_a_mail_up_does_not_ask_the_relay_again(
    house: House, relay: Relay, client: redis.Redis
) -> None:
    relay.rcpt["ada@example.com"] = ["550 5.1.1 no such user"]
    api = house.api()
    mail_id = submit(api, mail())
    killed_at(house, "after the mail is given up, before RQ's bookkeeping")
    put_the_clock_forward(client, mail_id)
    house.worker()
    eventually(lambda: failed_ids(client) == [mail_id])
    assert api.email(mail_id)["status"] == "failed"
    assert relay.seen_rcpt == ["ada@example.com"]


def test_a_held_mail_whose_job_is_run_twice_is_not_sent_again(house: House, relay: Relay, client: redis.Redis) -> None:
    house.environment["ON_DOUBT"] = "hold"
    relay.data = [CUT]
    api = house.api()
    mail_id = submit(api, mail())
    client.rpush("rq:queue:email", mail_id)
    house.worker()
    api.wait_for(mail_id, "unknown")
    eventually(lambda: client.llen("rq:queue:email") == 0)
    other = submit(api, mail("bob@example.com"))
    api.wait_for(other, "sent")  # so the second run is over
    assert api.email(mail_id)["status"] == "unknown"
    assert [d.recipients for d in relay.accepted] == [["ada@example.com"], ["bob@example.com"]]
    assert failed_ids(client) == [mail_id]


def test_what_was_sent_is_written_down_even_if_redis_is_full_by_then(
    house: House, relay: Relay, client: redis.Redis
) -> None:
    api = house.api()
    mail_id = submit(api, mail())
    relay.on_data = lambda: client.config_set("maxmemory", 1)
    house.worker()
    api.wait_for(mail_id, "sent")
    client.config_set("maxmemory", 0)
    assert len(relay.accepted) == 1


def test_a_mail_canceled_while_its_body_goes_out_is_not_sent_and_one_after_it_is_not_canceled(
    house: House, relay: Relay, client: redis.Redis
) -> None:
    api = house.api()
    mail_id = submit(api, mail())
    client.set(f"mail:{mail_id}:claim", "an attempt", px=60_000)
    answer = api.call("DELETE", f"/jobs/{mail_id}")
    assert (answer.status, answer.body["message"]) == (409, "the mail is being sent")


def test_a_mail_whose_job_was_deleted_can_be_queued_again_or_canceled(
    house: House, relay: Relay, client: redis.Redis
) -> None:
    api = house.api()
    first, second = submit(api, mail()), submit(api, mail())
    client.delete(f"rq:job:{first}", f"rq:job:{second}", "rq:queue:email")  # as `rq empty email` does
    assert api.email(first)["reason"] == "its job was deleted"
    assert api.post(f"/jobs/{first}/requeue", {}).status == 202
    assert api.call("DELETE", f"/jobs/{second}").status == 200
    house.worker()
    api.wait_for(first, "sent")
    assert api.email(second)["status"] == "canceled"
    assert not client.hexists(f"mail:{second}", "content")
    assert len(relay.accepted) == 1


def test_a_worker_killed_between_the_250_and_the_marker_leaves_a_mail_in_doubt_that_hold_does_not_send_again(
    house: House, relay: Relay, client: redis.Redis
) -> None:
    house.environment["ON_DOUBT"] = "hold"
    api = house.api()
    mail_id = submit(api, mail())
    killed_at(house, "after 250, before the marker")
    put_the_clock_forward(client, mail_id)
    house.worker()
    seen = api.wait_for(mail_id, "unknown")
    assert len(relay.accepted) == 1
    assert seen["recipients"][0]["status"] == "in_doubt"
    eventually(lambda: failed_ids(client) == [mail_id])


def test_a_mail_in_doubt_goes_out_again_with_its_message_id_where_the_operator_chose_retry(
    house: House, relay: Relay, client: redis.Redis
) -> None:
    api = house.api()
    mail_id = submit(api, mail())
    killed_at(house, "after 250, before the marker")
    put_the_clock_forward(client, mail_id)
    house.worker()
    seen = api.wait_for(mail_id, "sent")
    assert [d.message_id for d in relay.accepted] == [seen["message_id"]] * 2


@pytest.mark.parametrize(("choice", "state", "sent"), [("hold", "unknown", 1), ("retry", "sent", 2)])
def test_a_relay_that_hangs_up_after_the_final_dot_leaves_the_choice_to_the_operator(
    house: House, relay: Relay, choice: str, state: str, sent: int
) -> None:
    house.environment["ON_DOUBT"] = choice
    relay.data = [CUT]
    api = house.api()
    house.worker()
    mail_id = submit(api, mail())
    seen = api.wait_for(mail_id, state)
    assert [d.message_id for d in relay.accepted] == [seen["message_id"]] * sent
    assert seen["attempts"][0]["verdict"] == "in doubt"


def test_in_doubt_are_only_those_whom_the_relay_had_accepted(house: House, relay: Relay) -> None:
    house.environment["ON_DOUBT"] = "hold"
    relay.data = [CUT]
    relay.rcpt["later@example.com"] = ["450 4.2.1 busy"]
    api = house.api()
    house.worker()
    mail_id = submit(api, mail("ada@example.com", "later@example.com"))
    seen = api.wait_for(mail_id, "unknown")
    assert [d.recipients for d in relay.accepted] == [["ada@example.com"], ["later@example.com"]]
    assert [one["status"] for one in seen["recipients"]] == ["in_doubt", "accepted"]


def test_a_job_that_is_queued_twice_sends_one_mail(house: House, relay: Relay, client: redis.Redis) -> None:
    api = house.api()
    mail_id = submit(api, mail())
    client.rpush("rq:queue:email", mail_id)
    house.worker()
    house.worker()
    api.wait_for(mail_id, "sent")
    eventually(lambda: client.llen("rq:queue:email") == 0)
    eventually(lambda: api.get(f"/jobs/{mail_id}").body["status"] == "finished")
    assert len(relay.accepted) == 1


def test_a_mail_that_another_attempt_holds_is_left_alone_and_tried_later(
    house: House, relay: Relay, client: redis.Redis
) -> None:
    api = house.api()
    mail_id = submit(api, mail())
    client.set(f"mail:{mail_id}:claim", "somebody", px=6000)  # longer than a worker takes to start on a busy machine
    house.worker()
    api.wait_for(mail_id, "sent")
    assert len(relay.accepted) == 1
    assert "busy id=" in house.log("worker-email")


def test_a_canceled_mail_is_not_sent(house: House, relay: Relay, client: redis.Redis) -> None:
    api = house.api()
    mail_id = submit(api, mail())
    assert api.call("DELETE", f"/jobs/{mail_id}").status == 200
    client.rpush("rq:queue:email", mail_id)  # as if a worker had popped it at that moment
    house.worker()
    other = submit(api, mail())
    api.wait_for(other, "sent")
    assert api.email(mail_id)["status"] == "canceled"
    assert len(relay.accepted) == 1


def test_sigterm_lets_the_mail_in_hand_finish(house: House, relay: Relay) -> None:
    api = house.api()
    worker = house.worker()
    ids = [submit(api, mail()) for _ in range(5)]
    eventually(lambda: relay.accepted)
    worker.terminate()
    assert worker.wait(20) == 0
    states = [api.email(one)["status"] for one in ids]
    assert states.count("sent") == len(relay.accepted)
    assert set(states) <= {"sent", "queued"}


def test_a_worker_that_ends_takes_leave_of_the_relay(house: House) -> None:
    with ScriptedRelay() as relay:
        house.environment |= {"SMTP_PORT": str(relay.port), "SMTP_SECURITY": "none", "SMTP_USERNAME": ""}
        house.environment["SMTP_PASSWORD"] = ""
        api = house.api()
        worker = house.worker()
        for one in [submit(api, mail()) for _ in range(3)]:
            api.wait_for(one, "sent")
        assert "QUIT" not in relay.commands
        worker.terminate()
        assert worker.wait(20) == 0
        eventually(lambda: relay.commands.count("QUIT") == relay.connections, 2)


def test_a_second_sigterm_does_not_make_a_mail_of_doubt(house: House) -> None:
    at_dot, answer = threading.Event(), threading.Event()

    def hold(line: Line) -> str:
        at_dot.set()
        answer.wait(20)
        line.say("250 2.0.0 queued")
        return "250 2.0.0 queued"

    with ScriptedRelay({".": hold}) as relay:
        house.environment |= {"SMTP_PORT": str(relay.port), "SMTP_SECURITY": "none", "SMTP_USERNAME": ""}
        house.environment["SMTP_PASSWORD"] = ""
        api = house.api()
        worker = house.worker()
        mail_id = submit(api, mail())
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


def test_a_redis_restart_loses_no_mail_that_was_accepted(
    house: House, relay: Relay, redis_server: RedisServer, client: redis.Redis
) -> None:
    api = house.api()
    ids = [submit(api, mail()) for _ in range(10)]
    redis_server.kill()
    redis_server.start()
    house.worker()
    for one in ids:
        api.wait_for(one, "sent")
    assert len(relay.accepted) == 10


def test_a_power_cut_in_the_middle_of_an_accept_leaves_the_whole_mail_or_nothing(house: House, tmp_path: Path) -> None:
    """What a power cut takes is the end of the append-only file, at any byte."""
    (tmp_path / "whole").mkdir()
    with RedisServer(tmp_path / "whole") as server:
        house.environment["REDIS_URL"] = server.url
        api = house.api()
        first = submit(api, mail())
        [log] = (tmp_path / "whole").glob("appendonlydir/*.incr.aof")
        before = log.stat().st_size
        answer = api.post("/emails", mail(), Idempotency_Key="a key")
        assert answer.status == 202
        after = log.stat().st_size
    found = []
    for cut in (before + (after - before) * twelfth // 12 for twelfth in range(13)):
        place = tmp_path / f"cut at {cut}"
        shutil.copytree(tmp_path / "whole", place)
        os.truncate(place / log.relative_to(tmp_path / "whole"), cut)
        with RedisServer(place) as server, server.client() as client:
            queued: list[bytes] = client.lrange("rq:queue:email", 0, -1)
            watched: list[bytes] = client.zrange("mail:open", 0, -1)
            ids = {one.decode() for one in queued}
            assert {one.decode() for one in watched} == ids
            assert client.exists(*(f"mail:{one}" for one in ids)) == client.exists(*(f"rq:job:{one}" for one in ids))
            assert client.exists(*(f"mail:{one}" for one in ids)) == len(ids)
            keys: list[bytes] = client.keys("*")
            assert sum(key.startswith((b"mail:", b"rq:job:")) for key in keys) == 2 * len(ids) + 2  # open, totals
            assert client.hget("mail:totals", "accepted") == str(len(ids)).encode()
            assert sum(key.startswith(b"idempotency:") for key in keys) == len(ids - {first})
            found.append(len(ids))
    assert found == [1] * 12 + [2]


def killed_at(house: House, point: str) -> None:
    """A worker that dies at this point, and is dead when this returns."""
    assert point in POINTS
    process = house.run("worker-killed", str(Path(__file__).parent / "killed_worker.py"), "email", point)
    assert process.wait(30) == -9, house.log("worker-killed")
