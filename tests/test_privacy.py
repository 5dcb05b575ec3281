"""What is in a mail stays in the mail: planted words are looked for wherever else they could turn up.

Mails that are sent, refused, put off and canceled go through the whole house at LOG_LEVEL=DEBUG. Then every key of
RQ's in Redis (unpacked), every log line, every process title and every page of the dashboard is read.
"""

from __future__ import annotations

import base64
import json
import re
import subprocess
import uuid
import zlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest

from tests.dashboards import Running, running
from tests.relay import Relay
from tests.servers import Api, House, RedisServer

SMTP_PASSWORD = "planted-smtp-password"
REDIS_PASSWORD = "planted-redis-password"
DASHBOARD_PASSWORD = "planted-dashboard-password"
MAIL = {
    "from": "planted-from-name <planted-from@planted-from.example>",
    "to": ["planted-to-name <planted-to@planted-to.example>"],
    "cc": ["planted-cc@example.com"],
    "bcc": ["planted-bcc@example.com"],
    "reply_to": "planted-reply@example.com",
    "subject": "planted-subject",
    "text": "planted-text",
    "html": "<p>planted-html</p>",
    "headers": {"X-Planted": "planted-header"},
    "attachments": [{"filename": "planted-file.txt", "content": base64.b64encode(b"planted-content").decode()}],
    "tags": [{"name": "planted-tag", "value": "planted-value"}],
}
PLANTED = re.compile(rb"planted|cGxhbnRlZ|full-key|send-key", re.IGNORECASE)  # and in base64


def assert_unplanted(text: bytes, where: object) -> None:
    found = PLANTED.search(text)
    assert not found, (where, text[max(0, found.start() - 200) : found.end() + 100])


class Scene(NamedTuple):
    house: House
    client: Any  # redis-py's types allow for answers that its client never gives
    api: Api
    dashboard: Running
    ids: list[str]


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:
    """Everything has happened that can happen to a mail, and all processes still run."""
    directory = tmp_path_factory.mktemp("privacy")
    server = RedisServer(directory, "--requirepass", REDIS_PASSWORD, password=REDIS_PASSWORD)
    with (
        server,
        Relay(tls="starttls", login=("planted-smtp-user", SMTP_PASSWORD)) as relay,
        House(directory, server.url, **relay.environment(directory)) as house,
        running(directory, server.url, DASHBOARD_PASSWORD=DASHBOARD_PASSWORD) as dashboard,
        server.client() as client,
    ):
        api = house.api()
        ids = [submit(api)]
        api.call("DELETE", f"/jobs/{submit(api)}")
        house.worker()
        house.worker("jobs")
        api.wait_for(ids[0], "sent")
        said = "<planted-to@planted-to.example> planted-reply-text"
        ids.append(happen(api, relay, "failed", [f"550 5.7.1 {said}"]))
        ids.append(happen(api, relay, "failed", [f"450 4.2.1 {said}"] * 3))
        provoke_errors(api)
        ids.append(happen(api, relay, "delayed", ["450 planted"] * 99))  # the pages show it as scheduled
        yield Scene(house, client, api, dashboard, ids)


def submit(api: Api) -> str:
    return api.submit(MAIL, Idempotency_Key=f"planted-{uuid.uuid4()}")


def happen(api: Api, relay: Relay, state: str, replies: list[str]) -> str:
    """Submits a mail that comes to this state by these replies."""
    for address in ("planted-to@planted-to.example", "planted-cc@example.com", "planted-bcc@example.com"):
        relay.rcpt[address] = list(replies)
    mail_id = submit(api)
    api.wait_for(mail_id, state)
    return mail_id


def provoke_errors(api: Api) -> None:
    """Refusals quote no request, nor do the logs of them."""
    for change in ({"to": ["planted, planted@@x"]}, {"subject": "planted\r\nplanted"}, {"planted": 1}):
        assert api.post("/emails", MAIL | change).status == 422
    api.call("POST", "/emails", raw=b'{"planted": planted}')
    api.get("/emails/planted-id?planted=planted")
    api.get("/planted-path/planted@example.com")
    Api(api.port, "planted-key").get("/readyz")
    api.post("/jobs", {"task": "planted-task"})
    assert api.post("/suppressions", {"email": "planted-suppressed@example.com"}).status == 201
    assert api.call("DELETE", "/suppressions/planted-nobody@example.com").status == 404


