"""The page of one mail: what it says in each state, what may be done there, and the log of who did what."""

from __future__ import annotations

import base64
import json
import re
from datetime import datetime, timedelta, timezone
from html.parser import HTMLParser
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from redis import Redis

from mail.address import Mailbox
from mail.bounces import Bounces
from mail.draft import prepare
from mail.listing import Wanted, page
from mail.mime import head
from mail.outbox import Outbox
from mail.states import EXPIRED, State, Status
from mail.sweep import sweep
from ops.page import audit, timeline
from ops.page.audit import Action
from process.api_keys import ApiKey
from queues import keys
from queues.jobs import Call, Policy
from submission.intake import Envelope as SmtpEnvelope
from submission.intake import take
from tests.dashboards import contents, fail
from tests.mails import claim
from tests.pages import MAIL, Pages, words
from tests.report_samples import SHAPES, filled
from tests.servers import RedisServer

HOSTILE = Path(__file__).with_name("hostile_html.tsv").read_text().splitlines()
GONE = "01a21b29-4e1c-7a05-9d3f-2f9a3c1be5d7"


@pytest.fixture
def pages(client: object, redis_server: RedisServer) -> Pages:
    return Pages.of(redis_server.url)


class Told(NamedTuple):
    """What the relay says in an attempt, and what becomes of the mail and of its last recipient."""

    state: State
    phase: str
    code: int | None
    text: str
    verdict: str
    status: Status
    reason: str = ""
    next_in: float = 0


def attempt(outbox: Outbox, mail_id: str, told: Told) -> None:
    taken = claim(outbox, mail_id)
    taken.attempts.append(
        {"at": datetime.now(timezone.utc).isoformat(timespec="milliseconds"), "relay": "relay.example:587"}
        | {"phase": told.phase, "code": told.code, "text": told.text, "verdict": told.verdict}
    )
    for one in taken.recipients[:-1]:
        one.status = Status.ACCEPTED
    last = taken.recipients[-1]
    last.status, last.code, last.text = told.status, told.code, told.text
    taken.settle(told.state, reason=told.reason or f"{told.code or 'no reply'} at {told.phase}", next_in=told.next_in)
    job: Any = {State.DELAYED: "scheduled", State.SENT: "finished"}.get(told.state, "failed")
    outbox.jobs.redis.hset(keys.job(mail_id), "status", job)


SENT = Told(State.SENT, "dot", 250, "2.0.0 queued as 7", "accepted", Status.ACCEPTED)
LATER = Told(State.DELAYED, "rcpt", 451, "4.7.1 later", "try again", Status.PENDING, next_in=240)
REFUSED = Told(State.FAILED, "rcpt", 550, "5.1.1 <b@example.com>: no such user", "refused", Status.REFUSED)
HELD = Told(State.UNKNOWN, "dot", None, "timed out", "in doubt", Status.IN_DOUBT)
TROUBLE = Told(State.DELAYED, "auth", 535, "5.7.8 no", "trouble", Status.PENDING, next_in=30)
DOUBT = "It arrived, It did not arrive: requeue it, Give it up"
AGAIN = "Requeue it, Give it up"
TWO = {"to": ["a@example.com", "b@example.com"]}
PUT_OFF = "It waits: the relay put it off (451 at rcpt). The next attempt is in 4 min , at"


