"""What an upstream is asked for is the mail that was asked for: as JSON it says the same, or it is not said."""

from __future__ import annotations

import re
from dataclasses import replace
from email import message_from_bytes
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mail.address import Mailbox
from mail.message import Message, Raw
from mail.mime import to_mime
from mail.parsed import Unsayable
from mail.posted import fields_of, key_of
from tests.sample_mails import DATE, ID, WHOLE, accepted, mail, requests
from upstream.client import as_json

HEAD = "From: Ada <ada@example.com>\nTo: Bob <bob@example.com>\nSubject: =?utf-8?q?Gr=C3=BC=C3=9Fe?=\n"
HTML = "Content-Type: text/html; charset=utf-8\n\n<p>Hi <img src=cid:logo@x>\n"
LOGO = "Content-Type: image/png; name=a.png\nContent-ID: <logo@x>\nContent-Transfer-Encoding: base64\n\naGVsbG8=\n"


def several(subtype: str, *parts: str, head: str = "", more: str = "") -> str:
    lines = "".join(f"--{subtype}\n{part}" for part in parts)
    return f'{head}Content-Type: multipart/{subtype}{more}; boundary="{subtype}"\n\n{lines}--{subtype}--\n'


def came(text: str, **fields: Any) -> Message:
    boxes: dict[str, Any] = {"to": [Mailbox("Bob", "bob@example.com")], "cc": [], "bcc": [], "reply_to": []}
    octets = fields.pop("octets", text.replace("\n", "\r\n").encode().decode("latin-1"))
    raw = Raw(octets, fields.pop("sender", "ada@example.com"))
    message = Message(Mailbox("Ada", "ada@example.com"), **boxes | {"subject": "Grüße"} | fields, raw=raw)
    return message


@given(requests())
@WHOLE
def test_a_mail_that_another_of_ours_is_asked_for_is_the_same_mail(asked: tuple[Any, Any]) -> None:
    message = accepted(asked[0])
    again = accepted(fields_of(message, ID, message.recipients))
    assert to_mime(again, ID, DATE) == to_mime(message, ID, DATE)
    assert (again.recipients, again.tags) == (message.recipients, message.tags)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (f"{HEAD}X-A: =?utf-8?q?=C3=BC?=\nReceived: x\nReceived: y\nDKIM-Signature: v\nReferences: <1@x>\n <2@x>\n\nHi",
         {"text": "Hi", "headers": {"X-A": "ü", "References": "<1@x> <2@x>", "Message-ID": ID}, "subject": "Grüße"}),
        (f"{HEAD}{HTML}", {"html": "<p>Hi <img src=cid:logo@x>\n", "text": ""}),
        (several("mixed", several("related", several("alternative", "\nHi\n", HTML), LOGO), LOGO.replace("logo@x", "y"),
                 head=HEAD),
         {"text": "Hi", "html": "<p>Hi <img src=cid:logo@x>", "attachments": [
             {"filename": "a.png", "content": "aGVsbG8=", "content_type": "image/png", "content_id": "logo@x"},
             {"filename": "a.png", "content": "aGVsbG8=", "content_type": "image/png"}]}),
        (several("mixed", "Content-Type: text/plain; charset=latin1\nContent-Transfer-Encoding: base64\n\n/A==\n",
                 "Content-Type: text/csv; charset=utf-8\nContent-Disposition: attachment;\n filename*=utf-8''%C3%BC.csv"
                 "\n\na,b\n",
                 head=HEAD),
         {"text": "ü", "attachments": [
             {"filename": "ü.csv", "content": "YSxi", "content_type": "text/csv; charset=utf-8"}]}),
    ],
)  # fmt: skip
def test_what_came_by_smtp_is_said_in_json(text: str, expected: dict[str, Any]) -> None:
    fields = fields_of(came(text), ID, ["bob@example.com"])
    assert {name: fields.get(name) for name in expected} == expected
    assert (fields["from"], fields["to"]) == ("Ada <ada@example.com>", ["Bob <bob@example.com>"])


