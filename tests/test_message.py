"""Facts about `mail.message`: what is asked is what a receiver reads, and what cannot be sent so is refused by name.

The properties make mail of odd but lawful requests, take it through everything that the service and a worker do with it
(`parse`, `compose`, JSON and back, `to_mime`), and read the bytes with Python's `email`, which is not what wrote them.
They are read twice, by the new parser (`policy.default`) and by the old one (`compat32`): each has faults of its own,
and they differ between the Pythons that we run on.
"""

from __future__ import annotations

import base64
import re
import unicodedata
from collections.abc import Iterator
from datetime import datetime, timedelta, timezone
from email import message_from_string, policy
from email.header import decode_header, make_header
from email.utils import getaddresses, parseaddr
from typing import Any, NamedTuple

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from mail.address import Mailbox
from mail.message import Message, compose, message_id
from mail.mime import to_mime
from mail.request import FieldError, Invalid, Request, parse

DATE = datetime(2025, 1, 31, 12, 30, 15, 999999, tzinfo=timezone.utc)
ID = "<0b9c7e3a-1f0e-4c39-9a55-3f0f7f0d2c11@example.com>"
HELLO = base64.b64encode(b"hello").decode()
Json = Any
Rendered = tuple[str, str | None, str | None]


def mail(**fields: Json) -> dict[str, Json]:
    """A request that is right but for the fields given; None takes a field away."""
    body = {"from": "ada@example.com", "to": "bob@example.com", "subject": "Hello", "text": "Hi Bob", **fields}
    return {name: value for name, value in body.items() if value is not None}


def with_file(**fields: Json) -> dict[str, Json]:
    one = {"filename": "a.txt", "content": HELLO, **fields}
    return mail(html="<p>", attachments=[{name: value for name, value in one.items() if value is not None}])


def accepted(body: Json, rendered: Rendered | None = None) -> Message:
    """The mail as a worker finds it."""
    request = parse(body, default_sender=Mailbox("Acme", "hello@example.com"), max_recipients=50)
    outline, content = compose(request, rendered).to_json()
    return Message.from_json(outline.encode(), "".join(content).encode())


def sent(body: Json) -> Read:
    return Read(to_mime(accepted(body), ID, DATE))


def outcome(body: Json, rendered: Rendered | None = None) -> Message | Invalid:
    try:
        return accepted(body, rendered)
    except Invalid as refused:
        return refused


def refusal(body: Json, rendered: Rendered | None = None) -> dict[str, str]:
    """field -> message"""
    refused = outcome(body, rendered)
    assert isinstance(refused, Invalid)
    return {error.field: error.message for error in refused.errors}


# --- reading a mail as its receivers do -------------------------------------------------------------------------------


class Read:
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
    def shape(self) -> Any:
        return shape(self.new)

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
    content_type, *parameters = old.get_params()
    return {
        "filename": old.get_filename(),
        "content": new.get_payload(decode=True),
        "content_type": "; ".join([content_type[0], *(f"{name}={value}" for name, value in parameters)]),
        "content_id": new["Content-ID"] and str(new["Content-ID"]),
        "disposition": new.get_content_disposition(),
    }


def is_fit_for_the_wire(mime: bytes) -> bool:
    lines, header = mime.split(b"\r\n"), mime.partition(b"\r\n\r\n")[0]
    if re.search(rb"\r\n[ \t]*\r\n", header):  # RFC 5322 3.2.2: no line of a header may look empty
        return False
    return lines[-1] == b"" and not [line for line in lines if b"\r" in line or b"\n" in line or len(line) > 998]


# --- odd but lawful requests ------------------------------------------------------------------------------------------

PROPERTY = settings(
    max_examples=120,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much],
)
WHOLE = settings(PROPERTY, max_examples=60)  # of the slower kind: whole mails
ODD = [
    *("=?utf-8?q?x?=", "=?utf-8?b?eA==?=", "=?x?", "=?", "?=", "_", "=20", "%20", "utf-8''x"),
    *(" ", "  ", "     ", "\xa0", "\u3000", "\xad", "\ufeff", "\u200b", "\u200d"),
    *(",", '"', "'", "<", ">", "@", "(", ")", ";", ":", "[", "]", ".", "..", "*", "a@b.example,", "\\"),
    *("é", "ß", "e\u0301", "\u0301", "ﬀ", "İ", "שלום", "\u200f", "\u202e", "日本語", "😀", "👨\u200d👩\u200d👧"),
    *("\ufffe", "\ue000", "\U0010ffff", "\u0378", "x" * 80, "é" * 60, "😀" * 30),
]
CHARACTER = st.characters(exclude_categories=("Cc", "Cs", "Zl", "Zp"))
ASCII = st.characters(min_codepoint=32, max_codepoint=126)


def odd_lines(oddities: list[str]) -> st.SearchStrategy[str]:
    """Of any characters, or of ASCII alone, which travels in other ways."""
    wide = st.sampled_from(oddities) | st.text(CHARACTER, max_size=12) | st.text(ASCII, max_size=30)
    narrow = st.sampled_from([odd for odd in oddities if odd.isascii()]) | st.text(ASCII, max_size=30)
    return st.lists(wide, max_size=15).map("".join) | st.lists(narrow, max_size=15).map("".join)


