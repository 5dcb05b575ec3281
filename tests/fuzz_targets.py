"""The parsers of what strangers write, each as a function of any bytes that raises if the parser is wrong about them.

tests/test_fuzz.py calls them with a fixed corpus, with what hypothesis makes of it, and from coverage-guided fuzzing.
"""

from __future__ import annotations

import email
import io
import json
import re
from base64 import b64encode
from collections.abc import Callable
from contextlib import suppress
from email.header import decode_header, make_header
from email.utils import getaddresses
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import h11
from bottle import request
from waitress.adjustments import Adjustments

from mail import reports
from mail.address import Mailbox
from mail.draft import prepare
from mail.mime import to_mime
from mail.plain import text_of
from mail.request import FieldError, Invalid
from smtp.envelope import Envelope
from smtp.policy import Verdict
from smtp.session import Session, Stopped
from smtp.verdict import LONGEST_HINT
from tests.conversations import at
from tests.sample_mails import DATE, ID, is_fit_for_the_wire
from tests.smtp_samples import ADA, BOB, LOGIN, MIME, SENDER
from web import octets
from web.body import read_json
from web.errors import Refusal
from web.grammar import Parser

CHUNKED = b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n"
Reading = tuple[str, str, dict[str, str], bytes, int]  # method, target, headers but for framing, body, length in bytes


def as_we_read(data: bytes, step: int) -> Reading | str:
    """The first request in `data`, which comes in packets of `step` bytes; "more" or "refused" if there is none."""
    parser, at = Parser(Adjustments()), 0
    while at < len(data) and not parser.completed:
        at += parser.received(data[at : at + step])
    if parser.error or not parser.completed:
        return "refused" if parser.error else "more"
    headers = {name: value for name, value in parser.headers.items() if name != "CONTENT_LENGTH"}
    return parser.command, parser.request_uri, headers, parser.get_body_stream().read(), at


def as_h11_reads(data: bytes) -> Reading | str:
    connection, head, body = h11.Connection(h11.SERVER, 2**17), None, b""
    headers: dict[str, str] = {}
    rest = data[2 * data.startswith(b"\r\n") :]  # RFC 9112, 2.2
    connection.receive_data(rest or b"\r")  # nothing would mean that the client has hung up
    try:
        while not isinstance(event := connection.next_event(), h11.EndOfMessage):
            if event is h11.NEED_DATA:
                return "more"
            head = event if isinstance(event, h11.Request) else head
            body += event.data if isinstance(event, h11.Data) else b""
    except h11.RemoteProtocolError as error:
        return str(error)
    assert head
    if len({name for name, _ in head.headers} & {b"content-length", b"transfer-encoding"}) == 2:
        return "h11 takes one of the two, another reader may take the other"
    for name, value in ((one.decode().upper(), other.decode("latin-1")) for one, other in head.headers):
        if "_" not in name and name not in ("CONTENT-LENGTH", "TRANSFER-ENCODING"):  # Waitress leaves out the former
            known = name.replace("-", "_")
            headers[known] = f"{headers[known]}, {value}" if known in headers else value
    return head.method.decode(), head.target.decode(), headers, body, len(data) - len(connection.trailing_data[0])


def check_http(data: bytes) -> None:
    """In whatever pieces it comes, a request is refused, or is the one that h11 reads, to the same byte."""
    found, other = as_we_read(data, len(data)), as_h11_reads(data)
    assert found == as_we_read(data, 1)
    bare = re.search(rb"(?<!\r)\n", data)  # which is refused as the head is whole
    assert found in ("refused", other) or (found == "more" and (bare or isinstance(other, str))), (found, other)


def with_base64(body: Any) -> Any:
    """The same with the base64 of each file that came as a list of octets."""
    for one in octets.files_in(body):
        content: Any = one.get("content")
        is_buffer = isinstance(content, dict) and set(content) == {"type", "data"} and content["type"] == "Buffer"
        data = content["data"] if is_buffer else content
        if isinstance(data, list) and data:
            with suppress(TypeError, ValueError):
                one["content"] = b64encode(bytes(data)).decode()
    return body


