"""What each route answers.

A request is checked whole before anything is stored: size, JSON, fields. What passes is stored and queued in one
atomic step and answered with an id; the workers send it later. No address, subject, body or key is logged.
docs/api.md describes the routes.
"""

from __future__ import annotations

import json
import re
import time
import uuid
from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Annotated, Any

from bottle import HTTPResponse, request
from pydantic import Field, ValidationError

from mail import attachments, sweep
from mail.address import Mailbox
from mail.draft import prepare, redirected
from mail.due import Expired
from mail.message import Draft
from mail.outbox import Outbox
from mail.request import FieldError, HeaderText, Invalid, OneMailbox, StrictModel, field_errors, validate
from mail.states import SCHEDULED, State
from process.version import VERSION
from queues import health
from queues.connection import weaknesses
from queues.jobs import Accepted, Call, Idempotency, Jobs
from queues.limits import Limits
from queues.offer import Task
from settings import Settings
from web import context
from web.access import hold_to_its_domains, hold_to_relays, hold_to_the_list
from web.body import SMALL_BODY, BodyBudget, read_json
from web.context import Steps
from web.errors import bad_request, error_shape, json_response, note_refusal

MAX_BATCH = 100  # mails


def is_permissive() -> bool:
    given = str(request.environ.get("HTTP_X_BATCH_VALIDATION", "strict")).lower()
    if given not in ("strict", "permissive"):
        raise bad_request("x-batch-validation", "must be strict or permissive")
    return given == "permissive"


def idempotency(body: object) -> Idempotency | None:
    key = request.environ.get("HTTP_IDEMPOTENCY_KEY")
    if key is None:
        return None
    if not re.fullmatch(r"[ -~]{1,256}", key):
        text = "must be 1 to 256 printable ASCII characters"
        raise bad_request("Idempotency-Key", text, "invalid_idempotency_key")
    asks = context.current.get()
    caller = f"{asks.key}:test" if asks.is_test else asks.key  # a test is no answer to a repeat that is meant to send
    return Idempotency.of(caller, request.route.rule, key, body)


class StartJob(StrictModel):
    """The body of the home-grown services that this one replaces."""

    name: Annotated[HeaderText, Field(min_length=1, max_length=200)]
    email: OneMailbox


class JobRequest(StrictModel):
    task: str
    args: dict[str, Any] = Field(default_factory=dict)


