"""What a caller may ask for: the fields of `POST /emails`, each checked once, before anything is stored.

Refuses, by the name of the field, what could not be sent exactly as asked: a control character in anything that ends in
a header, a header that contradicts ours, base64 that a decoder may read differently. What passes can always be
written as MIME, so nothing fails later in a worker. Pure: no I/O, no settings, no clock.
"""

from __future__ import annotations

import base64
import mimetypes
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from difflib import get_close_matches
from pathlib import PurePosixPath
from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from mail import forms, unsubscribe
from mail.address import Mailbox, header_text
from mail.message import PIECE, STRUCTURED
from mail.moments import time_or_delay, time_with_zone

CONTROL_IN_BODY = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ud800-\udfff]")
OURS = re.compile(  # headers that this service writes or the relay adds; a caller's would contradict them
    r"from|to|cc|bcc|sender|reply-to|date|subject|message-id|mime-version|content-.*|return-path|received|resent-.*"
    r"|dkim-signature|arc-.*|authentication-results|received-spf|delivered-to",
    re.IGNORECASE,
)
MAX_REPLY_TO = 50
IN_A_LIST = re.compile(r'(?:"(?:[^"\\]|\\.)*"|[^,])+')  # one address of a header: commas in quotes part none
MAX_HEADERS = 64_000  # characters of all values together
TOKEN = r"[A-Za-z0-9!#$&^_.+-]+"
CONTENT_TYPE = re.compile(rf"{TOKEN}/{TOKEN}(?:; ?{TOKEN}={TOKEN})*")
COMPOSITE = ("multipart/", "message/")  # RFC 2046 5: these hold mail as it is, and never base64
REQUIRED = "is required"
NOT_HERE = {  # a field of Resend's API -> what to do without it; docs/clients.md lists the rest
    "attachments[].path": "is not supported: no file is fetched, so put it into content, in base64",
    "attachments[].inline_content_id": "is the older name of content_id: leave one of the two out",
    "react": "is not supported: it is a component of JavaScript, so render it to html",
}
MESSAGES = {  # pydantic's name of an error -> what it says to a caller who knows no Python
    "missing": REQUIRED,
    "extra_forbidden": "is not a known field",
    "string_type": "must be a string",
    "string_unicode": "must not contain half of a surrogate pair",
    "string_too_short": "must be {min_length} or more characters long",
    "string_too_long": "must be at most {max_length} characters long",
    "string_pattern_mismatch": "must match {pattern}",
    "list_type": "must be a list",
    "too_short": "must have {min_length} or more entries",
    "too_long": "must have at most {max_length} entries",
    "dict_type": "must be a JSON object",
    "model_type": "must be a JSON object",
    "literal_error": "must be {expected}",
    "int_type": "must be a whole number",
    "bool_type": "must be true or false",
    "greater_than_equal": "must be {ge} or more",
    "less_than_equal": "must be at most {le}",
}


@dataclass(frozen=True)
class FieldError:
    field: str
    message: str
    missing: bool = False
    forbidden: bool = False  # to this caller; another may


class Invalid(Exception):
    """The request cannot be accepted. `errors` names each field and what it must be."""

    def __init__(self, *errors: FieldError) -> None:
        super().__init__("; ".join(f"{error.field}: {error.message}" for error in errors))
        self.errors = errors

    @classmethod
    def raise_if(cls, errors: Iterable[FieldError]) -> None:
        if found := tuple(errors):
            raise cls(*found)


def body_text(text: str) -> str:
    """Returns the text with `\\n` as its only line end, since MIME makes them one kind anyway."""
    if CONTROL_IN_BODY.search(text):
        raise ValueError("must not contain a control character other than tab and line break")
    return text.replace("\r\n", "\n").replace("\r", "\n")


def header_fits(headers: dict[str, str]) -> dict[str, str]:
    """Refuses a structured header that would have to be encoded or cannot be folded (RFC 5322 2.1.1, RFC 2047 5)."""
    if sum(map(len, headers.values())) > MAX_HEADERS:
        raise ValueError(f"must have at most {MAX_HEADERS} characters together")
    for name, value in headers.items():
        if STRUCTURED.fullmatch(name) and not (value.isascii() and all(len(word) < 900 for word in value.split(" "))):
            raise ValueError(f"{name} must be ASCII, with no more than 900 characters between two spaces")
        if STRUCTURED.fullmatch(name) and (not value.strip(" ") or " " * 10 in value):
            raise ValueError(f"{name} must not be empty or have ten spaces in a row")
    return {name: value.strip(" ") if STRUCTURED.fullmatch(name) else value for name, value in headers.items()}


