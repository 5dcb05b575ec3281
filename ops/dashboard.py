"""rq-dashboard behind a login, under Waitress: `python -m ops.dashboard [--no-login]`, pages under /rq/.

It promises that nobody sees or repeats mail without the password, that no other web site can press its buttons, that
looking changes nothing in Redis, that nothing from Redis is un-pickled or becomes markup, and that a page says so with
a plain 503 when Redis is away. Those are our mends of rq-dashboard 0.9.0, which does none of this: its templates are
corrected as they are loaded, its views as they are registered, and a release that no longer fits is refused at start.

Refuses to run without a password, except on loopback with `--no-login`; then it answers to loopback names only, since
any web page can point a name of its own at 127.0.0.1 (DNS rebinding).
Standards: HTTP Basic (RFC 7617), Fetch Metadata and Content Security Policy 3 (W3C).
"""

from __future__ import annotations

import argparse
import hmac
import json
import logging
import re
import secrets
import signal
import sys
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import rq_dashboard.web as upstream
import waitress
from flask import Flask, Response, abort, g, jsonify, redirect, request, url_for
from jinja2 import Environment, FileSystemLoader
from redis import Redis
from redis.client import Pipeline
from redis.exceptions import RedisError
from rq import Queue, Worker
from rq.exceptions import NoSuchJobError
from rq.job import Job
from rq.registry import FailedJobRegistry
from rq.serializers import JSONSerializer

from process import sd_daemon
from process.log import emit, set_up, where
from queues.connection import Unavailable, connect, unavailable
from queues.jobs import Jobs, NotFound, NotPossible
from settings import Address, Settings, SettingsError, is_loopback, load

