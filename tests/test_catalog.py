"""The templates, domains and API keys, as clients of Resend's API read them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import redis

from mail import templates
from tests.http_api import MAIL, fields, keys
from tests.servers import Api, House

pytestmark = pytest.mark.usefixtures("client")
LISTED = {"id", "name", "alias", "status", "created_at", "updated_at", "published_at"}  # by Resend's SDK for Node
FILES = {
    "order/subject.txt": "Order {{ number }}{% include 'no.txt' ignore missing %}\n",
    "order/body.html": "<p>{% if note is defined %}{{ note }}{% endif %}{% include 'order/sum.html' %}",
    "order/sum.html": "{{ total }} {{ currency|default('EUR') }} {{ items|default(1) }} {{ a|d }}",
    "plain/subject.txt": "Hi",
    "plain/body.txt": "Hi",
}


@pytest.fixture(scope="module")
def api(house: House, tmp_path_factory: pytest.TempPathFactory) -> Api:
    folder: Path = tmp_path_factory.mktemp("templates")
    for name, text in FILES.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)
    house.environment["TEMPLATES_DIR"] = str(folder)
    return house.api()


def test_the_templates_are_listed_and_shown_as_they_are_written(api: Api) -> None:
    listed = api.get("/templates").body
    assert (listed["object"], listed["has_more"], [one["id"] for one in listed["data"]]) == (
        "list",
        False,
        ["order", "plain"],
    )
    assert [set(one) for one in listed["data"]] == [LISTED, LISTED]
    shown = api.get("/templates/order").body
    assert set(shown) == LISTED | {"object", "from", "reply_to", "subject", "html", "text", "variables"}
    assert shown["subject"] == FILES["order/subject.txt"].strip()
    assert (shown["text"], shown["html"]) == (None, FILES["order/body.html"])
    variables = {one["key"]: (one["type"], one["fallback_value"]) for one in shown["variables"]}
    assert variables == {
        **{"a": ("string", ""), "currency": ("string", "EUR"), "items": ("number", 1), "note": ("string", "")},
        **{"number": ("string", None), "total": ("string", None)},
    }
    assert [api.get(path).status for path in ("/templates/no", "/templates/..", "/templates/order/sum")] == [404] * 3


PREVIEWS: list[tuple[Any, int, Any]] = [
    ({"variables": {"number": 7, "total": "<1>", "note": "x"}}, 200,
     {"subject": "Order 7", "text": "x<1> EUR 1", "html": "<p>x&lt;1&gt; EUR 1 "}),
    ({"variables": {"total": 1}}, 422, ["template.variables.number"]),
    ({"variables": {"number": "1\n2", "total": 1}}, 422, ["template.subject"]),
    ({}, 422, ["template.variables.number"]),
    ({"variables": []}, 422, ["template.variables.number"]),
    ({"variables": "x"}, 422, ["variables"]),
    ({"to": "ada@example.com"}, 422, ["to"]),
    ([], 422, ["body"]),
]  # fmt: skip


@pytest.mark.parametrize(("body", "status", "told"), PREVIEWS, ids=[json.dumps(one[0]) for one in PREVIEWS])
def test_a_preview_says_what_a_mail_would_say_and_stores_nothing(
    api: Api, client: redis.Redis, body: Any, status: int, told: Any
) -> None:
    seen = api.post("/templates/order/preview", body)
    assert (seen.status, seen.body if status == 200 else fields(seen)) == (status, told)
    if status == 422 and isinstance(body, dict) and body.keys() <= {"variables"} and body != {"variables": "x"}:
        mail = {"to": MAIL["to"], "template": {"id": "order", **body}}
        assert api.post("/emails", mail).body["message"] == seen.body["message"]
    assert keys(client, "*") == set()


def test_the_domain_of_the_sender_and_the_names_of_the_keys_are_shown_and_no_hash(api: Api) -> None:
    domains, named = api.get("/domains").body["data"], api.get("/api-keys").body["data"]
    assert [(one["name"], one["status"]) for one in domains] == [("example.com", "verified")]
    assert [(one["name"], set(one)) for one in named] == [
        (name, {"id", "name", "created_at", "last_used_at"}) for name in ("full", "send")
    ]


PAGES = {
    "": (["order", "plain"], False),
    "?limit=1": (["order"], True),
    "?limit=1&after=order": (["plain"], False),
    "?after=plain": ([], False),
    "?before=plain&limit=100": (["order"], False),
}


@pytest.mark.parametrize("query", PAGES)
def test_a_list_has_pages(api: Api, query: str) -> None:
    seen = api.get(f"/templates{query}").body
    assert ([one["id"] for one in seen["data"]], seen["has_more"]) == PAGES[query]


WRONG = {"limit=0": "limit", "limit=101": "limit", "limit=x": "limit", "after=no": "after", "before=no": "before"}


@pytest.mark.parametrize("query", [*WRONG, "after=order&before=plain"])
def test_a_page_that_is_none_is_refused(api: Api, query: str) -> None:
    assert fields(api.get(f"/templates?{query}")) == [WRONG.get(query, "before")]


def test_a_template_of_the_project_has_the_variables_that_it_needs() -> None:
    assert templates.variables("welcome") == {"name": None}
