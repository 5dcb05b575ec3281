"""The suppression list: what is on it, what adds to it, and how a mail obeys it."""

from __future__ import annotations

from typing import Any

import fakeredis
import pytest

from mail.index import raw_id
from mail.outbox import Outbox
from mail.suppression import BOUNCE, MANUAL, Suppressions

SOURCE = "01940000-0000-7000-8000-000000000000"


@pytest.fixture
def client() -> fakeredis.FakeRedis:
    return fakeredis.FakeRedis()


def test_an_address_is_on_the_list_once_in_capitals_or_not_until_it_is_taken_off(outbox: Outbox) -> None:
    listed = outbox.suppressions
    first = listed.add("Ada@Example.com", BOUNCE, SOURCE, "550 at rcpt")
    assert [listed.add("ada@example.com", MANUAL), listed.size()] == [first, 1]
    found = listed.find(first)
    assert found
    assert found[:] == (first, BOUNCE, SOURCE, "550 at rcpt", "")
    assert listed.find("ADA@example.com") == found._replace(email="ada@example.com")  # who asks has named it
    assert listed.among(["adA@example.com", "eve@example.com"]) == {"adA@example.com"}
    assert [listed.remove("ada@example.com"), listed.remove("ada@example.com", first), listed.size()] == [
        [first],
        [],
        0,
    ]
    assert [listed.page(9), listed.find(first), listed.find("x"), listed.among([])] == [[], None, None, set()]


def test_the_list_is_paged_newest_first_and_holds_no_address_but_where_that_is_wanted(
    outbox: Outbox, client: Any
) -> None:
    listed = outbox.suppressions
    ids = listed.add_all([f"{one}@example.com" for one in "abc"], MANUAL)
    assert b"example" not in client.dump("mail:suppressed") + client.dump("mail:suppressions")
    own = raw_id(ids[1]) or b""
    pages = [listed.page(9), listed.page(1), listed.page(9, below=own), listed.page(1, above=own, upwards=True)]
    assert [[ids.index(one.id) for one in page] for page in pages] == [[2, 1, 0], [2], [0], [2]]
    kept = Suppressions(outbox.store, outbox.index, keep_addresses=True)
    kept.add("Ünal@example.com", MANUAL)
    assert [one.email for one in kept.page(2)] == ["ünal@example.com", ""]


def test_what_is_no_list_keeps_no_mail_from_anybody(outbox: Outbox, client: Any) -> None:
    client.set("mail:suppressed", "x")
    assert outbox.suppressions.among(["ada@example.com"]) == set()
