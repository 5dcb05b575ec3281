"""The process that HTTP comes into: routes, API keys, one error shape. `python service.py`

A request is checked whole before anything is stored: key, size, JSON, fields. What passes is stored and queued in one
atomic step and answered with 202 and an id; sending is the workers' affair. Every answer but /metrics is JSON, also to
what is not found, not allowed, too large or broken, and also where Waitress refuses before we are asked:

    {"statusCode": 422, "name": "invalid_parameter", "message": "...",
     "errors": [{"field": "to[0]", "message": "..."}], "request_id": "..."}

No address, subject, body or key is logged. docs/api.md describes the routes; the names of errors are Resend's.
"""

from __future__ import annotations

import ctypes
import hashlib
import hmac
import json
import logging
import math
import re
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, NoReturn

from bottle import Bottle, HTTPError, HTTPResponse, request, response
from pydantic import Field, ValidationError

import prefork
import tasks
from events import emit, set_up, where
from jobs import JOBS, Accepted, Idempotency, IdempotencyConflict, Jobs, NotFound, NotPossible, Unavailable, connect
from mail import message, pacing, sweep, templates, totals
from mail.message import FieldError, HeaderText, Invalid, Mailbox, Recipient, Strict
from mail.outbox import Draft, Outbox
from server import Server, common_headers, error_shape, listen_on
from settings import ApiKey, Settings, SettingsError, load
from supervisor import on_stop

VERSION = re.search(r"^## (\S+)", (Path(__file__).parent / "CHANGELOG.md").read_text(), re.MULTILINE)[1]  # type: ignore[index]
SMALL_BODY = 64 * 1024  # bytes; for everything but POST /emails
LARGE = 2**20  # bytes; a body beyond that takes some of the room for large ones
DEEPEST = 32  # levels of JSON; templates' variables need a few, an attack needs thousands
MOST_VALUES = 10_000  # in one body, names counted; checking a million addresses would keep every other caller waiting
MOST_IN_BATCH = 100  # mails
M_MMAP_THRESHOLD = -3  # mallopt(3)
RETRY_AFTER = "5"  # seconds
MAIL_ID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")  # mail:last_sent, mail:<id>:claim are no mails


class Refusal(Exception):
    """An answer that is not the one hoped for."""

    def __init__(self, status: int, name: str, text: str, errors: Iterable[FieldError] = (), **headers: str) -> None:
        super().__init__(name)
        self.status, self.name, self.text, self.errors = status, name, text, tuple(errors)
        self.headers = {key.replace("_", "-"): value for key, value in headers.items()}


def current_request_id() -> str:
    return str(request.environ["async_email.request_id"])


def as_refusal(error: Exception) -> Refusal:
    """What the rest of the house raises, in HTTP's words. Raises what it does not know."""
    match error:
        case Refusal():
            return error
        case Invalid():
            first = error.errors[0]
            return Refusal(422, error_name(first), f"{first.field}: {first.message}", error.errors)
        case IdempotencyConflict():
            text = "this Idempotency-Key was used for another request; take a new key for a new mail"
            return Refusal(409, "invalid_idempotent_request", text)
        case NotFound():
            return Refusal(404, "not_found", str(error) or "there is nothing of this id, or it is no longer kept")
        case NotPossible():
            return Refusal(409, "not_possible", str(error))
        case Unavailable():
            text = (
                f"{error}; send this again in {RETRY_AFTER} seconds (an Idempotency-Key keeps it from counting twice)"
            )
            return Refusal(503, "service_unavailable", text, Retry_After=RETRY_AFTER)
    raise error


def error_name(error: FieldError) -> str:
    if error.missing:
        return "missing_required_field"
    root = re.split(r"[.\[]", error.field)[0]
    return {"attachments": "invalid_attachment", "from": "invalid_from_address"}.get(root, "invalid_parameter")


# --- reading a request ------------------------------------------------------------------------------------------------


