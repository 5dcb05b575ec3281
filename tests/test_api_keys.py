"""Who may do what: Authorization, and the scopes of keys."""

from __future__ import annotations

import re
from hashlib import sha256
from typing import Any

import pytest
import redis

from mail.outbox import Outbox
from queues.jobs import NotFound
from tests.http_api import ANY_ID, JOB, MAIL, UNKNOWN_ID, WELCOME, app_with, ask, fields, held_to_the_shape, served
from tests.servers import Answer, Api, RedisServer
from web import app as web_app

pytestmark = pytest.mark.usefixtures("client")


SUBMITS = {("POST", "/emails"), ("POST", "/emails/batch"), ("POST", "/start-job"), ("GET", "/emails/<mail_id>")}
SUBMITS |= {
    ("GET", "/emails"),
    ("GET", "/emails/<mail_id>/attachments"),
    ("PATCH", "/emails/<mail_id>"),
    ("POST", "/emails/<mail_id>/cancel"),
}


def test_a_key_of_scope_send_may_submit_mail_and_read_it_and_nothing_else(api: Api) -> None:
    sender = Api(api.port, "send-key")
    assert sender.post("/emails", MAIL).status == 200
    assert sender.post("/start-job", WELCOME).status == 202
    for method, path in [*(one for one in ANY_ID if "/jobs/" in one[1]), ("POST", "/jobs")]:
        answer = sender.call(method, path, JOB if path == "/jobs" else None)
        assert (answer.status, answer.body["name"]) == (401, "restricted_api_key"), path
    assert {route[:2] for route in web_app.ROUTES if route[3] == "send"} == SUBMITS


def test_a_key_reads_what_it_submitted_and_of_the_rest_does_not_learn_that_it_is_there(
    redis_server: RedisServer, client: redis.Redis, outbox: Outbox, caplog: pytest.LogCaptureFixture
) -> None:
    """A caller is known by its name: `shop` has an old key and a new one."""
    given = (("all", "all", "full"), ("old", "shop", "send"), ("new", "shop", "send"), ("blog", "blog", "test"))
    known = [f"{name}:{sha256(key.encode()).hexdigest()}:{scope}" for key, name, scope in given]
    app = app_with(redis_server.url, api_keys=",".join(known))

    def asked(key: str, method: str, path: str, body: object = None) -> Answer:
        once = {"HTTP_IDEMPOTENCY_KEY": "1", "HTTP_X_REQUEST_ID": "1"}
        return ask(app, method, path, body, HTTP_AUTHORIZATION=f"Bearer {key}", **once)

    def statuses(mail_id: str) -> list[int]:
        return [asked(key, "GET", f"/emails/{mail_id}").status for key, _, _ in given]

    with caplog.at_level(0):
        mail_id, again, other = (asked(key, "POST", "/emails", MAIL).body["id"] for key in ("old", "new", "blog"))
    assert re.findall(r"key=(.*?) id", caplog.text) == ["shop old_key=True", "shop", "blog"]
    assert (again, other != mail_id) == (mail_id, True)
    assert statuses(mail_id) == [200, 200, 200, 404]
    assert asked("blog", "GET", f"/emails/{mail_id}") == asked("blog", "GET", f"/emails/{UNKNOWN_ID}")
    outbox.hold_to(mail_id, "shop")
    client.set(f"mail:{UNKNOWN_ID}", "no mail")
    for one in (mail_id, UNKNOWN_ID):
        with pytest.raises(NotFound, match=r"^$"):
            outbox.hold_to(one, "blog")
    client.hdel(f"mail:{mail_id}", "key")  # of a version that did not note it
    assert statuses(mail_id) == [200, 404, 404, 404]


def test_a_test_is_answered_as_any_mail_and_is_no_answer_to_a_repeat_that_is_meant_to_send(
    redis_server: RedisServer, client: redis.Redis
) -> None:
    key = f"shop:{sha256(b'full-key').hexdigest()}:"
    test, send = (app_with(redis_server.url, api_keys=key + scope) for scope in ("test", "send"))
    once = {"HTTP_IDEMPOTENCY_KEY": "1", "HTTP_X_REQUEST_ID": "1"}
    for path, body in (("/emails", MAIL), ("/start-job", WELCOME), ("/emails/batch", [MAIL, MAIL]), ("/emails", {})):
        first, replayed, real = (ask(one, "POST", path, body, **once) for one in (test, test, send))
        assert first.status == real.status
        assert (first.body == real.body) == (first.status == 422)
        assert replayed.body == first.body
        assert "Idempotent-Replayed" not in real.headers
        ids = [answer.body["id"] for answer in (first, real) if "id" in answer.body]
        assert [ask(test, "GET", f"/emails/{one}").body["test"] for one in ids] == [True, False][: len(ids)]


