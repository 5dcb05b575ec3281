"""What an e-mail is: request JSON -> `Message` -> MIME.

`parse` checks a request once, at the door, and refuses with the name of the field whatever could not be sent exactly as
asked: an address that a parser would rewrite, a control character in anything that ends in a header, a header that is
ours to write, base64 that is not. What it accepts, `to_mime` can always build; nothing fails later in a worker.

Pure: no I/O, no settings, no clock; the only home of `email.*`. It writes every header line itself, those of the parts
too: `EmailMessage` parses what it is given and writes what it understood, which for a file named `=?utf-8?q?x?=.txt`
is another name, and for a media type with a parameter name of 80 letters an endless loop.
Standards: RFC 5322 (headers), 2045-2047 and 2231 (MIME), 2387 (related), 6532 (UTF-8 headers), 5321 (lengths).
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
import mimetypes
import re
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from email.header import Header
from email.utils import format_datetime
from pathlib import PurePosixPath
from typing import Annotated, Any, Literal, NamedTuple
from urllib.parse import quote

from email_validator import EmailNotValidError, validate_email
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError
from pydantic_core import PydanticCustomError

CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")
CONTROL_IN_BODY = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ud800-\udfff]")
# Header text that needs no encoding and folds at its spaces. After the longest name (76) the longest word with the
# longest run of spaces still ends before column 998.
PLAIN = re.compile(r"[!-~]{1,900}(?: {1,9}[!-~]{1,900})*")
PLAIN_FILE_NAME = re.compile(r"[A-Za-z0-9_.,+@()-]+(?: [A-Za-z0-9_.,+@()-]+)*")
OURS = re.compile(  # headers that this service writes or the relay adds; a caller's would contradict them
    r"from|to|cc|bcc|sender|reply-to|date|subject|message-id|mime-version|content-.*|return-path|received|resent-.*"
    r"|dkim-signature|arc-.*|authentication-results|received-spf|delivered-to",
    re.IGNORECASE,
)
TOKEN = r"[A-Za-z0-9!#$&^_.+-]+"
CONTENT_TYPE = re.compile(rf"{TOKEN}/{TOKEN}(?:; ?{TOKEN}={TOKEN})*")
FOLD = ";\r\n "
DELIMITER = b"--=_"  # how the lines between parts begin; a text that holds it is encoded, and then it does not
MOMENT = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(?:\.\d{3}|\.\d{6})?(?:Z|[+-]\d\d:\d\d)", re.ASCII)
PIECE = 64 * 1024  # characters; of base64, a multiple of 4
COMPOSITE = ("multipart/", "message/")  # RFC 2046 5: these hold mail as it is, and never base64

REQUIRED = "this field is required"
SENTENCES = {  # pydantic's name of a fault -> what it is to a caller who knows no Python
    "missing": REQUIRED,
    "extra_forbidden": "there is no such field",
    "string_type": "write a string",
    "string_unicode": "it holds half of a surrogate pair, which is not a character",
    "string_too_short": "write {min_length} or more characters",
    "string_too_long": "it is longer than {max_length} characters",
    "list_type": "write a list",
    "too_short": "it holds too few; at least {min_length} is needed",
    "too_long": "it holds too many; at most {max_length} are allowed",
    "dict_type": "write a JSON object",
    "model_type": "write a JSON object",
    "literal_error": "write one of {expected}",
}


@dataclass(frozen=True)
class FieldError:
    field: str
    message: str
    missing: bool = False


class Invalid(Exception):
    """The request cannot be a mail. `errors` names each field and says what to do."""

    def __init__(self, *errors: FieldError) -> None:
        super().__init__("; ".join(f"{error.field}: {error.message}" for error in errors))
        self.errors = errors


def wrong(message: str) -> PydanticCustomError:
    return PydanticCustomError("wrong", "{message}", {"message": message})


class Mailbox(NamedTuple):
    """One address with an optional display name. `address` is what goes into the envelope, to the letter."""

    name: str
    address: str

    @classmethod
    def parse(cls, text: object) -> Mailbox:
        """`a@b.example` or `Name <a@b.example>`. Raises a validation error for anything less plain than that."""
        if isinstance(text, Mailbox):  # one that was checked before; JSON has no such thing
            return text
        if not isinstance(text, str):
            raise wrong("write a string such as ada@example.com or Ada Lovelace <ada@example.com>")
        if len(text) > 998:  # before any parser spends time on it
            raise wrong("it is longer than 998 characters")
        header_text(text)
        match = re.fullmatch(r"(?P<name>.*)<(?P<named>[^<>]*)>|(?P<bare>[^<>]*)", text.strip(" "))
        if not match:
            raise wrong("write one address, such as ada@example.com or Ada Lovelace <ada@example.com>")
        name = (match["name"] or "").strip(" ")
        return cls(display_name(name), strict_address(match["named"] or match["bare"] or ""))

    @property
    def needs_smtputf8(self) -> bool:
        return not self.address.isascii()

    def __str__(self) -> str:
        return f"{phrase(self.name)} <{self.address}>" if self.name else self.address


def display_name(text: str) -> str:
    if re.fullmatch(r'"(?:[^"\\]|\\.)*"', text):
        text = re.sub(r"\\(.)", r"\1", text[1:-1])
    elif re.search(r'[",;:@\\()\[\]<>]', text):
        raise wrong('put a display name with special characters in double quotes: "Lovelace, Ada" <ada@example.com>')
    if len(text) > 200:
        raise wrong("the display name is longer than 200 characters")
    return text.strip(" ")


def phrase(name: str) -> str:
    """A display name as RFC 5322 writes it: as it is if made of plain words, else as a quoted string."""
    if re.fullmatch(r"[^\W_]+(?: [^\W_]+)*", name):
        return name
    return '"' + name.replace("\\", r"\\").replace('"', r"\"") + '"'


def strict_address(text: str) -> str:
    """One addr-spec that no parser reads differently. Only the domain's spelling may change: lower case, A-labels."""
    try:
        found = validate_email(text, check_deliverability=False, test_environment=True)
    except EmailNotValidError as error:
        raise wrong(f"this is not an e-mail address: {error}" if text else "the address is empty") from None
    local = text.rpartition("@")[0]  # as written: the validator would make info@ of Info@
    if not unicodedata.is_normalized("NFC", local):
        raise wrong("the part before @ is not in Unicode's normal form (NFC); write it as it is meant")
    if "=?" in local:
        raise wrong("the part before @ holds =?, which mail programs take for the beginning of encoded text")
    return f"{local}@{found.ascii_domain}"