def authenticate(keys: tuple[ApiKey, ...], scope: str) -> ApiKey:
    """The caller's key. All keys are compared, each in constant time."""
    scheme, _, secret = request.environ.get("HTTP_AUTHORIZATION", "").partition(" ")
    if scheme.lower() != "bearer" or not secret:
        text = "send your API key: Authorization: Bearer <key>"
        raise Refusal(401, "missing_api_key", text, WWW_Authenticate="Bearer")
    digest = hashlib.sha256(secret.strip(" ").encode("latin-1")).hexdigest()  # WSGI's way to hand over bytes
    found = [key for key in keys if hmac.compare_digest(key.sha256, digest)]
    if not found:
        raise Refusal(403, "invalid_api_key", "this API key is not known here")
    if scope == "full" and found[0].scope != "full":
        raise Refusal(401, "restricted_api_key", "this API key may only submit mail")
    return found[0]


def read_json(limit: int) -> Any:
    """The body as strict JSON: UTF-8, no duplicate or non-finite anything, no lone surrogates, bounded in both ways."""
    media_type = request.environ.get("CONTENT_TYPE", "").partition(";")[0].strip().lower()
    if media_type != "application/json":
        raise Refusal(415, "unsupported_media_type", "send the body as Content-Type: application/json")
    if (request.content_length or 0) > limit:
        raise Refusal(413, "request_too_large", f"the body is larger than {limit} bytes, which is the most taken here")
    try:
        text = request.environ["wsgi.input"].read(max(request.content_length, 0)).decode()
        body = json.loads(text, object_pairs_hook=without_duplicates, parse_constant=no_constant)
        check_values(body)
    except RecursionError:
        raise bad_json("it is nested too deeply") from None
    except UnicodeDecodeError:
        raise bad_json("it is not UTF-8") from None
    except json.JSONDecodeError as error:
        raise bad_json(f"it is not JSON: {error.msg} at line {error.lineno}, column {error.colno}") from None
    except ValueError:
        raise bad_json("it holds an integer of too many digits") from None
    return body


def bad_json(text: str, field: str = "body") -> Refusal:
    return Refusal(400, "validation_error", f"{field}: {text}", [FieldError(field, text)])


def without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    members = dict(pairs)
    if len(members) < len(pairs):
        raise bad_json("an object in it names a member twice")
    return members


def no_constant(name: str) -> NoReturn:
    raise bad_json(f"{name} is not JSON")


def check_values(body: Any) -> None:
    for number, (value, path) in enumerate(walk(body, ())):
        if len(path) > DEEPEST:
            raise bad_json("it is nested too deeply", spelled(path[:1]))
        if number > MOST_VALUES:
            raise bad_json(f"it holds more than {MOST_VALUES} values")
        if isinstance(value, float) and not math.isfinite(value):
            raise bad_json("it holds a number that is too large", spelled(path))
        if isinstance(value, str) and not is_unicode(value):
            raise bad_json("it holds half of a surrogate pair, which is not a character", spelled(path))


def walk(value: Any, path: tuple[str | int, ...]) -> Iterator[tuple[Any, tuple[str | int, ...]]]:
    """Every value in `value` and every name of a member, each with the way to it."""
    yield value, path
    if isinstance(value, dict):
        for name, member in value.items():
            yield name, (*path, name)
            yield from walk(member, (*path, name))
    elif isinstance(value, list):
        for number, member in enumerate(value):
            yield from walk(member, (*path, number))


def spelled(path: tuple[str | int, ...]) -> str:
    text = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path)
    return text.lstrip(".").encode("ascii", "replace").decode() or "body"


def is_unicode(text: str) -> bool:
    if text.isascii():
        return True
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def is_permissive() -> bool:
    given = str(request.environ.get("HTTP_X_BATCH_VALIDATION", "strict")).lower()
    if given not in ("strict", "permissive"):
        text = "write strict or permissive"
        raise Refusal(400, "validation_error", f"x-batch-validation: {text}", [FieldError("x-batch-validation", text)])
    return given == "permissive"