PACKAGE = Path(upstream.__file__).parent  # rq_dashboard, as it is installed
READING = {"GET", "HEAD", "OPTIONS"}
CSP = (
    "default-src 'none'; script-src 'self' 'nonce-{nonce}' 'unsafe-eval'; "  # eval: Underscore compiles its templates
    "style-src 'self' 'unsafe-inline'; img-src 'self' data:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
MAX_BODY = 64 * 1024  # bytes; the buttons send none at all


class Mend(NamedTuple):
    """A text of one template of rq-dashboard 0.9.0, what to put there instead, and how often it must be there."""

    template: str
    old: str
    new: str
    times: int


# Underscore writes <%= x %> as it is and <%- x %> escaped. Two lines of jobs.html escape by themselves; once is enough.
MENDS = (
    Mend("rq_dashboard/job.html", "<%=", "<%-", 13),
    Mend("rq_dashboard/jobs.html", "<%= $('<div/>').text(d.description).html() %>", "<%- d.description %>", 1),
    Mend("rq_dashboard/jobs.html", "<%= $('<div/>').text(d.exc_info).html() %>", "<%- d.exc_info %>", 1),
    Mend("rq_dashboard/jobs.html", "<%=", "<%-", 12),
    Mend("rq_dashboard/queues.html", "<%=", "<%-", 15),
    Mend("rq_dashboard/workers.html", "<%=", "<%-", 9),
    # In a string of the page's script, and taken from the page's URL: a link could put its own script there.
    Mend("rq_dashboard/scripts/jobs.js", "'{{ queue.name }}'", "{{ queue.name|tojson }}", 1),
    Mend("rq_dashboard/base.html", '<script type="text/javascript">', '<script nonce="{{ nonce() }}">', 1),
)


class MendedTemplates(FileSystemLoader):
    """rq-dashboard's templates with every mend applied. Raises RuntimeError if the package's text is another one."""

    def get_source(self, environment: Environment, template: str) -> tuple[str, str, Callable[[], bool]]:
        source, path, is_current = super().get_source(environment, template)
        for mend in MENDS:
            if mend.template != template:
                continue
            if source.count(mend.old) != mend.times:
                raise RuntimeError(f"rq-dashboard's {template} no longer holds {mend.old} {mend.times} times")
            source = source.replace(mend.old, mend.new)
        if "<%=" in source:
            raise RuntimeError(f"rq-dashboard's {template} prints something unescaped")
        return source, path, is_current


TEMPLATES = MendedTemplates(PACKAGE / "templates")


class JsonOrNothing:
    """What RQ calls a serializer. Un-pickling would let whoever writes to Redis run code here, so we never do."""

    dumps = JSONSerializer.dumps

    @staticmethod
    def loads(data: bytes) -> Any:
        try:
            return json.loads(data)
        except ValueError:
            return "(not JSON)"


class ShownJob(Job):
    def __init__(self, id: str | None = None, connection: Redis | None = None, serializer: Any = None) -> None:
        super().__init__(id, connection, JsonOrNothing)

    def get_call_string(self) -> str | None:
        return self.description  # the arguments are not the dashboard's business, and may not be JSON


class ShownWorker(Worker):
    @classmethod
    def all(cls, connection: Redis | None = None, *_: Any, **__: Any) -> list[Any]:
        return super().all(connection, job_class=ShownJob, serializer=JsonOrNothing)


upstream.config.serializer = JsonOrNothing
upstream.Job = ShownJob
upstream.Worker = ShownWorker
upstream.RedisConnectionError = ()  # it answers 200 to this one; caught nowhere, it reaches our 503
# It opens a Redis client for every request, logged in or not; `Dashboard.redis_conn` stands for it.
upstream.blueprint.before_request_funcs[None].remove(upstream.push_rq_connection)


class ReadOnly:
    """Makes a Redis client one that cannot write: RQ tidies up while it lists, and looking must change nothing."""

    COMMANDS = frozenset({"EXISTS", "HGET", "HGETALL", "LLEN", "LRANGE", "SMEMBERS", "XREVRANGE", "ZCARD", "ZRANGE"})
    TIDYING = frozenset({"LREM", "SREM"})  # of ids that lead nowhere; the workers' maintenance does that too

    def execute_command(self, *args: Any, **options: Any) -> Any:
        if args[0] in self.COMMANDS:
            return super().execute_command(*args, **options)  # type: ignore[misc]
        if args[0] in self.TIDYING:
            return 0
        raise PermissionError(f"a page that only looks wanted to send {args[0]} to Redis")


class ReadOnlyPipeline(ReadOnly, Pipeline):
    pass


class ReadOnlyRedis(ReadOnly, Redis):
    def pipeline(self, transaction: bool = True, shard_hint: Any = None) -> Pipeline:
        return ReadOnlyPipeline(self.connection_pool, self.response_callbacks, transaction, shard_hint)


class Dashboard(Flask):
    def __init__(self, redis_url: str) -> None:
        super().__init__("dashboard", static_folder=PACKAGE / "static", static_url_path="/rq/static")
        self.jinja_loader = TEMPLATES
        self.writer = connect(redis_url)
        self.reader = ReadOnlyRedis(connection_pool=connect(redis_url).connection_pool)
        place = self.writer.connection_pool.connection_kwargs
        shown = place.get("path") or f"{place.get('host', 'localhost')}:{place.get('port', 6379)}"
        # The page's label for it. The URL itself may hold a password.
        self.config["RQ_DASHBOARD_REDIS_URL"] = [f"{shown}/{place.get('db', 0)}"]
        # Its buttons would take a mail's job and leave the mail waiting for ever; DELETE /jobs/{id} cancels both.
        self.config["RQ_DASHBOARD_DISABLE_DELETE"] = True

    @property
    def redis_conn(self) -> Redis:
        """The blueprint's views take their client from here."""
        return self.reader if request.method in READING else self.writer

    def log_exception(self, exc_info: Any) -> None:
        """Logs where, never what: the text of an exception may quote a job."""
        emit("crashed", logging.ERROR, where=where(exc_info[1]))


def make_app(settings: Settings, login: bool) -> Dashboard:
    """The WSGI application. Raises RuntimeError if the installed rq-dashboard is not the one that we mend."""
    app = Dashboard(settings.redis_url.get_secret_value())
    app.before_request(partial(demand_login, settings) if login else refuse_foreign_names)
    app.before_request(refuse_other_origins)
    app.before_request(refuse_other_instances)
    app.after_request(add_headers)
    app.context_processor(lambda: {"nonce": nonce})
    app.register_error_handler(RedisError, explain_redis)
    app.register_error_handler(Unavailable, partial(plain, 503))
    app.register_error_handler(NotPossible, partial(plain, 409))
    for gone in (NotFound, NoSuchJobError):
        app.register_error_handler(gone, lambda _: plain(404, "There is no such job here."))
    app.register_blueprint(upstream.blueprint, url_prefix="/rq")
    app.add_url_rule("/", view_func=lambda: redirect(url_for("rq_dashboard.queues_overview")), endpoint="home")
    replace_views(app)
    for template in {*TEMPLATES.list_templates(), *(mend.template for mend in MENDS)}:
        app.jinja_env.get_template(template)
    return app


def demand_login(settings: Settings) -> Response | None:
    """HTTP Basic. Both fields are always compared, in constant time, so that the answer's delay tells nothing."""
    if settings.dashboard_password is None:
        raise PermissionError("there is no password to compare with")
    given = request.authorization
    username, password = (given.username or "", given.password or "") if given else ("", "")
    right_username = hmac.compare_digest(username.encode(), settings.dashboard_username.encode())
    right_password = hmac.compare_digest(password.encode(), settings.dashboard_password.get_secret_value().encode())
    if right_username & right_password:
        return None
    challenge = {"WWW-Authenticate": 'Basic realm="dashboard", charset="UTF-8"'}
    return Response("Log in with DASHBOARD_USERNAME and DASHBOARD_PASSWORD.\n", 401, challenge, mimetype="text/plain")


def refuse_foreign_names() -> Response | None:
    name = re.sub(r":\d+$", "", request.headers.get("Host", "")).strip("[]").lower()
    if is_loopback(name):
        return None
    return plain(403, "Without a login this answers to loopback names only. Open it as http://localhost:PORT/rq/.")


def refuse_other_origins() -> Response | None:
    if request.method in READING or is_same_origin():
        return None
    return plain(403, "This changes something, so it must come from one of the dashboard's own pages.")


def is_same_origin() -> bool:
    site = request.headers.get("Sec-Fetch-Site")
    if site is not None:
        return site == "same-origin"
    # Browsers leave it out where the page came over plain http from another machine; what they always send is Origin.
    _, _, place = request.headers.get("Origin", "").partition("://")
    return bool(place) and place == request.headers.get("Host")


def refuse_other_instances() -> None:
    """We show one Redis, number 0; rq-dashboard answers 500 to any other."""
    if (request.view_args or {}).get("instance_number"):
        abort(404)


def nonce() -> str:
    """This page's one inline script carries it, so that markup slipped into the page cannot run any other."""
    value: str = g.setdefault("nonce", secrets.token_urlsafe(16))
    return value


def add_headers(response: Response) -> Response:
    response.headers["Content-Security-Policy"] = CSP.format(nonce=nonce())
    response.headers["X-Frame-Options"] = "DENY"
    response.headers["X-Content-Type-Options"] = "nosniff"
    response.headers["Referrer-Policy"] = "same-origin"
    if request.endpoint not in ("static", "rq_dashboard.static", "rq_dashboard.favicon"):
        response.headers["Cache-Control"] = "no-store"
    return response


def plain(status: int, reason: object) -> Response:
    return Response(f"{reason}\n", status, mimetype="text/plain")


def explain_redis(error: RedisError) -> Response:
    """503 for what `jobs` calls unavailable. Raises anything else again, which Flask logs and answers with 500."""
    try:
        with unavailable():
            raise error
    except Unavailable as reason:
        return plain(503, reason)


def replace_views(app: Dashboard) -> None:
    """Puts our own views where rq-dashboard's lose jobs or stop half-way, and leaves GET to views that only look."""
    for view in (requeue_job_view, requeue_all, compact_queue):
        endpoint = f"rq_dashboard.{view.__name__}"
        if endpoint not in app.view_functions:
            raise RuntimeError(f"rq-dashboard no longer has a view {view.__name__}")
        app.view_functions[endpoint] = partial(view, app.writer)
    for rule in app.url_map.iter_rules():
        if rule.methods and rule.methods - READING:
            rule.methods -= {"GET", "HEAD"}


def requeue_job_view(redis: Redis, job_id: str) -> Response:
    Jobs(redis).requeue(job_id)
    return jsonify(status="OK")


def requeue_all(redis: Redis, queue_name: str) -> Response:
    """Queues every failed job again; one that cannot be (gone, not ours, a worker was faster) stops no other."""
    jobs, requeued = Jobs(redis), 0
    for job_id in FailedJobRegistry(queue_name, connection=redis).get_job_ids(cleanup=False):
        with suppress(NotFound, NotPossible):
            jobs.requeue(job_id)
            requeued += 1
    return jsonify(status="OK", count=requeued)


def compact_queue(redis: Redis, queue_name: str) -> Response:
    """Drops ids without a job. rq-dashboard's way renames the live queue: a crash half-way would lose what is in it."""
    queue = Queue(queue_name, connection=redis, serializer=JsonOrNothing)
    for job_id in queue.get_job_ids():
        if not Job.exists(job_id, redis):
            queue.remove(job_id)
    return jsonify(status="OK")


def listen(app: Dashboard, address: Address) -> Any:
    """A Waitress server that holds its port. Raises SettingsError if it cannot have it."""
    try:
        return waitress.create_server(
            app, host=address.host, port=address.port, threads=4, ident=None, max_request_body_size=MAX_BODY
        )
    except (OSError, ValueError) as error:  # ValueError: a host name that resolves to nothing
        reason = getattr(error, "strerror", None) or "there is no such host"
        raise SettingsError([f"DASHBOARD_LISTEN: cannot listen on {address}: {reason}"]) from None


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m ops.dashboard", description="rq-dashboard under /rq/")
    parser.add_argument("--no-login", action="store_true", help="ask for no password; on loopback only")
    login = not parser.parse_args().no_login
    try:
        settings = load("dashboard_password") if login else load()
        address = settings.dashboard_listen
        if not login and not address.is_loopback:
            raise SettingsError([f"DASHBOARD_LISTEN: {address} is not loopback; --no-login is for loopback only"])
        server = listen(make_app(settings, login), address)
    except SettingsError as error:
        print(*error.faults, sep="\n", file=sys.stderr)
        return 2
    set_up(settings.log_level, settings.log_format)
    logging.getLogger("waitress.queue").setLevel(logging.ERROR)  # it warns whenever a browser asks for six files
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    emit("dashboard_started", listen=address)
    sd_daemon.tell("READY=1")
    server.run()  # until SIGTERM or Ctrl-C, which Waitress takes as the wish to finish
    return 0


if __name__ == "__main__":
    sys.exit(main())
