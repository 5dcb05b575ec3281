"""Turns the forms in which real clients write a field into our one form, before it is checked. Pure.

Changes nothing of what a mail says. Returns a form that it does not know as it came: `request.py` says what is wrong
with it. Raises a `ValueError` only for what no other check could see: octets out of range, a header given twice.
"""

from __future__ import annotations

import base64
import mimetypes
import re
from html import escape
from typing import Any
from urllib.parse import quote

# Headers that mail libraries hand over with the rest, and that say nothing of which this service writes another.
WRITTEN_ANYWAY = re.compile(r"sender|date|message-id|mime-version|content-.*", re.IGNORECASE)
MESSAGE_ID = re.compile(r"<[!-;=?A-~]{1,200}@[!-;=?A-~]{1,200}>")  # that is taken as it is


def request(body: dict[str, Any]) -> dict[str, Any]:
    """Takes null as absent, and an empty `from`, and an empty `subject` beside a template: Go always writes both."""
    fields = {name: value for name, value in body.items() if value is not None}
    empty = {"from", "subject"} if fields.get("template") else {"from"}
    fields.pop("topic_id", None)  # there are no topics, so nobody has left one: the mail is the same without
    return {name: value for name, value in fields.items() if name not in empty or value != ""}


def tag(value: Any) -> Any:
    """Takes Symfony's `{"X-Tag": "welcome"}` as a name and its value."""
    if isinstance(value, dict) and len(value) == 1 and not set(value) & {"name", "value"}:
        [(name, word)] = value.items()
        return {"name": name, "value": word}
    return value


def attachment(value: Any) -> Any:
    """Takes `null` as absent, `filename` also as false, and `inline_content_id` as the older name of `content_id`."""
    if not isinstance(value, dict):
        return value
    one = {name: member for name, member in value.items() if member is not None}
    if one.get("filename") is False:
        del one["filename"]
    if one.get("inline_content_id") == one.get("content_id", one.get("inline_content_id")):
        one = {{"inline_content_id": "content_id"}.get(name, name): member for name, member in one.items()}
    return one


def headers(value: Any) -> Any:
    """Takes PHP's `[]` as no headers, a list of `{name, value}` as an object, and leaves out what this service writes
    in any case: a Message-ID only if it is none. A number becomes its text, and a list one text: of message ids with
    spaces between, else with commas."""
    if isinstance(value, list) and all(isinstance(one, dict) and set(one) == {"name", "value"} for one in value):
        pairs = [(one["name"], one["value"]) for one in value]
        value = dict(pairs) if all(isinstance(name, str) for name, _ in pairs) else value
        if len(value) < len(pairs):
            raise ValueError("must not have a name twice; give the header a list of values")
    if not isinstance(value, dict):
        return value
    return {
        name: header_value(name, member)
        for name, member in value.items()
        if not WRITTEN_ANYWAY.fullmatch(name) or is_message_id(name, member)
    }


def is_message_id(name: str, value: object) -> bool:
    return name.lower() == "message-id" and isinstance(value, str) and bool(MESSAGE_ID.fullmatch(value))


def header_value(name: str, value: Any) -> Any:
    if isinstance(value, list) and value:
        values = [header_value(name, one) for one in value if not isinstance(one, list)]
        glue = " " if name.lower() in ("references", "in-reply-to") else ", "
        return glue.join(values) if all(isinstance(one, str) for one in values) and len(values) == len(value) else value
    return str(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else value


def empty_object(value: object) -> object:
    """Takes PHP's `[]` as `{}`, and null as well."""
    return {} if value in ([], None) else value


def octets_or_base64(value: object) -> object:
    """Takes octets too, as a list (Python, Go, Ruby, Rust) or as Node's JSON of a Buffer."""
    if isinstance(value, dict) and set(value) == {"type", "data"} and value["type"] == "Buffer":
        value = value["data"]
    if not isinstance(value, list):
        return value
    try:
        return base64.b64encode(bytes(value)).decode()
    except (TypeError, ValueError):
        raise ValueError("must be base64, or a list of octets from 0 to 255") from None


def file_name_of(content_type: str) -> str:
    """Returns a name for a file that came without one."""
    ending = mimetypes.guess_extension(content_type.partition(";")[0].strip()) or ".bin"
    return f"attachment{ending}"


def html_with_ids(html: str | None, ids: dict[str, str]) -> str | None:
    """Returns the html with each `cid:` that names an id written as its new one: as text, or percent-encoded."""
    spellings = (str, quote, lambda old: quote(old, safe=""), escape)
    changed = {spell(old): new for old, new in ids.items() if old != new for spell in spellings}
    if not html or not changed:
        return html
    longest_first = sorted(changed, key=len, reverse=True)
    pattern = "cid:(" + "|".join(map(re.escape, longest_first)) + ")"
    return re.sub(pattern, lambda found: f"cid:{changed[found[1]]}", html)
