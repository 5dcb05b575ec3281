"""Mails for tests: requests that are right but for one thing, and odd but lawful ones at random."""

from __future__ import annotations

import base64
import re
import unicodedata
from datetime import datetime, timezone
from typing import Any, NamedTuple

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from mail.address import Mailbox
from mail.draft import compose
from mail.message import Message
from mail.request import Invalid, parse

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


def is_fit_for_the_wire(mime: bytes) -> bool:
    lines, header = mime.split(b"\r\n"), mime.partition(b"\r\n\r\n")[0]
    if re.search(rb"\r\n[ \t]*\r\n", header):  # RFC 5322 3.2.2: no line of a header may look empty
        return False
    return lines[-1] == b"" and not [line for line in lines if b"\r" in line or b"\n" in line or len(line) > 998]


PROPERTY = settings(
    max_examples=120,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much],
)
WHOLE = settings(PROPERTY, max_examples=60)  # of the slower kind: whole mails
# fmt: off
ODD = [
    "=?utf-8?q?x?=", "=?utf-8?b?eA==?=", "=?x?", "=?", "?=", "_", "=20", "%20", "utf-8''x",
    " ", "  ", "     ", "\xa0", "\u3000", "\xad", "\ufeff", "\u200b", "\u200d",
    ",", '"', "'", "<", ">", "@", "(", ")", ";", ":", "[", "]", ".", "..", "*", "a@b.example,", "\\",
    "é", "ß", "e\u0301", "\u0301", "ﬀ", "İ", "שלום", "\u200f", "\u202e", "日本語", "😀", "👨\u200d👩\u200d👧",
    "\ufffe", "\ue000", "\U0010ffff", "\u0378", "x" * 80, "é" * 60, "😀" * 30,
]
ODD_IN_A_BODY = [
    "\n", "\r\n", "\r", "\n.\n", "\r.\r", "\r\n.\r\n", "\n..", " \n", "\t\n", "\nFrom ", "\n--", "\n--=_", "\n\n",
    "\t", "=", "=20", "x" * 79, "x" * 1100, *ODD,
]
CONTROLS = [
    "\r", "\n", "\r\n", "\x00", "\t", "\x0b", "\x0c", "\x1b", "\x1c", "\x7f", "\x85", "\u2028", "\u2029", "\ud800",
]
HOSTILE = [
    *CONTROLS, "a\r\nBcc: eve@example.com", "a\nb", "a\rb",
    "x" * 100_000, "😀" * 50_000, " " * 50_000, "<" * 50_000, '"' * 50_000, "a@" * 50_000, "\\" * 999, "a." * 500,
    "a@b.co, c@d.co", "a@b.co>", "<a@b.co", '"a" <a@b.co>, b@c.co', "", "{message}", "{}", "%s", "[key]",
]
DOMAINS = [  # as written, as sent
    ("example.com", "example.com"), ("Mail.EXAMPLE.Com", "mail.example.com"), ("日本語.jp", "xn--wgv71a119e.jp"),
    ("bücher.example.com", "xn--bcher-kva.example.com"), ("BÜCHER.example.com", "xn--bcher-kva.example.com"),
    ("xn--bcher-kva.example.com", "xn--bcher-kva.example.com"), ("пример.рф", "xn--e1afmkfd.xn--p1ai"),
]
# fmt: on
HOSTILE_TEXT = st.sampled_from(HOSTILE) | st.text(st.characters(), max_size=20)
HOSTILE_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | HOSTILE_TEXT,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(HOSTILE_TEXT, inner, max_size=4),
    max_leaves=8,
)
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
LABELS = st.lists(LABEL, min_size=1, max_size=4).map(lambda labels: ".".join([*labels, "com"]))
DOMAIN = st.sampled_from(DOMAINS) | LABELS.map(lambda domain: (domain, domain))


@st.composite
def boxes(draw: st.DrawFn, local: st.SearchStrategy[str] = LOCAL | WIDE_LOCAL) -> Box:
    name = draw(st.just("") | odd_text(200))
    before = unicodedata.normalize("NFC", draw(local.filter(lambda text: "=?" not in text)))
    written, domain = draw(DOMAIN)
    if not name:
        form = draw(st.sampled_from(["{}", "<{}>", " {} "]))
        return Box(form.format(f"{before}@{written}"), "", f"{before}@{domain}")
    is_plain = not re.search(r'["@<>]|=\?', name)
    quoted = '"' + name.replace("\\", "\\\\").replace('"', '\\"') + '"'
    said = draw(st.sampled_from([quoted, name])) if is_plain else quoted
    return Box(f"{said} <{before}@{written}>", name.strip(" "), f"{before}@{domain}")


BODY = odd_lines(ODD_IN_A_BODY)
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


FILES = st.lists(files(), max_size=4, unique_by=lambda file: file.get("content_id") or id(file))
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
