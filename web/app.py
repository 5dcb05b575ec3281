"""The routes, and what is around each: authentication, the budget for large bodies, the one error shape.

Every answer but /docs and /metrics is JSON, also to what is not found, not allowed, too large or broken, and also where
Waitress refuses before the app is asked.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Generator, Mapping
from functools import partial

from bottle import Bottle, HTTPResponse, request

from mail import counters, templates
from queues.acceptance import replies
from queues.jobs import Jobs
from queues.offer import Task
from settings import DEV_KEY, Settings, SettingsError
from web import catalog, context, docs, inbound, mails, suppressions
from web.access import authenticate, hold_to_its_rate
from web.context import Steps
from web.errors import Refusal, as_refusal, error_response, routing_error
from web.handlers import Service
from web.hosts import ALLOWED, is_local
from web.middleware import Middleware

ROUTES = (  # method, path, handler, scope that the key needs
    ("POST", "/start-job", Service.start_job, "send"),
    ("POST", "/emails", Service.post_email, "send"),
    ("POST", "/emails/batch", Service.post_batch, "send"),
    ("GET", "/emails", mails.list_mails, "send"),
    ("GET", "/emails/<mail_id>", Service.get_email, "send"),
    ("PATCH", "/emails/<mail_id>", mails.move_mail, "send"),
    ("POST", "/emails/<mail_id>/cancel", mails.cancel_mail, "send"),
    ("GET", "/emails/<mail_id>/attachments", Service.get_attachments, "send"),
    ("GET", "/suppressions", suppressions.list_suppressions, "full"),
    ("POST", "/suppressions", suppressions.add_suppression, "full"),
    ("POST", "/suppressions/batch/add", suppressions.add_suppressions, "full"),
    ("POST", "/suppressions/batch/remove", suppressions.remove_suppressions, "full"),
    ("GET", "/suppressions/<id_or_email:path>", suppressions.get_suppression, "full"),
    ("DELETE", "/suppressions/<id_or_email:path>", suppressions.remove_suppression, "full"),
    ("POST", "/jobs", Service.post_job, "full"),
    ("GET", "/jobs/<job_id>", Service.get_job, "full"),
    ("POST", "/jobs/<job_id>/requeue", Service.requeue_job, "full"),
    ("DELETE", "/jobs/<job_id>", Service.delete_job, "full"),
    ("POST", "/inbound/dsn", inbound.take_report, "full"),
    ("GET", "/templates", catalog.list_templates, "full"),
    ("GET", "/templates/<template_id>", catalog.get_template, "full"),
    ("POST", "/templates/<template_id>/preview", catalog.preview_template, "full"),
    ("GET", "/domains", catalog.list_domains, "full"),
    ("GET", "/api-keys", catalog.list_api_keys, "full"),
    ("GET", "/", Service.home, None),
    ("GET", "/openapi.json", docs.openapi, None),
    ("GET", "/docs", docs.page, None),
    ("GET", "/docs/<name>", docs.file, None),
    ("GET", "/healthz", Service.healthz, None),
    ("GET", "/readyz", Service.readyz, None),
    ("GET", "/metrics", Service.metrics, None),
)


def make_app(settings: Settings, jobs: Jobs, offered: Mapping[str, Task], names: Collection[str] = ()) -> Middleware:
    """Returns the application. Raises `SettingsError` if it could not use one of the templates. With the key `dev`, it
    answers only to loopback names and to `names`."""
    if faults := templates.faults():
        raise SettingsError(faults)
    service, app = Service(settings, jobs, offered, names), Bottle()
    service.routes = ROUTES
    app.config["catchall"] = False  # Bottle would print the exception, which may quote a request; Middleware does not
    app.default_error_handler = routing_error
    for method, path, handler, scope in ROUTES:
        app.route(path, method, guarded(service, handler, scope))
    return Middleware(app, counters.Gathered(jobs.redis, counters.ACCEPT), partial(replies, jobs.replication))


Handler = Callable[..., HTTPResponse | Steps[HTTPResponse]]


def guarded(service: Service, handler: Handler, scope: str | None) -> Callable[..., HTTPResponse]:
    """Puts authentication, the budget for large bodies and the error shape around a handler."""

    def steps(ids: Mapping[str, str]) -> Steps[HTTPResponse]:
        try:
            if request.environ["PATH_INFO"].encode() != request.environ["bottle.raw_path"].encode("latin-1"):
                raise Refusal(404, "not_found", "no such path")  # Bottle leaves out what is not UTF-8
            if service.settings.knows_dev_key and not is_local(request.environ.get("HTTP_HOST", ""), service.names):
                raise Refusal(421, "misdirected_request", f"with the key {DEV_KEY}, {ALLOWED}")
            if scope is None:
                return (yield from followed(handler(service, **ids)))
            key = authenticate(service.settings.api_keys, scope)
            context.current.get().caller = key
            hold_to_its_rate(key, service.limits)
            with service.large_bodies.reserve(min(request.content_length, service.settings.max_message_bytes)):
                return (yield from followed(handler(service, **ids)))
        except Exception as error:  # in no variable of ours: it would hold itself, and the body, by its traceback
            return error_response(as_refusal(error))

    def call(**ids: str) -> HTTPResponse:
        begun = steps(ids)
        try:
            context.current.get().waiting = begun, next(begun)
        except StopIteration as done:
            answer: HTTPResponse = done.value
            return answer
        return HTTPResponse()  # nobody gets it: Middleware.commit has the answer

    return call


def followed(answer: HTTPResponse | Steps[HTTPResponse]) -> Steps[HTTPResponse]:
    return (yield from answer) if isinstance(answer, Generator) else answer
