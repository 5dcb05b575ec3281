"""What comes back is believed if it is a real report about a mail of ours, changes it once, and nothing else does."""

from __future__ import annotations

import re
import time
from typing import Any

import fakeredis
import pytest

from mail import bounces, reports
from mail.bounces import Bounces
from mail.claim import Recipient, recipients_to_json
from mail.draft import compose
from mail.message import Draft, Raw
from mail.outbox import Outbox
from mail.request import parse
from mail.states import State, Status
from mail.verp import mails_in, return_path
from queues.jobs import Jobs
from settings import Settings
from tests.http_api import app_with, ask
from tests.mails import claim
from tests.report_samples import AUTOREPLIES, BOUNCES, SHAPES, as_none, filled
from tests.servers import RedisServer

ADA = "ada@example.com"
TO_TWO = [ADA, "bob@example.com"]
UNKNOWN = "01a21b29-6f5e-7b57-9d0e-6a2f0b1c8f3d"
# fmt: off
READ = {  # a shape -> what it says of ada, and whether it names the mail but by its return path
    "exchange": ("bounced", 550, "bounced: 550 5.1.10", True),
    "exim": ("bounced", 550, "bounced: 550 5.0.0", True),
    "exim-old": ("bounced", 550, "bounced: 550 5.1.1", False),
    "forwarded": ("bounced", 550, "bounced: 550 5.2.1", False),
    "gmail": ("bounced", 550, "bounced: 550 5.1.1", True),
    "jmrp-arf": ("complained", None, "complaint: abuse", True),
    "postfix": ("bounced", 550, "bounced: 550 5.1.1", True),
    "qmail": ("bounced", 550, "bounced: 550 5.1.1", False),
    "redacted-arf": ("complained", None, "complaint: abuse", True),
    "sendmail": ("bounced", 452, "bounced: 452 4.4.7", True),
    "ses": ("bounced", 550, "bounced: 550 5.1.1", False),
    "utf8": ("bounced", 553, "bounced: 553 5.6.7", True),
    "yahoo-arf": ("complained", None, "complaint: abuse", True),
}
# fmt: on
MAY_COME_BACK = {"forwarded", "sendmail", "utf8"}  # these say no more than that it was not delivered
without_return_path = {name for name, shape in SHAPES.items() if "RETURN_PATH" not in shape}


@pytest.fixture
def client() -> fakeredis.FakeRedis:
    return fakeredis.FakeRedis()


@pytest.fixture
def outbox(client: Any) -> Outbox:
    return Outbox(Jobs(client), Settings(bounce_address=BOUNCES, redis_url="redis://"))


def sent(outbox: Outbox, to: Any = ADA, status: Status = Status.ACCEPTED, state: State = State.SENT, **how: Any) -> str:
    body = {"from": "hello@acme.example", "to": to, "subject": "s", "text": "t"}
    mail_id = outbox.accept([Draft(compose(parse(body, default_sender=None, max_recipients=50)), **how)]).id
    taken = claim(outbox, mail_id)
    for one in taken.recipients:
        one.status = status
    taken.settle(state, reason="no reply at dot" if state == State.UNKNOWN else "")
    job = "failed" if state in (State.FAILED, State.UNKNOWN) else "finished"
    outbox.jobs.redis.hset(f"rq:job:{mail_id}", "status", job)
    return mail_id


def path_of(outbox: Outbox, mail_id: str) -> str:
    return return_path(outbox.settings.bounce_address, mail_id, outbox.index.proof)


def about(outbox: Outbox, name: str, mail_id: str, to: str = ADA, path: str | None = None) -> bytes:
    path = path_of(outbox, mail_id) if path is None else path
    return filled(SHAPES[name], f"<{mail_id}@acme.example>", path, to)


