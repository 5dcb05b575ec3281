"""A request's body -> a `Draft` that the outbox accepts: checked, its template rendered, composed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from mail import unsubscribe
from mail.address import Mailbox
from mail.due import timed
from mail.forms import html_with_ids
from mail.message import Draft, Message, who_gets
from mail.plain import text_beside
from mail.request import FieldError, Invalid, Rendered, Request, content_errors, parse, validate
from mail.templates import render
from settings import Settings

ANYBODY = "preview@example.com"


def compose(request: Request, rendered: tuple[str, str | None, str | None] | None = None) -> Message:
    """Returns the message of a checked request; `rendered` is the (subject, text, html) of its template.

    Raises `Invalid` if what was rendered cannot be sent: a variable may have put a line break into the subject.
    """
    subject, text, html = request.subject, request.text, request.html
    if rendered:
        made = validate(Rendered, dict(zip(("subject", "text", "html"), rendered, strict=True)), "template")
        Invalid.raise_if(content_errors(request, made.text, made.html))
        subject, text, html = made.subject if subject is None else subject, made.text, made.html
    return Message(
        sender=request.sender,
        to=request.to,
        cc=request.cc,
        bcc=request.bcc,
        reply_to=request.reply_to,
        subject=subject or "",
        tags=[tag.model_dump() for tag in request.tags],
        text=text,
        html=html_with_ids(
            html, {one.content_id: one.cid for one in request.attachments if one.content_id and one.cid}
        ),
        headers={**_headers(request), **unsubscribe.headers(request.unsubscribe_url, request.unsubscribe_email)},
        attachments=[one.stored() for one in request.attachments],
    )


def _headers(request: Request) -> dict[str, str]:
    return {name: value for name, value in request.headers.items() if name.lower() != "message-id"}


def redirected(message: Message, settings: Settings) -> Message:
    """Returns the message with MAIL_REDIRECT_TO in place of each recipient to whom no mail may go. Who was meant is the
    name beside that address: the mail and `GET /emails/{id}` show it in its place, and no reply goes there. Raises
    `Invalid` for such recipients if there is no MAIL_REDIRECT_TO."""
    if not settings.staging:
        return message
    if not settings.mail_redirect_to:
        Invalid.raise_if(
            FieldError(f"{name}[{number}]", "must be on MAIL_ALLOWLIST: this service sends to nobody else")
            for name, boxes in (("to", message.to), ("cc", message.cc), ("bcc", message.bcc))
            for number, box in enumerate(boxes)
            if not settings.admits(box.address)
        )
    to, cc, bcc = ([who_gets(box, settings) or box for box in boxes] for boxes in (message.to, message.cc, message.bcc))
    return replace(message, to=to, cc=cc, bcc=bcc)


def prepare(body: object, *, default_sender: Mailbox | None, max_recipients: int, local_domains: bool = False) -> Draft:
    """Returns the draft of one request's body. Raises `Invalid` with every field that is wrong, or `Expired`."""
    request = parse(body, default_sender=default_sender, max_recipients=max_recipients, local_domains=local_domains)
    rendered = render(request.template.id, request.template.variables) if request.template else None
    message = compose(request, rendered)
    at = timed(request.scheduled_at, request.expires_at)
    return Draft(
        message,
        request.expires_at,
        request.on_doubt,
        scheduled_at=at,
        priority=request.priority,
        message_id=request.message_id,
        relay=request.relay or "",
        skip_suppression=request.skip_suppression,
    )


def preview(template_id: str, variables: Mapping[str, Any]) -> tuple[str, str | None, str | None]:
    """Returns (subject, text, html) of a mail of this template. Raises what such a mail would be refused with."""
    mail = {"from": ANYBODY, "to": ANYBODY, "template": {"id": template_id, "variables": variables}}
    made = prepare(mail, default_sender=None, max_recipients=1).message
    return made.subject, text_beside(made.text, made.html), made.html