def odd_text(longest: int) -> st.SearchStrategy[str]:
    full = st.text(CHARACTER, min_size=longest, max_size=longest)
    return (odd_lines(ODD) | full).map(lambda text: text[:longest])


class Box(NamedTuple):
    written: str
    name: str
    address: str


ATEXT = "abcdefghijklmnopqrstuvwxyzABCXYZ0123456789!#$%&'*+-/=?^_`{|}~"
LOCAL = st.lists(st.text(ATEXT, min_size=1, max_size=15), min_size=1, max_size=4).map(".".join)
WIDE_LOCAL = st.text("äöüéñßøłжяשא日本語中ひカabc0", min_size=1, max_size=15)
LABEL = st.text("abcdefghijklmnopqrstuvwxyz0123456789", min_size=1, max_size=20)
DOMAIN = st.sampled_from(  # as written, as sent
    [
        ("example.com", "example.com"),
        ("Mail.EXAMPLE.Com", "mail.example.com"),
        ("bücher.example.com", "xn--bcher-kva.example.com"),
        ("BÜCHER.example.com", "xn--bcher-kva.example.com"),
        ("xn--bcher-kva.example.com", "xn--bcher-kva.example.com"),
        ("日本語.jp", "xn--wgv71a119e.jp"),
        ("пример.рф", "xn--e1afmkfd.xn--p1ai"),
    ]
) | st.lists(LABEL, min_size=1, max_size=4).map(lambda labels: (".".join([*labels, "com"]),) * 2)


@st.composite
def boxes(draw: st.DrawFn, local: st.SearchStrategy[str] = LOCAL | WIDE_LOCAL) -> Box:
    name = draw(st.just("") | odd_text(200))
    before = unicodedata.normalize("NFC", draw(local.filter(lambda text: "=?" not in text)))
    written, domain = draw(DOMAIN)
    if not name:
        return Box(
            draw(st.sampled_from(["{}", "<{}>", " {} "])).format(f"{before}@{written}"), "", f"{before}@{domain}"
        )
    is_plain = not re.search(r'[",;:@\\()\[\]<>]', name)
    quoted = '"' + name.replace("\\", "\\\\").replace('"', '\\"') + '"'
    said = draw(st.sampled_from([quoted, name])) if is_plain else quoted
    return Box(f"{said} <{before}@{written}>", name.strip(" "), f"{before}@{domain}")


IN_A_BODY = [
    *("\n", "\r\n", "\r", "\n.\n", "\r.\r", "\r\n.\r\n", "\n..", " \n", "\t\n", "\nFrom ", "\n--", "\n--=_", "\n\n"),
    *("\t", "=", "=20", "x" * 79, "x" * 1100),
]
BODY = odd_lines(IN_A_BODY + ODD)
TOKEN = st.text("abcxyzABC0123456789!#$&^_.+-", min_size=1, max_size=12)
PARAMETERS = st.dictionaries(TOKEN.map(lambda name: f"x{name}".lower()), TOKEN | st.just("v" * 60), max_size=2)
HEADER_NAME = st.text(st.characters(min_codepoint=33, max_codepoint=126, exclude_characters=":"), max_size=74)


@st.composite
def content_types(draw: st.DrawFn) -> str:
    kind = draw(st.sampled_from(["application/pdf", "text/calendar", "text/html", "image/svg+xml", "font/x!#$&^_.+-"]))
    glue = draw(st.sampled_from([";", "; "]))
    return glue.join([kind, *(f"{name}={value}" for name, value in draw(PARAMETERS).items())])


def is_file_name(text: str) -> bool:
    return text.strip() not in ("", ".", "..") and "/" not in text and "\\" not in text


@st.composite
def files(draw: st.DrawFn) -> dict[str, str]:
    file = {
        "filename": draw(odd_text(200).filter(is_file_name)),
        "content": base64.b64encode(draw(st.binary(max_size=200))).decode(),
        "content_type": draw(content_types()),
    }
    content_id = draw(st.none() | st.text("abcXYZ019._@+-", min_size=1, max_size=20))
    return file | ({"content_id": content_id} if content_id else {})


def content_id_or_itself(file: dict[str, str]) -> object:
    return file.get("content_id") or id(file)


FILES = st.lists(files(), max_size=4, unique_by=content_id_or_itself)
HEADERS = st.lists(
    st.tuples(HEADER_NAME.map("X-".__add__), odd_text(998)), max_size=4, unique_by=lambda header: header[0].lower()
).map(dict)


def as_read(text: str) -> str:
    """What MIME makes of a text: one kind of line ends, and one at the end."""
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    return text if text.endswith("\n") else text + "\n"


