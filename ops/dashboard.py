"""Our pages at /mail/ and rq-dashboard at /rq/, behind a login, under Waitress: `python -m ops.dashboard [--no-login]`.

Nobody sees or repeats mail without the password, no other web site can press its buttons, looking changes nothing in
Redis, nothing from Redis is un-pickled or becomes markup, and every page answers a plain 503 when Redis is away. All
this is missing in rq-dashboard 0.9.0: we patch its templates as they are loaded, its views as they are registered, and
refuse to start if a release no longer fits.

Refuses to run without a password, except on loopback with `--no-login`; then it answers to loopback names only, since
any web page can point a name of its own at 127.0.0.1 (web/hosts.py).
Standards: Fetch Metadata and Content Security Policy 3 (W3C); login.py has the login's.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import re
import secrets
import signal
import sys
import zlib
from collections.abc import Callable, Collection
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import rq_dashboard.web as upstream
from flask import Flask, Response, abort, g, jsonify, redirect, request
from jinja2 import Environment, FileSystemLoader
from redis import Redis
from redis.client import Pipeline
from redis.exceptions import RedisError
from rq import Queue, Worker
from rq.exceptions import DeserializationError, NoSuchJobError
from rq.job import Job
from rq.registry import FailedJobRegistry
from rq.serializers import JSONSerializer
from waitress import create_server

from ops import watch
from ops.login import Login
from ops.page.app import pages
from ops.page.audit import note
from ops.page.view import asker
from process import sd_daemon
from process.log import emit, say_why_not, set_up, where
from process.memory import use_one_arena
from process.sockets import listen_on
from process.values import is_loopback
from queues.connection import Unavailable, address, connect, is_wrong_type, why_unavailable
from queues.jobs import Jobs, NotFound, NotPossible
from queues.quarantine import DAMAGED, StrictJob
from queues.table import EMAIL, QUEUES
from settings import Settings, SettingsError, load
from web.hosts import ALLOWED, add_flag, is_local, is_same_origin

PACKAGE = Path(upstream.__file__).parent  # rq_dashboard, as it is installed
READING = {"GET", "HEAD", "OPTIONS"}
REGISTRIES = ("queued", "started", "finished", "failed", "deferred", "scheduled", "canceled")
UNREADABLE = "(cannot be read)"
CSP = (
    "default-src 'none'; script-src 'self' 'nonce-{nonce}' 'unsafe-eval'; "  # eval: Underscore compiles its templates
    "style-src 'self' 'unsafe-inline'; img-src 'self' data:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
STYLE = Path(__file__).with_name("dashboard_style.css").read_text()
MAX_BODY = 64 * 1024  # bytes; the buttons send none at all


# A template of rq-dashboard 0.9.0, text of it, what comes in its place, and how often it must be there. Underscore
# writes <%= x %> as it is and <%- x %> escaped. Two lines of jobs.html escape their value already.
PATCHES = (
    ("rq_dashboard/job.html", "<%=", "<%-", 13),
    ("rq_dashboard/jobs.html", "<%= $('<div/>').text(d.description).html() %>", "<%- d.description %>", 1),
    ("rq_dashboard/jobs.html", "<%= $('<div/>').text(d.exc_info).html() %>", "<%- d.exc_info %>", 1),
    ("rq_dashboard/jobs.html", "<%=", "<%-", 12),
    ("rq_dashboard/queues.html", "<%=", "<%-", 15),
    ("rq_dashboard/workers.html", "<%=", "<%-", 9),
    # It is in a string of the page's script and comes from the page's URL: a link could put its own script there.
    ("rq_dashboard/scripts/jobs.js", "'{{ queue.name }}'", "{{ queue.name|tojson }}", 1),
    ("rq_dashboard/scripts/jobs.js", "queue_name = 'default'", f"queue_name = '{EMAIL}'", 4),
    ("rq_dashboard/jobs.html", "contains all the queued jobs on", "contains the {{ registry_name }} jobs on", 1),
    ("rq_dashboard/base.html", "</head>", f"<style>{STYLE}</style></head>", 1),
    ("rq_dashboard/base.html", '<script type="text/javascript">', '<script nonce="{{ nonce() }}">', 1),
)


class PatchedTemplates(FileSystemLoader):
    """Loads rq-dashboard's templates, patched. Raises RuntimeError if the package's text has changed."""

    def get_source(self, environment: Environment, template: str) -> tuple[str, str, Callable[[], bool]]:
        source, path, is_current = super().get_source(environment, template)
        for patched, old, new, times in PATCHES:
            if patched == template:
                if source.count(old) != times:
                    raise RuntimeError(f"rq-dashboard's {template} no longer holds {old} {times} times")
                source = source.replace(old, new)
        if "<%=" in source:
            raise RuntimeError(f"rq-dashboard's {template} prints something unescaped")
        return source, path, is_current


class JsonOrNothing:
    """A serializer for RQ. Never un-pickles, since that lets anybody who can write to Redis run code here."""

    dumps = JSONSerializer.dumps

    @staticmethod
    def loads(data: bytes) -> Any:
        """Returns what a browser can read, too: no NaN and no Infinity."""
        try:
            return json.loads(data, parse_constant=str, parse_float=lambda text: finite(float(text)))
        except (ValueError, RecursionError):
            return "(not JSON)"


def finite(number: float) -> float:
    if not math.isfinite(number):
        raise ValueError
    return number


def readable(read: Callable[[], Any], otherwise: Any) -> Any:
    """Returns what can be read, or something else if it is damaged: it is one of many on a page."""
    try:
        return read()
    except (*DAMAGED, DeserializationError, NoSuchJobError, zlib.error, RedisError) as error:
        if isinstance(error, RedisError) and not is_wrong_type(error):
            raise
        return otherwise


class ShownJob(StrictJob):
    def __init__(self, id: str | None = None, connection: Redis | None = None, serializer: Any = None) -> None:
        super().__init__(id, connection, JsonOrNothing)

    def latest_result(self, timeout: int = 0) -> Any:
        return readable(partial(super().latest_result, timeout), None)

    def get_call_string(self) -> Any:
        return readable(super().get_call_string, UNREADABLE)


class ShownWorker(Worker):
    @classmethod
    def all(cls, connection: Redis | None = None, *_: Any, **__: Any) -> list[Any]:
        return super().all(connection, job_class=ShownJob, serializer=JsonOrNothing)

    @classmethod
    def find_by_key(cls, worker_key: str, connection: Redis, *args: Any, **kwargs: Any) -> Any:
        shown = cls([], worker_key, connection=connection, prepare_for_work=False)
        shown._state = UNREADABLE
        return readable(lambda: super(ShownWorker, cls).find_by_key(worker_key, connection, *args, **kwargs), shown)

    def refresh(self) -> None:
        super().refresh()  # type: ignore[no-untyped-call]
        finite(self.total_working_time)

    def get_current_job(self) -> Any:
        return readable(super().get_current_job, None)


class ShownQueue(Queue):
    """RQ's, but one without a name is that of the e-mails, and ours are there before their first job."""

    job_class = ShownJob

    def __init__(self, name: str = EMAIL, *args: Any, **kwargs: Any) -> None:
        super().__init__(name, *args, **kwargs)

    @classmethod
    def all(cls, connection: Redis, *args: Any, **kwargs: Any) -> list[Queue]:
        prefix = cls.redis_queue_namespace_prefix
        found: Any = connection.smembers(cls.redis_queues_keys)
        names = {key.decode().removeprefix(prefix) for key in found if key.startswith(prefix.encode())}
        return sorted(cls(name, connection) for name in names - {""} | {*QUEUES})


