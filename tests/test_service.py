"""What the API accepts, what it refuses, and what it says when Redis is in trouble: of a real process and a real Redis.

Redis is killed, stopped, filled, cut off from its disk and made a replica while the API runs. Afterwards a mail must be
stored whole (the mail, its job, its place in the queue) or not at all. The shape of errors is in test_error_shape.py.
"""

from __future__ import annotations

import argparse
import ast
import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, suppress
from datetime import datetime, timedelta, timezone
from hashlib import sha256
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import redis
from rq import SimpleWorker
from rq.job import Job, JobStatus
from rq.serializers import JSONSerializer

import server
import service
import tasks
from jobs import Jobs, connect
from mail.outbox import Outbox
from settings import Address, load
from tests.servers import ROOT, Answer, Api, House, RedisServer, eventually, free_port

MAIL: dict[str, Any] = {"to": "ada@example.com", "subject": "Hello", "text": "Hello there."}
WELCOME = {"name": "Ada", "email": "ada@example.com"}
JOB: dict[str, Any] = {"task": "why_failed", "args": {"hours": 1}}
SUBMITTED = {"/emails": MAIL, "/start-job": WELCOME, "/jobs": JOB}
UNKNOWN_ID = "00000000-0000-4000-8000-000000000000"
LIMIT = 300_000  # bytes; the smallest body nested 40,000 deep is larger than 64 KiB


