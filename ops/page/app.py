"""The routes of the pages at /mail/.

They are a Flask blueprint of the dashboard, whose login, check of origin and answers while Redis is away they share.
Reading a page changes nothing; what changes something is a POST, from a form of ours. No file comes from elsewhere, no
script or style is within a page, and nothing is cached but our two files, whose URL changes with their content.
Standards: Content Security Policy 3 (W3C), RFC 9110.
"""

from __future__ import annotations

from functools import lru_cache, partial
from pathlib import Path
from types import ModuleType

from flask import Blueprint, Response, abort

from ops.page import actions, activity, email, failures, overview, scheduled, suppressions, system, webhooks
from ops.page.view import FILES, HERE, View
from queues.connection import Redis
from queues.jobs import NotFound, NotPossible
from settings import Settings

CSP = (
    "default-src 'none'; style-src 'self'; script-src 'self'; img-src 'self' data:; connect-src 'self'; "
    "frame-src 'self'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
)
ROUTES = (
    ("GET", "/", overview.show),
    ("GET", "/activity", activity.show),
    ("GET", "/search", activity.begin),
    ("POST", "/search", activity.search),
    ("GET", "/scheduled", scheduled.show),
    ("GET", "/failures", failures.show),
    ("GET", "/failures/mails", failures.ask_mails),
    ("POST", "/failures/mails", failures.requeue_mails),
    ("GET", "/failures/jobs", failures.ask_jobs),
    ("POST", "/failures/jobs", failures.requeue_jobs),
    ("GET", "/system", system.show),
    ("GET", "/system/<act>", system.ask),
    ("POST", "/system/<act>", system.do),
    ("GET", "/emails/<mail_id>", email.show),
    ("GET", "/emails/<mail_id>/<action>", email.ask),
    ("POST", "/emails/<mail_id>/<action>", email.act),
    ("GET", "/suppressions", suppressions.show),
    ("POST", "/suppressions", suppressions.act),
    ("GET", "/suppressions/<entry_id>", suppressions.ask),
    ("POST", "/suppressions/<entry_id>", suppressions.remove),
    ("GET", "/actions", actions.show),
    ("GET", "/webhooks", webhooks.show),
    ("POST", "/webhooks/<name>/<act>", webhooks.act),
)
TEMPLATES = (
    ("GET", "/templates", "show"),
    ("GET", "/templates/<template_id>", "one"),
    ("POST", "/templates/<template_id>", "preview"),
    ("GET", "/templates/<template_id>/html", "frame"),
)


def pages(redis: Redis, settings: Settings, by_login: bool) -> Blueprint:
    """Returns the blueprint. `by_login`: who asks has logged in, with a name."""
    blueprint, view = Blueprint("page", __name__, url_prefix="/mail"), View(redis, settings, by_login)
    for method, path, name in TEMPLATES:
        blueprint.add_url_rule(path, f"templates_{name}", partial(show_templates, name, view), methods=[method])
    for method, path, handler in ROUTES:
        endpoint = f"{handler.__module__.rpartition('.')[2]}_{handler.__name__}"
        blueprint.add_url_rule(path, endpoint, partial(handler, view), methods=[method])
    blueprint.add_url_rule("/<name>", "file", file)
    blueprint.register_error_handler(NotFound, partial(email.gone, view))
    blueprint.register_error_handler(NotPossible, partial(email.refuse, view))
    blueprint.after_request(add_headers)
    return blueprint


@lru_cache(maxsize=1)
def template_pages(folder: Path | None) -> ModuleType:
    """Loads ops.page.templates, for the first who asks: all that makes a mail comes with it, which takes 2 MB."""
    from mail.templates import read_again_when_changed, use
    from ops.page import templates

    if folder:
        use(folder)
    read_again_when_changed()
    return templates


def show_templates(name: str, view: View, **given: str) -> Response:
    answer: Response = getattr(template_pages(view.settings.templates_dir), name)(view, **given)
    return answer


def file(name: str) -> Response:
    """Answers with our style or script."""
    if name not in FILES:
        abort(404)
    return Response((HERE / name).read_bytes(), mimetype=FILES[name], headers={"Cache-Control": "max-age=31536000"})


def add_headers(response: Response) -> Response:
    """Adds what these pages have in place of the dashboard's own."""
    response.headers.setdefault("Content-Security-Policy", CSP)
    return response
