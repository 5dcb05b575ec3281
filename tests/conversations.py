"""What the tests of smtp/ share: relays to send a mail to, and one conversation from begin to finish."""

from __future__ import annotations

import ssl
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import trustme

from smtp.envelope import Envelope
from smtp.policy import Phase, Verdict
from smtp.pool import SessionPool
from smtp.relay import Relay
from smtp.session import Session
from smtp.verdict import Outcome, Reply
from tests.scripted_relay import Script, ScriptedRelay
from tests.smtp_samples import ADA, MIME, SENDER

POOL = SessionPool()
ANSWERS = {  # a step of a scripted relay -> the phase that its answer belongs to, and the verdict if it is missing
    "GREETING": (Phase.GREETING, Verdict.TROUBLE),
    "EHLO": (Phase.HELLO, Verdict.TROUBLE),
    "STARTTLS": (Phase.STARTTLS, Verdict.TROUBLE),
    "AUTH": (Phase.AUTH, Verdict.TROUBLE),
    "MAIL": (Phase.MAIL, Verdict.TROUBLE),
    "RCPT": (Phase.RCPT, Verdict.TROUBLE),
    "DATA": (Phase.DATA, Verdict.TROUBLE),
    "BODY": (Phase.TRANSFER, Verdict.TRY_AGAIN),
    ".": (Phase.DOT, Verdict.IN_DOUBT),
}


def write_ca(authority: trustme.CA, directory: Path) -> str:
    path = directory / "ca.pem"
    authority.cert_pem.write_to_path(str(path))
    return str(path)


def server_context(authority: trustme.CA, name: str = "127.0.0.1", **options: Any) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert(name, **options).configure_cert(context)
    return context


def at(port: int, **changes: Any) -> Relay:
    plain = Relay("127.0.0.1", port, "none", None, None, None, timeout=5, deadline=10, ehlo_name="client.example")
    if "login" in changes:
        changes["username"], changes["password"] = changes.pop("login")
    return plain._replace(**changes)


def attempt(to: Relay, *recipients: str, **options: Any) -> Outcome:
    """Sends a mail on a session of its own."""
    try:
        return another(to, *recipients, **options)
    finally:
        POOL.close_all()


def another(
    to: Relay,
    *recipients: str,
    sender: str = SENDER,
    mime: bytes = MIME,
    smtputf8: bool = False,
    eight_bit: bool = False,
    before_dot: Callable[[Mapping[str, Reply]], object] = lambda replies: None,
) -> Outcome:
    """Sends a mail, as mail.delivery does, on the session that the last one left, if it left any."""
    with POOL.conversation(to) as talk:
        said = talk.begin(Envelope(sender, recipients or (ADA,), smtputf8, eight_bit), mime)
        while not isinstance(said, Outcome):
            before_dot(said)
            said = talk.finish()
        return said


@contextmanager
def opened(to: Relay) -> Iterator[Session]:
    with POOL.conversation(to) as talk:
        talk.session.open()
        yield talk.session


def fate(outcome: Outcome) -> tuple[Phase, int | None, Verdict]:
    """Returns what became of an attempt that met all recipients alike."""
    assert set(outcome.recipients.values()) == {outcome.reply}
    return outcome.reply.phase, outcome.reply.code, outcome.reply.verdict


@contextmanager
def took_less_than(seconds: float) -> Iterator[None]:
    start = time.monotonic()
    yield
    assert time.monotonic() - start < seconds


@contextmanager
def served(
    script: Script | None = None,
    *,
    offers: Sequence[str] = (),
    tls: ssl.SSLContext | None = None,
    latency: float = 0,
    **changes: Any,
) -> Iterator[tuple[ScriptedRelay, Relay]]:
    """Runs a relay, and says QUIT on the sessions that are left before it ends. Yields it and the way to it, which has
    the `changes` of `at`."""
    implicit = changes.get("security") == "tls"
    with ScriptedRelay(script, offers=offers, tls=tls, implicit=implicit, latency=latency) as there:
        try:
            yield there, at(there.port, **changes)
        finally:
            POOL.close_all()


def meet(script: Script | None = None, *recipients: str, **options: Any) -> tuple[ScriptedRelay, Outcome]:
    """Sends a mail to a relay, with the options of `served` and `another`. Returns the relay, with all that it has
    heard, and the outcome."""
    mail = {
        name: options.pop(name) for name in ("sender", "mime", "smtputf8", "eight_bit", "before_dot") if name in options
    }
    with served(script, **options) as (there, to):
        return there, another(to, *recipients, **mail)
