"""The one error shape, and our exceptions in HTTP's words.

    {"statusCode": 422, "name": "invalid_parameter", "message": "...",
     "errors": [{"field": "to[0]", "message": "..."}], "request_id": "..."}

The names of errors are Resend's; docs/api.md lists them.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import takewhile
from typing import Any

from bottle import HTTPError, HTTPResponse, request

from mail.request import FieldError, Invalid, StrictModel
from mail.templates import Broken
from process.log import emit
from queues.connection import Unavailable
from queues.jobs import IdempotencyConflict, NotFound, NotPossible
from web import context

Json = dict[str, Any]
RETRY_AFTER = "5"  # seconds
NOT_HERE = {  # what clients of Resend's API ask for -> what to do without it; docs/clients.md lists the rest
    r"GET /emails": "mails cannot be listed; GET /emails/ID shows one",
    r"PATCH /emails/[^/]+": "a mail cannot be changed; DELETE /jobs/ID cancels it, and another can be sent",
    r"POST /emails/[^/]+/cancel": "DELETE /jobs/ID cancels a mail",
}


@dataclass(eq=False)
class Refusal(Exception):
    """An answer with an error. `headers` are those that it has beside the common ones."""

    status: int
    name: str
    text: str
    errors: Sequence[FieldError] = ()
    headers: Mapping[str, str] | None = None


def as_refusal(error: Exception) -> Refusal:
    """Translates what the other rooms raise into HTTP. Raises what it does not know."""
    match error:
        case Refusal():
            return error
        case Invalid():
            first = error.errors[0]
            return Refusal(422, error_name(first), f"{first.field}: {first.message}", error.errors)
        case IdempotencyConflict():
            text = "this Idempotency-Key was used for a different request; use a new key for a new request"
            return Refusal(409, "invalid_idempotent_request", text)
        case NotFound():
            return Refusal(404, "not_found", str(error) or "no such mail or job, or it is no longer kept")
        case NotPossible():
            return Refusal(409, "not_possible", str(error))
        case Broken():
            emit("crashed", logging.ERROR, request_id=context.current.get().request_id, where=error)
            return Refusal(500, "application_error", str(error))
        case Unavailable():
            again = f"send this again in {RETRY_AFTER} seconds, with an Idempotency-Key so that it counts once"
            return Refusal(503, "service_unavailable", f"{error}; {again}", headers={"Retry-After": RETRY_AFTER})
    raise error


def bad_request(field: str, text: str, name: str = "validation_error") -> Refusal:
    return Refusal(400, name, f"{field}: {text}", [FieldError(field, text)])


def error_name(error: FieldError) -> str:
    if error.missing:
        return "missing_required_field"
    root = re.split(r"[.\[]", error.field)[0]
    return {"attachments": "invalid_attachment", "from": "invalid_from_address"}.get(root, "invalid_parameter")


def as_line(body: Json) -> str:
    """Returns JSON that ends with a line, as a terminal wants it after curl."""
    return json.dumps(body) + "\n"


def json_response(status: int, body: Json, headers: Mapping[str, str] | None = None) -> HTTPResponse:
    return HTTPResponse(as_line(body), status, {"Content-Type": "application/json", **(headers or {})})


@lru_cache(maxsize=1)
def own_words() -> frozenset[str]:
    """Returns the names of fields that we have given."""
    fields = {one.alias or name for model in StrictModel.__subclasses__() for name, one in model.model_fields.items()}
    return frozenset(fields | {"", "body", "Idempotency-Key", "x-batch-validation"})


def loggable(path: str) -> str:
    """Returns a field's path as far as the words are ours: `headers` of `headers.X-Customer`, which a caller wrote."""
    ours = takewhile(lambda word: re.sub(r"\[\d{1,4}\]", "", word) in own_words(), path.split("."))
    return ".".join(ours)


def error_response(refusal: Refusal) -> HTTPResponse:
    request_id = context.current.get().request_id
    note_refusal(refusal.name, refusal.errors[0].field if refusal.errors else "", refusal.status, refusal.text)
    shape = error_shape(refusal.status, refusal.name, refusal.text, request_id, refusal.errors)
    return json_response(refusal.status, shape, refusal.headers)


def note_refusal(name: str, path: str, status: int, reason: str) -> None:
    """Remembers for the log line what was refused. Of a 503 also why: that names nothing of the request."""
    shown = reason.partition("; ")[0] if status == 503 else ""
    context.current.get().refusal = {"name": name, "field": loggable(path), "reason": shown}


def routing_error(error: HTTPError) -> HTTPResponse:
    """Answers what Bottle refuses by itself: no such path, or not with this method."""
    allow, asked = error.headers.get("Allow"), f"{request.method} {request.path}"
    instead = next((f"; {text}" for pattern, text in NOT_HERE.items() if re.fullmatch(pattern, asked)), "")
    if not allow:
        return error_response(Refusal(error.status_code, "not_found", f"no such path{instead}"))
    text = f"the method must be one of {allow}{instead}"
    return error_response(Refusal(405, "method_not_allowed", text, headers={"Allow": allow}))


def error_shape(status: int, name: str, text: str, request_id: str, errors: Sequence[FieldError] = ()) -> Json:
    shape: Json = {"statusCode": status, "name": name, "message": text}
    if errors:
        shape["errors"] = [{"field": error.field, "message": error.message} for error in errors]
    return shape | {"request_id": request_id}
