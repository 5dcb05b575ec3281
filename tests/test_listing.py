"""`GET /emails`: what is in the list, in which order, for whom; and the index behind it."""

from __future__ import annotations

import time
import uuid
from typing import Any
from urllib.parse import urlencode

import pytest

from mail import index, listing
from mail.claim import iso
from mail.draft import prepare
from mail.listing import STATES, Wanted
from mail.outbox import Outbox
from mail.states import LETTERS, RETURNED, State
from mail.sweep import sweep
from tests.http_api import MAIL, fields, submitted
from tests.mails import claim
from tests.servers import Api

SETTINGS = {"API_PROCESSES": "1"}  # for a minute after a FLUSHALL, each has a secret of its own
NOTHING: dict[str, Any] = {"object": "list", "has_more": False, "data": []}


def listed(api: Api, *more: tuple[str, object], **query: object) -> list[str]:
    answer = api.get(f"/emails?{urlencode([*query.items(), *more])}")
    assert answer.status == 200, answer
    return [mail["id"] for mail in answer.body["data"]]


def paged(api: Api, **query: object) -> list[str]:
    """All pages of two, one after the other as Resend's clients turn them."""
    seen = listed(api, limit=2, **query)
    while api.get(f"/emails?{urlencode(query | {'limit': 2, 'after': seen[-1]})}").body["data"]:
        seen += listed(api, limit=2, after=seen[-1], **query)
    return seen


def submit(api: Api, **fields: object) -> str:
    return api.submit(MAIL | fields)


def test_the_newest_is_the_first_and_every_page_goes_on_where_the_last_ended(api: Api, client: Any) -> None:
    assert api.get("/emails").body == NOTHING
    batch = [one["id"] for one in api.post("/emails/batch", [MAIL] * 4).body["data"]]
    ids = [submit(api), *reversed(batch)]
    answer = api.get("/emails").body
    assert [mail["id"] for mail in answer["data"]] == ids
    assert answer["has_more"] is False
    assert set(api.get(f"/emails/{ids[0]}").body) - set(answer["data"][0]) == {
        *("object", "html", "text", "recipients", "attempts")
    }
    assert paged(api) == ids
    assert api.get("/emails?limit=5").body["has_more"] is False
    assert api.get("/emails?limit=4").body["has_more"] is True
    assert listed(api, before=ids[-1], limit=2) == ids[-3:-1]  # those next to it, not the newest of all
    assert api.get(f"/emails?before={ids[0]}").body == NOTHING


def test_what_becomes_of_a_mail_moves_it_from_list_to_list_and_it_is_in_one_at_a_time(
    api: Api, client: Any, outbox: Outbox
) -> None:
    states: dict[State, str] = {state: submit(api) for state in State}
    for state, mail_id in states.items():
        if state not in (State.QUEUED, State.CANCELED):
            attempt = claim(outbox, mail_id)
            client.hset(f"rq:job:{mail_id}", "status", "started")
            if state != State.SENDING:
                client.hset(f"rq:job:{mail_id}", "status", "scheduled" if state == State.DELAYED else "failed")
                attempt.settle(State.SENT if state in RETURNED else state, reason="x")
            if state in RETURNED:
                outbox.store.run("become(ARGV[1], ARGV[2], nil, nil, {'reason', 'x'})", [], [mail_id, state])
    outbox.cancel(states[State.CANCELED])
    later = submit(api, scheduled_at="in 2 hours")
    for name in STATES:
        assert listed(api, status=name) == [later if name == "scheduled" else states[State(name)]]
    assert sorted(listed(api)) == sorted([later, *states.values()])
    outbox.reschedule(later, time.time() - 1)
    claim(outbox, later)
    by_cause = client.zlexcount("mail:index", "[r", "(s")
    assert client.zcard("mail:index") - by_cause == 2 * len(listed(api))  # by its state, and by its recipient
    assert len(set(LETTERS.values())) == len(LETTERS) == len(STATES)


def test_a_list_has_one_recipient_tag_or_time_or_all_of_them(api: Api, client: Any) -> None:
    tags = [{"name": "kind", "value": "login"}]
    ada, both = submit(api), submit(api, to=["Ada@Example.com", "b@example.com"], tags=tags)
    hidden = submit(api, to="c@example.com", bcc="ada@example.com")
    login = submit(api, to="d@example.com", tags=[*tags, {"name": "other", "value": "login"}])
    assert listed(api, to="ada@example.com") == [hidden, both, ada]
    assert listed(api, to="Ada <ADA@example.com>", tag="kind:login") == [both]
    assert listed(api, tag="kind:login") == [login, both]
    assert listed(api, tag="kind:login", status="sent") == []
    assert paged(api, to="ada@example.com") == [hidden, both, ada]
    assert listed(api, to="nobody@example.com") == []
    moment = api.get(f"/emails/{both}").body["created_at"]
    assert listed(api, after=moment)[-1] in (both, ada)  # a millisecond may hold both
    assert both in listed(api, after=moment)
    assert ada in listed(api, before=iso(time.time() + 1))
    assert listed(api, before="2026-11-21 12:30:00+00:00") == []
    assert listed(api, ("after", login), ("after", "2026-11-21T12:30:00Z"), limit=1) == [hidden]
    members = [one for one, _ in client.zscan_iter("mail:index")]
    assert not [one for one in members if b"ada" in one.lower() or b"login" in one]


