"""Reads REDIS_URL: the address of one Redis, or the Sentinels that know which of several is the primary. Pure.

Form: https://www.iana.org/assignments/uri-schemes/prov/redis; with Sentinels, as other clients write it,
`redis+sentinel://user:password@host:26379,host/name/0`.
"""

from __future__ import annotations

import re
from typing import NamedTuple
from urllib.parse import parse_qsl, unquote, urlencode, urlsplit, urlunsplit

SCHEMES = ("redis", "rediss", "unix", "redis+sentinel", "rediss+sentinel")
SENTINEL_PORT = 26379
MUST_BEGIN = f"must start with {', '.join(f'{one}://' for one in SCHEMES[:-1])} or {SCHEMES[-1]}://"
MUST_BE_URL = "must be a URL: write / # ? : @ in its password as %2F %23 %3F %3A %40"
MUST_NAME = (
    "must name the Sentinels and the primary's name: redis+sentinel://user:password@host:26379,host,host/mymaster/0"
)


class Place(NamedTuple):
    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


class Sentinels(NamedTuple):
    """Where the Sentinels are, what they call the primary, and their own login; with `tls`, all speak TLS."""

    places: tuple[Place, ...]
    name: str
    username: str | None
    password: str | None
    tls: bool


class RedisUrl(NamedTuple):
    """An URL as redis-py reads it, and if Sentinels know the primary's address, these; its host is then a name."""

    plain: str
    sentinels: Sentinels | None = None

    @classmethod
    def parse(cls, url: str) -> RedisUrl:
        """Raises `ValueError` that says what must be true, and nothing of the URL, which holds a password."""
        scheme, slashes, rest = url.partition("://")
        if scheme not in SCHEMES or not slashes:
            raise ValueError(MUST_BEGIN)
        try:
            if not scheme.endswith("+sentinel"):
                _ = urlsplit(f"//{rest}").port
                return cls(url)
            netloc = re.split("[/?#]", rest)[0]  # by hand: Python's later releases take no brackets behind a comma
            parts = urlsplit(f"//{rest.removeprefix(netloc)}")
            given = dict(parse_qsl(parts.query, keep_blank_values=True))
            login, at, hosts = netloc.rpartition("@")
            _ = urlsplit(f"//{login}@")
            places = tuple(dict.fromkeys(map(_place, hosts.split(","))))  # one that is named twice has one voice
        except ValueError:  # its text would quote the password
            raise ValueError(MUST_BE_URL) from None
        name, _, database = unquote(parts.path).strip("/").partition("/")
        if not name or not all(one.host for one in places) or (database and not database.isdigit()):
            raise ValueError(MUST_NAME)
        login_there = (given.pop("sentinel_username", None), given.pop("sentinel_password", None))
        tls = scheme == "rediss+sentinel"
        plain = urlunsplit(
            ("rediss" if tls else "redis", f"{login}{at}primary", f"/{database or 0}", urlencode(given), "")
        )
        return cls(plain, Sentinels(places, name, *login_there, tls))


def _place(text: str) -> Place:
    at = urlsplit(f"//{text.strip()}")
    return Place(at.hostname or "", at.port or SENTINEL_PORT)
