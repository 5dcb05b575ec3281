"""The list of mails on its page: what a search finds, what its URL holds, where it goes on, and what waits for when."""

from __future__ import annotations

import json
import re
import time
from datetime import datetime, timedelta
from html.parser import HTMLParser
from pathlib import Path
from typing import Any, cast
from urllib.parse import quote, unquote

import pytest

from mail.claim import iso
from mail.states import State
from ops.page import activity, scheduled
from tests.mails import claim
from tests.pages import Pages
from tests.servers import RedisServer

HOSTILE = [line.partition("\t")[2] for line in Path(__file__).with_name("hostile_html.tsv").read_text().splitlines()]
ADA: dict[str, Any] = {"to": ["Ada Lovelace <ada@Mail.example.com>"], "bcc": ["eve@example.org"]}
ADA["subject"] = "Ihre Größe: 7"
RESET: dict[str, Any] = {"from": "Shop <noreply@shop.example>", "tags": [{"name": "kind", "value": "reset"}]}
RESET["subject"] = "Reset it"


@pytest.fixture
def pages(client: Any, redis_server: RedisServer) -> Pages:
    return Pages.of(redis_server.url)


def found(pages: Pages, asked: str) -> list[str]:
    """The ids on the page that a search ends at."""
    answer = pages.post("/mail/search", q=asked)
    assert answer.status_code == 303, answer.text
    return shown(pages.get(answer.headers["Location"]))


def shown(page: str) -> list[str]:
    return re.findall(r'href="/mail/emails/([0-9a-f-]{36})"', page)


def link(page: str, text: str) -> str:
    [href] = re.findall(rf'<a[^>]* href="([^"]+)"[^>]*>{text}', page)
    return str(href).replace("&amp;", "&")


def test_each_term_finds_its_mails(pages: Pages) -> None:
    ada, reset, plain = pages.accept(**ADA), pages.accept(**RESET), pages.accept()
    claim(pages.outbox, plain).settle(State.UNKNOWN, reason="421 at dot")
    pages.outbox.jobs.redis.hset(f"rq:job:{plain}", "status", "failed")
    later = pages.accept(scheduled_at=iso(time.time() + 3600), key="shop")
    for asked, ids in {
        "  ": [later, plain, reset, ada],
        "to:ADA@mail.example.com": [ada],
        "eve@example.org": [ada],
        "to:example.com": [later, plain, reset, ada],
        "to:mail.example.com": [ada],
        "to:ample.com": [],
        "to:lovelace": [ada],
        "to:b to:example.com": [later, plain, reset],
        "to:b@example.com tag:kind:reset": [reset],
        "from:shop.example": [reset],
        "from:NOREPLY@shop.example": [reset],
        "from:shop": [reset],
        "from:lovelace": [],
        "grösse 7": [ada],
        "subject:größe reset": [],
        "tag:kind:reset": [reset],
        "tag:kind:reset tag:a:b": [],
        "state:queued": [reset, ada],
        "state:IN-DOUBT,scheduled": [later, plain],
        "state:waiting subject:reset": [reset],
        "key:shop": [later],
        "key:nobody": [],
        "reason:AT reason:421": [plain],
        'reason:"dot 421" state:in-doubt to:b': [plain],
        "reason:dot state:failed": [],
        "reason:421 tag:kind:reset": [],
        "reason:auth": [],
        "after:today": [later, plain, reset, ada],
        "before:5m": [],
        "after:2126-01-01": [],
    }.items():
        assert found(pages, asked) == ids, asked
    assert "ada@mail.example.com> +1 Ihre" in pages.text("/mail/activity")
    for asked in (ada, f"id:{ada.upper()}", f"<{ada}@example.com>"):
        assert pages.post("/mail/search", q=asked).headers["Location"] == f"/mail/emails/{ada}"


def test_the_url_of_a_search_holds_no_address_and_no_subject(pages: Pages, redis_server: RedisServer) -> None:
    ada = pages.accept(**ADA)
    asked = "to:ada@mail.example.com lovelace from:a@example.com größe"
    typed = pages.post("/mail/search", q=asked.replace("lovelace", "to:lovelace")).headers["Location"]
    by_hand = pages.browser.get(f"/mail/activity?q={quote('Größe to:ada@mail.example.com')}")
    assert by_hand.status_code == 303
    for url in map(unquote, (typed, by_hand.headers["Location"])):
        assert re.fullmatch(r"/mail/activity\?q=((to|from|subject):~[0-9a-f]{16}~?\+?)+", url)
    page = pages.get(typed)
    assert shown(page) == [ada]
    assert 'value="to:ada@mail.example.com to:lovelace from:a@example.com grösse"' in page
    for other in re.findall(r'href="(/mail/activity[^"]*)"', page):
        assert not re.search("ada|lovelace|gr", other), other
    masked = Pages.of(redis_server.url, show_addresses=False).get(typed)
    assert shown(masked) == [ada]
    assert not re.search("ada@|lovelace|a@example", masked, re.IGNORECASE)
    assert "a…@mail.example.com" in masked


def test_what_is_not_understood_is_told_above_what_was_typed(pages: Pages) -> None:
    for answer in (pages.post("/mail/search", q="foo:<b> x"), pages.browser.get("/mail/activity?q=foo:%3Cb%3E+x")):
        assert answer.status_code == 400
        assert 'role="alert">foo: must be one of to:, from:' in answer.text
        assert 'value="foo:&lt;b&gt; x"' in answer.text
    assert pages.browser.post("/mail/search", data={"q": "x"}).status_code == 403  # from another site


