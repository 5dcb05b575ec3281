"""What an e-mail is: request JSON -> `Message` -> MIME.

`parse` checks a request once, at the door, and refuses with the name of the field whatever could not be sent exactly as
asked: an address that a parser would rewrite, a control character in anything that ends in a header, a header that is
ours to write, base64 that is not. What it accepts, `to_mime` can always build; nothing fails later in a worker.

Pure: no I/O, no settings, no clock; the only home of `email.*`. It writes the header block itself, since the standard
library re-folds header values it has parsed and so changes some of them, and leaves the MIME body to `EmailMessage`.
Standards: RFC 5322 (headers), 2045-2047 and 2231 (MIME), 2387 (related), 6532 (UTF-8 headers), 5321 (lengths).
"""

from __future__ import annotations

import base64
import binascii
import json
import mimetypes
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from datetime import datetime
from email.header import Header
from email.message import EmailMessage
from email.policy import SMTP
from email.utils import format_datetime
from typing import Annotated, Any, NamedTuple

from email_validator import EmailNotValidError, validate_email
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import PydanticCustomError

CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]")
CONTROL_IN_BODY = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]")
PLAIN = re.compile(r"[!-~]{1,800}(?: [!-~]{1,800})*")  # header text that needs no encoding and folds at its spaces
OURS = re.compile(  # headers that this service writes or the relay adds; a caller's would contradict them
    r"from|to|cc|bcc|sender|reply-to|date|subject|message-id|mime-version|content-.*|return-path|received|resent-.*"
    r"|dkim-signature|arc-.*|authentication-results|received-spf|delivered-to",
    re.IGNORECASE,
)
TOKEN = r"[A-Za-z0-9!#$&^_.+-]+"
CONTENT_TYPE = re.compile(rf"{TOKEN}/{TOKEN}(?:; ?{TOKEN}={TOKEN})*")


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
        if not isinstance(text, str):
            raise wrong("write a string such as ada@example.com or Ada Lovelace <ada@example.com>")
        header_text(text)
        match = re.fullmatch(r"\s*(?:(?P<name>[^<>]*?)\s*<(?P<named>[^<>]*)>|(?P<bare>[^<>]*?))\s*", text)
        if not match:
            raise wrong("write one address, such as ada@example.com or Ada Lovelace <ada@example.com>")
        return cls(display_name(match["name"] or ""), strict_address(match["named"] or match["bare"] or ""))

    @property
    def needs_smtputf8(self) -> bool:
        return not self.address.isascii()

    def __str__(self) -> str:
        return f"{phrase(self.name)} <{self.address}>" if self.name else self.address


def display_name(text: str) -> str:
    if len(text) >= 2 and text[0] == text[-1] == '"':
        text = re.sub(r"\\(.)", r"\1", text[1:-1])
    elif re.search(r'[",;:@\\()\[\]]', text):
        raise wrong('put a display name with special characters in double quotes: "Lovelace, Ada" <ada@example.com>')
    if len(text) > 200:
        raise wrong("the display name is longer than 200 characters")
    return text.strip()


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
    if found.original.rpartition("@")[0] != found.local_part:
        raise wrong("the part before @ is not in Unicode's normal form (NFC); write it as it is meant")
    return found.ascii_email or f"{found.local_part}@{found.ascii_domain}"


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
    return [value] if isinstance(value, str) else value


def canonical_base64(text: str) -> str:
    try:
        data = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        raise wrong("it is not base64") from None
    if base64.b64encode(data).decode() != text:  # the decoder forgives what another would read differently
        raise wrong("it is not canonical base64: no line breaks, and padded with =")
    return text


def file_name(text: str) -> str:
    if not text.strip() or "/" in text or "\\" in text or text in (".", ".."):
        raise wrong("write a plain file name, without slashes")
    return header_text(text)


def media_type(text: str) -> str:
    if not CONTENT_TYPE.fullmatch(text):
        raise wrong("write a media type such as application/pdf or text/csv; charset=utf-8")
    if text.lower().startswith(("multipart/", "message/")):
        raise wrong("multipart/ and message/ types cannot be attached; use application/octet-stream")
    return text


