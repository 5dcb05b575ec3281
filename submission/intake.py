"""A mail that came by SMTP -> the `Draft` that the outbox accepts: its bytes as they are, its outline from its header.

To, Cc and Bcc of the outline are the envelope's recipients, as far as the mail names them; the header itself decides
nothing. Header fields of ours say what the fields of `POST /emails` say, and are taken out, as are Bcc and Return-Path.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from datetime import datetime
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import BeforeValidator, Field

from mail.address import Mailbox
from mail.due import timed
from mail.message import Draft, Message, Raw, who_gets
from mail.moments import time_with_zone
from mail.raw import Header, NotAMail, check, header_of, without
from mail.request import FieldError, Invalid, ScheduledAt, StrictModel, Tag, validate
from process.api_keys import ApiKey
from queues.jobs import Idempotency
from settings import Settings

OURS = "x-async-email-"
IDEMPOTENCY_KEY = "resend-idempotency-key"
DROPPED = re.compile(f"bcc|return-path|{IDEMPOTENCY_KEY}|{OURS}.*")
LONGEST_SUBJECT = 998  # characters, as in the API
LONGEST_MESSAGE_ID = 995  # characters, as much as one line holds


class Refused(Exception):
    """The text is the SMTP reply: what must be true, and never what the mail says. `reason` is for the log."""

    def __init__(self, reply: str, reason: str = "") -> None:
        super().__init__(reply)
        self.reason = reason or reply.split(" ", 2)[-1]


class Envelope(NamedTuple):
    """What the client has said before its mail."""

    sender: str  # "" for the null sender
    recipients: Sequence[Mailbox]  # as the client has named them
    smtputf8: bool


class Taken(NamedTuple):
    """What to accept; and by what a repeat of it is known, and for how many seconds (None: for IDEMPOTENCY_TTL)."""

    draft: Draft
    idempotency: Idempotency | None = None
    known_for: int | None = None


class Wishes(StrictModel):
    """The fields of `POST /emails` that say how a mail is to be treated, from headers of ours."""

    tag: Annotated[list[Tag], Field(max_length=50, default_factory=list)]
    scheduled_at: ScheduledAt | None = None
    expires_at: Annotated[datetime, BeforeValidator(time_with_zone)] | None = None
    on_doubt: Literal["retry", "hold"] | None = None
    priority: Literal["high", "normal", "bulk"] = "normal"


def take(data: bytes, envelope: Envelope, key: ApiKey, settings: Settings) -> Taken:
    """Raises `Refused`."""
    try:
        check(data)
        header = header_of(data)
        wishes, at = wishes_of(header)
    except NotAMail as error:
        raise Refused(f"554 5.6.0 {error}") from None
    except Invalid as invalid:
        told = "; ".join(f"{_name_of(one)}: {one.message}" for one in invalid.errors)
        raise Refused(f"554 5.6.0 {told}", "a header X-Async-Email- is wrong") from None  # its name may be anything
    sender = sender_of(header, envelope, key, settings)
    to, cc, bcc = outline_of(header, envelope.recipients, settings)
    octets = without(data, header, DROPPED).decode("latin-1")
    message = Message(
        sender=sender,
        to=to,
        cc=cc,
        bcc=bcc,
        reply_to=header.mailboxes("reply-to")[:50],
        subject=" ".join(header.values("subject"))[:LONGEST_SUBJECT],
        tags=[tag.model_dump() for tag in wishes.tag],
        raw=Raw(octets, envelope.sender, envelope.smtputf8 and not data[: header.size].isascii()),
    )
    draft = Draft(message, wishes.expires_at, wishes.on_doubt, key.name, key.scope == "test", at, wishes.priority)
    draft = draft._replace(message_id=" ".join(header.values("message-id"))[:LONGEST_MESSAGE_ID])
    dedupe = settings.submission_dedupe
    if known := by_key(header, envelope, key):
        return Taken(draft, known)
    return Taken(draft, by_octets(data, envelope, key), dedupe) if dedupe else Taken(draft)


def wishes_of(header: Header) -> tuple[Wishes, datetime | None]:
    """Returns what the mail's own headers ask for, and when it is to be sent if not now. Raises `Invalid`."""
    given: dict[str, Any] = {}
    for field in header.fields:
        if not field.name.startswith(OURS):
            continue
        name = field.name.removeprefix(OURS).replace("-", "_")
        if name == "tag":
            tag, _, value = field.value.partition("=")
            given.setdefault(name, []).append({"name": tag.strip(), "value": value.strip()})
        elif name in given:
            raise Invalid(FieldError(name, "must be given once"))
        else:
            given[name] = field.value
    wishes = validate(Wishes, given)
    return wishes, timed(wishes.scheduled_at, wishes.expires_at)


