"""A request's body: strict JSON, bounded in size, depth and number of values.

Bodies over 1 MiB share a budget, so that a hundred at once cannot take the machine down.
"""

from __future__ import annotations

import json
import math
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain
from typing import Any

from bottle import request

from web import octets
from web.errors import RETRY_AFTER, Refusal, bad_request

SMALL_BODY = 64 * 1024  # bytes; for everything but POST /emails
LARGE_BODY = 2**20  # bytes; a body beyond that takes its size out of the budget
MAX_DEPTH = 32  # levels of JSON; templates' variables need a few, an attack needs thousands


def read_json(limit: int) -> Any:
    """Reads the body as strict JSON in UTF-8. Raises `Refusal`."""
    media_type = request.environ.get("CONTENT_TYPE", "").partition(";")[0].strip().lower()
    encoding = request.environ.get("HTTP_CONTENT_ENCODING", "identity").strip().lower()
    if encoding not in ("", "identity"):
        raise Refusal(415, "unsupported_media_type", "the request must have no Content-Encoding such as gzip")
    if media_type != "application/json":
        raise Refusal(415, "unsupported_media_type", "the request must have Content-Type: application/json")
    try:
        text, lists = octets.read(request.environ["wsgi.input"], max(request.content_length, 0), limit)
        body = json.loads(text, object_pairs_hook=without_duplicates, parse_float=finite, parse_constant=finite)
        body = octets.with_files(body, lists)
        check_values(body)
    except RecursionError:
        raise bad_request("body", f"must not be nested deeper than {MAX_DEPTH} levels") from None
    except UnicodeDecodeError:
        raise bad_request("body", "must be UTF-8") from None
    except UnicodeEncodeError:
        raise bad_request("body", "must not contain half of a surrogate pair") from None
    except json.JSONDecodeError as error:
        raise bad_request("body", f"must be JSON: {error.msg} at line {error.lineno}, column {error.colno}") from None
    except ValueError:
        raise bad_request("body", "must not contain an integer of thousands of digits") from None
    return body


def without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    members = dict(pairs)
    if len(members) < len(pairs):
        raise bad_request("body", "must not name a member of an object twice")
    return members


def finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise bad_request("body", "must not contain NaN, Infinity or a number too large for a float")
    return number


def check_values(body: Any) -> None:
    """Raises `Refusal` (too many values), `RecursionError` (too deep) or `UnicodeEncodeError` (a lone surrogate)."""
    for number, value in enumerate(values_in(body)):
        if number > octets.MAX_VALUES:
            raise octets.too_many_values()
        if isinstance(value, str) and not value.isascii():
            value.encode()


def values_in(value: Any, depth: int = 0) -> Iterator[Any]:
    """Yields `value` and everything inside it, the names of members too."""
    if depth > MAX_DEPTH:
        raise RecursionError
    yield value
    inside = chain(value, value.values()) if isinstance(value, dict) else value if isinstance(value, list) else ()
    for one in inside:
        yield from values_in(one, depth + 1)


class BodyBudget:
    """Limits how many large bodies a process reads at once.

    Until it is read, a body lies in a file; read and parsed, it takes several times its size in memory. Bodies that are
    together larger than `left` bytes are refused with 503 and Retry-After.
    """

    def __init__(self, left: int) -> None:
        self.left = left
        self.lock = threading.Lock()

    @contextmanager
    def reserve(self, size: int) -> Iterator[None]:
        """Takes `size` bytes for as long as the block runs, nothing for a small body. Raises `Refusal`."""
        size = size if size > LARGE_BODY else 0
        with self.lock:
            if size > self.left:
                text = f"too many large requests at once; send this again in {RETRY_AFTER} seconds"
                raise Refusal(503, "service_unavailable", text, headers={"Retry-After": RETRY_AFTER})
            self.left -= size
        try:
            yield
        finally:
            with self.lock:
                self.left += size