@pytest.mark.parametrize("name", SHAPES)
def test_a_report_is_read_rightly_and_changes_its_mail_once(outbox: Outbox, client: Any, name: str) -> None:
    state, code, reason, _ = READ[name]
    mail_id = sent(outbox)
    report = about(outbox, name, mail_id)
    found = Bounces(outbox).take(report)
    assert (found.mail_id, found.noted, found.later) == (mail_id, 1, False)
    seen = outbox.read(mail_id)
    assert (seen["status"], seen["last_event"], seen["reason"]) == (state, state, reason)
    [one], last = seen["recipients"], seen["attempts"][-1]
    assert (one["address"], one["status"], one["code"]) == (ADA, state, code)
    assert (last["verdict"], last["to"], last["code"]) == (state, ADA, code)
    assert all(len(text) <= reports.LONGEST_TEXT and text.isprintable() for text in (one["text"], last["text"]))
    before = client.hgetall(f"mail:{mail_id}")
    again = Bounces(outbox).take(report)
    assert (again.mail_id, again.noted, again.why) == (mail_id, 0, "it is known already")
    assert client.hgetall(f"mail:{mail_id}") == before
    assert client.hget("mail:totals", state) == b"1"
    entry = outbox.suppressions.find(ADA)
    assert (entry and (entry.origin, entry.source_id, entry.reason)) == (
        None if name in MAY_COME_BACK else (found.kind, mail_id, reason)
    )


@pytest.mark.parametrize("name", SHAPES)
def test_without_bounce_address_a_report_is_matched_by_message_id_if_it_has_one(outbox: Outbox, name: str) -> None:
    plain = Outbox(outbox.jobs, Settings(redis_url="redis://"))
    mail_id = sent(plain)
    Bounces(plain).take(about(outbox, name, mail_id, path=BOUNCES))
    assert plain.read(mail_id)["status"] == (READ[name][0] if READ[name][3] else "sent")


def test_what_is_no_report_or_is_forged_changes_nothing(outbox: Outbox, client: Any) -> None:
    alone, two, waits = sent(outbox), sent(outbox, TO_TWO), sent(outbox, status=Status.PENDING, state=State.DELAYED)
    refused, test = sent(outbox, status=Status.REFUSED, state=State.FAILED), sent(outbox, test=True)
    right = path_of(outbox, alone)
    samples = {name: filled(shape, f"<{alone}@acme.example>", right) for name, shape in as_none()}
    for name in SHAPES:
        samples[f"{name}, not sent"] = about(outbox, name, waits)
        samples[f"{name}, refused"] = about(outbox, name, refused)
        samples[f"{name}, a test"] = about(outbox, name, test)
        samples[f"{name}, unknown"] = about(outbox, name, UNKNOWN, path=BOUNCES)
        samples[f"{name}, no longer kept"] = about(outbox, name, UNKNOWN)
        if name != "utf8":  # whose address is in base64
            samples[f"{name}, of another"] = about(outbox, name, two, "eve@example.com")
        samples[f"{name}, another Message-ID"] = filled(SHAPES[name], f"<{alone}@another.example>", BOUNCES)
        if name not in without_return_path:
            forged = right[:10] + ("a" if right[10] != "a" else "b") + right[11:]
            samples[f"{name}, forged id"] = about(outbox, name, alone, path=forged)
            local, domain = right.split("@")
            wrong = f"{local[:-1]}{'a' if local[-1] != 'a' else 'q'}@{domain}"
            samples[f"{name}, forged proof"] = about(outbox, name, alone, path=wrong)
            samples[f"{name}, of two mails"] = about(outbox, name, alone, path=f"{right}, {path_of(outbox, two)}")
        if READ[name][3] and name not in ("redacted-arf", "utf8"):
            samples[f"{name}, of another, by Message-ID"] = about(outbox, name, alone, "eve@example.com", BOUNCES)
    assert len(samples) >= 100 + len(AUTOREPLIES)
    before = {key: client.hgetall(f"mail:{key}") for key in (alone, two, waits, refused, test)}
    believed = {}
    for name, data in samples.items():
        found = Bounces(outbox).take(data)
        if found.noted or found.mail_id or not found.why:
            believed[name] = found
    assert believed == {}
    assert {key: client.hgetall(f"mail:{key}") for key in before} == before


