"""What the routes answer, as types: web/openapi.py describes them to people and to generators of clients.

The handlers do not use them; tests/test_openapi.py holds each answer to its type, to the last member.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field
from typing_extensions import NotRequired, TypedDict

from mail.states import State, Status

Time = Annotated[str, Field(json_schema_extra={"format": "date-time"})]
LastEvent = Literal[
    "queued",
    "scheduled",
    "delivery_delayed",
    "sent",
    "failed",
    "suppressed",
    "canceled",
    "bounced",
    "complained",
]
Waiting = Literal["queued", "deferred", "scheduled", "rate_limited"]
JobStatus = Waiting | Literal["started", "finished", "failed", "stopped", "canceled"]
From = TypedDict("From", {"from": str})
NoFrom = TypedDict("NoFrom", {"from": None})


class Queued(TypedDict):
    id: str
    status: Literal["queued", "scheduled"]


class Job(TypedDict):
    job_id: str
    status: Literal["queued", "canceled"]


class Id(TypedDict):
    id: str


class BatchFault(TypedDict):
    index: int
    message: str


class Batch(TypedDict):
    """`errors` is there with `x-batch-validation: permissive`."""

    data: list[Id]
    errors: NotRequired[list[BatchFault]]


class NameAndValue(TypedDict):
    name: str
    value: str


class Recipient(TypedDict):
    address: str
    status: Status
    code: int | None
    text: str


class Attempt(TypedDict):
    """What an earlier version, or one that ended with its worker, did not write is not there."""

    at: Time
    relay: NotRequired[str]
    relay_name: NotRequired[str]
    moved: NotRequired[bool]
    phase: NotRequired[str]
    code: NotRequired[int | None]
    text: str
    verdict: str
    worker: NotRequired[str]
    began: NotRequired[Time]
    dot_ms: NotRequired[int | None]
    took_ms: NotRequired[int]
    tls: NotRequired[str]
    bytes: NotRequired[int]
    to: NotRequired[str]


class ListedMail(From):
    id: str
    status: State | Literal["scheduled"]
    last_event: LastEvent
    to: list[str]
    cc: list[str]
    bcc: list[str]
    reply_to: list[str]
    subject: str
    scheduled_at: Time | None
    tags: list[NameAndValue]
    message_id: str
    created_at: Time
    key: str | None
    test: bool
    priority: Literal["high", "normal", "bulk"]
    relay: str | None
    next_attempt_at: Time | None
    expires_at: Time | None
    on_doubt: Literal["retry", "hold"]
    reason: str | None


class Mail(ListedMail):
    object: Literal["email"]
    html: None
    text: None
    recipients: list[Recipient]
    attempts: list[Attempt]


class Changed(TypedDict):
    object: Literal["email"]
    id: str


class StoredFile(TypedDict):
    id: str
    filename: str
    size: int
    content_type: str
    content_disposition: Literal["inline", "attachment"]
    content_id: str | None
    download_url: None
    expires_at: None


class JobState(TypedDict):
    job_id: str
    task: str
    status: JobStatus
    created_at: Time | None
    enqueued_at: Time | None
    started_at: Time | None
    ended_at: Time | None
    result: NotRequired[Any]
    error: NotRequired[str]


class Report(TypedDict):
    object: Literal["report"]
    kind: Literal["bounce", "complaint"] | None
    matched: bool
    email_id: str | None
    noted: int
    reason: str


class TemplateEntry(TypedDict):
    id: str
    name: str
    alias: str
    status: Literal["published"]
    created_at: Time
    updated_at: Time
    published_at: Time


class Variable(TypedDict):
    key: str
    type: Literal["string", "number"]
    fallback_value: str | float | bool | None


class Template(TemplateEntry, NoFrom):
    object: Literal["template"]
    reply_to: None
    subject: str
    html: str | None
    text: str | None
    variables: list[Variable]


class Previewed(TypedDict):
    subject: str
    text: str | None
    html: str | None


class Capabilities(TypedDict):
    sending: Literal["enabled"]


class Domain(TypedDict):
    id: str
    name: str
    created_at: Time
    status: Literal["verified"]
    region: str
    capabilities: Capabilities


class ApiKeyName(TypedDict):
    id: str
    name: str
    created_at: Time
    last_used_at: None


class SuppressionId(TypedDict):
    object: Literal["suppression"]
    id: str


class Suppression(SuppressionId):
    """`email` is empty where only a digest of it is kept."""

    email: str
    origin: Literal["bounce", "complaint", "manual"]
    source_id: str | None
    created_at: Time
    reason: str | None


class Unsuppressed(SuppressionId):
    deleted: Literal[True]


class SuppressionIds(TypedDict):
    data: list[SuppressionId]


class UnsuppressedIds(TypedDict):
    data: list[Unsuppressed]


class Page(TypedDict):
    object: Literal["list"]
    has_more: bool


class Mails(Page):
    data: list[ListedMail]


class Files(Page):
    data: list[StoredFile]


class Suppressions(Page):
    data: list[Suppression]


class Templates(Page):
    data: list[TemplateEntry]


class Domains(Page):
    data: list[Domain]


class ApiKeys(Page):
    data: list[ApiKeyName]


class Home(TypedDict):
    name: str
    version: str
    docs: str
    openapi: str


class Health(TypedDict):
    status: Literal["ok"]
    version: str


class FieldFault(TypedDict):
    field: str
    message: str


class Error(TypedDict):
    statusCode: int
    name: str
    type: str
    message: str
    errors: NotRequired[list[FieldFault]]
    request_id: str


class Replication(TypedDict):
    role: Literal["primary", "replica"]
    needed: int
    in_step: int
    known: int
    sentinels: int
    of_sentinels: int
    confirms: bool


class Figures(TypedDict):
    reasons: list[str]
    queued: int
    workers: int
    oldest_queued_seconds: float | None
    overdue_seconds: float
    last_sent_seconds_ago: float | None
    relay_in_trouble: bool
    last_sweep_seconds_ago: float | None
    mails_repaired: int
    mails_given_up: int
    replication: NotRequired[Replication]


class Ready(Figures):
    status: Literal["ready"]


class NotReady(Figures, Error):
    status: Literal["not ready"]
