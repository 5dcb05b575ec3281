"""Facts about `mail.request`: what cannot be sent as asked is refused by the name of its field."""

from __future__ import annotations

import base64
import re
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from mail.address import Mailbox
from mail.mime import to_mime
from mail.request import FieldError, Invalid, Request, parse
from tests import sample_mails as samples
from tests.sample_mails import CONTROLS, HELLO, PROPERTY, WHOLE, Json, accepted, mail, outcome, refusal, with_file

FIELDS = {field.alias or name for name, field in Request.model_fields.items()}


def places(value: Json, path: str = "") -> Iterator[tuple[Any, Any, str]]:
    """Everything inside a JSON value: the container, the index or name in it, and its path as an error spells it."""
    if isinstance(value, list):
        for number, member in enumerate(value):
            yield value, number, f"{path}[{number}]"
            yield from places(member, f"{path}[{number}]")
    elif isinstance(value, dict):
        for name, member in value.items():
            here = f"{path}.{name}" if path else name
            yield value, name, here
            yield from places(member, here)


@st.composite
def spoilt_requests(draw: st.DrawFn) -> Json:
    body, _ = draw(samples.requests())
    body["tags"] = [{"name": "a", "value": "b"}]
    body |= draw(st.sampled_from([{}, {"template": {"id": "welcome", "variables": {"name": "Ada"}}}]))
    for _ in range(draw(st.integers(1, 3))):
        container, key, _ = draw(st.sampled_from(list(places(body))))
        if isinstance(container[key], str) and draw(st.booleans()):
            where = draw(st.integers(0, len(container[key])))
            container[key] = container[key][:where] + draw(samples.HOSTILE_TEXT) + container[key][where:]
        elif isinstance(container, dict) and draw(st.booleans()):
            container[draw(samples.HOSTILE_TEXT)] = container.pop(key)
        else:
            container[key] = draw(samples.HOSTILE_JSON)
    return body


def names_a_place(error: FieldError, body: Json) -> bool:
    # A lone surrogate cannot be named in an answer that is UTF-8; pydantic puts U+FFFD for each of its bytes.
    present = {path.encode("utf-8", "surrogatepass").decode("utf-8", "replace") for _, _, path in places(body)}
    one_person = re.fullmatch(r"(\w+)\[0\]", error.field)  # to: "ada@example.com" is to: ["ada@example.com"]
    parent = re.sub(r"(\.\w+|\[\d+\])$", "", error.field)
    short_tag = re.fullmatch(r"tags\[\d+\]\.(name|value)", error.field)  # {"X-Tag": v} is {"name": "X-Tag", "value": v}
    return (
        error.field in present | FIELDS | {"body"}
        or ((error.missing or short_tag is not None) and parent in present)
        or (one_person is not None and isinstance(body[one_person[1]], str))
    )


@WHOLE
@given(spoilt_requests())
@example(mail(**{"\ud800": 1}))
@example(mail(headers={"\ud800": "x"}))
def test_a_spoilt_request_is_sent_as_it_is_or_refused_by_the_name_of_a_field(body: Json) -> None:
    found = outcome(body)
    if isinstance(found, Invalid):
        assert found.errors
        assert not [error for error in found.errors if not names_a_place(error, body) or not error.message]
    else:
        assert samples.is_fit_for_the_wire(to_mime(found, samples.ID, samples.DATE))


@PROPERTY
@given(samples.HOSTILE_JSON | st.dictionaries(st.sampled_from(sorted(FIELDS)), samples.HOSTILE_JSON))
def test_nothing_but_a_refusal_comes_of_nonsense(body: Json) -> None:
    with pytest.raises(Invalid) as caught:
        accepted(body)
    assert all(error.field and error.message for error in caught.value.errors)


