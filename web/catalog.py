"""What there is to send with, in the shapes of Resend's SDKs: templates, the sender's domain, the names of API keys.

All of it is read only. Templates are files (mail.templates); their preview is made as a mail is, and nothing is stored.
Domains and keys are there for the set-up code of clients, which asks for them to see whether a key works.
"""

from __future__ import annotations

import uuid
from pathlib import Path
from typing import Annotated, Any

from bottle import HTTPResponse, request
from pydantic import BeforeValidator, Field

from mail import forms, templates
from mail.claim import iso
from mail.draft import preview
from mail.request import FieldError, Invalid, StrictModel, validate
from queues.jobs import NotFound
from web.body import SMALL_BODY, read_json
from web.errors import Json, json_response
from web.handlers import Service
from web.mails import whole_number

INSTALLED = (Path(__file__).parent.parent / "CHANGELOG.md").stat().st_mtime  # of what has no time of its own


class PageQuery(StrictModel):
    """The query of a list, as in Resend's API."""

    limit: Annotated[int, Field(ge=1, le=100, description="how many"), BeforeValidator(whole_number)] = 100
    after: str = Field("", description="an id of the list: those after it")
    before: str = Field("", description="an id of the list: those before it")


class Preview(StrictModel):
    """The body of a template's preview."""

    variables: Annotated[dict[str, Any], BeforeValidator(forms.empty_object)] = Field(default_factory=dict)


def list_templates(service: Service) -> HTTPResponse:
    return page([described(template_id) for template_id in templates.ids()])


def get_template(service: Service, template_id: str) -> HTTPResponse:
    outline = {"object": "template", **described(known(template_id)), "from": None, "reply_to": None}
    subject, text, html = templates.source(template_id)
    variables = [
        {"key": name, "type": "string" if isinstance(value, (str, type(None))) else "number", "fallback_value": value}
        for name, value in templates.variables(template_id).items()
    ]
    return json_response(200, outline | {"subject": subject, "html": html, "text": text, "variables": variables})


def preview_template(service: Service, template_id: str) -> HTTPResponse:
    """Shows what a mail of this template would say. Raises what such a mail would be refused with."""
    made = preview(known(template_id), validate(Preview, read_json(SMALL_BODY)).variables)
    return json_response(200, dict(zip(("subject", "text", "html"), made, strict=True)))


def list_domains(service: Service) -> HTTPResponse:
    """Shows the domain of MAIL_FROM, and those to which keys are held. `region` means nothing here, but some SDKs read
    no answer without it."""
    names = {service.sender.address.rpartition("@")[2]: None} if service.sender else {}
    names |= dict.fromkeys(domain for key in service.settings.api_keys for domain in key.domains)
    fixed = {"status": "verified", "region": "us-east-1", "capabilities": {"sending": "enabled"}}
    return page([entry(name) | fixed for name in names])


def list_api_keys(service: Service) -> HTTPResponse:
    return page([entry(key.name) | {"last_used_at": None} for key in service.settings.api_keys])


def entry(name: str) -> Json:
    return {"id": str(uuid.uuid5(uuid.NAMESPACE_OID, name)), "name": name, "created_at": iso(INSTALLED)}


def known(template_id: str) -> str:
    if template_id not in templates.ids():
        raise NotFound("no such template")
    return template_id


def described(template_id: str) -> Json:
    times = [path.stat().st_mtime for path in templates.files(template_id)]
    first, last = iso(min(times)), iso(max(times))
    shown = {"id": template_id, "name": template_id, "alias": template_id, "status": "published"}
    return {**shown, "created_at": first, "updated_at": last, "published_at": last}


def page(entries: list[Json]) -> HTTPResponse:
    """Answers with the part of a list that the query names."""
    asked, ids = validate(PageQuery, dict(request.query)), [one["id"] for one in entries]
    if asked.after and asked.before:
        raise Invalid(FieldError("before", "must be left out beside after"))
    for name, cursor in (("after", asked.after), ("before", asked.before)):
        if cursor and cursor not in ids:
            raise Invalid(FieldError(name, "must be the id of an entry of this list"))
    first = ids.index(asked.after) + 1 if asked.after else 0
    found = entries[first : ids.index(asked.before) if asked.before else None]
    shown = found[-asked.limit :] if asked.before else found[: asked.limit]
    return json_response(200, {"object": "list", "data": shown, "has_more": len(shown) < len(found)})
