"""What a caller may ask for: the fields of `POST /emails`, each checked once, at the door.

Refuses with the name of the field whatever could not be sent exactly as asked: a control character in anything that
ends in a header, a header that this service writes, base64 that is not. What passes can always be written as MIME, so
nothing fails later in a worker. Pure: no I/O, no settings, no clock.
"""

from __future__ import annotations

import base64
import mimetypes
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import PurePosixPath
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from mail.address import Mailbox, header_text, wrong

CONTROL_IN_BODY = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ud800-\udfff]")
OURS = re.compile(  # headers that this service writes or the relay adds; a caller's would contradict them
    r"from|to|cc|bcc|sender|reply-to|date|subject|message-id|mime-version|content-.*|return-path|received|resent-.*"
    r"|dkim-signature|arc-.*|authentication-results|received-spf|delivered-to",
    re.IGNORECASE,
)
TOKEN = r"[A-Za-z0-9!#$&^_.+-]+"
CONTENT_TYPE = re.compile(rf"{TOKEN}/{TOKEN}(?:; ?{TOKEN}={TOKEN})*")
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