# fmt: off
RESERVED = [
    "From", "To", "Cc", "Bcc", "Reply-To", "Subject", "Return-Path", "Received", "Resent-From", "Resent-Bcc",
    "DKIM-Signature", "ARC-Seal", "Authentication-Results", "Received-SPF", "Delivered-To",
]
REFUSED: dict[str, list[tuple[str, Json]]] = {  # what is wrong -> the field that is named, and the request
    "the wrong type": [
        *((field, mail() | {field: value}) for field in ("from", "subject", "text", "html")
          for value in (7, True, ["x"], {"x": "y"})),
        *((field, mail() | {field: value}) for field in ("to", "cc", "bcc", "reply_to")
          for value in (7, {"email": "a@b.co"})),
        *((field, mail() | {field: value}) for field in ("headers", "template") for value in ("x", 7, ["x"])),
        *((field, mail() | {field: value}) for field in ("attachments", "tags")
          for value in ("x", 7, {"x": "y"})),
        ("to", mail(to=[])),
    ],
    "the wrong type inside a field": [
        ("to[0]", mail(to=[7])),
        ("cc[1]", mail(cc=["ada@example.com", None])),
        ("cc[0]", mail(cc=[["ada@example.com"]])),
        *(("headers.X-Foo", mail(headers={"X-Foo": value})) for value in (True, [None], [[7]])),
        ("headers.X-Foo", mail(headers={"X-Foo": None})),
        ("attachments[0]", mail(attachments=["x"])),
        ("attachments[0].filename", with_file(filename=7)),
        ("attachments[0].content", with_file(content=7)),
        ("attachments[0].content_type", with_file(content_type=7)),
        ("attachments[0].content_id", with_file(content_id=7)),
        ("tags[0]", mail(tags=["a"])),
        ("tags[0].value", mail(tags=[{"name": "a", "value": 7}])),
        ("template.id", mail(text=None, template={"id": 7})),
        ("template.variables", mail(text=None, template={"id": "x", "variables": ["x"]})),
    ],
    "an unknown field": [
        ("colour", mail(colour="red")), ("sender", mail(sender="a@b.example")), ("To", mail(To="a@b.example")),
        ("body", mail(**{"": 1})), ("body", mail(**{"[key]": 1})),
        ("attachments[0].path", with_file(path="/etc/passwd")),
        ("tags[0].x", mail(tags=[{"name": "a", "value": "b", "x": 1}])),
        ("template.text", mail(text=None, template={"id": "welcome", "text": "{{ x }}"})),
    ],
    "a control character in what becomes a header": [
        row for bad in CONTROLS for row in (
            ("from", mail(**{"from": f'"Ada{bad}Bcc: eve@example.com" <ada@example.com>'})),
            ("from", mail(**{"from": f"ada{bad}@example.com"})),
            ("to[0]", mail(to=[f"ada@example.com{bad}"])),
            ("cc[0]", mail(cc=[f"Ada{bad} <ada@example.com>"])),
            ("bcc[0]", mail(bcc=[f"ada@example.com{bad}RCPT TO:<eve@example.com>"])),
            ("reply_to[0]", mail(reply_to=[f"{bad}ada@example.com"])),
            ("subject", mail(subject=f"a{bad}Bcc: eve@example.com")),
            ("headers.X-Foo", mail(headers={"X-Foo": f"a{bad}Bcc: eve@example.com"})),
            ("attachments[0].filename", with_file(filename=f"a{bad}b.txt")),
            ("attachments[0].content_type", with_file(content_type=f"a/b{bad}")),
            ("attachments[0].content_id", with_file(content_id=f"a{bad}")),
            ("tags[0].name", mail(tags=[{"name": f"a{bad}", "value": "b"}])),
            ("tags[0].value", mail(tags=[{"name": "a", "value": f"b{bad}"}])),
        )
    ],
    "a header name that is none": [
        (f"headers.{name}", mail(headers={name: "x"}))
        for name in ("X-Foo\r\nBcc", "X-Foo:", "X Foo", "X-Foo ", " X-Foo", "", "X-Föö", "X\x00", "x" * 77)
    ],
    "a header that is ours, in any case": [
        (f"headers.{name}", mail(headers={name: "x"}))
        for ours in RESERVED for name in (ours, ours.lower(), ours.upper(), ours.swapcase())
    ],
    "a structured header that would have to be encoded": [
        ("headers", mail(headers={name: value})) for name, value in (
            ("List-Unsubscribe", "<https://müller.example/leave>"), ("references", "<é@desk.example>"),
            ("In-Reply-To", ""), ("Auto-Submitted", "  "), ("List-ID", f"a{' ' * 10}<b.example>"),
        )
    ],
    "a control character in a body": [
        (field, mail(**{field: f"a{control}b"})) for field in ("text", "html")
        for control in ("\x00", "\x08", "\x0b", "\x0c", "\x1b", "\x7f", "\ud800")
    ],
    "base64 that another decoder may refuse or read differently": [
        ("attachments[0].content", with_file(content=content)) for content in (
            "?", "aGVsbG8", "aGVs\rbG8=", "aGVs\n\tbG8=", [104, 256], [-1], ["a"], [1.5], [None],
            " aGVsbG8=", "aGVsbG9=", "aGVsbG8==", "aGVsbG_-", "é", "====",
        )
    ],
    "a file name with a path in it or without a name": [
        ("attachments[0].filename", with_file(filename=name))
        for name in ("", " ", ".", "..", " .. ", "a/b", "/etc/passwd", "a\\b", "..\\x", "C:\\x", "x" * 201)
    ],
    "a media type that cannot be attached": [
        ("attachments[0].content_type", with_file(content_type=kind)) for kind in (
            "message/rfc822", "Message/RFC822", "message/partial", "multipart/mixed", "MULTIPART/x; boundary=x", "",
            "text", "text/", "/plain", "text/plain;", "text/plain; charset", "text/plain; charset=", "a/b/c",
            "text/plain; a=1; A=2", 'text/plain; name="a b"', "text/plain\r\nBcc: x@b.example", "text/ö",
            "a/" + "b" * 200,
        )
    ],
    "something that is too long": [
        ("subject", mail(subject="x" * 999)),
        ("headers.X-Foo", mail(headers={"X-Foo": "x" * 16_001})),
        ("headers", mail(headers={"References": f"<{'x' * 900}@desk.example>"})),
        ("headers", mail(headers={f"X-{number}": "x" * 16_000 for number in range(5)})),
        ("reply_to", mail(reply_to=[f"p{number}@example.com" for number in range(51)])),
        ("headers", mail(headers={f"X-{number}": "x" for number in range(51)})),
        ("to[0]", mail(to=f'"{"x" * 201}" <bob@example.com>')),
        ("to[0]", mail(to=f"{'x' * 990}@example.com")),
        ("attachments", mail(attachments=[{"filename": "x", "content": ""}] * 51)),
        ("attachments[0].content_id", with_file(content_id="x" * 129)),
        ("tags", mail(tags=[{"name": "a", "value": "b"}] * 51)),
        ("tags[0].name", mail(tags=[{"name": "a" * 257, "value": "b"}])),
    ],
    "something that is there twice": [
        ("headers.x-foo", mail(headers={"X-Foo": "1", "X-Bar": "2", "x-foo": "3"})),
        ("attachments[2].content_id", mail(html="<p>", attachments=[
            {"filename": "a.png", "content": HELLO, "content_id": name} for name in ("logo", "b", "logo")
        ])),
    ],
    "a tag of other characters": [("tags[0].name", mail(tags=[{"name": "a b", "value": "c"}]))],
    "a time without a zone or that there is not": [
        ("expires_at", mail(expires_at=time))
        for time in ("2026-11-21", "2126-11-21T12:00:00", "2126-02-31T12:00:00Z", "soon", 5)
    ],
    "what cannot be in List-Unsubscribe": [
        *(("unsubscribe_url", mail(unsubscribe_url=url)) for url in (
            "", "http://a.example", "https://", "mailto:a@b.co", "https://u@a.example", "https://a.example/x y", 7,
            "https://a.example/>,<https://b.co", "https://a.example/a,b", "https://a.example/\r\nBcc: x@b.co", "https://a/#x",
            "https://a.example/%zz", "https://müller.example", "https://a.example\n", "https://a.example/" + "x" * 783,
        )),
        *(("unsubscribe_email", mail(unsubscribe_email=box)) for box in (
            "", "a", "A <a@b.co>", "a@b.co, c@d.co", "a@localhost", "a@b.co\r\nBcc: x@b.co", ["a@b.co"],
        )),
        *((f"headers.{name}", mail(headers={name: "<x:y>"}) | given)
          for name in ("List-Unsubscribe", "list-unsubscribe-POST")
          for given in ({"unsubscribe_url": "https://a.example"}, {"unsubscribe_email": "a@b.co"})),
    ],
    "a third way to treat doubt": [("on_doubt", mail(on_doubt="maybe"))],
    "a template and a body of one's own": [
        ("template", mail(text=None, subject=None, template={"id": "welcome"}) | extra)
        for extra in ({"html": "<p>"}, {"text": "x"}, {"html": ""}, {"text": ""})
    ],
    "neither text nor html": [
        ("text", mail(text=None) | bodies) for bodies in ({}, {"text": ""}, {"html": ""}, {"text": "", "html": ""})
    ],
    "an inline file without html": [
        ("attachments[0].content_id", with_file(content_id="logo") | {"html": html}) for html in (None, "")
    ],
}
INSTEAD = [  # what there is not, and what is said of it
    ("attachments[0].path: is not supported: no file is fetched", mail(attachments=[{"path": "https://a.example/x"}])),
    ("headers.Reply-To: must be left out: the field reply_to writes", mail(headers={"Reply-To": "ada@example.com"})),
    ("headers.BCC: must be left out: the field bcc writes", mail(headers={"BCC": "ada@example.com"})),
    ("headers.Received: must be left out: this service or the relay writes", mail(headers={"Received": "today"})),
    *((f"{field}: is not a known field; did you mean `{meant}`?", body) for field, meant, body in (
        ("replyTo", "reply_to", mail(replyTo="a@b.co")), ("Reply-To", "reply_to", mail(**{"Reply-To": "a@b.co"})),
        ("To", "to", mail(To="a@b.co")), ("attachment", "attachments", mail(attachment=[])),
        ("attachments[0].contentType", "content_type", with_file(contentType="a/b")),
        ("tags[0].vlaue", "value", mail(tags=[{"name": "a", "value": "b", "vlaue": "c"}])),
        ("template.variable", "variables", mail(text=None, template={"id": "a", "variable": {}})),
    )),
    ("to: must have 1 or more entries", mail(to=[])),
    *(("to[0]: must be one address; each further one must be a string of its own", mail(to=to)) for to in (
        "a@b.co, c@d.co", "a@b.co;c@d.co", "Ada <a@b.co>, Bob <c@d.co>", "a@b.co,c@d.co,e@f.co", "a@b.co ; B <c@d.co>",
    )),
]
# fmt: on
ONE_CLICK = "List-Unsubscribe=One-Click"
EACH = [(field, body) for rows in REFUSED.values() for field, body in rows]
NAMES = [f"{what}-{number}" for what, rows in REFUSED.items() for number in range(len(rows))]


