"""Tells requests from a program on this machine from those that a page of another site makes its browser send.

Any page may point a name of its own at 127.0.0.1 (DNS rebinding) and then reads whatever listens there; the browser
still writes that name into Host. Any page may also send a form to another site; the browser then says so in
Sec-Fetch-Site or Origin. What works without a secret, or with one that everybody knows, asks both.

RFC 9110, 15.5.20 (421); RFC 6761, 6.3 (localhost); Fetch Metadata (W3C).
"""

from __future__ import annotations

import re
from argparse import ArgumentParser, ArgumentTypeError
from collections.abc import Callable, Collection

from process.values import is_loopback

HOST = re.compile(r"(?:\[([0-9a-f:.]+)\]|([^][:@/\\?#\s]+))(?::[0-9]*)?")
ALLOWED = "the Host must be localhost, 127.0.0.1 or [::1], or a name that --allow-host gives"


def is_local(host: str, allowed: Collection[str] = ()) -> bool:
    """Returns whether a Host is a name of this machine itself, or one of `allowed`, at any port."""
    found = HOST.fullmatch(host.lower())
    name = (found[1] or found[2]) if found else ""
    return is_loopback(name) or name.endswith(".localhost") or name in allowed


def is_same_origin(header: Callable[[str], str | None]) -> bool:
    """Returns whether a browser says that the request comes from a page of this very address."""
    site = header("Sec-Fetch-Site")
    if site is not None:
        return site == "same-origin"
    # Browsers omit it if the page came over plain http from another machine; they always send Origin with a POST.
    _, _, host = (header("Origin") or "").partition("://")
    return bool(host) and host == header("Host")


def add_flag(parser: ArgumentParser) -> None:
    what = "another name under which to be asked, beside localhost; may be given several times"
    parser.add_argument("--allow-host", type=host_name, action="append", default=[], metavar="NAME", help=what)


def host_name(text: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9_-]+(\.[A-Za-z0-9_-]+)*", text):
        raise ArgumentTypeError(f"must be a host's name or address alone, without scheme and port, and is {text!r}")
    return text.lower()
