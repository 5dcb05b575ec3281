"""The two mailboxes, on a real IMAP server: reports are read once, doubt is settled, nothing else is touched."""

from __future__ import annotations

from collections.abc import Iterator
from imaplib import IMAP4
from types import SimpleNamespace
from typing import Any

import fakeredis
import pytest
import trustme
from rq.timeouts import JobTimeoutException

import tasks
from mail import delivery, mailboxes, reports
from mail.claim import Recipient, recipients_to_json
from mail.outbox import Outbox
from mail.states import State, Status
from ops.checks.findings import FAULT, NOTE, OK, WARN
from ops.checks.mailboxes import readable as checked
from ops.checks.target import Target
from queues import offer
from queues.jobs import Jobs
from queues.offer import with_cron
from queues.table import EMAIL, JOBS
from settings import Settings, SettingsError, load
from tests.checks.support import assert_finds
from tests.dovecot import Dovecot
from tests.report_samples import BOUNCES
from tests.servers import ROOT
from tests.test_bounces import about, sent

SENT = "[Gmail]/Sent Mail"


@pytest.fixture(scope="module")
def server(authority: trustme.CA) -> Iterator[Dovecot]:
    with Dovecot(authority) as server:
        yield server


@pytest.fixture
def client() -> fakeredis.FakeRedis:
    return fakeredis.FakeRedis()


@pytest.fixture
def outbox(client: Any, server: Dovecot, ca_file: str, monkeypatch: pytest.MonkeyPatch) -> Outbox:
    monkeypatch.setenv("SSL_CERT_FILE", ca_file)
    server.empty()
    return using(client, bounce_imap_url=server.url(), doubt_imap_url=server.url(SENT))


def using(client: Any, **urls: str) -> Outbox:
    return Outbox(Jobs(client), Settings(bounce_address=BOUNCES, redis_url="redis://", **urls))


def test_what_is_new_is_read_once_and_what_is_no_report_stays_unread(outbox: Outbox, server: Dovecot) -> None:
    first, second = sent(outbox), sent(outbox, "bob@example.com")
    server.put("INBOX", b"Subject: hello\r\n\r\nAda", about(outbox, "postfix", first), b"garbage \xff\r\n")
    assert mailboxes.read_reports(outbox) == {"other": 2, "bounce": 1, "noted": 1}
    assert server.flags() == [False, True, False]
    assert mailboxes.read_reports(outbox) == {}
    forged = about(outbox, "gmail", first, path="bounces@acme.example").replace(first.encode(), second.encode())
    complaint = about(outbox, "yahoo-arf", second, "bob@example.com")
    server.put("INBOX", complaint, about(outbox, "gmail", first), forged)
    assert mailboxes.read_reports(outbox) == {"complaint": 1, "bounce": 2, "noted": 1}
    assert [outbox.read(one)["status"] for one in (first, second)] == ["bounced", "complained"]
    outbox.jobs.redis.delete("mail:mailbox")  # all of it is read again, and nothing is news
    assert mailboxes.read_reports(outbox) == {"other": 2, "bounce": 3, "complaint": 1, "noted": 0}
    assert server.flags() == [False, True, False, True, True, False]