@pytest.mark.parametrize(
    ("fields", "told", "sentence", "buttons"),
    [
        ({}, None, "It waits for a worker. It was accepted", "Cancel it"),
        ({"priority": "bulk"}, None, "It waits for its turn: mail of priority bulk goes when no other", "Cancel it"),
        ({"scheduled_at": "in 2 days"}, None, "Scheduled: it goes out at", "Move it, Cancel it"),
        ({}, SENT, "Sent: the relay accepted it at", ""),
        ({}, LATER, PUT_OFF, "Cancel it"),
        (TWO, LATER, "1 of 2 recipients has it", "Cancel it"),
        ({}, LATER._replace(next_in=-1), "(451 at rcpt). Its next attempt is due.", "Cancel it"),
        ({}, TROUBLE, "What it means: the relay does not accept this login", "Cancel it"),
        ({}, LATER._replace(reason="SMTP_RATE is reached"), "It waits: SMTP_RATE is reached. The next", "Cancel it"),
        ({}, HELD._replace(state=State.DELAYED), "In doubt: the relay may have it, for its answer never", "Cancel it"),
        ({}, HELD, "In doubt: the relay may have it or not", DOUBT),
        ({}, REFUSED, "Failed: the relay refused it (550 at rcpt).", AGAIN),
        ({}, REFUSED, "What fixes it: correct it where the application has it from", AGAIN),
        (TWO, REFUSED, "Failed for 1 of 2 recipients: the relay refused it", AGAIN),
        ({}, LATER._replace(state=State.FAILED), "put it off in every attempt (451 at rcpt)", AGAIN),
        (
            {},
            REFUSED._replace(phase="dot", code=554, text="spam"),
            "What fixes it: below are the relay's own words",
            AGAIN,
        ),
        ({}, REFUSED._replace(reason="550 before"), "Failed: the relay refused it (550 before).", AGAIN),
        ({}, REFUSED._replace(reason=EXPIRED), "What it means: its expires_at passed", AGAIN),
    ],
)
def test_a_mail_says_in_one_sentence_what_is_so_and_has_only_the_buttons_that_are_possible(
    pages: Pages, fields: dict[str, Any], told: Told | None, sentence: str, buttons: str
) -> None:
    mail_id = pages.accept(**fields)
    if told:
        attempt(pages.outbox, mail_id, told)
    shown = pages.get(f"/mail/emails/{mail_id}")
    assert sentence in words(shown)
    assert ", ".join(re.findall("<button.*?>(.*?)</button>", shown)) == buttons
    alike = re.search('href="(/mail/activity[^"]*)">All mails that met with the same', shown)
    assert bool(alike) == bool(told and told.state != State.SENT)
    if alike:
        assert mail_id in pages.get(alike[1].replace("&amp;", "&"))
    assert ('data-live="5"' in shown) == (told is None or told.state == State.DELAYED)


def test_a_mail_that_came_back_says_so_with_the_report_and_has_no_buttons(pages: Pages) -> None:
    fields: dict[str, Any] = TWO
    mail_id = pages.accept(**fields)
    attempt(pages.outbox, mail_id, SENT)
    for name, sentence, step in (
        (
            "gmail",
            "Bounced: the relay accepted it, and a report has come that it was not delivered to 1 of 2",
            "It came",
        ),
        (
            "yahoo-arf",
            "Complained of: the relay accepted it, and a report has come in which a",
            "A recipient called it",
        ),
    ):
        report = filled(SHAPES[name], pages.outbox.read(mail_id)["message_id"], "", "a@example.com")
        assert Bounces(pages.outbox).take(report).noted == 1
        shown = pages.get(f"/mail/emails/{mail_id}")
        assert sentence in words(shown)
        assert f"<p>{step}" in shown
        assert "<button" not in shown


def test_a_mail_in_hand_says_so_and_who_has_it_and_a_test_that_nothing_is_sent(pages: Pages, client: Redis) -> None:
    mail_id = pages.accept()
    path, taken = f"/mail/emails/{mail_id}", claim(pages.outbox, mail_id)
    client.hset(keys.job(mail_id), mapping={"status": "started", "worker_name": "1a2b3c4d5e", "started_at": at(0)})
    assert "A worker has it in hand right now" in pages.text(path)
    assert "Claimed by worker 1a2b3c4d, which" in pages.text(path)
    assert "<button" not in pages.get(path)
    taken.mark_in_doubt({"b@example.com": Status.IN_DOUBT})
    assert "A worker has handed it to the relay, and waits for the answer" in pages.text(path)
    test = pages.outbox.accept([prepare(MAIL, default_sender=None, max_recipients=50)._replace(test=True)]).id
    claim(pages.outbox, test).settle(State.SENT)
    assert "A test: it was checked and stored as any mail, and nothing was sent" in pages.text(f"/mail/emails/{test}")


