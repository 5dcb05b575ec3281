"""The request that this thread answers, as the middleware, the routes and the errors share it."""

from __future__ import annotations

from contextvars import ContextVar
from dataclasses import dataclass, field


@dataclass
class Context:
    """Holds the id of the request, and for its log line the name of its API key, the id of its mail or job, and why it
    was refused."""

    request_id: str
    key: str = ""
    id: str = ""
    refusal: dict[str, str] = field(default_factory=dict)  # name, field and reason; nothing that the caller wrote


current: ContextVar[Context] = ContextVar("current")
