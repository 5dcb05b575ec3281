"""The routes, and what each answers.

A request is checked whole before anything is stored: key, size, JSON, fields. What passes is stored and queued in one
atomic step and answered with 202 and an id; sending is the workers' affair. Every answer but /metrics is JSON, also to
what is not found, not allowed, too large or broken, and also where Waitress refuses before the app is asked.
No address, subject, body or key is logged. docs/api.md describes the routes.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import re
import time
import uuid
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

from bottle import Bottle, HTTPResponse, request
from pydantic import Field, ValidationError

from mail import counters, sweep
from mail.address import Mailbox
from mail.draft import Draft, Expired, prepare
from mail.outbox import Outbox
from mail.request import FieldError, HeaderText, Invalid, Recipient, Strict, field_errors
from queues import health
from queues.jobs import JOBS, Accepted, Idempotency, Jobs, NotFound
from queues.offer import Task
from settings import ApiKey, Settings
from web.body import SMALL_BODY, Room, checked, read_json
from web.errors import Refusal, answer, as_refusal, current_request_id, error_shape, refused, unrouted
from web.middleware import Edge

VERSION = re.search(r"^## (\S+)", (Path(__file__).parent.parent / "CHANGELOG.md").read_text(), re.MULTILINE)[1]  # type: ignore[index]
MOST_IN_BATCH = 100  # mails
MAIL_ID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")  # mail:last_sent, mail:<id>:claim are no mails


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


class StartJob(Strict):
    """The body of the home-grown services that this one replaces."""

    name: Annotated[HeaderText, Field(min_length=1, max_length=200)]
    email: Recipient


class JobRequest(Strict):
    task: str
    args: dict[str, Any] = Field(default_factory=dict)


class Service:
    """The handlers. Each returns its answer, or raises what `as_refusal` knows."""

    def __init__(self, settings: Settings, jobs: Jobs, offered: Mapping[str, Task]) -> None:
        self.settings = settings
        self.offered = offered
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
        except Expired:
            before = self.jobs.recall(idempotency) if idempotency else None
            if before:  # a repeat of a request that came in time: what was answered then is still the answer
                return before
            raise
        return self.outbox.accept([draft], idempotency)

    def _draft(self, body: Any) -> Draft:
        return prepare(body, default_sender=self.sender, max_recipients=self.settings.max_recipients)

    def get_email(self, caller: ApiKey, mail_id: str) -> HTTPResponse:
        if not MAIL_ID.fullmatch(mail_id):
            raise NotFound
        return answer(200, self.outbox.read(mail_id))

    def post_job(self, caller: ApiKey) -> HTTPResponse:
        body = read_json(SMALL_BODY)
        asked: JobRequest = checked(JobRequest, body)
        task = self.offered.get(asked.task)
        if not task:
            raise Invalid(FieldError("task", f"there is no such task; there are: {', '.join(sorted(self.offered))}"))
        try:
            task.arguments.model_validate_json(json.dumps(asked.args))
        except ValidationError as error:
            raise Invalid(*field_errors(error, "args")) from None
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
        state = health.state(self.jobs)
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
        seen["relay_in_trouble"] = self.outbox.relay_in_trouble()
        seen |= sweep.swept(self.outbox)._asdict()
        if reasons:
            return answer(503, seen | error_shape(503, "not_ready", "; ".join(reasons), current_request_id()))
        return answer(200, seen)

    def metrics(self) -> HTTPResponse:
        """For Prometheus, in its own format; 200 also while Redis is away, which is then one of the metrics."""
        from web import metrics

        return HTTPResponse(metrics.exposition(self.outbox, VERSION), 200, {"Content-Type": metrics.CONTENT_TYPE})


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


def make_app(settings: Settings, jobs: Jobs, offered: Mapping[str, Task]) -> Edge:
    service, app = Service(settings, jobs, offered), Bottle()
    app.config["catchall"] = False  # Bottle would print the exception, which may quote a request; Edge does not
    app.default_error_handler = unrouted
    for method, path, handler, scope in ROUTES:
        app.route(path, method, guarded(service, handler, scope))
    return Edge(app, counters.Gathered(jobs.redis, counters.ACCEPT))


def guarded(service: Service, handler: Callable[..., HTTPResponse], scope: str | None) -> Callable[..., HTTPResponse]:
    def call(**ids: str) -> HTTPResponse:
        try:
            if scope is None:
                return handler(service)
            caller = authenticate(service.settings.api_keys, scope)
            request.environ["async_email.key"] = caller.name
            with service.room.taken(min(request.content_length, service.settings.max_message_bytes)):
                return handler(service, caller, **ids)
        except Exception as error:
            refusal = as_refusal(error)
        return refused(refusal)

    return call