def test_a_mail_that_cannot_be_read_keeps_no_other_and_one_that_is_too_early_waits(
    outbox: Outbox, server: Dovecot, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    mail_id, read = sent(outbox), reports.read
    server.put("INBOX", b"Subject: poison\r\n\r\n", about(outbox, "postfix", mail_id), b"Subject: later\r\n\r\n")
    monkeypatch.setattr(reports, "read", lambda data: 1 / 0 if b"poison" in data else read(data))
    outbox.jobs.redis.hset(f"mail:{mail_id}", "state", "sending")
    assert mailboxes.read_reports(outbox) == {"unread": 1, "later": 1, "other": 1, "noted": 0}
    assert "crashed where=ZeroDivisionError" in caplog.text.replace('"', "")
    outbox.jobs.redis.hset(f"mail:{mail_id}", "state", "sent")
    assert mailboxes.read_reports(outbox) == {"bounce": 1, "noted": 1}
    assert mailboxes.read_reports(outbox) == {}


@pytest.mark.parametrize(
    ("fault", "first"),
    [
        (IMAP4.abort("socket error: EOF"), {"error": "the server does not do what is asked: abort"}),
        (JobTimeoutException("too long"), JobTimeoutException),
        (("NO", [b"Server Unavailable. 15"]), {"later": 2, "noted": 0}),
    ],
)
def test_no_report_is_lost_where_the_connection_or_the_worker_ends(
    fault: Any, first: Any, outbox: Outbox, server: Dovecot, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.put("INBOX", *(about(outbox, "postfix", sent(outbox)) for _ in range(2)))
    real = IMAP4.uid

    def uid(self: Any, command: str, *rest: str) -> Any:
        if command == "FETCH" and isinstance(fault, Exception):
            raise fault
        return fault if command == "FETCH" else real(self, command, *rest)

    with monkeypatch.context() as patched:
        patched.setattr(IMAP4, "uid", uid)
        if isinstance(first, dict):
            assert mailboxes.read_reports(outbox) == first
        else:
            with pytest.raises(first):
                mailboxes.read_reports(outbox)
    with monkeypatch.context() as patched:
        patched.setattr(mailboxes, "LONGEST", -1)  # it has no time
        assert mailboxes.read_reports(outbox) == {}
    assert mailboxes.read_reports(outbox) == {"bounce": 2, "noted": 2}


def test_mail_in_doubt_is_settled_if_it_is_in_the_folder_and_only_then(outbox: Outbox, server: Dovecot) -> None:
    there, absent = (sent(outbox, status=Status.IN_DOUBT, state=State.UNKNOWN) for _ in range(2))
    server.put(SENT, f"Message-ID: <{there}@acme.example>\r\n\r\nHello".encode(), b"Subject: another\r\n\r\n")
    server.put("INBOX", f"Message-ID: <{absent}@acme.example>\r\n\r\nHello".encode())
    assert mailboxes.resolve_doubt(outbox) == {"settled": 1, "in_doubt": 2}
    assert [outbox.read(one)["status"] for one in (there, absent)] == ["sent", "unknown"]
    last = outbox.read(there)["attempts"][-1]
    assert (last["verdict"], last["text"]) == ("settled", mailboxes.FOUND)
    assert mailboxes.resolve_doubt(outbox) == {"settled": 0, "in_doubt": 1}
    assert server.flags(SENT) == [False, False]


def test_that_a_mail_was_sent_to_one_earlier_settles_no_doubt_about_another(outbox: Outbox, server: Dovecot) -> None:
    mail_id = sent(outbox, ["a@b.co", "c@d.co"], status=Status.IN_DOUBT, state=State.UNKNOWN)
    served = recipients_to_json([Recipient("a@b.co", Status.ACCEPTED), Recipient("c@d.co", Status.IN_DOUBT)])
    outbox.jobs.redis.hset(f"mail:{mail_id}", "recipients", served)
    server.put(SENT, f"Message-ID: <{mail_id}@acme.example>\r\n\r\nHello".encode())
    assert mailboxes.resolve_doubt(outbox) == {"settled": 0, "in_doubt": 0}


def test_a_mailbox_that_cannot_be_read_is_named_without_a_secret(
    server: Dovecot, client: Any, ca_file: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", ca_file)
    for url, reason in (
        (server.url(password="wrong-secret"), "the server refuses the login"),
        (server.url("No/Such"), "the server has no such folder, or does not open it"),
        (server.url().replace("localhost", "127.0.0.1"), "its certificate is not valid: IP address mismatch"),
        ("imaps://ada:wrong-secret@127.0.0.1:1", "it cannot be reached: Connection refused"),
    ):
        told = mailboxes.read_reports(using(client, bounce_imap_url=url))["error"]
        assert told.startswith(reason), told
        assert f'mailbox_unreachable at=BOUNCE_IMAP_URL reason="{told}"' in caplog.text
    assert "wrong-secret" not in caplog.text


def test_the_doctor_looks_into_both(server: Dovecot, ca_file: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", ca_file)
    here, given = Target(ROOT), {"bounce_imap_url": server.url(), "doubt_imap_url": server.url(password="s3cr3t")}
    assert_finds(checked(here, Settings()), NOTE, "nobody reads what comes back")
    gmail = Settings(bounce_address=BOUNCES, smtp_host="smtp.gmail.com")
    assert [one.level for one in checked(here, gmail)] == [WARN, NOTE]
    found = list(checked(here, Settings.model_validate(given)))
    assert [(one.level, one.found.partition(" (")[0]) for one in found] == [
        (OK, "the mailbox of BOUNCE_IMAP_URL can be read"),
        (FAULT, "DOUBT_IMAP_URL: the server refuses the login"),
    ]


def test_the_tasks_are_there_only_where_a_mailbox_is_set(client: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    names = {"tasks.read_reports", "tasks.resolve_doubt"}
    assert names <= offer.offered_on(JOBS).keys()
    assert not {"read_reports", "resolve_doubt"} & tasks.OFFERED.keys()  # so nobody queues them by POST /jobs
    assert not names & with_cron(JOBS, Settings()).keys()
    given = Settings(doubt_imap_url="imaps://a:b@c.example")
    assert names & with_cron(JOBS, given).keys() == {"tasks.resolve_doubt"}
    assert not with_cron(EMAIL, given)
    monkeypatch.setattr(delivery, "current", lambda: SimpleNamespace(outbox=using(client)))
    assert (tasks.read_reports(), tasks.resolve_doubt()) == ({}, {"settled": 0, "in_doubt": 0})
    line, policy = with_cron(JOBS, given)["tasks.resolve_doubt"]
    assert (line, policy.concurrency) == ("* * * * *", 1)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("bounce_imap_url", "imap://a:b@mx.example/INBOX"),  # in clear
        ("doubt_imap_url", "imaps://mx.example/INBOX"),
        ("doubt_imap_url", "imaps://a:s3cr3t@mx.example/IN BOX"),
        ("bounce_imap_url", "imaps://a:s3cr3t@mx.example/INBOX?x#y"),
        ("bounce_imap_url", "https://a:s3cr3t@mx.example/"),
        ("bounce_address", "Bounces <bounces@acme.example>"),
        ("bounce_address", "a+b@acme.example"),
        ("bounce_address", f"{'a' * 21}@acme.example"),
        ("bounce_address", "böunces@acme.example"),
    ],
)
def test_a_wrong_setting_is_named(name: str, value: str) -> None:
    with pytest.raises(SettingsError, match=f"^{name.upper()}[: ]+must be ") as told:
        load(from_file={}, **{name: value})
    assert "s3cr3t" not in str(told.value)