def test_of_two_recipients_the_one_who_is_named_bounces_then_the_other(outbox: Outbox, client: Any) -> None:
    client.hset("webhook:wanted", "a", "a.example email.bounced email.complained ")
    mail_id = sent(outbox, TO_TWO)
    for address, statuses in zip(TO_TWO, (["bounced", "accepted"], ["bounced", "bounced"]), strict=True):
        assert Bounces(outbox).take(about(outbox, "postfix", mail_id, address)).noted == 1
        assert [one["status"] for one in outbox.read(mail_id)["recipients"]] == statuses
    assert Bounces(outbox).take(about(outbox, "yahoo-arf", mail_id)).noted == 1
    assert outbox.read(mail_id)["status"] == "complained"
    assert Bounces(outbox).take(about(outbox, "postfix", mail_id)).noted == 0  # a complaint is not undone
    told = client.hget("webhook:waiting:a", mail_id).decode()
    assert re.findall(r"(email\S+) \d+ (.*)", told) == [
        *[("email.bounced", "bounced: 550 5.1.1")] * 2,
        ("email.complained", "complaint: abuse"),
    ]
    assert outbox.suppressions.size() == 0  # one of the two could have written it about the other


def test_a_mail_that_failed_for_others_stays_failed(outbox: Outbox) -> None:
    mail_id = sent(outbox, TO_TWO, state=State.FAILED)
    assert Bounces(outbox).take(about(outbox, "gmail", mail_id)).noted == 1
    seen = outbox.read(mail_id)
    assert (seen["status"], [one["status"] for one in seen["recipients"]]) == ("failed", ["bounced", "accepted"])


def test_a_report_about_a_mail_in_doubt_settles_that_it_was_taken(outbox: Outbox) -> None:
    mail_id = sent(outbox, TO_TWO, status=Status.IN_DOUBT, state=State.UNKNOWN)
    assert Bounces(outbox).take(about(outbox, "postfix", mail_id, "eve@example.com")).mail_id == ""
    assert outbox.read(mail_id)["status"] == "unknown"
    assert Bounces(outbox).take(about(outbox, "postfix", mail_id)).noted == 1
    seen = outbox.read(mail_id)
    assert (seen["status"], [one["status"] for one in seen["recipients"]]) == ("bounced", ["bounced", "accepted"])
    assert seen["attempts"][0]["text"] == "a bounce came back"


def test_a_report_on_one_who_was_served_before_says_nothing_of_one_in_doubt(outbox: Outbox) -> None:
    mail_id = sent(outbox, TO_TWO, status=Status.IN_DOUBT, state=State.UNKNOWN)
    served = recipients_to_json([Recipient(TO_TWO[0], Status.ACCEPTED), Recipient(TO_TWO[1], Status.IN_DOUBT)])
    outbox.jobs.redis.hset(f"mail:{mail_id}", "recipients", served)
    assert Bounces(outbox).take(about(outbox, "postfix", mail_id)).noted == 1
    seen = outbox.read(mail_id)
    assert (seen["status"], [one["status"] for one in seen["recipients"]]) == ("unknown", ["bounced", "in_doubt"])
    assert Bounces(outbox).take(about(outbox, "postfix", mail_id, TO_TWO[1])).noted == 1
    assert outbox.read(mail_id)["status"] == "bounced"


def test_a_report_about_a_mail_in_hand_is_wanted_again(outbox: Outbox) -> None:
    body = {"from": "hello@acme.example", "to": ADA, "subject": "s", "text": "t"}
    mail_id = outbox.accept([Draft(compose(parse(body, default_sender=None, max_recipients=50)))]).id
    claim(outbox, mail_id)
    found = Bounces(outbox).take(about(outbox, "postfix", mail_id))
    assert (found.later, found.noted) == (True, 0)