def _name_of(error: FieldError) -> str:
    """Returns the header that an error is about: `X-Async-Email-Expires-At`."""
    return f"{OURS}{error.field.partition('[')[0].replace('_', '-')}".title()


def sender_of(header: Header, envelope: Envelope, key: ApiKey, settings: Settings) -> Mailbox:
    """Returns who the mail is from: of a mail without From the envelope's sender, else MAIL_FROM. Raises `Refused`."""
    written = header.values("from")
    if len(written) > 1:
        raise Refused("554 5.6.0 the mail must have one header From (RFC 5322 3.6)")
    senders = header.mailboxes("from")
    if written and key.domains:  # and not what one reader takes for an address, and another for a comment
        try:
            senders = [Mailbox.parse(header.texts("from")[0])]
        except ValueError:
            senders = []
    if written and not senders:
        raise Refused("554 5.6.0 the header From must have an address (RFC 5322 3.6.2)")
    if not senders:
        senders = [Mailbox("", envelope.sender) if envelope.sender else Mailbox.parse(settings.mail_from)]
    if any(one.is_local for one in senders) and not settings.allow_local_domains:
        raise Refused("554 5.6.0 the header From must have a domain with a dot, unless ALLOW_LOCAL_DOMAINS=yes")
    if not all(key.may_send_from(one.address) for one in senders):
        raise Refused(f"550 5.7.1 the header From must be at {' or '.join(key.domains)}, as the API key is for")
    return senders[0]


def outline_of(header: Header, recipients: Sequence[Mailbox], settings: Settings) -> list[list[Mailbox]]:
    """Returns the recipients as to, cc and bcc. MAIL_REDIRECT_TO takes the place of one to whom no mail may go."""
    named = {name: {box.address.lower(): box for box in header.mailboxes(name)} for name in ("to", "cc")}
    outline: dict[str, list[Mailbox]] = {"to": [], "cc": [], "bcc": []}
    for one in recipients:
        address = one.address.lower()
        where = next((name for name, boxes in named.items() if address in boxes), "bcc")
        box = Mailbox(named[where][address].name, one.address) if where != "bcc" else one
        outline[where].append(who_gets(box, settings) or box)
    return list(outline.values())


def by_key(header: Header, envelope: Envelope, key: ApiKey) -> Idempotency | None:
    """Returns by what a repeat of a mail with Resend-Idempotency-Key is known. Raises `Refused`.

    A program that sends again after a lost reply has often made the mail anew, with another date, Message-ID and
    boundary; so only sender, recipients and subject must be the same.
    """
    given = header.values(IDEMPOTENCY_KEY)
    if not given:
        return None
    if len(given) > 1 or not re.fullmatch(r"[ -~]{1,256}", given[0]):
        raise Refused("554 5.6.0 Resend-Idempotency-Key: must be 1 to 256 printable ASCII characters, once")
    return Idempotency.of(_caller(key), "submission", given[0], [*_who(envelope), *header.values("subject")])


def by_octets(data: bytes, envelope: Envelope, key: ApiKey) -> Idempotency:
    """Returns by what a repeat is known of a program that knows nothing of keys: each octet is the same."""
    digest = hashlib.sha256(data).hexdigest()
    return Idempotency.of(_caller(key), "submission of octets", "\n".join([digest, *_who(envelope)]), digest)


def _caller(key: ApiKey) -> str:
    return f"{key.name}:test" if key.scope == "test" else key.name  # a test is no answer to what is meant to be sent


def _who(envelope: Envelope) -> list[str]:
    return [envelope.sender, *sorted(one.address for one in envelope.recipients)]