def one_or_list(value: object) -> object:
    if not isinstance(value, (str, list)):
        raise ValueError("must be an address or a list of addresses")
    return [value] if isinstance(value, str) else value


def canonical_base64(text: str) -> str:
    """Refuses base64 that does not come back the same when decoded and encoded: decoders differ in what they forgive.

    Line breaks in it are dropped. Works piece by piece: three copies of ten megabytes are too many.
    """
    if "\n" in text:
        text = text.replace("\r\n", "").replace("\n", "")
    try:
        pieces = (text[start : start + PIECE] for start in range(0, len(text), PIECE))
        is_canonical = all(base64.b64encode(base64.b64decode(piece)).decode() == piece for piece in pieces)
    except ValueError:
        is_canonical = False
    if not is_canonical or "=" in text[: max(0, len(text) - 2)]:
        raise ValueError("must be base64 with = padding")
    return text


def file_name(text: str) -> str:
    """Returns the name without spaces around it, which mail programs drop anyway."""
    text = header_text(text).strip()
    if text in ("", ".", "..") or "/" in text or "\\" in text:
        raise ValueError("must be a plain file name, without slashes")
    return text


def media_type(text: str) -> str:
    text = re.sub(rf'="({TOKEN})"', r"=\1", text)  # anymail writes charset="utf-8", which is the same (RFC 2045 5.1)
    if not CONTENT_TYPE.fullmatch(text):
        raise ValueError("must be a media type such as application/pdf or text/csv; charset=utf-8")
    if text.lower().startswith(COMPOSITE):
        raise ValueError("must not be a multipart/ or message/ type; use application/octet-stream")
    names = [parameter.partition("=")[0].strip().lower() for parameter in text.split(";")[1:]]
    if len(set(names)) < len(names):
        raise ValueError("one of its parameters is given twice")
    return text


def content_id(text: str) -> str:
    """Returns the id without its angle brackets. Any text will do: `Attachment.cid` is what is written of it."""
    text = header_text(text).strip(" ").removeprefix("<").removesuffix(">")
    if not text or "<" in text or ">" in text:
        raise ValueError("must be a name such as logo.png, without < and >")
    return text


def header_name(name: str) -> str:
    if not re.fullmatch(r"[!-9;-~]{1,76}", name):
        raise ValueError("a header name must be 1 to 76 printable ASCII characters without a colon")
    if name.lower() in ("reply-to", "message-id"):
        return (
            name  # `_reply_to_header` sees whether it only repeats the field; of the other, forms has left none other
        )
    if name.lower() in ("from", "to", "cc", "bcc", "subject"):
        raise ValueError(f"must be left out: the field {name.lower().replace('-', '_')} writes this header")
    if OURS.fullmatch(name):
        raise ValueError("must be left out: this service or the relay writes this header")
    return name


OneMailbox = Annotated[Mailbox, BeforeValidator(Mailbox.parse)]
# 1000 is the highest MAX_RECIPIENTS. A longer list is refused before its addresses are looked at one by one.
Mailboxes = Annotated[list[OneMailbox], Field(max_length=1000), BeforeValidator(one_or_list)]
HeaderName = Annotated[str, AfterValidator(header_name)]
HeaderValue = Annotated[str, Field(max_length=16_000), AfterValidator(header_text)]
HeaderText = Annotated[str, Field(max_length=998), AfterValidator(header_text)]
BodyText = Annotated[str, AfterValidator(body_text)]
TagWord = Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{1,256}$")]
ScheduledAt = Annotated[datetime | timedelta, BeforeValidator(time_or_delay)]
ContentId = Annotated[str, Field(max_length=128), AfterValidator(content_id)]


class StrictModel(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, hide_input_in_errors=True)


Model = TypeVar("Model", bound=StrictModel)