@pytest.mark.parametrize(("field", "body"), EACH, ids=NAMES)
def test_what_cannot_be_sent_as_asked_is_refused_by_its_field(field: str, body: Json) -> None:
    [(named, message)] = refusal(body).items()
    assert named == field
    assert not re.search(r"(?i)input|valid|dictionary|instance|pattern|item", message)  # the caller knows no Python


@pytest.mark.parametrize(("told", "body"), INSTEAD)
def test_a_refusal_says_what_to_do_instead(told: str, body: Json) -> None:
    with pytest.raises(Invalid, match=f"^{re.escape(told)}"):
        accepted(body)


@pytest.mark.parametrize("body", [None, True, 7, "x", [], [mail()]])
def test_a_body_that_is_no_object_is_refused(body: Json) -> None:
    assert refusal(body) == {"body": "must be a JSON object"}


def test_everything_that_is_wrong_is_named_at_once() -> None:
    body = mail(to=["bob@example.com", "bob"], subject="a\nb", attachments=[{"filename": "x"}], colour="red")
    assert list(refusal(body)) == ["to[1]", "subject", "attachments[0].content", "colour"]


def test_more_recipients_than_allowed_are_refused_across_to_cc_and_bcc() -> None:
    people = [f"p{number}@example.com" for number in range(51)]
    assert len(accepted(mail(to=people[:20], cc=people[20:40], bcc=people[40:50])).recipients) == 50
    told = refusal(mail(to=people[:20], cc=people[20:40], bcc=people[40:51]))
    assert told == {"to": "to, cc and bcc must have at most 50 recipients together, not 51"}


