"""Reads a file of settings, NAME=value on each line, and refuses whatever two readers could take for two values.

python-dotenv parses; what it would drop, join or change in silence is a fault here: a line that is no assignment, a
quote that is not closed, a backslash within quotes. Nothing is expanded: `$` is a `$`. A value without quotes ends
before a blank and `#`, and the caller learns of it. UTF-8, or UTF-16 with its byte order mark, as Notepad writes it.
"""

from __future__ import annotations

import codecs
import io
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from dotenv.parser import Binding, parse_stream

FORM = "must be NAME=value, with the whole value in single quotes if it has quotes or # in it"


class Unreadable(Exception):
    """The file cannot be read as it was meant. `faults` holds a sentence for each line that is wrong; none has a value
    in it."""

    def __init__(self, faults: list[str]) -> None:
        super().__init__("\n".join(faults))
        self.faults = faults


class Assignment(NamedTuple):
    name: str
    value: str
    line: int
    comment: bool  # behind a value without quotes, where a `#` may be meant to belong to it


def read(path: Path) -> list[Assignment]:
    """Returns the file's assignments in its order; none if there is no file. Raises `Unreadable`, `OSError`."""
    try:
        text = _decoded(path.read_bytes())
    except FileNotFoundError:
        return []
    except UnicodeDecodeError as error:
        line = bytes(error.object[: error.start]).count(b"\n") + 1
        raise Unreadable([f"{path.name} line {line}: it must be UTF-8 text"]) from None
    bindings = list(parse_stream(io.StringIO(text)))
    faults = [f"{path.name} line {_line(one)}: {_name(one)} {fault}" for one in bindings for fault in _faults(one)]
    if faults:
        raise Unreadable(faults)
    return [Assignment(one.key, one.value or "", _line(one), _has_comment(one)) for one in bindings if one.key]


def _decoded(data: bytes) -> str:
    utf16 = data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    return data.decode("utf-16" if utf16 else "utf-8-sig")


def _line(binding: Binding) -> int:
    """Returns the number of the line on which the assignment begins; the parser counts from the blank lines before."""
    text = binding.original.string
    return binding.original.line + len(re.findall("\r\n|\n|\r", text[: len(text) - len(text.lstrip())]))


def _name(binding: Binding) -> str:
    """Returns what the sentence is about: a setting's name, but no word of a line that is none."""
    name = re.match(r"\s*(?:export\s+)?([A-Z][A-Z0-9_]*)\s*=", binding.original.string)
    return name[1] if name else "it"


def _written(binding: Binding) -> str:
    """Returns what stands behind the first `=`."""
    return binding.original.string.partition("=")[2].strip()


def _faults(binding: Binding) -> Iterator[str]:
    written = _written(binding)
    if binding.error or (binding.key and binding.value is None):
        yield FORM
    elif "\n" in written:
        yield "must have its closing quote on the same line"
    elif written[:1] in ("'", '"') and "\\" in written[1 : written.rindex(written[0])]:
        yield "must have no backslash within quotes, where it may mean another character"
    elif any(ord(character) < 32 and character != "\t" for character in binding.value or ""):
        yield "must have no control character"


def _has_comment(binding: Binding) -> bool:
    written = _written(binding)
    return written[:1] not in ("'", '"') and written != binding.value