upstream.config.serializer = JsonOrNothing
upstream.Queue = ShownQueue
upstream.Job = ShownJob
upstream.Worker = ShownWorker
upstream.RedisConnectionError = ()  # rq-dashboard answers it with 200; uncaught, it reaches our 503
# It opens a Redis client for every request, also without a login; `Dashboard.redis_conn` replaces it.
upstream.blueprint.before_request_funcs[None].remove(upstream.push_rq_connection)


def is_text(name: object) -> bool:
    return not isinstance(name, bytes) or readable(name.decode, None) is not None


class ReadOnly:
    """Makes a Redis client read-only: RQ cleans up while it lists, and looking must not change anything. Leaves out
    names and ids that are no text, which RQ fails at."""

    MEMBERS = frozenset({"LRANGE", "SMEMBERS", "ZRANGE"})
    COMMANDS = frozenset({"EXISTS", "HGET", "HGETALL", "LLEN", "LRANGE", "SMEMBERS", "XREVRANGE", "ZCARD", "ZRANGE"})
    CLEANING = frozenset({"LREM", "SREM"})  # of ids without a job; the workers' maintenance does it too

    def execute_command(self, *args: Any, **options: Any) -> Any:
        if args[0] in self.COMMANDS:
            answer = super().execute_command(*args, **options)  # type: ignore[misc]
            if args[0] in self.MEMBERS and isinstance(answer, (list, set)):  # not a pipeline's promise
                return type(answer)(one for one in answer if is_text(one))
            return answer
        if args[0] in self.CLEANING:
            return 0
        raise PermissionError(f"a page that only reads must not send {args[0]} to Redis")