def header_text(text: str) -> str:
    if CONTROL.search(text):
        raise wrong("it holds a line break or another control character, which no header may")
    return text


def body_text(text: str) -> str:
    """Line ends become `\\n`, as MIME will make them one kind anyway."""
    if CONTROL_IN_BODY.search(text):
        raise wrong("it holds a control character other than tab and line break")
    return text.replace("\r\n", "\n").replace("\r", "\n")


def one_or_list(value: object) -> object:
    if not isinstance(value, (str, list)):
        raise wrong("write an address or a list of addresses")
    return [value] if isinstance(value, str) else value


def matching(pattern: str, advice: str) -> AfterValidator:
    def check(text: str) -> str:
        if not re.fullmatch(pattern, text):
            raise wrong(advice)
        return text

    return AfterValidator(check)


def canonical_base64(text: str) -> str:
    """The decoder forgives much, and others differ in what; what it makes of `text` must lead back to `text`. Looked at
    piece by piece: three copies of ten megabytes are too many."""
    try:
        pieces = (text[start : start + PIECE] for start in range(0, len(text), PIECE))
        is_canonical = all(base64.b64encode(base64.b64decode(piece)).decode() == piece for piece in pieces)
    except ValueError:
        is_canonical = False
    if not is_canonical or "=" in text[: max(0, len(text) - 2)]:
        raise wrong("it is not base64 without line breaks and padded with =")
    return text


def file_name(text: str) -> str:
    """Without spaces around it, which mail programs drop anyway."""
    text = header_text(text).strip()
    if text in ("", ".", "..") or "/" in text or "\\" in text:
        raise wrong("write a plain file name, without slashes")
    return text


def media_type(text: str) -> str:
    if not CONTENT_TYPE.fullmatch(text):
        raise wrong("write a media type such as application/pdf or text/csv; charset=utf-8")
    if text.lower().startswith(COMPOSITE):
        raise wrong("multipart/ and message/ types cannot be attached; use application/octet-stream")
    names = [parameter.partition("=")[0].strip().lower() for parameter in text.split(";")[1:]]
    if len(set(names)) < len(names):
        raise wrong("one of its parameters stands there twice")
    return text


