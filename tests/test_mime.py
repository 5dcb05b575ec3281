"""Facts about `mail.mime`: what is asked is what a receiver reads, and any mail is fit for the wire.

The properties make mail of odd but lawful requests, take it through everything that the service and a worker do with it
(`parse`, `compose`, JSON and back, `to_mime`), and read it twice, by the new parser of Python's `email`
(`policy.default`) and by the old one (`compat32`). Neither wrote the bytes; each has faults of its own, and they differ
between the Pythons that we run on.
"""

from __future__ import annotations

import base64
import re
from datetime import datetime, timedelta, timezone
from email import message_from_string, policy
from email.header import decode_header, make_header
from email.utils import getaddresses
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from mail.draft import compose
from mail.mime import to_mime
from mail.plain import text_of
from mail.request import Invalid, parse
from tests import sample_mails as samples
from tests.sample_mails import DATE, HELLO, ID, PROPERTY, WHOLE, Box, Json, accepted, as_read, mail, outcome, with_file


class Read:
    """A mail as its receivers find it."""

    def __init__(self, mime: bytes) -> None:
        self.mime = mime
        self.new: Any = message_from_string(mime.decode(), policy=policy.default)
        self.old: Any = message_from_string(mime.decode())
        parts = zip(self.new.walk(), self.old.walk(), strict=True)
        self.leaves = [(new, old) for new, old in parts if not new.is_multipart()]

    @property
    def header(self) -> str:
        return self.mime.partition(b"\r\n\r\n")[0].decode()

    @property
    def files(self) -> list[dict[str, Any]]:
        return [read_file(new, old) for new, old in self.leaves if new.get_content_disposition()]

    def text(self, subtype: str) -> str | None:
        """The letter in this type, with \\n for its line ends."""
        parts = [new for new, _ in self.leaves if not new.get_content_disposition()]
        found = [new.get_content() for new in parts if new.get_content_type() == f"text/{subtype}"]
        assert len(found) <= 1
        return found[0].replace("\r\n", "\n") if found else None

    def boxes(self, name: str) -> list[tuple[str, str]]:
        """(name, address) of everybody in a header, as the old parser has it."""
        value = re.sub(r"\r\n(?=[ \t])", "", self.old.get(name, ""))
        found = getaddresses([value]) if value else []
        return [(str(make_header(decode_header(phrase))), address) for phrase, address in found]

    def boxes_of_new_parser(self, name: str) -> list[tuple[str, str]]:
        """It makes one space of several, drops one at the end and, until 3.13.2, puts one between encoded words."""
        boxes = self.new[name].addresses if name in self.new else []
        return [(box.display_name, box.addr_spec) for box in boxes]


def without_spaces(boxes: list[tuple[str, str]]) -> list[tuple[str, str]]:
    return [("".join(name.split()), address) for name, address in boxes]


def shape(part: Any) -> Any:
    """text/plain, or {multipart/mixed: [text/plain, application/pdf]}"""
    kind = part.get_content_type()
    return {kind: [shape(one) for one in part.iter_parts()]} if part.is_multipart() else kind


def read_file(new: Any, old: Any) -> dict[str, Any]:
    assert new["Content-Disposition"].params["filename"] == old.get_filename()
    content_type, *given = old.get_params()
    older = str(make_header(decode_header(old.get_param("name", ""))))
    parameters = [(name, value) for name, value in given if name != "name" or older != old.get_filename()]
    return {
        "filename": old.get_filename(),
        "content": new.get_payload(decode=True),
        "content_type": "; ".join([content_type[0], *(f"{name}={value}" for name, value in parameters)]),
        "content_id": new["Content-ID"] and str(new["Content-ID"]),
        "disposition": new.get_content_disposition(),
    }


def sent(body: Json) -> Read:
    return Read(to_mime(accepted(body), ID, DATE))


@WHOLE
@given(samples.requests())
def test_everybody_is_named_and_reached_as_asked(asked: tuple[dict[str, Json], dict[str, list[Box]]]) -> None:
    body, everybody = asked
    read = sent(body)
    for field, header in (("from", "From"), ("to", "To"), ("cc", "Cc"), ("reply_to", "Reply-To")):
        expected = [(box.name, box.address) for box in everybody[field]]
        assert read.boxes(header) == expected
        assert without_spaces(read.boxes_of_new_parser(header)) == without_spaces(expected)
    envelope = [box.address for field in ("to", "cc", "bcc") for box in everybody[field]]
    assert accepted(body).recipients == list(dict.fromkeys(envelope))