class Service:
    """The handlers. Each returns its answer, or raises what `as_refusal` knows."""

    def __init__(self, settings: Settings, jobs: Jobs, offered: Mapping[str, Task], names: Collection[str]) -> None:
        self.settings = settings
        self.offered = offered
        self.names = names
        self.routes: tuple[Any, ...] = ()  # web.app's, which docs show
        self.jobs = jobs
        self.outbox = Outbox(jobs, settings)
        self.limits = Limits(jobs.redis)
        self.large_bodies = BodyBudget(settings.max_message_bytes)
        self.sender = Mailbox.parse(settings.mail_from) if settings.mail_from else None

    def start_job(self) -> Steps[HTTPResponse]:
        body = read_json(SMALL_BODY)
        asked = validate(StartJob, body)
        template = {"id": "welcome", "variables": {"name": asked.name}}
        mail = {"to": [Mailbox(asked.name, asked.email.address)], "template": template}
        return accepted((yield from self._submit(mail, idempotency(body))), 202, "job_id")

    def post_email(self) -> Steps[HTTPResponse]:
        body = read_json(self.settings.max_message_bytes)
        job = yield from self._submit(body, idempotency(body))
        later = body.get("scheduled_at") is not None
        return accepted(job, 200, "id", SCHEDULED if later else State.QUEUED)

    def post_batch(self) -> Steps[HTTPResponse]:
        """Accepts all or none; with `x-batch-validation: permissive` those that can be sent, and names the others."""
        body = read_json(self.settings.max_message_bytes)
        permissive, key = is_permissive(), idempotency(body)
        if not isinstance(body, list) or not 1 <= len(body) <= MAX_BATCH:
            raise Invalid(FieldError("body", f"must be a list of 1 to {MAX_BATCH} mails"))
        drafts, errors = self._drafts(body)
        earlier = self.jobs.recall(key) if key and errors else None
        if not permissive and not earlier:
            Invalid.raise_if(error for _, error in errors)
        job = earlier or ((yield from self._accept(drafts, key)) if drafts else Accepted((), replayed=False))
        seen: dict[str, Any] = {"data": [{"id": mail_id} for mail_id in job.ids]}
        if permissive:
            seen["errors"] = [{"index": number, "message": f"{one.field}: {one.message}"} for number, one in errors]
        return json_response(200, seen, replay(job))

    def _drafts(self, bodies: list[Any]) -> tuple[list[Draft], list[tuple[int, FieldError]]]:
        """Returns the mails that can be sent, and what is wrong with the others, by their index in the list."""
        drafts: list[Draft] = []
        errors: list[tuple[int, FieldError]] = []
        for number, body in enumerate(bodies):
            try:
                drafts.append(self._draft(body))
            except Invalid as invalid:
                errors += [(number, replace(one, field=f"[{number}].{one.field}")) for one in invalid.errors]
        return drafts, errors

    def _submit(self, body: Any, key: Idempotency | None) -> Steps[Accepted]:
        try:
            draft = self._draft(body)
        except Expired:
            earlier = self.jobs.recall(key) if key else None
            if earlier:  # a repeat of a request that came in time: what was answered then is still the answer
                return earlier
            raise
        return (yield from self._accept([draft], key))

    def _accept(self, drafts: list[Draft], key: Idempotency | None) -> Steps[Accepted]:
        acceptance = self.outbox.acceptance(drafts, key)
        return acceptance.result((yield acceptance))  # in no variable, as in web.app

    def _draft(self, body: Any) -> Draft:
        draft = prepare(
            body,
            default_sender=self.sender,
            max_recipients=self.settings.max_recipients,
            local_domains=self.settings.allow_local_domains,
        )
        asks = context.current.get()
        if asks.caller:
            hold_to_its_domains(asks.caller, draft.message.sender)
            if draft.skip_suppression:
                hold_to_the_list(asks.caller)
            if draft.relay:
                hold_to_relays(asks.caller, draft.relay, lambda: [one.name for one in self.outbox.relays()])
        message = redirected(draft.message, self.settings)
        return draft._replace(message=message, key=asks.key, test=asks.is_test)

    def get_email(self, mail_id: str) -> HTTPResponse:
        return json_response(200, self.outbox.read(mail_id, context.current.get().reads_only))

    def get_attachments(self, mail_id: str) -> HTTPResponse:
        self.outbox.hold_to(mail_id, context.current.get().reads_only)
        size = attachments.stored_size(self.jobs.redis, mail_id)
        with self.large_bodies.reserve(min(size, self.settings.max_message_bytes)):
            files = attachments.listed(self.jobs.redis, mail_id)
        return json_response(200, {"object": "list", "has_more": False, "data": files})

    def post_job(self) -> Steps[HTTPResponse]:
        body = read_json(SMALL_BODY)
        asked = validate(JobRequest, body)
        task = self.offered.get(asked.task)
        if not task:
            raise Invalid(FieldError("task", f"must be one of {', '.join(sorted(self.offered))}"))
        try:
            task.arguments.model_validate_json(json.dumps(asked.args))
        except ValidationError as error:
            raise Invalid(*field_errors(error, "args")) from None
        acceptance = self.jobs.acceptance(
            task.queue,
            f"tasks.{asked.task}",
            {str(uuid.uuid4()): Call((), asked.args)},
            task.policy(self.settings),
            idempotency=idempotency(body),
            idempotency_ttl=self.settings.idempotency_ttl,
        )
        return accepted(acceptance.result((yield acceptance)), 202, "job_id")

    def get_job(self, job_id: str) -> HTTPResponse:
        return json_response(200, self.jobs.read(job_id))

    def requeue_job(self, job_id: str) -> HTTPResponse:
        self._keeper(job_id).requeue(job_id)
        context.current.get().id = job_id
        return json_response(202, {"job_id": job_id, "status": State.QUEUED})

    def delete_job(self, job_id: str) -> HTTPResponse:
        self._keeper(job_id).cancel(job_id)
        context.current.get().id = job_id
        return json_response(200, {"job_id": job_id, "status": State.CANCELED})

    def _keeper(self, job_id: str) -> Outbox | Jobs:
        return self.outbox if self.outbox.exists(job_id) else self.jobs

    def home(self) -> HTTPResponse:
        """Says to a browser what this is."""
        shown = {"name": "async-email", "version": VERSION, "docs": "/docs", "openapi": "/openapi.json"}
        return json_response(200, shown)

    def healthz(self) -> HTTPResponse:
        return json_response(200, {"status": "ok", "version": VERSION})

    def readyz(self) -> HTTPResponse:
        """Says whether what is accepted now is safe; 503 with the reasons if not."""
        state, last_sent = health.state(self.jobs), self.outbox.last_sent()
        info = state.pop("info")
        reasons, replicas = [sentence for _, sentence in weaknesses(info)], health.replicas(self.jobs, info)
        if replicas:
            state["replication"] = replicas.shown
            reasons += [replicas.trouble] if replicas.trouble else []
        seen = {"status": "not ready" if reasons else "ready", "reasons": reasons, **state}
        seen["last_sent_seconds_ago"] = round(max(0.0, time.time() - last_sent), 3) if last_sent else None
        seen["relay_in_trouble"] = self.outbox.relay_in_trouble()
        seen |= sweep.swept(self.jobs.redis)
        if reasons:
            request_id = context.current.get().request_id
            note_refusal("not_ready", "", 503, reasons[0])
            return json_response(503, seen | error_shape(503, "not_ready", "; ".join(reasons), request_id))
        return json_response(200, seen)

    def metrics(self) -> HTTPResponse:
        """Answers 200 also while Redis is away, which is then one of the metrics."""
        from web import metrics  # its library takes two megabytes of each process that is asked

        return HTTPResponse(metrics.exposition(self.outbox, VERSION), 200, {"Content-Type": metrics.CONTENT_TYPE})


def accepted(job: Accepted, status: int, name: str, state: str = State.QUEUED) -> HTTPResponse:
    context.current.get().id = job.id
    return json_response(status, {name: job.id, "status": state}, replay(job))


def replay(job: Accepted) -> dict[str, str]:
    return {"Idempotent-Replayed": "true"} if job.replayed else {}
