"""MAIL_REDIRECT_TO and MAIL_ALLOWLIST: mail reaches nobody but those who are named, at the door and in a worker."""

from __future__ import annotations

from typing import Any

import fakeredis
import pytest
import redis

from mail import delivery
from mail.claim import Claim
from mail.outbox import Outbox
from mail.states import State, Status
from ops import dev
from ops.checks import relay
from ops.checks.findings import NOTE
from ops.checks.target import Target
from queues.jobs import Jobs
from settings import load
from tests.checks.support import assert_finds, of
from tests.conversations import served
from tests.http_api import MAIL, WELCOME, app_with, ask, fields, held_to_the_shape
from tests.mails import BODY, accept, claim
from tests.relay import Relay
from tests.servers import House, RedisServer
from tests.test_deliver import delivers

TESTER = "tester@acme.example"
OTHERS = {
    "to": ["Ada Lovelace <ada@example.com>", "bob@team.example"],
    "cc": "jürgen@example.com",
    "bcc": ["eve@example.com"],
}


def test_without_a_redirect_other_recipients_are_refused_by_field(
    redis_server: RedisServer, client: redis.Redis
) -> None:
    app = app_with(redis_server.url, mail_allowlist="team.example,cc@example.com")
    assert ask(app, "POST", "/emails", MAIL | {"to": "a@team.example", "cc": ["CC@example.com"]}).status == 200
    assert client.llen("rq:queue:email") == 1
    for path, body, named in (
        ("/emails", MAIL | OTHERS, ["to[0]", "cc[0]", "bcc[0]"]),
        ("/emails/batch", [MAIL | {"to": "a@team.example"}, MAIL], ["[1].to[0]"]),
        ("/start-job", WELCOME, ["to[0]"]),
    ):
        answer = ask(app, "POST", path, body)
        held_to_the_shape(answer, 422, "validation_error")
        assert fields(answer) == named
        assert "MAIL_ALLOWLIST" in answer.body["message"]
    assert client.llen("rq:queue:email") == 1


@pytest.mark.parametrize("allowlist", ["", "team.example"])
def test_with_a_redirect_the_tester_gets_the_mail_and_sees_who_was_meant(
    sending: House, relay: Relay, allowlist: str
) -> None:
    sending.environment |= {"MAIL_REDIRECT_TO": TESTER, "MAIL_ALLOWLIST": allowlist}
    api = sending.api()
    sending.worker()
    seen = api.wait_for(api.submit(MAIL | OTHERS), "sent")
    bob = "bob@team.example" if allowlist else f'"bob@team.example" <{TESTER}>'
    [mail] = relay.accepted
    assert mail.recipients == ([TESTER, bob] if allowlist else [TESTER])
    assert seen["to"] == [f'"Ada Lovelace <ada@example.com>" <{TESTER}>', bob]
    assert (seen["cc"], seen["bcc"]) == ([f'"jürgen@example.com" <{TESTER}>'], [f'"eve@example.com" <{TESTER}>'])
    head = mail.content.partition(b"\r\n\r\n")[0].decode()
    assert f'To: "Ada Lovelace <ada@example.com>" <{TESTER}>,\r\n {bob}\r\n' in head
    assert "eve@" not in head
    said = "mail for recipients that are not on MAIL_ALLOWLIST" if allowlist else "all mail"
    for process in ("api", "worker-email"):
        assert f'recipients="{said} goes to MAIL_REDIRECT_TO"' in sending.log(process)
        assert TESTER not in sending.log(process)


@pytest.mark.parametrize(
    ("before", "after"),
    [("queued", "failed"), ("in doubt", "unknown"), ("served", "sent"), ("one served", "failed"), ("again", "failed")],
)
@pytest.mark.parametrize("setting", ["mail_allowlist", "mail_redirect_to"])
def test_a_worker_sends_to_nobody_else_whatever_was_stored(
    setting: str, before: str, after: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As of a mail that was accepted before the setting was there, or that came with a copy of another Redis."""
    client: Any = fakeredis.FakeRedis()
    outbox = Outbox(Jobs(client), load(from_file={}, **{setting: "b@example.com"}))
    mail_id, (named, other) = accept(outbox), BODY["to"]
    marks = {
        "in doubt": {other: Status.IN_DOUBT},
        "served": dict.fromkeys((named, other), Status.ACCEPTED),
        "one served": {named: Status.ACCEPTED},
        "again": {other: Status.REFUSED},
    }
    if before in marks:
        attempt: Claim = claim(outbox, mail_id)
        attempt.mark_in_doubt(marks[before])
        client.delete(f"mail:{mail_id}:claim")  # its worker has died
    if before == "again":
        claim(outbox, mail_id).settle(State.FAILED, reason="550 at rcpt")
    monkeypatch.setattr(delivery, "queued_at", lambda: 1e12)
    with served() as (there, to):
        made = delivers(outbox, to)
        if after == "sent":
            made.deliver(mail_id)
        else:
            with pytest.raises(delivery.Failed, match="MAIL_ALLOWLIST or MAIL_REDIRECT_TO keeps it from a recipient"):
                made.deliver(mail_id)
    assert there.connections == 0
    assert client.hget(f"mail:{mail_id}", "state").decode() == after


def test_the_doctor_and_bin_dev_say_that_it_is_on() -> None:
    staging = of(mail_redirect_to=TESTER)
    assert_finds(relay.login(Target(dev.ROOT), staging), NOTE, "all mail goes to MAIL_REDIRECT_TO")
    assert "Recipients     all mail goes to MAIL_REDIRECT_TO" in dev.welcome(dev.parse_arguments([]), staging)