@pytest.fixture(scope="module")
def house(redis_server: RedisServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[House]:
    directory = tmp_path_factory.mktemp("house")
    with House(directory, redis_server.url, MAX_MESSAGE_BYTES=str(LIMIT), LOG_LEVEL="INFO") as house:
        yield house


@pytest.fixture(scope="module")
def api(house: House) -> Api:
    return house.api()


@pytest.fixture(autouse=True)
def client(redis_server: RedisServer) -> Iterator[redis.Redis]:
    with redis_server.client() as client:
        client.flushall()
        yield client


def fields(answer: Answer) -> list[str]:
    return [error["field"] for error in answer.body.get("errors", [])]


def keys(client: redis.Redis, pattern: str) -> set[str]:
    found: list[bytes] = client.keys(pattern)  # type: ignore[assignment]
    return {key.decode() for key in found}


def stored(client: redis.Redis) -> set[str]:
    """The ids of the mails in Redis, each of which is there whole and queued once."""
    queued: list[bytes] = client.lrange("rq:queue:email", 0, -1)  # type: ignore[assignment]
    watched: list[bytes] = client.zrange("mail:open", 0, -1)  # type: ignore[assignment]
    mails = {key.removeprefix("mail:") for key in keys(client, "mail:*") - {"mail:open", "mail:totals"}}
    assert mails == {one.decode() for one in watched}
    assert mails == {key.removeprefix("rq:job:") for key in keys(client, "rq:job:*")}
    assert sorted(mails) == sorted(one.decode() for one in queued)
    return mails


# --- what is accepted -------------------------------------------------------------------------------------------------


def test_a_mail_is_accepted_with_its_id_and_stored_whole(api: Api, client: redis.Redis) -> None:
    answer = api.post("/emails", MAIL)
    assert answer.status == 202
    assert answer.body == {"id": answer.body["id"], "status": "queued"}
    assert stored(client) == {answer.body["id"]}
    assert api.get(f"/jobs/{answer.body['id']}").body["task"] == "deliver"


def test_the_welcome_mail_greets_by_name_and_is_addressed_to_it(api: Api, client: redis.Redis) -> None:
    answer = api.post("/start-job", {"name": 'Ada "Countess" Lovelace', "email": "ada@example.com"})
    assert answer.status == 202
    assert answer.body == {"job_id": answer.body["job_id"], "status": "queued"}
    seen = api.email(answer.body["job_id"])
    assert seen["subject"] == 'Welcome, Ada "Countess" Lovelace'
    assert seen["to"] == [r'"Ada \"Countess\" Lovelace" <ada@example.com>']
    assert stored(client) == {answer.body["job_id"]}


def test_a_job_holds_its_arguments_and_nothing_of_a_mail(api: Api, client: redis.Redis) -> None:
    job_id = api.post("/jobs", JOB).body["job_id"]
    job = Job.fetch(job_id, client, serializer=JSONSerializer)
    assert (job.func_name, job.args, job.kwargs, job.timeout) == ("tasks.why_failed", [], {"hours": 1}, 60)
    assert client.lrange("rq:queue:jobs", 0, -1) == [job_id.encode()]
    mail_job = Job.fetch(api.post("/emails", MAIL).body["id"], client, serializer=JSONSerializer)
    assert mail_job.args == [mail_job.id]
    assert not mail_job.kwargs
    assert mail_job.description == f"tasks.deliver {mail_job.id}"


def test_arguments_that_a_task_gives_a_default_may_be_left_out(api: Api) -> None:
    assert api.post("/jobs", {"task": "why_failed"}).status == 202


@pytest.mark.parametrize(
    "content_type", ["application/json; charset=utf-8", "APPLICATION/JSON", "application/json ;charset=UTF-8"]
)
def test_the_content_type_may_be_spelled_and_have_a_charset(api: Api, content_type: str) -> None:
    assert api.call("POST", "/emails", MAIL, {"Content-Type": content_type}).status == 202


# --- API keys ---------------------------------------------------------------------------------------------------------

ANY_ID = [
    ("GET", f"/emails/{UNKNOWN_ID}"),
    ("GET", f"/jobs/{UNKNOWN_ID}"),
    ("POST", f"/jobs/{UNKNOWN_ID}/requeue"),
    ("DELETE", f"/jobs/{UNKNOWN_ID}"),
]


def test_a_key_of_scope_send_may_submit_mail_and_nothing_else(api: Api) -> None:
    sender = Api(api.port, "send-key")
    assert sender.post("/emails", MAIL).status == 202
    assert sender.post("/start-job", WELCOME).status == 202
    for method, path in [*ANY_ID, ("POST", "/jobs")]:
        answer = sender.call(method, path, JOB if path == "/jobs" else None)
        assert (answer.status, answer.body["name"]) == (401, "restricted_api_key"), path
    assert {route[:2] for route in service.ROUTES if route[3] == "send"} == {
        ("POST", "/emails"),
        ("POST", "/emails/batch"),
        ("POST", "/start-job"),
    }


def test_a_key_of_scope_full_may_do_everything(api: Api) -> None:
    assert all(api.post(path, body).status == 202 for path, body in SUBMITTED.items())
    assert {api.call(*one).status for one in ANY_ID} == {404}


@pytest.mark.parametrize("given", ["", "Bearer", "Bearer ", "Basic full-key", "full-key", "Token full-key"])
def test_a_key_in_any_other_scheme_is_no_key(api: Api, given: str) -> None:
    answer = api.call("POST", "/emails", MAIL, {"Authorization": given})
    assert (answer.status, answer.body["name"]) == (401, "missing_api_key")
    assert answer.headers["Www-Authenticate"] == "Bearer"


@pytest.mark.parametrize(
    "given", ["full-kex", "full-ke", "full-key2", "FULL-KEY", "é", "full-key, full-key", "x" * 9000]
)
def test_an_unknown_key_is_refused(api: Api, client: redis.Redis, given: str) -> None:
    answer = api.call("POST", "/emails", MAIL, {"Authorization": f"Bearer {given}"})
    assert (answer.status, answer.body["name"]) == (403, "invalid_api_key")
    assert client.dbsize() == 0


def test_the_word_bearer_may_be_written_in_any_case(api: Api) -> None:
    assert api.call("GET", f"/jobs/{UNKNOWN_ID}", headers={"Authorization": "bearer  full-key"}).status == 404


def app_with(redis_url: str, **settings: Any) -> service.Edge:
    api_keys = settings.pop("api_keys", f"full:{sha256(b'full-key').hexdigest()}")
    made = load(_env_file=None, redis_url=redis_url, api_keys=api_keys, mail_from="sender@example.com", **settings)
    return service.make_app(made, Jobs(connect(redis_url)))


@contextmanager
def served(app: service.Edge) -> Iterator[Api]:
    """An application in this process, behind the real Waitress, for what must be looked at from inside."""
    port = free_port()
    running = server.Server(app, load(_env_file=None).max_message_bytes, server.listen_on(Address("127.0.0.1", port)))
    thread = threading.Thread(target=running.run)
    thread.start()
    try:
        yield Api(port)
    finally:
        running.stop()
        thread.join()


@pytest.mark.parametrize("key", ["schlüssel", "clé-à", "鍵", "key with spaces"])
def test_a_key_may_be_any_text_in_utf_8(redis_server: RedisServer, key: str) -> None:
    with served(app_with(redis_server.url, api_keys=f"one:{sha256(key.encode()).hexdigest()}")) as api:
        given = {"Authorization": f"Bearer {key}".encode().decode("latin-1")}
        assert api.call("GET", f"/jobs/{UNKNOWN_ID}", headers=given).status == 404


@pytest.mark.parametrize("given", ["first", "second", "third", "fourth", "é"])
def test_a_key_is_compared_with_every_known_key_in_constant_time(
    redis_server: RedisServer, monkeypatch: pytest.MonkeyPatch, given: str
) -> None:
    known = {name: sha256(name.encode()).hexdigest() for name in ("first", "second", "third")}
    compared = []

    def compare(one: str, other: str) -> bool:
        compared.append(one)
        return one == other

    monkeypatch.setattr("service.hmac.compare_digest", compare)
    with served(app_with(redis_server.url, api_keys=",".join(f"{n}:{digest}" for n, digest in known.items()))) as api:
        status = api.call("GET", f"/jobs/{UNKNOWN_ID}", headers={"Authorization": f"Bearer {given}"}).status
    assert status == (404 if given in known else 403)
    assert compared == list(known.values())


# --- what is refused --------------------------------------------------------------------------------------------------


def refused(api: Api, client: redis.Redis, path: str, body: Any, status: int, *named: str) -> None:
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    answer = api.call("POST", path, raw=raw)
    assert answer.status == status, answer
    assert fields(answer) == list(named), answer
    assert not re.search(r"sys\.|pydantic|Error|__", answer.body["message"])  # Python's own words help no caller
    assert client.dbsize() == 0


DEEP = 40_000
READS_DEEP = sys.version_info >= (3, 14)  # before, json gives up
NOT_JSON: dict[str, tuple[bytes, str]] = {  # what cannot be read, and the field that the answer names
    "nothing": (b"", "body"),
    "half an object": (b'{"to": ', "body"),
    "two objects": (b"{} {}", "body"),
    "single quotes": (b"{'to': 1}", "body"),
    "a trailing comma": (b'{"to": "a",}', "body"),
    "NaN": (b'{"to": NaN}', "body"),
    "Infinity": (b'{"to": Infinity}', "body"),
    "-Infinity": (b'{"to": [-Infinity]}', "body"),
    "a number beyond any float": (b'{"to": [1, 1e999]}', "to[1]"),
    "the same, negative and deep": (b'{"template": {"variables": {"a": -1e999}}}', "template.variables.a"),
    "an integer of 5000 digits": (b'{"to": %b}' % (b"1" * 5000), "body"),
    "deep arrays": (b"[" * DEEP + b"]" * DEEP, "[0]" if READS_DEEP else "body"),
    "deep objects": (b'{"a":' * DEEP + b"1" + b"}" * DEEP, "a" if READS_DEEP else "body"),
    "arrays a little too deep": (b"[" * 40 + b"]" * 40, "[0]"),
    "deep variables": (
        b'{"template": {"id": "welcome", "variables": {"a": %b}}}' % (b"[" * 40 + b"]" * 40),
        "template",
    ),
    "deep arguments": (b'{"task": "why_failed", "args": %b1%b}' % (b'{"a":' * 40, b"}" * 40), "args"),
    "half a surrogate pair": (rb'{"to": ["a", "\ud800"]}', "to[1]"),
    "half a surrogate pair in a name": (rb'{"headers": {"X-\udfff": "a"}}', "headers.X-?"),
    "a name twice": (b'{"to": "a@b.example", "to": "c@d.example"}', "body"),
    "a name twice, deep": (b'{"headers": {"X": "1", "X": "2"}}', "body"),
    "Latin-1": ('{"to": "é"}'.encode("latin-1"), "body"),
    "a byte order mark": (b"\xef\xbb\xbf{}", "body"),
    "UTF-16": ('{"to": "a"}'.encode("utf-16"), "body"),
    "UTF-32": ('{"to": "a"}'.encode("utf-32"), "body"),
    "UTF-8 with surrogates in it": (b'{"to": "\xed\xa0\x80"}', "body"),
    "a NUL in a string": (b'{"to": "\0"}', "body"),
    "20,000 values": (b"[%b1]" % (b"1," * 20_000), "body"),
    "20,000 names": (b"{%b}" % b",".join(b'"%d":1' % number for number in range(5_001)), "body"),
}
SMALL_ENOUGH = {name for name, (raw, _) in NOT_JSON.items() if len(raw) <= service.SMALL_BODY}


@pytest.mark.parametrize("path", SUBMITTED)
@pytest.mark.parametrize("what", NOT_JSON)
def test_a_body_that_is_not_plain_json_is_refused(api: Api, client: redis.Redis, path: str, what: str) -> None:
    raw, field = NOT_JSON[what]
    if path != "/emails" and what not in SMALL_ENOUGH:
        refused(api, client, path, raw, 413)
    else:
        refused(api, client, path, raw, 400, field)


@pytest.mark.parametrize("path", SUBMITTED)
@pytest.mark.parametrize("raw", [b"[]", b"[{}]", b'"x"', b"1", b"1.5", b"true", b"null"])
def test_a_body_that_is_no_object_is_refused(api: Api, client: redis.Redis, path: str, raw: bytes) -> None:
    refused(api, client, path, raw, 422, "body")


def test_a_body_as_deep_and_as_long_as_is_allowed_is_read(api: Api) -> None:
    nested: Any = "x"
    for _ in range(service.DEEPEST - 3):
        nested = [nested]
    use = {"id": "welcome", "variables": {"name": "Ada", "deep": nested, "long": [1] * (service.MOST_VALUES - 60)}}
    assert api.post("/emails", {"to": "ada@example.com", "template": use}).status == 202
    refused_use = {"id": "welcome", "variables": {"name": "Ada", "deep": [nested]}}
    assert api.post("/emails", {"to": "ada@example.com", "template": refused_use}).status == 400


@pytest.mark.parametrize("path", ["/start-job", "/jobs"])
def test_a_body_over_64_KiB_is_taken_by_emails_only(api: Api, client: redis.Redis, path: str) -> None:
    raw = json.dumps(SUBMITTED[path]).encode().ljust(service.SMALL_BODY)
    refused(api, client, path, raw + b" ", 413)
    assert api.call("POST", path, raw=raw).status == 202
    assert api.post("/emails", {**MAIL, "text": "x" * service.SMALL_BODY}).status == 202


@pytest.mark.parametrize(
    "given", [None, "", "text/plain", "application/jsonp", "application/problem+json", "json", "é", "text/json"]
)
def test_any_other_content_type_is_refused(api: Api, client: redis.Redis, given: str | None) -> None:
    headers = {"Content-Type": given} if given is not None else {}
    sent = json.dumps(MAIL).encode()
    if given is None:
        [head, _] = raw_answer(api.port, b"POST /emails HTTP/1.0\r\nAuthorization: Bearer full-key\r\n", sent)
        assert b" 415 " in head
    else:
        assert api.call("POST", "/emails", raw=sent, headers=headers).status == 415
    assert client.dbsize() == 0


def raw_answer(port: int, head: bytes, body: bytes) -> list[bytes]:
    with socket.create_connection(("127.0.0.1", port), timeout=10) as connection:
        connection.sendall(head + b"Content-Length: %d\r\n\r\n" % len(body) + body)
        return connection.makefile("rb").read().split(b"\r\n\r\n", 1)


A_FILE = {"filename": "a.txt", "content": "YQ=="}
WRONG_MAIL: list[tuple[str, dict[str, Any], str]] = [  # what is wrong, the change to MAIL, the field that is named
    ("no recipient", {"to": []}, "to"),
    ("a number as recipient", {"to": 1}, "to"),
    ("an object as recipient", {"to": {"email": "a@b.example"}}, "to"),
    ("null as recipient", {"to": None}, "to"),
    ("an empty address", {"to": ""}, "to[0]"),
    ("a number in the list", {"to": ["a@b.example", 1]}, "to[1]"),
    ("a list in the list", {"cc": [["a@b.example"]]}, "cc[0]"),
    ("two addresses in one", {"to": "a@b.example, c@d.example"}, "to[0]"),
    ("two addresses with a semicolon", {"bcc": ["a@b.example; c@d.example"]}, "bcc[0]"),
    ("a quoted name that hides an address", {"to": '"evil" <a@b.example>, c@d.example'}, "to[0]"),
    ("a parameter of SMTP", {"to": "a@b.example SIZE=1"}, "to[0]"),
    ("no at sign", {"reply_to": "nobody"}, "reply_to[0]"),
    ("51 recipients", {"to": [f"a{n}@b.example" for n in range(51)]}, "to"),
    ("51 recipients in three fields", {n: [f"{n}{i}@b.example" for i in range(17)] for n in ("to", "cc", "bcc")}, "to"),
    ("a number as sender", {"from": 1}, "from"),
    ("two senders", {"from": ["a@b.example", "c@d.example"]}, "from"),
    ("a number as subject", {"subject": 1}, "subject"),
    ("true as subject", {"subject": True}, "subject"),
    ("no subject", {"subject": None}, "subject"),
    ("a subject of 999 characters", {"subject": "x" * 999}, "subject"),
    ("a number as text", {"text": 1}, "text"),
    ("a list as html", {"html": []}, "html"),
    ("neither text nor html", {"text": None}, "text"),
    ("a NUL in the text", {"text": "a\0b"}, "text"),
    ("an escape in the html", {"html": "a\x1bb"}, "html"),
    ("a list as headers", {"headers": []}, "headers"),
    ("a number as header", {"headers": {"X-A": 1}}, "headers.X-A"),
    ("a header twice", {"headers": {"X-A": "1", "x-a": "2"}}, "headers.x-a"),
    ("a header name with a space", {"headers": {"X A": "1"}}, "headers.X A"),
    ("a header name with a colon", {"headers": {"X:A": "1"}}, "headers.X:A"),
    ("a header name in Greek", {"headers": {"Χ": "1"}}, "headers.Χ"),
    *(
        (f"the header {name}", {"headers": {name: "x"}}, f"headers.{name}")
        for name in (
            *("From", "to", "CC", "Bcc", "Sender", "Reply-To", "Date", "Subject", "Message-ID", "MIME-Version"),
            *("Content-Type", "Content-Foo", "Return-Path", "Received", "Resent-To", "DKIM-Signature"),
        )
    ),
    ("a number as attachment", {"attachments": [1]}, "attachments[0]"),
    ("an object as attachments", {"attachments": A_FILE}, "attachments"),
    ("base64 that is none", {"attachments": [{**A_FILE, "content": "%%%"}]}, "attachments[0].content"),
    ("base64 without padding", {"attachments": [{**A_FILE, "content": "YQ"}]}, "attachments[0].content"),
    ("base64 in lines", {"attachments": [{**A_FILE, "content": "YQ==\n"}]}, "attachments[0].content"),
    ("base64 for URLs", {"attachments": [A_FILE, {**A_FILE, "content": "-_-_"}]}, "attachments[1].content"),
    *(
        (f"a file named {name!r}", {"attachments": [{**A_FILE, "filename": name}]}, "attachments[0].filename")
        for name in ("../a", "/etc/passwd", "a\\b", "..", ".", "", " ", "x" * 201)
    ),
    (
        "multipart as media type",
        {"attachments": [{**A_FILE, "content_type": "multipart/mixed"}]},
        "attachments[0].content_type",
    ),
    ("a media type that is none", {"attachments": [{**A_FILE, "content_type": "x"}]}, "attachments[0].content_type"),
    *(
        (f"{moment!r} as the end of its life", {"expires_at": moment}, "expires_at")
        for moment in ("2026-11-21", "2126-11-21T12:00:00", "2126-02-31T12:00:00Z", "soon", 5, "2020-01-01T00:00:00Z")
    ),
    ("a third way to treat doubt", {"on_doubt": "maybe"}, "on_doubt"),
    ("an unknown field", {"scheduled": "now"}, "scheduled"),
    ("an unknown field of a file", {"attachments": [{**A_FILE, "path": "x"}]}, "attachments[0].path"),
    ("an unknown field of a template", {"template": {"id": "welcome", "data": {}}}, "template.data"),
    ("a string as tag", {"tags": ["a"]}, "tags[0]"),
    ("a tag with a space", {"tags": [{"name": "a b", "value": "c"}]}, "tags[0].name"),
    ("a tag without a value", {"tags": [{"name": "a"}]}, "tags[0].value"),
    ("a string as template", {"template": "welcome"}, "template"),
    ("a number as template's id", {"template": {"id": 1}}, "template.id"),
    ("a list as variables", {"template": {"id": "welcome", "variables": []}}, "template.variables"),
    ("a template and a text", {"template": {"id": "welcome", "variables": {"name": "Ada"}}}, "template"),
]


@pytest.mark.parametrize(("change", "field"), [row[1:] for row in WRONG_MAIL], ids=[row[0] for row in WRONG_MAIL])
def test_a_mail_that_cannot_be_sent_as_asked_is_refused_by_field(
    api: Api, client: redis.Redis, change: dict[str, Any], field: str
) -> None:
    refused(api, client, "/emails", {**MAIL, **change}, 422, field)


def test_a_repeat_of_a_request_whose_mail_has_expired_since_is_answered_as_the_first(api: Api) -> None:
    soon = datetime.now(timezone.utc) + timedelta(seconds=2)
    body = {**MAIL, "expires_at": soon.isoformat(timespec="milliseconds")}
    first = api.post("/emails", body, Idempotency_Key="a code")
    eventually(lambda: datetime.now(timezone.utc) > soon)
    again = api.post("/emails", body, Idempotency_Key="a code")
    assert (again.status, again.body, again.headers["Idempotent-Replayed"]) == (202, first.body, "true")
    assert api.post("/emails", {**body, "subject": "another"}, Idempotency_Key="a code").status == 409
    assert api.post("/emails", body, Idempotency_Key="another code").status == 422


# --- batches ----------------------------------------------------------------------------------------------------------

BAD = {**MAIL, "to": ["ada@example.com", "nobody"]}


def ids(answer: Answer) -> list[str]:
    return [one["id"] for one in answer.body["data"]]


def batch(api: Api, body: object, **headers: str) -> Answer:
    return api.post("/emails/batch", body, **headers)


def test_a_batch_is_stored_whole_and_its_ids_stand_in_its_order(api: Api, client: redis.Redis) -> None:
    answer = batch(api, [{**MAIL, "subject": str(number)} for number in range(100)])
    assert answer.status == 202
    assert stored(client) == set(ids(answer))
    assert [api.email(one)["subject"] for one in ids(answer)] == [str(number) for number in range(100)]
    queued: list[bytes] = client.lrange("rq:queue:email", 0, -1)  # type: ignore[assignment]
    assert [one.decode() for one in queued] == ids(answer)


def test_a_batch_costs_one_round_trip(api: Api, client: redis.Redis) -> None:
    batch(api, [MAIL])
    before = client.info("commandstats")["cmdstat_evalsha"]["calls"]
    commands = client.info("stats")["total_commands_processed"]
    batch(api, [MAIL] * 100, Idempotency_Key="k")
    assert client.info("commandstats")["cmdstat_evalsha"]["calls"] == before + 1
    assert client.info("stats")["total_commands_processed"] - commands < 1000  # of the script, and ours


def test_one_bad_mail_keeps_a_batch_out(api: Api, client: redis.Redis) -> None:
    refused(api, client, "/emails/batch", [MAIL, BAD, {**MAIL, "subject": 1}], 422, "[1].to[1]", "[2].subject")


def test_a_permissive_batch_takes_the_good_and_tells_of_the_bad(api: Api, client: redis.Redis) -> None:
    answer = batch(api, [MAIL, BAD, MAIL], x_batch_validation="permissive", Idempotency_Key="k")
    assert answer.status == 202
    assert stored(client) == set(ids(answer))
    assert len(ids(answer)) == 2
    [error] = answer.body["errors"]
    assert error["index"] == 1
    assert error["message"].startswith("[1].to[1]: this is not an e-mail address")
    again = batch(api, [MAIL, BAD, MAIL], x_batch_validation="permissive", Idempotency_Key="k")
    assert (again.body, again.headers["Idempotent-Replayed"]) == (answer.body, "true")
    assert batch(api, [MAIL], x_batch_validation="permissive").body["errors"] == []
    assert batch(api, [BAD], x_batch_validation="permissive").body["data"] == []


def test_a_repeated_batch_is_queued_once_and_another_under_its_key_not_at_all(api: Api, client: redis.Redis) -> None:
    first = batch(api, [MAIL, MAIL], Idempotency_Key="k")
    again = batch(api, [MAIL, MAIL], Idempotency_Key="k")
    assert (again.status, again.body) == (202, first.body)
    assert batch(api, [MAIL], Idempotency_Key="k").status == 409
    assert stored(client) == set(ids(first))


@pytest.mark.parametrize("body", [[], [MAIL] * 101, MAIL, "x", None])
def test_what_is_no_batch_is_refused(api: Api, client: redis.Redis, body: object) -> None:
    refused(api, client, "/emails/batch", body, 422, "body")


def test_a_third_way_to_validate_a_batch_is_refused(api: Api, client: redis.Redis) -> None:
    answer = batch(api, [MAIL], x_batch_validation="loose")
    assert (answer.status, fields(answer)) == (400, ["x-batch-validation"])
    assert client.dbsize() == 0


@pytest.mark.parametrize(
    ("use", "field"),
    [
        ({"id": "nothing"}, "template.id"),
        ({"id": "../templates/welcome"}, "template.id"),
        ({"id": "welcome"}, "template.variables.name"),
        ({"id": "welcome", "variables": {"Name": "Ada"}}, "template.variables.name"),
        ({"id": "welcome", "variables": {"name": "Ada\r\nBcc: eve@example.com"}}, "template.subject"),
        ({"id": "welcome", "variables": {"name": "x" * 1000}}, "template.subject"),
    ],
)
def test_a_template_that_cannot_be_filled_is_refused_by_field(
    api: Api, client: redis.Redis, use: dict[str, Any], field: str
) -> None:
    refused(api, client, "/emails", {"to": "ada@example.com", "template": use}, 422, field)


def test_a_control_character_that_a_template_puts_into_the_body_is_refused(api: Api, client: redis.Redis) -> None:
    use = {"id": "welcome", "variables": {"name": "a\x1bb"}}
    body = {"to": "ada@example.com", "subject": "Mine", "template": use}
    refused(api, client, "/emails", body, 422, "template.subject", "template.text", "template.html")


CONTROLS = (
    "\r\nBcc: eve@example.com",
    "\r",
    "\n",
    "\0",
    "\t",
    "\x1b",
    "\x7f",
    "\x85",
    "\x0b",
    "\x0c",
    "\u2028",
    "\u2029",
)
HEADER_BOUND: dict[str, Callable[[str], dict[str, Any]]] = {
    "from": lambda bad: {"from": f"A{bad}B <a@b.example>"},
    "to[0]": lambda bad: {"to": f"A{bad}B <a@b.example>"},
    "to[1]": lambda bad: {"to": ["a@b.example", f"a{bad}@b.example"]},
    "cc[0]": lambda bad: {"cc": f"a@b.example{bad}"},
    "bcc[0]": lambda bad: {"bcc": [f"{bad}a@b.example"]},
    "reply_to[0]": lambda bad: {"reply_to": f"a@b{bad}.example"},
    "subject": lambda bad: {"subject": f"a{bad}b"},
    "headers.X-A": lambda bad: {"headers": {"X-A": f"a{bad}b"}},
    "attachments[0].filename": lambda bad: {"attachments": [{**A_FILE, "filename": f"a{bad}b"}]},
    "attachments[0].content_type": lambda bad: {"attachments": [{**A_FILE, "content_type": f"text/plain{bad}"}]},
    "attachments[0].content_id": lambda bad: {"attachments": [{**A_FILE, "content_id": f"a{bad}"}], "html": "x"},
    "tags[0].name": lambda bad: {"tags": [{"name": f"a{bad}", "value": "b"}]},
    "tags[0].value": lambda bad: {"tags": [{"name": "a", "value": f"b{bad}"}]},
}


@pytest.mark.parametrize("field", HEADER_BOUND)
def test_no_control_character_gets_into_a_header(api: Api, client: redis.Redis, field: str) -> None:
    for bad in CONTROLS:
        answer = api.post("/emails", {**MAIL, **HEADER_BOUND[field](bad)})
        assert answer.status == 422, (bad, answer)
        assert fields(answer) == [field], (bad, answer)
    assert client.dbsize() == 0


def test_no_control_character_gets_into_the_name_of_a_header(api: Api, client: redis.Redis) -> None:
    for bad in CONTROLS:
        refused(api, client, "/emails", {**MAIL, "headers": {f"X-A{bad}": "x"}}, 422, f"headers.X-A{bad}")


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"name": ""}, "name"),
        ({"name": 1}, "name"),
        ({"name": None}, "name"),
        ({"name": "x" * 201}, "name"),
        ({"name": "Ada\r\nBcc: eve@example.com"}, "name"),
        ({"email": "nobody"}, "email"),
        ({"email": "a@b.example, c@d.example"}, "email"),
        ({"email": ["a@b.example"]}, "email"),
        ({"email": None}, "email"),
        ({"subject": "mine"}, "subject"),
    ],
)
def test_a_welcome_mail_that_cannot_be_written_is_refused_by_field(
    api: Api, client: redis.Redis, change: dict[str, Any], field: str
) -> None:
    refused(api, client, "/start-job", {**WELCOME, **change}, 422, field)