# fmt: off
REFUSED = {
    (401, "missing_api_key"): ["", "Bearer", "Bearer ", "Basic full-key", "full-key", "Token full-key"],
    (403, "invalid_api_key"): [f"Bearer {one}" for one in (
        "full-kex", "full-ke", "full-key2", "FULL-KEY", "é", "full-key, full-key", "x" * 9000)],
}
# fmt: on


@pytest.mark.parametrize(("status", "name", "given"), [(*how, one) for how, given in REFUSED.items() for one in given])
def test_a_request_without_a_known_key_is_refused(
    api: Api, client: redis.Redis, status: int, name: str, given: str
) -> None:
    answer = api.call("POST", "/emails", MAIL, {"Authorization": given})
    held_to_the_shape(answer, status, name)
    assert answer.headers.get("Www-Authenticate") == ("Bearer" if status == 401 else None)
    assert client.dbsize() == 0


def test_the_word_bearer_may_be_written_in_any_case(api: Api) -> None:
    assert api.call("GET", f"/jobs/{UNKNOWN_ID}", headers={"Authorization": "bearer  full-key"}).status == 404


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

    monkeypatch.setattr("process.api_keys.hmac.compare_digest", compare)
    with served(app_with(redis_server.url, api_keys=",".join(f"{n}:{digest}" for n, digest in known.items()))) as api:
        status = api.call("GET", f"/jobs/{UNKNOWN_ID}", headers={"Authorization": f"Bearer {given}"}).status
    assert status == (404 if given in known else 403)
    assert compared == list(known.values())


# fmt: off
SENDERS = [  # path, body, and the fields that are refused
    *(("/emails", MAIL | {"from": one}, []) for one in ("a@acme.example", "Acme <a@ACME.example>", "a@müller.example")),
    *(("/emails", MAIL | {"from": one}, ["from"]) for one in (
        "a@news.acme.example", "a@acme.example.com", "a@notacme.example", "acme.example <a@b.example>", "")),
    ("/emails", MAIL, ["from"]), ("/start-job", WELCOME, ["from"]),  # MAIL_FROM has another domain
    ("/emails/batch", [MAIL | {"from": "a@acme.example"}, MAIL], ["[1].from"]),
]
# fmt: on


@pytest.mark.parametrize(("path", "body", "named"), SENDERS)
def test_a_key_sends_from_its_domains_and_from_no_other(
    redis_server: RedisServer, client: redis.Redis, path: str, body: Any, named: list[str]
) -> None:
    key = f"full:{sha256(b'full-key').hexdigest()}:full::acme.example+xn--mller-kva.example"
    answer = ask(app_with(redis_server.url, api_keys=key), "POST", path, body)
    assert (fields(answer), client.llen("rq:queue:email")) == (named, 0 if named else 1)
    if named:
        held_to_the_shape(answer, 403, "from_not_allowed")
        assert "must be an address at acme.example or xn--mller-kva.example" in answer.body["message"]


def test_a_key_makes_as_many_requests_as_it_may_in_all_processes_together(
    redis_server: RedisServer, client: redis.Redis
) -> None:
    """A bucket of ten, which fills up evenly: one more every six seconds."""
    keys = ",".join(
        f"{one}:{sha256(one.encode()).hexdigest()}:send{rate}" for one, rate in (("few", ":10/m"), ("any", ""))
    )
    apps = [app_with(redis_server.url, api_keys=keys) for _ in range(2)]

    def post(which: int, key: str = "few") -> Answer:
        return ask(apps[which % 2], "POST", "/emails", MAIL, HTTP_AUTHORIZATION=f"Bearer {key}")

    assert [post(n).status for n in range(10)] == [200] * 10
    refused = post(10)
    held_to_the_shape(refused, 429, "rate_limit_exceeded")
    assert refused.body["message"].startswith("this API key may make 10/m requests")
    assert 1 <= int(refused.headers["Retry-After"]) <= 6
    told = {name.lower(): value for name, value in refused.headers.items() if name.startswith("Ratelimit-")}
    assert told == {
        **{"ratelimit-limit": "10", "ratelimit-policy": "10;w=60", "ratelimit-remaining": "0"},
        "ratelimit-reset": refused.headers["Retry-After"],
    }
    assert client.llen("rq:queue:email") == 10
    assert [post(n, "any").status for n in range(12)] == [200] * 12
    client.incrbyfloat("limit:key:few", -6_000)  # as after six seconds
    assert [post(n).status for n in range(2)] == [200, 429]
    assert 0 < client.pttl("limit:key:few") <= 60_000


def test_a_thousand_wrong_keys_ask_redis_nothing_and_the_right_one_works_among_them(
    api: Api, client: redis.Redis
) -> None:
    client.config_resetstat()
    refused = {Api(api.port, f"ae_{number:032}").post("/emails", MAIL).status for number in range(1000)}
    commands: Any = client.info("commandstats")
    assert refused == {403}
    assert not {"cmdstat_evalsha", "cmdstat_get", "cmdstat_hget", "cmdstat_incr"} & set(commands)
    assert api.post("/emails", MAIL).status == 200