def test_the_shortest_list_is_looked_through(outbox: Outbox) -> None:
    for to in ["b@example.com", *["a@example.com"] * 19]:
        body = MAIL | {"to": to, "from": "a@example.com", "tags": [{"name": "a", "value": "b"}]}
        outbox.accept([prepare(body, default_sender=None, max_recipients=1)])
    found = outbox.index
    of_b, of_a, tagged = found.of_address("b@example.com"), found.of_address("a@example.com"), index.of_tag("a:b")
    assert [found.size([one]) for one in (of_b, of_a, tagged)] == [1, 19, 20]
    for query, place in (
        (Wanted(to="b@example.com", tag="a:b"), of_b),
        (Wanted(to="a@example.com", tag="a:b"), of_a),
        (Wanted(tag="a:b", states=frozenset({"failed"})), index.of_state("failed", "")),
        (Wanted(tag="a:b", places=([of_a, of_b], [of_b])), of_b),
        (Wanted(tag="a:b", key="send"), index.of_state("queued", "send")),
    ):
        assert place in listing._prefixes(outbox, query)


def test_a_key_that_may_not_see_all_mail_sees_its_own(api: Api, client: Any) -> None:
    shop = Api(api.port, "send-key")
    everything = [submit(one) for one in (api, shop, api, shop)][::-1]
    assert listed(api) == everything
    assert listed(shop) == listed(shop, to=MAIL["to"]) == listed(shop, status="queued") == everything[::2]
    assert paged(shop) == everything[::2]
    assert shop.get("/emails?limit=1").body["has_more"] is True


WRONG = {
    "limit": ["0", "101", "-1", "x", "", "1e1", "٣"],
    "after": ["x", "", "00000000-0000-4000-8000-000000000000", "2026-11-21", "tomorrow"],
    "to": ["", "x", "a@b.example,c@d.example"],
    "status": ["done", "SENT", ""],
    "tag": ["kind", "kind:", "a b:c", ""],
    "form": ["a@example.com"],
}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in WRONG.items() for value in values])
def test_what_cannot_be_listed_is_refused_by_its_name(api: Api, name: str, value: str) -> None:
    answer = api.get(f"/emails?{urlencode({name: value})}")
    assert (answer.status, answer.body["name"]) == (422, "validation_error")
    assert fields(answer) == [name]
    assert "Input" not in answer.body["message"]  # pydantic's words


def test_what_contradicts_itself_is_refused(api: Api) -> None:
    one, other = str(uuid.UUID(int=7 << 76 | 2 << 62)), str(uuid.UUID(int=7 << 76 | 2 << 62 | 1))
    for query in (f"after={one}&before={one}", f"after={one}&after={other}", "limit=1&limit=2", f"after={one}&" * 3):
        assert api.get(f"/emails?{query}").status == 422, query


def test_what_is_stored_is_damaged_or_gone_is_left_out(api: Api, client: Any, outbox: Outbox) -> None:
    kept, gone, damaged, other = (submitted(api, "/emails") for _ in range(4))
    client.delete(f"mail:{gone}", f"mail:{other}")
    client.set(f"mail:{other}", "no mail")
    client.hset(f"mail:{damaged}", "outline", "{")
    assert listed(api) == listed(api, to=MAIL["to"]) == [kept]


def test_the_sweep_drops_what_belongs_to_mails_that_are_no_longer_kept_and_nothing_else(
    outbox: Outbox, api: Api, client: Any
) -> None:
    ids = [submitted(api, "/emails") for _ in range(6)]
    client.delete(*(f"mail:{one}" for one in ids[::2]))
    index.trim(outbox.store, time.time() - 3600)  # they are too new to be looked at
    assert client.zcard("mail:index") == 12
    for _ in range(2):  # each call goes on where the last has ended, and then from the beginning
        index.trim(outbox.store, time.time() + 1)
        assert {uuid.UUID(bytes=one[-16:]) for one in client.zrange("mail:index", 0, -1)} == {
            *map(uuid.UUID, ids[1::2])
        }
    submitted(api, "/emails")
    client.delete(f"mail:{ids[1]}")
    settings = outbox.settings.model_copy(update={"retain_sent": -1})
    for _ in range(2):
        list(sweep(Outbox(outbox.jobs, settings)))
    assert client.zcard("mail:index") == 6


def test_a_mail_that_an_earlier_version_accepted_is_sent_and_in_no_list(outbox: Outbox, api: Api, client: Any) -> None:
    old, new = str(uuid.uuid4()), submitted(api, "/emails")
    client.rename(f"mail:{new}", f"mail:{old}")
    claim(outbox, old).settle(State.SENT)
    assert outbox.read(old)["status"] == "sent"
    assert client.zcard("mail:index") == 2
    assert listed(api) == []


def test_ids_are_in_the_order_in_which_they_were_made() -> None:
    ids = [index.new_id() for _ in range(10_000)]
    assert sorted(ids) == ids
    assert {uuid.UUID(one).version for one in ids} == {7}
    assert index.first_id(time.time() - 60) < uuid.UUID(ids[0]).bytes < index.first_id(time.time() + 60)


def test_a_secret_that_is_lost_is_made_anew_and_all_processes_use_the_same(outbox: Outbox, client: Any) -> None:
    first, second = index.Index(client), index.Index(client)
    assert first.of_address("a@example.com") == second.of_address("A@EXAMPLE.com")
    client.flushall()
    second._secret = (second._secret[0], time.monotonic() - index.SECRET_FOR - 1)
    assert second.of_address("a@example.com") == first.of_address("a@example.com")
    assert client.get("mail:secret") == second._secret[0]
    client.config_set("maxmemory", 1)
    assert index.Index(client).of_address("a@example.com") == first.of_address("a@example.com")
    client.config_set("maxmemory", 0)