class Attachment(StrictModel):
    """A file. With `content_id` it is shown inside the HTML, where `<img src="cid:...">` names it."""

    filename: Annotated[str, Field(max_length=200), AfterValidator(file_name)] | None = None
    content: Annotated[str, BeforeValidator(forms.octets_or_base64), AfterValidator(canonical_base64)]
    content_type: Annotated[str, Field(max_length=200), AfterValidator(media_type)] | None = None
    content_id: ContentId | None = None

    @property
    def type(self) -> str:
        # guess_type takes URLs, and "Re: notes#1.pdf" looks like one; so it sees the ending alone
        guessed, encoding = mimetypes.guess_type("file" + PurePosixPath(self.filename or "").suffix)
        if not guessed or encoding or guessed.startswith(COMPOSITE):
            guessed = "application/octet-stream"
        return self.content_type or guessed

    @property
    def cid(self) -> str | None:
        """Returns the content_id as a header can hold it (RFC 2392): a file's name may have spaces."""
        return self.content_id and re.sub(r"[^A-Za-z0-9._@+-]", "_", self.content_id)

    def stored(self) -> dict[str, str]:
        """Returns the file as a worker finds it. One without a name gets one."""
        named = {"filename": self.filename or forms.file_name_of(self.type), "content": self.content}
        return {**named, "content_type": self.type, **({"content_id": self.cid} if self.cid else {})}


class Tag(StrictModel):
    name: TagWord
    value: TagWord


class TemplateUse(StrictModel):
    id: str
    variables: Annotated[dict[str, Any], BeforeValidator(forms.empty_object)] = {}


class Request(StrictModel):
    """The body of `POST /emails`, with the field names of Resend's API."""

    sender: OneMailbox = Field(alias="from")
    to: Annotated[Mailboxes, Field(min_length=1)]
    cc: Mailboxes = Field(default_factory=list)
    bcc: Mailboxes = Field(default_factory=list)
    reply_to: Annotated[Mailboxes, Field(max_length=MAX_REPLY_TO, default_factory=list)]
    subject: HeaderText | None = None
    html: BodyText | None = None
    text: BodyText | None = None
    headers: Annotated[
        dict[HeaderName, HeaderValue],
        Field(max_length=50, default_factory=dict),
        AfterValidator(header_fits),
        BeforeValidator(forms.headers),
    ]
    attachments: Annotated[
        list[Annotated[Attachment, BeforeValidator(forms.attachment)]], Field(max_length=50, default_factory=list)
    ]
    tags: Annotated[list[Annotated[Tag, BeforeValidator(forms.tag)]], Field(max_length=50, default_factory=list)]
    template: TemplateUse | None = None
    scheduled_at: ScheduledAt | None = None
    # Not in Resend's API: how this mail is to be treated, not what it says.
    expires_at: Annotated[datetime, BeforeValidator(time_with_zone)] | None = None
    on_doubt: Literal["retry", "hold"] | None = None
    priority: Literal["high", "normal", "bulk"] = "normal"
    relay: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_-]{0,31}$")] | None = None
    skip_suppression: bool = False
    unsubscribe_url: Annotated[str, Field(max_length=800), AfterValidator(unsubscribe.https_url)] | None = None
    unsubscribe_email: OneMailbox | None = None

    @property
    def message_id(self) -> str:
        """Returns the Message-ID that it brings, or ""."""
        return next((value for name, value in self.headers.items() if name.lower() == "message-id"), "")


# A field -> what the objects in it are.
INSIDE: dict[str, type[BaseModel]] = {"attachments": Attachment, "tags": Tag, "template": TemplateUse}


class Rendered(StrictModel):
    """A template's subject, text and html, held to the same rules as a caller's."""

    subject: HeaderText
    text: BodyText | None
    html: BodyText | None


def parse(body: object, *, default_sender: Mailbox | None, max_recipients: int, local_domains: bool = False) -> Request:
    """Checks the body of `POST /emails`. Raises `Invalid` with every field that is wrong."""
    if isinstance(body, dict):
        body = forms.request(body)
        if default_sender:
            body = {"from": default_sender, **body}
    request = validate(Request, body)
    Invalid.raise_if((*_reply_to_header(request), *_conflicts(request, max_recipients)))
    if not local_domains:
        Invalid.raise_if(_local_domains(request))
    return request


def validate(model: type[Model], body: object, prefix: str = "") -> Model:
    """Returns `body` as `model`. Raises `Invalid`, each field behind `prefix`."""
    try:
        return model.model_validate(body)
    except ValidationError as error:
        raise Invalid(*field_errors(error, prefix, model)) from None


def _reply_to_header(request: Request) -> Iterator[FieldError]:
    """Takes away a header Reply-To that has everybody in the field, and adds to the field whom it has besides:
    Symfony's bridge writes all into the header, and the first of them into the field."""
    for name in [name for name in request.headers if name.lower() == "reply-to"]:
        told, known = "must be left out: the field reply_to writes this header", _by_address(request.reply_to)
        try:
            named = _by_address(map(Mailbox.parse, IN_A_LIST.findall(request.headers.pop(name))))
        except ValueError:
            named = {}
        if not known or not known.keys() <= named.keys():
            yield FieldError(f"headers.{name}", told)
        elif len(named) > MAX_REPLY_TO:
            yield FieldError(f"headers.{name}", f"must have at most {MAX_REPLY_TO} addresses")
        else:
            request.reply_to += [box for address, box in named.items() if address not in known]