class ReadOnlyPipeline(ReadOnly, Pipeline):
    pass


class ReadOnlyRedis(ReadOnly, Redis):
    def pipeline(self, transaction: bool = True, shard_hint: Any = None) -> Pipeline:
        return ReadOnlyPipeline(self.connection_pool, self.response_callbacks, transaction, shard_hint)


class Dashboard(Flask):
    def __init__(self, settings: Settings, by_login: bool) -> None:
        super().__init__("dashboard", static_folder=PACKAGE / "static", static_url_path="/rq/static")
        self.jinja_loader = PatchedTemplates(PACKAGE / "templates")
        self.by_login = by_login
        self.writer = connect(settings.redis)
        self.jobs = Jobs(self.writer, settings.redis_replicas)
        self.reader = ReadOnlyRedis(connection_pool=connect(settings.redis).connection_pool)
        # Only a label on the page. The URL itself may hold a password.
        self.config["RQ_DASHBOARD_REDIS_URL"] = [address(self.writer)]
        # Its buttons would delete a mail's job and leave the mail waiting forever; DELETE /jobs/{id} cancels both.
        self.config["RQ_DASHBOARD_DISABLE_DELETE"] = True

    @property
    def redis_conn(self) -> Redis:
        """Returns the client of the blueprint's views."""
        return self.reader if request.method in READING else self.writer

    def note(self, what: str, id: str) -> None:
        """Notes that who asks has pressed a button of rq-dashboard."""
        note(self.writer, asker(self.by_login), what, id)

    def log_exception(self, exc_info: Any) -> None:
        """Logs where it was raised and not its text, which may quote a job."""
        emit("crashed", logging.ERROR, where=where(exc_info[1]))


def make_app(settings: Settings, login: bool, names: Collection[str] = ()) -> Dashboard:
    """Returns the WSGI application. Raises RuntimeError if the installed rq-dashboard is not the one that we patch."""
    app = Dashboard(settings, login)
    app.before_request(Login(settings).demand if login else partial(refuse_foreign_names, names))
    app.before_request(refuse_other_origins)
    app.before_request(refuse_other_pages)
    app.after_request(add_headers)
    app.context_processor(lambda: {"nonce": nonce})
    app.register_error_handler(RedisError, explain_redis)
    app.register_error_handler(Unavailable, partial(plain, 503))
    app.register_error_handler(NotPossible, partial(plain, 409))
    for gone in (NotFound, NoSuchJobError):
        app.register_error_handler(gone, lambda _: plain(404, "There is no such job."))
    app.register_blueprint(upstream.blueprint, url_prefix="/rq")
    app.register_blueprint(pages(app.writer, settings, login))
    app.add_url_rule("/", view_func=lambda: redirect("/mail/"), endpoint="home")
    replace_views(app)
    for template in {*app.jinja_env.list_templates(), *(patched for patched, *_ in PATCHES)}:
        app.jinja_env.get_template(template)
    return app


def refuse_foreign_names(names: Collection[str]) -> Response | None:
    return None if is_local(request.headers.get("Host", ""), names) else plain(421, f"Without a login {ALLOWED}.")


def refuse_other_origins() -> Response | None:
    if request.method in READING or is_same_origin(request.headers.get):
        return None
    return plain(403, "A request that changes something must come from one of the dashboard's own pages.")


def refuse_other_pages() -> Response | None:
    """Answers 404 for any Redis but number 0, the only one, and bounds a page; rq-dashboard answers 500, or tries."""
    asked = request.view_args or {}
    if asked.get("instance_number") or asked.get("registry_name", "queued") not in REGISTRIES:
        abort(404)
    for name, most in (("per_page", 1000), ("page", 10**9)):
        if not re.fullmatch("[0-9]{1,10}", str(asked.get(name, 1))) or not 1 <= int(asked.get(name, 1)) <= most:
            return plain(400, f"{name} must be a number from 1 to {most}")
    return None