@st.composite
def requests(draw: st.DrawFn) -> tuple[dict[str, Json], dict[str, list[Box]]]:
    """The body of a request, and everybody in it."""
    everybody = {
        "from": [draw(boxes())],
        "to": draw(st.lists(boxes(), min_size=1, max_size=4)),
        "cc": draw(st.lists(boxes(), max_size=3)),
        "bcc": draw(st.lists(boxes((LOCAL | WIDE_LOCAL).map("hidden.".__add__)), max_size=3)),
        "reply_to": draw(st.lists(boxes(), max_size=2)),
    }
    body: dict[str, Json] = {name: [box.written for box in boxes] for name, boxes in everybody.items()}
    body["from"] = body["from"][0]
    if len(body["to"]) == 1 and draw(st.booleans()):
        body["to"] = body["to"][0]
    body |= {"subject": draw(odd_text(998)), "headers": draw(HEADERS), "attachments": draw(FILES)}
    body |= draw(st.fixed_dictionaries({"html": BODY.map("<p>".__add__)}, optional={"text": BODY}))
    return body, everybody


# --- what is asked is what is read ------------------------------------------------------------------------------------


@WHOLE
@given(requests())
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
@given(boxes())
def test_an_address_is_what_every_parser_of_addresses_finds(box: Box) -> None:
    assert Mailbox.parse(box.written) == (box.name, box.address)
    assert parseaddr(box.address) == ("", box.address)
    assert Mailbox.parse(str(Mailbox.parse(box.written))) == (box.name, box.address)


@PROPERTY
@given(odd_text(998))
@example("x" * 998)
@example("x " * 499)
@example(" ")
def test_a_subject_is_read_as_asked(subject: str) -> None:
    assert sent(mail(subject=subject)).new["Subject"] == subject


@PROPERTY
@given(HEADERS)
@example({"X-" + "n" * 74: "é"})
def test_custom_headers_are_read_as_asked(headers: dict[str, str]) -> None:
    read = sent(mail(headers=headers))
    assert {name: str(read.new[name]) for name in headers} == headers
    assert all(len(read.new.get_all(name)) == 1 for name in headers)


@PROPERTY
@given(BODY, BODY)
def test_text_and_html_are_read_as_asked(text: str, html: str) -> None:
    read = sent(mail(text="-" + text, html="<" + html))
    assert read.text("plain") == as_read("-" + text)
    assert read.text("html") == as_read("<" + html)


@WHOLE
@given(FILES)
def test_files_are_read_as_asked(attachments: list[dict[str, str]]) -> None:
    read = sent(mail(html="<p>", attachments=attachments))
    expected = [
        {
            "filename": file["filename"].strip(),
            "content": base64.b64decode(file["content"]),
            "content_type": re.sub("; ?", "; ", file["content_type"]),
            "content_id": f"<{file['content_id']}>" if "content_id" in file else None,
            "disposition": "inline" if "content_id" in file else "attachment",
        }
        for file in attachments
    ]
    assert read.files == sorted(expected, key=lambda file: file["disposition"] == "attachment")  # the inline ones first


@WHOLE
@given(requests())
def test_any_mail_is_fit_for_the_wire(asked: tuple[dict[str, Json], dict[str, list[Box]]]) -> None:
    body, everybody = asked
    read = sent(body)
    assert is_fit_for_the_wire(read.mime)
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


# --- what cannot be sent as asked is refused by name ------------------------------------------------------------------

HOSTILE = [
    *("\x00", "a\r\nBcc: eve@example.com", "a\nb", "a\rb", "\x0b", "\x0c", "\x1c", "\x7f", "\x85", "\u2028", "\ud800"),
    *("x" * 100_000, "😀" * 50_000, " " * 50_000, "<" * 50_000, '"' * 50_000, "a@" * 50_000, "\\" * 999, "a." * 500),
    *("a@b.co, c@d.co", "a@b.co>", "<a@b.co", '"a" <a@b.co>, b@c.co', "", "{message}", "{}", "%s", "[key]"),
]
HOSTILE_TEXT = st.sampled_from(HOSTILE) | st.text(st.characters(), max_size=20)
HOSTILE_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | HOSTILE_TEXT,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(HOSTILE_TEXT, inner, max_size=4),
    max_leaves=8,
)
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
    body, _ = draw(requests())
    body["tags"] = [{"name": "a", "value": "b"}]
    body |= draw(st.sampled_from([{}, {"template": {"id": "welcome", "variables": {"name": "Ada"}}}]))
    for _ in range(draw(st.integers(1, 3))):
        container, key, _ = draw(st.sampled_from(list(places(body))))
        if isinstance(container[key], str) and draw(st.booleans()):
            where = draw(st.integers(0, len(container[key])))
            container[key] = container[key][:where] + draw(HOSTILE_TEXT) + container[key][where:]
        elif isinstance(container, dict) and draw(st.booleans()):
            container[draw(HOSTILE_TEXT)] = container.pop(key)
        else:
            container[key] = draw(HOSTILE_JSON)
    return body