def check_mail(data: bytes) -> None:
    """What is asked is refused by its field, or can be written, and is read back as it was asked."""
    request.bind({"CONTENT_TYPE": "application/json", "CONTENT_LENGTH": len(data), "wsgi.input": io.BytesIO(data)})
    wrong: list[FieldError] = []
    try:
        body = read_json(2**20)
        once = json.loads(data, object_pairs_hook=lambda pairs: len(dict(pairs)) == len(pairs) and dict(pairs))
        assert with_base64(body) == with_base64(once)
        json.dumps(body, allow_nan=False, ensure_ascii=False).encode()
        message = prepare(body, default_sender=Mailbox("", SENDER), max_recipients=50).message
    except (Refusal, Invalid) as refused:
        wrong = [*refused.errors]
    if wrong:
        assert [error for error in wrong if error.field and error.message] == wrong
        return
    mime = to_mime(message, ID, DATE)
    assert is_fit_for_the_wire(mime)
    read = email.message_from_string(mime.decode())
    for header, boxes in (("From", [message.sender]), ("To", message.to), ("Cc", message.cc), ("Bcc", [])):
        assert [one for _, one in getaddresses(read.get_all(header, []))] == [box.address for box in boxes]
    optional = ["Cc"] * bool(message.cc) + ["Reply-To"] * bool(message.reply_to)
    ours = ["From", "To", *optional, "Subject", "Date", "Message-ID", "MIME-Version", *message.headers]
    assert [name for name in read if not name.startswith("Content-")] == ours
    for name, value in {"Subject": message.subject, **message.headers}.items():
        assert str(make_header(decode_header(re.sub("\r?\n", "", read[name])))) == value
    text = text_of(message.html) if message.text is None and message.html else message.text
    texts = bool(text or not message.html) + bool(message.html)
    assert sum(not part.is_multipart() for part in read.walk()) == texts + len(message.attachments)


def check_smtp(data: bytes) -> None:
    """Whatever a relay says, the conversation ends with a reply, and a mail counts as accepted only if the last of as
    many replies as there were commands accepts it."""
    says, heard, session = io.BytesIO(data), io.BytesIO(), Session(at(25, login=LOGIN))
    quiet = {"settimeout": lambda seconds: None, "close": lambda: None}
    wire = SimpleNamespace(makefile=lambda mode: says, sendall=heard.write, **quiet)
    session.connect = lambda: setattr(session.smtp, "sock", wire)  # type: ignore[method-assign]
    try:
        session.begin(Envelope(SENDER, [ADA, BOB]), MIME)
        final = session.finish()
    except Stopped as stopped:
        final = stopped.reply
    for reply in (final, *session.replies.values()):
        assert 0 <= reply.pause <= LONGEST_HINT
        assert len(reply.text) <= 500
        assert reply.summary.isascii()
    commands, _, body = heard.getvalue().partition(b"\r\nDATA\r\n")
    assert body.endswith(b"\r\n.\r\n") or final.verdict not in (Verdict.ACCEPTED, Verdict.IN_DOUBT)
    if final.verdict is Verdict.ACCEPTED:
        said = [line[:3] for line in data[: says.tell()].split(b"\n") if line and line[3:4] != b"-"]
        assert (said[-2], said[-1][:1]) == (b"354", b"2")
        assert len(said) == commands.count(b"\r\n") + 4  # and the greeting, the last of these commands, DATA and dot


def check_report(data: bytes) -> None:
    """Whatever a report says, what is read of it is bounded, can be stored and shown, and is the same with bare LF."""
    found = reports.read(data)
    assert found == reports.read(re.sub(b"\r\n?", b"\n", data))
    if not found:
        return
    assert 1 <= len(found.recipients) <= reports.MOST_RECIPIENTS
    assert re.fullmatch(r"(<[!-~]+>)?", found.message_id)
    assert "@" not in found.by
    for one in found.recipients:
        assert all("@" in address and address.isprintable() and len(address) <= 320 for address in one.addresses)
        assert re.fullmatch(r"([245]\.\d+\.\d+)?", one.status, re.ASCII) or one.status in reports.COMPLAINTS
        assert len(one.text) <= reports.LONGEST_TEXT
        assert (one.text + found.by).isprintable()
        assert one.code is None or 400 <= one.code < 600


TARGETS: dict[str, Callable[[bytes], None]] = {"http": check_http, "chunks": lambda data: check_http(CHUNKED + data)}
TARGETS |= {"mail": check_mail, "smtp": check_smtp, "report": check_report}


def corpus(name: str) -> list[bytes]:
    """Of one target; each line of its file is one sample, written with Python's escapes."""
    lines = (Path(__file__).parent / "corpus" / f"{name}.txt").read_text().splitlines()
    return [line.encode("latin-1").decode("unicode_escape").encode("latin-1") for line in lines]