def nonce() -> str:
    """Returns this request's nonce. The page's one inline script has it, so that no injected script can run."""
    value: str = g.setdefault("nonce", secrets.token_urlsafe(16))
    return value


def add_headers(response: Response) -> Response:
    response.headers.setdefault("Content-Security-Policy", CSP.format(nonce=nonce()))
    response.headers.setdefault("X-Frame-Options", "DENY")
    response.headers["X-Content-Type-Options"] = "nosniff"
    response.headers["Referrer-Policy"] = "same-origin"
    if request.endpoint not in ("static", "rq_dashboard.static", "rq_dashboard.favicon", "page.file"):
        response.headers["Cache-Control"] = "no-store"
    return response


def plain(status: int, reason: object) -> Response:
    return Response(f"{reason}\n", status, mimetype="text/plain")


def explain_redis(error: RedisError) -> Response:
    """Answers 503 if Redis is unavailable, or holds what nobody can show. Raises any other error again; Flask logs it
    and answers 500."""
    if reason := why_unavailable(error):
        return plain(503, reason)
    if is_wrong_type(error):
        emit("crashed", logging.ERROR, where=where(error))
        return plain(503, "Redis holds something else at one of RQ's keys")
    raise error


def replace_views(app: Dashboard) -> None:
    """Replaces the views that lose jobs or stop half-way, and allows GET only for views that read."""
    for view in (requeue_job_view, requeue_all, compact_queue):
        endpoint = f"rq_dashboard.{view.__name__}"
        if endpoint not in app.view_functions:
            raise RuntimeError(f"rq-dashboard no longer has a view {view.__name__}")
        app.view_functions[endpoint] = partial(view, app)
    for rule in app.url_map.iter_rules():
        if rule.methods and rule.methods - READING:
            rule.methods -= {"GET", "HEAD"}


def requeue_job_view(app: Dashboard, job_id: str) -> Response:
    app.jobs.requeue(job_id)
    app.note("requeue", job_id)
    return jsonify(status="OK")


def requeue_all(app: Dashboard, queue_name: str) -> Response:
    """Queues every failed job again, except those that cannot be: gone, not ours, or already taken by a worker."""
    requeued = 0
    for job_id in FailedJobRegistry(queue_name, connection=app.reader).get_job_ids(cleanup=False):
        with suppress(NotFound, NotPossible):
            app.jobs.requeue(job_id)
            requeued += 1
    if requeued:
        app.note("requeue_all", queue_name)
    return jsonify(status="OK", count=requeued)


def compact_queue(app: Dashboard, queue_name: str) -> Response:
    """Removes ids without a job. rq-dashboard renames the live queue for it, and a crash half-way would lose that."""
    queue = Queue(queue_name, connection=app.writer, serializer=JsonOrNothing)
    for job_id in Queue(queue_name, connection=app.reader).get_job_ids():
        if not Job.exists(job_id, app.reader):
            queue.remove(job_id)
    app.note("compact", queue_name)
    return jsonify(status="OK")


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m ops.dashboard", description="the pages at /mail/ and rq-dashboard at /rq/"
    )
    parser.add_argument("--no-login", action="store_true", help="ask for no password; on loopback only")
    add_flag(parser)
    given = parser.parse_args()
    login = not given.no_login
    try:
        settings = load("dashboard_password") if login else load()
        at = settings.dashboard_listen
        if not login and not is_loopback(at.host):
            raise SettingsError([f"DASHBOARD_LISTEN: {at} is not loopback; --no-login is for loopback only"])
        sockets = listen_on(at)
    except SettingsError as error:
        say_why_not(error)
        return 2
    except OSError as error:
        say_why_not(f"DASHBOARD_LISTEN: cannot listen on {at}: {error.strerror}")
        return 2
    use_one_arena()
    app = make_app(settings, login, given.allow_host)
    server = create_server(app, sockets=sockets, threads=4, ident=None, max_request_body_size=MAX_BODY)
    set_up(settings.log_level, settings.log_format)
    logging.getLogger("waitress.queue").setLevel(logging.ERROR)  # it warns whenever a browser asks for six files
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    emit("dashboard_started", listen=at)
    watch.Watch(settings).start()
    sd_daemon.tell("READY=1")
    server.run()  # until SIGTERM or Ctrl-C, on which Waitress finishes
    return 0


if __name__ == "__main__":
    sys.exit(main())