@PROPERTY
@given(samples.requests())
@example((mail(subject="x " * 499, html="<p>", headers={"X-" + "n" * 74: "é"}, attachments=[]), {}))
@example((mail(subject=" ", html="<p>", headers={}, attachments=[]), {}))
def test_what_a_mail_says_is_read_as_asked(asked: tuple[dict[str, Json], dict[str, list[Box]]]) -> None:
    body, _ = asked
    read = sent(body)
    assert read.new["Subject"] == body["subject"]
    assert {name: read.new.get_all(name) for name in body["headers"]} == {k: [v] for k, v in body["headers"].items()}
    text = body["text"] if "text" in body else text_of(body["html"])
    assert read.text("plain") == (as_read(text) if text else None)
    assert read.text("html") == as_read(body["html"])
    expected = [
        {
            "filename": file["filename"].strip(),
            "content": base64.b64decode(file["content"]),
            "content_type": re.sub("; ?", "; ", file["content_type"]),
            "content_id": f"<{file['content_id']}>" if "content_id" in file else None,
            "disposition": "inline" if "content_id" in file else "attachment",
        }
        for file in body["attachments"]
    ]
    assert read.files == sorted(expected, key=lambda file: file["disposition"] == "attachment")  # the inline ones first


@WHOLE
@given(samples.requests())
def test_any_mail_is_fit_for_the_wire(asked: tuple[dict[str, Json], dict[str, list[Box]]]) -> None:
    body, everybody = asked
    read = sent(body)
    assert samples.is_fit_for_the_wire(read.mime)
    wide = [box for boxes in everybody.values() for box in boxes if not box.address.isascii()]
    assert accepted(body).needs_smtputf8 is bool(wide)
    assert read.mime.isascii() or wide
    for name in ("From", "To", "Subject", "Date", "Message-ID", "MIME-Version"):
        assert len(re.findall(f"(?im)^{name}:", read.header)) == 1
    assert not re.search(r"(?im)^bcc:", read.header)
    assert b"hidden." not in read.mime
    assert not [part.defects for part in read.new.walk() if part.defects]
    assert accepted(body) == compose(parse(body, default_sender=None, max_recipients=50))
    assert to_mime(accepted(body), ID, DATE) == read.mime


RENDERED = st.none() | samples.HOSTILE_TEXT | samples.BODY


@PROPERTY
@given(samples.HOSTILE_TEXT | samples.odd_text(998), RENDERED, RENDERED)
def test_what_a_template_rendered_is_sent_as_it_is_or_refused(subject: str, text: str | None, html: str | None) -> None:
    found = outcome(mail(subject=None, text=None, template={"id": "x"}), (subject, text, html))
    if isinstance(found, Invalid):
        fields = {error.field for error in found.errors}
        assert fields <= {"template", "template.subject", "template.text", "template.html"}
    else:
        read = Read(to_mime(found, ID, DATE))
        assert read.new["Subject"] == subject
        text = text_of(html) if text is None and html else text
        assert read.text("plain") == (as_read(text) if text else None)
        assert read.text("html") == (as_read(html) if html else None)


def test_somebody_in_to_and_cc_is_served_once_and_named_twice() -> None:
    body = mail(to=["Bob <bob@example.com>", "bob@EXAMPLE.com"], cc="bob@example.com", bcc="bob@example.com")
    assert accepted(body).recipients == ["bob@example.com"]
    assert sent(body).boxes("To") == [("Bob", "bob@example.com"), ("", "bob@example.com")]
    assert sent(body).boxes("Cc") == [("", "bob@example.com")]


@pytest.mark.parametrize(
    "kind",
    [
        "text/calendar; charset=utf-8",
        f"application/x; {'n' * 90}={'v' * 90}",  # EmailMessage never comes back from this one
    ],
)
def test_a_media_type_keeps_its_parameters(kind: str) -> None:
    assert sent(with_file(content_type=kind)).files[0]["content_type"] == kind


# fmt: off
TYPES = [
    ("report.pdf", "application/pdf"), ("REPORT.PDF", "application/pdf"), ("photo.jpeg", "image/jpeg"),
    ("Re: a#1?.pdf", "application/pdf"), ("data:text,x.pdf", "application/pdf"),
    *((name, "application/octet-stream")
      for name in ("archive.tar.gz", "archive.tgz", "mail.eml", "page.mht", "noending", "pdf", ".pdf")),
]
# fmt: on


