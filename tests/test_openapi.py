"""The service asked as /openapi.json says, right and wrong: each answer has a status and a shape that it names."""

from __future__ import annotations

import json
import re
from collections import Counter
from copy import deepcopy
from typing import Any

import jsonschema_rs
import pytest
import redis
import schemathesis
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from schemathesis import GenerationMode, checks
from schemathesis.core.result import Ok

from tests import sample_mails as samples
from tests.http_api import MAIL, UNKNOWN_ID, fail, job_of, submitted
from tests.servers import Api
from tests.test_fuzz import SAME
from web import answers, openapi
from web.app import ROUTES

schemathesis.openapi.format("mailbox", samples.boxes().map(lambda box: box.written))
schemathesis.openapi.format("line", samples.odd_text(100))
schemathesis.openapi.format("content", samples.BODY)
schemathesis.openapi.format("file-name", samples.odd_text(100).filter(samples.is_file_name))
schemathesis.openapi.format("media-type", samples.content_types())
schemathesis.serializer("message/rfc822")(lambda _, value: value if isinstance(value, bytes) else str(value).encode())
CONFIG = schemathesis.Config.from_dict({"generation": {"with-security-parameters": False}})
DOCUMENT = openapi.document(ROUTES)
NOT_IN_IT = {"GET /openapi.json", "GET /docs", "GET /docs/{id}"}  # which show it


def tightened() -> dict[str, Any]:
    """The document with what is true of this installation alone, and answers that may have no member more."""
    schemas = deepcopy(DOCUMENT["components"]["schemas"])
    for name, one in schemas.items():
        if hasattr(answers, name) and "properties" in one:
            one["additionalProperties"] = False
    schemas["TemplateUse"]["properties"]["id"] = {"enum": ["welcome"]}
    schemas["Preview"] |= {"properties": {"variables": {"enum": [{"name": "Ada"}, {}]}}}
    schemas["JobRequest"]["properties"] = {"task": {"enum": ["why_failed"]}, "args": {"enum": [{}, {"hours": 1}]}}
    return {**DOCUMENT, "components": {**DOCUMENT["components"], "schemas": schemas}}


API = schemathesis.openapi.from_dict(tightened(), config=CONFIG)
FOUND = [found.ok() for found in API.get_all_operations() if isinstance(found, Ok)]
OPERATIONS = {one.label: one for one in FOUND}
RIGHT, WRONG = GenerationMode.POSITIVE, GenerationMode.NEGATIVE
OF_JSON = {label for label in OPERATIONS if openapi.OPERATIONS[label].body not in (None, bytes)}  # bytes: none is wrong
ASKED = [(label, how) for how in (RIGHT, WRONG) for label in OPERATIONS if how is RIGHT or label in OF_JSON]
CHECKS = [
    *(checks.not_a_server_error, checks.status_code_conformance),
    *(checks.content_type_conformance, checks.response_schema_conformance),
]


def test_it_is_served_as_it_is_asked_here_and_needs_no_key(api: Api) -> None:
    assert api.call("GET", "/openapi.json", headers={"Authorization": ""}).body == json.loads(json.dumps(DOCUMENT))


def test_it_names_every_route() -> None:
    routes = {f"{method} {re.sub('<.*?>', '{id}', path)}" for method, path, *_ in ROUTES}
    assert set(OPERATIONS) == openapi.OPERATIONS.keys() == routes - NOT_IN_IT


def admits(content: dict[str, Any], value: Any) -> bool:
    return jsonschema_rs.is_valid({**content["schema"], "components": DOCUMENT["components"]}, value)


@pytest.mark.parametrize("label", openapi.OPERATIONS)
def test_every_field_and_parameter_is_described_and_every_example_is_right(label: str) -> None:
    operation, (method, path) = openapi.OPERATIONS[label], label.split()
    shown = DOCUMENT["paths"][path][method.lower()]
    assert [one for one in shown["parameters"] if one["name"] != "id" and not one.get("description")] == []
    [answer] = shown["responses"][str(operation.status)]["content"].values()
    assert admits(answer, answer["example"]) if operation.answer is not str else "example" not in answer
    if operation.body:
        [body] = shown["requestBody"]["content"].values()
        assert admits(body, body["example"])
    if operation.body and operation.body is not bytes:
        name = operation.body.__name__ if isinstance(operation.body, type) else "Request"
        fields = DOCUMENT["components"]["schemas"][name]["properties"]
        assert [field for field, one in fields.items() if not one.get("description")] == []


def is_right(label: str, body: Any) -> bool:
    """Whether the document admits this body; of what schemathesis means to be wrong, some is right."""
    method, path = label.lower().split()
    return admits(DOCUMENT["paths"][path][method]["requestBody"]["content"]["application/json"], body)


@pytest.mark.parametrize(("label", "how"), ASKED)
def test_it_is_answered_as_described(api: Api, client: redis.Redis, label: str, how: GenerationMode) -> None:
    told: Counter[int] = Counter()
    failed = submitted(api, "/jobs")
    fail(client, job_of(client, failed))
    later = api.submit(MAIL | {"scheduled_at": "in 2 hours"})
    known = [later, submitted(api, "/emails"), submitted(api, "/jobs"), failed, UNKNOWN_ID, ""]
    if "/templates" in label:
        known = ["welcome", "welcome", UNKNOWN_ID, ""]
    if "/suppressions" in label:
        own = api.post("/suppressions", {"email": "ada@example.com"}).body["id"]
        known = [own, own, UNKNOWN_ID, ""]
    keys = ["full-key"] * 5 + ["send-key", "another"]

    # Of what is right by its form, much is refused for another reason; the examples vary with the project's constants.
    @hypothesis_settings(SAME, max_examples=20 if how is WRONG else 60)
    @given(OPERATIONS[label].as_strategy(how), st.sampled_from(known), st.sampled_from(keys))
    def check(case: schemathesis.Case[Any], known_id: str, key: str) -> None:
        if case.path_parameters and known_id:
            case.path_parameters["id"] = known_id
        if how is WRONG and case.headers.get("x-batch-validation") == "permissive":
            del case.headers["x-batch-validation"]  # with it, what is wrong is left out
        case.headers["Authorization"] = f"Bearer {key}"
        answer = case.call(base_url=f"http://127.0.0.1:{api.port}")
        told[answer.status_code] += 1
        case.validate_response(answer, checks=CHECKS)
        assert how is RIGHT or answer.status_code not in (200, 201, 202) or is_right(label, case.body)

    check()
    assert how is WRONG or {200, 201, 202} & set(told), told