def moment(text: object) -> datetime:
    """A time with its zone: `2026-11-21T12:30:00Z` (RFC 3339)."""
    advice = "write a time with its zone, such as 2026-11-21T12:30:00Z"
    if not isinstance(text, str) or not MOMENT.fullmatch(text):
        raise wrong(advice)
    try:
        return datetime.fromisoformat(text.replace("Z", "+00:00"))
    except ValueError:  # the 31st of February
        raise wrong(advice) from None


def header_name(name: str) -> str:
    if not re.fullmatch(r"[!-9;-~]{1,76}", name):
        raise wrong("a header name is made of 1 to 76 printable ASCII characters without a colon")
    if OURS.fullmatch(name):
        raise wrong("this header is written by this service or by the relay; leave it out")
    return name


Recipient = Annotated[Mailbox, BeforeValidator(Mailbox.parse)]
# 1000 is the highest MAX_RECIPIENTS. A longer list is refused before its addresses are looked at one by one.
Recipients = Annotated[list[Recipient], Field(max_length=1000), BeforeValidator(one_or_list)]
HeaderName = Annotated[str, AfterValidator(header_name)]
HeaderText = Annotated[str, Field(max_length=998), AfterValidator(header_text)]
BodyText = Annotated[str, AfterValidator(body_text)]
TagWord = Annotated[str, matching(r"[A-Za-z0-9_-]{1,256}", "write 1 to 256 letters, digits, - and _")]
ContentId = Annotated[str, matching(r"[A-Za-z0-9._@+-]{1,128}", "write 1 to 128 letters, digits and . _ @ + -")]


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, hide_input_in_errors=True)


class Attachment(Strict):
    """A file. With `content_id` it is shown inside the HTML, where `<img src="cid:...">` names it."""

    filename: Annotated[str, Field(max_length=200), AfterValidator(file_name)]
    content: Annotated[str, AfterValidator(canonical_base64)]
    content_type: Annotated[str, Field(max_length=200), AfterValidator(media_type)] | None = None
    content_id: ContentId | None = None

    @property
    def type(self) -> str:
        # guess_type takes URLs, and "Re: notes#1.pdf" looks like one; so it sees the ending alone
        guessed, encoding = mimetypes.guess_type("file" + PurePosixPath(self.filename).suffix)
        usable = guessed and not encoding and not guessed.startswith(COMPOSITE)
        return self.content_type or (guessed if usable else None) or "application/octet-stream"


class Tag(Strict):
    name: TagWord
    value: TagWord


class TemplateUse(Strict):
    id: str
    variables: dict[str, Any] = {}


class Request(Strict):
    """The body of `POST /emails`, field for field that of Resend's API as far as it goes."""

    sender: Recipient | None = Field(None, alias="from")
    to: Annotated[Recipients, Field(min_length=1)]
    cc: Recipients = Field(default_factory=list)
    bcc: Recipients = Field(default_factory=list)
    reply_to: Recipients = Field(default_factory=list)
    subject: HeaderText | None = None
    html: BodyText | None = None
    text: BodyText | None = None
    headers: Annotated[dict[HeaderName, HeaderText], Field(max_length=50, default_factory=dict)]
    attachments: Annotated[list[Attachment], Field(max_length=50, default_factory=list)]
    tags: Annotated[list[Tag], Field(max_length=50, default_factory=list)]
    template: TemplateUse | None = None
    # Not of Resend's: how this mail is to be treated, not what it says.
    expires_at: Annotated[datetime, BeforeValidator(moment)] | None = None
    on_doubt: Literal["retry", "hold"] | None = None


class Rendered(Strict):
    """What a template makes of its variables: held to the same rules as what a caller writes out."""

    subject: HeaderText
    text: BodyText | None
    html: BodyText | None


