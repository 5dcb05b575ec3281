"""Facts about `mail.templates`: what a template makes of variables, and that a request cannot reach beyond them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mail import templates
from mail.request import Invalid
from mail.templates import Broken, render
from tests.sample_mails import HOSTILE_JSON, HOSTILE_TEXT, PROPERTY, Json


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty folder that templates are read from."""
    monkeypatch.setattr(templates, "FOLDER", tmp_path)
    templates.environment.cache_clear()
    yield tmp_path
    templates.environment.cache_clear()


def write(folder: Path, **files: str) -> None:
    """A template called `x`: subject, text, html."""
    (folder / "x").mkdir()
    for part, text in ({"subject": "Hi"} | files).items():
        name = {"subject": "subject.txt", "text": "body.txt", "html": "body.html"}.get(part, f"{part}.txt")
        (folder / "x" / name).write_text(text, encoding="utf-8")


def refusal(template_id: str, variables: dict[str, Json]) -> dict[str, str]:
    """field -> message"""
    with pytest.raises(Invalid) as caught:
        render(template_id, variables)
    return {error.field: error.message for error in caught.value.errors}


def test_the_welcome_mail_is_rendered_with_its_name_escaped_in_html_and_as_it_is_in_text() -> None:
    subject, text, html = render("welcome", {"name": "<b>&\"'"})
    assert (subject, (text or "").split("\n")[0]) == ("Welcome, <b>&\"'", "Hello <b>&\"',")
    assert "Welcome, &lt;b&gt;&amp;&#34;&#39;</h1>" in (html or "")
    assert "<b>" not in (html or "")


# fmt: off
UNKNOWN = [
    "nothing", "Welcome", "welcome ", " welcome", "welcome\n", "wel\x00come", "wélcome", "welcome.", "x" * 65,
    "", ".", "..", "../x", "../templates/welcome", "welcome/..", "welcome/", "/welcome", "welcome/../welcome",
    "..\\welcome", "welcome\\..", "/etc", "/", "~", "welcome/body.txt", "\ud800", "{{ 7 * 7 }}",
]
WRONG_KIND = [  # a template, and what it cannot make of `total`
    ("{{ total + 1 }}", "seven"), ("{{ total // 0 }}", 7), ("{{ total ** total ** total }}", 9.9e9),
    ("{{ '%.2f'|format(total) }}", "seven"), ("{{ '%(a)s'|format(**total) }}", {"b": 1}),
    ("{{ '{}'.format(*total) }}", []), ("{{ total|dictsort }}", []), ("{{ 7|round(0, total) }}", "seven"),
    ("{% for one in total %}{{ one }}{% endfor %}", 7), ("{% for one in total %}{{ one }}{% endfor %}", None),
    ("{{ total|round }}", "seven"), ("{{ total.lower() }}", 7), ("{{ total() }}", "seven"),
    ("{{ {total: 1}.a }}", []), ("{% include total %}", 7),
]
# fmt: on


@pytest.mark.parametrize("template_id", UNKNOWN)
def test_an_unknown_template_is_refused(template_id: str) -> None:
    assert refusal(template_id, {"name": "Ada"}) == {"template.id": "must be one of welcome"}


def test_a_way_out_of_the_folder_to_a_template_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "inside").mkdir()
    write(folder, text="secret")
    (folder / "file").write_text("no folder")
    monkeypatch.setattr(templates, "FOLDER", folder / "inside")
    for template_id in ("../x", "../../x", "./../x", str(folder / "x"), "file", "../file"):
        assert list(refusal(template_id, {})) == ["template.id"]


def test_a_missing_variable_is_named() -> None:
    with pytest.raises(Invalid) as caught:
        render("welcome", {"Name": "Ada"})
    (error,) = caught.value.errors
    assert (error.field, error.missing) == ("template.variables.name", True)


