"""The API's own description: `GET /openapi.json` for programs, and `GET /docs`, a page to read and to try it on.

Needs no key, since it holds nothing of this installation; a key that somebody types into the page stays in it. The page
is drawn by Swagger UI (Apache 2.0). Its files are those of the package flask-swagger-ui, so that they are pinned and
updated as every other dependency, and come from here: the page works without a network. Flask itself is not used.
Standard: Content Security Policy 3 (W3C). https://swagger.io/tools/swagger-ui/
"""

from __future__ import annotations

from importlib.metadata import distribution
from pathlib import Path

from bottle import HTTPResponse, static_file

from queues.jobs import NotFound
from web.handlers import Service

OURS = Path(__file__).parent / "static"
FILES = {"docs.js": "text/javascript", "swagger-ui-bundle.js": "text/javascript", "swagger-ui.css": "text/css"}
CSP = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


def openapi(service: Service) -> HTTPResponse:
    from web import openapi  # it takes four megabytes of each process that is asked

    return HTTPResponse(openapi.as_json(service.routes), 200, {"Content-Type": "application/json"})


def page(service: Service) -> HTTPResponse:
    return static_file("docs.html", OURS, "text/html", headers={"Content-Security-Policy": CSP})


def file(service: Service, name: str) -> HTTPResponse:
    """Sends a file of the page, which a browser may keep for a day."""
    if name not in FILES:
        raise NotFound("no such file")
    theirs = distribution("flask-swagger-ui").locate_file("flask_swagger_ui/dist")
    root = OURS if (OURS / name).is_file() else Path(str(theirs))
    return static_file(name, root, FILES[name], headers={"Cache-Control": "max-age=86400"})
