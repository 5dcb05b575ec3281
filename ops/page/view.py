"""What every page is given, and how it is rendered.

Templates are in html/; each extends base.html. All text is escaped as it is put in, and a name that is misspelt raises
an error. Addresses go through `mailbox` and a relay's words through `said`: SHOW_ADDRESSES=no masks them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from flask import Response, redirect, request
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from mail.outbox import Outbox
from ops.checks.findings import counted, lasting, sized
from ops.page import words
from ops.page.search import Query, found_at
from queues.connection import Redis
from queues.jobs import Jobs
from settings import Settings

HERE = Path(__file__).parent
FILES = {"page.css": "text/css", "page.js": "text/javascript"}
PAGES = {  # the paths of the navigation -> their names
    "/mail/": "Overview",
    "/mail/activity": "Activity",
    "/mail/scheduled": "Scheduled",
    "/mail/failures": "Failures",
    "/mail/suppressions": "Suppressions",
    "/mail/system": "Relay and workers",
    "/mail/templates": "Templates",
    "/mail/webhooks": "Webhooks",
    "/mail/actions": "Actions",
}
WITHOUT_LOGIN = "without login"  # in the place of a name
DONE: Mapping[str, str] = {  # what a page says after an action: the `done` of its URL -> a sentence
    "paused": "All workers are paused. What is in hand is finished; nothing more is sent until you resume.",
    "resumed": "All workers take mails and jobs again.",
    "breaker_closed": "The breaker is closed. Mail goes out within half a minute; what was in hand keeps its time.",
    "requeue": "It is queued again, with all its attempts.",
    "cancel": "It is canceled: nothing more of it is sent.",
    "arrived": "It is noted as sent to those who were in doubt.",
    "copy": "A copy is on its way to ALERT_TO.",
    "suppress": "The address is on the list: no mail goes there until it is taken off.",
    "unsuppress": "The address is off the list. A mail that was suppressed can be requeued on its own page.",
    "webhook_replay": "What was given up waits again, and is posted as soon as the endpoint takes it.",
    "webhook_again": "The event is posted again, with the same webhook-id.",
    "webhook_test": "A test event is on its way.",
    "move": "It is moved, and is not sent before its new time.",
}


class View:
    """One process's pages: what they read from, and their templates."""

    def __init__(self, redis: Redis, settings: Settings, by_login: bool) -> None:
        self.redis = redis
        self.settings = settings
        self.by_login = by_login
        self.outbox = Outbox(Jobs(redis, settings.redis_replicas), settings)
        self.templates = Environment(
            loader=FileSystemLoader(HERE / "html"),
            autoescape=True,
            undefined=StrictUndefined,
            trim_blocks=True,
            lstrip_blocks=True,
        )
        show = settings.show_addresses
        self.templates.filters |= {
            **{name: getattr(words, name) for name in ("clock", "ago", "took", "number", "chip", "fate", "is_id")},
            **{"lasting": lasting, "counted": counted, "sized": sized, "linked": words.linked, "soon": words.soon},
            "mailbox": lambda text: words.mailbox(text, show),
            "said": lambda text: text if show else words.masked(text),
        }
        self.templates.globals |= {"version": version(), "pages": PAGES, "narrowed": narrowed, "zone": words.zone}

    @property
    def who(self) -> str:
        """Returns the name of who asks, for the log of actions."""
        return asker(self.by_login)

    def render(self, name: str, title: str, status: int = 200, **values: Any) -> Response:
        """Returns the page that is made of html/`name`."""
        about = {"title": title, "here": page_of(request.path), "done": DONE.get(request.args.get("done", ""), "")}
        return Response(self.templates.get_template(name).render(about | values), status, mimetype="text/html")

    def confirm(self, question: str, *, text: str, button: str, back: str, **fields: str) -> Response:
        """Returns a page that asks whether to do what a POST to the same path does, with these fields."""
        return self.render("confirm.html", question, text=text, button=button, back=back, fields=fields)


def row(mail: dict[str, Any]) -> dict[str, Any]:
    """Returns what a row of a table needs of a mail: how many recipients and attempts it has, and the last attempt."""
    recipients, attempts = mail["recipients"], mail["attempts"]
    return mail | {"recipients": [None] * len(recipients), "attempts": [None] * len(attempts[1:]) + attempts[-1:]}


def narrowed(name: str, value: str) -> str:
    """Returns the URL of the mails with this state, key or tag."""
    return found_at(Query().also(name, value))


def asker(by_login: bool) -> str:
    given = request.authorization
    return (given.username or "") if by_login and given else WITHOUT_LOGIN


def page_of(path: str) -> str:
    """Returns the page of the navigation to which a path belongs: a mail's to the activity."""
    within = [one for one in PAGES if path == one or (path.startswith(one.rstrip("/") + "/") and one != "/mail/")]
    return within[0] if within else "/mail/activity" if path.startswith("/mail/emails/") else ""


def go(path: str) -> Response:
    """Sends the browser to another page after a form: 303, so that it may be loaded again without a second POST."""
    answer: Any = redirect(path, 303)
    return answer  # type: ignore[no-any-return]


@lru_cache(maxsize=1)
def version() -> str:
    """Returns what changes with the files of style and script, so that a browser may keep them."""
    return hashlib.sha256(b"".join((HERE / name).read_bytes() for name in FILES)).hexdigest()[:12]