@dataclass(frozen=True)
class Message:
    """A mail that can be sent. The first group is its outline, the rest its content, which goes once it is sent."""

    sender: Mailbox
    to: list[Mailbox]
    cc: list[Mailbox]
    bcc: list[Mailbox]
    reply_to: list[Mailbox]
    subject: str
    tags: list[dict[str, str]] = field(default_factory=list)

    text: str | None = None
    html: str | None = None
    headers: dict[str, str] = field(default_factory=dict)
    attachments: list[dict[str, str]] = field(default_factory=list)

    CONTENT = ("text", "html", "headers", "attachments")

    @property
    def recipients(self) -> list[str]:
        """Everybody in the envelope, once each, in the order given."""
        return list(dict.fromkeys(box.address for box in (*self.to, *self.cc, *self.bcc)))

    @property
    def needs_smtputf8(self) -> bool:
        """RFC 6531: a local part that is not ASCII can travel only between servers that say SMTPUTF8."""
        boxes = (self.sender, *self.to, *self.cc, *self.bcc, *self.reply_to)
        return any(box.needs_smtputf8 for box in boxes)

    def to_json(self) -> tuple[str, Iterator[str]]:
        """(outline, content). The content may hold ten megabytes, so it comes in pieces."""
        whole = dict(vars(self))
        content = {name: whole.pop(name) for name in self.CONTENT}
        return _dump(whole), _pieces(content)

    @classmethod
    def from_json(cls, outline: str | bytes, content: str | bytes = "{}") -> Message:
        whole = {**json.loads(outline), **json.loads(content)}
        whole["sender"] = Mailbox(*whole["sender"])
        for name in ("to", "cc", "bcc", "reply_to"):
            whole[name] = [Mailbox(*box) for box in whole[name]]
        return cls(**whole)


def _dump(value: object) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


def _pieces(content: dict[str, Any]) -> Iterator[str]:
    """As `_dump` would write it, without a second copy of what is attached: base64 has nothing to escape."""
    files = content.pop("attachments")
    yield _dump(content)[:-1] + ',"attachments":['
    for number, file in enumerate(files):
        small = {name: value for name, value in file.items() if name != "content"}
        yield ("," if number else "") + _dump(small)[:-1] + ("," if small else "") + '"content":"'
        yield from (file["content"][start : start + PIECE] for start in range(0, len(file["content"]), PIECE))
        yield '"}'
    yield "]}"


def parse(body: object, *, default_sender: Mailbox | None, max_recipients: int) -> Request:
    """Checks the body of `POST /emails`. Raises `Invalid` with every field that is wrong."""
    if not isinstance(body, dict):
        raise Invalid(FieldError("body", "write a JSON object"))
    try:
        request = Request.model_validate(body)
    except ValidationError as error:
        raise Invalid(*field_errors(error)) from None
    request.sender = request.sender or default_sender
    _raise_if_any(_contradictions(request, max_recipients))
    return request


def _raise_if_any(errors: Iterator[FieldError]) -> None:
    if found := list(errors):
        raise Invalid(*found)


def _contradictions(request: Request, max_recipients: int) -> Iterator[FieldError]:
    """What is wrong although each field by itself is right."""
    if request.sender is None:
        yield FieldError("from", REQUIRED, missing=True)
    count = len(request.to) + len(request.cc) + len(request.bcc)
    if count > max_recipients:
        yield FieldError("to", f"{count} recipients in to, cc and bcc; at most {max_recipients} are allowed")
    for number in _repeated([name.lower() for name in request.headers]):
        yield FieldError(f"headers.{list(request.headers)[number]}", "it stands there twice, in different cases")
    for number in _repeated([one.content_id for one in request.attachments]):
        yield FieldError(f"attachments[{number}].content_id", "another attachment has the same")
    if not request.template:
        if request.subject is None:
            yield FieldError("subject", REQUIRED, missing=True)
        yield from _content_faults(request, request.text, request.html)
    elif request.html is not None or request.text is not None:
        yield FieldError("template", "a template brings its own html and text; leave those out")


def _repeated(values: Sequence[str | None]) -> list[int]:
    return [number for number, value in enumerate(values) if value is not None and value in values[:number]]


def _content_faults(request: Request, text: str | None, html: str | None) -> Iterator[FieldError]:
    if not text and not html:
        field = "template" if request.template else "text"
        yield FieldError(field, "there is neither text nor html; a mail without both says nothing")
    for number, one in enumerate(request.attachments):
        if one.content_id and not html:
            yield FieldError(f"attachments[{number}].content_id", "it is for images inside html, and there is no html")


