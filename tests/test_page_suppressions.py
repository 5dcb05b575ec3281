"""The page of the suppression list, and what a mail's page says of it."""

from __future__ import annotations

import re
import time
from typing import Any

import pytest
from redis import Redis

from mail.claim import Claim
from mail.states import ALL_SUPPRESSED, State, Status
from mail.suppression import BOUNCE, MANUAL
from ops.page import suppressions
from ops.page.audit import actions
from tests.pages import Pages
from tests.servers import RedisServer

ADA = "grace@example.com"


@pytest.fixture
def pages(redis_server: RedisServer, client: Redis) -> Pages:
    return Pages.of(redis_server.url)


def test_an_address_is_added_looked_up_and_taken_off_and_no_url_has_it(pages: Pages) -> None:
    path = "/mail/suppressions"
    assert "The list is empty." in pages.text(path)
    assert "It is not on the list" in pages.post(path, address=ADA, do="find").text
    assert pages.post(path, address="nobody", do="add").status_code == 400
    assert pages.post(path, address=f"Ada <{ADA}>", do="add").headers["Location"] == f"{path}?done=suppress"
    found = pages.post(path, address=ADA.upper(), do="find").headers["Location"]
    [entry] = pages.outbox.suppressions.page(2)
    assert found == f"{path}/{entry.id}"
    assert "a person or a program added it" in pages.text(found)
    assert f'href="{found}"' in pages.get("/mail/actions")
    assert pages.post(found).headers["Location"] == f"{path}?done=unsuppress"
    assert [pages.post(found).status_code, pages.browser.get(found).status_code] == [303, 303]
    assert [(one.what, one.id) for one in actions(pages.outbox.jobs.redis)] == [
        ("unsuppress", entry.id),
        ("suppress", entry.id),
    ]


@pytest.mark.parametrize(
    ("settings", "shown"),
    [
        ({}, "not kept"),
        ({"keep_suppressed_addresses": True}, ADA),
        ({"keep_suppressed_addresses": True, "show_addresses": False}, "g…@example.com"),
    ],
)
def test_the_list_shows_addresses_where_they_are_kept_and_shown(
    redis_server: RedisServer, client: Redis, settings: Any, shown: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(suppressions, "SHOWN", 2)
    pages = Pages.of(redis_server.url, **settings)
    mail_id = pages.accept()
    pages.outbox.suppressions.add_all([ADA, "b@example.com", "c@example.com"], BOUNCE, mail_id, "550 5.1.1 at rcpt")
    first = pages.get("/mail/suppressions")
    older = re.findall('rel="next" href="([^"]+)"', first)
    last = pages.get(older[0])
    assert [first.count("550 5.1.1 at rcpt"), last.count("550 5.1.1 at rcpt")] == [2, 1]
    assert shown in last
    assert (ADA in last) == (shown == ADA)
    assert f"/mail/emails/{mail_id}" in last


@pytest.mark.parametrize("both", [True, False])
def test_a_mails_page_says_who_is_on_the_list_and_leads_there(pages: Pages, both: bool) -> None:
    mail_id = pages.accept(to=[ADA, "b@example.com"])
    taken = pages.outbox.claim(mail_id, time.time() + 1)
    assert isinstance(taken, Claim)
    pages.outbox.suppressions.add(ADA, MANUAL)
    for one in taken.recipients:
        one.status = Status.SUPPRESSED if both or one.address == ADA else Status.ACCEPTED
    taken.settle(State.SUPPRESSED if both else State.SENT, reason=ALL_SUPPRESSED if both else "")
    pages.outbox.jobs.redis.hset(f"rq:job:{mail_id}", "status", "failed")
    text, page = pages.text(f"/mail/emails/{mail_id}"), pages.get(f"/mail/emails/{mail_id}")
    [entry] = pages.outbox.suppressions.page(2)
    assert page.count(f'href="/mail/suppressions/{entry.id}"') == 1
    said = "nothing was sent" if both else "1 of 2 recipients was left out, being on the suppression list."
    assert said in text
    assert ("Requeue it" in text, "take it off at" in text) == (both, both)