def names_a_place(error: FieldError, body: Json) -> bool:
    # A lone surrogate cannot be named in an answer that is UTF-8; pydantic puts U+FFFD for each of its bytes.
    present = {path.encode("utf-8", "surrogatepass").decode("utf-8", "replace") for _, _, path in places(body)}
    one_person = re.fullmatch(r"(\w+)\[0\]", error.field)  # to: "ada@example.com" is to: ["ada@example.com"]
    parent = re.sub(r"(\.\w+|\[\d+\])$", "", error.field)
    return (
        error.field in present | FIELDS | {"body"}
        or (error.missing and parent in present)
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
        assert is_fit_for_the_wire(to_mime(found, ID, DATE))


@PROPERTY
@given(HOSTILE_JSON | st.dictionaries(st.sampled_from(sorted(FIELDS)), HOSTILE_JSON))
def test_nothing_but_a_refusal_comes_of_nonsense(body: Json) -> None:
    with pytest.raises(Invalid) as caught:
        accepted(body)
    assert all(error.field and error.message for error in caught.value.errors)


RENDERED = st.none() | HOSTILE_TEXT | BODY


@PROPERTY
@given(HOSTILE_TEXT | odd_text(998), RENDERED, RENDERED)
def test_what_a_template_rendered_is_sent_as_it_is_or_refused(subject: str, text: str | None, html: str | None) -> None:
    found = outcome(mail(subject=None, text=None, template={"id": "x"}), (subject, text, html))
    if isinstance(found, Invalid):
        fields = {error.field for error in found.errors}
        assert fields <= {"template", "template.subject", "template.text", "template.html"}
    else:
        read = Read(to_mime(found, ID, DATE))
        assert read.new["Subject"] == subject
        assert read.text("plain") == (as_read(text) if text else None)
        assert read.text("html") == (as_read(html) if html else None)


WRONG_TYPES = [
    *((field, value) for field in ("from", "subject", "text", "html") for value in (7, True, ["x"], {"x": "y"})),
    *((field, value) for field in ("to", "cc", "bcc", "reply_to") for value in (None, 7, {"email": "a@b.co"})),
    *((field, value) for field in ("headers", "template") for value in ("x", 7, ["x"])),
    *((field, value) for field in ("attachments", "tags") for value in ("x", 7, {"x": "y"}, None)),
]


@pytest.mark.parametrize(("field", "value"), WRONG_TYPES)
def test_a_field_of_the_wrong_type_is_refused(field: str, value: Json) -> None:
    assert list(refusal(mail() | {field: value})) == [field]


def test_recipients_may_be_one_or_a_list_and_nothing_else() -> None:
    assert accepted(mail(to="bob@example.com")) == accepted(mail(to=["bob@example.com"]))
    assert refusal(mail(to={"email": "a@b.co"})) == {"to": "write an address or a list of addresses"}


@pytest.mark.parametrize(
    ("body", "field"),
    [
        (mail(to=[7]), "to[0]"),
        (mail(cc=["ada@example.com", None]), "cc[1]"),
        (mail(headers={"X-Foo": 7}), "headers.X-Foo"),
        (mail(headers={"X-Foo": None}), "headers.X-Foo"),
        (mail(attachments=["x"]), "attachments[0]"),
        (with_file(filename=7), "attachments[0].filename"),
        (with_file(content=7), "attachments[0].content"),
        (with_file(content_type=7), "attachments[0].content_type"),
        (with_file(content_id=7), "attachments[0].content_id"),
        (mail(tags=[{"name": "a", "value": 7}]), "tags[0].value"),
        (mail(text=None, template={"id": 7}), "template.id"),
        (mail(text=None, template={"id": "x", "variables": []}), "template.variables"),
    ],
)
def test_the_wrong_type_inside_a_field_is_named_by_its_path(body: Json, field: str) -> None:
    assert list(refusal(body)) == [field]


@pytest.mark.parametrize("body", [None, True, 7, "x", [], [mail()]])
def test_a_body_that_is_no_object_is_refused(body: Json) -> None:
    assert refusal(body) == {"body": "write a JSON object"}


def test_everything_that_is_wrong_is_named_at_once() -> None:
    body = mail(to=["bob@example.com", "bob"], subject="a\nb", attachments=[{"filename": "x"}], colour="red")
    assert list(refusal(body)) == ["to[1]", "subject", "attachments[0].content", "colour"]


CONTROLS = [
    "\r",
    "\n",
    "\r\n",
    "\x00",
    "\t",
    "\x0b",
    "\x0c",
    "\x1b",
    "\x1c",
    "\x7f",
    "\x85",
    "\u2028",
    "\u2029",
    "\ud800",
]


@pytest.mark.parametrize("control", CONTROLS)
@pytest.mark.parametrize(
    ("template", "field"),
    [
        ({"from": '"Ada{}Bcc: eve@example.com" <ada@example.com>'}, "from"),
        ({"from": "ada{}@example.com"}, "from"),
        ({"to": ["ada@example.com{}"]}, "to[0]"),
        ({"cc": ["Ada{} <ada@example.com>"]}, "cc[0]"),
        ({"bcc": ["ada@example.com{}RCPT TO:<eve@example.com>"]}, "bcc[0]"),
        ({"reply_to": ["{}ada@example.com"]}, "reply_to[0]"),
        ({"subject": "a{}Bcc: eve@example.com"}, "subject"),
        ({"headers": {"X-Foo": "a{}Bcc: eve@example.com"}}, "headers.X-Foo"),
        ({"attachments": [{"filename": "a{}b.txt", "content": ""}]}, "attachments[0].filename"),
        ({"attachments": [{"filename": "a", "content": "", "content_type": "a/b{}"}]}, "attachments[0].content_type"),
        ({"attachments": [{"filename": "a", "content": "", "content_id": "a{}"}]}, "attachments[0].content_id"),
    ],
)
def test_a_control_character_in_what_becomes_a_header_is_refused(
    template: dict[str, Json], field: str, control: str
) -> None:
    assert list(refusal(mail(**spelled_with(template, control)))) == [field]


def spelled_with(value: Json, control: str) -> Json:
    if isinstance(value, dict):
        return {name: spelled_with(member, control) for name, member in value.items()}
    if isinstance(value, list):
        return [spelled_with(member, control) for member in value]
    return value.format(control)


@pytest.mark.parametrize(
    "name", ["X-Foo\r\nBcc", "X-Foo:", "X Foo", "X-Foo ", " X-Foo", "", "X-Föö", "X\x00", "x" * 77]
)
def test_a_header_name_that_is_none_is_refused(name: str) -> None:
    assert "header name" in refusal(mail(headers={name: "x"}))[f"headers.{name}"]


@pytest.mark.parametrize("control", ["\x00", "\x08", "\x0b", "\x0c", "\x1b", "\x7f", "\ud800"])
@pytest.mark.parametrize("field", ["text", "html"])
def test_a_control_character_in_a_body_is_refused(field: str, control: str) -> None:
    assert list(refusal(mail(**{field: f"a{control}b"}))) == [field]


NO_ADDRESS = [
    *("", " ", "@", "ada", "ada@", "@example.com", "ada@@example.com", "ada@example", "ada@.com", "ada@example..com"),
    *("ada@example.com.", "ada@-example.com", "ada@example.com-", "ada@exa_mple.com", "ada@localhost"),
    *(".ada@example.com", "ada.@example.com", "a..da@example.com", "a da@example.com", "ada @example.com"),
    *("alice@example.org)bob@b.co", "(comment)ada@example.com", "ada@example.com (Ada)", "ada(x)@example.com"),
    *("ada@example.com SIZE=1", "ada@example.com> SIZE=1", "<ada@example.com> SIZE=1", "ada@example.com,"),
    *('"ada"@example.com', '"a b"@example.com', '"a@b"@example.com', '"a\\"b"@example.com'),
    *("<@relay.example,@b.example:ada@example.com>", "@relay.example:ada@example.com", "group: ada@example.com;"),
    *("ada@[192.0.2.1]", "ada@[IPv6:2001:db8::1]", "ada@192.0.2.1", "<>", "Ada <>", "mailto:ada@example.com"),
    *("<ada@example.com", "ada@example.com>", "<<ada@example.com>>", "<ada@example.com><", "Ada ada@example.com"),
    *("\xa0ada@example.com", "ada@example.com\u200b", "e\u0301@example.com", "=?utf-8?q?x?=@example.com"),
    *("ada@xn--a.com", "ada@e\u202excample.com", "a\u202eda@example.com", f"{'a' * 250}@example.com"),
]


@pytest.mark.parametrize("address", NO_ADDRESS)
@pytest.mark.parametrize("field", ["to", "from"])
def test_what_a_parser_could_read_in_two_ways_is_no_address(field: str, address: str) -> None:
    assert list(refusal(mail(**{field: address}))) == ["to[0]" if field == "to" else "from"]


@pytest.mark.parametrize("glue", [", ", ",", ";", "; ", " ", "> <"])
@pytest.mark.parametrize("form", ["{}", "<{}>", "Ada <{}>", '"Ada" <{}>'])
def test_two_addresses_in_one_are_refused(form: str, glue: str) -> None:
    assert list(refusal(mail(to=[form.format(f"ada@example.com{glue}bob@example.com")]))) == ["to[0]"]
    two = glue.join([form.format("ada@example.com"), form.format("bob@example.com")])
    assert list(refusal(mail(to=["ok@example.com", two]))) == ["to[1]"]


@pytest.mark.parametrize(
    "name",
    ["Lovelace, Ada", "Ada; Bob", "Ada (x)", "Ada: x", "a@b.example", "a\\b", 'A "Ada" B', '"a", "b"', '"a\\"', "a<b"],
)
def test_a_name_with_special_characters_is_refused_without_its_quotes(name: str) -> None:
    assert "double quotes" in refusal(mail(to=f"{name} <ada@example.com>"))["to[0]"]


def test_the_case_of_a_local_part_is_kept() -> None:
    message = accepted(mail(to=["Info@EXAMPLE.com", "POSTMASTER@Example.com", "McAda@example.com"]))
    assert message.recipients == ["Info@example.com", "POSTMASTER@example.com", "McAda@example.com"]


def test_a_long_list_is_refused_before_each_of_its_addresses_is_looked_at() -> None:
    assert refusal(mail(to=["nobody"] * 1001)) == {"to": "it holds too many; at most 1000 are allowed"}


def test_an_endless_address_is_refused_before_it_is_looked_at() -> None:
    assert refusal(mail(to="bob@example.com" + " " * 984)) == {"to[0]": "it is longer than 998 characters"}


def test_more_recipients_than_allowed_are_refused_across_to_cc_and_bcc() -> None:
    people = [f"p{number}@example.com" for number in range(51)]
    assert len(accepted(mail(to=people[:20], cc=people[20:40], bcc=people[40:50])).recipients) == 50
    told = refusal(mail(to=people[:20], cc=people[20:40], bcc=people[40:51]))
    assert told == {"to": "51 recipients in to, cc and bcc; at most 50 are allowed"}


def test_somebody_in_to_and_cc_is_served_once_and_named_twice() -> None:
    body = mail(to=["Bob <bob@example.com>", "bob@EXAMPLE.com"], cc="bob@example.com", bcc="bob@example.com")
    assert accepted(body).recipients == ["bob@example.com"]
    assert sent(body).boxes("To") == [("Bob", "bob@example.com"), ("", "bob@example.com")]
    assert sent(body).boxes("Cc") == [("", "bob@example.com")]


def test_the_default_sender_writes_where_none_is_named() -> None:
    assert accepted(mail(**{"from": None})).sender == Mailbox("Acme", "hello@example.com")
    assert accepted(mail()).sender == Mailbox("", "ada@example.com")


def test_without_a_sender_and_a_default_the_mail_is_refused() -> None:
    with pytest.raises(Invalid) as caught:
        parse(mail(**{"from": None}), default_sender=None, max_recipients=50)
    assert caught.value.errors == (FieldError("from", "this field is required", missing=True),)


@pytest.mark.parametrize("field", ["to", "subject"])
def test_a_missing_field_is_told_as_missing(field: str) -> None:
    with pytest.raises(Invalid) as caught:
        accepted(mail(**{field: None}))
    assert caught.value.errors == (FieldError(field, "this field is required", missing=True),)


@pytest.mark.parametrize(
    "body", [mail(colour="red"), mail(sender="a@b.example"), mail(To="a@b.example"), mail(**{"": 1})]
)
def test_an_unknown_field_is_refused(body: Json) -> None:
    (field,) = set(body) - FIELDS
    assert refusal(body) == {field or "body": "there is no such field"}


def test_an_unknown_field_inside_another_is_refused() -> None:
    assert list(refusal(with_file(path="/etc/passwd"))) == ["attachments[0].path"]
    assert list(refusal(mail(tags=[{"name": "a", "value": "b", "x": 1}]))) == ["tags[0].x"]
    assert list(refusal(mail(text=None, template={"id": "welcome", "text": "{{ x }}"}))) == ["template.text"]


@pytest.mark.parametrize(
    "content",
    ["?", "aGVsbG8", "aGVsbG8=\n", "aGVs\r\nbG8=", " aGVsbG8=", "aGVsbG9=", "aGVsbG8==", "aGVsbG_-", "é", "===="],
)
def test_base64_that_another_decoder_may_refuse_or_read_differently_is_refused(content: str) -> None:
    assert "base64" in refusal(with_file(content=content))["attachments[0].content"]


@pytest.mark.parametrize(
    "name", ["", " ", ".", "..", " .. ", "a/b", "/etc/passwd", "a\\b", "..\\x", "C:\\x", "x" * 201]
)
def test_a_file_name_with_a_path_in_it_or_without_a_name_is_refused(name: str) -> None:
    assert list(refusal(with_file(filename=name))) == ["attachments[0].filename"]


@pytest.mark.parametrize(
    "kind",
    [
        *("message/rfc822", "Message/RFC822", "message/partial", "multipart/mixed", "MULTIPART/x; boundary=x"),
        *("", "text", "text/", "/plain", "text/plain;", "text/plain; charset", "text/plain; charset=", "a/b/c"),
        *(
            "text/plain; a=1; A=2",
            'text/plain; name="a b"',
            "text/plain\r\nBcc: x@b.example",
            "text/ö",
            "a/" + "b" * 200,
        ),
    ],
)
def test_a_media_type_that_cannot_be_attached_is_refused(kind: str) -> None:
    assert list(refusal(with_file(content_type=kind))) == ["attachments[0].content_type"]


def test_a_calendar_keeps_its_method() -> None:
    (file,) = sent(with_file(content_type="text/calendar; method=REQUEST", filename="invite.ics")).files
    assert file["content_type"] == "text/calendar; method=REQUEST"


def test_a_parameter_with_a_long_name_is_kept() -> None:
    kind = f"application/x; {'n' * 90}={'v' * 90}"  # EmailMessage never comes back from this one
    assert sent(with_file(content_type=kind)).files[0]["content_type"] == kind


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("report.pdf", "application/pdf"),
        ("REPORT.PDF", "application/pdf"),
        ("photo.jpeg", "image/jpeg"),
        ("Re: a#1?.pdf", "application/pdf"),
        ("data:text,x.pdf", "application/pdf"),
        ("archive.tar.gz", "application/octet-stream"),
        ("archive.tgz", "application/octet-stream"),
        ("mail.eml", "application/octet-stream"),
        ("page.mht", "application/octet-stream"),
        ("noending", "application/octet-stream"),
        ("pdf", "application/octet-stream"),
        (".pdf", "application/octet-stream"),
    ],
)
def test_the_type_of_a_file_is_told_by_its_ending_unless_said(name: str, kind: str) -> None:
    assert sent(with_file(filename=name)).files[0]["content_type"] == kind
    assert sent(with_file(filename=name, content_type="a/b")).files[0]["content_type"] == "a/b"


