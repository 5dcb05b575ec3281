"""The pages at /mail/: what browsers are told about them, what is escaped, and how addresses are shown."""

from __future__ import annotations

import re
import time

import pytest

from mail import figures
from mail.claim import iso
from mail.states import State
from ops.page.words import ago, mailbox, masked, soon
from queues import keys
from tests.mails import claim
from tests.pages import Pages
from tests.servers import RedisServer


@pytest.fixture
def pages(client: object, redis_server: RedisServer) -> Pages:
    return Pages.of(redis_server.url)


def test_no_page_is_cached_or_runs_or_loads_what_is_not_ours(pages: Pages) -> None:
    answer = pages.browser.get("/mail/activity")
    policy = answer.headers["Content-Security-Policy"]
    assert "unsafe" not in policy
    assert policy.startswith("default-src 'none'")
    assert (answer.headers["Cache-Control"], answer.headers["X-Frame-Options"]) == ("no-store", "DENY")
    files = [part.split('"')[0] for part in answer.text.split('="/mail/page.')[1:]]
    assert len(files) == 2
    for name in files:
        served = pages.browser.get(f"/mail/page.{name}")
        assert (served.status_code, served.headers["Cache-Control"]) == (200, "max-age=31536000")
    assert pages.browser.get("/mail/view.py").status_code == 404


def test_what_a_mail_holds_is_text_on_the_page(pages: Pages) -> None:
    pages.accept(subject="<script>alert(1)</script>", to=['"<i>Eve</i>" <eve@example.com>'])
    shown = pages.get("/mail/activity")
    assert "&lt;script&gt;alert(1)" in shown
    assert "<script>alert" not in shown
    assert "<i>" not in shown


def test_addresses_are_masked_where_they_are_to_be(redis_server: RedisServer, pages: Pages) -> None:
    later = pages.accept(to=["Ada Lovelace <ada@example.com>"], subject="For Ada@example.org", scheduled_at="in 2 days")
    for path in ("/mail/activity", "/mail/scheduled", f"/mail/emails/{later}"):
        seen = pages.text(path)
        assert "Ada Lovelace <ada@example.com>" in seen
        assert "For Ada@example.org" in seen
        shown = Pages.of(redis_server.url, show_addresses=False).get(path)
        assert "a…@example.com" in shown
        assert "For A…@example.org" in shown
        assert not re.search("ada", shown, re.IGNORECASE)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("550 5.1.1 <ada@example.com>: no such user", "550 5.1.1 <a…@example.com>: no such user"),
        ("ada@example.com,bob@example.org", "a…@example.com,b…@example.org"),
        ("250 OK", "250 OK"),
        pytest.param("a" * 64_000, "a" * 64_000, id="long"),  # a header's value; in time that grows with it alone
    ],
)
def test_a_relays_words_lose_their_addresses(text: str, shown: str) -> None:
    assert masked(text) == shown


def test_a_mailbox_keeps_no_name_where_it_is_masked() -> None:
    assert mailbox('"Ada" <ada@example.com>', show=False) == "a…@example.com"
    assert mailbox("not an address", show=False) == "not an address"
    assert ago(None) == ""
    assert [re.sub("<.*?>", "", soon(time.time() + seconds)) for seconds in (200, -200)] == ["in 3 min", "now"]


def test_the_front_page_says_whether_all_is_well_and_counts_today(pages: Pages) -> None:
    pages.accept(subject="not on this page")
    shown = pages.text("/mail/")
    assert shown.startswith("No worker runs, so no mail goes out. 1 mail waits, none is lost.")
    assert "1 accepted yesterday 0" in shown
    assert "1 waiting now" in shown
    assert [words for words in ("Mails a minute", "Mails an hour") if words in shown] == ["Mails a minute"]
    assert "Mails an hour" in pages.text("/mail/?span=3d")
    assert "Mails a minute" in pages.text("/mail/?span=%3Cb%3E")


def test_what_happened_is_marked_in_the_charts(pages: Pages) -> None:
    figures.mark(pages.outbox.jobs.redis, "redis_restarted", "<7.2.4>")
    page = pages.get("/mail/")
    assert ": Redis restarted &lt;7.2.4&gt;</title>" in page
    assert "</time> Redis restarted &lt;7.2.4&gt;.</p>" in page


def test_the_last_word_is_about_what_failed(pages: Pages) -> None:
    mail_id = pages.accept(to=["ada@example.com", "bob@example.com"])
    taken = claim(pages.outbox, mail_id)
    taken.attempts.append({"at": iso(0), "phase": "dot", "code": 250, "text": "queued as 7", "verdict": "accepted"})
    taken.settle(State.FAILED, reason="550 at rcpt")
    pages.outbox.jobs.redis.hset(keys.job(mail_id), "status", "failed")
    shown = pages.text("/mail/activity")
    assert "550 at rcpt" in shown
    assert "queued as 7" not in shown
    died = pages.accept()
    taken = claim(pages.outbox, died)
    taken.attempts.append({"at": iso(0), "verdict": "interrupted", "text": "the worker died in this attempt"})
    taken.settle(State.FAILED, reason="its worker died in every attempt")
    pages.outbox.jobs.redis.hset(keys.job(died), "status", "failed")
    assert "its worker died in every attempt" in pages.text("/mail/activity")


def test_the_navigation_says_where_one_is(pages: Pages) -> None:
    mail_id = pages.accept()
    for path, name in (("", "Overview"), (f"emails/{mail_id}", "Activity"), ("templates/welcome", "Templates")):
        [here] = re.findall('<nav.*?aria-current="page">([^<]+)<', pages.get(f"/mail/{path}"), re.DOTALL)
        assert here == name
