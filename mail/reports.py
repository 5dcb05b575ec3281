"""What a mail server or a mailbox provider reports about a mail: a bounce or a complaint, read from the report's bytes.

Pure. A report says so in its own Content-Type, and what it says is in its direct parts: nothing is looked for deeper,
so a mail that quotes or forwards a report is none. Autoreplies, read receipts, delays and deliveries are none either.
Whether it is about a mail of ours, and true, mail.bounces finds out.

Standards: RFC 3462, 3464, 6533 (bounces), 5965 (complaints). Two forms are older than these, Exim's before 2016 and
qmail's: they name no mail, and count only with a return path of ours.
"""

from __future__ import annotations

import binascii
import quopri
import re
from collections.abc import Iterator
from typing import NamedTuple

SIZE = 256 * 1024  # bytes of a report that are looked at; the mail that it is about comes last in it, its header first
MOST_PARTS, MOST_RECIPIENTS, MOST_FIELDS = 10, 100, 500
LONGEST_TEXT = 500  # characters of what a server has said
BOUNCE, COMPLAINT = "bounce", "complaint"
COMPLAINTS = {"abuse", "fraud", "virus", "opt-out", "opt-out-list"}  # not-spam and auth-failure are none
STATUS_PARTS = {"message/delivery-status", "message/global-delivery-status"}
ORIGINALS = {"message/rfc822", "text/rfc822-headers", "message/global", "message/global-headers"}
NAME = re.compile(r"[!-9;-~]{1,80}")
MEDIA_TYPE = re.compile(r"\s*([!-.0-:<-~]+/[!-.0-:<-~]+)")
PARAMETER = re.compile(r';\s*([\w-]+)\s*=\s*(?:"((?:[^"\\]|\\.)*)"|([^\s;"]+))')
STATUS = re.compile(r"(?<![\d.])([245]\.\d{1,3}\.\d{1,3})(?![\d.])", re.ASCII)
CODE = re.compile(r"(?<![\d.])([45]\d\d)(?![\d.])", re.ASCII)
UNICODE = re.compile(r"\\x\{([0-9A-Fa-f]{1,6})\}")  # RFC 6533 3: an address in ASCII that is none
CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]+")
QMAIL = re.compile(r"Hi\. This is the [^\n]*\n(?:[^\n]+\n)*\n", re.IGNORECASE)  # the first paragraph; RFC 1894's elder


class Failed(NamedTuple):
    """A recipient in a report: the addresses that it has there, the nearest to ours first."""

    addresses: tuple[str, ...]
    status: str = ""  # RFC 3463, such as 5.1.1; of a complaint, its type
    code: int | None = None
    text: str = ""


class Report(NamedTuple):
    """Reports on one mail. `envelopes` is text in which the mail's return path may be. A report may leave out the
    Message-ID, a complaint its recipients."""

    kind: str
    recipients: tuple[Failed, ...]
    message_id: str = ""
    envelopes: str = ""
    by: str = ""


class Part:
    """A header and what follows it, as text; of a field that is repeated, the first counts."""

    def __init__(self, text: str) -> None:
        self.head, _, self.body = ("", "", text[1:]) if text.startswith("\n") else text.partition("\n\n")
        self.fields = fields(self.head)
        given = self.fields.get("content-type", "")[:2000]
        named = MEDIA_TYPE.match(given)
        self.type = named[1].lower() if named else "text/plain"
        self.parameters = {name.lower(): quoted or bare for name, quoted, bare in PARAMETER.findall(given)}

    def parts(self) -> list[Part]:
        """Returns its direct parts, of which the last may end early."""
        boundary = self.parameters.get("boundary", "")
        if not 0 < len(boundary) <= 70:
            return []
        found, start = [], -1
        for line in re.finditer(rf"^--{re.escape(boundary)}(--)?[ \t]*$", self.body, re.MULTILINE):
            if start >= 0:
                found.append(Part(self.body[start : line.start() - 1]))
            start = line.end() + 1
            if line[1] or len(found) == MOST_PARTS:
                return found
        return [*found, Part(self.body[start:])] if start >= 0 else []

    def decoded(self) -> str:
        encoding = self.fields.get("content-transfer-encoding", "").strip().lower()
        octets = self.body.encode(errors="surrogateescape")
        try:
            if encoding == "base64":
                return as_text(binascii.a2b_base64(octets))
            return as_text(quopri.decodestring(octets)) if encoding == "quoted-printable" else self.body
        except binascii.Error:
            return ""


def read(data: bytes) -> Report | None:
    """Returns what is reported, or None for a mail that is no report of a failure or of a complaint."""
    whole = Part(as_text(data[:SIZE]))
    if whole.type != "multipart/report":
        return _older_form(whole)
    kind, parts = whole.parameters.get("report-type", "").lower(), whole.parts()
    original = next((Part(one.decoded().lstrip("\n")) for one in parts if one.type in ORIGINALS), Part(""))
    if kind == "delivery-status":
        told = next((one.decoded() for one in parts if one.type in STATUS_PARTS), "")
        found = Report(BOUNCE, tuple(_failed(told)), by=_reporter(told))
    elif kind == "feedback-report":
        told = next((one.decoded() for one in parts if one.type == "message/feedback-report"), "")
        found = Report(COMPLAINT, tuple(_complained(told, whole, original)), by=_reporter(told))
    else:
        return None
    envelopes = "\n".join((whole.head, told, original.head))
    return found._replace(message_id=message_id_of(original), envelopes=envelopes) if found.recipients else None