@pytest.mark.parametrize(
    ("text", "fields", "what"),
    [
        (several("signed", "\nHi\n", "Content-Type: application/pgp-signature\n\nx\n", head=HEAD), {}, "/signed"),
        (several("encrypted", "\nHi\n", head=HEAD), {}, "/encrypted"),
        (several("report", "\nHi\n", head=HEAD), {}, "a multipart"),
        (several("mixed", "\nHi\n", several("signed", "\nHi\n"), head=HEAD), {}, "a multipart"),
        (several("mixed", "\nHi\n", "Content-Type: message/rfc822\n\nSubject: x\n\nHi\n", head=HEAD), {}, "a message/"),
        (several("mixed", "\nHi\n", "\na footer\n", head=HEAD), {}, "a text behind another"),
        (several("alternative", HTML, "\nHi\n", head=HEAD), {}, "alternatives"),
        (several("alternative", "\nHi\n", "Content-Type: text/calendar\n\nx\n", head=HEAD), {}, "alternatives"),
        (several("related", HTML, "Content-Type: image/png\n\nx\n", head=HEAD), {}, "Content-ID"),
        (several("mixed", "\nHi\n", head=HEAD).replace("--mixed--", ""), {}, "faults"),
        (f"{HEAD}Content-Type: text/plain; charset=us-ascii\n\nü", {}, "charset"),
        (f"{HEAD}Content-Type: text/plain; charset=rot13\n\nHi", {}, "charset"),
        (f"{HEAD}Content-Transfer-Encoding: x-uuencode\n\nHi", {}, "encoding"),
        (f"{HEAD}Content-Transfer-Encoding: base64\n\naGVsbG8!", {}, "decoded"),
        (f"{HEAD}Content-Type: text/plain; format=flowed; delsp=yes\n\nHi", {}, "delsp"),
        (f"{HEAD}X-A: 1\nx-a: 2\n\nHi", {}, "twice"),
        (f"{HEAD}Resent-To: x@example.com\n\nHi", {}, "resent"),
        (f"{HEAD}Sender: eve@example.com\n\nHi", {}, "Sender"),
        (f"{HEAD}Reply-To: me\n\nHi", {}, "Reply-To"),
        (f"{HEAD}Cc: cay@example.com\n\nHi", {}, "Cc that names others"),
        (f"{HEAD}\n\nHi", {"sender": ""}, "from nobody"),
        (HEAD.replace("bob@", "bo@") + "\nHi", {}, "To that names others"),
        (HEAD.replace("ada@example.com>", "ada@example.com>, eve@example.com") + "\nHi", {}, "From that names others"),
        ("From: Ada <ada@example.com>\n\nHi", {"to": [], "bcc": [Mailbox("", "bob@example.com")]}, "to nobody"),
    ],
)  # fmt: skip
def test_what_json_would_say_otherwise_is_not_said(text: str, fields: dict[str, Any], what: str) -> None:
    with pytest.raises(Unsayable) as unsayable:
        fields_of(came(text, **fields), ID, ["bob@example.com"])
    assert re.search(what, str(unsayable.value))


def test_a_redirected_mail_goes_where_it_is_redirected() -> None:
    box = Mailbox("Bob <bob@example.com>", "dev@example.com")
    assert fields_of(came(f"{HEAD}\nHi", to=[box]), ID, [box.address])["to"] == [str(box)]


def test_others_than_have_been_served_are_asked_for_under_a_key_of_their_own() -> None:
    message = accepted(mail(to=["ada@example.com", "bob@example.com"], cc="cay@example.com"))
    assert key_of("1", message, reversed(message.recipients)) == "1"  # type: ignore[arg-type]
    left = ["bob@example.com", "cay@example.com"]
    assert key_of("1", message, left) == key_of("1", message, left[::-1]) != "1"
    fields = fields_of(message, ID, left)
    assert (fields["to"], fields["cc"], "bcc" in fields) == (left[:1], left[1:], False)


LINES = st.sampled_from(
    ["", "Hi", "--x", "--x--", "--y", "Content-Type: multipart/mixed; boundary=x", "Content-Type: text/html; charset=é",
     "Content-Type: multipart/alternative; boundary=y", "Content-Type: text/plain; charset*=x''%ff", "Content-ID: <",
     "Content-Transfer-Encoding: base64", "Content-Disposition: attachment; filename*0*=rot13''%; filename*2=x", "=FF=",
     "Content-Type: message/rfc822", "Content-Type: text/plain; name*=utf-9'x'%41; name=y"]
)  # fmt: skip


@given(st.lists(LINES | st.text(st.characters(max_codepoint=255, exclude_characters="\r\n"), max_size=50), max_size=30))
def test_garbage_is_said_or_not_and_nothing_else(lines: list[str]) -> None:
    octets = "".join(f"{line}\r\n" for line in [*HEAD.splitlines(), *lines])
    try:
        fields = fields_of(came("", octets=octets), ID, ["bob@example.com"])
    except Unsayable:
        return
    assert as_json(fields)


@pytest.mark.parametrize("levels", [90, 5000])
def test_a_mail_of_many_levels_is_not_taken_apart(levels: int) -> None:
    nested = "".join(f"Content-Type: multipart/mixed; boundary=b{level}\n\n--b{level}\n" for level in range(levels))
    with pytest.raises(Unsayable):
        fields_of(came(f"{HEAD}{nested}\nHi"), ID, ["bob@example.com"])


@given(requests())
@WHOLE
def test_our_own_mime_is_taken_apart_into_what_it_was_made_of(asked: tuple[Any, Any]) -> None:
    message = accepted(asked[0])
    octets = to_mime(message, ID, DATE)
    raw = Raw(octets.decode("latin-1"), message.sender.address)
    try:
        fields = fields_of(
            replace(message, text=None, html=None, headers={}, attachments=[], raw=raw), ID, message.recipients
        )
    except Unsayable:
        return
    parts = [
        [one.get_content_type() for one in message_from_bytes(mime).walk()]
        for mime in (octets, to_mime(accepted(fields), ID, DATE))
    ]
    assert parts[0] == parts[1]
