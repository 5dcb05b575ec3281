"""The frame of every request: its id, common headers, one log line, no traceback to the caller."""

from __future__ import annotations

import logging
import re
import time
import uuid
from collections.abc import Callable, Iterable
from typing import Any

from bottle import Bottle

from mail import counters
from process.log import emit, where
from web.context import Context, current
from web.errors import as_line, error_shape


class Middleware:
    """The application as Waitress calls it."""

    def __init__(self, app: Bottle, accepting: counters.Gathered) -> None:
        self.app = app
        self.accepting = accepting
        self.answered = 0  # requests; a lost increment does not matter

    def __call__(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        started = time.perf_counter()
        given = environ.get("HTTP_X_REQUEST_ID", "")
        request_id = given if re.fullmatch(r"[A-Za-z0-9._-]{1,64}", given) else uuid.uuid4().hex
        context = Context(request_id)
        current.set(context)

        def start(status: str, headers: list[tuple[str, str]], exc_info: Any = None) -> Any:
            self.answered += 1
            seconds = time.perf_counter() - started
            if environ["REQUEST_METHOD"] == "POST" and status < "3":
                self.accepting.add(seconds)
            log(environ, context, status, seconds)
            given = {name for name, _ in headers}
            common = [one for one in common_headers(request_id) if one[0] not in given]
            return start_response(status, headers + common, exc_info)

        if environ["PATH_INFO"].startswith("//"):  # Node's SDK adds a slash to a URL that Ruby's needs one after
            environ["PATH_INFO"] = "/" + environ["PATH_INFO"].lstrip("/")
        try:
            body: Iterable[bytes] = self.app(environ, start)
            return body
        except Exception as error:
            emit("crashed", logging.ERROR, request_id=request_id, where=where(error))
            start("500 Internal Server Error", [("Content-Type", "application/json")])
            text = "this is a fault of the service; its log has the request_id"
            return [as_line(error_shape(500, "application_error", text, request_id)).encode()]


def log(environ: dict[str, Any], context: Context, status: str, seconds: float) -> None:
    route = environ.get("bottle.route")  # the rule, never the path: a path holds what a caller wrote
    quiet = environ["REQUEST_METHOD"] in ("GET", "HEAD") and status < "400"
    emit(
        "request",
        logging.DEBUG if quiet else logging.WARNING if status >= "500" else logging.INFO,
        method=environ["REQUEST_METHOD"] if route else "?",
        route=route.rule if route else "?",
        status=status[:3],
        **context.refusal,
        ms=seconds * 1000,
        key=context.key,
        old_key=(context.caller and context.caller.old) or None,
        id=context.id,
        request_id=context.request_id,
    )


def common_headers(request_id: str) -> list[tuple[str, str]]:
    return [("X-Request-Id", request_id), ("Cache-Control", "no-store"), ("X-Content-Type-Options", "nosniff")]
