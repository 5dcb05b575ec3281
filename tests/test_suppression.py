"""The suppression list: what is on it, what adds to it, and how a mail obeys it."""

from __future__ import annotations

import time
from typing import Any

import fakeredis
import pytest

from mail.claim import SUPPRESSED_RECIPIENTS
from mail.counters import totals
from mail.index import raw_id
from mail.outbox import Outbox
from mail.states import ALL_SUPPRESSED
from mail.suppression import BOUNCE, MANUAL, Suppressions
from queues.connection import Unavailable
from settings import load
from smtp.policy import Phase
from smtp.verdict import Reply
from tests.conversations import served
from tests.mails import BODY, accept, draft
from tests.servers import Api, House
from tests.test_deliver import delivers, told
from tests.test_verdict import OTHERS, REPLIES

SOURCE = "01940000-0000-7000-8000-000000000000"
B, C = BODY["to"]
GONE = "550 5.1.1 no such user"


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
    kept = Suppressions(outbox.store, outbox.index, load(from_file={}, keep_suppressed_addresses=True))
    kept.add("Ünal@example.com", MANUAL)
    assert [one.email for one in kept.page(2)] == ["ünal@example.com", ""]


def test_what_is_no_list_keeps_no_mail_from_anybody(outbox: Outbox, client: Any) -> None:
    client.set("mail:suppressed", "x")
    assert outbox.suppressions.among(["ada@example.com"]) == set()


NO_ADDRESS = {  # of the replies that the judgement of SMTP is tested with; what all others say is something else
    ("Microsoft 365", "5.1.10"), ("Outlook.com", "5.5.0"), ("Exchange on premises", "5.1.1"), ("Gmail", "5.1.1"),
    ("Exim", "Unrouteable"), ("cPanel/Exim", "No"), ("Postfix", "5.1.1"), ("OpenSMTPD", "Invalid"),
    ("", "delivery"), ("", "5.1.1"), ("", "sorry,"),
}  # fmt: skip


def test_no_such_user_is_told_from_every_other_refusal() -> None:
    known = [(Phase(one["phase"]), one["code"], one["text"], one["who"]) for one in REPLIES]
    known += [(phase, str(code or "none"), text, "") for phase, code, text, _ in OTHERS]
    found = {
        (who, text.split()[0])
        for phase, code, text, who in known
        if Reply(phase, None if code == "none" else int(code), text).is_no_address
    }
    assert found == NO_ADDRESS


@pytest.mark.parametrize(
    ("code", "text", "none"),
    [
        (550, "5.1.1 <x@example.com>: Recipient address rejected: User unknown in relay recipient table", True),
        (550, "5.1.1 <x@example.com>: Recipient address rejected: unverified address: host said: no mailbox", True),
        (551, "5.1.6 <x@example.com>: has moved", True),
        (556, "5.1.10 example.com does not accept mail", True),
        (550, "Requested action not taken: User not found", True),
        (550, "5.1.1 <relay-denied@spam.example>: no such user", True),
        (550, "5.1.1 recipient rejected by policy", False),
        (550, "5.1.1 unable to relay to this user unknown", False),
        (550, "5.1.0 Address rejected", False),
        (450, "4.1.1 user unknown", False),
        (550, "5.1.8 unknown sender address", False),
    ],
)
def test_words_of_policy_outdo_a_code_that_servers_use_for_anything(code: int, text: str, none: bool) -> None:
    assert Reply(Phase.RCPT, code, text).is_no_address == none


@pytest.mark.parametrize("stored", [b"", b"x" * 5, b"\xff" * 90, bytes(16) + b"b" + b"\xff" * 16 + b"\0\0\0"])
def test_an_entry_that_is_damaged_is_shown_all_the_same(outbox: Outbox, client: Any, stored: bytes) -> None:
    client.hset("mail:suppressed", b"d" * 16, stored)
    client.zadd("mail:suppressions", {bytes(16) + b"d" * 16: 0, b"short": 0})
    assert [len(one.created_at) for one in outbox.suppressions.page(9)] == [29] * bool(stored)


