"""What comes back by HTTP: a mail server hands over the reports that it gets (`POST /inbound/dsn`)."""

from __future__ import annotations

from bottle import HTTPResponse, request

from mail import reports
from mail.bounces import Bounces
from queues.jobs import NotPossible
from web import context
from web.errors import Refusal, json_response
from web.handlers import Service


def take_report(service: Service) -> HTTPResponse:
    """Reads one report, and says what it was. Of a mail that is being sent at this moment it is wanted again."""
    media_type = request.environ.get("CONTENT_TYPE", "").partition(";")[0].strip().lower()
    limit = service.settings.max_message_bytes
    if media_type != "message/rfc822":
        raise Refusal(415, "unsupported_media_type", "the request must have Content-Type: message/rfc822")
    if request.content_length > limit:
        raise Refusal(413, "request_too_large", f"the body exceeds the limit of {limit} bytes")
    data = request.environ["wsgi.input"].read(min(reports.SIZE, max(request.content_length, 0)))
    found = Bounces(service.outbox).take(data)
    if found.later:
        raise NotPossible(f"{found.why}; send this again in a minute")
    context.current.get().id = found.mail_id
    shown = {"object": "report", "kind": found.kind or None, "matched": bool(found.mail_id)}
    return json_response(200, shown | {"email_id": found.mail_id or None, "noted": found.noted, "reason": found.why})