@pytest.mark.parametrize(
    "name",
    [
        *(
            "Ada <eve@example.com>",
            "eve@example.com, ",
            "Lovelace, Ada",
            '"',
            "\\",
            '\\"' * 100,
            "<",
            ">" * 200,
            "a: b;",
        ),
        *("=?utf-8?q?x?=", "   ", "é" * 200, "\N{INCOMING ENVELOPE}" * 200, "\N{RIGHT-TO-LEFT OVERRIDE}x"),
    ],
)
def test_a_welcome_mail_greets_any_name_and_goes_to_nobody_else(api: Api, client: redis.Redis, name: str) -> None:
    answer = api.post("/start-job", {"name": name, "email": "ada@example.com"})
    assert answer.status == 202, answer
    seen = api.email(answer.body["job_id"])
    assert [one["address"] for one in seen["recipients"]] == ["ada@example.com"]
    assert seen["subject"] == f"Welcome, {name}"


@pytest.mark.parametrize("missing", ["name", "email"])
def test_a_welcome_mail_needs_both_its_fields(api: Api, client: redis.Redis, missing: str) -> None:
    body = {name: value for name, value in WELCOME.items() if name != missing}
    refused(api, client, "/start-job", body, 422, missing)


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({}, "task"),
        ({"task": 1}, "task"),
        ({"task": "nothing"}, "task"),
        ({"task": "deliver"}, "task"),
        ({"task": "tasks.why_failed"}, "task"),
        ({"task": "os.system", "args": {"command": "true"}}, "task"),
        ({"task": "why_failed", "args": []}, "args"),
        ({"task": "why_failed", "args": None}, "args"),
        ({"task": "why_failed", "kwargs": {}}, "kwargs"),
        ({"task": "why_failed", "args": {"hours": "1"}}, "args.hours"),
        ({"task": "why_failed", "args": {"hours": True}}, "args.hours"),
        ({"task": "why_failed", "args": {"hours": 1.5}}, "args.hours"),
        ({"task": "why_failed", "args": {"hours": None}}, "args.hours"),
        ({"task": "why_failed", "args": {"hours": 0}}, "args.hours"),
        ({"task": "why_failed", "args": {"hours": 10**4000}}, "args.hours"),
        ({"task": "why_failed", "args": {"hour": 1}}, "args.hour"),
    ],
)
def test_a_job_that_no_task_can_run_is_refused_by_field(
    api: Api, client: redis.Redis, body: dict[str, Any], field: str
) -> None:
    refused(api, client, "/jobs", body, 422, field)