@pytest.mark.parametrize(
    ("phase", "reply", "to", "added"),
    [
        ("RCPT", [GONE, "250 ok"], "", {B}),
        ("RCPT", ["553 sorry, no mailbox here by that name. (#5.1.1)", "250 ok"], "", {B}),
        ("RCPT", ["550 5.7.1 no such user, by policy", "250 ok"], "", set()),
        ("RCPT", ["550 5.2.1 disabled", "452 4.2.2 full"], "", set()),
        ("MAIL", GONE, "", set()),  # about the sender
        (".", GONE, "", set()),  # about one of them
        (".", GONE, "one@example.com", {"one@example.com"}),
        ("RCPT", GONE, "redirected@example.com", set()),  # which stands for another
    ],
)
def test_an_address_is_added_when_the_relay_says_that_there_is_none(
    outbox: Outbox, phase: str, reply: Any, to: str, added: set[str]
) -> None:
    settings = load(from_file={}, mail_redirect_to="redirected@example.com" if to.startswith("redirected") else None)
    outbox = Outbox(outbox.jobs, settings)
    mail_id = accept(outbox, to=to or BODY["to"])
    with served({phase: reply}) as (_, relay):
        told(delivers(outbox, relay), mail_id)
    assert outbox.suppressions.among([B, C, to]) == added
    for one in outbox.suppressions.page(9):
        assert (one.origin, one.source_id, one.reason[4:]) == (BOUNCE, mail_id, one.reason[4:])


@pytest.mark.parametrize(
    ("listed", "more", "state", "statuses", "asked"),
    [
        ([B], {}, "sent", ["suppressed", "accepted"], [C]),
        ([B, C], {}, "suppressed", ["suppressed"] * 2, []),
        ([B, C], {"skip_suppression": True}, "sent", ["accepted"] * 2, [B, C]),
        ([B, C], {"test": True}, "sent", ["accepted"] * 2, []),
    ],
)
def test_a_suppressed_recipient_is_left_out_and_reported(
    outbox: Outbox, listed: list[str], more: dict[str, Any], state: str, statuses: list[str], asked: list[str]
) -> None:
    outbox.suppressions.add_all(listed, MANUAL)
    mail_id = outbox.accept([draft()._replace(**more)]).id
    with served() as (there, relay):
        assert told(delivers(outbox, relay), mail_id) == state
    outbox.jobs.redis.delete(f"rq:job:{mail_id}")  # which RQ would have ended
    seen = outbox.read(mail_id)
    assert [one["status"] for one in seen["recipients"]] == statuses
    assert (seen["last_event"], seen["reason"]) == (state, ALL_SUPPRESSED if state == "suppressed" else None)
    assert [one[9:-1] for one in there.commands if one.startswith("RCPT")] == asked
    assert totals(outbox.jobs.redis)[SUPPRESSED_RECIPIENTS] == statuses.count("suppressed")
    assert not list(outbox.failures(0))


