"""The one error shape, and our exceptions in HTTP's words.

    {"statusCode": 409, "name": "validation_error", "type": "not_possible", "message": "...",
     "errors": [{"field": "to[0]", "message": "..."}], "request_id": "..."}

`type` is our word; docs/api.md lists them. `name` is always one that Resend has: its SDK for PHP takes an error of
another name for a success.
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
NAMES = {  # a type that Resend does not have -> its name there; any other has its own
    "field_not_allowed": "validation_error",
    "from_not_allowed": "validation_error",  # Resend says 403 so, where a domain is not verified
    "misdirected_request": "validation_error",
    "not_implemented": "validation_error",
    "not_possible": "validation_error",
    "not_ready": "application_error",
    "request_headers_too_large": "validation_error",
    "request_timeout": "validation_error",  # nginx alone says this
    "request_too_large": "validation_error",
    "service_unavailable": "application_error",
    "unsupported_media_type": "validation_error",
}
NOT_HERE = {  # what clients of Resend's API ask for -> what to do without it; docs/clients.md lists the rest
    r"GET /emails/[^/]+/attachments/[^/]+": "GET /emails/ID/attachments has all but what is in the file",
    r"POST /templates": "a template is a folder of templates/ on the server",
    r"POST /domains": "`from` may have any domain that the relay takes",
    r"POST /api-keys": "bin/key on the server makes one",
}


@dataclass(eq=False)
class Refusal(Exception):
    """An answer with an error. `headers` are those that it has beside the common ones."""

    status: int
    type: str
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
            status, text = 403 if first.forbidden else 422, f"{first.field}: {first.message}"
            return Refusal(status, error_type(first), text, error.errors)
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


def bad_request(field: str, text: str, type_: str = "validation_error") -> Refusal:
    return Refusal(400, type_, f"{field}: {text}", [FieldError(field, text)])


def error_type(error: FieldError) -> str:
    if error.forbidden:
        return "from_not_allowed" if error.field.endswith("from") else "field_not_allowed"
    if error.missing:
        return "missing_required_field"
    root = re.split(r"[.\[]", error.field)[0]
    return {"attachments": "invalid_attachment", "from": "invalid_from_address"}.get(root, "validation_error")


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
    note_refusal(refusal.type, refusal.errors[0].field if refusal.errors else "", refusal.status, refusal.text)
    shape = error_shape(refusal.status, refusal.type, refusal.text, request_id, refusal.errors)
    return json_response(refusal.status, shape, refusal.headers)


def note_refusal(type_: str, path: str, status: int, reason: str) -> None:
    """Remembers for the log line what was refused. Of a 503 also why: that names nothing of the request."""
    shown = reason.partition("; ")[0] if status == 503 else ""
    context.current.get().refusal = {"name": type_, "field": loggable(path), "reason": shown}


def routing_error(error: HTTPError) -> HTTPResponse:
    """Answers what Bottle refuses by itself: no such path, or not with this method."""
    allow, asked = error.headers.get("Allow"), f"{request.method} {request.path}"
    instead = next((f"; {text}" for pattern, text in NOT_HERE.items() if re.fullmatch(pattern, asked)), "")
    if not allow:
        return error_response(Refusal(error.status_code, "not_found", f"no such path{instead}"))
    text = f"the method must be one of {allow}{instead}"
    return error_response(Refusal(405, "method_not_allowed", text, headers={"Allow": allow}))


def error_shape(status: int, type_: str, text: str, request_id: str, errors: Sequence[FieldError] = ()) -> Json:
    shape: Json = {"statusCode": status, "name": NAMES.get(type_, type_), "type": type_, "message": text}
    if errors:
        shape["errors"] = [{"field": error.field, "message": error.message} for error in errors]
    return shape | {"request_id": request_id}
