"""`GET /openapi.json`: the API in OpenAPI 3.1, made from what is true of it when it is first asked for.

The routes and their scopes are those of web.app, the bodies the models that validate, the answers the types of
web.answers, the words and examples those of docs/api.md. A new route needs a line in OPERATIONS, and a new validator of
a field one in FORMS; tests/test_openapi.py fails without. Nothing in it is about this installation.
Standards: OpenAPI 3.1, JSON Schema 2020-12.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache, partial
from http import HTTPStatus
from types import MappingProxyType
from typing import Annotated, Any, NamedTuple

from pydantic import Field, TypeAdapter
from pydantic.json_schema import GenerateJsonSchema

from mail import forms, request, unsubscribe
from mail.address import Mailbox, header_text
from mail.moments import time_or_delay, time_with_zone
from process.version import VERSION
from web import answers, reference
from web.catalog import PageQuery, Preview
from web.handlers import MAX_BATCH, JobRequest, StartJob
from web.mails import ListQuery, Move, cursor_or_time, whole_number
from web.suppressions import ServeAll, Suppress, SuppressAll, SuppressionQuery

Json = dict[str, Any]
Route = tuple[str, str, Callable[..., Any], str | None]
NULL: Json = {"type": "null"}
OCTETS: Json = {"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": 255}}
ONCE: Json = {
    "Idempotency-Key": {
        **{"type": "string", "pattern": "^[ -~]{1,256}$"},
        "description": "makes the request safe to repeat: it is carried out once",
    },
}
BATCH_HEADER: Json = {
    "x-batch-validation": {
        **{"enum": ["strict", "permissive"]},
        "description": "permissive: what is right is queued, though other mails are wrong",
    },
}


class Operation(NamedTuple):
    """A route: the types of its answer, its body and its query. `refused` are statuses beside the usual ones."""

    answer: Any
    status: int = 200
    body: Any = None
    query: Any = None
    headers: Mapping[str, Json] = MappingProxyType({})
    refused: tuple[int, ...] = ()
    media_type: str = "application/json"  # of its body


BatchOfMails = Annotated[list[request.Request], Field(min_length=1, max_length=MAX_BATCH)]
OPERATIONS = {
    "POST /start-job": Operation(answers.Job, 202, StartJob, headers=ONCE),
    "POST /emails": Operation(answers.Queued, 200, request.Request, headers=ONCE),
    "POST /emails/batch": Operation(answers.Batch, 200, BatchOfMails, headers=ONCE | BATCH_HEADER),
    "GET /emails": Operation(answers.Mails, query=ListQuery),
    "GET /emails/{id}": Operation(answers.Mail),
    "PATCH /emails/{id}": Operation(answers.Changed, 200, Move, refused=(409,)),
    "POST /emails/{id}/cancel": Operation(answers.Changed, refused=(409,)),
    "GET /emails/{id}/attachments": Operation(answers.Files),
    "GET /suppressions": Operation(answers.Suppressions, query=SuppressionQuery),
    "POST /suppressions": Operation(answers.SuppressionId, 201, Suppress),
    "POST /suppressions/batch/add": Operation(answers.SuppressionIds, 201, SuppressAll),
    "POST /suppressions/batch/remove": Operation(answers.UnsuppressedIds, 200, ServeAll),
    "GET /suppressions/{id}": Operation(answers.Suppression),
    "DELETE /suppressions/{id}": Operation(answers.Unsuppressed),
    "POST /jobs": Operation(answers.Job, 202, JobRequest, headers=ONCE),
    "GET /jobs/{id}": Operation(answers.JobState),
    "POST /jobs/{id}/requeue": Operation(answers.Job, 202, refused=(409,)),
    "DELETE /jobs/{id}": Operation(answers.Job, refused=(409,)),
    "POST /inbound/dsn": Operation(answers.Report, 200, bytes, refused=(409,), media_type="message/rfc822"),
    "GET /templates": Operation(answers.Templates, query=PageQuery),
    "GET /templates/{id}": Operation(answers.Template),
    "POST /templates/{id}/preview": Operation(answers.Previewed, 200, Preview),
    "GET /domains": Operation(answers.Domains, query=PageQuery),
    "GET /api-keys": Operation(answers.ApiKeys, query=PageQuery),
    "GET /": Operation(answers.Home),
    "GET /healthz": Operation(answers.Health),
    "GET /readyz": Operation(answers.Ready),
    "GET /metrics": Operation(str),
}
ALSO = {"GET /readyz": {"503": answers.NotReady}}  # an answer that is more than an error


def with_format(name: str) -> Callable[[Json], Json]:
    return lambda inner: {**inner, "format": name}


def or_one(inner: Json) -> Json:
    return {"anyOf": [inner["items"], inner]}


def header_forms(inner: Json) -> Json:
    text = inner["additionalProperties"]
    value = {"anyOf": [text, {"type": "number"}, {"type": "array", "minItems": 1, "items": text}]}
    pair = {"type": "object", "required": ["name", "value"], "additionalProperties": False}
    pairs = {"type": "array", "items": {**pair, "properties": {"name": {"type": "string"}, "value": value}}}
    names = {"propertyNames": {"pattern": "^[!-9;-~]{1,76}$"}}
    return {"anyOf": [{**inner, **names, "additionalProperties": value}, {**pairs, "maxItems": 50}]}


def file_forms(inner: Json) -> Json:
    node = {"type": "object", "required": ["type", "data"], "additionalProperties": False}
    buffer = {**node, "properties": {"type": {"const": "Buffer"}, "data": OCTETS}}
    return {"anyOf": [{**inner, "format": "byte"}, OCTETS, buffer]}


def or_pair(inner: Json) -> Json:
    word = {"type": "string", "pattern": "^[A-Za-z0-9_-]{1,256}$"}
    names = {"pattern": "^[A-Za-z0-9_-]{1,256}$", "not": {"enum": ["name", "value"]}}
    pair = {"type": "object", "minProperties": 1, "maxProperties": 1, "propertyNames": names}
    return {"anyOf": [inner, {**pair, "additionalProperties": word}]}


def same(inner: Json) -> Json:
    return inner


DELAY = "^in [1-9][0-9]? (minute|hour|day)s?$"
MAILBOX: Json = {"type": "string", "format": "mailbox", "minLength": 3, "maxLength": 998}
GENERAL = ("Keys and scopes", "Limits", "Idempotency", "Request ids")  # sections that are about every route
# A function that validates -> what it takes, of what the schema inside it takes. Formats of our own: `mailbox`, `line`
# (without a control character), `content` (with none but tab and line break), `file-name`, `media-type`.
FORMS: Mapping[Any, Callable[[Json], Json]] = {
    header_text: with_format("line"),
    request.body_text: with_format("content"),
    request.file_name: lambda inner: {**inner, "format": "file-name", "minLength": 1},
    request.media_type: lambda inner: {**inner, "format": "media-type", "minLength": 3},
    request.content_id: lambda inner: {**inner, "format": "line", "minLength": 1},
    request.one_or_list: or_one,
    time_with_zone: same,
    time_or_delay: lambda inner: {"anyOf": [inner["anyOf"][0], {"type": "string", "pattern": DELAY}]},
    unsubscribe.https_url: lambda inner: {**inner, "format": "uri", "pattern": "^https://"},
    cursor_or_time: lambda _: {"type": "string", "minLength": 1},
    whole_number: same,
    request.canonical_base64: same,
    request.header_name: same,
    request.header_fits: same,
    forms.attachment: same,  # see `completed`
    forms.headers: header_forms,
    forms.octets_or_base64: file_forms,
    forms.tag: or_pair,
    forms.empty_object: lambda inner: {"anyOf": [inner, {"type": "array", "maxItems": 0}, NULL]},
}


class Schemas(GenerateJsonSchema):
    """Describes what our validators take, and leaves out what says nothing to a reader."""

    def function_before_schema(self, schema: Any) -> Json:
        if schema["function"]["function"] == Mailbox.parse:
            return dict(MAILBOX)
        return self._taken(schema)

    def function_after_schema(self, schema: Any) -> Json:
        return self._taken(schema)

    def _taken(self, schema: Any) -> Json:
        inner, function = self.generate_inner(schema["schema"]), schema["function"]["function"]
        return inner if isinstance(function, partial) else FORMS[function](inner)  # partial: pydantic's own

    def default_schema(self, schema: Any) -> Json:
        return self.generate_inner(schema["schema"])

    def field_title_should_be_set(self, schema: Any) -> bool:
        return False


@lru_cache(maxsize=1)
def as_json(routes: tuple[Route, ...]) -> str:
    return json.dumps(document(routes), ensure_ascii=False)


def document(routes: Sequence[Route]) -> Json:
    told = reference.sections()
    schemas, by_type = described_types()
    paths: Json = {}
    for method, rule, handler, scope in routes:
        path = re.sub("<.*?>", "{id}", rule)
        if operation := OPERATIONS.get(f"{method} {path}"):
            shown = described(f"{method} {path}", operation, told[f"{method} {path}"], by_type)
            shown |= {"operationId": handler.__name__, "tags": [path.split("/")[1] if scope else "service"]}
            shown |= {"security": [{"key": [scope]}] if scope else []}
            shown["responses"] = refused(operation, path, scope) | shown["responses"]
            paths.setdefault(path, {})[method.lower()] = shown
    used = set(re.findall("components/responses/([0-9]+)", json.dumps(paths)))
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "async-email",
            "version": VERSION,
            "license": {"name": "MIT", "identifier": "MIT"},
            "description": "\n\n".join(f"## {name}\n\n{told[name].text}" for name in GENERAL),
        },
        "servers": [{"url": "/"}],
        "paths": paths,
        "components": {
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
            "schemas": completed(schemas, told),
            "responses": {status: refusal(status) for status in sorted(used)},
        },
    }


def described_types() -> tuple[Json, dict[int, Json]]:
    """Returns the schemas of bodies and answers by name, and for the id of each of these types what refers to it."""
    types: list[Any] = [answers.NotReady, answers.Error]
    types += [one for operation in OPERATIONS.values() for one in (operation.answer, operation.body) if one]
    inputs: list[Any] = [(id(one), "validation", TypeAdapter(one)) for one in types]
    refs, made = TypeAdapter.json_schemas(
        inputs, by_alias=True, ref_template="#/components/schemas/{model}", schema_generator=Schemas
    )
    return made["$defs"], {id(one): refs[id(one), "validation"] for one in types}


def described(name: str, operation: Operation, told: reference.Section, by_type: Mapping[int, Json]) -> Json:
    """Describes a route but for who may use it, and the errors."""
    responses: Json = {}
    for status, answer in {str(operation.status): operation.answer, **ALSO.get(name, {})}.items():
        content = {"schema": by_type[id(answer)], **({"example": told.answer} if told.status == status else {})}
        media_type = "text/plain" if answer is str else "application/json"
        responses[status] = {"description": HTTPStatus(int(status)).phrase, "content": {media_type: content}}
    shown = {"summary": told.summary, "description": told.text, "responses": responses}
    if operation.body:
        body = {"schema": by_type[id(operation.body)], **({"example": told.sent} if told.sent else {})}
        shown["requestBody"] = {"required": True, "content": {operation.media_type: body}}
    return shown | {"parameters": parameters(name, operation, told)}


def refused(operation: Operation, path: str, scope: str | None) -> Json:
    """Returns the errors that a route may answer with, by status."""
    statuses = {
        *(421, 431, 500),
        *((401, 403, 429, 503) if scope else ()),
        *((404,) if "{" in path else ()),
        *((400, 413, 415, 422) if operation.body else ()),
        *((422,) if operation.query else ()),
        *((400, 409) if operation.headers else ()),
        *operation.refused,
    }
    return {f"{status}": {"$ref": f"#/components/responses/{status}"} for status in sorted(statuses)}


def parameters(path: str, operation: Operation, told: reference.Section) -> list[Json]:
    query = operation.query.model_json_schema(schema_generator=Schemas)["properties"] if operation.query else {}
    wanted = [("id", "path", {"type": "string", "minLength": 1})] if "{id}" in path else []
    wanted += [(name, "header", schema) for name, schema in operation.headers.items()]
    wanted += [(name, "query", schema.get("anyOf", [schema])[0]) for name, schema in query.items()]  # and not null
    return [
        {"name": name, "in": where, "required": where == "path", "schema": schema}
        | ({"description": text} if (text := schema.get("description") or told.fields.get(name)) else {})
        for name, where, schema in wanted
    ]


def refusal(status: str) -> Json:
    """Describes an error by what docs/api.md says of its types."""
    meanings = [f"`{row[0]}`: {row[3]}" for row in reference.errors() if row[2] == status]
    shape = {"$ref": "#/components/schemas/Error"}
    return {"description": "\n\n".join(meanings), "content": {"application/json": {"schema": shape}}}


def completed(schemas: Json, told: Mapping[str, reference.Section]) -> Json:
    """Adds what mail.forms takes of a whole object, and what docs/api.md says of each field."""
    mail, file, error = schemas["Request"], schemas["Attachment"], schemas["Error"]["properties"]
    del schemas["Mailbox"]  # which is a string in every body
    mail["required"].remove("from")
    mail["anyOf"] = [{"required": ["template"]}, {"required": ["subject"]}]
    mail["properties"]["from"] = {"anyOf": [mail["properties"]["from"], {"const": ""}]}
    mail["properties"]["topic_id"] = {}
    file["properties"]["inline_content_id"] = file["properties"]["content_id"]
    file["properties"]["filename"]["anyOf"].append({"const": False})
    for model in (mail, file):
        for name in set(model["properties"]) - set(model["required"]):
            model["properties"][name] = or_null(model["properties"][name])
    error["name"]["enum"] = sorted({row[1] for row in reference.errors()})
    error["type"]["enum"] = sorted({row[0] for row in reference.errors()})
    for heading, operation in OPERATIONS.items():
        if isinstance(operation.body, type) and operation.body is not bytes:
            for field, text in told[heading].fields.items():
                describe(schemas, schemas[operation.body.__name__], field, text)
    return schemas


def or_null(schema: Json) -> Json:
    if not schema or NULL in schema.get("anyOf", ()):
        return schema
    return {**schema, "anyOf": [*schema["anyOf"], NULL]} if "anyOf" in schema else {"anyOf": [schema, NULL]}


def describe(schemas: Json, model: Json, field: str, text: str) -> None:
    outer, _, inner = field.partition("[].")
    if inner:
        model, outer = schemas[request.INSIDE[outer].__name__], inner
    model["properties"][outer] = {**model["properties"][outer], "description": text}