WITHIN = "is required by the template: FOLDER/x/body.txt, line 2"
MISSING = [  # a template, its variables, and what is said
    ("\n{% if note %}{{ note }}{% endif %}", {}, ("template.variables.note", WITHIN)),
    ("\n{{ order.total }}", {"order": {}}, ("template.variables.order.total", WITHIN)),
    ("{{ order.id }}\n{{ order.id }}{{ order['sum'].net }}", {"order": {"id": 1, "sum": 2}},
     ("template.variables.order.sum.net", WITHIN)),
    ("\n{{ order[1].price }}", {"order": [{"price": 1}]}, ("template.variables.order[1]", WITHIN)),
    ("{% for one in of %}\n{{ one.price }}{% endfor %}", {"of": [{}]}, ("template.variables", f"one.price {WITHIN}")),
    ("\n{{ a.name }}{{ b.name }}", {"a": {"name": 1}, "b": 2}, ("template.variables", f"a.name or b.name {WITHIN}")),
    ("\n{{ (of|first).name }}", {"of": [{}]}, ("template.variables", f"(...).name {WITHIN}")),
    ("\n{{ of[key] }}", {"of": {}, "key": "size"}, ("template.variables", f"size {WITHIN}")),
]  # fmt: skip


@pytest.mark.parametrize(("text", "variables", "said"), MISSING)
def test_what_a_template_needs_is_named(
    folder: Path, text: str, variables: dict[str, Json], said: tuple[str, str]
) -> None:
    write(folder, text=text)
    assert refusal("x", variables) == {said[0]: said[1].replace("FOLDER", str(folder))}


@pytest.mark.parametrize("text", ["{% if note is defined %}{{ note }}{% endif %}", "{{ note|default('') }}"])
def test_a_variable_may_be_optional(folder: Path, text: str) -> None:
    write(folder, text=text)
    assert (render("x", {})[1], render("x", {"note": "Hi"})[1]) == ("", "Hi")


def test_a_variable_that_the_template_does_not_use_is_ignored() -> None:
    odd = {"extra": [1], "name ": 1, "self": {}, "": None, "loop": 1, "__class__": "x", "range": 1, "environment": 1}
    assert render("welcome", {"name": "Ada"} | odd) == render("welcome", {"name": "Ada"})


def test_text_of_a_request_is_no_template() -> None:
    name = "{{ 7 * 7 }}{% for x in range(9) %}{{ x }}{% endfor %}{# note #}"
    subject, text, html = render("welcome", {"name": name})
    assert subject == f"Welcome, {name}"
    assert name in (text or "")
    assert name in (html or "")


@pytest.mark.parametrize("value", [None, [], ["Ada"], {}, {"a": 1}, {"__html__": "<b>"}, [[[[]]]]])
def test_a_value_that_is_neither_text_nor_a_number_is_not_written_into_a_mail(value: Json) -> None:
    told = refusal("welcome", {"name": value})
    place = "templates/welcome/subject.txt, line 1"
    assert told == {"template.variables": f"a value that is written out must be text or a number: {place}"}


def test_a_method_of_a_value_is_not_written_into_a_mail(folder: Path) -> None:
    write(folder, text="{{ order.items }}")  # Jinja finds dict.items before the member of this name
    assert list(refusal("x", {"order": {"items": "two"}})) == ["template.variables"]


@pytest.mark.parametrize(("template", "value"), WRONG_KIND)
def test_a_variable_of_the_wrong_kind_is_refused(folder: Path, template: str, value: Json) -> None:
    write(folder, text=f"Hi\n{template}")
    [(field, told)] = refusal("x", {"total": value}).items()
    assert field.startswith("template.variables")
    assert told.endswith(f": {folder}/x/body.txt, line 2")


def test_a_value_nested_without_end_or_a_number_without_end_is_refused(folder: Path) -> None:
    write(folder, text="{{ total|tojson }}{{ total }}")
    nested: Json = []
    for _ in range(100_000):
        nested = [nested]
    assert list(refusal("x", {"total": nested})) == ["template.variables"]
    assert list(refusal("x", {"total": 10**5000})) == ["template.variables"]


