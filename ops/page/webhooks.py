"""The endpoints that are told what becomes of mails: `/mail/webhooks`; what waits, what was posted, and is again.

Of an endpoint's URL only the host is known here: the rest may be a secret.
"""

from __future__ import annotations

import time
from typing import Any, NamedTuple

from flask import Response, abort, request

from ops.page import audit
from ops.page.view import View, go
from queues.connection import Redis, translating_errors
from webhooks.queue import LOGGED, Line, Post, Queue, standings

PATH = "/mail/webhooks"
SHOWN = 50  # posts of each endpoint
AT_ONCE, TIMES = 500, 20  # events that are put back in one step, and steps for one press of the button


class Posted(NamedTuple):
    """A post, or an event that waits: then it has no `post`."""

    endpoint: str
    line: Line
    post: Post | None = None

    @property
    def happened(self) -> float:
        return self.line.micros / 1e6


def show(view: View) -> Response:
    with translating_errors():
        found = standings(view.redis)
        posts = {one.name: posted(view.redis, one.name, SHOWN) for one in found}
    silent = [one.name for one in found if one.is_silent(time.time())]
    return view.render("webhooks.html", "Webhooks", endpoints=found, posts=posts, silent=silent)


def posted(redis: Redis, name: str, most: int, mail_id: str = "") -> list[Posted]:
    """Returns the last posts, the latest first; with `mail_id`, those of this mail."""
    found = []
    for post in Queue(redis, name).log(most):
        try:
            line = Line.parse(post.line)
        except (ValueError, AttributeError):
            continue
        if mail_id in ("", post.mail_id):
            found.append(Posted(name, line, post))
    return found


def of_mail(redis: Redis, mail_id: str) -> list[Posted]:
    """Returns what of a mail was posted, and what waits to be."""
    found: list[Posted] = []
    with translating_errors():
        for one in standings(redis):
            found += reversed(posted(redis, one.name, LOGGED, mail_id))
            found += (Posted(one.name, line) for line in Queue(redis, one.name).waiting_of(mail_id))
    return found


def act(view: View, name: str, act: str) -> Response:
    """Replays what was given up, or one event of the log; or posts a test."""
    with translating_errors():
        if name not in [one.name for one in standings(view.redis)]:
            abort(404)
        queue = Queue(view.redis, name)
        what: Any = {"replay": replay, "test": lambda queue: queue.test(time.time()), "again": again}.get(act)
        if not what:
            abort(404)
        what(queue)
    audit.note(view.redis, view.who, f"webhook_{act}", name)
    return go(f"{PATH}?done=webhook_{act}")


def replay(queue: Queue) -> None:
    for _ in range(TIMES):
        if queue.replay(AT_ONCE) < AT_ONCE:
            return


def again(queue: Queue) -> None:
    mail_id, line = request.form.get("mail", ""), request.form.get("line", "")
    if (mail_id, line) not in [(post.mail_id, post.line) for post in queue.log()]:
        abort(404)
    if Line.parse(line) not in queue.waiting_of(mail_id):
        queue.put(mail_id, line)