def test_an_argument_that_a_task_needs_is_missed_by_name(
    redis_server: RedisServer, client: redis.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tasks, "OFFERED", {})

    @tasks.task()
    def report(month: int, title: str = "") -> None:
        """Never run."""

    with served(app_with(redis_server.url)) as api:
        refused(api, client, "/jobs", {"task": "report"}, 422, "args.month")
        assert api.post("/jobs", {"task": "report", "args": {"month": 5}}).status == 202


# --- Idempotency-Key --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", SUBMITTED)
def test_a_request_with_the_same_key_is_answered_again_and_done_once(api: Api, client: redis.Redis, path: str) -> None:
    first = api.post(path, SUBMITTED[path], Idempotency_Key="order 66")
    reordered = dict(reversed(SUBMITTED[path].items()))
    again = [api.post(path, body, Idempotency_Key="order 66") for body in (SUBMITTED[path], reordered)]
    assert {answer.status for answer in (first, *again)} == {202}
    assert all(answer.body == first.body for answer in again)
    assert [answer.headers.get("Idempotent-Replayed") for answer in (first, *again)] == [None, "true", "true"]
    assert len(keys(client, "rq:job:*")) == 1


@pytest.mark.parametrize("path", SUBMITTED)
def test_the_same_key_for_another_request_is_a_conflict(api: Api, client: redis.Redis, path: str) -> None:
    other: dict[str, dict[str, Any]] = {
        "/emails": {"subject": "Other"},
        "/start-job": {"name": "Eve"},
        "/jobs": {"args": {"hours": 2}},
    }
    assert api.post(path, SUBMITTED[path], Idempotency_Key="one").status == 202
    answer = api.post(path, {**SUBMITTED[path], **other[path]}, Idempotency_Key="one")
    assert (answer.status, answer.body["name"]) == (409, "invalid_idempotent_request")
    assert len(keys(client, "rq:job:*")) == 1


@pytest.mark.parametrize("given", ["", "x" * 257, "a\tb", "é", "a\x7fb"])
def test_a_key_of_the_wrong_length_or_characters_is_refused(api: Api, client: redis.Redis, given: str) -> None:
    answer = api.post("/emails", MAIL, Idempotency_Key=given)
    assert (answer.status, answer.body["name"]) == (
        400,
        "invalid_idempotency_key" if given != "a\x7fb" else "validation_error",
    )
    assert client.dbsize() == 0