@PROPERTY
@given(st.dictionaries(st.just("name") | HOSTILE_TEXT, HOSTILE_JSON, max_size=4))
def test_whatever_the_variables_are_they_are_rendered_or_refused(variables: dict[str, Json]) -> None:
    name = variables.get("name")
    if isinstance(name, (str, int, float)):
        assert render("welcome", variables)[0] == f"Welcome, {name}".rstrip("\n")
    else:
        assert refusal("welcome", variables).keys() <= {"template.variables", "template.variables.name"}


def test_html_is_escaped_wherever_a_value_stands_in_it(folder: Path) -> None:
    html = "{{ a }} {{ a|upper }} {{ b.c }} {{ a ~ '<i>' }}{% set d = a %} {{ d }}{% for f in e %} {{ f }}{% endfor %}"
    write(folder, html=html, text=html, subject=html)
    subject, text, written = render("x", {"a": "<u>", "b": {"c": "<u>"}, "e": ["<u>"]})
    assert written == "&lt;u&gt; &lt;U&gt; &lt;u&gt; &lt;u&gt;&lt;i&gt; &lt;u&gt; &lt;u&gt;"
    assert subject == text == "<u> <U> <u> <u><i> <u> <u>"


def test_a_part_without_its_file_is_none(folder: Path) -> None:
    write(folder, text="Hi\n\n")
    assert render("x", {}) == ("Hi", "Hi", None)


PARTS = [  # the files of a folder, and those of which it must have one
    ({"subject.txt", "text.txt"}, "body.txt or body.html"),
    ({"body.txt", "subject.html"}, "subject.txt"),
    ({"body.html"}, "subject.txt"),
]


@pytest.mark.parametrize(("files", "lacking"), PARTS)
def test_a_folder_without_a_part_is_found_at_the_start_and_sends_nothing(
    folder: Path, files: set[str], lacking: str
) -> None:
    (folder / "x").mkdir()
    for name in files:
        (folder / "x" / name).write_text("Hi")
    told = f"the folder {folder}/x must hold {lacking}"
    assert templates.faults() == [told]
    assert refusal("x", {}) == {"template.id": told}


def test_a_folder_without_any_part_is_no_template(folder: Path) -> None:
    (folder / "y").mkdir()
    (folder / "y" / "y.html").write_text("Hi")
    assert templates.faults() == []
    assert list(refusal("y", {})) == ["template.id"]
    assert refusal("z", {}) == {"template.id": "there is no template"}


BROKEN = [  # a file of the template `x`, its text, and what is said of it after the folder's name
    ("body.txt", "Hi {{ name", "/x/body.txt, line 1: unexpected end of template"),
    ("body.txt", "Hi\n{{ name }", "/x/body.txt, line 2: unexpected '}'"),
    ("subject.txt", "{% if a %}Hi", "/x/subject.txt, line 1: Unexpected end of template"),
    ("body.html", "<p>\n\n{% endfor %}", "/x/body.html, line 3: Encountered unknown tag 'endfor'"),
    ("body.html", "{{ name|shout }}", "/x/body.html, line 1: No filter named 'shout'"),
    ("body.html", "{% trans %}Hi{% endtrans %}", "/x/body.html, line 1: Encountered unknown tag 'trans'"),
    ("body.html", "{{ name is loud }}", "/x/body.html, line 1: No test named 'loud'"),
    ("body.html", "Hi\n{% include 'x/footer.html' %}", "/x/body.html, line 2: there is no FOLDER/x/footer.html"),
    ("body.html", "{% extends 'base.html' %}", "/x/body.html, line 1: there is no FOLDER/base.html"),
    ("body.html", "{% include '../footer.html' %}", "/x/body.html, line 1: there is no FOLDER/../footer.html"),
    ("body.html", "{% include '/x/no.txt' %}", "/x/body.html, line 1: there is no /x/no.txt"),
    ("part.html", "{% from 'x/no.html' import a %}", "/x/part.html, line 1: there is no FOLDER/x/no.html"),
    ("body.txt", "Gr\xfc\xdfe", "/x/body.txt: must be UTF-8"),
]


