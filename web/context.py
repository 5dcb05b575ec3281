"""What the middleware, the routes and the errors share about the request that this thread answers."""

from __future__ import annotations

from contextvars import ContextVar
from dataclasses import dataclass


@dataclass
class Context:
    """The id of the request, and what its log line adds: the name of its API key, the id of its mail or job."""

    request_id: str
    key: str = ""
    id: str = ""


current: ContextVar[Context] = ContextVar("current")
