"""Checks that the mailboxes of BOUNCE_IMAP_URL and DOUBT_IMAP_URL can be read, and that the relay lets BOUNCE_ADDRESS
pass. Says nothing of who logs in there."""

from __future__ import annotations

from mail import imap
from ops.checks.findings import Findings, fault, note, ok, warn
from ops.checks.target import Target
from settings import Settings

NOT_SET = "BOUNCE_IMAP_URL is not set: nobody reads what comes back but you, or POST /inbound/dsn"


# Gmail puts the account's own address there, Microsoft refuses the mail.
OWN_RETURN_PATH = ("smtp.gmail.com", "smtp.office365.com", "outlook.office365.com")


def readable(target: Target, settings: Settings) -> Findings:
    for relay in settings.all_relays if settings.bounce_address else ():
        if relay.host in OWN_RETURN_PATH:
            yield warn(f"BOUNCE_ADDRESS is set, and {relay.host} allows no return path but its own", target.edit)
    if not settings.bounce_imap_url:
        yield note(NOT_SET)
    for name in ("bounce_imap_url", "doubt_imap_url"):
        if url := getattr(settings, name):
            try:
                with imap.opened(url.get_secret_value(), readonly=True, timeout=target.timeout):
                    yield ok(f"the mailbox of {name.upper()} can be read")
            except imap.Unreachable as error:
                yield fault(f"{name.upper()}: {error}", f"{name.upper()}: {target.edit}")
