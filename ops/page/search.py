"""What a person asks the list of mails for: `to:ada@example.com state:failed "reset password"`. Pure.

A query is terms, and a mail that it finds meets all of them. It is in the URL of the page it finds, which logs keep, so
what it says of people and subjects is sealed there, with the keyed digest that the index of mails has of addresses:

    to:~0123456789abcdef     an address; what the index finds
    to:~0123456789abcdef~    a word of a name, or of what is before the @ of an address
    subject:~0123456789abcdef    a word of the subject

A domain stays as it is. The words are shown again where a mail that was found has them.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from datetime import datetime, time, timedelta
from typing import Any, NamedTuple
from urllib.parse import urlencode

from mail.address import strict_address
from mail.causes import Cause, of_cause
from mail.index import LAST, first_id, of_sealed, of_tag
from mail.listing import STATES, Wanted
from mail.moments import time_with_zone
from ops.page.words import masked

Digest = Callable[[str], str]  # Index.sealed
Mail = dict[str, Any]

MOST = 20  # terms
LONGEST = 4000  # characters: the patterns take time by their square
TOKEN = re.compile(r'(?:([^\s":]+):\s*)?(?:"([^"]*)"|([^\s"]+))')
MAILBOX = re.compile(r'[^<>:]*<([^\s<>"@]+@[^\s<>"@]+)>[\s,;]*')  # as mail programs write it: Ada <ada@example.com>
ID = re.compile(r"<?([0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12})(?:@[^\s<>]*)?>?", re.IGNORECASE)  # Message-ID, too
SEALED = re.compile(r"~[0-9a-f]{16}(~?)")
TAG = re.compile(r"[A-Za-z0-9_-]{1,256}:[A-Za-z0-9_-]{1,256}")
AGO = re.compile(r"(\d{1,4})([mhd])", re.ASCII)
CLOCK = re.compile(r"(\d\d?):(\d\d)", re.ASCII)
UNITS = {"m": "minutes", "h": "hours", "d": "days"}
TODAY = {"today": 0, "yesterday": 1}  # days ago
WAITING = ("queued", "sending", "delayed")
IN_DOUBT = "in-doubt"  # what the pages call `unknown`
CHOICES = (*(IN_DOUBT if state == "unknown" else state for state in STATES), "waiting")


class NotUnderstood(ValueError):
    """The query is none. The text names the term, and says what must be true of it."""


class Term(NamedTuple):
    name: str
    value: str

    def __str__(self) -> str:
        value = f'"{self.value}"' if re.search(r"\s", self.value) else self.value
        return value if self.name == "subject" and not value.startswith("~") else f"{self.name}:{value}"


class Query(NamedTuple):
    terms: tuple[Term, ...] = ()

    def __str__(self) -> str:
        return " ".join(map(str, self.terms))

    def of(self, name: str) -> list[str]:
        return [term.value for term in self.terms if term.name == name]

    def also(self, name: str, value: str) -> Query:
        """Returns the query with this term, in place of one that may be there once."""
        with suppress(ValueError):
            [value] = READ[name](value)
        term = Term(name, value)
        return Query((*(one for one in self.terms if one != term and (one.name != name or name not in ONCE)), term))


def parse(text: str) -> Query:
    """Returns what is asked for. Raises `NotUnderstood`."""
    if len(text) > LONGEST:
        raise NotUnderstood(f"a search must have at most {LONGEST:,} characters")
    terms = dict[Term, None]()  # each once, in order
    for name, value, given in _tokens(text):
        try:
            terms |= dict.fromkeys(Term(name, one) for one in READ[name](value))
        except ValueError as error:
            raise NotUnderstood(f"{given} {error}") from None
    names = [term.name for term in terms]
    if twice := next((name for name in names if name in ONCE and names.count(name) > 1), ""):
        raise NotUnderstood(f"{twice}: must be given once")
    if "id" in names and len(names) > 1:
        raise NotUnderstood("id: must stand alone, since it names one mail")
    if len(names) > MOST:
        raise NotUnderstood(f"a search must have at most {MOST} terms")
    return Query(tuple(terms))


def _tokens(text: str) -> Iterator[tuple[str, str, str]]:
    """Yields the name and value of each term, and how it was written. Raises `NotUnderstood`."""
    if found := MAILBOX.fullmatch(text):
        text = found[1]
    if text.count('"') % 2:
        raise NotUnderstood(f'{text[text.rindex(chr(34)) :]} must have a second "')
    for token in TOKEN.finditer(text):
        given, name = token[0].strip(), (token[1] or "").lower()
        value = (token[2] if token[2] is not None else token[3]).strip()
        if not value or (value[-1] == ":" and value.lower()[:-1] in READ):
            raise NotUnderstood(f"{given} must be followed by what is searched for")
        if name and name not in READ:
            told = f"{name}: must be one of {', '.join(f'{one}:' for one in READ)}"
            raise NotUnderstood(f'{told}; or in double quotes, to be searched for in the subject: "{given}"')
        yield name or _kind(value, quoted=token[2] is not None), value, given


def _kind(value: str, quoted: bool) -> str:
    """Returns which term a word without a name is."""
    if not quoted and ID.fullmatch(value):
        return "id"
    return "to" if not quoted and re.fullmatch(r"[^@]+@[^@]+", value) else "subject"


def _person(value: str) -> list[str]:
    if SEALED.fullmatch(value):
        return [value]
    if found := MAILBOX.fullmatch(value):
        value = found[1]
    value = value.strip("<>,;").lower()
    if "@" in value.lstrip("@"):
        return [strict_address(value).lower()]
    if "." in value and not re.search(r"\s", value):
        with suppress(ValueError):
            return [strict_address(f"any@{value.lstrip('@')}").rpartition("@")[2]]
    elif found_words := words(value):
        return found_words
    raise ValueError("must be an address, a domain, or a word of a name")


def _subject(value: str) -> list[str]:
    if SEALED.fullmatch(value):
        return [value]
    if found := words(value):
        return found
    raise ValueError("must have a letter or a digit")


def _states(value: str) -> list[str]:
    states = [re.sub(r"[\s_]+", "-", one.strip().lower()) for one in value.split(",")]
    states = [IN_DOUBT if one == "unknown" else one for one in states]
    if not {*states} <= {*CHOICES}:
        raise ValueError(f"must be one of {', '.join(CHOICES)}, or several of them with commas between")
    return [",".join(dict.fromkeys(states))]


def _tag(value: str) -> list[str]:
    if not TAG.fullmatch(value):
        raise ValueError("must be a tag's name and value, such as tag:kind:reset")
    return [value]


def _plain(value: str) -> list[str]:
    if "@" in value:
        raise ValueError("must have no @: it stays in the page's URL, which logs keep")
    return [value]


def _reason(value: str) -> list[str]:
    if found := words(re.sub(r"\S*@\S*", " ", value)):
        return [" ".join(found)]
    raise ValueError("must have a word that is no address, since it stays in the page's URL")


def _id(value: str) -> list[str]:
    if not (found := ID.fullmatch(value)):
        raise ValueError("must be the whole id of a mail, or its Message-ID")
    return [found[1].lower()]


def _moment(value: str) -> list[str]:
    moment(value, datetime(2026, 1, 1))
    return [value]


READ: dict[str, Callable[[str], list[str]]] = {
    **dict.fromkeys(("to", "from"), _person),
    **{"subject": _subject, "state": _states, "tag": _tag, "key": _plain, "id": _id},
    **dict.fromkeys(("before", "after"), _moment),
    "reason": _reason,
}
ONCE = ("state", "key", "id", "before", "after")


def words(text: str) -> list[str]:
    """Returns the words of a text by which it is found."""
    return re.findall(r"[^\W_]+", unicodedata.normalize("NFKC", text).casefold())


def moment(value: str, now: datetime) -> datetime:
    """Returns the moment that `today`, `14:00`, `3h`, a day or a time of RFC 3339 stands for; what has no zone is in
    the machine's. Raises a `ValueError`."""
    lower = value.lower()
    try:
        if lower in TODAY:
            return datetime.combine(now.date() - timedelta(TODAY[lower]), time()).astimezone()
        if found := AGO.fullmatch(lower):
            return (now - timedelta(**{UNITS[found[2]]: int(found[1])})).astimezone()
        if found := CLOCK.fullmatch(value):
            return datetime.combine(now, time(int(found[1]), int(found[2]))).astimezone()
        if re.fullmatch(r"\d{4}-\d\d-\d\d", value, re.ASCII):
            return datetime.fromisoformat(value).astimezone()
        return time_with_zone(value)
    except (ValueError, OverflowError):
        told = "today, yesterday, a time of today (14:00), how long ago (5m, 3h, 2d), or 2026-11-21T12:30:00Z"
        raise ValueError(f"must be a day (2026-11-21), {told}") from None


