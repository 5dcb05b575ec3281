"""docs/api.md says what there is: its routes, its examples and its types of errors."""

from __future__ import annotations

import ast
import json
import re
import subprocess
from collections.abc import Mapping
from urllib.parse import urlsplit

import redis

from mail.outbox import Outbox
from tests.http_api import RESEND_NAMES, fail, job_of, submitted, work
from tests.programs import program
from tests.servers import ROOT, Api
from web import app as web_app
from web import errors, reference, server

DOCS = reference.PAGE


def test_every_route_has_its_heading_in_the_reference_and_no_heading_is_out_of_date() -> None:
    headings = re.findall(r"^#+ ((?:GET|POST|PUT|PATCH|DELETE) \S+)$", DOCS.read_text(), re.MULTILINE)
    routes = [f"{method} {re.sub('<.*?>', '{id}', path)}" for method, path, _, _ in web_app.ROUTES]
    assert sorted(headings) == sorted(set(routes) - {"GET /docs/{id}"})


UUID = re.compile("[0-9a-f]{8}-[0-9a-f-]{27}")


def run(curl: str, api: Api, ids: Mapping[str, str], other: str) -> tuple[str, int]:
    """(body, status) of a command of the reference, for our API and with our ids."""
    command = curl.replace("curl ", f"{program('REQUIRE_CLIENTS', 'curl')} -s -w '%{{http_code}}' ", 1)
    command = UUID.sub(lambda found: ids.get(found[0], other), command)
    command = command.replace(":8000", f":{api.port}").replace("Bearer dev", "Bearer full-key")
    told = subprocess.run(["sh", "-c", command], capture_output=True, text=True, check=True).stdout
    return told[:-3], int(told[-3:])


def route_of(curl: str) -> tuple[str, str]:
    method, path = re.search("-X (\\w+)", curl), urlsplit(re.findall("http://[^ ']+", curl)[0]).path
    for known, rule, *_ in web_app.ROUTES:
        if known == (method[1] if method else "GET") and re.fullmatch(re.sub("<.*?>", "[^/]+", rule), path):
            return known, rule
    raise AssertionError(curl)


def test_every_route_has_an_example_in_the_reference_that_is_answered_so(
    api: Api, client: redis.Redis, outbox: Outbox
) -> None:
    failed = submitted(api, "/emails")
    fail(client, job_of(client, failed))
    ids: dict[str, str] = {}  # the reference's -> ours
    examples = reference.EXAMPLE.findall(DOCS.read_text())
    for curl, status, documented in examples:
        body, answered = run(curl, api, ids, failed)
        answer, told = json.loads(body), json.loads(documented)
        assert (answered, list(answer)) == (int(status), list(told)), curl
        for entry, shown_entry in zip(answer.get("data", []), told.get("data", []), strict=False):
            assert list(entry) == list(shown_entry), curl
        ids.update({told[name]: answer[name] for name in ("id", "job_id") if name in told})
        if route_of(curl) == ("POST", "/jobs"):
            work(client, "jobs")
    shown = reference.CONSOLE.findall(DOCS.read_text())
    for curl, documented in shown:
        body, _ = run(curl, api, ids, failed)
        lines, shown_there = [re.sub(r" [\d.]+$", "", text, flags=re.M).splitlines() for text in (documented, body)]
        assert set(lines) <= set(shown_there), curl
    routes = {route[:2] for route in web_app.ROUTES if not route[1].startswith("/docs")}  # a page, and its files
    assert {route_of(curl) for curl, *_ in (*examples, *shown)} == routes
    assert DOCS.read_text().count("curl ") == len(examples) + len(shown)


def error_types() -> set[str]:
    """Returns the types of errors in web/ that `Refusal` and `error_shape` are given, and those looked up for them."""
    types = {type_ for type_, _ in server.JsonErrorTask.WORDS.values()}
    trees = [ast.parse(file.read_text()) for file in (ROOT / "web").glob("*.py")]
    for node in [node for tree in trees for node in ast.walk(tree)]:
        called = isinstance(node, ast.Call) and ast.unparse(node.func) in ("Refusal", "bad_request", "error_shape")
        if called or (
            isinstance(node, ast.FunctionDef) and node.name in ("error_type", "bad_request", "routing_error")
        ):
            words = [one.value for one in ast.walk(node) if isinstance(one, ast.Constant)]
            types |= {word for word in words if isinstance(word, str) and re.fullmatch("[a-z]+(_[a-z]+)+", word)}
    return types


NGINX = set(re.findall(r'"name": "(\w+)", "type": "(\w+)"', (ROOT / "nginx" / "async-email.conf").read_text()))


def test_every_error_type_is_in_the_references_table_and_no_row_is_out_of_date() -> None:
    rows = re.findall(r"^\| `([a-z_]+)` \| `([a-z_]+)` \| (\d{3}) \|", DOCS.read_text(), re.MULTILINE)
    types = error_types() | {type_ for _, type_ in NGINX}
    assert {(type_, name) for type_, name, _ in rows} == {(one, errors.NAMES.get(one, one)) for one in types}
    assert len(types) > 15


def test_every_error_has_a_name_that_resend_has_and_nginx_says_the_same() -> None:
    assert {errors.NAMES.get(type_, type_) for type_ in error_types()} <= RESEND_NAMES
    assert {(errors.NAMES.get(type_, type_), type_) for _, type_ in NGINX} == NGINX
    assert {name for name, _ in NGINX} <= RESEND_NAMES
    assert errors.NAMES.keys() == (error_types() | {type_ for _, type_ in NGINX}) - RESEND_NAMES
    site = (ROOT / "nginx" / "async-email.conf").read_text()
    assert site.count('"name"') == len(re.findall(r'"name": "\w+", "type": "\w+", "message"', site)) > 10