def test_the_steps_of_a_mail_have_their_times_and_who_made_them() -> None:
    said = {"relay": "relay.example:587", "phase": "dot", "code": 250, "text": "OK 7", "verdict": "accepted"}
    new = {"worker": "host/1a2b", "began": at(10), "dot_ms": 60, "took_ms": 90, "tls": "TLSv1.3", "bytes": 2048}
    older = {"at": at(1), **said, "phase": "connect", "code": None, "verdict": "trouble", "text": "refused"}
    died = {"at": at(5), "verdict": "interrupted", "text": "the worker died in this attempt"}
    mail: dict[str, Any] = dict.fromkeys(("scheduled_at", "next_attempt_at", "expires_at", "reason"))
    mail |= {
        "key": "shop",
        "status": "sent",
        "created_at": at(0),
        "attempts": [older, died, {"at": at(10), **said, **new}],
    }
    seen = timeline.steps(mail, 0, None, [Action(START.timestamp() + 7, "admin", "requeue", GONE)])
    assert [(step.what, step.reply, round(step.gap or 0, 3)) for step in seen] == [
        ("Accepted by key shop", "", 0),
        ("The relay is in trouble, which costs the mail no attempt", "no reply at connect", 1),
        ("The worker died in this attempt", "", 4),
        ("Queued again by admin", "", 2),
        ("Claimed by worker host/1a2b", "", 3),
        ("Final dot sent", "", 0.06),
        ("The relay accepted it", "250 at dot", 0.03),
    ]
    assert (seen[-1].said, seen[-1].facts) == ("OK 7", ("relay.example:587", "TLSv1.3", "2 KB"))
    mail["attempts"][-1] |= {"tls": "", "bytes": 312}
    assert timeline.steps(mail, 0, None, [])[-1].facts == ("relay.example:587", "no TLS", "312 bytes")
    mail["attempts"][-1] |= {"relay_name": "first", "moved": True}
    assert timeline.steps(mail, 0, None, [])[-1].facts[::3] == ("first, relay.example:587", "it goes to another relay")


START = datetime.now(timezone.utc).replace(microsecond=0)


def at(seconds: float) -> str:
    return (START + timedelta(seconds=seconds)).isoformat(timespec="milliseconds")


FULL: dict[str, Any] = {
    "from": "Planted From <planted-1@example.com>",
    "to": ["Planted To <planted-2@example.com>"],
    "cc": ["planted-3@example.com"],
    "bcc": ["planted-4@example.com"],
    "reply_to": ["planted-5@example.com"],
    "headers": {"X-Contact": "ask planted-6@example.com", "List-Unsubscribe": "<mailto:planted-7@example.com>"},
}
CONTENT: dict[str, Any] = {
    "text": "planted-text",
    "html": "<p>planted-html</p>",
    "attachments": [{"filename": "planted-file.txt", "content": base64.b64encode(b"planted-content").decode()}],
}
HIDDEN = re.compile("planted-(text|html|file|content)|cGxhbnRlZ")


def test_no_body_and_no_file_is_ever_shown_and_addresses_only_where_they_may_be(
    pages: Pages, redis_server: RedisServer
) -> None:
    masking = Pages.of(redis_server.url, show_addresses=False)
    mail_id = pages.accept("", **FULL, **CONTENT)
    attempt(pages.outbox, mail_id, REFUSED._replace(text="<planted-2@example.com>: unknown"))
    shown, masked = (one.get(f"/mail/emails/{mail_id}") for one in (pages, masking))
    assert not HIDDEN.search(shown)
    assert {f"planted-{number}@example.com" for number in range(1, 8)} <= set(
        re.findall(r"planted-\d@example\.com", shown)
    )
    assert not re.search("planted", masked, re.IGNORECASE)
    assert "p…@example.com" in masked


