"""Jinja2 templates on disk -> subject, text, html.

A template is a folder of `templates/`: `subject.txt`, and `body.txt`, `body.html` or both. Its name and its variables
come from a request; its text never does. Values are escaped in HTML. Refuses before anything is stored, and names with
the template's line, a variable that is used and not given, or written out and neither text nor a number: Python would
write `None` or `{'a': 1}` into the mail. The API looks at all of them when it starts (`faults`). The only
home of `jinja2`.  https://jinja.palletsprojects.com/
"""

from __future__ import annotations

import os
import re
import traceback
from collections.abc import Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template, Undefined, UndefinedError, meta, nodes
from jinja2.exceptions import TemplateNotFound, TemplateRuntimeError, TemplateSyntaxError

from mail.request import FieldError, Invalid

PROJECT = Path(__file__).parent.parent
FOLDER = PROJECT / "templates"
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
    """Returns a template's subject, text and html. Raises `Invalid` and `Broken`."""
    found = _parts.__wrapped__ if environment().auto_reload else _parts
    return found(environment(), template_id)


@lru_cache(maxsize=1000)  # but for a template that there is not, for one may come
def _parts(_: Environment, template_id: str) -> list[Template | None]:
    there = _there(template_id) if re.fullmatch(r"[A-Za-z0-9_-]{1,64}", template_id) else []
    if not there and template_id not in ids():
        known = ", ".join(ids())
        raise Invalid(FieldError("template.id", f"must be one of {known}" if known else "there is no template"))
    Invalid.raise_if(FieldError("template.id", fault) for fault in _missing_parts(template_id, there))
    return [_loaded(f"{template_id}/{name}") if name in there else None for name in (SUBJECT, *BODIES)]


def ids() -> list[str]:
    return sorted({path.parent.name for name in (SUBJECT, *BODIES) for path in FOLDER.glob(f"*/{name}")})


def files(template_id: str) -> list[Path]:
    """Returns the files of a template that there are."""
    return [FOLDER / template_id / name for name in _there(template_id)]


def _there(template_id: str) -> list[str]:
    """Returns the names of the files that a template has."""
    return [name for name in (SUBJECT, *BODIES) if os.path.isfile(f"{FOLDER}/{template_id}/{name}")]


def source(template_id: str) -> tuple[str | None, ...]:
    """Returns (subject, text, html) as they are written. Raises `Invalid` and `Broken`."""
    files = (Path(part.filename or "") if part else None for part in parts(template_id))
    return tuple(file.read_text("utf-8").rstrip("\n") if file else None for file in files)


def variables(template_id: str) -> dict[str, str | int | float | None]:
    """Returns the variables that a template uses, each with what stands for it if it is not given; None: it must be.
    Raises `Broken`."""
    found, optional = set[str](), {}
    for tree in _trees(template_id):
        found |= meta.find_undeclared_variables(tree)
        for node in tree.find_all((nodes.Filter, nodes.Test)):
            if node.name in ("default", "d", "defined") and isinstance(node.node, nodes.Name):
                given = getattr(node.args[0], "value", "") if node.args else ""
                optional[node.node.name] = given if isinstance(given, (str, int, float)) else ""
    return {name: optional.get(name) for name in sorted(found)}


def paths(template_id: str) -> set[str]:
    """Returns which parts of its variables a template uses: `order.total`, and `lines[].price` of each in a loop.
    Raises `Broken`."""
    found = set[str]()
    for tree in _trees(template_id):
        called = [call.node for call in tree.find_all(nodes.Call)]  # `name.upper()` is no part of it
        loops = {
            loop.target.name: _path(loop.iter.node if isinstance(loop.iter, nodes.Filter) else loop.iter)  # type: ignore[arg-type]
            for loop in tree.find_all(nodes.For)
            if isinstance(loop.target, nodes.Name)
        }
        for node in tree.find_all((nodes.Name, nodes.Getattr, nodes.Getitem)):
            path, seen = _path(node), set[str]()
            while (head := re.split(r"[.\[]", path)[0]) in loops.keys() - seen:
                path, seen = f"{loops[head]}[]{path[len(head) :]}", seen | {head}
            if not any(node is one for one in called) and "(" not in path:
                found.add(re.sub(r"\[\d+\]", "[]", path))
    return found


def _trees(template_id: str) -> Iterator[nodes.Template]:
    """Yields what the files of a template, and those that they include, say. Raises `Broken`."""
    wanted = [f"{template_id}/{path.name}" for path in files(template_id)]
    for name in wanted:  # grows by what it includes
        _loaded(name)
        yield (tree := _parsed(name))
        wanted += {*environment().list_templates()} & {*meta.find_referenced_templates(tree)} - {*wanted}


def _missing_parts(template_id: str, there: list[str]) -> Iterator[str]:
    for names in ((SUBJECT,), BODIES):
        if not any(name in there for name in names):
            yield f"the folder {shown(template_id)} must hold {' or '.join(names)}"


