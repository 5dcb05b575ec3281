"""The API's own description: `GET /openapi.json`, for people and for generators of clients.

Needs no key, since it holds nothing of this installation.
"""

from __future__ import annotations

from bottle import HTTPResponse

from web.handlers import Service


def openapi(service: Service) -> HTTPResponse:
    from web import openapi  # it takes half a second and some memory, once, of each process that is asked

    return HTTPResponse(openapi.as_json(service.routes), 200, {"Content-Type": "application/json"})