def test_the_header_lines_are_those_that_go_out_as_long_as_they_are_kept(pages: Pages) -> None:
    mail_id = pages.accept(headers={"X-Own": "own words"}, subject="sübject", html="<p>x</p>")
    shown = pages.text(f"/mail/emails/{mail_id}")
    message = claim(pages.outbox, mail_id).message
    for line in head(message, f"<{mail_id}@example.com>", datetime.now(timezone.utc)).split("\r\n"):
        assert line.startswith("Date:") or " ".join(line.split()) in shown
    assert "Content-Type: multipart/alternative" in shown
    pages.outbox.jobs.redis.hdel(f"mail:{mail_id}", "content")
    without = pages.text(f"/mail/emails/{mail_id}")
    assert "were dropped with the body" in without
    assert ("X-Own" in without, "Content-Type: multi" in without, f"<{mail_id}@example.com>" in without) == (
        False,
        False,
        True,
    )
    large = pages.text(f"/mail/emails/{pages.accept(headers={'X-Own': 'own words'}, text='x' * 2**21)}")
    assert "The mail is large" in large
    assert "X-Own" not in large


def test_a_mail_that_came_by_smtp_is_shown_as_it_goes_out_and_masked_whole(
    pages: Pages, redis_server: RedisServer
) -> None:
    to, key = Mailbox("", "planted-1@example.com"), ApiKey("shop", "", "send")
    head = b"From: Planted <planted-2@example.com>\r\nX-Own: planted \xff\r\nList-Unsubscribe: <https://planted.example>\r\n"
    data = head + b"Message-ID: <planted@example.com>\r\n\r\nplanted-text\r\n"
    made = take(data, SmtpEnvelope("planted-3@example.com", [to], False), key, pages.settings)
    mail_id = pages.outbox.accept([made.draft]).id
    shown = pages.text(f"/mail/emails/{mail_id}")
    assert all(one in shown for one in ("X-Own: planted", "MIME-Version: 1.0", "<planted@example.com>"))
    assert "planted-text" not in shown
    masked = Pages.of(redis_server.url, show_addresses=False).get(f"/mail/emails/{mail_id}")
    assert not re.search("planted", masked.replace("&lt;planted@example.com&gt;", ""), re.IGNORECASE)
    copied = claim(pages.outbox, pages.outbox.copy(mail_id, "me@example.com")).message
    assert copied.raw is not None
    assert "Unsubscribe" not in copied.raw.octets
    assert (copied.recipients, "Message-ID" in copied.raw.octets) == (["me@example.com"], False)


class Elements(HTMLParser):
    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[Any] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, [name for name, _ in attrs]))


def test_what_a_mail_and_a_relay_say_adds_no_element_to_the_page(pages: Pages, client: Redis) -> None:
    def elements(text: str) -> list[Any]:
        client.flushall()
        mail_id = pages.accept(subject=text, to=[f'"{name(text)}" <b@example.com>'], headers={"X-Own": text})
        attempt(pages.outbox, mail_id, REFUSED._replace(text=text, reason=f"550 at rcpt {text}"))
        client.lpush("mail:actions", json.dumps({"at": 1, "who": text, "what": text, "id": f"{mail_id} {text}"}))
        return [Elements(pages.get(path)).found for path in (f"/mail/emails/{mail_id}", "/mail/actions")]

    def name(text: str) -> str:
        return re.sub(r'["\\]', "", text)[:200]

    plain = elements("plain")
    for line in HOSTILE:
        assert elements(line.partition("\t")[2][:900]) == plain, line


