"""The service asked as tests/openapi.yaml says, right and wrong: each answer has a status and a shape that it names."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
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
from tests.http_api import UNKNOWN_ID, fail, job_of, submitted
from tests.servers import Api
from tests.test_fuzz import SAME
from web.app import ROUTES

schemathesis.openapi.format("mailbox", samples.boxes().map(lambda box: box.written))
schemathesis.openapi.format("line", samples.odd_text(100))
schemathesis.openapi.format("body", samples.BODY)
schemathesis.openapi.format("file-name", samples.odd_text(100).filter(samples.is_file_name))
schemathesis.openapi.format("media-type", samples.content_types())
CONFIG = schemathesis.Config.from_dict({"generation": {"with-security-parameters": False}})
API = schemathesis.openapi.from_path(Path(__file__).parent / "openapi.yaml", config=CONFIG)
FOUND = [found.ok() for found in API.get_all_operations() if isinstance(found, Ok)]
OPERATIONS = {one.label: one for one in FOUND}
RIGHT, WRONG = GenerationMode.POSITIVE, GenerationMode.NEGATIVE
ASKED = [(label, how) for how in (RIGHT, WRONG) for label in OPERATIONS if how is RIGHT or OPERATIONS[label].body]
CHECKS = [
    *(checks.not_a_server_error, checks.status_code_conformance),
    *(checks.content_type_conformance, checks.response_schema_conformance),
]


def test_it_names_every_route() -> None:
    assert set(OPERATIONS) == {f"{method} {re.sub('<.*?>', '{id}', path)}" for method, path, *_ in ROUTES}


def is_right(label: str, body: Any) -> bool:
    """Whether the document admits this body; of what schemathesis means to be wrong, some is right."""
    post = API.raw_schema["paths"][label.split()[1]]["post"]
    schema = post["requestBody"]["content"]["application/json"]["schema"]
    return jsonschema_rs.is_valid({**schema, "components": API.raw_schema["components"]}, body)


@pytest.mark.parametrize(("label", "how"), ASKED)
def test_it_is_answered_as_described(api: Api, client: redis.Redis, label: str, how: GenerationMode) -> None:
    told: Counter[int] = Counter()
    failed = submitted(api, "/jobs")
    fail(client, job_of(client, failed))
    known = [submitted(api, "/emails"), submitted(api, "/jobs"), failed, UNKNOWN_ID, ""]
    keys = ["full-key"] * 5 + ["send-key", "another"]

    @hypothesis_settings(SAME, max_examples=10 if how is RIGHT else 20)
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
        assert how is RIGHT or answer.status_code not in (200, 202) or is_right(label, case.body)

    check()
    assert how is WRONG or {200, 202} & set(told), told