@pytest.mark.parametrize(("name", "text", "said"), BROKEN)
def test_a_broken_template_is_found_when_the_api_starts(folder: Path, name: str, text: str, said: str) -> None:
    """Mistakes from questions about Jinja: an open `{{`, `}` for `}}`, a block never closed, a filter of Django's."""
    write(folder, text="Hi")
    (folder.parent / "footer.html").write_text("beyond the folder, so that no template can have it")
    assert templates.faults() == []
    (folder / "x" / name).write_text(text, encoding="latin-1")
    templates.environment.cache_clear()
    (fault,) = templates.faults()
    assert fault.startswith(f"{folder}{said.replace('FOLDER', str(folder))}"), fault


def test_what_may_be_missing_is_no_fault(folder: Path) -> None:
    write(folder, text="{% include 'no.txt' ignore missing %}{% include ['x/a.txt', 'x/b.txt'] %}", b="{{ c }}")
    (folder / "parts").mkdir()
    (folder / "parts" / "footer.html").write_text("no body, and no template either")
    assert templates.faults() == []
    assert render("x", {"c": "Hi"})[1] == "Hi"


def test_a_new_template_counts_at_once_and_its_files_are_looked_for_once(folder: Path) -> None:
    with pytest.raises(Invalid):
        templates.render("new", {})
    (folder / "new").mkdir()
    for name in ("subject.txt", "body.txt"):
        (folder / "new" / name).write_text("Hello")
    assert templates.render("new", {}) == ("Hello", "Hello", None)
    (folder / "new" / "body.txt").unlink()
    assert templates.render("new", {}) == ("Hello", "Hello", None)


def test_an_edited_template_counts_at_once_where_that_is_asked_for(folder: Path) -> None:
    write(folder, text="one", html="{% include 'x/footer.txt' %}", footer="one")

    def edit(text: str) -> tuple[str, str | None, str | None]:
        for name in ("body.txt", "footer.txt"):
            (folder / "x" / name).write_text(text)
            os.utime(folder / "x" / name, (len(text), len(text)))
        return render("x", {})

    assert render("x", {}) == edit("three") == ("Hi", "one", "one")
    templates.read_again_when_changed()
    assert edit("seven?") == ("Hi", "seven?", "seven?")
    with pytest.raises(Broken, match=rf"^{folder}/x/body.txt, line 1: unexpected end of template"):
        edit("{{ broken")
    assert edit("mended!") == ("Hi", "mended!", "mended!")


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("Hi\n{% include '../no.html' %}", "body.html, line 2: there is no FOLDER/../no.html"),
        ("Hi\n{% include 'x/part.txt' %}", "part.txt, line 2: there is no FOLDER/x/no.html"),
        ("Hi\n\n{% include name %}", "body.html, line 3: must include only files that there are"),  # a variable's text
    ],
)
def test_a_template_whose_include_is_missing_is_not_sent_without_it(folder: Path, text: str, told: str) -> None:
    write(folder, html=text, part="\n{% include 'x/no.html' %}")
    with pytest.raises(Broken, match=f"^{folder}/x/{told.replace('FOLDER', str(folder))}$"):
        render("x", {"name": "ada@example.com"})  # the operator's fault, so a 500 and not the caller's 422


def test_lines_of_a_block_leave_no_empty_lines_behind(folder: Path) -> None:
    write(folder, text="{% for one in of %}\n  {% if one %}\n- {{ one }}\n  {% endif %}\n{% endfor %}\nend\n")
    assert render("x", {"of": ["a", "", "b"]})[1] == "- a\n- b\nend"