def idempotency(caller: ApiKey, body: object) -> Idempotency | None:
    key = request.environ.get("HTTP_IDEMPOTENCY_KEY")
    if key is None:
        return None
    if not re.fullmatch(r"[ -~]{1,256}", key):
        text = "write 1 to 256 printable ASCII characters"
        raise Refusal(400, "invalid_idempotency_key", text, [FieldError("Idempotency-Key", text)])
    return Idempotency.of(caller.name, request.route.rule, key, body)


# --- the routes -------------------------------------------------------------------------------------------------------


class Late(Invalid):
    """The mail would be right but for the time: its `expires_at` has passed."""


class StartJob(Strict):
    """The body of the home-grown services that this one replaces."""

    name: Annotated[HeaderText, Field(min_length=1, max_length=200)]
    email: Recipient


class JobRequest(Strict):
    task: str
    args: dict[str, Any] = Field(default_factory=dict)


def checked(model: type[Strict], body: Any) -> Any:
    if not isinstance(body, dict):
        raise Invalid(FieldError("body", "write a JSON object"))
    try:
        return model.model_validate(body)
    except ValidationError as error:
        raise Invalid(*message.field_errors(error)) from None


class Service:
    """The handlers. Each returns its answer, or raises what `as_refusal` knows."""

    def __init__(self, settings: Settings, jobs: Jobs) -> None:
        self.settings = settings
        self.jobs = jobs
        self.outbox = Outbox(jobs, settings)
        self.room = Room(settings.max_message_bytes)
        self.sender = Mailbox.parse(settings.mail_from) if settings.mail_from else None

    def start_job(self, caller: ApiKey) -> HTTPResponse:
        body = read_json(SMALL_BODY)
        asked: StartJob = checked(StartJob, body)
        mail = {
            "to": [Mailbox(asked.name, asked.email.address)],
            "template": {"id": "welcome", "variables": {"name": asked.name}},
        }
        return accepted(self._submit(mail, idempotency(caller, body)), "job_id")

    def post_email(self, caller: ApiKey) -> HTTPResponse:
        body = read_json(self.settings.max_message_bytes)
        return accepted(self._submit(body, idempotency(caller, body)), "id")

    def post_batch(self, caller: ApiKey) -> HTTPResponse:
        """All or none; with `x-batch-validation: permissive` those that can be sent, and an error for each other."""
        body = read_json(self.settings.max_message_bytes)
        permissive, same = is_permissive(), idempotency(caller, body)
        if not isinstance(body, list) or not 1 <= len(body) <= MOST_IN_BATCH:
            raise Invalid(FieldError("body", f"write a list of 1 to {MOST_IN_BATCH} mails"))
        drafts, errors = self._drafts(body)
        before = self.jobs.recall(same) if same and errors else None
        if errors and not permissive and not before:
            raise Invalid(*(error for _, error in errors))
        job = before or (self.outbox.accept(drafts, same) if drafts else Accepted((), replayed=False))
        seen: dict[str, Any] = {"data": [{"id": mail_id} for mail_id in job.ids]}
        if permissive:
            seen["errors"] = [{"index": number, "message": f"{one.field}: {one.message}"} for number, one in errors]
        return answer(202, seen, **replay(job))

    def _drafts(self, bodies: list[Any]) -> tuple[list[Draft], list[tuple[int, FieldError]]]:
        """The mails that can be sent, and what is wrong with the others, by their place in the list."""
        drafts: list[Draft] = []
        errors: list[tuple[int, FieldError]] = []
        for number, body in enumerate(bodies):
            try:
                drafts.append(self._draft(body))
            except Invalid as invalid:
                errors += [(number, replace(one, field=f"[{number}].{one.field}")) for one in invalid.errors]
        return drafts, errors

    def _submit(self, body: Any, idempotency: Idempotency | None) -> Accepted:
        try:
            draft = self._draft(body)
        except Late:
            before = self.jobs.recall(idempotency) if idempotency else None
            if before:  # a repeat of a request that came in time: what was answered then is still the answer
                return before
            raise
        return self.outbox.accept([draft], idempotency)

    def _draft(self, body: Any) -> Draft:
        """Raises `Invalid`; `Late` where nothing but the time is wrong."""
        asked = message.parse(body, default_sender=self.sender, max_recipients=self.settings.max_recipients)
        rendered = templates.render(asked.template.id, asked.template.variables) if asked.template else None
        mail = message.compose(asked, rendered)
        if asked.expires_at and asked.expires_at.timestamp() <= time.time():
            raise Late(FieldError("expires_at", "this moment has passed; the mail would never be sent"))
        return Draft(mail, asked.expires_at, asked.on_doubt)

    def get_email(self, caller: ApiKey, mail_id: str) -> HTTPResponse:
        if not MAIL_ID.fullmatch(mail_id):
            raise NotFound
        return answer(200, self.outbox.read(mail_id))

    def post_job(self, caller: ApiKey) -> HTTPResponse:
        body = read_json(SMALL_BODY)
        asked: JobRequest = checked(JobRequest, body)
        task = tasks.OFFERED.get(asked.task)
        if not task:
            raise Invalid(FieldError("task", f"there is no such task; there are: {', '.join(sorted(tasks.OFFERED))}"))
        try:
            task.arguments.model_validate_json(json.dumps(asked.args))
        except ValidationError as error:
            raise Invalid(*message.field_errors(error, "args")) from None
        job = self.jobs.accept(
            JOBS,
            f"tasks.{asked.task}",
            str(uuid.uuid4()),
            kwargs=asked.args,
            timeout=task.timeout,
            retry_in=task.retry_in,
            result_ttl=self.settings.retain_sent,
            failure_ttl=self.settings.retain_failed,
            idempotency=idempotency(caller, body),
            idempotency_ttl=self.settings.idempotency_ttl,
        )
        return accepted(job, "job_id")

    def get_job(self, caller: ApiKey, job_id: str) -> HTTPResponse:
        return answer(200, self.jobs.read(job_id))

    def requeue_job(self, caller: ApiKey, job_id: str) -> HTTPResponse:
        (self.outbox if self._is_mail(job_id) else self.jobs).requeue(job_id)
        request.environ["async_email.id"] = job_id
        return answer(202, {"job_id": job_id, "status": "queued"})

    def delete_job(self, caller: ApiKey, job_id: str) -> HTTPResponse:
        (self.outbox if self._is_mail(job_id) else self.jobs).cancel(job_id)
        request.environ["async_email.id"] = job_id
        return answer(200, {"job_id": job_id, "status": "canceled"})

    def _is_mail(self, job_id: str) -> bool:
        return bool(MAIL_ID.fullmatch(job_id)) and self.outbox.exists(job_id)

    def healthz(self) -> HTTPResponse:
        return answer(200, {"status": "ok", "version": VERSION})

    def readyz(self) -> HTTPResponse:
        """Whether a 202 of ours means what it says. 503 with the reasons if not."""
        state = self.jobs.state()
        info, last_sent = state.pop("info"), self.outbox.last_sent()
        reasons = []
        if not info.get("aof_enabled"):
            reasons.append("Redis keeps no append-only file, so a crash loses accepted mail: CONFIG SET appendonly yes")
        if info.get("aof_last_write_status", "ok") != "ok":
            reasons.append("Redis cannot write its append-only file; see its log and the disk")
        if info.get("maxmemory", 0) and info.get("maxmemory_policy") != "noeviction":
            reasons.append(
                "Redis evicts what it was given when memory is short: CONFIG SET maxmemory-policy noeviction"
            )
        if 0 < info.get("maxmemory", 0) <= info.get("used_memory", 0):
            reasons.append("Redis is out of memory: raise maxmemory, or let the workers drain the queue")
        if info.get("rdb_last_bgsave_status", "ok") != "ok":
            reasons.append("Redis cannot write its snapshot and may refuse writes; see its log and the disk")
        if info.get("role") not in ("master", None):
            reasons.append("Redis is a replica and takes no writes")
        seen = {"status": "not ready" if reasons else "ready", "reasons": reasons, **state}
        seen["last_sent_seconds_ago"] = round(max(0.0, time.time() - last_sent), 3) if last_sent else None
        seen["relay_in_trouble"] = pacing.in_trouble(self.jobs.redis)
        seen |= sweep.swept(self.outbox)._asdict()
        if reasons:
            return answer(503, seen | error_shape(503, "not_ready", "; ".join(reasons), current_request_id()))
        return answer(200, seen)

    def metrics(self) -> HTTPResponse:
        """For Prometheus, in its own format; 200 also while Redis is away, which is then one of the metrics."""
        from ops import metrics  # two megabytes in each process, and many are never asked

        return HTTPResponse(metrics.exposition(self.jobs, VERSION), 200, {"Content-Type": metrics.CONTENT_TYPE})