def field_errors(error: ValidationError, prefix: str = "") -> list[FieldError]:
    """pydantic's findings as (field, sentence), the field written as one would in code: `attachments[0].content`."""
    found = []
    for fault in error.errors(include_input=False, include_url=False):
        parts = [part for part in fault["loc"] if part != "[key]"]  # pydantic's word for a name, here of a header
        path = prefix + "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in parts)
        sentence = SENTENCES.get(fault["type"], "").format(**fault.get("ctx", {}))
        text = sentence or fault["msg"].removeprefix("Value error, ")
        found.append(FieldError(path.removeprefix(".") or "body", text, missing=fault["type"] == "missing"))
    return found


def compose(request: Request, rendered: tuple[str, str | None, str | None] | None = None) -> Message:
    """The message of a checked request; `rendered` is the (subject, text, html) of its template.

    Raises `Invalid` if what was rendered cannot be sent: a variable may have put a line break into the subject.
    """
    subject, text, html = _checked(request, *rendered) if rendered else ("", request.text, request.html)
    assert request.sender  # parse saw to it
    return Message(
        sender=request.sender,
        to=request.to,
        cc=request.cc,
        bcc=request.bcc,
        reply_to=request.reply_to,
        subject=request.subject if request.subject is not None else subject,
        tags=[tag.model_dump() for tag in request.tags],
        text=text,
        html=html,
        headers=request.headers,
        attachments=[_attachment(one) for one in request.attachments],
    )


def _checked(request: Request, subject: str, text: str | None, html: str | None) -> tuple[str, str | None, str | None]:
    try:
        made = Rendered(subject=subject, text=text, html=html)
    except ValidationError as error:
        raise Invalid(*field_errors(error, "template")) from None
    _raise_if_any(_content_faults(request, made.text, made.html))
    return made.subject, made.text, made.html


def _attachment(one: Attachment) -> dict[str, str]:
    kept = {"filename": one.filename, "content": one.content, "content_type": one.type}
    return kept | ({"content_id": one.content_id} if one.content_id else {})


def message_id(mail_id: str, sender: Mailbox) -> str:
    """RFC 5322 3.6.4. Fixed when the mail is accepted, so that every attempt carries the same."""
    return f"<{mail_id}@{sender.address.rpartition('@')[2]}>"


def to_mime(message: Message, message_id: str, date: datetime) -> bytes:
    """The message as it goes over the wire: CRLF line ends, 7-bit but for SMTPUTF8 addresses. Bcc is not in it.

    The same arguments give the same bytes, so that every attempt sends the same mail.
    """
    lines = [
        address_header("From", [message.sender]),
        address_header("To", message.to),
        address_header("Cc", message.cc),
        address_header("Reply-To", message.reply_to),
        text_header("Subject", message.subject),
        f"Date: {format_datetime(date)}",
        f"Message-ID: {message_id}",
        "MIME-Version: 1.0",
        *(text_header(name, value) for name, value in message.headers.items()),
    ]
    block = "".join(f"{line}\r\n" for line in lines if line)
    return block.encode() + mime_body(message, hashlib.sha256(message_id.encode()).hexdigest()[:24])


# --- header lines -----------------------------------------------------------------------------------------------------


def text_header(name: str, value: str) -> str:
    """One header of free text: folded at its spaces when plain, else in RFC 2047 encoded words."""
    if PLAIN.fullmatch(value) and "=?" not in value:
        return "\r\n".join(_folded(name, value))
    return f"{name}: " + _encoded(value, used=len(name) + 2)


def _folded(name: str, value: str) -> Iterator[str]:
    line = f"{name}:"
    for word in re.split(" (?! )", value):  # at the last space of a run, so that no line is blank
        if len(line) + 1 + len(word) > 78 and line != f"{name}:":
            yield line
            line = ""
        line += f" {word}"
    yield line


def _encoded(text: str, used: int) -> str:
    # header_name is only measured, as what stands before the first word. At 40 that still fits on the line; were it
    # longer, Header would fold before it, and some parsers take that fold for a space.
    return Header(text, "utf-8", maxlinelen=76, header_name=" " * min(used - 2, 40)).encode(linesep="\r\n")


