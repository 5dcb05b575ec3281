"""Shows what people did, the latest first: `/mail/actions`. ops.page.audit notes it."""

from __future__ import annotations

import re

from flask import Response, request

from ops.page.audit import KEPT, actions
from ops.page.view import View

SHOWN = 100  # on a page


def show(view: View) -> Response:
    given = request.args.get("from", "")
    first = int(given) if re.fullmatch("[0-9]{1,3}", given) else 0
    found = actions(view.redis, first, first + SHOWN - 1)
    older = first + SHOWN if len(found) == SHOWN and first + SHOWN < KEPT else 0
    return view.render("actions.html", "Actions", actions=found, older=older)
