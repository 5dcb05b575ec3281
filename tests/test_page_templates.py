"""The templates at /mail/templates: the list, and previews in a frame of which nothing gets out."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mail import templates
from ops.page.templates import KEPT, example_of
from tests.pages import Pages
from tests.servers import RedisServer

FILES = {
    "order/subject.txt": "Order {{ number }}",
    "order/body.html": "{{ customer.first_name|title }}{% for item in order.lines|sort %}{{ item.name }}"
    "{{ loop.index }}{% endfor %}{% for one in tags %}{{ one }}{% endfor %}{{ rows[0].city }}{{ note.upper() }}"
    "{% include 'order/sum.html' %}<script>top.x = 1</script><link rel=preconnect href=//x>",
    "order/sum.html": "{{ total }} {{ currency|default('EUR') }}",
    "broken/subject.txt": "{{ number",
    "broken/body.txt": "x",
    "<img src=x>/subject.txt": "x",
}
EXAMPLE = {
    "currency": "EUR",
    "customer": {"first_name": "Ada"},
    "note": "an example",
    "number": 3,
    "order": {"lines": [{"name": "Ada"}] * 2},
    "rows": [{"city": "an example"}] * 2,
    "tags": ["an example"] * 2,
    "total": 3,
}


@pytest.fixture
def pages(client: object, redis_server: RedisServer, tmp_path: Path) -> Iterator[Pages]:
    before = templates.FOLDER
    for name, text in FILES.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    yield Pages.of(redis_server.url, templates_dir=tmp_path)
    templates.use(before)


def framed(page: str) -> str:
    found = re.search(r'<iframe [^>]*src="([^"]+)"', page)
    assert found
    return found[1]


def test_each_template_is_listed_with_what_it_wants_or_what_is_wrong_with_it(pages: Pages) -> None:
    shown = pages.text("/mail/templates")
    assert "Order {{ number }} currency optional customer note number" in shown
    assert "broken/subject.txt, line 1: unexpected end of template" in shown
    assert "unexpected end" in pages.text("/mail/templates/broken")
    assert "<img" not in pages.get("/mail/templates")
    pages.get("/mail/templates/none", 404)


def test_a_preview_begins_with_an_example_in_the_form_that_the_template_uses(pages: Pages) -> None:
    shown = pages.get("/mail/templates/order")
    assert example_of("order") == EXAMPLE
    assert "Order 3" in shown
    assert pages.get(framed(shown)).startswith('<base target="_blank">AdaAda1Ada2an example')


def test_what_somebody_types_is_shown_in_no_url_and_in_a_sandbox(pages: Pages, tmp_path: Path) -> None:
    typed = EXAMPLE | {"number": "<b>7</b>", "note": "<i>secret</i>"}
    shown = pages.post("/mail/templates/order", variables=json.dumps(typed)).text
    assert "Order &lt;b&gt;7" in shown
    assert "<b>7" not in shown
    answer = pages.browser.get(framed(shown))
    assert answer.headers["Content-Security-Policy"].startswith("sandbox allow-popups")
    assert answer.headers["X-Frame-Options"] == "SAMEORIGIN"
    assert "&lt;I&gt;SECRET" in answer.text
    assert "<link" not in answer.text
    assert "secret" not in framed(shown)
    (tmp_path / "order/sum.html").write_text("as it is now")
    assert "as it is now" in pages.get(framed(shown))
    for _ in range(KEPT):
        pages.post("/mail/templates/order", variables=json.dumps(EXAMPLE))
    assert "no longer kept" in pages.get(framed(shown), 404)


@pytest.mark.parametrize(
    ("typed", "told"),
    [
        ("{", "must be JSON: Expecting property name"),
        ("[1]", "must be an object"),
        ("[" * 100_000, "variables"),
        ({}, "template.variables.number is required by the template"),
        (EXAMPLE | {"order": 5}, "is required by the template: "),
        (EXAMPLE | {"number": "1\n2"}, "template.subject"),
    ],
)
def test_a_preview_says_what_a_mail_would_be_refused_with(pages: Pages, typed: Any, told: str) -> None:
    given = typed if isinstance(typed, str) else json.dumps(typed)
    shown = pages.post("/mail/templates/order", variables=given).text
    assert told in shown
    assert "<iframe" not in shown