def address_header(name: str, boxes: list[Mailbox]) -> str:
    """One address a line, so that no fold can fall inside one."""
    return f"{name}: " + ",\r\n ".join(map(_wire, boxes)) if boxes else ""


def _wire(box: Mailbox) -> str:
    if not box.name:
        return box.address
    plain = box.name.isascii() and "=?" not in box.name
    name = phrase(box.name) if plain else _encoded(box.name, used=20)
    fits = plain and len(name) + len(box.address) < 60
    return f"{name} <{box.address}>" if fits else f"{name}\r\n <{box.address}>"


# --- what is below the header -----------------------------------------------------------------------------------------


def mime_body(message: Message, seed: str) -> bytes:
    """text, html, or both as alternatives; inline images related to the html; the other files mixed around all.

    A part is its own header lines, an empty line and its content, with CRLF line ends throughout. An empty text is left
    out where there is html. `seed` makes the boundaries this mail's own, unlike those of a mail that it quotes.
    """
    inline = [_file(one) for one in message.attachments if "content_id" in one]
    files = [_file(one) for one in message.attachments if "content_id" not in one]
    versions = [_text("plain", message.text or "")] if message.text or not message.html else []
    if message.html:
        versions.append(_multipart('related; type="text/html"', [_text("html", message.html), *inline], f"r_{seed}"))
    return _multipart("mixed", [_multipart("alternative", versions, f"a_{seed}"), *files], f"m_{seed}")


def _multipart(subtype: str, parts: list[bytes], name: str) -> bytes:
    """RFC 2046 5.1. A part alone stays as it is."""
    if len(parts) == 1:
        return parts[0]
    delimiter = DELIMITER + name.encode()
    head = b'Content-Type: multipart/%b;\r\n boundary="%b"\r\n\r\n' % (subtype.encode(), delimiter[2:])
    return head + b"".join(b"%b\r\n%b\r\n" % (delimiter, part) for part in parts) + delimiter + b"--\r\n"


def _text(subtype: str, text: str) -> bytes:
    lines = text if text.endswith("\n") else text + "\n"
    encoding, body = _encoded_text(lines.replace("\n", "\r\n").encode())
    head = f"Content-Type: text/{subtype}; charset=utf-8\r\nContent-Transfer-Encoding: {encoding}\r\n\r\n"
    return head.encode() + body


def _encoded_text(data: bytes) -> tuple[str, bytes]:
    if data.isascii() and DELIMITER not in data and max(map(len, data.split(b"\r\n"))) <= 78:
        return "7bit", data
    quoted, packed = binascii.b2a_qp(data), _base64_lines(base64.b64encode(data).decode())
    return ("quoted-printable", quoted) if len(quoted) <= len(packed) else ("base64", packed)


def _base64_lines(text: str) -> bytes:
    return "".join(f"{text[start : start + 76]}\r\n" for start in range(0, len(text), 76)).encode()


def _file(one: dict[str, str]) -> bytes:
    disposition = "inline" if "content_id" in one else "attachment"
    lines = [
        f"Content-Type: {re.sub('; ?', FOLD, one['content_type'])}",
        "Content-Transfer-Encoding: base64",
        f"Content-Disposition: {disposition}{FOLD}{filename_parameter(one['filename'])}",
        *([f"Content-ID: <{one['content_id']}>"] if "content_id" in one else []),
    ]
    return "\r\n".join([*lines, "", ""]).encode() + _base64_lines(one["content"])


def filename_parameter(name: str) -> str:
    """In quotes when plain, else percent-encoded, in several pieces when long (RFC 2231 3 and 4)."""
    if PLAIN_FILE_NAME.fullmatch(name):
        return f'filename="{name}"'
    first, *more = _percent_encoded(name, 60)
    if not more:
        return f"filename*=utf-8''{first}"
    numbered = [f"filename*{number}*={piece}" for number, piece in enumerate([f"utf-8''{first}", *more])]
    return FOLD.join(numbered)


def _percent_encoded(text: str, size: int) -> list[str]:
    """Pieces of at most `size`, none of which ends inside a character."""
    pieces = [""]
    for character in text:
        encoded = quote(character, safe="")
        if len(pieces[-1]) + len(encoded) > size:
            pieces.append("")
        pieces[-1] += encoded
    return pieces