@pytest.mark.parametrize(("name", "kind"), TYPES)
def test_the_type_of_a_file_is_told_by_its_ending_unless_said(name: str, kind: str) -> None:
    assert sent(with_file(filename=name)).files[0]["content_type"] == kind
    assert sent(with_file(filename=name, content_type="a/b")).files[0]["content_type"] == "a/b"


def test_headers_that_are_the_callers_are_kept() -> None:
    headers = {
        "In-Reply-To": "<a@example.com>",
        "References": " ".join(f"<{number}.{'x' * 40}@example.com>" for number in range(15)),
        "List-Unsubscribe": f"<https://example.com/{'u' * 870}>",
        "List-Unsubscribe-Post": "List-Unsubscribe=One-Click",
        "X-Options": '{"a":  1}',
        "X-Empty": "",
        "Fromage": "Brie",
    }
    read = sent(mail(headers=headers))
    assert {name: read.new[name] for name in headers} == headers
    assert "=?" not in read.header  # a relay that reads them decodes nothing


@pytest.mark.parametrize(
    "body",
    [
        mail(subject="x" * 998, headers={f"X-{number}": "x" * 998 for number in range(50)}),
        mail(headers={"X-" + "n" * 74: "x" * 900 + " " * 9 + "y" * 89}),
        mail(text="x" * 999, html="<p>" + "y " * 600),
        mail(headers={"X-" + "n" * 74: "x" * 998, "x-" + "m" * 74: "x" * 950}),
        mail(headers={"X-Foo": "x" * 70 + " " * 9 + "y" * 80}),
        mail(to=f'"{"x" * 200}" <bob@example.com>'),
        mail(attachments=[{"filename": "😀" * 200, "content": ""}]),
        mail(html="<p>", attachments=[{"filename": "x" * 200, "content": "", "content_id": "x" * 128}]),
    ],
)
def test_what_is_just_not_too_long_is_fit_for_the_wire(body: Json) -> None:
    assert samples.is_fit_for_the_wire(sent(body).mime)


def test_a_mail_goes_over_the_wire_as_these_bytes() -> None:
    body = {
        "from": "Ada Lovelace <ada@example.com>",
        "to": ['"Bob, Jr." <bob@example.com>', "Zoë <zoe@bücher.example>"],
        "cc": "carol@example.com",
        "bcc": "dave@example.com",
        "reply_to": "desk@example.com",
        "subject": "Your invoice",
        "text": "Hi,\n.\nbye",
        "html": '<p>Grüße <img src="cid:logo"></p>',
        "headers": {"X-Foo": "bar"},
        "attachments": [
            {"filename": "résumé 1.pdf", "content": HELLO},
            {"filename": "logo.png", "content": HELLO, "content_id": "logo"},
        ],
    }
    assert sent(body).mime.decode().split("\r\n") == GOLDEN.split("\n")


GOLDEN = """\
From: Ada Lovelace <ada@example.com>
To: "Bob, Jr." <bob@example.com>,
 =?utf-8?q?Zo=C3=AB?=
 <zoe@xn--bcher-kva.example>
Cc: carol@example.com
Reply-To: desk@example.com
Subject: Your invoice
Date: Fri, 31 Jan 2025 12:30:15 +0000
Message-ID: <0b9c7e3a-1f0e-4c39-9a55-3f0f7f0d2c11@example.com>
MIME-Version: 1.0
X-Foo: bar
Content-Type: multipart/mixed;
 boundary="=_m_9d3f11a32872d6497d3e2b07"

--=_m_9d3f11a32872d6497d3e2b07
Content-Type: multipart/alternative;
 boundary="=_a_9d3f11a32872d6497d3e2b07"

--=_a_9d3f11a32872d6497d3e2b07
Content-Type: text/plain; charset=utf-8
Content-Transfer-Encoding: 7bit

Hi,
.
bye

--=_a_9d3f11a32872d6497d3e2b07
Content-Type: multipart/related; type="text/html";
 boundary="=_r_9d3f11a32872d6497d3e2b07"

--=_r_9d3f11a32872d6497d3e2b07
Content-Type: text/html; charset=utf-8
Content-Transfer-Encoding: quoted-printable

<p>Gr=C3=BC=C3=9Fe <img src=3D"cid:logo"></p>

--=_r_9d3f11a32872d6497d3e2b07
Content-Type: image/png;
 name="logo.png"
Content-Transfer-Encoding: base64
Content-Disposition: inline;
 filename="logo.png"
Content-ID: <logo>

aGVsbG8=

--=_r_9d3f11a32872d6497d3e2b07--

--=_a_9d3f11a32872d6497d3e2b07--

--=_m_9d3f11a32872d6497d3e2b07
Content-Type: application/pdf;
 name="=?utf-8?b?csOpc3Vtw6kgMS5wZGY=?="
Content-Transfer-Encoding: base64
Content-Disposition: attachment;
 filename*=utf-8''r%C3%A9sum%C3%A9%201.pdf

aGVsbG8=

--=_m_9d3f11a32872d6497d3e2b07--
"""


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        *((mail() | {"html": html}, "text/plain") for html in (None, "")),
        *((mail(html="<p>") | {"text": text}, "text/html") for text in (None, "")),
        (mail(html="<p>"), {"multipart/alternative": ["text/plain", "text/html"]}),
        (with_file(filename="a.pdf") | {"html": None}, {"multipart/mixed": ["text/plain", "application/pdf"]}),
        (
            with_file(filename="a.png", content_id="a") | {"text": None},
            {"multipart/related": ["text/html", "image/png"]},
        ),
    ],
)
def test_a_mail_has_no_more_parts_than_it_needs(body: Json, expected: Json) -> None:
    assert shape(sent(body).new) == expected


