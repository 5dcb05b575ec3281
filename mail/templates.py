"""Jinja2 templates on disk -> subject, text, html.

A template is a folder of `templates/`: `subject.txt`, and `body.txt`, `body.html` or both. Its name and its variables
come from a request; its text never does. Values are escaped in HTML. Refuses, by name and before anything is stored, a
variable that the template uses and the request lacks, and one that is written out and is neither text nor a number:
Python would write `None` or `{'a': 1}` into the mail. The API looks at all of them when it starts (`faults`). The only
home of `jinja2`.  https://jinja.palletsprojects.com/
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template, Undefined, UndefinedError, nodes
from jinja2.exceptions import TemplateNotFound, TemplateRuntimeError, TemplateSyntaxError

from mail.request import FieldError, Invalid

FOLDER = Path(__file__).parent.parent / "templates"
SUBJECT, BODIES = "subject.txt", ("body.txt", "body.html")
# Not LookupError: TemplateNotFound is one, and an {% include %} of a missing file is not the caller's fault.
# fmt: off
DATA_ERRORS = (TemplateRuntimeError, TypeError, ValueError, ArithmeticError, KeyError, IndexError, AttributeError,
               RecursionError)
# fmt: on


class Broken(Exception):
    """Raised for a template that nobody's variables could render. The text names the file and the line."""


@lru_cache(maxsize=1)
def environment() -> Environment:
    return Environment(
        loader=FileSystemLoader(FOLDER),
        undefined=StrictUndefined,
        finalize=writable,
        autoescape=lambda name: bool(name and name.endswith(".html")),
        trim_blocks=True,
        lstrip_blocks=True,
        auto_reload=False,
    )


def use(folder: Path) -> None:
    """Takes the templates from this folder, instead of the project's own."""
    global FOLDER
    FOLDER = folder
    environment.cache_clear()


def read_again_when_changed() -> None:
    """Makes an edited template count without a restart, for bin/dev. A new one always does."""
    environment().auto_reload = True


def writable(value: object) -> object:
    if isinstance(value, (str, int, float, Undefined)):  # Undefined raises by itself, and knows its name
        return value
    raise Invalid(FieldError("template.variables", "a value that is written out must be text or a number"))


def render(template_id: str, variables: Mapping[str, Any]) -> tuple[str, str | None, str | None]:
    """Returns (subject, text, html). Raises `Invalid` for an unknown template, and a variable missing or unusable, and
    `Broken`."""
    subject, text, html = (_rendered(part, variables) for part in parts(template_id))
    return subject or "", text, html


def parts(template_id: str) -> list[Template | None]:
    folder = FOLDER / template_id
    if not re.fullmatch(r"[A-Za-z0-9_-]{1,64}", template_id) or not folder.is_dir():
        known = ", ".join(ids())
        raise Invalid(FieldError("template.id", f"must be one of {known}" if known else "there is no template"))
    if not any((folder / name).is_file() for name in BODIES):
        raise Invalid(FieldError("template.id", without_body(template_id)))
    names = [f"{template_id}/{name}" for name in (SUBJECT, *BODIES)]
    return [_loaded(name) if (FOLDER / name).is_file() else None for name in names]


def ids() -> list[str]:
    return sorted({path.parent.name for name in BODIES for path in FOLDER.glob(f"*/{name}")})


def without_body(template_id: str) -> str:
    return f"the folder {FOLDER.name}/{template_id} must hold {' or '.join(BODIES)}"


def faults() -> list[str]:
    """Returns a sentence for each file that no request could use: its syntax, its encoding, a file that it includes."""
    found: list[str] = []
    for name in environment().list_templates(extensions=["txt", "html"]):
        try:
            _loaded(name)
            found += _missing_files(name)
        except Broken as error:
            found.append(str(error))
    without = (path.parent.name for path in sorted(FOLDER.glob(f"*/{SUBJECT}")))
    return found + [without_body(one) for one in without if one not in ids()]


def _missing_files(name: str) -> Iterator[str]:
    tree = environment().parse((FOLDER / name).read_text("utf-8"))
    for node in tree.find_all((nodes.Include, nodes.Extends, nodes.Import, nodes.FromImport)):
        wanted = getattr(node.template, "value", None)  # type: ignore[attr-defined]  # of a constant
        if isinstance(wanted, str) and not getattr(node, "ignore_missing", False) and not (FOLDER / wanted).is_file():
            yield f"{FOLDER.name}/{name}, line {node.lineno}: there is no {FOLDER.name}/{wanted}"


def _loaded(name: str) -> Template:
    try:
        return environment().get_template(name)
    except (TemplateSyntaxError, UnicodeDecodeError, OSError) as error:
        raise _broken(error, name) from None


def _broken(error: Exception, name: str) -> Broken:
    match error:
        case TemplateSyntaxError():
            return Broken(f"{FOLDER.name}/{error.name or name}, line {error.lineno}: {error.message}")
        case TemplateNotFound():
            return Broken(f"{FOLDER.name}/{name}: must include only files that there are")  # a variable may name it
        case UnicodeDecodeError():
            return Broken(f"{FOLDER.name}/{name}: must be UTF-8")
    return Broken(f"{FOLDER.name}/{name}: cannot be read: {getattr(error, 'strerror', None)}")


def _rendered(template: Template | None, variables: Mapping[str, Any]) -> str | None:
    if not template:
        return None
    try:
        return template.render(variables).rstrip("\n")
    except UndefinedError as error:
        raise Invalid(_missing(error.message or "")) from None
    except (TemplateSyntaxError, TemplateNotFound) as error:
        raise _broken(error, template.name or "") from None
    except DATA_ERRORS as error:
        text = f"the template cannot be rendered with these values ({type(error).__name__})"
        raise Invalid(FieldError("template.variables", text)) from None


def _missing(message: str) -> FieldError:
    variable = re.fullmatch(r"'(\w+)' is undefined", message)
    if variable:
        return FieldError(f"template.variables.{variable[1]}", "is required by the template", missing=True)
    part = message.rpartition(" ")[2]  # "'dict object' has no attribute 'total'"
    return FieldError("template.variables", f"one of them must have {part}, which the template needs", missing=True)
