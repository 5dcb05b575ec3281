"""Finds out who asks: the API key of a request, what it may do, how often, and from whom it may send."""

from __future__ import annotations

import math
from collections.abc import Callable

from bottle import request

from mail.address import Mailbox
from mail.request import FieldError, Invalid
from process.api_keys import ApiKey, find_key
from process.values import Rate
from queues.limits import Limits
from web.errors import Refusal


def authenticate(keys: tuple[ApiKey, ...], scope: str) -> ApiKey:
    """Returns the caller's key. Raises `Refusal`."""
    scheme, _, secret = request.environ.get("HTTP_AUTHORIZATION", "").partition(" ")
    if scheme.lower() != "bearer" or not secret:
        text = "the request must carry an API key: Authorization: Bearer <key>"
        raise Refusal(401, "missing_api_key", text, headers={"WWW-Authenticate": "Bearer"})
    found = find_key(keys, secret.strip(" ").encode("latin-1"))  # WSGI's way to hand over bytes
    if not found:
        raise Refusal(403, "invalid_api_key", "this API key is not known")
    if scope == "full" and found.scope != "full":
        text = "this API key may only submit mail, and read, move and cancel what it submitted"
        raise Refusal(401, "restricted_api_key", text)
    return found


def hold_to_its_domains(key: ApiKey, sender: Mailbox) -> None:
    """Raises `Invalid`, which is a 403 then, if the key may not send from this domain."""
    if not key.may_send_from(sender.address):
        told = f"must be an address at {' or '.join(key.domains)}: this API key may send from nowhere else"
        raise Invalid(FieldError("from", told, forbidden=True))


def hold_to_relays(key: ApiKey, relay: str, names: Callable[[], list[str]]) -> None:
    """Raises `Invalid` if there is no such relay, or, which is a 403 then, if the key may not choose one."""
    if key.scope != "full":
        told = "must be left out: only an API key of scope full may choose the relay"
        raise Invalid(FieldError("relay", told, forbidden=True))
    if relay not in (known := names()):
        raise Invalid(FieldError("relay", f"must be one of {', '.join(known)}"))


def hold_to_the_list(key: ApiKey) -> None:
    """Raises `Invalid`, which is a 403 then, if the key may not send to suppressed addresses."""
    if key.scope != "full":
        told = "must be left out: only an API key of scope full may send to suppressed addresses"
        raise Invalid(FieldError("skip_suppression", told, forbidden=True))


def hold_to_its_rate(key: ApiKey, limits: Limits) -> None:
    """Raises `Refusal` (429, RFC 6585) if the key has made as many requests as it may."""
    wait = limits.take(f"key:{key.name}", key.rate) if key.rate else 0
    if key.rate and wait:
        seconds = str(math.ceil(wait))
        text = f"this API key may make {key.rate} requests; send this again in {seconds} seconds"
        raise Refusal(429, "rate_limit_exceeded", text, headers=rate_headers(key.rate, seconds))


def rate_headers(rate: Rate, seconds: str) -> dict[str, str]:
    """Returns the headers of a 429, under the names that clients of Resend's API read."""
    told = {"limit": str(rate.most), "policy": f"{rate.most};w={rate.seconds}", "remaining": "0", "reset": seconds}
    return {"Retry-After": seconds, **{f"RateLimit-{name}": value for name, value in told.items()}}
