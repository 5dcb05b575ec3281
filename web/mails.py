"""What is done with mails that were accepted: they are listed, canceled, or moved to another time."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Annotated, Any, Literal

from bottle import HTTPResponse, request
from pydantic import BeforeValidator, Field

from mail.address import Mailbox
from mail.due import scheduled
from mail.index import first_id, raw_id
from mail.listing import STATES, Wanted, page
from mail.moments import time_with_zone
from mail.request import FieldError, Invalid, OneMailbox, ScheduledAt, StrictModel, validate
from web import context
from web.body import SMALL_BODY, read_json
from web.errors import json_response
from web.handlers import Service

HIDDEN = ("object", "html", "text", "recipients", "attempts")  # of a mail in a list; GET /emails/{id} has them
ONCE = "must be given once, or once as the id of a mail and once as a time"


def cursor_or_time(given: str) -> tuple[bool, bytes]:
    """Returns whether it is an id, and its place among all ids. A + that was not quoted has become a blank. Raises
    `ValueError`."""
    if found := raw_id(given):
        return True, found
    try:
        return False, first_id(time_with_zone(re.sub(r" (?=\d\d:?\d\d$)", "+", given)).timestamp())
    except ValueError:
        raise ValueError(
            "must be the id of a listed mail, or a time with its zone such as 2026-11-21T12:30:00Z"
        ) from None


def whole_number(given: str) -> object:
    return int(given) if given.isascii() and given.isdigit() and len(given) < 10 else given


Bound = Annotated[tuple[bool, bytes], BeforeValidator(cursor_or_time)]


class ListQuery(StrictModel):
    """The query of `GET /emails`. `limit`, and `after` and `before` as ids, are Resend's; an id in `after` asks for
    older mails and in `before` for newer ones. A time in them means what it says."""

    limit: Annotated[int, Field(ge=1, le=100), BeforeValidator(whole_number)] = 20
    after: Annotated[list[Bound], Field(max_length=2, default_factory=list)]
    before: Annotated[list[Bound], Field(max_length=2, default_factory=list)]
    to: OneMailbox | None = None
    status: Literal[STATES] = ""  # type: ignore[valid-type]
    tag: Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{1,256}:[A-Za-z0-9_-]{1,256}$")] = ""


class Move(StrictModel):
    """The body of `PATCH /emails/{id}`. Some clients repeat the id, under one name or another."""

    scheduled_at: ScheduledAt
    id: Any = None
    email_id: Any = None


def list_mails(service: Service) -> HTTPResponse:
    found = page(service.outbox, wanted())
    return json_response(200, {"object": "list", "has_more": found.more, "data": found.mails})


def shown(mail: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in mail.items() if name not in HIDDEN}


def wanted() -> Wanted:
    """Returns what the query of the request asks for. Raises `Invalid`."""
    given: dict[str, Any] = {}
    for name, value in request.query.allitems():
        if name in ("after", "before"):
            given.setdefault(name, []).append(value)
        elif name in given:
            raise Invalid(FieldError(name, "must be given once"))
        else:
            given[name] = value
    try:
        query = validate(ListQuery, given)
    except Invalid as invalid:  # a parameter has no [0] for who wrote it
        raise Invalid(*(replace(one, field=one.field.partition("[")[0]) for one in invalid.errors)) from None
    older, since = _bounds("after", query.after)
    newer, until = _bounds("before", query.before)
    if older and newer:
        raise Invalid(FieldError("before", "must not be an id if after is one"))
    return Wanted(
        to=query.to.address if isinstance(query.to, Mailbox) else "",
        states=frozenset({query.status} if query.status else ()),
        tag=query.tag,
        key=context.current.get().reads_only,
        above=max(since, newer),
        below=min(filter(None, (until, older)), default=Wanted().below),
        upwards=bool(newer),
        limit=query.limit,
        keep=shown,
    )


def _bounds(name: str, given: list[tuple[bool, bytes]]) -> tuple[bytes, bytes]:
    """Returns the id and the time that a parameter has, b"" for what it has not. Raises `Invalid`."""
    by_kind = dict(given)
    if len(by_kind) < len(given):
        raise Invalid(FieldError(name, ONCE))
    return by_kind.get(True, b""), by_kind.get(False, b"")


def cancel_mail(service: Service, mail_id: str) -> HTTPResponse:
    """Stops a mail: either nothing more of it goes out, or the answer is an error."""
    service.outbox.hold_to(mail_id, context.current.get().reads_only)
    service.outbox.cancel(mail_id)
    return changed(mail_id)


def move_mail(service: Service, mail_id: str) -> HTTPResponse:
    asked = validate(Move, read_json(SMALL_BODY))
    service.outbox.hold_to(mail_id, context.current.get().reads_only)
    service.outbox.reschedule(mail_id, scheduled(asked.scheduled_at).timestamp())
    return changed(mail_id)


def changed(mail_id: str) -> HTTPResponse:
    context.current.get().id = mail_id
    return json_response(200, {"object": "email", "id": mail_id})
