"""The request that this thread answers, as the middleware, the routes and the errors share it."""

from __future__ import annotations

from contextvars import ContextVar
from dataclasses import dataclass


@dataclass
class Context:
    """Holds the id of the request, and for its log line the name of its API key and the id of its mail or job."""

    request_id: str
    key: str = ""
    id: str = ""


current: ContextVar[Context] = ContextVar("current")