def sealed(query: Query, digest: Digest) -> Query:
    """Returns the query as it may be in a URL."""

    def seal(name: str, value: str) -> str:
        if SEALED.fullmatch(value) or name not in ("to", "from", "subject"):
            return value
        if name == "subject" or "@" in value:
            return f"~{digest(value)}"
        return value if "." in value else f"~{digest(value)}~"

    return Query(tuple(term._replace(value=seal(*term)) for term in query.terms))


def unsealed(query: Query, mail: Mail, digest: Digest, show_addresses: bool) -> Query:
    """Returns the query with the words, and where they are shown the addresses, that a mail it has found tells."""
    if not any(SEALED.fullmatch(term.value) for term in query.terms):
        return query
    subject = mail["subject"] if show_addresses else masked(mail["subject"])
    known = {("subject", f"~{digest(word)}"): word for word in words(subject)}
    for name in ("to", "from") if show_addresses else ():
        for called, address in _boxes(mail, name):
            known |= {(name, f"~{digest(word)}~"): word for word in words(called)}
            known[name, f"~{digest(address)}"] = address
    return Query(tuple(term._replace(value=known.get(term, term.value)) for term in query.terms))


def wanted(query: Query, digest: Digest, now: datetime, known: Iterable[Cause] = ()) -> Wanted:
    """Returns what a query that is sealed asks mail.listing for. `known` are the causes among which a reason is."""
    places = [[of_sealed(value[1:])] for value in query.of("to") if (found := SEALED.fullmatch(value)) and not found[1]]
    places += [[of_tag(tag)] for tag in query.of("tag")]
    if asked := query.of("reason"):
        places.append([of_cause(one.state, one.reason) for one in known if all(_has(one.reason, it) for it in asked)])
    states = {one for value in query.of("state") for one in value.split(",")}
    if "waiting" in states:
        states |= {*WAITING}
    above, below = (
        [first_id(moment(value, now).timestamp()) for value in query.of(name)] for name in ("after", "before")
    )
    return Wanted(
        states=frozenset("unknown" if one == IN_DOUBT else one for one in states - {"waiting"}),
        key="".join(query.of("key")),
        places=tuple(places),
        test=lambda mail: all(_meets(mail, *term, digest) for term in query.terms),
        above=max(above, default=b""),
        below=min(below, default=LAST),
    )