RESERVED = [
    *("From", "To", "Cc", "Bcc", "Sender", "Reply-To", "Date", "Subject", "Message-ID", "MIME-Version", "Content-Type"),
    *("Content-Transfer-Encoding", "Content-Disposition", "Content-X", "Return-Path", "Received", "Resent-From"),
    *("Resent-Bcc", "DKIM-Signature", "ARC-Seal", "Authentication-Results", "Received-SPF", "Delivered-To"),
]


@pytest.mark.parametrize("name", RESERVED)
def test_a_header_that_is_ours_is_refused_in_any_case(name: str) -> None:
    for spelled in (name, name.lower(), name.upper(), name.swapcase()):
        assert "written by this service" in refusal(mail(headers={spelled: "x"}))[f"headers.{spelled}"]


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


def test_a_header_twice_in_different_cases_is_refused() -> None:
    assert list(refusal(mail(headers={"X-Foo": "1", "X-Bar": "2", "x-foo": "3"}))) == ["headers.x-foo"]


@pytest.mark.parametrize(
    ("body", "field"),
    [
        (mail(subject="x" * 999), "subject"),
        (mail(headers={"X-Foo": "x" * 999}), "headers.X-Foo"),
        (mail(headers={f"X-{number}": "x" for number in range(51)}), "headers"),
        (mail(to=f'"{"x" * 201}" <bob@example.com>'), "to[0]"),
        (mail(to=f"{'x' * 990}@example.com"), "to[0]"),
        (mail(attachments=[{"filename": "x", "content": ""}] * 51), "attachments"),
        (with_file(content_id="x" * 129), "attachments[0].content_id"),
        (mail(tags=[{"name": "a", "value": "b"}] * 51), "tags"),
        (mail(tags=[{"name": "a" * 257, "value": "b"}]), "tags[0].name"),
    ],
)
def test_what_is_too_long_is_refused(body: Json, field: str) -> None:
    assert list(refusal(body)) == [field]


