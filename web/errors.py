"""The one error shape, and our exceptions in HTTP's words.

    {"statusCode": 422, "name": "invalid_parameter", "message": "...",
     "errors": [{"field": "to[0]", "message": "..."}], "request_id": "..."}

The names of errors are Resend's; docs/api.md lists them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from typing import Any

from bottle import HTTPError, HTTPResponse, request, response

from mail.request import FieldError, Invalid
from queues.connection import Unavailable
from queues.jobs import IdempotencyConflict, NotFound, NotPossible

RETRY_AFTER = "5"  # seconds


class Refusal(Exception):
    """An answer that is not the one hoped for."""

    def __init__(self, status: int, name: str, text: str, errors: Iterable[FieldError] = (), **headers: str) -> None:
        super().__init__(name)
        self.status, self.name, self.text, self.errors = status, name, text, tuple(errors)
        self.headers = {key.replace("_", "-"): value for key, value in headers.items()}


def current_request_id() -> str:
    return str(request.environ["async_email.request_id"])


def as_refusal(error: Exception) -> Refusal:
    """What the rest of the house raises, in HTTP's words. Raises what it does not know."""
    match error:
        case Refusal():
            return error
        case Invalid():
            first = error.errors[0]
            return Refusal(422, error_name(first), f"{first.field}: {first.message}", error.errors)
        case IdempotencyConflict():
            text = "this Idempotency-Key was used for another request; take a new key for a new mail"
            return Refusal(409, "invalid_idempotent_request", text)
        case NotFound():
            return Refusal(404, "not_found", str(error) or "there is nothing of this id, or it is no longer kept")
        case NotPossible():
            return Refusal(409, "not_possible", str(error))
        case Unavailable():
            text = (
                f"{error}; send this again in {RETRY_AFTER} seconds (an Idempotency-Key keeps it from counting twice)"
            )
            return Refusal(503, "service_unavailable", text, Retry_After=RETRY_AFTER)
    raise error


def error_name(error: FieldError) -> str:
    if error.missing:
        return "missing_required_field"
    root = re.split(r"[.\[]", error.field)[0]
    return {"attachments": "invalid_attachment", "from": "invalid_from_address"}.get(root, "invalid_parameter")


def answer(status: int, body: dict[str, Any], **headers: str) -> HTTPResponse:
    return HTTPResponse(json.dumps(body), status, {"Content-Type": "application/json", **headers})


def refused(refusal: Refusal) -> HTTPResponse:
    shape = error_shape(refusal.status, refusal.name, refusal.text, current_request_id(), refusal.errors)
    return answer(refusal.status, shape, **refusal.headers)


def unrouted(error: HTTPError) -> bytes:
    """Bottle's own refusals: no such path, or not with this method."""
    response.content_type = "application/json"
    name, text = "not_found", "there is no such path"
    if error.status_code == 405:
        name, text = "method_not_allowed", f"this path takes {error.headers['Allow']}"
    return json.dumps(error_shape(error.status_code, name, text, current_request_id())).encode()


def error_shape(
    status: int, name: str, text: str, request_id: str, errors: Iterable[FieldError] = ()
) -> dict[str, Any]:
    """The one error shape."""
    shape: dict[str, Any] = {"statusCode": status, "name": name, "message": text}
    if errors:
        shape["errors"] = [{"field": error.field, "message": error.message} for error in errors]
    return shape | {"request_id": request_id}
