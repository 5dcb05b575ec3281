"""bin/top: what a line says, which keys do what, and the whole of it on a terminal."""

from __future__ import annotations

import curses
import json
import os
import pty
import subprocess
import time
from typing import Any

import pytest

from mail.outbox import Outbox
from mail.states import State, Status
from ops.top import Top, row
from queues import keys
from queues.connection import Redis
from tests.mails import accept, claim
from tests.servers import ROOT, RedisServer

LINE: dict[str, Any] = {"status": "sent", "created_at": "2026-01-02T03:04:05.000+00:00", "next_attempt_at": None}
LINE |= {"to": ["Ada <ada@example.com>"], "cc": [], "bcc": [], "subject": "Hello", "reason": None, "attempts": []}


def failed(outbox: Outbox) -> str:
    mail_id = accept(outbox)
    taken = claim(outbox, mail_id)
    taken.recipients[0].status = Status.REFUSED
    taken.settle(State.FAILED, reason="550 at rcpt")
    outbox.jobs.redis.lrem(keys.queue("email"), 0, mail_id)
    outbox.jobs.redis.hset(keys.job(mail_id), "status", "failed")
    outbox.jobs.redis.zadd(keys.failed("email"), {mail_id: time.time() + 1000})
    return mail_id


@pytest.mark.parametrize(
    ("fields", "show", "seen", "unseen"),
    [
        ({"attempts": [{"code": 250, "text": "OK\x1b[2J\x07"}]}, True, "250 OK·[2J·", "\x1b"),
        ({"subject": "a\u202egnp.exe"}, True, "a·gnp", "\u202e"),
        ({"reason": "550 at rcpt <ada@example.com>"}, False, "a…@example.com", "ada"),
        ({"subject": "Hello ada@example.com"}, False, "Hello a…@example.com", "ada"),
        ({"status": "unknown"}, True, "in doubt", "unknown"),
        ({"next_attempt_at": "2026-01-02T03:05:05.000+00:00", "reason": "451 at rcpt"}, True, ": 451 at rcpt", "250"),
    ],
)
def test_a_line_says_what_became_of_a_mail(fields: dict[str, Any], show: bool, seen: str, unseen: str) -> None:
    line = row(LINE | fields, show)
    assert seen in line
    assert unseen not in line


def press(top: Top, *typed: str | int) -> list[bool]:
    list(top.lines(30))
    return [top.press(ord(key) if isinstance(key, str) else key) for key in typed]


def test_a_mail_is_requeued_and_the_workers_paused_only_after_a_yes(outbox: Outbox, client: Redis) -> None:
    mail_id, top = failed(outbox), Top(outbox, "eve")
    press(top, "r", "n", "p", "x")
    assert (outbox.read(mail_id)["status"], client.exists(keys.SUSPENDED)) == ("failed", 0)
    press(top, "r", "y", "p", "y")
    assert (outbox.read(mail_id)["status"], client.exists(keys.SUSPENDED)) == ("queued", 1)
    press(top, "p", "y", "r", "y")
    assert client.exists(keys.SUSPENDED) == 0
    assert top.last_line().startswith("not done: ")
    done: Any = client.lrange("mail:actions", 0, -1)
    assert [json.loads(line)["what"] for line in done] == ["resume", "pause", "requeue"]
    assert press(top, "q") == [False]


def test_the_chosen_mail_and_the_failed_ones_only(outbox: Outbox) -> None:
    bad, good, top = failed(outbox), accept(outbox), Top(outbox, "eve")
    press(top, curses.KEY_DOWN)
    assert [line.chosen for line in list(top.lines(30))[-2:]] == [False, True]
    assert [mail["id"] for mail in top.mails] == [good, bad]
    press(top, "f")
    list(top.lines(30))
    assert [mail["id"] for mail in top.mails] == [bad]


def test_a_yes_is_about_the_mail_that_was_asked_for_and_never_sends_one_in_doubt_again(
    outbox: Outbox, client: Any
) -> None:
    bad, top = failed(outbox), Top(outbox, "eve")
    press(top, "r")
    other = failed(outbox)  # comes first, and moves the line
    assert [line.chosen for line in list(top.lines(30))[-2:]] == [False, True]
    top.press(ord("y"))
    assert (outbox.read(bad)["status"], outbox.read(other)["status"]) == ("queued", "failed")
    press(top, curses.KEY_UP, "r")
    assert top.last_line() == "requeue s? y/n"
    client.hset(f"mail:{other}", "state", "unknown")
    top.press(ord("y"))
    assert (outbox.read(other)["status"], top.last_line()[:30]) == ("unknown", "not done: the mail is in doubt")
    press(top, "r", "y")
    assert (outbox.read(other)["status"], top.asks) == ("unknown", "")
    press(top, "r")
    assert top.last_line().startswith("in doubt: decide at /mail/emails/")


@pytest.mark.parametrize("term", ["xterm-256color", "vt220", "of-tomorrow"])
def test_it_draws_on_a_terminal_and_ends_on_q(outbox: Outbox, redis_server: RedisServer, term: str) -> None:
    failed(outbox)
    ours, theirs = pty.openpty()
    settings = {"REDIS_URL": redis_server.url, "TERM": term, "LINES": "30", "COLUMNS": "140"}
    ran = subprocess.Popen([ROOT / "bin" / "top"], stdin=theirs, stdout=theirs, env={**os.environ, **settings})
    os.close(theirs)
    seen = b""
    while b"failed only" not in seen:
        seen += os.read(ours, 65536)  # ends with OSError if the program does
    os.write(ours, b"q")
    assert ran.wait(20) == 0
    os.close(ours)
    assert b"No worker runs" in seen
    assert b"550 at rcpt" in seen