def everything_in(client: Any, key: bytes) -> bytes:
    """A key's name and content, what is compressed in it unpacked."""
    read: dict[bytes, Any] = {
        b"string": lambda: [client.get(key)],
        b"hash": lambda: [part for pair in client.hgetall(key).items() for part in pair],
        b"list": lambda: client.lrange(key, 0, -1),
        b"set": lambda: list(client.smembers(key)),
        b"zset": lambda: client.zrange(key, 0, -1),
        b"none": list,  # a claim that has just expired
        b"stream": lambda: [part for _, entry in client.xrange(key) for pair in entry.items() for part in pair],
    }
    return b"\n".join([key, *map(unpacked, read[client.type(key)]())])


def unpacked(value: bytes) -> bytes:
    for unpack in (zlib.decompress, lambda text: zlib.decompress(base64.b64decode(text))):
        try:
            return unpack(value)
        except (zlib.error, ValueError):
            continue
    return value


def test_the_planted_words_can_be_found_where_they_belong(scene: Scene) -> None:
    """Or else the other tests would look for nothing."""
    found = {key for key in scene.client.keys("mail:*") if PLANTED.search(everything_in(scene.client, key))}
    assert {f"mail:{one}".encode() for one in scene.ids} <= found
    result = everything_in(scene.client, f"rq:results:{scene.ids[1]}".encode())
    assert b"Failed: 550 at rcpt" in result


def test_no_planted_word_is_in_anything_of_rqs_in_redis(scene: Scene) -> None:
    keys = [key for key in scene.client.keys("*") if not key.startswith(b"mail:")]
    assert len(keys) > 10
    for key in keys:
        assert_unplanted(everything_in(scene.client, key), key)


def test_no_planted_word_is_in_a_log_at_debug(scene: Scene) -> None:
    for log in ("api", "worker-email", "worker-jobs"):
        text = scene.house.log(log).encode()
        assert text.count(b"\n") > 3
        assert_unplanted(text, log)
    assert_unplanted(scene.dashboard.output.read_bytes(), "dashboard")


def test_no_planted_word_is_in_a_process_title(scene: Scene) -> None:
    listed = subprocess.run(["ps", "-eo", "args"], capture_output=True, check=True).stdout
    titles = [line for line in listed.splitlines() if b"--requirepass" not in line]  # the server of this test
    assert any(b"worker.py" in line for line in titles)
    assert not [line for line in titles if PLANTED.search(line)]


def test_no_planted_word_is_on_a_page_of_the_dashboard(scene: Scene) -> None:
    paths = ["/rq/", "/rq/0/", "/rq/0/view", "/rq/0/view/queues", "/rq/0/view/workers", "/rq/0/view/jobs"]
    paths += ["/rq/0/data/queues.json", "/rq/0/data/workers.json"]
    registries = ("queued", "scheduled", "failed", "finished", "started", "deferred", "canceled")
    lists = [f"jobs/{queue}/{registry}/25/desc/1" for queue in ("email", "jobs") for registry in registries]
    for one in [*lists, *(f"job/{mail_id}" for mail_id in scene.ids)]:
        paths += [f"/rq/0/view/{one}", f"/rq/0/data/{one}.json"]
    shown: dict[str, str] = {}
    for path in paths:
        answer = scene.dashboard.ask("GET", path, password=DASHBOARD_PASSWORD)
        assert answer.status in (200, 308), (path, answer.status)  # Flask sends the short forms on to the long ones
        shown[path] = json.dumps(answer.body)
        assert_unplanted(shown[path].encode(), path)
    assert "Failed: 550 at rcpt" in shown[f"/rq/0/data/job/{scene.ids[1]}.json"]


def test_the_metrics_name_nothing_of_a_mail(scene: Scene) -> None:
    told = scene.api.get("/metrics").body
    assert 'async_email_mails_total{result="sent"} 1.0' in told
    assert not PLANTED.search(told.encode())
    assert not any(one in told for one in scene.ids)