def test_a_suppressed_mail_is_sent_once_its_address_is_off_the_list_and_a_person_asks(
    outbox: Outbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    outbox.suppressions.add_all([B, C], MANUAL)
    mail_id = accept(outbox)
    with served() as (there, relay):
        made = delivers(outbox, relay)
        assert [told(made, mail_id), told(made, mail_id)] == ["suppressed"] * 2
        outbox.suppressions.remove(B, C)
        outbox.jobs.redis.delete(f"rq:job:{mail_id}")
        outbox.requeue(mail_id)
        assert outbox.read(mail_id)["status"] == "queued"
        monkeypatch.setattr("mail.delivery.queued_at", lambda: time.time() + 1)
        assert told(made, mail_id) == "sent"
    assert len(there.accepted) == 1


def test_while_others_are_put_off_a_suppressed_recipient_waits_with_them(outbox: Outbox, client: Any) -> None:
    outbox.suppressions.add(B, MANUAL)
    mail_id = accept(outbox)
    with served({"RCPT": ["451 4.7.1 later", "250 ok", "250 ok"]}) as (there, relay):
        made = delivers(outbox, relay)
        assert told(made, mail_id) == "delayed"
        waiting = [(one["status"], one["text"]) for one in outbox.read(mail_id)["recipients"]]
        assert waiting[0] == ("pending", "on the suppression list")  # a word that an earlier version knows
        outbox.suppressions.remove(B)
        assert told(made, mail_id) == "sent"
    assert [one[9:-1] for one in there.commands if one.startswith("RCPT")] == [C, B, C]


def test_an_empty_list_costs_no_round_trip(outbox: Outbox, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Suppressions, "among", lambda _, addresses: pytest.fail("asked") if addresses else set())
    with served() as (_, relay):
        assert told(delivers(outbox, relay), accept(outbox)) == "sent"


def test_the_relays_word_is_written_down_also_where_the_list_cannot_be_added_to(
    outbox: Outbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    def away(*_: object) -> None:
        raise Unavailable("away")

    monkeypatch.setattr(Suppressions, "words", away)
    with served({"RCPT": [GONE, "250 ok"]}) as (_, relay):
        assert told(delivers(outbox, relay), accept(outbox)) == "failed"


# --- the routes ------------------------------------------------------------------------------------------------------


def test_the_list_is_kept_by_resends_routes(api: Api) -> None:
    added = api.post("/suppressions/batch/add", {"emails": [f"{one}@Example.com" for one in "abc"]})
    ids = [one["id"] for one in added.body["data"]]
    assert (added.status, len(set(ids))) == (201, 3)
    again = api.post("/suppressions", {"email": "A@example.com"})
    assert (again.status, again.body) == (201, {"object": "suppression", "id": ids[0]})

    def listed(query: str) -> tuple[list[int], bool]:
        seen = api.get(f"/suppressions?{query}").body
        return [ids.index(one["id"]) for one in seen["data"] if one["id"] in ids], seen["has_more"]

    assert [listed("limit=3"), listed("limit=2")[0], listed(f"after={ids[1]}&limit=1")[0]] == [
        ([2, 1, 0], False),
        [2, 1],
        [0],
    ]
    assert [listed(f"before={ids[0]}"), listed(f"before={ids[0]}&limit=1")] == [([2, 1], False), ([1], True)]
    assert [listed("origin=manual&limit=2"), listed("origin=bounce")] == [([2, 1], True), ([], False)]
    shown = api.get("/suppressions/a%40example.com").body
    assert [shown[name] for name in ("object", "id", "email", "origin", "source_id")] == [
        *("suppression", ids[0], "a@example.com", "manual", None),
    ]
    assert api.get(f"/suppressions/{ids[0]}").body["email"] == ""
    assert api.call("DELETE", "/suppressions/a@EXAMPLE.com").body == {**again.body, "deleted": True}
    assert api.call("DELETE", f"/suppressions/{ids[0]}").status == 404
    removed = api.post("/suppressions/batch/remove", {"ids": [ids[0], ids[1], ids[2]]}).body["data"]
    assert [one["id"] for one in removed] == ids[1:]


@pytest.mark.parametrize(
    ("method", "path", "body", "status"),
    [
        ("POST", "/suppressions", {"email": "nobody"}, 422),
        ("POST", "/suppressions/batch/remove", {}, 422),
        ("POST", "/suppressions/batch/remove", {"ids": ["x"], "emails": ["a@example.com"]}, 422),
        ("GET", "/suppressions?after=x", None, 422),
        ("GET", f"/suppressions?after={SOURCE}&before={SOURCE}", None, 422),
        ("GET", "/suppressions/nobody@", None, 404),
        ("GET", "/suppressions/a/b@example.com", None, 404),
        ("DELETE", f"/suppressions/{SOURCE}", None, 404),
    ],
)
def test_what_is_no_address_and_no_entry_is_refused(api: Api, method: str, path: str, body: Any, status: int) -> None:
    assert api.call(method, path, body).status == status


def test_only_a_key_of_scope_full_sends_to_suppressed_addresses(api: Api) -> None:
    mail = {**BODY, "skip_suppression": True}
    assert api.post("/emails", mail).status == 200
    refused = Api(api.port, "send-key").post("/emails", mail)
    assert (refused.status, refused.body["type"]) == (403, "field_not_allowed")
    assert Api(api.port, "send-key").post("/emails", BODY).status == 200


def test_no_address_of_the_list_is_logged(api: Api, house: House) -> None:
    api.call("DELETE", "/suppressions/very.private@example.com")
    api.call("DELETE", "/suppressions/very.private@example.com/nothing?x=very.private")
    assert "very.private" not in house.log("api")
    assert "/suppressions/<id_or_email:path>" in house.log("api")
