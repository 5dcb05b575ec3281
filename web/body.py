"""A request's body: strict JSON, bounded in size, depth and number of values.

Bodies over 1 MiB share a budget, so that a hundred at once cannot take the machine down.
"""

from __future__ import annotations

import json
import math
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

from bottle import request
from pydantic import ValidationError

from mail.request import FieldError, Invalid, Strict, field_errors
from web.errors import RETRY_AFTER, Refusal

SMALL_BODY = 64 * 1024  # bytes; for everything but POST /emails
LARGE = 2**20  # bytes; a body beyond that takes some of the room for large ones
DEEPEST = 32  # levels of JSON; templates' variables need a few, an attack needs thousands
MOST_VALUES = 10_000  # in one body, names counted; checking a million addresses would keep every other caller waiting


def read_json(limit: int) -> Any:
    """The body as strict JSON: UTF-8, no duplicate or non-finite anything, no lone surrogates, bounded in both ways."""
    media_type = request.environ.get("CONTENT_TYPE", "").partition(";")[0].strip().lower()
    if media_type != "application/json":
        raise Refusal(415, "unsupported_media_type", "send the body as Content-Type: application/json")
    if (request.content_length or 0) > limit:
        raise Refusal(413, "request_too_large", f"the body is larger than {limit} bytes, which is the most taken here")
    try:
        text = request.environ["wsgi.input"].read(max(request.content_length, 0)).decode()
        body = json.loads(text, object_pairs_hook=without_duplicates, parse_constant=no_constant)
        check_values(body)
    except RecursionError:
        raise bad_json("it is nested too deeply") from None
    except UnicodeDecodeError:
        raise bad_json("it is not UTF-8") from None
    except json.JSONDecodeError as error:
        raise bad_json(f"it is not JSON: {error.msg} at line {error.lineno}, column {error.colno}") from None
    except ValueError:
        raise bad_json("it holds an integer of too many digits") from None
    return body


def bad_json(text: str, field: str = "body") -> Refusal:
    return Refusal(400, "validation_error", f"{field}: {text}", [FieldError(field, text)])


def without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    members = dict(pairs)
    if len(members) < len(pairs):
        raise bad_json("an object in it names a member twice")
    return members


def no_constant(name: str) -> NoReturn:
    raise bad_json(f"{name} is not JSON")


def check_values(body: Any) -> None:
    for number, (value, path) in enumerate(walk(body, ())):
        if len(path) > DEEPEST:
            raise bad_json("it is nested too deeply", spelled(path[:1]))
        if number > MOST_VALUES:
            raise bad_json(f"it holds more than {MOST_VALUES} values")
        if isinstance(value, float) and not math.isfinite(value):
            raise bad_json("it holds a number that is too large", spelled(path))
        if isinstance(value, str) and not is_unicode(value):
            raise bad_json("it holds half of a surrogate pair, which is not a character", spelled(path))


def walk(value: Any, path: tuple[str | int, ...]) -> Iterator[tuple[Any, tuple[str | int, ...]]]:
    """Every value in `value` and every name of a member, each with the way to it."""
    yield value, path
    if isinstance(value, dict):
        for name, member in value.items():
            yield name, (*path, name)
            yield from walk(member, (*path, name))
    elif isinstance(value, list):
        for number, member in enumerate(value):
            yield from walk(member, (*path, number))


def spelled(path: tuple[str | int, ...]) -> str:
    text = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path)
    return text.lstrip(".").encode("ascii", "replace").decode() or "body"


def is_unicode(text: str) -> bool:
    if text.isascii():
        return True
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def checked(model: type[Strict], body: Any) -> Any:
    if not isinstance(body, dict):
        raise Invalid(FieldError("body", "write a JSON object"))
    try:
        return model.model_validate(body)
    except ValidationError as error:
        raise Invalid(*field_errors(error)) from None


class Room:
    """Until a body is read it lies in a file; then it takes some times its size in memory. A hundred large ones at once
    would take the machine down, so each process reads so many as are together no larger than one may be, and the others
    come again."""

    def __init__(self, octets: int) -> None:
        self.left = octets
        self.lock = threading.Lock()

    @contextmanager
    def taken(self, octets: int) -> Iterator[None]:
        octets = octets if octets > LARGE else 0
        with self.lock:
            if octets > self.left:
                text = f"too many large requests at once; send this again in {RETRY_AFTER} seconds"
                raise Refusal(503, "service_unavailable", text, Retry_After=RETRY_AFTER)
            self.left -= octets
        try:
            yield
        finally:
            with self.lock:
                self.left += octets