def _by_address(boxes: Iterable[Mailbox]) -> dict[str, Mailbox]:
    found: dict[str, Mailbox] = {}
    for box in boxes:
        found.setdefault(box.address.lower(), box)
    return found


def _conflicts(request: Request, max_recipients: int) -> Iterator[FieldError]:
    """Checks what no field shows by itself."""
    count = len(request.to) + len(request.cc) + len(request.bcc)
    if count > max_recipients:
        yield FieldError("to", f"to, cc and bcc must have at most {max_recipients} recipients together, not {count}")
    for number in _repeated([name.lower() for name in request.headers]):
        yield FieldError(f"headers.{list(request.headers)[number]}", "is given twice, in different cases")
    for name in request.headers if request.unsubscribe_url or request.unsubscribe_email else ():
        if name.lower() in unsubscribe.HEADERS:
            told = "must be left out: unsubscribe_url and unsubscribe_email write this header"
            yield FieldError(f"headers.{name}", told)
    if request.unsubscribe_email and request.unsubscribe_email.name:
        yield FieldError("unsubscribe_email", "must be an address without a name")
    for number in _repeated([one.cid for one in request.attachments]):
        yield FieldError(f"attachments[{number}].content_id", "is given twice")
    if not request.template:
        if request.subject is None:
            yield FieldError("subject", REQUIRED, missing=True)
        yield from content_errors(request, request.text, request.html)
    elif request.html is not None or request.text is not None:
        yield FieldError("template", "brings its own text and html; leave those out")


def _local_domains(request: Request) -> Iterator[FieldError]:
    told = "must have a domain with a dot; ALLOW_LOCAL_DOMAINS=yes admits the names of your own network"
    for field, one in (("from", request.sender), ("unsubscribe_email", request.unsubscribe_email)):
        if one and one.is_local:
            yield FieldError(field, told)
    for field in ("to", "cc", "bcc", "reply_to"):
        for number, box in enumerate(getattr(request, field)):
            if box.is_local:
                yield FieldError(f"{field}[{number}]", told)


def _repeated(values: Sequence[str | None]) -> list[int]:
    return [number for number, value in enumerate(values) if value is not None and value in values[:number]]


def content_errors(request: Request, text: str | None, html: str | None) -> Iterator[FieldError]:
    """Checks the text and html that the mail will have, its own or its template's."""
    if not text and not html and not request.attachments:
        yield FieldError("template" if request.template else "text", "a mail must have a text, an html or a file")
    for number, one in enumerate(request.attachments):
        if one.content_id and not html:
            yield FieldError(f"attachments[{number}].content_id", "needs html that shows it, and there is none")


def nearest(unknown: str, model: type[BaseModel]) -> str:
    """Returns the question whether a field of nearly this name was meant, or nothing."""
    names = [field.alias or name for name, field in model.model_fields.items()]
    snake = re.sub(r"(?<=[a-z])(?=[A-Z])|-", "_", unknown).lower()  # replyTo, Reply-To
    found = get_close_matches(snake[:100], names, 1, cutoff=0.75)
    return f"; did you mean `{found[0]}`?" if found else ""


def field_errors(error: ValidationError, prefix: str = "", model: type[BaseModel] | None = None) -> list[FieldError]:
    """Translates pydantic's errors; a field is written as one would in code: `attachments[0].content`."""
    found: list[FieldError] = []
    for fault in error.errors(include_input=False, include_url=False):
        parts = [part for part in fault["loc"] if part != "[key]"]  # pydantic's word for a name, here of a header
        path = prefix + "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in parts)
        path = path.removeprefix(".")
        message = MESSAGES.get(fault["type"], "").format(**fault.get("ctx", {}))
        if fault["type"] == "extra_forbidden":
            loc = fault["loc"]
            where = INSIDE.get(str(loc[0]), model) if len(loc) > 1 else model
            question = nearest(str(loc[-1]), where) if where and len(found) < 10 else ""  # a body may have thousands
            message = NOT_HERE.get(re.sub(r"\[\d+\]", "[]", path), message + question)
        text = message or fault["msg"].removeprefix("Value error, ")
        found.append(FieldError(path or "body", text, missing=fault["type"] == "missing"))
    return sorted(found, key=lambda error: error.message not in NOT_HERE.values())