def _meets(mail: Mail, name: str, value: str, digest: Digest) -> bool:
    """Returns whether a mail meets a term that the index alone does not settle."""
    if name == "tag":
        return any(f"{tag['name']}:{tag['value']}" == value for tag in mail["tags"])
    if name == "reason":
        return _has(mail["reason"] or "", value)
    if name == "subject":
        return value[1:] in map(digest, words(mail["subject"]))
    if name not in ("to", "from"):
        return True
    found = SEALED.fullmatch(value)
    if not found:
        return any(f".{address.rpartition('@')[2]}".endswith(f".{value}") for _, address in _boxes(mail, name))
    if found[1]:
        return any(value[1:-1] == digest(word) for called, _ in _boxes(mail, name) for word in words(called))
    return any(value[1:] == digest(address) for _, address in _boxes(mail, name))


def _has(reason: str, asked: str) -> bool:
    return {*words(asked)} <= {*words(reason)}


def _boxes(mail: Mail, name: str) -> Iterator[tuple[str, str]]:
    """Yields how each mailbox is called, and its address."""
    for box in [mail["from"]] if name == "from" else mail["to"] + mail["cc"] + mail["bcc"]:
        named, _, rest = box.rpartition("<")
        address = rest.rstrip(">").lower()
        yield f"{named} {address.rpartition('@')[0]}", address


def found_at(query: Query, **cursor: str) -> str:
    """Returns the URL of the page that a sealed query finds."""
    asked = urlencode({**({"q": str(query)} if query.terms else {}), **cursor}, safe=":,~")
    return f"/mail/activity?{asked}" if asked else "/mail/activity"


def alike(reason: str, state: str) -> str:
    """Returns the URL of the mails in this state for this reason."""
    return found_at(Query((Term("reason", reason.replace('"', " ")), Term("state", state))))