def test_a_state_a_tag_a_key_and_a_saved_search_are_a_click(pages: Pages) -> None:
    reset = pages.accept(**RESET)
    pages.accept()
    page = pages.get(link(pages.get("/mail/activity"), "kind:reset"))
    assert shown(page) == [reset]
    assert shown(pages.get(link(page, '<span class="chip queued">'))) == [reset]
    assert link(page, '<span class="chip queued">') == "/mail/activity?q=tag:kind:reset+state:queued"
    for name, asked in activity.SAVED:
        called = name.replace(">", "&gt;")
        page = pages.get(link(page.partition("<main")[2], f"{called}</a>"))
        assert re.findall(r'aria-current="true">([^<]+)', page) == [called]
        assert f'value="{asked}"' in page


def test_pages_are_turned_and_a_search_goes_on_where_it_stopped(pages: Pages, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(activity, "SHOWN", 2)
    monkeypatch.setattr(activity, "LOOK", 3)
    first, *mails = [pages.accept(subject="needle" if n in (0, 4) else "hay") for n in range(12)]
    newest = pages.get("/mail/activity")
    assert shown(newest) == mails[:-3:-1]
    older = pages.get(link(newest, "Older"))
    assert shown(older) == mails[-3:-5:-1]
    assert shown(pages.get(link(pages.get(link(older, "Older")), "Newer"))) == shown(older)
    top = pages.get(f"/mail/activity?after={mails[-2]}")
    assert shown(pages.get(link(older, "Newer"))) == shown(top) == shown(newest)
    assert ">Newest<" not in top
    seen, page = list[str](), pages.get(pages.post("/mail/search", q="needle").headers["Location"])
    for _ in range(9):
        seen += shown(page)
        if ">Look further" not in page:
            break
        assert "Looked back to <time" in page
        page = pages.get(link(page, "Look further"))
    assert seen == [mails[3], first]
    assert ">Newest<" in page
    up = pages.get(f"{pages.post('/mail/search', q='needle').headers['Location']}&after={first}")
    assert "Looked up to <time" in up
    assert shown(pages.get(link(up, "Look further"))) == [mails[3]]


def structure(page: str) -> set[tuple[str, ...]]:
    """What a browser makes of a page: its elements with their attributes. Its links lead to our own pages."""
    seen, parser = set[tuple[str, ...]](), cast(Any, HTMLParser())

    def add(tag: str, attributes: list[tuple[str, str | None]]) -> None:
        seen.add((tag, *sorted(name for name, _ in attributes)))
        for name, value in attributes:
            assert name not in ("href", "src", "action") or re.match("/|#|data:image/svg", value or "")

    parser.handle_starttag = add
    parser.feed(page)
    return seen


def test_hostile_text_stays_text(pages: Pages) -> None:
    mail, later = pages.accept(**RESET), pages.accept(**RESET, scheduled_at=iso(time.time() + 3600))
    redis, paths = pages.outbox.jobs.redis, ("/mail/activity", "/mail/scheduled")
    outline: Any = redis.hget(f"mail:{mail}", "outline")
    for text in ["harmless", *HOSTILE]:
        told = json.loads(outline) | {"subject": text, "tags": [{"name": text, "value": text}]}
        told |= {name: [[text, text]] for name in ("to", "cc")}
        said = [{"code": 550, "text": text, "at": iso(time.time())}]
        for one in (mail, later):
            stored: Any = {"key": text, "reason": text, "outline": json.dumps(told), "attempts": json.dumps(said)}
            redis.hset(f"mail:{one}", mapping=stored)
        redis.hset(f"mail:{later}", "state", "delayed")
        pages_now = [pages.get(path) for path in paths] + [pages.post("/mail/search", q=f"foo:{text}").text]
        if text == "harmless":
            expected = list(map(structure, pages_now))
        assert list(map(structure, pages_now)) == expected, text


def test_what_waits_is_by_day_and_time(pages: Pages, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "No mail is scheduled" in pages.text("/mail/scheduled")
    noon = datetime.now().astimezone().replace(hour=12, minute=0, second=0, microsecond=0) + timedelta(days=1)
    days = [*[noon] * 5, noon + timedelta(days=6)]
    ids = [pages.accept(subject=f"mail {n}", scheduled_at=at.isoformat()) for n, at in enumerate(days)]
    put_off = pages.accept(subject="later")
    pages.outbox.jobs.redis.zadd("rq:scheduled:email", {put_off: time.time() - 120, "no mail": time.time() + 1})
    pages.outbox.jobs.redis.hset(f"rq:job:{put_off}", "status", "scheduled")
    claim(pages.outbox, put_off).settle(State.DELAYED, reason="450 <ada@example.com>", next_in=1)
    text = pages.text("/mail/scheduled")
    assert "The scheduler is 2 min late: 1 mail should be in the queue by now." in text
    assert re.search(f"Tomorrow 5 mails .*{days[5]:%A}, {days[5].day} {days[5]:%B} 1 mail ", text)
    assert "delayed: 450 <ada@example.com>" in text
    assert "ada@" not in Pages.of(pages.settings.redis, show_addresses=False).text("/mail/scheduled")
    tomorrow = pages.get(link(pages.get("/mail/scheduled"), "Tomorrow "))
    assert {*shown(tomorrow)} == {*ids}
    monkeypatch.setattr(scheduled, "SHOWN", 2)
    seen, page = list[str](), pages.get(link(pages.get("/mail/scheduled"), "Tomorrow "))
    for _ in range(2):
        seen += shown(page)
        page = pages.get(link(page, "Later"))
    seen += shown(page)
    assert (len(seen), {*seen}) == (6, {*ids})
    assert ">Later<" not in page
    assert pages.browser.get("/mail/scheduled?from=x&skip=-1").status_code == 200
