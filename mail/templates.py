"""Jinja2 templates on disk -> subject, text, html.

A template is a folder of `templates/`: `subject.txt`, and `body.txt`, `body.html` or both. Its name and its variables
come from a request; its text never does. Values are escaped in HTML. Refuses, by name and before anything is stored, a
variable that the template uses and the request lacks, and one that is written out and is neither text nor a number:
Python would write `None` or `{'a': 1}` into the mail. The only home of `jinja2`.  https://jinja.palletsprojects.com/
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template, TemplateNotFound, Undefined, UndefinedError
from jinja2.exceptions import TemplateRuntimeError

from mail.request import FieldError, Invalid

FOLDER = Path(__file__).parent.parent / "templates"
UNUSABLE = (TemplateRuntimeError, TypeError, ValueError, ArithmeticError, LookupError, AttributeError, RecursionError)


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


def writable(value: object) -> object:
    if isinstance(value, (str, int, float, Undefined)):  # Undefined raises by itself, and knows its name
        return value
    raise Invalid(FieldError("template.variables", "a value that is written out must be text or a number"))


def render(template_id: str, variables: Mapping[str, Any]) -> tuple[str, str | None, str | None]:
    """Returns (subject, text, html). Raises `Invalid` for an unknown template, and a variable missing or unusable."""
    subject, text, html = (_rendered(part, variables) for part in parts(template_id))
    return subject or "", text, html


@lru_cache(maxsize=256)
def parts(template_id: str) -> list[Template | None]:
    if not re.fullmatch(r"[A-Za-z0-9_-]{1,64}", template_id) or not (FOLDER / template_id).is_dir():
        raise Invalid(FieldError("template.id", "no such template"))
    names = [f"{template_id}/{name}" for name in ("subject.txt", "body.txt", "body.html")]
    return [environment().get_template(name) if (FOLDER / name).is_file() else None for name in names]


def _rendered(template: Template | None, variables: Mapping[str, Any]) -> str | None:
    if not template:
        return None
    try:
        return template.render(variables).rstrip("\n")
    except UndefinedError as error:
        raise Invalid(_missing(error.message or "")) from None
    except TemplateNotFound:  # a LookupError, and an {% include %} of a missing file is not the caller's fault
        raise
    except UNUSABLE as error:
        text = f"the template cannot be rendered with these values ({type(error).__name__})"
        raise Invalid(FieldError("template.variables", text)) from None


def _missing(message: str) -> FieldError:
    variable = re.fullmatch(r"'(\w+)' is undefined", message)
    if variable:
        return FieldError(f"template.variables.{variable[1]}", "is required by the template", missing=True)
    part = message.rpartition(" ")[2]  # "'dict object' has no attribute 'total'"
    return FieldError("template.variables", f"one of them must have {part}, which the template needs", missing=True)
