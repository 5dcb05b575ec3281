"""The suppression list: looked at, an address looked up, added, or taken off: `/mail/suppressions`.

Most entries have no address to show, so an address is typed to find its entry: into a form, for no URL of these pages
has one.
"""

from __future__ import annotations

from flask import Response, request

from mail.address import Mailbox
from mail.index import LAST, raw_id
from mail.suppression import MANUAL
from ops.page import audit
from ops.page.view import View, go

SHOWN = 50  # entries on a page


def show(view: View, typed: str = "", told: str = "", status: int = 200) -> Response:
    below = raw_id(request.args.get("after", "")) or LAST
    entries = view.outbox.suppressions.page(SHOWN + 1, below=below)
    about = {"entries": entries[:SHOWN], "size": view.outbox.suppressions.size(), "typed": typed, "told": told}
    return view.render(
        "suppressions.html",
        "Suppressions",
        status,
        older=entries[SHOWN - 1].id if len(entries) > SHOWN else "",
        is_first=below == LAST,
        **about,
    )


def act(view: View) -> Response:
    """Looks an address up that was typed into the form, or adds it."""
    typed = request.form.get("address", "")
    try:
        address = Mailbox.parse(typed).address
    except ValueError as error:
        return show(view, typed, f"It {error}.", 400)
    if request.form.get("do") == "add":
        audit.note(view.redis, view.who, "suppress", view.outbox.suppressions.add(address, MANUAL))
        return go("/mail/suppressions?done=suppress")
    found = view.outbox.suppressions.find(address)
    return (
        go(f"/mail/suppressions/{found.id}") if found else show(view, typed, "It is not on the list: mail goes there.")
    )


def ask(view: View, entry_id: str) -> Response:
    """Shows one entry, and asks whether to take it off."""
    found = view.outbox.suppressions.find(entry_id) if raw_id(entry_id) else None
    if not found:
        return go("/mail/suppressions?done=unsuppress")  # somebody else has taken it off
    return view.render("suppression.html", "An address on the suppression list", entry=found)


def remove(view: View, entry_id: str) -> Response:
    if raw_id(entry_id) and view.outbox.suppressions.remove(entry_id):
        audit.note(view.redis, view.who, "unsuppress", entry_id)
    return go("/mail/suppressions?done=unsuppress")
