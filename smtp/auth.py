"""AUTH: which mechanisms are tried, in which order, and what each says. Pure but for `say`.

A wrong password is tried once: with each mechanism it would count as one break-in more. What a relay announces and
then does not take makes room for the next mechanism. Names and passwords go out as UTF-8.
Standards: RFC 4954 (AUTH), 4616 (PLAIN), 2195 (CRAM-MD5), 7628 (OAUTHBEARER). LOGIN has none: it is answered by what
the relay asks for. XOAUTH2 is Google's and Microsoft's.
"""

from __future__ import annotations

import base64
import binascii
import hmac
import json
import re
from collections.abc import Callable, Collection
from contextlib import suppress


class NotOffered(ValueError):
    """The relay offers no mechanism that is known here."""


Reply = tuple[int, bytes]
Say = Callable[[str], Reply]  # sends a line and returns the reply to it

LONGEST_COMMAND = 510  # octets without CRLF (RFC 5321 4.5.3.1.4)
# The mechanism, or its form, is not taken: unknown command, syntax, not implemented, sequence, parameter.
NOT_THIS_WAY = (500, 501, 502, 503, 504)


def log_in(say: Say, offered: Collection[str], username: str, password: str) -> Reply:
    """Returns the reply that decided. Raises `NotOffered`."""
    mechanisms = [name for name in MECHANISMS if name in offered]
    if not mechanisms:
        raise NotOffered("the relay offers no AUTH PLAIN, LOGIN or CRAM-MD5")
    for name in mechanisms:
        reply = MECHANISMS[name](say, username, password)
        if reply[0] == 334:  # it asks for more than the mechanism has: the dialog must be ended (RFC 4954 4)
            reply = say("*")
        if reply[0] not in NOT_THIS_WAY:
            break
    return reply


def log_in_by_token(say: Say, offered: Collection[str], username: str, token: str) -> Reply:
    """Returns the reply that decided; of a refusal, its text ends with the mechanism and the status of its challenge.
    Raises `NotOffered`."""
    mechanisms = [name for name in BY_TOKEN if name in offered]
    if not mechanisms:
        raise NotOffered("the relay offers no AUTH XOAUTH2 or OAUTHBEARER")
    for name in mechanisms:
        response, end = BY_TOKEN[name]
        reply, status = _responded(say, name, _base64(response(username, token))), ""
        if reply[0] == 334:  # it says why not, and waits for an answer before it refuses
            status = _status(reply[1])
            reply = say(end)
            reply = say("*") if reply[0] == 334 else reply
        if reply[0] not in NOT_THIS_WAY:
            break
    return reply if reply[0] == 235 else (reply[0], reply[1] + f" [{name}{status}]".encode())


def _responded(say: Say, name: str, response: str) -> Reply:
    """Gives the response with the command, or to the question where that would be too long."""
    command = f"AUTH {name} {response}"
    if len(command) <= LONGEST_COMMAND:
        reply = say(command)
        return reply if reply[0] != 334 or _decoded(reply[1]).strip() else say(response)
    reply = say(f"AUTH {name}")
    return say(response) if reply[0] == 334 else reply


def _xoauth2(username: str, token: str) -> str:
    return f"user={username}\1auth=Bearer {token}\1\1"


def _oauthbearer(username: str, token: str) -> str:
    return f"n,a={username.replace('=', '=3D').replace(',', '=2C')},\1auth=Bearer {token}\1\1"


def _status(challenge: bytes) -> str:
    """Returns the status in a challenge that is the JSON of an error."""
    with suppress(ValueError, AttributeError, RecursionError):
        found = re.fullmatch(r"[\w.-]{1,40}", str(json.loads(_decoded(challenge)).get("status", "")), re.ASCII)
        return f" {found[0]}" if found else ""
    return ""


def _plain(say: Say, username: str, password: str) -> Reply:
    response = _base64(f"\0{username}\0{password}")
    command = f"AUTH PLAIN {response}"
    reply = say(command if len(command) <= LONGEST_COMMAND else "AUTH PLAIN")
    return say(response) if reply[0] == 334 else reply


def _login(say: Say, username: str, password: str) -> Reply:
    """Waits for each question: a relay that ignores a name given with the command would take the password for it."""
    reply = say("AUTH LOGIN")
    for default in (username, password):
        if reply[0] != 334:
            break
        reply = say(_base64(_asked_for(reply[1], username, password) or default))
    return reply


def _asked_for(challenge: bytes, username: str, password: str) -> str | None:
    question = _decoded(challenge).lower()
    if b"pass" in question:
        return password
    return username if b"user" in question or b"name" in question else None


def _cram_md5(say: Say, username: str, password: str) -> Reply:
    reply = say("AUTH CRAM-MD5")
    if reply[0] != 334:
        return reply
    return say(_base64(f"{username} {hmac.new(password.encode(), _decoded(reply[1]), 'md5').hexdigest()}"))


MECHANISMS: dict[str, Callable[[Say, str, str], Reply]] = {"PLAIN": _plain, "LOGIN": _login, "CRAM-MD5": _cram_md5}
# By token: how the response is written, and what ends the dialog after an error (RFC 7628 3.2.3 has a %x01).
BY_TOKEN: dict[str, tuple[Callable[[str, str], str], str]] = {
    "XOAUTH2": (_xoauth2, ""),
    "OAUTHBEARER": (_oauthbearer, "AQ=="),
}


def _base64(text: str) -> str:
    return base64.b64encode(text.encode()).decode()


def _decoded(challenge: bytes) -> bytes:
    try:
        return base64.b64decode(challenge, validate=True)
    except binascii.Error:
        return challenge  # some ask in plain words