def test_the_default_sender_writes_where_none_is_named() -> None:
    assert accepted(mail(**{"from": None})).sender == Mailbox("Acme", "hello@example.com")
    assert accepted(mail()).sender == Mailbox("", "ada@example.com")


@pytest.mark.parametrize("field", ["from", "to", "subject"])
def test_a_missing_field_is_told_as_missing(field: str) -> None:
    with pytest.raises(Invalid) as caught:
        parse(mail(**{field: None}), default_sender=None, max_recipients=50)
    assert caught.value.errors == (FieldError(field, "is required", missing=True),)


@pytest.mark.parametrize(
    "field", ["cc", "bcc", "reply_to", "html", "headers", "attachments", "tags", "template", "unsubscribe_url"]
)
def test_null_is_what_is_absent(field: str) -> None:
    """Serializers of C#, Rust, Kotlin and Java write null for it: StrongGrid#92, lowdefy#2242."""
    assert accepted(mail(**{field: None})) == accepted(mail())


@pytest.mark.parametrize(
    ("url", "email", "written"),
    [
        ("https://a.example:8443/l?w=%2C1&b", None, {"": "<https://a.example:8443/l?w=%2C1&b>", "-Post": ONE_CLICK}),
        (None, "Leave+42@b.co", {"": "<mailto:Leave+42@b.co>"}),
        (
            "https://a.example",
            "é%&?@b.co",
            {"": "<https://a.example>, <mailto:%C3%A9%25%26%3F@b.co>", "-Post": ONE_CLICK},
        ),
    ],
)
def test_the_ways_to_unsubscribe_are_headers(url: Json, email: Json, written: dict[str, str]) -> None:
    message = accepted(mail(unsubscribe_url=url, unsubscribe_email=email, headers={"List-ID": "<x>"}))
    assert message.headers == {"List-ID": "<x>", **{f"List-Unsubscribe{end}": text for end, text in written.items()}}


@pytest.mark.parametrize(
    "content",
    [
        base64.encodebytes(b"hello" * 30).decode(),  # Python's encodebytes, Ruby's encode64
        "\r\n".join(re.findall(".{1,76}", base64.b64encode(b"hello" * 30).decode())),  # PHP's chunk_split
    ],
)
def test_base64_may_be_in_lines(content: Json) -> None:
    [file] = accepted(with_file(content=content)).attachments
    assert base64.b64decode(file["content"]) == b"hello" * 30


def test_a_file_may_come_without_a_text() -> None:
    """mailgun-php#290, snappymail#1073."""
    file = [{"filename": "a.csv", "content": ""}]
    assert accepted(mail(text=None, attachments=file)).text is None
    assert accepted(mail(text="", attachments=file)).text == ""