def answer(status: int, body: dict[str, Any], **headers: str) -> HTTPResponse:
    return HTTPResponse(json.dumps(body), status, {"Content-Type": "application/json", **headers})


def accepted(job: Accepted, name: str) -> HTTPResponse:
    request.environ["async_email.id"] = job.id
    return answer(202, {name: job.id, "status": "queued"}, **replay(job))


def replay(job: Accepted) -> dict[str, str]:
    return {"Idempotent-Replayed": "true"} if job.replayed else {}


ROUTES = (  # method, path, handler, scope that the key needs
    ("POST", "/start-job", Service.start_job, "send"),
    ("POST", "/emails", Service.post_email, "send"),
    ("POST", "/emails/batch", Service.post_batch, "send"),
    ("GET", "/emails/<mail_id>", Service.get_email, "full"),
    ("POST", "/jobs", Service.post_job, "full"),
    ("GET", "/jobs/<job_id>", Service.get_job, "full"),
    ("POST", "/jobs/<job_id>/requeue", Service.requeue_job, "full"),
    ("DELETE", "/jobs/<job_id>", Service.delete_job, "full"),
    ("GET", "/healthz", Service.healthz, None),
    ("GET", "/readyz", Service.readyz, None),
    ("GET", "/metrics", Service.metrics, None),
)