@pytest.mark.parametrize(
    "body",
    [
        mail(subject="x" * 998, headers={f"X-{number}": "x" * 998 for number in range(50)}),
        mail(headers={"X-" + "n" * 74: "x" * 900 + " " * 9 + "y" * 89}),
        mail(text="x" * 999, html="<p>" + "y " * 600),
        mail(headers={"X-" + "n" * 74: "x" * 998, "x-" + "m" * 74: "x" * 950}),
        mail(headers={"X-Foo": "x" * 70 + " " * 9 + "y" * 80}),
        mail(to=f'"{"x" * 200}" <bob@example.com>'),
        mail(
            attachments=[{"filename": "x" * 200, "content": "", "content_id": f"{n:0>128}"} for n in range(50)],
            html="<p>",
        ),
        mail(attachments=[{"filename": "😀" * 200, "content": ""}]),
    ],
)
def test_what_is_just_not_too_long_is_fit_for_the_wire(body: Json) -> None:
    assert is_fit_for_the_wire(sent(body).mime)


@pytest.mark.parametrize("extra", [{"html": "<p>"}, {"text": "x"}, {"html": ""}, {"text": ""}])
def test_a_template_and_a_body_of_ones_own_are_refused_together(extra: dict[str, str]) -> None:
    body = mail(text=None, subject=None, template={"id": "welcome"}) | extra
    assert list(refusal(body, ("Hello", "x", None))) == ["template"]