def shown(name: str) -> str:
    """Returns the path of a file or folder of templates, from the project's own folder on if it is in there."""
    path = FOLDER / name
    return str(path.relative_to(PROJECT) if path.is_relative_to(PROJECT) else path)


def faults() -> list[str]:
    """Returns a sentence for each file that no request could use: its syntax, its encoding, a file that it includes."""
    found: list[str] = []
    for name in environment().list_templates(extensions=["txt", "html"]):
        try:
            _loaded(name)
            found += _missing_files(name)
        except Broken as error:
            found.append(str(error))
    return found + [fault for template_id in ids() for fault in _missing_parts(template_id, _there(template_id))]


def _missing_files(name: str) -> Iterator[str]:
    for node in _parsed(name).find_all((nodes.Include, nodes.Extends, nodes.Import, nodes.FromImport)):
        wanted = getattr(node.template, "value", None)  # type: ignore[attr-defined]  # of a constant
        if not isinstance(wanted, str) or getattr(node, "ignore_missing", False):
            continue
        if ".." in wanted.split("/") or not FOLDER.joinpath(*wanted.split("/")).is_file():
            yield f"{shown(name)}, line {node.lineno}: there is no {shown(wanted)}"


def _parsed(name: str) -> nodes.Template:
    return environment().parse((FOLDER / name).read_text("utf-8"))


def _loaded(name: str) -> Template:
    try:
        return environment().get_template(name)
    except (TemplateSyntaxError, UnicodeDecodeError, OSError) as error:
        raise _broken(error, name) from None


def _broken(error: Exception, name: str) -> Broken:
    match error:
        case TemplateSyntaxError():
            return Broken(f"{shown(error.name or name)}, line {error.lineno}: {error.message}")
        case TemplateNotFound():
            name, line = _last_line(error)
            told = f"{shown(name)}, line {line}: "  # a variable may name the file, and must not be told
            known = (fault for fault in _missing_files(name) if fault.startswith(told))
            return Broken(next(known, f"{told}must include only files that there are"))
        case UnicodeDecodeError():
            return Broken(f"{shown(name)}: must be UTF-8")
    return Broken(f"{shown(name)}: cannot be read: {getattr(error, 'strerror', None)}")


def _last_line(error: Exception) -> tuple[str, int]:
    """Returns in which template, by its name, and in which line of it an exception was raised."""
    frames = [(Path(frame.f_code.co_filename), line) for frame, line in traceback.walk_tb(error.__traceback__)]
    path, line = [one for one in frames if one[0].is_relative_to(FOLDER)][-1]
    return path.relative_to(FOLDER).as_posix(), line


def _rendered(template: Template | None, variables: Mapping[str, Any]) -> str | None:
    if not template:
        return None
    try:
        return template.render(variables).rstrip("\n")
    except (TemplateSyntaxError, TemplateNotFound) as error:
        raise _broken(error, template.name or "") from None
    except (Invalid, *DATA_ERRORS) as error:
        name, line = _last_line(error)
        place = f"{shown(name)}, line {line}"
        if isinstance(error, UndefinedError):
            raise Invalid(_missing(error.message or "", variables, name, line)) from None
        reason = (
            error.errors[0].message
            if isinstance(error, Invalid)
            else f"must suit the template ({type(error).__name__})"
        )
        raise Invalid(FieldError("template.variables", f"{reason}: {place}")) from None


def _missing(message: str, variables: Mapping[str, Any], name: str, line: int) -> FieldError:
    """Returns which variable, or which part of one, a line of a template needs."""
    part = message.rpartition(" ")[2].strip("'")  # "'dict object' has no attribute 'total'"
    variable = re.fullmatch(r"'(\w+)' is undefined", message)
    paths = [variable[1]] if variable else sorted(_members(part, name, line)) or [part]
    text = f"is required by the template: {shown(name)}, line {line}"
    if len(paths) == 1 and (variable or re.split(r"[.\[]", paths[0])[0] in variables):
        return FieldError(f"template.variables.{paths[0]}", text, missing=True)
    return FieldError("template.variables", f"{' or '.join(paths)} {text}", missing=True)


def _members(part: str, name: str, line: int) -> set[str]:
    """Returns what is called `part` in this line, with the variable that it is a part of: `order.total`."""
    found = _parsed(name).find_all((nodes.Getattr, nodes.Getitem))
    paths = {_path(node) for node in found if node.lineno == line}
    return {path for path in paths if path.endswith((f".{part}", f"[{part}]"))}


def _path(node: nodes.Node) -> str:
    match node:
        case nodes.Name():
            return node.name
        case nodes.Getattr():
            return f"{_path(node.node)}.{node.attr}"
        case nodes.Getitem(arg=nodes.Const(value=value)):
            return f"{_path(node.node)}[{value}]" if isinstance(value, int) else f"{_path(node.node)}.{value}"
    return "(...)"
