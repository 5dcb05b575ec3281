"""The request that this thread answers, as the middleware, the routes and the errors share it."""

from __future__ import annotations

from collections.abc import Generator
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, TypeVar

from bottle import HTTPResponse

from process.api_keys import ApiKey
from queues.acceptance import Acceptance

Answer = TypeVar("Answer")
# What returns an answer, and may yield an acceptance once. It goes on with Redis' reply, when no request is bound to
# the thread any more: Bottle's `request` may be another one by then.
Steps = Generator[Acceptance, Any, Answer]


@dataclass
class Context:
    """Holds the id of the request, who asks, and for its log line the id of its mail or job, and why it was refused."""

    request_id: str
    caller: ApiKey | None = None
    id: str = ""
    refusal: dict[str, str] = field(default_factory=dict)  # name, field and reason; nothing that the caller wrote
    waiting: tuple[Steps[HTTPResponse], Acceptance] | None = None  # what is left of it, and for what it waits

    @property
    def key(self) -> str:
        """Returns the name of the request's API key."""
        return self.caller.name if self.caller else ""

    @property
    def is_test(self) -> bool:
        """Returns whether what this request submits is stored and answered as any mail, and never sent."""
        return self.caller is not None and self.caller.scope == "test"

    @property
    def reads_only(self) -> str:
        """Returns the name of the key whose mails alone this request may see, cancel or change; "" for all."""
        return self.caller.reads_only if self.caller else ""


current: ContextVar[Context] = ContextVar("current")
