"""The forms in which real clients write a field, each turned into our one form before it is checked. Pure.

Changes nothing of what a mail says and refuses nothing by itself but octets that are none: what it does not know it
returns as it came, and `request.py` names what is wrong with it.
"""

from __future__ import annotations

import base64
import mimetypes
import re
from html import escape
from typing import Any
from urllib.parse import quote


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
    changed = {written: new for old, new in ids.items() if old != new for written in (old, quote(old), escape(old))}
    if not html or not changed:
        return html
    longest_first = sorted(changed, key=len, reverse=True)
    pattern = "cid:(" + "|".join(map(re.escape, longest_first)) + ")"
    return re.sub(pattern, lambda found: f"cid:{changed[found[1]]}", html)