def test_a_change_in_between_is_not_written_over(outbox: Outbox, client: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    mail_id, changed = sent(outbox, TO_TWO), bounces.changed
    first = about(outbox, "postfix", mail_id, TO_TWO[1])

    def meanwhile(*given: Any) -> Any:
        monkeypatch.setattr(bounces, "changed", changed)
        assert Bounces(outbox).take(first).noted == 1
        return changed(*given)

    monkeypatch.setattr(bounces, "changed", meanwhile)
    assert Bounces(outbox).take(about(outbox, "postfix", mail_id)).noted == 1
    assert [one["status"] for one in outbox.read(mail_id)["recipients"]] == ["bounced", "bounced"]


@pytest.mark.parametrize(
    ("state", "media_type", "size", "status", "told"),
    [
        ("sent", "message/rfc822", 0, 200, {"kind": "bounce", "matched": True, "noted": 1, "reason": ""}),
        ("sending", "message/rfc822", 0, 409, {"type": "not_possible"}),
        ("canceled", "message/rfc822; charset=x", 0, 200, {"matched": False, "email_id": None, "noted": 0}),
        ("sent", "application/json", 0, 415, {"type": "unsupported_media_type"}),
        ("sent", "message/rfc822", 2**20, 413, {"type": "request_too_large"}),
    ],
)
def test_a_report_is_taken_by_http(
    redis_server: RedisServer, state: str, media_type: str, size: int, status: int, told: dict[str, Any]
) -> None:
    redis_server.reset()
    app = app_with(redis_server.url, bounce_address=BOUNCES, max_message_bytes=2**20)
    outbox = Outbox(Jobs(redis_server.client()), Settings(bounce_address=BOUNCES))
    mail_id = sent(outbox)
    outbox.jobs.redis.hset(f"mail:{mail_id}", "state", state)
    report = about(outbox, "postfix", mail_id) + b" " * size
    answer = ask(app, "POST", "/inbound/dsn", report, CONTENT_TYPE=media_type)
    assert (answer.status, {name: answer.body[name] for name in told}) == (status, told)
    assert outbox.jobs.redis.hget(f"mail:{mail_id}", "state") == (b"bounced" if told.get("noted") else state.encode())


def test_the_return_path_is_in_the_envelope_but_of_what_has_none(outbox: Outbox) -> None:
    body = {"from": "hello@acme.example", "to": ADA, "subject": "s", "text": "t"}
    message = compose(parse(body, default_sender=None, max_recipients=50))
    for raw, expected in ((None, True), (Raw("a", "own@acme.example"), True), (Raw("a", ""), False)):
        object.__setattr__(message, "raw", raw)
        taken = claim(outbox, outbox.accept([Draft(message)]).id)
        assert taken.envelope_sender == (path_of(outbox, taken.id) if expected else "")
        assert len(taken.envelope_sender.partition("@")[0]) <= 64


def test_a_return_path_bears_capitals_and_no_other_domain(outbox: Outbox) -> None:
    mail_id = sent(outbox)
    path = return_path(BOUNCES, mail_id, outbox.index.proof)
    for text, found in (
        (path.upper(), [mail_id]),
        (f"a<{path}>;{path}", [mail_id]),
        (f"{path}.evil.example", []),
        (path.replace("bounces", "bounce"), []),
        (f"{path}x", []),
        *(
            (path[:at] + letter + path[at + 1 :], []) for letter in "\u017f\u212a\u0130\u0131" for at in (8, 35)
        ),  # s, k, i?
    ):
        assert mails_in(text, BOUNCES, outbox.index.proof) == found, text


def test_a_report_costs_no_more_than_its_first_bytes() -> None:
    named = [b"a%d@b.example" % number for number in range(100)]
    hostile = [
        b"Content-Type: multipart/report; report-type=delivery-status; boundary=x\r\n\r\n" + b"--x\r\n" * 200_000,
        b'Content-Type: multipart/report; ;a="' * 200_000,
        b"From: mailer-daemon@x\nX-Failed-Recipients: " + b"a@b.example," * 200_000,
        b"From: mailer-daemon@x\n\nHi. This is the\n" + b"\n<a@b.example>:\n" * 200_000,
        b"A: b\n\t" * 500_000,
        b"From: mailer-daemon@x\nX-Failed-Recipients: "
        + b",".join(named)
        + b"\n\n"
        + b"\n".join(named)
        + b"\nx" * 130_000,
    ]
    for data in hostile:
        began = time.thread_time()
        reports.read(data)
        assert time.thread_time() - began < 1, data[:50]