def custom_headers(headers: dict[str, str]) -> dict[str, str]:
    seen: set[str] = set()
    for name, value in headers.items():
        if not re.fullmatch(r"[!-9;-~]{1,76}", name):
            raise wrong("a header name is made of 1 to 76 printable ASCII characters without a colon")
        if OURS.fullmatch(name):
            raise wrong(f"{name} is written by this service or by the relay; leave it out")
        if name.lower() in seen:
            raise wrong(f"{name} stands there twice, in different cases")
        seen.add(name.lower())
        try:
            header_text(value)
        except PydanticCustomError:
            raise wrong(f"the value of {name} holds a line break or another control character") from None
    return headers


Recipient = Annotated[Mailbox, BeforeValidator(Mailbox.parse)]
Recipients = Annotated[list[Recipient], BeforeValidator(one_or_list)]
HeaderText = Annotated[str, Field(max_length=998), AfterValidator(header_text)]
BodyText = Annotated[str, AfterValidator(body_text)]
TagWord = Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{1,256}$")]


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, hide_input_in_errors=True)


class Attachment(Strict):
    """A file. With `content_id` it is shown inside the HTML, where `<img src="cid:...">` names it."""

    filename: Annotated[str, Field(max_length=200), AfterValidator(file_name)]
    content: Annotated[str, AfterValidator(canonical_base64)]
    content_type: Annotated[str, Field(max_length=200), AfterValidator(media_type)] | None = None
    content_id: Annotated[str, Field(pattern=r"^[A-Za-z0-9._@+-]{1,128}$")] | None = None

    @property
    def type(self) -> str:
        guessed, encoding = mimetypes.guess_type(self.filename)
        return self.content_type or (guessed if guessed and not encoding else None) or "application/octet-stream"


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
    cc: Recipients = []
    bcc: Recipients = []
    reply_to: Recipients = []
    subject: HeaderText | None = None
    html: BodyText | None = None
    text: BodyText | None = None
    headers: Annotated[dict[str, HeaderText], Field(max_length=50), AfterValidator(custom_headers)] = {}
    attachments: Annotated[list[Attachment], Field(max_length=50)] = []
    tags: Annotated[list[Tag], Field(max_length=50)] = []
    template: TemplateUse | None = None

    @model_validator(mode="after")
    def is_whole(self) -> Request:
        content_ids = [a.content_id for a in self.attachments if a.content_id]
        if len(set(content_ids)) < len(content_ids):
            raise ValueError("attachments: two attachments have the same content_id")
        if self.template and (self.html is not None or self.text is not None):
            raise ValueError("template: a template brings its own html and text; leave those out")
        if self.template:
            return self
        if self.subject is None:
            raise ValueError("subject: it is missing")
        if not self.html and not self.text:
            raise ValueError("text: write text, html or both; a mail without either says nothing")
        if content_ids and not self.html:
            raise ValueError("attachments: content_id is for images inside html, and there is no html")
        return self


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

    def to_json(self) -> tuple[str, str]:
        """(outline, content)"""
        whole = asdict(self)
        content = {name: whole.pop(name) for name in self.CONTENT}
        return _dump(whole), _dump(content)

    @classmethod
    def from_json(cls, outline: str | bytes, content: str | bytes = "{}") -> Message:
        whole = {**json.loads(outline), **json.loads(content)}
        whole["sender"] = Mailbox(*whole["sender"])
        for name in ("to", "cc", "bcc", "reply_to"):
            whole[name] = [Mailbox(*box) for box in whole[name]]
        return cls(**whole)


def _dump(value: object) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


def parse(body: object, *, default_sender: str, max_recipients: int) -> Request:
    """Checks the body of `POST /emails`. Raises `Invalid` with every field that is wrong."""
    if not isinstance(body, dict):
        raise Invalid(FieldError("body", "write a JSON object"))
    try:
        request = Request.model_validate(body)
    except ValidationError as error:
        raise Invalid(*field_errors(error)) from None
    if request.sender is None:
        request.sender = Mailbox.parse(default_sender)
    count = len(request.to) + len(request.cc) + len(request.bcc)
    if count > max_recipients:
        raise Invalid(FieldError("to", f"{count} recipients in to, cc and bcc; at most {max_recipients} are allowed"))
    return request