def test_an_empty_subject_is_a_header_without_text() -> None:
    read = sent(mail(subject=""))
    assert re.search(r"\r\nSubject: *\r\n", read.header)
    assert read.new["Subject"] == ""


@pytest.mark.parametrize("date", [DATE, DATE.astimezone(timezone(timedelta(hours=-5, minutes=-30)))])
def test_date_message_id_and_mime_version_are_right(date: datetime) -> None:
    read = Read(to_mime(accepted(mail()), ID, date))
    assert read.new["Date"].datetime == DATE.replace(microsecond=0)
    assert read.new["Date"].datetime.utcoffset() == date.utcoffset()
    assert (read.new["Message-ID"], read.new["MIME-Version"]) == (ID, "1.0")


SMUGGLED = ["\n.\n", "\r.\r", "\r\n.\r\n", "\n.\r\n", "\r.\n", "\r\n.\r", "\r\n.\n", "\n\n.\r\r"]


@pytest.mark.parametrize("end_of_data", SMUGGLED)
@pytest.mark.parametrize("padding", ["", "é", "x" * 1000])
def test_no_end_of_data_can_be_smuggled_into_a_mail(end_of_data: str, padding: str) -> None:
    text = f"{padding}a{end_of_data}MAIL FROM:<eve@example.com>\r\n.leading\n..dots"
    read = sent(mail(text=text, html=text))
    assert not re.search(rb"\r(?!\n)|(?<!\r)\n", read.mime)
    assert read.text("plain") == read.text("html") == as_read(text)


def test_a_text_that_looks_like_the_end_of_a_part_ends_nothing() -> None:
    plain = sent(mail(html="<p>")).mime
    lines = [line.decode() for line in plain.split(b"\r\n") if line.startswith(b"--")]
    text = "\n".join(lines)
    read = sent(mail(text=text, html="<p>"))
    assert shape(read.new) == {"multipart/alternative": ["text/plain", "text/html"]}
    assert read.text("plain") == as_read(text)


def test_a_local_part_beyond_ascii_travels_as_utf8_and_a_domain_never_does() -> None:
    wide, narrow = mail(to="Zoë <zoë@bücher.example>"), mail(to="Zoë <zoe@bücher.example>")
    assert accepted(wide).needs_smtputf8
    assert "zoë@xn--bcher-kva.example".encode() in sent(wide).mime
    assert not accepted(narrow).needs_smtputf8
    assert sent(narrow).mime.isascii()
    for field in ("from", "cc", "bcc", "reply_to"):
        assert accepted(mail(**{field: "zoë@example.com"})).needs_smtputf8, field


