"""The mails that were accepted, newest first, page by page: `GET /emails`."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from typing import Any, NamedTuple

from mail.index import LAST, of_state, of_tag
from mail.outbox import Outbox
from mail.states import SCHEDULED, State

STATES = (*(state.value for state in State), SCHEDULED)
AT_ONCE = 100  # mails read in one go where most may be others than those that are wanted


class Wanted(NamedTuple):
    """Says which mails a page is to show; "" stands for any. `above` and `below` are ids between which they are, in
    bytes; `upwards` asks for those next to `above`."""

    to: str = ""
    status: str = ""
    tag: str = ""
    key: str = ""
    above: bytes = b""
    below: bytes = LAST
    upwards: bool = False
    limit: int = 20


def page(outbox: Outbox, wanted: Wanted) -> tuple[list[dict[str, Any]], bool]:
    """Returns up to `limit` mails, the newest first, and whether there are more of them. Raises `Unavailable`."""
    found: list[dict[str, Any]] = []
    for mail in _matching(outbox, wanted):
        if len(found) == wanted.limit:
            return _in_order(found, wanted), True
        found.append(mail)
    return _in_order(found, wanted), False


def _in_order(found: list[dict[str, Any]], wanted: Wanted) -> list[dict[str, Any]]:
    return found[::-1] if wanted.upwards else found


def _matching(outbox: Outbox, wanted: Wanted) -> Iterator[dict[str, Any]]:
    prefixes = _prefixes(outbox, wanted)
    most = AT_ONCE if sum(map(bool, (wanted.to, wanted.tag, wanted.status))) > 1 else wanted.limit + 1
    while True:
        ids = outbox.index.nearest(prefixes, wanted.above, wanted.below, most, wanted.upwards)
        for mail in outbox.read_all([str(uuid.UUID(bytes=one)) for one in ids]):
            if _is_wanted(mail, wanted):
                yield mail
        if len(ids) < most:
            return
        wanted = wanted._replace(above=ids[-1]) if wanted.upwards else wanted._replace(below=ids[-1])


def _prefixes(outbox: Outbox, wanted: Wanted) -> list[bytes]:
    """Returns where in the index to look: in the shortest of the lists in which all that is wanted is."""
    lists = [[outbox.index.of_address(wanted.to)]] if wanted.to else []
    lists += [[of_tag(wanted.tag)]] if wanted.tag else []
    if wanted.status or wanted.key or not lists:
        names = {wanted.key} if wanted.key else outbox.index.names() | {key.name for key in outbox.settings.api_keys}
        states = [wanted.status] if wanted.status else STATES
        lists.append([of_state(state, name) for state in states for name in names])
    return min(lists, key=outbox.index.size) if len(lists) > 1 else lists[0]


def _is_wanted(mail: dict[str, Any], wanted: Wanted) -> bool:
    """Returns whether a mail is what the index took it for: it may have moved on, and members are shortened."""
    tags = [f"{tag['name']}:{tag['value']}" for tag in mail["tags"]]
    addresses = [one["address"].lower() for one in mail["recipients"]]
    return (
        (not wanted.to or wanted.to.lower() in addresses)
        and (not wanted.tag or wanted.tag in tags)
        and (not wanted.status or wanted.status == mail["status"])
        and (not wanted.key or wanted.key == mail["key"])
    )