@pytest.mark.parametrize("given", ["x", "x" * 256, '!"#$%&/()=?', "0"])
def test_a_key_may_have_1_to_256_printable_characters(api: Api, given: str) -> None:
    first, again = (api.post("/emails", MAIL, Idempotency_Key=given) for _ in range(2))
    assert first.body == again.body


def test_an_idempotency_key_belongs_to_one_api_key_and_one_endpoint(api: Api, client: redis.Redis) -> None:
    sender = Api(api.port, "send-key")
    ids = {
        next(iter(one.post(path, SUBMITTED[path], Idempotency_Key="one").body.values()))
        for one, path in ((api, "/emails"), (sender, "/emails"), (api, "/start-job"), (api, "/jobs"))
    }
    assert len(ids) == len(keys(client, "rq:job:*")) == 4


def test_twenty_requests_at_once_with_one_key_make_one_mail(api: Api, client: redis.Redis) -> None:
    together = threading.Barrier(20)

    def submit(_: int) -> Answer:
        together.wait(10)
        return api.post("/emails", MAIL, Idempotency_Key="one")

    with ThreadPoolExecutor(20) as pool:
        answers = list(pool.map(submit, range(20)))
    assert {answer.status for answer in answers} == {202}
    assert {answer.body["id"] for answer in answers} == stored(client)
    assert len(stored(client)) == 1
    assert sum("Idempotent-Replayed" in answer.headers for answer in answers) == 19


def test_twenty_requests_at_once_without_a_key_make_twenty_mails(api: Api, client: redis.Redis) -> None:
    with ThreadPoolExecutor(20) as pool:
        ids = {answer.body["id"] for answer in pool.map(lambda _: api.post("/emails", MAIL), range(20))}
    assert stored(client) == ids
    assert len(ids) == 20


def test_a_key_is_remembered_for_IDEMPOTENCY_TTL(redis_server: RedisServer, client: redis.Redis) -> None:
    with served(app_with(redis_server.url, idempotency_ttl="2h")) as api:
        api.post("/emails", MAIL, Idempotency_Key="one")
        api.post("/jobs", JOB, Idempotency_Key="two")
    assert len(keys(client, "idempotency:*")) == 2
    for key in keys(client, "idempotency:*"):
        assert 7100 < client.ttl(key) <= 7200


def test_a_refused_request_does_not_use_its_key_up(api: Api, client: redis.Redis) -> None:
    for path, body in SUBMITTED.items():
        assert api.post(path, {**body, "nonsense": 1}, Idempotency_Key="one").status == 422
        assert client.dbsize() == 0
        answer = api.post(path, body, Idempotency_Key="one")
        assert (answer.status, answer.headers.get("Idempotent-Replayed")) == (202, None)
        client.flushall()


# --- jobs: read, queue again, cancel ----------------------------------------------------------------------------------