def field_errors(error: ValidationError, prefix: str = "") -> list[FieldError]:
    """pydantic's findings as (field, sentence), the field written as one would in code: `attachments[0].content`."""
    found = []
    for fault in error.errors(include_input=False, include_url=False):
        path = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in fault["loc"]).lstrip(".")
        text = fault["msg"].removeprefix("Value error, ")
        if not path and ": " in text:
            path, text = text.split(": ", 1)
        if fault["type"] == "extra_forbidden":
            text = "there is no such field"
        if fault["type"] == "missing" or text == "it is missing":
            text = "this field is required"
        path = ".".join(filter(None, (prefix, path))) or "body"
        found.append(FieldError(path, text, missing=text == "this field is required"))
    return found


def compose(request: Request, rendered: tuple[str, str | None, str | None] | None = None) -> Message:
    """The message of a checked request; `rendered` is the (subject, text, html) of its template."""
    subject, text, html = rendered or (request.subject or "", request.text, request.html)
    assert request.sender
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


def _attachment(one: Attachment) -> dict[str, str]:
    kept = {"filename": one.filename, "content": one.content, "content_type": one.type}
    return kept | ({"content_id": one.content_id} if one.content_id else {})


def message_id(mail_id: str, sender: Mailbox) -> str:
    """RFC 5322 3.6.4. Fixed when the mail is accepted, so that every attempt carries the same."""
    return f"<{mail_id}@{sender.address.rpartition('@')[2]}>"


def to_mime(message: Message, message_id: str, date: datetime) -> bytes:
    """The message as it goes over the wire: CRLF line ends, 7-bit but for SMTPUTF8 addresses. Bcc is not in it."""
    lines = [
        address_header("From", [message.sender]),
        address_header("To", message.to),
        address_header("Cc", message.cc),
        address_header("Reply-To", message.reply_to),
        text_header("Subject", message.subject),
        f"Date: {format_datetime(date)}",
        f"Message-ID: {message_id}",
        *(text_header(name, value) for name, value in message.headers.items()),
    ]
    block = "".join(f"{line}\r\n" for line in lines if line)
    return block.encode() + mime_body(message).as_bytes(policy=POLICY)


def text_header(name: str, value: str) -> str:
    """One header of free text: folded at its spaces when plain, else in RFC 2047 encoded words."""
    if PLAIN.fullmatch(value) and "=?" not in value:
        return "\r\n".join(_folded(name, value))
    return f"{name}: " + _encoded(value, used=len(name) + 2)


def _folded(name: str, value: str) -> Iterator[str]:
    line = f"{name}:"
    for word in value.split(" "):
        if len(line) + 1 + len(word) > 78 and line != f"{name}:":
            yield line
            line = ""
        line += f" {word}"
    yield line


def _encoded(text: str, used: int) -> str:
    # firstlinelen: what stands before the first word. A charset object is not needed, UTF-8 picks Q or B by itself.
    return Header(text, "utf-8", maxlinelen=76, header_name=" " * max(used - 2, 0)).encode(linesep="\r\n")


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


POLICY = SMTP.clone(cte_type="7bit", max_line_length=76)


def mime_body(message: Message) -> EmailMessage:
    """text, html, or both as alternatives; inline images related to the html; the other files mixed around all."""
    mime = EmailMessage(policy=POLICY)
    if message.text is not None or message.html is None:
        mime.set_content(message.text or "")
        if message.html is not None:
            mime.add_alternative(message.html, subtype="html")
    else:
        mime.set_content(message.html, subtype="html")
    inline = [one for one in message.attachments if "content_id" in one]
    html_part = mime.get_body(("html",))
    for one in inline:
        assert isinstance(html_part, EmailMessage)  # is_whole saw to it
        html_part.add_related(*_data(one), **_labels(one, "inline"), cid=f"<{one['content_id']}>")
    for one in message.attachments:
        if one not in inline:
            mime.add_attachment(*_data(one), **_labels(one, "attachment"))
    if "MIME-Version" not in mime:
        mime["MIME-Version"] = "1.0"
    return mime


def _data(one: dict[str, str]) -> tuple[bytes, str, str]:
    maintype, _, subtype = one["content_type"].partition(";")[0].partition("/")
    return base64.b64decode(one["content"]), maintype, subtype


def _labels(one: dict[str, str], disposition: str) -> dict[str, Any]:
    parameters = [part.strip().split("=", 1) for part in one["content_type"].split(";")[1:]]
    return {"disposition": disposition, "filename": one["filename"], "params": dict(parameters)}