@pytest.mark.parametrize("bodies", [{}, {"text": ""}, {"html": ""}, {"text": "", "html": ""}])
def test_a_mail_without_text_and_html_is_refused(bodies: dict[str, str]) -> None:
    assert list(refusal(mail(text=None) | bodies)) == ["text"]


@pytest.mark.parametrize("rendered", [("s", None, None), ("s", "", None), ("s", "", "")])
def test_a_template_that_renders_neither_text_nor_html_is_refused(rendered: Rendered) -> None:
    assert list(refusal(mail(text=None, template={"id": "x"}), rendered)) == ["template"]


def test_a_template_brings_the_subject_unless_the_request_does() -> None:
    body = mail(text=None, template={"id": "x"})
    assert accepted(body, ("Rendered", "t", "<p>")).subject == "Hello"
    assert accepted(body | {"subject": ""}, ("Rendered", "t", "<p>")).subject == ""
    del body["subject"]
    message = accepted(body, ("Rendered", "t", "<p>"))
    assert (message.subject, message.text, message.html) == ("Rendered", "t", "<p>")


@pytest.mark.parametrize("control", CONTROLS)
def test_a_variable_cannot_bring_a_header_into_the_mail(control: str) -> None:
    body = mail(text=None, subject=None, template={"id": "welcome"})
    told = refusal(body, (f"Welcome, Ada{control}Bcc: eve@example.com", "Hi", None))
    assert list(told) == ["template.subject"]


