"""A mail that goes out as it came: what is refused, what is read of it, what is stored and sent."""

from __future__ import annotations

import re
import zlib
from email import message_from_bytes

import pytest

from mail.address import Mailbox
from mail.message import Message, Raw
from mail.mime import to_mime
from mail.raw import NotAMail, check, header_of, without
from tests.sample_mails import DATE, ID, accepted, mail

ADA = Mailbox("", "ada@example.com")
FULL = (
    b"From: Ada <ada@example.com>\r\nDate: Mon, 1 Jan 2024 00:00:00 +0000\r\nMessage-ID: <1@example.com>\r\n"
    b"DKIM-Signature: v=1;\r\n\tbh=x\r\nMime-Version: 1.0\r\nSubject:  two  spaces \r\n\r\n.\r\nh\xc3\xa4 \xff\r\n"
)


def raw(octets: bytes) -> Message:
    return Message(ADA, [ADA], [], [], [], "", raw=Raw(octets.decode("latin-1"), "bounce@example.com"))


def as_a_worker_finds_it(message: Message) -> Message:
    outline, content = message.to_json()
    return Message.from_json(outline, zlib.decompress(zlib.compress("".join(content).encode())))


@pytest.mark.parametrize(
    "bad",
    [
        *(b"a\n.\r\n", b"a\r.\r\n", b"a\r\r\n", b"a\n\r\n", b"\n", b"\r", b"a\n\r", b"\0\r\n"),
        *(b"x" * 999 + b"\r\n", b"ok\r\n" * 300 + b"x" * 999 + b"\r\nok\r\n", b"x" * 3000),
    ],
)
def test_what_two_servers_may_read_differently_is_refused(bad: bytes) -> None:
    with pytest.raises(NotAMail):
        check(b"A: b\r\n\r\n" + bad)


@pytest.mark.parametrize("good", [b"", b"\r\n", b"x" * 998 + b"\r\n", (b"x" * 998 + b"\r\n") * 3, b"a\r\n" * 5000])
def test_lines_of_up_to_998_octets_are_taken(good: bytes) -> None:
    check(b"A: b\r\n\r\n" + good)


@pytest.mark.parametrize("bad", [b"hello\r\n", b" folded\r\n\r\n", b"From x Mon\r\nA: b\r\n", b"\xc3\xa4: b\r\n"])
def test_what_has_no_header_is_no_mail(bad: bytes) -> None:
    with pytest.raises(NotAMail):
        header_of(bad)


def test_a_mail_goes_out_to_the_octet_whatever_is_in_it() -> None:
    assert to_mime(as_a_worker_finds_it(raw(FULL)), ID, DATE) == FULL
    large = FULL + bytes(range(1, 256)).replace(b"\r", b"").replace(b"\n", b"") * 4000
    assert to_mime(as_a_worker_finds_it(raw(large)), ID, DATE) == large


@pytest.mark.parametrize("octets", [b"Subject: x\r\n\r\nhi\r\n", b"\r\nhi\r\n", b"Subject: only a header\r\n", b""])
def test_what_a_mail_must_have_is_put_in_front_of_it(octets: bytes) -> None:
    sent = to_mime(raw(octets), ID, DATE)
    assert sent.endswith(octets)
    made = message_from_bytes(sent)
    assert (made["From"], made["Message-ID"], made["MIME-Version"]) == ("ada@example.com", ID, "1.0")
    assert made["Date"] == "Fri, 31 Jan 2025 12:30:15 +0000"
    assert len(made) == 4 + octets.startswith(b"Subject")


def test_fields_are_taken_out_whole_and_the_others_stay_to_the_octet() -> None:
    hidden = b"bCC: x@example.com,\r\n\t y@example.com\r\nX-Async-Email-Tag : a=b\r\n"
    mixed = FULL.replace(b"Mime-", hidden + b"Mime-")
    assert without(mixed, header_of(mixed), re.compile("bcc|x-async-email-.*")) == FULL
    assert without(FULL, header_of(FULL), re.compile("bcc")) is FULL


def test_mailboxes_are_read_as_people_write_them() -> None:
    written = b'To: =?utf-8?q?L=2C?= <a@EXAMPLE.com>, "B, C" <b@example.com>,\r\n d@example.com (D), nobody, <@>\r\n'
    boxes = header_of(written + b"\r\n").mailboxes("to")
    assert boxes == [("L,", "a@example.com"), ("B, C", "b@example.com"), ("D", "d@example.com")]


@pytest.mark.parametrize(
    ("octets", "sender", "smtputf8", "needs"),
    [
        (b"A: b\r\n", "", False, (False, False)),
        ("A: \u00e4\r\n".encode(), "", False, (False, True)),
        ("A: \u00e4\r\n".encode(), "", True, (True, True)),
        (b"A: b\r\n", "j\u00fcrgen@example.com", False, (True, False)),
    ],
)
def test_what_the_relay_must_take(octets: bytes, sender: str, smtputf8: bool, needs: tuple[bool, bool]) -> None:
    made = as_a_worker_finds_it(
        Message(ADA, [ADA], [], [], [], "", raw=Raw(octets.decode("latin-1"), sender, smtputf8))
    )
    assert ((made.needs_smtputf8, made.needs_8bitmime), made.envelope_sender) == (needs, sender)


def test_a_mail_of_the_api_is_stored_as_earlier_versions_read_it() -> None:
    assert "raw" not in "".join(accepted(mail()).to_json()[1])
    assert accepted(mail()).envelope_sender == "ada@example.com"
