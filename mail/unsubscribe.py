"""The fields unsubscribe_url and unsubscribe_email -> the headers by which a mail program offers to unsubscribe. Pure.

Standards: RFC 2369 (List-Unsubscribe), 8058 (one click), 6068 (mailto).
"""

from __future__ import annotations

import re
from urllib.parse import quote

from mail.address import Mailbox

HTTPS_URL = re.compile(  # RFC 3986, with neither a user nor a fragment
    r"https://[A-Za-z0-9][A-Za-z0-9.-]*(?::[0-9]{1,5})?(?:[/?](?:[A-Za-z0-9._~:/?@!$&'()*+;=-]|%[0-9A-Fa-f]{2})*)?"
)
HEADERS = ("list-unsubscribe", "list-unsubscribe-post")


def https_url(text: str) -> str:
    """Refuses what cannot stand between < and > in List-Unsubscribe, and a comma: some readers take it for the end."""
    if not HTTPS_URL.fullmatch(text):
        told = "must be an https URL in ASCII, such as https://acme.example/leave?who=42, with %2C for a comma"
        raise ValueError(told)
    return text


def headers(url: str | None, box: Mailbox | None) -> dict[str, str]:
    """Returns the headers for a URL, an address, or both."""
    ways = [f"<{url}>"] if url else []
    ways += [f"<mailto:{quote(box.address, safe='+@')}>"] if box else []
    one_click = {"List-Unsubscribe-Post": "List-Unsubscribe=One-Click"} if url else {}
    return {"List-Unsubscribe": ", ".join(ways), **one_click} if ways else {}