def test_two_files_with_one_content_id_are_refused() -> None:
    file = {"filename": "a.png", "content": HELLO, "content_id": "logo"}
    told = refusal(mail(html="<p>", attachments=[file, {"filename": "b", "content": ""}, file]))
    assert list(told) == ["attachments[2].content_id"]


@pytest.mark.parametrize("html", [None, ""])
def test_an_inline_file_without_html_is_refused(html: str | None) -> None:
    assert list(refusal(with_file(content_id="logo") | {"html": html})) == ["attachments[0].content_id"]
    body = mail(text=None, template={"id": "x"}, attachments=[{"filename": "a", "content": "", "content_id": "logo"}])
    assert list(refusal(body, ("Hello", "Hi", html))) == ["attachments[0].content_id"]


def test_errors_speak_to_somebody_who_knows_no_python() -> None:
    everything_wrong = [
        mail(to=[]),
        mail(to=None),
        *(mail() | {field: value} for field, value in WRONG_TYPES),
        mail(subject="x" * 999, colour="red", tags=[{"name": "a b", "value": ""}] * 3),
        mail(tags=[{"name": "a", "value": "b"}] * 51, headers={f"X-{n}": "x" for n in range(51)}),
        mail(text="\ud800", headers={"\ud800": "\ud800"}),
        with_file(content_id="<logo>"),
    ]
    said = {sentence for body in everything_wrong for sentence in refusal(body).values()}
    assert not [
        sentence for sentence in said if re.search(r"(?i)input|valid|dictionary|instance|pattern|item", sentence)
    ]


# --- the bytes --------------------------------------------------------------------------------------------------------


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
Content-Type: image/png
Content-Transfer-Encoding: base64
Content-Disposition: inline;
 filename="logo.png"
Content-ID: <logo>

aGVsbG8=

--=_r_9d3f11a32872d6497d3e2b07--

--=_a_9d3f11a32872d6497d3e2b07--

--=_m_9d3f11a32872d6497d3e2b07
Content-Type: application/pdf
Content-Transfer-Encoding: base64
Content-Disposition: attachment;
 filename*=utf-8''r%C3%A9sum%C3%A9%201.pdf

aGVsbG8=

--=_m_9d3f11a32872d6497d3e2b07--
"""


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        (mail(), "text/plain"),
        (mail(html=""), "text/plain"),
        (mail(text=None, html="<p>"), "text/html"),
        (mail(text="", html="<p>"), "text/html"),
        (mail(html="<p>"), {"multipart/alternative": ["text/plain", "text/html"]}),
        (
            mail(attachments=[{"filename": "a.pdf", "content": ""}]),
            {"multipart/mixed": ["text/plain", "application/pdf"]},
        ),
        (
            mail(text=None, html="<p>", attachments=[{"filename": "a.png", "content": "", "content_id": "a"}]),
            {"multipart/related": ["text/html", "image/png"]},
        ),
    ],
)
def test_a_mail_has_no_more_parts_than_it_needs(body: Json, expected: Json) -> None:
    assert sent(body).shape == expected


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


def test_a_message_id_is_in_the_domain_of_the_sender() -> None:
    assert message_id("0b9c", Mailbox.parse("Ada <ada@Bücher.example>")) == "<0b9c@xn--bcher-kva.example>"


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
    assert read.shape == {"multipart/alternative": ["text/plain", "text/html"]}
    assert read.text("plain") == as_read(text)


def test_a_local_part_beyond_ascii_travels_as_utf8_and_a_domain_never_does() -> None:
    wide, narrow = mail(to="Zoë <zoë@bücher.example>"), mail(to="Zoë <zoe@bücher.example>")
    assert accepted(wide).needs_smtputf8
    assert "zoë@xn--bcher-kva.example".encode() in sent(wide).mime
    assert not accepted(narrow).needs_smtputf8
    assert sent(narrow).mime.isascii()
    for field in ("from", "cc", "bcc", "reply_to"):
        assert accepted(mail(**{field: "zoë@example.com"})).needs_smtputf8, field


def test_an_outline_without_content_is_still_a_message() -> None:
    request = parse(mail(tags=[{"name": "a", "value": "b"}]), default_sender=None, max_recipients=1)
    outline, _ = compose(request).to_json()
    message = Message.from_json(outline)
    assert (message.subject, message.text, message.tags) == ("Hello", None, [{"name": "a", "value": "b"}])
    assert str(message.to[0]) == "bob@example.com"
