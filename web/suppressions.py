"""The suppression list, in the shapes of Resend's API: looked at, added to, taken from.

An address may stand in the URL, as Resend has it; no log line of ours shows a path.
"""

from __future__ import annotations

from typing import Annotated, Literal

from bottle import HTTPResponse, request
from pydantic import BeforeValidator, Field

from mail.address import Mailbox
from mail.index import LAST, raw_id
from mail.request import FieldError, Invalid, OneMailbox, StrictModel, validate
from mail.suppression import MANUAL, Entry
from queues.jobs import NotFound
from web import context
from web.body import SMALL_BODY, read_json
from web.errors import Json, json_response
from web.handlers import Service
from web.mails import whole_number

AT_ONCE = 1000  # entries read in one go for one origin
Addresses = Annotated[list[OneMailbox], Field(min_length=1, max_length=100)]


class SuppressionQuery(StrictModel):
    """The query of `GET /suppressions`, as in Resend's API."""

    limit: Annotated[int, Field(ge=1, le=100), BeforeValidator(whole_number)] = 20
    after: str = ""
    before: str = ""
    origin: Literal["bounce", "complaint", "manual"] | None = None


class Suppress(StrictModel):
    """The body of `POST /suppressions`."""

    email: OneMailbox


class SuppressAll(StrictModel):
    """The body of `POST /suppressions/batch/add`."""

    emails: Addresses


class ServeAll(StrictModel):
    """The body of `POST /suppressions/batch/remove`."""

    emails: Addresses | None = None
    ids: Annotated[list[str], Field(min_length=1, max_length=100)] | None = None


def list_suppressions(service: Service) -> HTTPResponse:
    asked = validate(SuppressionQuery, dict(request.query))
    if asked.after and asked.before:
        raise Invalid(FieldError("before", "must be left out beside after"))
    older, newer = (_cursor(name, getattr(asked, name)) for name in ("after", "before"))
    found: list[Entry] = []
    most = asked.limit + 1 if asked.origin is None else AT_ONCE
    above, below = newer or b"", older or LAST
    while len(found) <= asked.limit:
        page = service.outbox.suppressions.page(most, above=above, below=below, upwards=bool(newer))
        wanted = [one for one in page if asked.origin in (None, one.origin)]
        found = [*wanted, *found] if newer else [*found, *wanted]
        if len(page) < most:
            break
        above, below = (raw_id(page[0].id) or b"", below) if newer else (above, raw_id(page[-1].id) or b"")
    kept = found[-asked.limit :] if newer else found[: asked.limit]
    shown = {"object": "list", "has_more": len(kept) < len(found), "data": list(map(described, kept))}
    return json_response(200, shown)


def add_suppression(service: Service) -> HTTPResponse:
    asked = validate(Suppress, read_json(SMALL_BODY))
    entry_id = context.current.get().id = service.outbox.suppressions.add(asked.email.address, MANUAL)
    return json_response(201, named(entry_id))


def add_suppressions(service: Service) -> HTTPResponse:
    asked = validate(SuppressAll, read_json(SMALL_BODY))
    ids = service.outbox.suppressions.add_all([one.address for one in asked.emails], MANUAL)
    return json_response(201, {"data": list(map(named, ids))})


def get_suppression(service: Service, id_or_email: str) -> HTTPResponse:
    found = service.outbox.suppressions.find(_meant(id_or_email))
    if not found:
        raise NotFound("no such address on the suppression list")
    return json_response(200, described(found))


def remove_suppression(service: Service, id_or_email: str) -> HTTPResponse:
    removed = service.outbox.suppressions.remove(_meant(id_or_email))
    if not removed:
        raise NotFound("no such address on the suppression list")
    context.current.get().id = removed[0]
    return json_response(200, {**named(removed[0]), "deleted": True})


def remove_suppressions(service: Service) -> HTTPResponse:
    asked = validate(ServeAll, read_json(SMALL_BODY))
    if (asked.emails is None) == (asked.ids is None):
        raise Invalid(FieldError("emails", "must be given, or ids in its place"))
    removed = service.outbox.suppressions.remove(*(asked.ids or [one.address for one in asked.emails or ()]))
    return json_response(200, {"data": [{**named(one), "deleted": True} for one in removed]})


def named(entry_id: str) -> Json:
    return {"object": "suppression", "id": entry_id}


def described(entry: Entry) -> Json:
    """Shows an entry. Some SDKs read none whose `email` is null."""
    why = {"origin": entry.origin, "source_id": entry.source_id or None, "created_at": entry.created_at}
    return {**named(entry.id), "email": entry.email, **why, "reason": entry.reason or None}


def _cursor(name: str, given: str) -> bytes | None:
    if given and not raw_id(given):
        raise Invalid(FieldError(name, "must be the id of an entry of this list"))
    return raw_id(given)


def _meant(id_or_email: str) -> str:
    """Returns an address as mail has it: its domain in lower case and A-labels."""
    try:
        return Mailbox.parse(id_or_email).address if "@" in id_or_email else id_or_email
    except ValueError:
        raise NotFound("no such address on the suppression list") from None
