"""Failures by cause at /mail/failures: what each means, and what queues all of one again."""

from __future__ import annotations

import random
import re
from typing import Any, NamedTuple

import pytest
from redis import Redis
from rq import Queue
from rq.job import JobStatus
from rq.registry import FailedJobRegistry
from rq.results import Result
from rq.serializers import JSONSerializer
from rq.utils import now

from mail.states import EXPIRED, LOST, NOT_ADMITTED, TROUBLE_TOO_LONG, State
from ops.page import failures
from queues import keys
from tests.mails import claim
from tests.pages import Pages, words
from tests.servers import RedisServer

AGAIN, FIX_FIRST, REFUSED = "Requeue it", "Do it once the cause is fixed", "will most likely fail again"
TRACEBACK = 'Traceback (most recent call last):\n  File "x.py", line 2, in f\n    g()\n'


class Case(NamedTuple):
    state: State
    reason: str
    said: tuple[str, int | None, str] | None  # phase, code and text of its last attempt
    means: str
    warning: str | None = None


CASES = [
    Case(State.FAILED, "535 at auth", ("auth", 535, "no"), "the relay does not accept this login", FIX_FIRST),
    Case(State.FAILED, "550 at rcpt", ("rcpt", 550, "5.1.1 <b@example.com>"), "knows no such address", REFUSED),
    Case(State.FAILED, "550 at rcpt", None, "the relay refuses this recipient permanently", REFUSED),
    Case(State.FAILED, "550 before", ("dot", 250, "ok"), "the relay refuses this recipient permanently", REFUSED),
    Case(State.FAILED, "554 at dot, 451 at rcpt", ("dot", 554, "5.7.1 spam"), "refuses this mail permanently", REFUSED),
    Case(
        State.FAILED, f"{TROUBLE_TOO_LONG}: 421 at greeting", ("greeting", 421, ""), "5 days for the relay", FIX_FIRST
    ),
    Case(State.FAILED, TROUBLE_TOO_LONG, None, "(TROUBLE_FOR) What fixes it /mail/system", FIX_FIRST),
    Case(State.FAILED, EXPIRED, None, "its expires_at passed"),
    Case(State.FAILED, LOST[""], None, "somebody has deleted its job", FIX_FIRST),
    Case(State.FAILED, NOT_ADMITTED, None, "this is a staging system", "as long as MAIL_ALLOWLIST"),
    Case(State.FAILED, "no reply at dot", ("dot", None, ""), "so it may have them", "what it has arrives twice"),
    Case(
        State.FAILED, "no reply at connect (Name <i>)", ("connect", None, "x"), "the relay cannot be reached", FIX_FIRST
    ),
    Case(State.FAILED, "what nobody knows", None, "what nobody knows: 1 mail Accepted at", FIX_FIRST),
    Case(State.UNKNOWN, "no reply at dot", ("dot", None, ""), "decided alone, on its own page"),
    Case(State.DELAYED, "451 at rcpt", ("rcpt", 451, "later"), "next attempt in 60 s What it means the relay puts"),
    Case(State.DELAYED, "SMTP_RATE is reached", None, "each mail has its turn"),
    Case(State.DELAYED, "the rate of relay first is reached", None, "each mail has its turn under the relay"),
    Case(State.DELAYED, "relay first is configured no more", None, "that the workers do not know"),
    Case(State.DELAYED, "the relay is in trouble", None, "all mail waits until the relay is well again"),
]


@pytest.fixture
def pages(client: Redis, redis_server: RedisServer) -> Pages:
    return Pages.of(redis_server.url)


def settled(pages: Pages, case: Case, **fields: Any) -> str:
    """A mail that an attempt has left so, as has its job."""
    mail_id = pages.accept(**fields)
    taken, redis = claim(pages.outbox, mail_id), pages.outbox.jobs.redis
    if case.said:
        phase, code, text = case.said
        taken.attempts.append({"phase": phase, "code": code, "text": text, "relay": "relay.example:587", "at": ""})
    taken.settle(case.state, reason=case.reason, next_in=60 if case.state == State.DELAYED else 0)
    redis.lrem(keys.queue("email"), 0, mail_id)
    redis.hset(keys.job(mail_id), "status", "scheduled" if case.state == State.DELAYED else "failed")
    return mail_id


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.state} {case.reason}")
def test_a_cause_says_what_it_means_and_only_what_failed_and_may_go_again_has_a_button(
    pages: Pages, case: Case
) -> None:
    settled(pages, case)
    page = pages.get("/mail/failures")
    assert case.means in words(page)
    assert "<i>" not in page
    assert (AGAIN in page) == (case.warning is not None)
    if case.warning:
        link = re.search(r'href="(/mail/failures/mails[^"]*)"', page)
        assert link
        assert case.warning in pages.text(link[1].replace("&amp;", "&"))


def test_a_cause_whose_mails_the_relay_may_have_says_so_whatever_came_first(pages: Pages, client: Any) -> None:
    mail_id = settled(pages, CASES[0])
    stored = client.hget(f"mail:{mail_id}", "recipients").replace(b"pending", b"in_doubt")
    client.hset(f"mail:{mail_id}", "recipients", stored)
    assert "what it has arrives twice" in pages.text("/mail/failures/mails?reason=535+at+auth")