def make_app(settings: Settings, jobs: Jobs) -> Edge:
    service, app = Service(settings, jobs), Bottle()
    app.config["catchall"] = False  # Bottle would print the exception, which may quote a request; Edge does not
    app.default_error_handler = unrouted
    for method, path, handler, scope in ROUTES:
        app.route(path, method, guarded(service, handler, scope))
    return Edge(app, totals.Gathered(jobs.redis, totals.ACCEPT))


def guarded(service: Service, handler: Callable[..., HTTPResponse], scope: str | None) -> Callable[..., HTTPResponse]:
    def call(**ids: str) -> HTTPResponse:
        try:
            if scope is None:
                return handler(service)
            caller = authenticate(service.settings.api_keys, scope)
            request.environ["async_email.key"] = caller.name
            with service.room.taken(min(request.content_length, service.settings.max_message_bytes)):
                return handler(service, caller, **ids)
        except Exception as error:  # in no variable of ours: it would hold itself, and the body, by its traceback
            return refused(as_refusal(error))

    return call


class Room:
    """Until a body is read it lies in a file; then it takes some times its size in memory. A hundred large ones at once
    would take the machine down, so each process reads so many as are together no larger than one may be, and the others
    come again."""

    def __init__(self, octets: int) -> None:
        self.left = octets
        self.lock = threading.Lock()

    @contextmanager
    def taken(self, octets: int) -> Iterator[None]:
        octets = octets if octets > LARGE else 0
        with self.lock:
            if octets > self.left:
                text = f"too many large requests at once; send this again in {RETRY_AFTER} seconds"
                raise Refusal(503, "service_unavailable", text, Retry_After=RETRY_AFTER)
            self.left -= octets
        try:
            yield
        finally:
            with self.lock:
                self.left += octets