IDS = " ".join(f"<{number:04d}.{'r' * 24}@desk.example>" for number in range(120))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        (
            "List-Unsubscribe",
            "<https://news.example/leave/YWRhQGV4Ojc=?list=7>, <mailto:leave@news.example>",
        ),
        ("List-Unsubscribe", "<https://news.example/=?utf-8?q?abc?=/leave>"),  # PHPMailer#2312
        ("List-Unsubscribe-Post", "List-Unsubscribe=One-Click"),
        ("List-Help", f"<https://news.example/help?token={'Zm9v' * 150}=?x>"),  # fluent-smtp#413
        ("References", IDS),  # freescout#5542, mikel/mail#401: 5 KB of a long thread
        ("In-Reply-To", "<CAF=?_x@mail.example.com>"),
        ("Feedback-ID", "campaign=?7:shop:mail:acme"),
        ("X-Campaign-Link", "https://news.example/c/QUJDRA==?=1"),  # odoo#289182
        ("X-Note", "a=?b?=c"),
    ],
)
def test_a_header_that_holds_no_encoded_word_goes_out_as_it_is(name: str, value: str) -> None:
    read = sent(mail(headers={name: value}))
    assert (
        re.sub(r"\r\n(?=[ \t])", "", f"{read.header}\r\n").partition(f"\r\n{name}: ")[2].partition("\r\n")[0] == value
    )
    assert max(map(len, read.mime.split(b"\r\n"))) <= 998


@pytest.mark.parametrize("value", ["=?utf-8?q?abc?=", "x =?utf-8?b?YWJj?= y", "=?a?Q?b c?=", "é", "a" * 2000])
def test_free_text_that_would_be_taken_for_something_else_is_encoded(value: str) -> None:
    read = sent(mail(headers={"X-Note": value}))
    assert read.new["X-Note"] == value
    assert max(map(len, read.mime.split(b"\r\n"))) <= 998


@pytest.mark.parametrize(
    "kind",
    ["text/calendar; method=REQUEST", "text/calendar; charset=utf-8; method=CANCEL", "TEXT/Calendar;METHOD=REPLY"],
)
def test_an_invitation_is_an_alternative_that_calendars_answer(kind: str) -> None:
    """RFC 6047 2.4: nextcloud/mail#10416, PHPMailer#175, SwiftMail#176, resend-node#198, EGroupware#103."""
    body = mail(html="<p>Come</p>", attachments=[{"filename": "invite.ics", "content": HELLO, "content_type": kind}])
    read = sent(body)
    assert shape(read.new) == {"multipart/alternative": ["text/plain", "text/html", "text/calendar"]}
    [part] = [new for new, _ in read.leaves if new.get_content_type() == "text/calendar"]
    assert part.get_content_disposition() is None
    assert part.get_payload(decode=True) == b"hello"
    assert part["Content-Type"].params["name"] == "invite.ics"


def test_of_several_invitations_none_hides_another() -> None:
    file = {"filename": "a.ics", "content": HELLO, "content_type": "text/calendar; method=REQUEST"}
    read = sent(mail(attachments=[file, file | {"filename": "b.ics"}]))
    assert [one["disposition"] for one in read.files] == ["attachment", "attachment"]


@pytest.mark.parametrize("value", [f"<{'a' * 62}@x.example> ", f" <{'a' * 80}@x.example>", "  <a@x.example>  "])
def test_no_header_line_is_blank(value: str) -> None:
    """RFC 5322 3.2.2: some readers end the header there."""
    read = sent(mail(headers={"References": value}))
    assert read.new["References"].strip() == value.strip()
    assert all(line.strip() for line in read.header.split("\r\n"))


@pytest.mark.parametrize(
    "kind",
    ["text/calendar", "text/calendar-x; method=REQUEST", "text/calendar; charset=utf-8", "application/ics", "text/csv"],
)
def test_a_calendar_that_asks_for_nothing_is_a_file(kind: str) -> None:
    [file] = sent(with_file(content_type=kind)).files
    assert file["disposition"] == "attachment"


@pytest.mark.parametrize(
    "name", ["report.pdf", 'a "b" c.txt', "Re: a#1?.pdf", "Grüße.pdf", "=?utf-8?q?x?=.txt", "é" * 100]
)
def test_a_files_name_stands_where_older_readers_look(name: str) -> None:
    [old] = [old for new, old in sent(with_file(filename=name)).leaves if new.get_content_disposition()]
    assert str(make_header(decode_header(str(old.get_param("name")).replace('\\"', '"')))) == name
    assert sent(with_file(filename=name, content_type="a/b; name=x")).files[0]["content_type"] == "a/b; name=x"


@pytest.mark.parametrize("tail", ["= ", " ", "\t", "=\t", "é "])
@pytest.mark.parametrize("size", range(70, 80))
def test_no_quoted_printable_line_is_longer_than_76(size: int, tail: str) -> None:
    """RFC 2045 6.7, rule 5."""
    body = sent(mail(text=f"é\n{'x' * size}{tail}\nend")).mime.partition(b"\r\n\r\n")[2]
    assert max(map(len, body.split(b"\r\n"))) <= 76
