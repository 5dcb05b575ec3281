"""The templates, and what a mail of each would say: `/mail/templates`.

A preview is made as a mail is, and nothing is stored or sent. Its HTML is in a frame of which nothing gets out. The
variables that somebody has typed are kept in this process for the frame, the last few, so that they are in no URL.
"""

from __future__ import annotations

import json
import re
import secrets
from typing import Any

from flask import Response, abort, request

from mail import draft, templates
from mail.request import Invalid
from mail.templates import Broken
from ops.mailparts import MAIL_CSP, framed
from ops.page.view import View

KEPT = 20
# What the last part of a variable's name looks like -> an example of its value. The first that fits counts.
EXAMPLES: tuple[tuple[str, str | int], ...] = (
    (r"e?mail(_?address)?$", "ada@example.com"),
    (r"(url|link|href|website)s?$", "https://example.com/"),
    (r"company|organi[sz]ation|team|brand|shop|product|app(_?name)?$", "Acme"),
    (r"name|user|customer|recipient|author|sender", "Ada"),
    (r"date|day$|until|since|due|expires", "27 November 2026"),
    (r"time|hour$", "10:30"),
    (r"code|token|pin$|otp", "482913"),
    (r"currency", "EUR"),
    (r"count|number|total|sum|amount|price|quantity|days|hours|minutes|seconds|id$", 3),
)
OTHERWISE = "an example"


class Typed:
    """The variables that were last typed, by a random name."""

    def __init__(self) -> None:
        self.kept: dict[str, dict[str, Any]] = {}

    def keep(self, variables: dict[str, Any]) -> str:
        name = secrets.token_urlsafe(12)
        self.kept = dict([*self.kept.items(), (name, variables)][-KEPT:])  # replaced and never changed: threads
        return name


typed = Typed()


def show(view: View) -> Response:
    return view.render("templates.html", "Templates", rows=[described(template_id) for template_id in templates.ids()])


def described(template_id: str) -> dict[str, Any]:
    """Returns what the list shows of a template; `fault` where no mail could use it."""
    row: dict[str, Any] = {"id": template_id, "subject": "", "variables": {}, "fault": ""}
    try:
        row["subject"] = templates.source(template_id)[0]
        row["variables"] = templates.variables(template_id)
    except (Invalid, Broken) as error:
        row["fault"] = told(error)
    return row


def one(view: View, template_id: str) -> Response:
    try:
        example = example_of(known(template_id))
    except (Invalid, Broken) as error:
        return page(view, template_id, "{}", {}, "", told(error))
    return page(view, template_id, written(example), example, "")


def preview(view: View, template_id: str) -> Response:
    given = request.form.get("variables", "")
    known(template_id)
    try:
        variables = json.loads(given or "{}")
        if not isinstance(variables, dict):
            raise ValueError('must be an object in braces, such as {"name": "Ada"}')
    except json.JSONDecodeError as error:
        wrong = f"The variables must be JSON: {error.msg}, line {error.lineno}, column {error.colno}."
        return page(view, template_id, given, {}, "", wrong)
    except (ValueError, RecursionError) as error:
        return page(view, template_id, given, {}, "", f"The variables {error}.")
    return page(view, template_id, given, variables, f"?of={typed.keep(variables)}")


def page(view: View, template_id: str, given: str, variables: dict[str, Any], query: str, fault: str = "") -> Response:
    subject, text, html = "", None, None
    if not fault:
        try:
            subject, text, html = draft.preview(template_id, variables)
        except (Invalid, Broken) as error:
            fault = told(error)
    frame = f"/mail/templates/{template_id}/html{query}" if html is not None else ""
    shown: dict[str, Any] = {
        "id": template_id,
        "given": given,
        "fault": fault,
        "subject": subject,
        "text": text,
        "frame": frame,
    }
    return view.render("template.html", f"Template {template_id}", **shown)


def frame(view: View, template_id: str) -> Response:
    """Answers with the HTML alone, of the variables that were typed, or of the example."""
    name, headers = request.args.get("of", ""), {"Content-Security-Policy": MAIL_CSP, "X-Frame-Options": "SAMEORIGIN"}
    try:
        variables = typed.kept.get(name) if name else example_of(known(template_id))
        html = draft.preview(template_id, variables)[2] if variables is not None else None
    except (Invalid, Broken) as error:
        return Response(told(error), 422, mimetype="text/plain", headers=headers)
    if html is None:
        return Response("This preview is no longer kept. Show it again.", 404, mimetype="text/plain", headers=headers)
    return Response(framed(html), mimetype="text/html", headers=headers)


def known(template_id: str) -> str:
    return template_id if template_id in templates.ids() else abort(404)


def told(error: Invalid | Broken) -> str:
    if isinstance(error, Broken):
        return str(error)
    return "; ".join(f"{one.field} {one.message}" for one in error.errors)


def written(variables: object) -> str:
    return json.dumps(variables, indent=2, ensure_ascii=False)


def example_of(template_id: str) -> dict[str, Any]:
    """Returns an example of each variable, in the form in which the template uses it. Raises `Broken`."""
    defaults, tree = templates.variables(template_id), dict[str, Any]()
    for path in sorted(templates.paths(template_id)):
        at = tree
        for part in re.findall(r"\[\]|[^.\[\]]+", path):
            at = at.setdefault(part, {})
    return {name: defaults[name] or value(name, tree.get(name, {})) for name in defaults}


def value(name: str, parts: dict[str, Any]) -> Any:
    if "[]" in parts:
        return [value(name.removesuffix("s"), parts["[]"])] * 2
    if parts:
        return {part: value(part, below) for part, below in parts.items()}
    return next((example for looks, example in EXAMPLES if re.search(looks, name, re.IGNORECASE)), OTHERWISE)
