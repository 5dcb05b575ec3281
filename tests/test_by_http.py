"""A mail by HTTP: what is not answered is asked again under the same key, and in doubt only when that is forgotten."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import pytest
import redis

from mail import delivery
from mail.address import Mailbox
from mail.claim import Claim, Recipient, recipients_from_json, recipients_to_json
from mail.message import Message, Raw
from mail.outbox import Outbox
from mail.states import Status
from mail.suppression import MANUAL
from mail.sweep import sweep
from queues import keys
from queues.connection import connect
from queues.jobs import Jobs
from queues.table import EMAIL
from settings import load
from tests.http_upstream import CUT, TAKEN, Scripted, answer
from tests.mails import draft
from tests.scripted_relay import ScriptedRelay
from tests.servers import RedisServer, free_port
from tests.test_upstream import error

pytestmark = pytest.mark.usefixtures("client")
SILENT = [CUT] * 4  # as often as it is asked in one attempt
SIGNED = (
    "From: a@example.com\nTo: b@example.com, c@example.com\nContent-Type: multipart/signed; boundary=x\n\n"
    "--x\n\nHi\n--x--\n"
).replace("\n", "\r\n")
BUSY = answer(429, error("rate_limit_exceeded"), "Retry-After: 9")
FAULT = answer(500, error("internal_server_error"))


class Sending:
    """A delivery by HTTP, and by SMTP where there is a second relay."""

    def __init__(self, redis_url: str, url: str, second: ScriptedRelay | None, **given: str) -> None:
        relays = f'[up]\nkind = "resend"\nurl = "{url}"\napi_key = "planted-key"\n'
        relays += f'[second]\nhost = "127.0.0.1"\nsecurity = "none"\nport = {second.port}\n' if second else ""
        current = load(from_file={}, relays=relays, smtp_timeout="5s", **given)
        self.outbox = Outbox(Jobs(connect(redis_url)), current)
        self.delivery = delivery.Delivery(self.outbox)
        self.redis: Any = self.outbox.jobs.redis

    def attempt(self, mail_id: str) -> str:
        with suppress(delivery.Failed):
            self.delivery.deliver(mail_id)
        return str(self.redis.hget(f"mail:{mail_id}", "state").decode())

    def accept(self, message: Message | None = None, **changes: Any) -> str:
        made = draft()._replace(**changes)
        return self.outbox.accept([made._replace(message=message or made.message)]).id

    def counted(self, mail_id: str) -> int:
        return int(self.redis.hget(f"mail:{mail_id}", "counted") or 0)

    @property
    def in_doubt(self) -> int:
        return int(self.redis.hget("mail:totals", "in_doubt") or 0)


@contextmanager
def sending(
    server: RedisServer, acts: Sequence[bytes | float], second: bool = False, **given: str
) -> Iterator[tuple[Sending, Scripted, Any]]:
    with Scripted(acts) as upstream, ExitStack() as stack:
        relay = stack.enter_context(ScriptedRelay()) if second else None
        made = Sending(server.url, upstream.url, relay, **given)
        stack.callback(made.delivery.pool.close_all)
        yield made, upstream, relay


def forget(made: Sending, mail_id: str, hours: float = 21) -> None:
    """Lets the hours pass since the upstream was asked first."""
    since, identity = made.redis.hget(f"mail:{mail_id}", "asked").decode().split(" ", 1)
    made.redis.hset(f"mail:{mail_id}", "asked", f"{float(since) - hours * 3600} {identity}")


@pytest.mark.parametrize(
    ("acts", "states", "counted"),
    [
        ([TAKEN], "sent", 0),
        ([CUT, CUT, TAKEN], "sent", 0),
        ([*SILENT, TAKEN], "delayed sent", 0),
        ([*SILENT, BUSY, answer(502, "x"), TAKEN], "delayed delayed delayed sent", 0),
        ([answer(422, error("validation_error"))], "failed", 0),
        ([*SILENT, answer(422, error("validation_error"))], "delayed failed", 0),
        ([*SILENT, answer(409, error("invalid_idempotent_request"))], "delayed sent", 0),
        ([answer(403, error("validation_error")), TAKEN], "delayed sent", 1),
        ([answer(401, error("missing_api_key")), TAKEN], "delayed sent", 0),
        ([FAULT, FAULT, FAULT, FAULT, TAKEN], "delayed delayed delayed delayed sent", 2),
    ],
)
def test_a_mail_is_asked_for_until_it_is_answered(
    redis_server: RedisServer, acts: list[bytes], states: str, counted: int
) -> None:
    with sending(redis_server, acts, on_doubt="hold") as (made, upstream, _):
        mail_id = made.accept()
        for state in states.split():
            made.redis.delete("relay:up:breaker", "relay:up:probe")
            assert made.attempt(mail_id) == state
            shown = made.outbox.read(mail_id)["recipients"][0]["status"]
            assert shown == {"delayed": "pending", "sent": "accepted", "failed": "refused"}[state]
        seen = made.outbox.read(mail_id)
        last = seen["attempts"][-1]
        assert (last["relay"], last["relay_name"], last["phase"]) == (f"127.0.0.1:{upstream.port}", "up", "http")
        assert (made.counted(mail_id), made.in_doubt, len(seen["attempts"])) == (counted, 0, len(states.split()))
        assert {one.headers["idempotency-key"] for one in upstream.asked} == {mail_id}
        assert len({one.body for one in upstream.asked}) == 1


def test_who_was_not_asked_for_lack_of_a_replica_is_not_in_doubt(
    redis_server: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("queues.replication.WAIT", 20)
    monkeypatch.setattr("mail.claim.CONFIRMED_WITHIN", 0)
    with sending(redis_server, []) as (made, upstream, _):
        mail_id, made.outbox.jobs.replication.replicas = made.accept(), 1
        assert made.attempt(mail_id) == "delayed"
        seen = made.redis.hmget(f"mail:{mail_id}", ["asked", "held_by", "recipients"])
        assert (upstream.asked, *seen[:2], Status.IN_DOUBT.value.encode() in seen[2]) == ([], b"", b"", False)


@pytest.mark.parametrize("killed", [False, True])
@pytest.mark.parametrize(
    ("late", "on_doubt", "state", "in_doubt"),
    [(0, "hold", "sent", 0), (19, "hold", "sent", 0), (21, "hold", "unknown", 1), (21, "retry", "sent", 1)],
)
def test_a_key_that_is_forgotten_leaves_doubt(
    redis_server: RedisServer, killed: bool, late: float, on_doubt: str, state: str, in_doubt: int
) -> None:
    with sending(redis_server, [TAKEN] if killed else [*SILENT, TAKEN], on_doubt=on_doubt) as (made, upstream, _):
        mail_id = made.accept()
        if killed:
            claim: Any = made.outbox.claim(mail_id, 0)
            way = made.delivery.routes.ways[0]
            claim.asked = f"{time.time()} {way.upstream.identity}"  # type: ignore[union-attr]
            claim.mark_in_doubt(dict.fromkeys(claim.message.recipients, Status.IN_DOUBT), "up")
            made.redis.delete(f"mail:{mail_id}:claim")
        else:
            assert made.attempt(mail_id) == "delayed"
        forget(made, mail_id, late)
        assert (made.attempt(mail_id), made.in_doubt) == (state, in_doubt)
        assert {one.headers["idempotency-key"] for one in upstream.asked} <= {mail_id}


def test_another_upstream_of_the_same_name_is_not_asked_whether_it_has_the_mail(redis_server: RedisServer) -> None:
    with sending(redis_server, SILENT, on_doubt="hold") as (made, _, _):
        mail_id = made.accept()
        made.attempt(mail_id)
        with sending(redis_server, [TAKEN], on_doubt="hold") as (other, upstream, _):
            assert (other.attempt(mail_id), upstream.asked) == ("unknown", [])


@pytest.mark.parametrize(
    ("acts", "states", "by"),
    [
        ([BUSY], "delayed sent", "up second"),
        ([answer(401, error("invalid_api_key"))], "delayed sent", "up second"),
        ([*SILENT, BUSY, *SILENT, TAKEN], "delayed delayed delayed sent", "up up up up"),
        ([answer(502, "x"), TAKEN], "delayed sent", "up up"),
        ([CUT, BUSY, TAKEN], "delayed sent", "up up"),  # the first of them may have been taken
        ([CUT, answer(401, error("invalid_api_key")), TAKEN], "delayed sent", "up up"),
    ],
)
def test_only_what_the_upstream_cannot_have_moves_on(
    redis_server: RedisServer, acts: list[bytes], states: str, by: str
) -> None:
    with sending(redis_server, acts, second=True) as (made, _, _):
        mail_id = made.accept()
        for state in states.split():
            made.redis.delete("relay:up:breaker", "relay:up:probe")
            assert made.attempt(mail_id) == state
        assert [one["relay_name"] for one in made.outbox.read(mail_id)["attempts"]] == by.split()


def test_an_upstream_that_is_not_reached_leaves_no_doubt_however_long(redis_server: RedisServer) -> None:
    made = Sending(redis_server.url, f"http://127.0.0.1:{free_port()}", None, on_doubt="hold")
    mail_id = made.accept()
    assert made.attempt(mail_id) == "delayed"
    stored: Any = made.redis.hmget(f"mail:{mail_id}", "asked", "held_by")
    assert (stored, made.outbox.read(mail_id)["recipients"][0]["status"]) == ([b"", b""], "pending")


def test_a_mail_that_cannot_be_said_in_json_goes_by_smtp_or_fails(redis_server: RedisServer) -> None:
    came = replace(draft().message, text=None, raw=Raw(SIGNED, "a@example.com"))
    for second, state in ((False, "failed"), (True, "sent")):
        with sending(redis_server, [TAKEN], second) as (made, upstream, _):
            mail_id = made.accept(came)
            assert (made.attempt(mail_id), upstream.asked) == (state, [])
            if not second:
                reason: Any = made.redis.hget(f"mail:{mail_id}", "reason")
                assert reason == b"it cannot leave by HTTP: a multipart/signed part"


def test_those_whom_smtp_has_not_served_are_asked_for_under_another_key(redis_server: RedisServer) -> None:
    with sending(redis_server, [TAKEN]) as (made, upstream, _):
        message = replace(draft().message, to=[Mailbox("", "a@b.co"), Mailbox("", "c@d.co")])
        mail_id = made.accept(message)
        left = [Recipient("a@b.co", Status.ACCEPTED), Recipient("c@d.co")]
        made.redis.hset(f"mail:{mail_id}", "recipients", recipients_to_json(left))
        assert made.attempt(mail_id) == "sent"
        assert upstream.asked[0].headers["idempotency-key"].startswith(f"{mail_id}-")
        assert b'"to":["c@d.co"]' in upstream.asked[0].body


def test_who_is_suppressed_meanwhile_is_asked_for_again_with_the_others(redis_server: RedisServer) -> None:
    """Else it would be another request, under another key, and the others would have the mail twice."""
    with sending(redis_server, [*SILENT, TAKEN]) as (made, upstream, _):
        mail_id = made.accept(replace(draft().message, to=[Mailbox("", "a@b.co"), Mailbox("", "c@d.co")]))
        assert made.attempt(mail_id) == "delayed"
        made.outbox.suppressions.add("c@d.co", MANUAL)
        assert made.attempt(mail_id) == "sent"
        assert len({one.body for one in upstream.asked}) == 1


@pytest.mark.parametrize("killed", [False, True])
def test_who_was_suppressed_before_is_not_asked_for_with_the_others(redis_server: RedisServer, killed: bool) -> None:
    with sending(redis_server, [*SILENT, TAKEN]) as (made, upstream, _):
        mail_id = made.accept(replace(draft().message, to=[Mailbox("", "a@b.co"), Mailbox("", "c@d.co")]))
        made.outbox.suppressions.add("c@d.co", MANUAL)
        dies = patch.object(Claim, "settle", side_effect=RuntimeError) if killed else nullcontext()
        with dies, suppress(RuntimeError):
            assert made.attempt(mail_id) == "delayed"
        assert made.attempt(mail_id) == "sent"
        assert len({(one.body, one.headers["idempotency-key"]) for one in upstream.asked}) == 1
        assert [one["status"] for one in made.outbox.read(mail_id)["recipients"]] == ["accepted", "suppressed"]


def test_once_nobody_is_in_doubt_any_more_a_person_can_have_the_others_asked_for(
    redis_server: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    with sending(redis_server, [*SILENT, TAKEN]) as (made, _, _):
        mail_id = made.accept(replace(draft().message, to=[Mailbox("", "a@b.co"), Mailbox("", "c@d.co")]))
        assert made.attempt(mail_id) == "delayed"
        left = recipients_to_json([Recipient("a@b.co", Status.IN_DOUBT), Recipient("c@d.co", Status.REFUSED, 550)])
        made.redis.hset(f"mail:{mail_id}", mapping={"state": "unknown", "recipients": left})
        made.redis.hset(keys.job(mail_id), "status", "failed")
        made.outbox.arrived(mail_id)
        monkeypatch.setattr(delivery, "queued_at", lambda: 1e10)
        assert made.attempt(mail_id) == "sent"


@pytest.mark.parametrize("end", ["expired", "lost", "late"])
def test_a_mail_that_ends_unanswered_is_in_doubt(redis_server: RedisServer, client: redis.Redis, end: str) -> None:
    with sending(redis_server, [*SILENT, BUSY], trouble_for="1h") as (made, _, _):
        mail_id = made.accept()
        assert made.attempt(mail_id) == "delayed"
        if end == "lost":
            client.delete(keys.job(mail_id))
            client.zrem(keys.scheduled(EMAIL), mail_id)
            client.zadd("mail:open", {mail_id: 1})
            assert [one.event for one in sweep(made.outbox)] == ["given_up"]
        elif end == "late":
            client.hset(f"mail:{mail_id}", "since", "2020-01-01T00:00:00+00:00")
        else:
            client.hset(f"mail:{mail_id}", "expires_at", "2020-01-01T00:00:00+00:00")
        if end != "lost":
            made.attempt(mail_id)
        state, recipients = made.redis.hmget(f"mail:{mail_id}", "state", "recipients")
        assert (state, recipients_from_json(recipients)[0].status) == (b"unknown", "in_doubt")
