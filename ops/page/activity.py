"""The mails that were accepted, the newest first, page by page: `/mail/activity`."""

from __future__ import annotations

from flask import Response, request

from mail.index import LAST, raw_id
from mail.listing import Wanted, page
from ops.page.view import View

SHOWN = 50  # mails on a page


def show(view: View) -> Response:
    below = raw_id(request.args.get("before", "")) or LAST
    mails, more = page(view.outbox, Wanted(below=below, limit=SHOWN))
    older = mails[-1]["id"] if more else ""
    return view.render("activity.html", "Activity", mails=mails, older=older)