def work(client: redis.Redis, queue: str) -> None:
    """Runs what is queued, in this process."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        SimpleWorker([queue], connection=client, serializer=JSONSerializer).work(burst=True, logging_level=None)
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


@pytest.fixture
def outbox(client: redis.Redis, monkeypatch: pytest.MonkeyPatch) -> Outbox:
    """What the tasks of `work` use."""
    made = Outbox(Jobs(client), load(_env_file=None))
    monkeypatch.setattr(tasks, "outbox", lambda: made)
    return made


def failing(monkeypatch: pytest.MonkeyPatch, client: redis.Redis, job_id: str) -> None:
    """The next run of the job fails, and is its last."""

    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("the reason")

    monkeypatch.setattr(tasks, "deliver", fail)
    monkeypatch.setattr(tasks, "why_failed", fail)
    client.hset(f"rq:job:{job_id}", "retries_left", 0)


def submitted(api: Api, path: str) -> str:
    answer = api.post(path, SUBMITTED[path])
    assert answer.status == 202
    return str(answer.body.get("id") or answer.body["job_id"])


QUEUES = {"/emails": "email", "/jobs": "jobs"}
both_kinds = pytest.mark.parametrize("path", QUEUES)


def test_a_queued_job_can_be_read(api: Api) -> None:
    job_id = submitted(api, "/jobs")
    seen = api.get(f"/jobs/{job_id}").body
    created, enqueued = seen.pop("created_at"), seen.pop("enqueued_at")
    assert seen == {"job_id": job_id, "task": "why_failed", "status": "queued", "started_at": None, "ended_at": None}
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}\+00:00", created)
    assert created <= enqueued


def test_a_finished_job_can_be_read_with_its_result(api: Api, client: redis.Redis, outbox: Outbox) -> None:
    job_id = submitted(api, "/jobs")
    work(client, "jobs")
    seen = api.get(f"/jobs/{job_id}").body
    assert (seen["status"], seen["result"]) == ("finished", {})
    assert seen["enqueued_at"] <= seen["started_at"] <= seen["ended_at"]
    assert "error" not in seen


@both_kinds
def test_a_failed_job_can_be_read_with_its_error(
    api: Api, client: redis.Redis, outbox: Outbox, monkeypatch: pytest.MonkeyPatch, path: str
) -> None:
    job_id = submitted(api, path)
    failing(monkeypatch, client, job_id)
    work(client, QUEUES[path])
    seen = api.get(f"/jobs/{job_id}").body
    assert (seen["status"], seen["error"]) == ("failed", "RuntimeError: the reason")
    assert "result" not in seen


ODD_IDS = [
    "..",
    "%2e%2e",
    "%00",
    "%20",
    "a%20b",
    "%C3%A9",
    "%F0%9F%93%A7",
    "%ff",
    "a%0a",
    "*",
    "last_sent",
    "x" * 10_000,
]
ODD_IDS += [
    f"{UNKNOWN_ID}:claim",
    f"{UNKNOWN_ID}%0a",
    UNKNOWN_ID.upper(),
    f" {UNKNOWN_ID}".replace(" ", "%20"),
    "%7B%7D",
]


@pytest.mark.parametrize("odd", ODD_IDS, ids=lambda odd: odd[:40])
def test_an_id_that_nothing_has_is_not_found_however_odd(api: Api, client: redis.Redis, odd: str) -> None:
    client.mset({"mail:last_sent": 1, f"mail:{UNKNOWN_ID}:claim": "token"})  # what the outbox keeps beside its mails
    for method, path in ANY_ID:
        answer = api.call(method, path.replace(UNKNOWN_ID, odd))
        assert (answer.status, answer.body["name"]) == (404, "not_found"), (method, path, answer)
    assert client.dbsize() == 2


@both_kinds
def test_a_failed_job_is_queued_again_with_all_its_attempts(
    api: Api, client: redis.Redis, outbox: Outbox, monkeypatch: pytest.MonkeyPatch, path: str
) -> None:
    job_id = submitted(api, path)
    retries = Job.fetch(job_id, client, serializer=JSONSerializer).retries_left
    failing(monkeypatch, client, job_id)
    work(client, QUEUES[path])
    assert client.zrange(f"rq:failed:{QUEUES[path]}", 0, -1) == [job_id.encode()]
    answer = api.post(f"/jobs/{job_id}/requeue", None)
    assert (answer.status, answer.body) == (202, {"job_id": job_id, "status": "queued"})
    assert client.zcard(f"rq:failed:{QUEUES[path]}") == 0
    assert client.lrange(f"rq:queue:{QUEUES[path]}", 0, -1) == [job_id.encode()]
    job = Job.fetch(job_id, client, serializer=JSONSerializer)
    assert (job.get_status(), job.retries_left, job.ended_at) == (JobStatus.QUEUED, retries, None)
    assert retries


@both_kinds
def test_only_a_failed_job_can_be_queued_again(api: Api, client: redis.Redis, path: str) -> None:
    job_id = submitted(api, path)
    job = Job.fetch(job_id, client, serializer=JSONSerializer)
    for status in (JobStatus.QUEUED, JobStatus.SCHEDULED, JobStatus.STARTED, JobStatus.FINISHED):
        job.set_status(status)
        answer = api.post(f"/jobs/{job_id}/requeue", None)
        assert (answer.status, answer.body["name"]) == (409, "not_possible")
        assert answer.body["message"] == f"only a failed job can be queued again; this one is {status.value}"
    assert client.llen(f"rq:queue:{QUEUES[path]}") == 1


def test_a_job_queued_again_by_ten_at_once_is_queued_once(
    api: Api, client: redis.Redis, outbox: Outbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    job_id = submitted(api, "/jobs")
    failing(monkeypatch, client, job_id)
    work(client, "jobs")
    with ThreadPoolExecutor(10) as pool:
        statuses = list(pool.map(lambda _: api.post(f"/jobs/{job_id}/requeue", None).status, range(10)))
    assert sorted(statuses) == [202] + [409] * 9
    assert client.lrange("rq:queue:jobs", 0, -1) == [job_id.encode()]


def put_off(client: redis.Redis, job: Job) -> None:
    client.lrem(f"rq:queue:{job.origin}", 0, job.id)
    client.zadd(f"rq:scheduled:{job.origin}", {job.id: time.time() + 3600})
    job.set_status(JobStatus.SCHEDULED)


def fail(client: redis.Redis, job: Job) -> None:
    client.lrem(f"rq:queue:{job.origin}", 0, job.id)
    client.zadd(f"rq:failed:{job.origin}", {job.id: time.time() + 3600})
    job.set_status(JobStatus.FAILED)


@both_kinds
@pytest.mark.parametrize("bring", [lambda *_: None, put_off, fail], ids=["queued", "scheduled", "failed"])
def test_a_job_that_is_not_running_can_be_canceled_without_a_trace(
    api: Api, client: redis.Redis, path: str, bring: Callable[[redis.Redis, Job], None]
) -> None:
    job_id = submitted(api, path)
    bring(client, Job.fetch(job_id, client, serializer=JSONSerializer))
    answer = api.call("DELETE", f"/jobs/{job_id}")
    assert (answer.status, answer.body) == (200, {"job_id": job_id, "status": "canceled"})
    assert api.get(f"/jobs/{job_id}").status == 404
    assert keys(client, "*") == {"rq:queues"} | ({f"mail:{job_id}", "mail:totals"} if path == "/emails" else set())
    assert api.call("DELETE", f"/jobs/{job_id}").status == (200 if path == "/emails" else 404)  # a mail is still known


@both_kinds
@pytest.mark.parametrize("status", [JobStatus.STARTED, JobStatus.FINISHED])
def test_a_job_that_runs_or_has_run_cannot_be_canceled(
    api: Api, client: redis.Redis, path: str, status: JobStatus
) -> None:
    job_id = submitted(api, path)
    Job.fetch(job_id, client, serializer=JSONSerializer).set_status(status)
    answer = api.call("DELETE", f"/jobs/{job_id}")
    assert (answer.status, answer.body["name"]) == (409, "not_possible")
    assert answer.body["message"] == f"a job that is {status.value} cannot be canceled any more"
    assert api.get(f"/jobs/{job_id}").body["status"] == status.value


def test_a_canceled_mail_is_still_told_of_and_its_content_is_gone(
    api: Api, client: redis.Redis, outbox: Outbox
) -> None:
    body = {**MAIL, "text": "a planted word", "headers": {"X-Word": "another planted word"}}
    mail_id = api.post("/emails", body).body["id"]
    assert client.hexists(f"mail:{mail_id}", "content")
    assert api.call("DELETE", f"/jobs/{mail_id}").status == 200
    seen = api.email(mail_id)
    assert (seen["status"], seen["last_event"], seen["to"]) == ("canceled", "canceled", ["ada@example.com"])
    assert not client.hexists(f"mail:{mail_id}", "content")
    assert 14 * 86400 < client.ttl(f"mail:{mail_id}") <= 15 * 86400
    assert outbox.claim(mail_id, queued_at=0) == "canceled"


def test_a_job_of_another_program_in_the_same_redis_is_not_found(api: Api, client: redis.Redis) -> None:
    job = Job.create("print", id=UNKNOWN_ID, origin="theirs", connection=client, serializer=JSONSerializer)
    job.save()
    assert {api.call(*one).status for one in ANY_ID} == {404}
    assert Job.exists(UNKNOWN_ID, client)


# --- Redis in trouble -------------------------------------------------------------------------------------------------


@contextmanager
def killed(server: RedisServer) -> Iterator[None]:
    server.kill()
    try:
        yield
    finally:
        server.start()


@contextmanager
def stopped(server: RedisServer) -> Iterator[None]:
    """It holds its port and answers nothing, as behind a network that drops packets."""
    os.kill(server.process.pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(server.process.pid, signal.SIGCONT)


@contextmanager
def full(server: RedisServer) -> Iterator[None]:
    """It holds as much as it may, and drops nothing to take more."""
    with server.client() as client:
        used: int = client.info("memory")["used_memory"]
        client.config_set("maxmemory", used + 200_000)
        try:
            with suppress(redis.exceptions.OutOfMemoryError):
                for number in range(1000):
                    client.set(f"filling:{number}", "x" * 5_000)
            yield
        finally:
            client.config_set("maxmemory", 0)
            client.delete(*client.keys("filling:*"))


@contextmanager
def replica_of_the_dead(server: RedisServer) -> Iterator[None]:
    with server.client() as client:
        client.replicaof("127.0.0.1", str(free_port()))
        try:
            yield
        finally:
            client.replicaof("NO", "ONE")


@contextmanager
def lonely_replica(server: RedisServer) -> Iterator[None]:
    """The same, and it does not even answer questions."""
    with server.client() as client:
        client.config_set("replica-serve-stale-data", "no")
        try:
            with replica_of_the_dead(server):
                yield
        finally:
            client.config_set("replica-serve-stale-data", "yes")


@contextmanager
def without_replicas(server: RedisServer) -> Iterator[None]:
    with server.client() as client:
        client.config_set("min-replicas-to-write", 1)
        try:
            yield
        finally:
            client.config_set("min-replicas-to-write", 0)


@contextmanager
def disk_refuses(server: RedisServer) -> Iterator[None]:
    """A snapshot fails, since a folder is in its place; Redis then takes no writes (MISCONF)."""
    in_the_way = server.directory / "dump.rdb"
    in_the_way.mkdir()
    with server.client() as client:
        client.config_set("save", "3600 1")
        client.bgsave()
        eventually(lambda: client.info("persistence")["rdb_last_bgsave_status"] == "err")
        try:
            yield
        finally:
            client.config_set("save", "")
            in_the_way.rmdir()


@contextmanager
def access_forbidden(server: RedisServer) -> Iterator[None]:
    with server.client() as client:
        client.acl_setuser("default", enabled=True, nopass=True, keys=["*"], commands=["+@all", "-hset"])
        try:
            yield
        finally:
            client.acl_setuser("default", enabled=True, nopass=True, keys=["*"], commands=["+@all"])


Trouble = Callable[[RedisServer], AbstractContextManager[None]]
TROUBLES: list[tuple[Trouble, str]] = [
    (killed, "does not answer"),
    (stopped, "does not answer"),
    (full, "out of memory"),
    (replica_of_the_dead, "read-only replica"),
    (lonely_replica, "replica without its master"),
    (without_replicas, "misses replicas"),
    (disk_refuses, "cannot write to its disk"),
    (access_forbidden, "ACL"),
]
every_trouble = pytest.mark.parametrize(("trouble", "said"), TROUBLES, ids=[one.__name__ for one, _ in TROUBLES])


def timed(ask: Callable[[], Answer]) -> tuple[Answer, float]:
    started = time.monotonic()
    return ask(), time.monotonic() - started


@every_trouble
def test_redis_in_trouble_is_said_within_three_seconds_and_leaves_nothing_half_stored(
    api: Api, redis_server: RedisServer, client: redis.Redis, trouble: Trouble, said: str
) -> None:
    before = submitted(api, "/emails")  # so that the connection is there when the trouble begins
    with trouble(redis_server):
        answer, seconds = timed(lambda: api.post("/emails", MAIL, Idempotency_Key="one"))
    assert (answer.status, answer.body["name"]) == (503, "service_unavailable")
    assert said in answer.body["message"]
    assert answer.headers["Retry-After"] == "5"
    assert seconds < 3
    stored_meanwhile = stored(client) - {before}
    again = api.post("/emails", MAIL, Idempotency_Key="one")
    assert again.status == 202
    assert stored(client) == {before, again.body["id"]}
    assert stored_meanwhile <= {again.body["id"]}


@pytest.mark.parametrize("trouble", [killed, stopped])
def test_no_route_waits_longer_than_three_seconds_for_redis(
    api: Api, redis_server: RedisServer, trouble: Trouble
) -> None:
    asked = [
        ("GET", "/readyz", None),
        *((*one, None) for one in ANY_ID),
        *(("POST", *one) for one in SUBMITTED.items()),
    ]
    with trouble(redis_server), ThreadPoolExecutor(len(asked)) as pool:
        heard = list(pool.map(lambda one: timed(lambda: api.call(*one)), asked))
    assert [answer.status for answer, _ in heard] == [503] * len(asked)
    assert max(seconds for _, seconds in heard) < 3
    assert api.get("/readyz").status == 200


def test_forty_callers_at_once_do_not_wait_for_each_others_time_outs(
    api: Api, redis_server: RedisServer, client: redis.Redis
) -> None:
    submitted(api, "/emails")
    with stopped(redis_server), ThreadPoolExecutor(40) as pool:
        heard = list(pool.map(lambda _: timed(lambda: api.post("/emails", MAIL)), range(40)))
    assert {answer.status for answer, _ in heard} == {503}
    assert max(seconds for _, seconds in heard) < 3
    assert api.post("/emails", MAIL).status == 202
    assert stored(client)


def test_redis_that_restarts_under_load_loses_nothing_that_was_accepted(
    api: Api, redis_server: RedisServer, client: redis.Redis
) -> None:
    enough = threading.Event()

    def submit(_: int) -> list[tuple[Answer, float]]:
        heard = []
        while not enough.is_set():
            heard.append(timed(lambda: api.post("/emails", MAIL)))
        return heard

    with ThreadPoolExecutor(4) as pool:
        runs = [pool.submit(submit, number) for number in range(4)]
        for _ in range(2):
            time.sleep(0.3)
            with killed(redis_server):
                time.sleep(0.2)
        eventually(lambda: api.post("/emails", MAIL).status == 202)
        enough.set()
        heard = [one for run in runs for one in run.result()]
    accepted = {answer.body["id"] for answer, _ in heard if answer.status == 202}
    assert {answer.status for answer, _ in heard} == {202, 503}
    assert accepted <= stored(client)
    assert max(seconds for _, seconds in heard) < 3


class Proxy:
    """A way to Redis that is cut once, after a command has arrived there and before the reply comes back."""

    def __init__(self, port: int) -> None:
        self.target = port
        self.cut_at = b""
        self.cuts = 0
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.port = self.listener.getsockname()[1]
        self.threads = [threading.Thread(target=self._accept)]
        self.threads[0].start()

    def _accept(self) -> None:
        while True:
            client, _ = self.listener.accept()
            if not self.port:
                client.close()
                return
            self.threads.append(threading.Thread(target=self._carry, args=(client,)))
            self.threads[-1].start()

    def _carry(self, client: socket.socket) -> None:
        """RESP is question and answer, so one thread can carry both."""
        with client, socket.create_connection(("127.0.0.1", self.target)) as server:
            while sent := client.recv(1 << 20):
                server.sendall(sent)
                reply = server.recv(1 << 20)
                if self.cut_at and self.cut_at in sent:
                    self.cut_at, self.cuts = b"", self.cuts + 1
                    return
                client.sendall(reply)

    def __enter__(self) -> Proxy:
        return self

    def __exit__(self, *_: object) -> None:
        port, self.port = self.port, 0
        socket.create_connection(("127.0.0.1", port)).close()
        self.listener.close()
        for thread in self.threads:
            thread.join(10)


@pytest.fixture
def cut_off(redis_server: RedisServer) -> Iterator[tuple[Api, Proxy]]:
    with Proxy(redis_server.port) as proxy:
        url = f"redis://127.0.0.1:{proxy.port}/0"
        made = load(_env_file=None, api_keys=f"full:{sha256(b'full-key').hexdigest()}", mail_from="sender@example.com")
        jobs = Jobs(connect(url))
        with served(service.make_app(made, jobs)) as api:
            yield api, proxy
        jobs.redis.close()


@pytest.mark.parametrize("path", SUBMITTED)
def test_a_reply_that_was_lost_after_the_mail_was_stored_doubles_nothing(
    cut_off: tuple[Api, Proxy], client: redis.Redis, path: str
) -> None:
    api, proxy = cut_off
    submitted(api, path)  # so that Redis knows the script
    client.flushdb()
    proxy.cut_at = b"EVALSHA"
    job_id = submitted(api, path)
    assert proxy.cuts == 1
    assert keys(client, "rq:job:*") == {f"rq:job:{job_id}"}
    assert client.lrange(f"rq:queue:{QUEUES.get(path, 'email')}", 0, -1) == [job_id.encode()]


def test_a_lost_reply_to_a_request_with_an_idempotency_key_is_no_replay(
    cut_off: tuple[Api, Proxy], client: redis.Redis
) -> None:
    api, proxy = cut_off
    submitted(api, "/emails")
    client.flushdb()
    proxy.cut_at = b"EVALSHA"
    first, again = (api.post("/emails", MAIL, Idempotency_Key="one") for _ in range(2))
    assert ("Idempotent-Replayed" in first.headers, "Idempotent-Replayed" in again.headers) == (False, True)
    assert stored(client) == {first.body["id"]} == {again.body["id"]}


def test_a_lost_reply_to_a_cancellation_is_trouble_and_no_conflict(
    cut_off: tuple[Api, Proxy], client: redis.Redis
) -> None:
    api, proxy = cut_off
    mail_id = submitted(api, "/emails")
    proxy.cut_at = b"EXEC"
    assert api.call("DELETE", f"/jobs/{mail_id}").status == 503
    assert proxy.cuts == 1
    assert api.email(mail_id)["status"] == "canceled"


# --- /healthz and /readyz ---------------------------------------------------------------------------------------------


def test_healthz_asks_redis_nothing(api: Api, redis_server: RedisServer) -> None:
    with stopped(redis_server):
        answer, seconds = timed(lambda: api.call("GET", "/healthz", headers={"Authorization": ""}))
    assert (answer.status, answer.body) == (200, {"status": "ok", "version": service.VERSION})
    assert seconds < 1


def test_the_version_is_the_top_heading_of_the_changelog() -> None:
    changelog = (ROOT / "CHANGELOG.md").read_text()
    assert re.findall(r"^## (\S+)", changelog, re.MULTILINE)[0] == service.VERSION


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
    client.sadd("rq:workers:email", "a", "b")
    seen = api.get("/readyz").body
    assert (seen["queued"], seen["workers"]) == (1, 2)
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


def not_ready(api: Api) -> str:
    answer = api.get("/readyz")
    assert answer.status == 503
    assert answer.body["status"] == "not ready"
    assert answer.body["message"] == "; ".join(answer.body["reasons"])
    return str(answer.body["message"])


def test_redis_without_an_append_only_file_is_not_ready(api: Api, client: redis.Redis) -> None:
    client.config_set("appendonly", "no")
    try:
        assert "append-only file" in not_ready(api)
    finally:
        client.config_set("appendonly", "yes")
        eventually(lambda: not client.info("persistence")["aof_rewrite_in_progress"])
    assert api.get("/readyz").status == 200


def test_redis_that_evicts_is_not_ready(api: Api, client: redis.Redis) -> None:
    client.config_set("maxmemory-policy", "allkeys-lru")
    try:
        assert api.get("/readyz").status == 200  # without a limit it never evicts
        client.config_set("maxmemory", "1gb")
        assert "noeviction" in not_ready(api)
        client.config_set("maxmemory-policy", "noeviction")
        assert api.get("/readyz").status == 200
    finally:
        client.config_set("maxmemory-policy", "noeviction")
        client.config_set("maxmemory", 0)


def test_a_replica_is_not_ready(api: Api, redis_server: RedisServer) -> None:
    with replica_of_the_dead(redis_server):
        assert "replica" in not_ready(api)
    assert api.get("/readyz").status == 200


def test_redis_that_cannot_write_its_append_only_file_is_not_ready(
    redis_server: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = {"info": {"aof_enabled": 1, "aof_last_write_status": "err", "role": "master"}, "queued": 0}
    monkeypatch.setattr(Jobs, "state", lambda _: dict(seen))
    with served(app_with(redis_server.url)) as api:
        assert "cannot write its append-only file" in not_ready(api)


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


# --- the log ----------------------------------------------------------------------------------------------------------


def logged(house: House, request_id: str) -> str:
    [line] = eventually(lambda: [line for line in house.log("api").splitlines() if f"request_id={request_id}" in line])
    return line


def test_a_request_is_one_line_that_names_the_route_and_the_id(house: House, api: Api) -> None:
    answer = api.post("/emails", MAIL)
    line = logged(house, answer.headers["X-Request-Id"])
    pattern = r".* INFO request method=POST route=/emails status=202 ms=\d+\.\d key=full id={} request_id=\w+"
    assert re.fullmatch(pattern.format(answer.body["id"]), line)


def test_the_log_holds_nothing_that_a_caller_wrote(house: House, api: Api) -> None:
    planted = {"to": "planted@example.com", "subject": "planted", "text": "planted", "reply_to": "planted"}
    answers = [
        api.post("/emails?planted=1", planted, Idempotency_Key="planted"),
        api.post("/jobs", {"task": "planted", "args": {"planted": 1}}),
        api.get("/emails/planted@example.com?planted"),
        api.call("DELETE", "/jobs/planted"),
        api.get("/planted"),
        api.call("PLANTED", "/emails"),
        api.call("GET", "/jobs/planted", headers={"Authorization": "Bearer planted", "User-Agent": "planted"}),
    ]
    assert [answer.status for answer in answers] == [422, 422, 404, 404, 404, 405, 403]
    assert all(logged(house, answer.headers["X-Request-Id"]) for answer in answers)
    assert "planted" not in house.log("api").lower()


def test_what_went_well_and_only_read_is_not_logged(house: House, api: Api) -> None:
    quiet = api.get("/readyz").headers["X-Request-Id"]
    logged(house, api.get("/nothing").headers["X-Request-Id"])
    assert quiet not in house.log("api")


def test_a_callers_request_id_is_in_the_log_and_the_answer(house: House, api: Api) -> None:
    answer = api.post("/emails", MAIL, X_Request_Id="order-66.a_b")
    assert answer.headers["X-Request-Id"] == "order-66.a_b"
    assert logged(house, "order-66.a_b")


# --- the process ------------------------------------------------------------------------------------------------------


@pytest.fixture
def process(redis_server: RedisServer, tmp_path: Path) -> Iterator[tuple[subprocess.Popen[bytes], Api]]:
    with House(tmp_path, redis_server.url) as house:
        api = house.api()
        yield house.processes[0], api


def test_a_request_in_flight_at_SIGTERM_is_answered(
    process: tuple[subprocess.Popen[bytes], Api], redis_server: RedisServer, client: redis.Redis
) -> None:
    running, api = process
    with ThreadPoolExecutor() as pool:
        with stopped(redis_server):
            asked = pool.submit(api.post, "/emails", MAIL)
            time.sleep(0.3)
            assert not asked.done()
            running.terminate()
            time.sleep(0.2)
        answer = asked.result()
    assert answer.status == 202
    assert stored(client) == {answer.body["id"]}
    assert running.wait(10) == 0


def test_a_request_that_waits_for_redis_in_vain_at_SIGTERM_is_answered(
    process: tuple[subprocess.Popen[bytes], Api], redis_server: RedisServer
) -> None:
    running, api = process
    with ThreadPoolExecutor() as pool, stopped(redis_server):
        asked = pool.submit(api.post, "/emails", MAIL)
        time.sleep(0.3)
        running.terminate()
        assert asked.result().status == 503
        assert running.wait(10) == 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_an_idle_process_ends_at_once(process: tuple[subprocess.Popen[bytes], Api], number: signal.Signals) -> None:
    running, _ = process
    running.send_signal(number)
    assert running.wait(3) == 0


def started(tmp_path: Path, **changes: str | None) -> tuple[int, list[str]]:
    """The exit code and the lines of a service that does not get as far as to serve."""
    usual = House(tmp_path, "redis://127.0.0.1:9").environment | {"LISTEN": f"127.0.0.1:{free_port()}"}
    environment = {name: value for name, value in (usual | changes).items() if value is not None}
    command = [sys.executable, str(ROOT / "service.py")]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60)
    assert done.stdout == ""
    return done.returncode, done.stderr.splitlines()


def test_a_port_that_is_taken_is_said_in_one_sentence(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        listen = f"127.0.0.1:{other.getsockname()[1]}"
        code, lines = started(tmp_path, LISTEN=listen, PYTHONWARNINGS=None)
    assert (code, lines) == (2, [f"LISTEN: cannot listen on {listen}: Address already in use"])


def test_a_host_that_does_not_exist_is_said_in_one_sentence(tmp_path: Path) -> None:
    code, lines = started(tmp_path, LISTEN="999.999.999.999:8000")
    assert (code, lines) == (2, ["LISTEN: cannot listen on 999.999.999.999:8000: there is no such host"])


def test_settings_that_are_missing_are_named_all_at_once(tmp_path: Path) -> None:
    code, lines = started(tmp_path, API_KEYS=None, MAIL_FROM=None)
    assert code == 2
    assert [line.split()[0] for line in lines] == ["API_KEYS", "MAIL_FROM"]
    assert all(" is not set: " in line for line in lines)


@pytest.mark.parametrize("sender", ["nobody", "a@b.example, c@d.example", "A\tB <a@b.example>"])
def test_a_sender_that_no_mail_could_have_is_refused_at_the_start(tmp_path: Path, sender: str) -> None:
    code, [line] = started(tmp_path, MAIL_FROM=sender)
    assert code == 2
    assert line.startswith("MAIL_FROM: ")


def test_it_starts_while_redis_is_away(tmp_path: Path) -> None:
    with House(tmp_path, f"redis://127.0.0.1:{free_port()}") as house:
        assert house.api().post("/emails", MAIL).status == 503


# --- docs/api.md ------------------------------------------------------------------------------------------------------

DOCS = ROOT / "docs" / "api.md"


def test_every_route_has_its_heading_in_the_reference_and_no_heading_is_out_of_date() -> None:
    headings = re.findall(r"^#+ ((?:GET|POST|PUT|PATCH|DELETE) \S+)$", DOCS.read_text(), re.MULTILINE)
    routes = [f"{method} {re.sub('<[a-z_]+>', '{id}', path)}" for method, path, _, _ in service.ROUTES]
    assert sorted(headings) == sorted(routes)


EXAMPLE = re.compile(r"^```sh\n(curl .*?)\n```\n`(\d{3})`\n```json\n(.*?)\n```$", re.DOTALL | re.MULTILINE)
UUID = re.compile("[0-9a-f]{8}-[0-9a-f-]{27}")


def asked_by(curl: str) -> tuple[str, str, bytes | None, dict[str, str]]:
    """(method, path, body, headers) of a command line."""
    parser = argparse.ArgumentParser(exit_on_error=False)
    parser.add_argument("-X", default="GET")
    parser.add_argument("-d")
    parser.add_argument("-H", action="append", default=[])
    parser.add_argument("url")
    given = parser.parse_args(shlex.split(curl.replace("\\\n", ""))[1:])
    headers = dict(header.split(": ", 1) for header in given.H)
    return given.X, urlsplit(given.url).path, given.d.encode() if given.d else None, headers


def test_every_route_has_an_example_in_the_reference_that_is_answered_so(
    api: Api, client: redis.Redis, outbox: Outbox
) -> None:
    failed = submitted(api, "/emails")
    fail(client, Job.fetch(failed, client, serializer=JSONSerializer))
    ids: dict[str, str] = {}  # the reference's -> ours
    shown = set()
    for curl, status, documented in EXAMPLE.findall(DOCS.read_text()):
        method, path, raw, headers = asked_by(curl)
        shown.add((method, UUID.sub("{id}", path)))
        path = UUID.sub(lambda found: ids.get(found[0], failed), path)
        answer = api.call(method, path, raw=raw, headers=headers | {"Authorization": "Bearer full-key"})
        told = json.loads(documented)
        assert (answer.status, list(answer.body)) == (int(status), list(told)), curl
        ids.update({told[name]: answer.body[name] for name in ("id", "job_id") if name in told})
        if path == "/jobs":
            work(client, "jobs")
    routes = {(method, re.sub("<[a-z_]+>", "{id}", path)) for method, path, _, _ in service.ROUTES}
    assert shown == routes - {("GET", "/metrics")}  # which is no JSON; tests/test_metrics.py has it


def error_names() -> set[str]:
    """The names of errors in service.py: what `Refusal` and `error_shape` are given, and what is looked up for them."""
    names = {name for name, _ in server.JsonErrorTask.WORDS.values()}
    for node in ast.walk(ast.parse(Path(service.__file__).read_text())):
        called = isinstance(node, ast.Call) and ast.unparse(node.func) in ("Refusal", "error_shape")
        if called or (isinstance(node, ast.FunctionDef) and node.name in ("error_name", "unrouted")):
            words = [one.value for one in ast.walk(node) if isinstance(one, ast.Constant)]
            names |= {word for word in words if isinstance(word, str) and re.fullmatch("[a-z]+(_[a-z]+)+", word)}
    return names


def test_every_error_name_is_in_the_references_table_and_no_row_is_out_of_date() -> None:
    rows = re.findall(r"^\| `([a-z_]+)` \| (\d{3}) \|", DOCS.read_text(), re.MULTILINE)
    assert {name for name, _ in rows} == error_names()
    assert len(error_names()) > 15


def test_of_many_large_mails_at_once_most_are_sent_away_and_none_is_half_stored(
    redis_server: RedisServer, client: redis.Redis, tmp_path: Path
) -> None:
    large = {**MAIL, "attachments": [{"filename": "a", "content": "AAAA" * 1_000_000}]}
    raw = json.dumps(large).encode()
    with House(tmp_path, redis_server.url) as house, ThreadPoolExecutor(30) as callers:
        api = house.api()
        answers = list(callers.map(lambda _: api.call("POST", "/emails", raw=raw), range(30)))
        assert {answer.status for answer in answers} == {202, 503}
        assert {answer.headers.get("Retry-After") for answer in answers if answer.status == 503} == {"5"}
        assert stored(client) == {answer.body["id"] for answer in answers if answer.status == 202}
        assert api.call("POST", "/emails", raw=raw).status == 202
