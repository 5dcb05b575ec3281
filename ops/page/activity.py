"""The mails that were accepted, the newest first, page by page, and those of them that are searched for:
`/mail/activity`."""

from __future__ import annotations

import uuid
from datetime import datetime
from typing import Any

from flask import Response, request

from mail.causes import causes
from mail.index import LAST, made_at, raw_id
from mail.listing import Page, page
from ops.page.search import NotUnderstood, Query, found_at, parse, sealed, unsealed, wanted
from ops.page.view import View, go, row

SHOWN = 50  # mails on a page
LOOK = 300  # mails that are read for a page
SAVED = (
    ("All", ""),
    ("Failed today", "state:failed after:today"),
    ("In doubt", "state:in-doubt"),
    ("Waiting > 5 min", "state:waiting before:5m"),
    ("Scheduled", "state:scheduled"),
    ("Came back", "state:bounced,complained"),
)
LINKS = [(name, parse(text)) for name, text in SAVED]


def search(view: View) -> Response:
    """Takes what was typed, and goes to the page whose URL holds it sealed."""
    return _answer(view, request.form.get("q", ""))


def begin(_: View) -> Response:
    """Answers who loads the URL of the form again."""
    return go("/mail/activity")


def show(view: View) -> Response:
    return _answer(view, request.args.get("q", ""))


def _answer(view: View, text: str) -> Response:
    try:
        query = parse(text)
    except NotUnderstood as error:
        return _render(view, Query(), Page([]), status=400, asked=text, wrong=str(error))
    if ids := query.of("id"):
        return go(f"/mail/emails/{ids[0]}")
    in_url = sealed(query, view.outbox.index.sealed)
    if request.method == "POST" or in_url != query:
        return go(found_at(in_url))
    newer, older = (raw_id(request.args.get(name, "")) or b"" for name in ("after", "before"))
    found = _found(view, query, newer, older)
    if newer and not (found.more or found.stopped):  # nothing is newer: the first page, which is full
        newer, older, found = b"", b"", _found(view, query, b"", b"")
    return _render(view, query, found, bool(newer), bool(older))


def _found(view: View, query: Query, newer: bytes, older: bytes) -> Page:
    known = causes(view.outbox) if query.of("reason") else ()
    asked = wanted(query, view.outbox.index.sealed, datetime.now().astimezone(), known)
    asked = asked._replace(above=max(asked.above, newer), below=min(asked.below, older or LAST), upwards=bool(newer))
    return page(view.outbox, asked._replace(keep=row, limit=SHOWN, look=LOOK))


def _render(
    view: View, query: Query, found: Page, upwards: bool = False, downwards: bool = False, **values: Any
) -> Response:
    """Shows a page that was found, from an id on `upwards` or `downwards`, or else from the newest mail on."""
    shown = [mail["id"] for mail in found.mails]
    stopped = str(uuid.UUID(bytes=found.stopped)) if found.stopped else ""
    upper = stopped if upwards and stopped else shown[0] if shown else ""
    lower = shown[-1] if shown and (upwards or found.more) else "" if upwards else stopped
    plain = unsealed(query, found.mails[0], view.outbox.index.sealed, view.settings.show_addresses) if shown else query
    about = {
        "asked": str(plain),
        "wrong": "",
        "mails": found.mails,
        "newest": found_at(query) if upwards or downwards else "",
        "newer": found_at(query, after=upper) if upper and (upwards or downwards) else "",
        "older": found_at(query, before=lower) if lower else "",
        "looked_to": made_at(stopped) if stopped else None,
        "upwards": upwards,
        "saved": [(name, found_at(one), {*one.terms} == {*query.terms}) for name, one in LINKS],
        "narrow": lambda name, value: found_at(query.also(name, value)),
    }
    return view.render("activity.html", "Activity", **(about | values))
