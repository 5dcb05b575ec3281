"""Reads docs/api.md: what it says of each route, field and error, and its examples, for web/openapi.py.

So the document says what the page says, and is right where the page is: tests/test_api_reference.py runs the examples.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

PAGE = Path(__file__).parent.parent / "docs" / "api.md"
EXAMPLE = re.compile(r"^```sh\n(curl .*?)\n```\n`(\d{3})`\n```json\n(.*?)\n```$", re.DOTALL | re.MULTILINE)
CONSOLE = re.compile(r"^```console\n\$ (curl .*?)\n(.*?)\n```$", re.DOTALL | re.MULTILINE)
FIELDS = re.compile(r"^\| (?:field|parameter) \| \|\n\|---\|---\|\n((?:\|.*\n)+)", re.MULTILINE)


class Section(NamedTuple):
    """What the page says under one heading. `fields` has what it says of each; `sent` is the example's body."""

    text: str
    fields: dict[str, str]
    sent: Any = None
    status: str = ""
    answer: Any = None

    @property
    def summary(self) -> str:
        return re.split(r"\.(?:\s|$)", self.text)[0].replace("\n", " ").replace("`", "")  # it is shown as it is


def sections() -> dict[str, Section]:
    """Returns each section by its heading; a route's is its method and path."""
    _, *parts = re.split(r"^#{2,3} (.+)\n", PAGE.read_text("utf-8"), flags=re.MULTILINE)
    return {heading: section(text) for heading, text in zip(parts[::2], parts[1::2], strict=True)}


def section(text: str) -> Section:
    text = re.sub(r"\[([^]\n]+)\]\([^)\n]+\)", r"\1", text)  # links lead into the page
    fields = {name: told for table in FIELDS.findall(text) for name, told in rows(table)}
    example, plain = EXAMPLE.search(text), FIELDS.sub("", text)
    if not example:
        return Section(plain.strip(), fields)
    body = re.search(r"-d '(.*)'", example[1], re.DOTALL)
    octets = re.search(r"--data-binary '(.*)'", example[1], re.DOTALL)
    sent = json.loads(body[1]) if body else octets and octets[1]
    prose = re.sub(r"\n{3,}", "\n\n", EXAMPLE.sub("", plain)).strip()
    return Section(prose, fields, sent, example[2], json.loads(example[3]))


def rows(table: str) -> Iterator[tuple[str, str]]:
    """Yields each field and what is said of it; several may share a row."""
    for line in table.splitlines():
        _, names, told, _ = re.split(r" *(?<!\\)\| *", line)
        for name in re.findall("`([^`]+)`", names):
            yield name, told.replace("\\|", "|")


def errors() -> list[tuple[str, str, str, str]]:
    """Returns the rows of the page's table of errors: type, name, status, meaning."""
    return re.findall(r"^\| `([a-z_]+)` \| `([a-z_]+)` \| (\d{3}) \| (.*) \|$", PAGE.read_text("utf-8"), re.MULTILINE)
