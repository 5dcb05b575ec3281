"""The frame of every request: its id, common headers, one log line, no traceback to the caller."""

from __future__ import annotations

import logging
import re
import time
import uuid
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from bottle import Bottle, HTTPResponse

from mail import counters
from process.log import emit, where
from queues.acceptance import Acceptance
from web.context import Context, current
from web.errors import error_shape, json_response

BEGUN = "async_email.begun"  # in the environ of a request: its answer, as far as it goes


@dataclass
class Answer:
    context: Context
    started: float = field(default_factory=time.perf_counter)
    status: str = ""
    headers: list[tuple[str, str]] = field(default_factory=list)
    body: Iterable[bytes] = ()

    def take(self, status: str, headers: list[tuple[str, str]], exc_info: Any = None) -> None:
        """Notes what Bottle answers; it is its `start_response`."""
        self.status, self.headers = status, headers

    def take_response(self, response: HTTPResponse) -> None:
        self.take(response.status_line, response.headerlist)
        self.body = [response.body.encode()]

    def crash(self, error: Exception) -> None:
        request_id = self.context.request_id
        emit("crashed", logging.ERROR, request_id=request_id, where=where(error))
        text = "this is a fault of the service; its log has the request_id"
        self.take_response(json_response(500, error_shape(500, "application_error", text, request_id)))


class Middleware:
    """The application as Waitress calls it. `begin` and `commit` may come before, so that the acceptances of several
    requests go to Redis together (`replies`); what is not begun then is answered by itself."""

    def __init__(
        self, app: Bottle, accepting: counters.Gathered, replies: Callable[[list[Acceptance]], list[Any]]
    ) -> None:
        self.app = app
        self.accepting = accepting
        self.replies = replies
        self.answered = 0  # requests; a lost increment does not matter

    def begin(self, environ: dict[str, Any]) -> Answer:
        """Answers a request, but for what waits for Redis to accept an acceptance."""
        given = environ.get("HTTP_X_REQUEST_ID", "")
        request_id = given if re.fullmatch(r"[A-Za-z0-9._-]{1,64}", given) else uuid.uuid4().hex
        answer = environ[BEGUN] = Answer(Context(request_id))
        current.set(answer.context)
        if environ["PATH_INFO"].startswith("//"):  # Node's SDK adds a slash to a URL that Ruby's needs one after
            environ["PATH_INFO"] = "/" + environ["PATH_INFO"].lstrip("/")
        try:
            answer.body = self.app(environ, answer.take)
        except Exception as error:
            answer.crash(error)
        return answer

    def commit(self, answers: Sequence[Answer]) -> None:
        """Hands Redis what the answers wait for, and completes them."""
        left = [(one, *one.context.waiting) for one in answers if one.context.waiting]
        try:
            replies = self.replies([acceptance for _, _, acceptance in left]) if left else []
        except Exception as error:
            replies = [error.with_traceback(None)] * len(left)  # else it would hold itself
        for answer, steps, _ in left:
            current.set(answer.context)
            answer.context.waiting = None
            try:
                steps.send(replies.pop(0))
            except StopIteration as done:
                answer.take_response(done.value)
            except Exception as error:
                answer.crash(error)

    def __call__(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        answer: Answer = environ.get(BEGUN) or self.begin(environ)
        self.commit([answer])
        seconds = time.perf_counter() - answer.started
        self.answered += 1
        if environ["REQUEST_METHOD"] == "POST" and answer.status < "3":
            self.accepting.add(seconds)
        log(environ, answer.context, answer.status, seconds)
        given = {name for name, _ in answer.headers}
        common = [one for one in common_headers(answer.context.request_id) if one[0] not in given]
        start_response(answer.status, answer.headers + common)
        return answer.body


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