@pytest.mark.parametrize(
    ("told", "action", "status", "says"),
    [
        (None, "cancel", "canceled", "Canceled: nothing more of it is sent."),
        (LATER, "cancel", "canceled", "Canceled without login"),
        (REFUSED, "cancel", "canceled", "It is canceled"),
        (REFUSED, "requeue", "queued", "It is queued again, and waits for a worker."),
        (HELD, "arrived", "sent", "Sent: a person said that it arrived"),
        (HELD, "arrived", "sent", "Said to have arrived without login"),
        (HELD, "requeue", "queued", "Queued again without login"),
        (HELD._replace(state=State.FAILED), "requeue", "queued", "Queued again without login"),
    ],
)
def test_an_action_is_asked_for_done_and_noted(
    pages: Pages,
    client: Redis,
    caplog: pytest.LogCaptureFixture,
    told: Told | None,
    action: str,
    status: str,
    says: str,
) -> None:
    mail_id = pages.accept()
    if told:
        attempt(pages.outbox, mail_id, told)
    path, before = f"/mail/emails/{mail_id}/{action}", contents(client)
    assert pages.get(path).count("<form") == 1
    assert ("it arrives twice" in pages.text(path)) == bool(
        told and told.status == Status.IN_DOUBT and action == "requeue"
    )
    assert pages.browser.post(path, headers={"Sec-Fetch-Site": "cross-site"}).status_code == 403
    assert contents(client) == before  # neither looking nor another site changes a thing
    form = re.findall(r'type="hidden" name="(\w+)" value="(.*?)"', pages.get(path))
    if told == HELD and action == "requeue":  # somebody was asked about it when it had failed
        assert pages.post(path, was="failed").status_code == 409
    with caplog.at_level(0):
        answer = pages.post(path, **dict(form))
    assert (answer.status_code, answer.headers["Location"]) == (303, f"/mail/emails/{mail_id}?done={action}")
    assert f'operator who="without login" what={action} id={mail_id}' in caplog.text
    assert "@" not in caplog.text
    assert pages.outbox.read(mail_id)["status"] == status
    after = pages.get(answer.headers["Location"])
    assert says in words(after)
    assert len(re.findall("<p>(?:Canceled|Said to|A person said|Sent<)", after)) == (status != "queued")  # once
    assert f"without login {action} {mail_id}" in pages.text("/mail/actions")


def test_a_copy_goes_to_the_operator_alone_as_long_as_the_content_is_kept(
    pages: Pages, redis_server: RedisServer, caplog: pytest.LogCaptureFixture
) -> None:
    mine = Pages.of(redis_server.url, alert_to="me@example.org")
    mail_id = mine.accept(subject="Look at me")
    path = f"/mail/emails/{mail_id}"
    assert "set ALERT_TO" in pages.text(path)
    assert pages.post(f"{path}/copy").status_code == 409
    with caplog.at_level(0):
        assert mine.post(f"{path}/copy").headers["Location"] == f"{path}?done=copy"
    assert "example.org" not in caplog.text
    assert "A copy sent to ALERT_TO without login" in mine.text(path)
    [copy] = [one for one in page(mine.outbox, Wanted())[0] if one["id"] != mail_id]
    assert (copy["to"], copy["cc"], copy["bcc"], copy["subject"]) == (["me@example.org"], [], [], "Look at me")
    attempt(mine.outbox, mail_id, SENT)
    assert "<button" not in mine.get(path)
    assert mine.post(f"{path}/copy").status_code == 409


def test_a_mail_that_was_canceled_elsewhere_says_when(pages: Pages) -> None:
    mail_id = pages.accept()
    pages.outbox.cancel(mail_id)
    shown = re.sub(r"\s+", " ", pages.get(f"/mail/emails/{mail_id}"))
    assert re.search(r'</time> <span class="gap">\+\d+ ms</span></div> <div class="what"><p>Canceled</p>', shown)


def test_an_expired_mail_is_not_sent_again(pages: Pages, client: Redis) -> None:
    mail_id = pages.accept()
    attempt(pages.outbox, mail_id, REFUSED)
    client.hset(f"mail:{mail_id}", "expires_at", at(-60))
    assert re.findall("<button.*?>(.*?)</button>", pages.get(f"/mail/emails/{mail_id}")) == ["Give it up"]


