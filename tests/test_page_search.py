"""What can be typed into the search box: what it means, what is refused and how, and what of it is in a URL."""

from __future__ import annotations

from datetime import datetime, timedelta, timezone

import pytest

from mail.causes import Cause, of_cause
from ops.page.search import NotUnderstood, Query, Term, moment, parse, sealed, unsealed, wanted, words

ID = "01a21bcd-dd4a-74c0-866f-cb96bd4300ba"
HEX = "0123456789abcdef"


@pytest.mark.parametrize(
    ("typed", "canonical"),
    [
        ("", ""),
        ("  ", ""),
        ("to:Ada@Example.com", "to:ada@example.com"),
        ("Ada@example.com", "to:ada@example.com"),
        ("Ada Lovelace <ada@example.com>", "to:ada@example.com"),
        ('FROM:"Ada <ada@example.com>"', "from:ada@example.com"),
        ("from:<ada@example.com>,", "from:ada@example.com"),
        ("to: ada@example.com  state: Failed", "to:ada@example.com state:failed"),
        ("to:@Example.com", "to:example.com"),
        ("to:bücher.example", "to:xn--bcher-kva.example"),
        ('to:"Ada Lovelace"', "to:ada to:lovelace"),
        (f"to:~{HEX} from:~{HEX}~ subject:~{HEX}", f"to:~{HEX} from:~{HEX}~ subject:~{HEX}"),
        ("Reset your PASSWORD", "reset your password"),
        ('"re: your invoice" subject:"No. 7"', "re your invoice no 7"),
        ("invoice invoice", "invoice"),
        ("state:unknown,Delayed", "state:in-doubt,delayed"),
        ('state:"in doubt"', "state:in-doubt"),
        ("tag:kind:reset tag:a:b", "tag:kind:reset tag:a:b"),
        ('key:"my shop"', 'key:"my shop"'),
        ('reason:"535 at Auth"', 'reason:"535 at auth"'),
        ('reason:"550 <ada@example.com>"', "reason:550"),
        (f"<{ID.upper()}@example.com>", f"id:{ID}"),
        (f"id:{ID}", f"id:{ID}"),
        ("after:yesterday before:14:00", "after:yesterday before:14:00"),
        ("after:2026-11-27T08:00:00+01:00", "after:2026-11-27T08:00:00+01:00"),
    ],
)
def test_what_is_asked_for_has_one_form_and_means_itself(typed: str, canonical: str) -> None:
    assert str(parse(typed)) == canonical
    assert parse(canonical) == parse(typed)


@pytest.mark.parametrize(
    ("typed", "told"),
    [
        ("foo:bar", "foo: must be one of to:, from:, subject:, state:, tag:, key:, id:, before:, after:"),
        ("Re: invoice", 'in double quotes, to be searched for in the subject: "Re: invoice"'),
        ('subject:"a b', '"a b must have a second "'),
        ('a "b', '"b must have a second "'),
        ("state:", "state: must be followed by what is searched for"),
        ('to:""', 'to:"" must be followed by'),
        (
            "state:done",
            "state:done must be one of queued, sending, delayed, sent, failed, in-doubt, canceled, ",
        ),
        ("state:sent state:failed", "state: must be given once"),
        ("to:a@b@c.example", "to:a@b@c.example is not an e-mail address"),
        ("to:a..example", "to:a..example must be an address, a domain, or a word of a name"),
        ("subject:!?", "subject:!? must have a letter or a digit"),
        ("tag:reset", "tag:reset must be a tag's name and value"),
        ("key:ada@example.com", "key:ada@example.com must have no @"),
        ("reason:<ada@example.com>", "must have a word that is no address"),
        ("id:12", "id:12 must be the whole id of a mail"),
        (f"{ID} invoice", "id: must stand alone"),
        ("before:2026-02-31", "before:2026-02-31 must be a day (2026-11-21)"),
        ("after:25:00", "after:25:00 must be a day"),
        ("after:soon", "after:soon must be a day"),
        ("a b c d e f g h i j k l m n o p q r s t u", "at most 20 terms"),
        pytest.param(" " * 60_000, "at most 4,000 characters", id="long"),  # no other thread would run for minutes
    ],
)
def test_what_is_not_understood_is_told_by_its_term(typed: str, told: str) -> None:
    with pytest.raises(NotUnderstood) as raised:
        parse(typed)
    assert told in str(raised.value)


NOW = datetime(2026, 11, 27, 15, 30).astimezone()


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("today", datetime(2026, 11, 27).astimezone()),
        ("Yesterday", datetime(2026, 11, 26).astimezone()),
        ("2026-11-01", datetime(2026, 11, 1).astimezone()),
        ("9:05", datetime(2026, 11, 27, 9, 5).astimezone()),
        ("5m", NOW - timedelta(minutes=5)),
        ("3h", NOW - timedelta(hours=3)),
        ("2D", NOW - timedelta(days=2)),
        ("2026-11-21T12:30:00Z", datetime(2026, 11, 21, 12, 30, tzinfo=timezone.utc)),
    ],
)
def test_a_moment_is_in_the_machines_time_zone(value: str, expected: datetime) -> None:
    assert moment(value, NOW) == expected


def test_no_address_and_no_subject_is_in_a_url_and_a_mail_that_was_found_tells_them() -> None:
    def digest(text: str) -> str:
        return f"{sum(text.encode()):016x}"

    asked = parse('to:ada@example.com to:lovelace to:example.org from:bob "Größe 7" key:shop')
    in_url = sealed(asked, digest)
    assert str(in_url) == " ".join(
        [f"to:~{digest('ada@example.com')} to:~{digest('lovelace')}~ to:example.org from:~{digest('bob')}~"]
        + [f"subject:~{digest(word)}" for word in words("größe 7")]
        + ["key:shop"]
    )
    assert sealed(in_url, digest) == parse(str(in_url)) == in_url
    mail = {"from": "Bob <b@b.example>", "to": ["c@example.org"], "cc": [], "subject": "Die GRÖSSE: 7"}
    mail["bcc"] = ["Ada Lovelace <ada@example.com>"]
    assert unsealed(in_url, mail, digest, show_addresses=True) == asked
    shown = str(unsealed(in_url, mail, digest, show_addresses=False))
    assert shown.endswith("grösse 7 key:shop")
    assert "ada" not in shown
    assert "bob" not in shown


def test_a_term_that_is_added_takes_the_place_of_one_that_may_be_there_once() -> None:
    query = Query().also("state", "unknown").also("tag", "a:b").also("tag", "c:d").also("tag", "a:b")
    assert str(query) == "state:in-doubt tag:c:d tag:a:b"
    assert str(query.also("state", "sent")) == "tag:c:d tag:a:b state:sent"
    assert Term("key", "my shop") in parse(str(query.also("key", "my shop"))).terms


def test_a_reason_is_looked_for_in_the_causes_that_have_its_words() -> None:
    known = [Cause("failed", "535 at auth", 1, 0, 0), Cause("delayed", "451 at rcpt", 1, 0, 0)]
    assert wanted(parse("reason:AUTH"), str, NOW, known).places == ([of_cause("failed", "535 at auth")],)
    assert wanted(parse("reason:tls"), str, NOW, known).places == ([],)
