"""Jinja2 templates on disk -> subject, text, html.

A template is a folder of `templates/`: `subject.txt`, and `body.txt`, `body.html` or both. Its name and its variables
come from a request; its text never does. Values are escaped in HTML; a variable that the template uses and the request
lacks is an error, at the door and by name. The only home of `jinja2`.  https://jinja.palletsprojects.com/
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined, TemplateNotFound, UndefinedError
from jinja2.exceptions import TemplateRuntimeError

from mail.message import FieldError, Invalid

FOLDER = Path(__file__).parent.parent / "templates"
DATA_ERRORS = (TemplateRuntimeError, TypeError, ValueError, ArithmeticError, LookupError, AttributeError)


@lru_cache(maxsize=1)
def environment() -> Environment:
    return Environment(
        loader=FileSystemLoader(FOLDER),
        undefined=StrictUndefined,
        autoescape=lambda name: bool(name and name.endswith(".html")),
        trim_blocks=True,
        lstrip_blocks=True,
        auto_reload=False,
    )


def render(template_id: str, variables: Mapping[str, Any]) -> tuple[str, str | None, str | None]:
    """(subject, text, html). Raises `Invalid` for an unknown template, a missing variable, or one of the wrong kind."""
    if not re.fullmatch(r"[A-Za-z0-9_-]{1,64}", template_id) or not (FOLDER / template_id).is_dir():
        raise Invalid(FieldError("template.id", "there is no template of this name"))
    subject, text, html = (
        _part(f"{template_id}/{name}", variables) for name in ("subject.txt", "body.txt", "body.html")
    )
    return subject or "", text, html


def _part(name: str, variables: Mapping[str, Any]) -> str | None:
    try:
        return environment().get_template(name).render(variables).rstrip("\n")
    except TemplateNotFound:
        return None
    except UndefinedError as error:
        missing = re.match(r"'(\w+)' is undefined", error.message or "")
        name = f"template.variables.{missing[1]}" if missing else "template.variables"
        raise Invalid(FieldError(name, "the template needs this variable", missing=True)) from None
    except DATA_ERRORS as error:
        fault = f"the template cannot be rendered with these values ({type(error).__name__})"
        raise Invalid(FieldError("template.variables", fault)) from None