def message_id_of(part: Part) -> str:
    named = re.search(r"<[!-;=?-~]{1,998}>", part.fields.get("message-id", ""))
    return named[0] if named else ""


def as_text(octets: bytes) -> str:
    return re.sub("\r\n?", "\n", octets.decode(errors="surrogateescape"))


def fields(head: str) -> dict[str, str]:
    """Returns the fields of a header by their names in small letters, without folds; what is none is left out."""
    found: dict[str, str] = {}
    for line in re.sub(r"\n[ \t]+", " ", head).split("\n", MOST_FIELDS)[:MOST_FIELDS]:
        name, colon, value = line.partition(":")
        if colon and NAME.fullmatch(name.rstrip()):
            found.setdefault(name.rstrip().lower(), value.strip())
    return found


def _failed(told: str) -> Iterator[Failed]:
    """Yields the recipients whom a delivery status says to be given up: those delayed, relayed or served are not."""
    for block in re.split(r"\n[ \t]*\n", told)[: MOST_RECIPIENTS + 1]:
        about = fields(block.lstrip("\n"))
        addresses = tuple(filter(None, (_address(about.get(f"{which}-recipient", "")) for which in WHICH)))
        said = about.get("diagnostic-code", "")
        status = STATUS.search(about.get("status", "")) or STATUS.search(said)
        if addresses and about.get("action", "").lower().strip() == "failed" and not (status and status[1][0] == "2"):
            yield Failed(addresses, status[1] if status else "", _code(said), _words(said.partition(";")[2] or said))


WHICH = ("original", "final")


def _complained(told: str, whole: Part, original: Part) -> Iterator[Failed]:
    about = fields(told.lstrip("\n"))
    kind = about.get("feedback-type", "").lower().strip()
    if kind not in COMPLAINTS:
        return
    named = re.findall(r"^original-rcpt-to:([^\n]*)", told, re.IGNORECASE | re.MULTILINE)[:MOST_RECIPIENTS]
    named += [part.fields.get("x-hmxmroriginalrecipient", "") for part in (whole, original)]  # Microsoft's
    addresses = dict.fromkeys(filter(None, map(_address, named)))
    yield from (Failed((one,), kind) for one in addresses)
    if not addresses:
        yield Failed((), kind)


def _reporter(told: str) -> str:
    about = fields(told.lstrip("\n").partition("\n\n")[0])
    host = re.match(r"[\w.:\[\]-]{1,253}(?![\w@])", about.get("reporting-mta", "").partition(";")[2].strip())
    return host[0] if host else ""


def _older_form(whole: Part) -> Report | None:
    """Reads Exim's form of old, which has the recipients in its header, and qmail's (QSBMF), which has them in text."""
    body, daemon = whole.body, "mailer-daemon" in whole.fields.get("from", "").lower()
    if not daemon or whole.type != "text/plain":
        return None
    if named := whole.fields.get("x-failed-recipients"):
        addresses = filter(None, map(_address, named.split(",")[:MOST_RECIPIENTS]))
        below = _below(body)
        found = [Failed((one,), *_told(below.get(one.lower(), ""))) for one in addresses]
    elif begun := QMAIL.match(body.lstrip("\n")):
        paragraphs = re.split(r"\n(?=<|-)", "\n" + body.lstrip("\n")[begun.end() :])[1 : MOST_RECIPIENTS + 1]
        found = [Failed((one,), *_told(text)) for one, text in map(_recipient_of_qmail, paragraphs) if one]
    else:
        return None
    return Report(BOUNCE, tuple(found), envelopes=whole.head) if found else None


def _recipient_of_qmail(paragraph: str) -> tuple[str, str]:
    first, _, text = paragraph.partition("\n")
    return (_address(first.rstrip(": ")) if first.startswith("<") else ""), text


def _below(body: str) -> dict[str, str]:
    """Returns what Exim says below each address that a line has alone, in small letters: in one go."""
    found: dict[str, str] = {}
    for line in re.finditer(r"^[ \t]*<?([^\s<>]{3,320})>?[ \t]*$", body, re.MULTILINE):
        text = body[line.end() : line.end() + 4 * LONGEST_TEXT]
        found.setdefault(line[1].lower(), re.split(r"\n[ \t]*\n|\n-", text, maxsplit=1)[0])
    return found


def _told(text: str) -> tuple[str, int | None, str]:
    status = STATUS.search(text)
    return status[1] if status else "", _code(text), shown(text)


def _words(said: str) -> str:
    """Returns what a server has said behind its code."""
    return re.sub(r"^\d{3}[ -]", "", shown(said))


def _code(said: str) -> int | None:
    found = CODE.search(said)
    return int(found[1]) if found else None


def _address(given: str) -> str:
    """Returns the address of `rfc822; ada@example.com`, "" for what is none."""
    kind, semicolon, rest = given.partition(";")
    text = UNICODE.sub(_character, shown(rest if semicolon else kind)).strip("<> \t\"'")
    return text if 3 <= len(text) <= 320 and "@" in text[1:-1] and " " not in text else ""


def _character(found: re.Match[str]) -> str:
    number = int(found[1], 16)
    return chr(number) if 0x20 < number < 0xD800 or 0xDFFF < number < 0x110000 else " "


def shown(text: str) -> str:
    """Returns a line that can be stored and shown."""
    return re.sub(" +", " ", CONTROL.sub(" ", text[: 4 * LONGEST_TEXT])).strip()[:LONGEST_TEXT]
