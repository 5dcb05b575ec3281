"""MAIL_REDIRECT_TO and MAIL_ALLOWLIST: mail reaches nobody but those who are named, at the door and in a worker."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import fakeredis
import pytest
import redis

from mail import delivery
from mail.outbox import Outbox
from mail.states import State, Status
from ops import dev
from ops.checks import relay
from ops.checks.findings import NOTE
from ops.checks.target import Target
from queues.jobs import Jobs, NotFound, NotPossible
from settings import load
from tests.checks.support import assert_finds, of
from tests.conversations import served
from tests.http_api import MAIL, WELCOME, app_with, ask, fields
from tests.mails import BODY, accept, claim, draft
from tests.relay import Relay
from tests.servers import House, RedisServer
from tests.test_deliver import delivers

TESTER = "tester@acme.example"
NAMED, OTHER = BODY["to"]
ADA, BOB = "Ada Lovelace <ada@example.com>", "bob@team.example"
OTHERS = MAIL | {"to": [ADA, BOB], "cc": "jürgen@example.com", "bcc": ["eve@example.com"]}


@pytest.mark.parametrize(
    ("path", "body", "named"),
    [
        ("/emails", MAIL | {"to": "a@team.example", "cc": ["CC@example.com"]}, []),
        ("/emails", OTHERS, ["to[0]", "cc[0]", "bcc[0]"]),
        ("/emails/batch", [MAIL | {"to": "a@team.example"}, MAIL], ["[1].to[0]"]),
        ("/start-job", WELCOME, ["to[0]"]),
    ],
)
def test_without_a_redirect_other_recipients_are_refused_by_field(
    redis_server: RedisServer, client: redis.Redis, path: str, body: Any, named: list[str]
) -> None:
    answer = ask(app_with(redis_server.url, mail_allowlist="team.example,cc@example.com"), "POST", path, body)
    assert (answer.status, fields(answer), bool(client.dbsize())) == (422 if named else 200, named, not named)


@pytest.mark.parametrize("allowlist", ["", "team.example"])
def test_with_a_redirect_the_tester_gets_the_mail_and_sees_who_was_meant(
    sending: House, relay: Relay, allowlist: str
) -> None:
    staging = {"mail_redirect_to": TESTER, **({"mail_allowlist": allowlist} if allowlist else {})}
    sending.environment |= {name.upper(): value for name, value in staging.items()}
    api = sending.api()
    sending.worker()
    seen = api.wait_for(api.submit(OTHERS), "sent")
    bob = BOB if allowlist else f'"{BOB}" <{TESTER}>'
    [mail] = relay.accepted
    assert mail.recipients == ([TESTER, bob] if allowlist else [TESTER])
    assert seen["to"] == [f'"{ADA}" <{TESTER}>', bob]
    assert (seen["cc"], seen["bcc"]) == ([f'"jürgen@example.com" <{TESTER}>'], [f'"eve@example.com" <{TESTER}>'])
    head = mail.content.partition(b"\r\n\r\n")[0].decode()
    assert f'To: "{ADA}" <{TESTER}>,\r\n {bob}\r\n' in head
    assert "eve@" not in head
    for process in ("api", "worker-email"):
        assert f'recipients="{load(from_file={}, **staging).staging}"' in sending.log(process)
        assert TESTER not in sending.log(process)


# fmt: off
LEFT = {  # what the attempts before have left -> what the mail is after the next one
    "nothing": ({}, "failed"), "one in doubt": ({OTHER: Status.IN_DOUBT}, "unknown"),
    "one served": ({NAMED: Status.ACCEPTED}, "failed"), "one refused": ({OTHER: Status.REFUSED}, "failed"),
}
# fmt: on


@pytest.mark.parametrize("left", LEFT)
@pytest.mark.parametrize("setting", ["mail_allowlist", "mail_redirect_to"])
def test_a_worker_sends_to_nobody_else_whatever_was_stored(setting: str, left: str) -> None:
    """As of a mail that was accepted before the setting was there, or that came with a copy of another Redis."""
    client: Any = fakeredis.FakeRedis()
    outbox = Outbox(Jobs(client), load(from_file={}, **{setting: NAMED}))
    mail_id, (statuses, after) = accept(outbox), LEFT[left]
    if statuses:
        claim(outbox, mail_id).mark_in_doubt(statuses)
        client.delete(f"mail:{mail_id}:claim")  # its worker has died
    with served() as (there, to), pytest.raises(delivery.Failed, match=r"^MAIL_ALLOWLIST or MAIL_REDIRECT_TO keeps it"):
        delivers(outbox, to).deliver(mail_id)
    assert there.connections == 0
    assert client.hget(f"mail:{mail_id}", "state").decode() == after


def test_the_doctor_and_bin_dev_say_that_it_is_on() -> None:
    staging = of(mail_redirect_to=TESTER)
    assert_finds(relay.login(Target(dev.ROOT), staging), NOTE, "all mail goes to MAIL_REDIRECT_TO")
    assert "Recipients     all mail goes to MAIL_REDIRECT_TO" in dev.welcome(dev.parse_arguments([]), staging)


# fmt: off
COPIES = [  # the settings, the operator's address, who gets the copy, or what stands in the way
    ({}, "Op <op@acme.example>", ["Op <op@acme.example>"]),
    ({"mail_redirect_to": TESTER}, "op@acme.example", [f'"op@acme.example" <{TESTER}>']),
    ({"mail_allowlist": "team.example"}, BOB, [BOB]),
    ({"mail_allowlist": "team.example"}, "op@acme.example", "to which this service sends"),
    ({}, "op", "must be one, such as"), ({}, "op@mailhost", "must be one, such as"),
    ({"allow_local_domains": True}, "op@mailhost", ["op@mailhost"]),
    ({}, "sent", "no longer kept"),
]
# fmt: on


@pytest.mark.parametrize(("chosen", "to", "found"), COPIES)
def test_a_copy_is_another_mail_for_the_operator_alone(chosen: dict[str, Any], to: str, found: list[str] | str) -> None:
    client: Any = fakeredis.FakeRedis()
    outbox = Outbox(Jobs(client), load(from_file={}, **chosen))
    whole = replace(draft().message, cc=draft().message.to, bcc=draft().message.to, headers={"X-A": "b"})
    unsubscribe = {"List-Unsubscribe": "<https://a.example/>", "list-unsubscribe-post": "List-Unsubscribe=One-Click"}
    stored = replace(whole, headers=whole.headers | unsubscribe)
    mail_id = outbox.accept([draft()._replace(message=stored)]).id
    taken = claim(outbox, mail_id)
    taken.settle(State.SENT if to == "sent" else State.FAILED, reason="550 at rcpt")
    before = client.hgetall(f"mail:{mail_id}"), client.zcard("mail:index")
    if isinstance(found, str):
        with pytest.raises(NotPossible, match=found) as refused:
            outbox.copy(mail_id, to)
        assert to not in str(refused.value) or "@" not in to
        assert (client.hgetall(f"mail:{mail_id}"), client.zcard("mail:index")) == before
        return
    copy = outbox.read(copied := outbox.copy(mail_id, to))
    assert (copy["to"], len(copy["recipients"]), copy["key"], copy["status"]) == (found, 1, "dashboard", "queued")
    assert replace(claim(outbox, copied).message, to=whole.to, cc=whole.cc, bcc=whole.bcc) == whole
    assert client.hgetall(f"mail:{mail_id}") == before[0]
    with pytest.raises(NotFound):
        outbox.copy("gone", to)