def test_the_worst_cause_comes_first_and_leads_to_its_mails(pages: Pages) -> None:
    odd = CASES[0]._replace(reason='no reply at connect ("Name": 1)')
    for case in (odd, *[CASES[0]] * 3):
        settled(pages, case)
    page = pages.get("/mail/failures")
    assert re.findall(r">([^<>]*: \d+) mail", page) == ["535 at auth: 3", "no reply at connect (&#34;Name&#34;: 1): 1"]
    links = re.findall(r'<a href="(/mail/activity\?[^"]*)"', page)
    assert links[0] == "/mail/activity?q=reason:%22535+at+auth%22+state:failed"
    assert [pages.get(link).count("/mail/emails/") for link in links] == [3, 1]


def test_all_of_a_cause_are_queued_again_and_no_others(pages: Pages, client: Any) -> None:
    ids = [settled(pages, CASES[0]) for _ in range(3)]
    settled(pages, CASES[1])
    settled(pages, CASES[0], expires_at="2126-01-01T00:00:00Z")
    client.hset(f"mail:{(gone := settled(pages, CASES[0]))}", "expires_at", "2026-01-01T00:00:00+00:00")
    # a worker of an earlier version has left it so, and knows nothing of causes
    client.hset(f"mail:{(in_doubt := settled(pages, CASES[0]))}", "state", "unknown")
    path = "/mail/failures/mails"
    assert pages.text(f"{path}?reason=535+at+auth").startswith("Requeue 6 mails? 535 at auth.")
    assert pages.browser.post(path, data={"reason": "535 at auth"}).status_code == 403
    assert client.llen(keys.queue("email")) == 0
    shown = words(pages.post(path, reason="535 at auth").text)
    assert "4 mails are queued again" in shown
    assert "2 could not be: gone, expired" in shown
    queued = {one.decode() for one in client.lrange(keys.queue("email"), 0, -1)}
    assert {*ids} < queued
    assert len(queued) == 4
    assert not queued & {gone, in_doubt}
    [note] = client.lrange("mail:actions", 0, -1)
    assert b'"requeue_all", "id": "535 at auth"' in note
    assert pages.browser.get(f"{path}?reason=none").headers["Location"] == "/mail/failures"


def test_a_request_takes_its_time_and_a_button_goes_on_with_the_rest(
    pages: Pages, client: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(failures, "PATIENCE", -1)
    ids = [settled(pages, CASES[0]) for _ in range(3)]
    form = {"reason": "535 at auth"}
    for left in ("2 are left.", "1 is left.", ""):
        page = pages.post("/mail/failures/mails", **form).text
        assert left in words(page)
        assert ("Go on with the rest" in page) == bool(left)
        form = dict(re.findall(r'name="(\w+)" value="([^"]*)"', page))
    assert [one.decode() for one in client.lrange(keys.queue("email"), 0, -1)] == ids[::-1]


def failed_job(client: Redis, told: str | None, task: str = "report") -> str:
    queue = Queue("jobs", connection=client, serializer=JSONSerializer)
    job = queue.create_job(f"tasks.{task}")
    job.ended_at = now()
    job.save()
    job.set_status(JobStatus.FAILED)
    FailedJobRegistry(queue=queue).add(job, ttl=1000)
    if told is not None:
        Result.create_failure(job, ttl=1000, exc_string=told)
    return str(job.id)


@pytest.mark.parametrize(
    ("told", "shown"),
    [
        (f"{TRACEBACK}my.Lost: ada@example.com <b>\n", "Lost : a…@example.com <b> 2"),
        (f"{TRACEBACK}    ~~^^\nKeyError: 'x'\n  File it\nand more\n", "KeyError : 'x' 2"),
        ("queues.jobs.JobFailed: no such customer\n", "JobFailed : no such customer 2"),
        ("Work-horse terminated unexpectedly; waitpid returned 9", "no exception : Work-horse terminated"),
        ("Moved to FailedJobRegistry, due to AbandonedJobError, at 1", "AbandonedJobError : Moved"),
        (f"{TRACEBACK}KeyError: {random.Random(1).randbytes(32768).hex()}", "(too long to be read here) 2"),
        ("", "no exception 2"),
        (None, "no exception 2"),
    ],
)
def test_failed_jobs_are_grouped_by_task_and_exception(
    redis_server: RedisServer, client: Redis, told: str | None, shown: str
) -> None:
    pages = Pages.of(redis_server.url, show_addresses=False)
    for task in ("report", "report", "other"):
        failed_job(client, told, task)
    odd = failed_job(client, "")
    client.set("rq:results:odd", 1)
    client.hset(f"rq:job:{odd}", "ended_at", "<i>")
    page = pages.get("/mail/failures")
    assert f"report {shown}" in words(page).replace("no exception 3", "no exception 2")
    assert not re.search("<b>|<i>", page)


def test_jobs_of_one_exception_are_queued_again_and_no_others(pages: Pages, client: Any) -> None:
    ids = {failed_job(client, f"{TRACEBACK}KeyError: {number}") for number in range(3)}
    failed_job(client, f"{TRACEBACK}ValueError")
    failed_job(client, f"{TRACEBACK}KeyError: 1", "other")
    path = "/mail/failures/jobs"
    assert pages.text(f"{path}?task=report&error=KeyError").startswith("Requeue 3 jobs?")
    assert "3 jobs are queued again" in pages.post(path, task="report", error="KeyError").text
    assert {one.decode() for one in client.lrange(keys.queue("jobs"), 0, -1)} == ids
    assert client.zcard(keys.failed("jobs")) == 2
    assert pages.browser.get(path).headers["Location"] == "/mail/failures"