def refused(refusal: Refusal) -> HTTPResponse:
    shape = error_shape(refusal.status, refusal.name, refusal.text, current_request_id(), refusal.errors)
    return answer(refusal.status, shape, **refusal.headers)


def unrouted(error: HTTPError) -> bytes:
    """Bottle's own refusals: no such path, or not with this method."""
    response.content_type = "application/json"
    name, text = "not_found", "there is no such path"
    if error.status_code == 405:
        name, text = "method_not_allowed", f"this path takes {error.headers['Allow']}"
    return json.dumps(error_shape(error.status_code, name, text, current_request_id())).encode()


class Edge:
    """What is the same for every request: its id, common headers, one log line, no traceback to the caller."""

    def __init__(self, app: Bottle, accepting: totals.Gathered) -> None:
        self.app = app
        self.accepting = accepting
        self.answered = 0  # requests; a lost increment does not matter

    def __call__(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        started = time.perf_counter()
        given = environ.get("HTTP_X_REQUEST_ID", "")
        request_id = given if re.fullmatch(r"[A-Za-z0-9._-]{1,64}", given) else uuid.uuid4().hex
        environ["async_email.request_id"] = request_id

        def start(status: str, headers: list[tuple[str, str]], exc_info: Any = None) -> Any:
            self.answered += 1
            seconds = time.perf_counter() - started
            if status.startswith("202"):
                self.accepting.add(seconds)
            self._log(environ, status, seconds)
            return start_response(status, headers + common_headers(request_id), exc_info)

        try:
            return self.app(environ, start)  # type: ignore[no-any-return]
        except Exception as error:
            emit("crashed", logging.ERROR, request_id=request_id, where=where(error))
            start("500 Internal Server Error", [("Content-Type", "application/json")])
            text = "this is our fault; the log has its request_id"
            return [json.dumps(error_shape(500, "application_error", text, request_id)).encode()]

    def _log(self, environ: dict[str, Any], status: str, seconds: float) -> None:
        route = environ.get("bottle.route")  # the rule, never the path: a path holds what a caller wrote
        quiet = environ["REQUEST_METHOD"] in ("GET", "HEAD") and status < "400"
        emit(
            "request",
            logging.DEBUG if quiet else logging.INFO,
            method=environ["REQUEST_METHOD"] if route else "?",
            route=route.rule if route else "?",
            status=status[:3],
            ms=seconds * 1000,
            key=environ.get("async_email.key"),
            id=environ.get("async_email.id"),
            request_id=environ["async_email.request_id"],
        )


# --- the process ------------------------------------------------------------------------------------------------------


def give_memory_back() -> None:
    """Makes glibc's malloc keep to its threshold for large blocks, which go back to the system when they are freed. By
    itself it raises the threshold after each, and keeps what eight threads have once needed."""
    with suppress(OSError, AttributeError):  # another C library
        ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 256 * 1024)


def main() -> int:
    try:
        settings = load("api_keys", "mail_from")
        check_sender(settings)
        app = make_app(settings, Jobs(connect(settings.redis_url.get_secret_value())))
        sockets = listen_on(settings.listen)
    except SettingsError as error:
        print(error, file=sys.stderr)
        return 2
    except OSError as error:
        print(f"LISTEN: cannot listen on {settings.listen}: {error.strerror}", file=sys.stderr)
        return 2
    set_up(settings.log_level, settings.log_format)
    give_memory_back()

    def serve(alive: Callable[[], None]) -> None:
        server = Server(app, settings.max_message_bytes, sockets)
        on_stop(server.stop)
        with app.accepting.handed_over():
            server.run(alive)

    emit("api_started", listen=settings.listen, processes=settings.api_processes, version=VERSION)
    prefork.run(settings.api_processes, serve)
    return 0


def check_sender(settings: Settings) -> None:
    try:
        Mailbox.parse(settings.mail_from)
    except ValueError as error:
        raise SettingsError([f"MAIL_FROM: {error}"]) from None


if __name__ == "__main__":
    sys.exit(main())
