"""The mails that were accepted, newest first, page by page: `GET /emails`, and the page of them at /mail/."""

from __future__ import annotations

import uuid
from collections.abc import Callable
from typing import Any, NamedTuple

from mail.index import LAST, of_state, of_tag
from mail.outbox import Outbox
from mail.states import SCHEDULED, State

STATES = (*(state.value for state in State), SCHEDULED)
AT_ONCE = 100  # mails read in one go where most may be others than those that are wanted


class Wanted(NamedTuple):
    """Says which mails a page is to show; what is empty stands for any. `places` are more lists of the index in each of
    which they are, `test` says what else is true of them. `above` and `below` are ids between which they are, in bytes;
    `upwards` asks for those next to `above`. `keep` makes of each what the page keeps of it. `look` is after how many
    mails that are read the search stops (0: never); one with many recipients counts as more."""

    to: str = ""
    states: frozenset[str] = frozenset()
    tag: str = ""
    key: str = ""
    places: tuple[list[bytes], ...] = ()
    test: Callable[[dict[str, Any]], bool] | None = None
    keep: Callable[[dict[str, Any]], dict[str, Any]] = dict
    above: bytes = b""
    below: bytes = LAST
    upwards: bool = False
    limit: int = 20
    look: int = 0


class Page(NamedTuple):
    """Up to `limit` mails, the newest first, and whether there are more of them; `stopped` is the id, in bytes, at
    which a search ended that was to go no further, and b"" where all was looked through."""

    mails: list[dict[str, Any]]
    more: bool = False
    stopped: bytes = b""


def page(outbox: Outbox, wanted: Wanted) -> Page:
    """Returns the page that is wanted. Raises `Unavailable`."""
    found, looked, prefixes = list[dict[str, Any]](), 0, _prefixes(outbox, wanted)
    most = wanted.limit + 1
    while True:
        ids = outbox.index.nearest(prefixes, wanted.above, wanted.below, most, wanted.upwards)
        for mail in outbox.read_all([str(uuid.UUID(bytes=one)) for one in ids]):
            if _is_wanted(mail, wanted):
                if len(found) == wanted.limit:
                    return Page(_in_order(found, wanted), more=True)
                found.append(wanted.keep(mail))
            looked += len(mail["recipients"]) // 10
        looked += len(ids)
        if len(ids) < most:
            return Page(_in_order(found, wanted))
        if 0 < wanted.look <= looked:
            return Page(_in_order(found, wanted), stopped=ids[-1])
        wanted = wanted._replace(above=ids[-1]) if wanted.upwards else wanted._replace(below=ids[-1])
        most = max(most, AT_ONCE)


def _in_order(found: list[dict[str, Any]], wanted: Wanted) -> list[dict[str, Any]]:
    return found[::-1] if wanted.upwards else found


def _prefixes(outbox: Outbox, wanted: Wanted) -> list[bytes]:
    """Returns where in the index to look: in the shortest of the lists in which all that is wanted is."""
    lists = [*wanted.places, *([[outbox.index.of_address(wanted.to)]] if wanted.to else [])]
    lists += [[of_tag(wanted.tag)]] if wanted.tag else []
    if wanted.states or wanted.key or not lists:
        names = {wanted.key} if wanted.key else outbox.index.names() | {key.name for key in outbox.settings.api_keys}
        lists.append([of_state(state, name) for state in wanted.states or STATES for name in names])
    return min(lists, key=outbox.index.size) if len(lists) > 1 else lists[0]


def _is_wanted(mail: dict[str, Any], wanted: Wanted) -> bool:
    """Returns whether a mail is what the index took it for: it may have moved on, and members are shortened."""
    tags = [f"{tag['name']}:{tag['value']}" for tag in mail["tags"]]
    addresses = [one["address"].lower() for one in mail["recipients"]]
    return (
        (not wanted.to or wanted.to.lower() in addresses)
        and (not wanted.tag or wanted.tag in tags)
        and (not wanted.states or mail["status"] in wanted.states)
        and (not wanted.key or wanted.key == mail["key"])
        and (not wanted.test or wanted.test(mail))
    )