@pytest.mark.parametrize(("when", "status"), [("in", 303), ("past", 400), ("far", 400), ("x", 400), ("", 400)])
def test_a_scheduled_mail_moves_to_a_time_of_the_machines_clock(pages: Pages, when: str, status: int) -> None:
    mail_id = pages.accept(scheduled_at="in 2 days")
    path, was = f"/mail/emails/{mail_id}/move", pages.outbox.read(mail_id)["scheduled_at"]
    days = {"in": 3, "past": -1, "far": 40}.get(when)
    local = (datetime.now() + timedelta(days=days)).replace(microsecond=0) if days else None
    answer = pages.post(path, when=local.isoformat() if local else when)
    assert answer.status_code == status, answer.text
    assert 'type="datetime-local"' in pages.get(path)
    now = pages.outbox.read(mail_id)["scheduled_at"]
    if status == 303 and local:
        assert datetime.fromisoformat(now) == local.astimezone()
    else:
        assert now == was


@pytest.mark.parametrize("action", ["requeue", "cancel", "move", "arrived", "copy"])
@pytest.mark.parametrize("method", ["GET", "POST"])
def test_what_is_not_possible_any_more_is_409_with_its_reason(pages: Pages, action: str, method: str) -> None:
    mail_id = pages.accept()
    attempt(pages.outbox, mail_id, SENT)
    path = f"/mail/emails/{mail_id}/{action}"
    form = {"when": (datetime.now() + timedelta(days=1)).isoformat()}
    answer = pages.post(path, **form) if method == "POST" else pages.browser.get(path)
    assert answer.status_code == 409
    assert "That is not possible" in answer.text
    assert f'href="/mail/emails/{mail_id}"' in answer.text
    assert audit.actions(pages.outbox.jobs.redis) == []


def test_an_id_of_no_mail_says_for_how_long_mails_are_kept(pages: Pages, client: Redis) -> None:
    for path in (f"/mail/emails/{GONE}", f"/mail/emails/{GONE}/requeue", "/mail/emails/x"):
        assert "A sent mail is kept for 3 days, one that failed, was suppressed or canceled for 14 days" in pages.text(
            path, 404
        )
    assert pages.post(f"/mail/emails/{GONE}/cancel").status_code == 404
    assert pages.post(f"/mail/emails/{GONE}/delete").status_code == 404
    jobs, policy = pages.outbox.jobs, Policy(60, (), 60, 60)
    jobs.accept(jobs.acceptance("jobs", "tasks.heartbeat", {GONE: Call([], {})}, policy))
    assert f'href="/rq/0/view/job/{GONE}"' in pages.get(f"/mail/emails/{GONE}", 404)
    for field in ("attempts", "recipients"):
        damaged = pages.accept()
        client.hset(f"mail:{damaged}", field, "[1]")
        assert "What is stored under this id cannot be read as a mail." in pages.text(f"/mail/emails/{damaged}", 404)


def test_a_note_holds_no_address_and_only_the_last_thousand_are_kept(
    pages: Pages, client: Redis, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(0):
        audit.note(client, "ada@example.com", "pause", "b@example.com")
        audit.note(client, "admin", "pause", "two\nlines")
    client.lpush("mail:actions", b"\xff", "[]", "{}")
    assert [(one.who, one.id) for one in audit.actions(client)] == [("admin", ""), ("a…@example.com", "")]
    assert not re.search("(ada|b)@|two", caplog.text)
    for number in range(audit.KEPT):
        audit.note(client, "admin", "pause", f"number {number}")
    assert client.llen("mail:actions") == audit.KEPT
    assert "number 899" in pages.text("/mail/actions?from=100")
    assert "Older ones" not in pages.text("/mail/actions?from=900")
    client.set("mail:actions", "something else")
    audit.note(client, "admin", "pause", "queue")  # it is in the log
    list(sweep(pages.outbox))
    audit.note(client, "admin", "resume", "queue")
    assert [one.what for one in audit.actions(client)] == ["resume"]


RQ_BUTTONS = {
    "job/a/requeue": "requeue a",
    "requeue/email": "requeue all email",
    "queue/email/compact": "compact email",
}


@pytest.mark.parametrize("path", RQ_BUTTONS)
def test_the_buttons_of_rq_dashboard_are_noted_too(pages: Pages, client: Redis, path: str) -> None:
    fail(client, "a")
    assert pages.post(f"/rq/{path}").status_code == 200
    assert f"without login {RQ_BUTTONS[path]}" in pages.text("/mail/actions")
