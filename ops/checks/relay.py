"""The relay: its name, its port, TLS, the login. As the worker does it, up to where a mail would begin.

The session is smtp.session's own, so what is found here is what a mail would meet; nothing is sent. Only where no
connection comes about the other ports are tried, for a provider or a firewall that closes one often leaves another.
RFC 5321 (SMTP), 8314 (ports and TLS), 4954 (AUTH)
"""

from __future__ import annotations

import re
import socket
import ssl
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

from ops.checks import replies
from ops.checks.findings import FAULT, Finding, Findings, Place, fault, note, ok, warn
from settings import Settings, is_loopback
from smtp.relay import Relay
from smtp.session import Session, Stopped

SOON = 14 * 86400  # seconds before a certificate ends
WHOLE = 6  # times `patience`: the longest that a conversation may take
TALKS_TLS = (465, 2465)


def lets_us_in(place: Place) -> Findings:
    assert place.settings
    host, number = place.settings.smtp_host, place.settings.smtp_port
    if not host:
        yield not_set(place)
        return
    reached = list(port(host, number, place))
    yield from reached
    if not any(one.level == FAULT for one in reached):
        yield from login(Relay.of(place.settings), place)


def port(host: str, wanted: int, place: Place) -> Findings:
    """The name resolves, and its port answers."""
    try:
        addresses = sorted({str(one[4][0]) for one in socket.getaddrinfo(host, wanted, type=socket.SOCK_STREAM)})
    except OSError:
        mend = f"correct SMTP_HOST ({place.edit}); if other names fail too: resolvectl status"
        yield fault(f"the name {host} cannot be resolved", mend)
        return
    outcomes = {address: connect(address, wanted, place.patience) for address in addresses}
    dead = {address: outcome for address, outcome in outcomes.items() if outcome != ANSWERS}
    if len(dead) == len(outcomes):
        outcome = ", ".join(sorted(set(dead.values())))
        yield fault(f"{host} does not answer on port {wanted}: {outcome}", another_port(host, wanted, outcome, place))
    elif dead:
        yield note(f"{host}:{wanted} answers, but not at {', '.join(dead)} ({', '.join(sorted(set(dead.values())))})")
    else:
        yield ok(f"{host}:{wanted} answers")


def not_set(place: Place) -> Finding:
    if place.installed:
        return fault("SMTP_HOST is not set, so no mail can go out", place.edit)
    return note("SMTP_HOST is not set; bin/dev catches the mail itself")


ANSWERS, SILENT, REFUSED = "answers", "silent, as behind a firewall", "refused, nothing listens there"


def connect(host: str, number: int, patience: float) -> str:
    try:
        socket.create_connection((host, number), timeout=patience).close()
    except TimeoutError:
        return SILENT
    except ConnectionRefusedError:
        return REFUSED
    except OSError as error:
        return (error.strerror or type(error).__name__).lower()
    return ANSWERS


def another_port(host: str, wanted: int, outcome: str, place: Place) -> str:
    open_ones = answering(host, [one for one in place.smtp_ports if one != wanted], place.patience)
    if open_ones:
        best = next((one for one in (587, 2587, 2525, 465, 2465) if one in open_ones), open_ones[0])
        security = "tls" if best in TALKS_TLS else "starttls"
        listed = ", ".join(map(str, open_ones))
        return f"SMTP_PORT={best} and SMTP_SECURITY={security}, for it answers on {listed}: {place.edit}"
    if wanted == 25:
        return (
            "SMTP_PORT=587: Amazon EC2 and most clouds block 25. No other port answers either: see SMTP_HOST, firewall"
        )
    if outcome == REFUSED:
        return f"no other usual port answers either: correct SMTP_HOST and SMTP_PORT ({place.edit})"
    return f"let TCP to port {wanted} out (security group, firewall); no other usual port answers either"


def answering(host: str, ports: Sequence[int], patience: float) -> list[int]:
    with ThreadPoolExecutor(len(ports) or 1) as pool:
        outcomes = pool.map(lambda one: connect(host, one, patience), ports)
        return [one for one, outcome in zip(ports, outcomes, strict=True) if outcome == ANSWERS]


def login(to: Relay, place: Place) -> Findings:
    """Greeting, EHLO, TLS and AUTH of the worker's own session; then QUIT."""
    assert place.settings
    with session(to, place.patience) as one:
        try:
            one.open()
        except Stopped as stopped:
            meaning, mend = replies.explain(to.host, stopped.reply)
            yield fault(f"{to}: {summary(stopped)}: {meaning}", f"{mend}; {place.edit}")
            yield from password_looks(place.settings)
            return
        yield from came_about(one, place)


@contextmanager
def session(to: Relay, patience: float) -> Iterator[Session]:
    """Bounded as a whole, too: a relay that drips a byte a second must not hold the doctor."""
    one = Session(to._replace(timeout=min(to.timeout, patience)))
    limit = threading.Timer(WHOLE * patience, one.abort)
    limit.start()
    try:
        yield one
    finally:
        limit.cancel()
        one.close()


def summary(stopped: Stopped) -> str:
    """Code and phase, with the enhanced code (RFC 3463) where there is one, and none of the relay's words."""
    enhanced = re.match(r"[245]\.\d{1,3}\.\d{1,3}\b", stopped.reply.text)
    return f"{stopped.reply.summary} ({enhanced[0]})" if enhanced else stopped.reply.summary


def came_about(one: Session, place: Place) -> Findings:
    current, line = place.settings, one.smtp.sock
    assert current
    if isinstance(line, ssl.SSLSocket):
        yield from certificate(line, one.relay)
    elif not is_loopback(one.relay.host):
        yield warn("mail goes to the relay in clear", f"SMTP_SECURITY=starttls; {place.edit}")
    if one.relay.username:
        yield ok(f"{one.relay} accepts our login")
    elif one.smtp.has_extn("auth") and not is_loopback(one.relay.host):
        found = f"{one.relay} offers a login and SMTP_USERNAME is not set: it may refuse mail for others"
        yield warn(found, f"SMTP_USERNAME and SMTP_PASSWORD: {place.edit}")
    else:
        yield ok(f"{one.relay} lets us in without a login")
    if re.search(replies.MICROSOFT, one.relay.host.lower()) and current.worker_concurrency > 3:
        found = f"Microsoft 365 lets a mailbox have 3 connections, WORKER_CONCURRENCY is {current.worker_concurrency}"
        yield warn(found, f"WORKER_CONCURRENCY=3; {place.edit}")


def certificate(line: ssl.SSLSocket, relay: Relay) -> Findings:
    shown = line.getpeercert() or {}
    ends = ssl.cert_time_to_seconds(str(shown["notAfter"]))
    days = int((ends - time.time()) / 86400)
    if ends - time.time() < SOON:
        yield warn(
            f"the certificate of {relay} ends in {days} days", "tell the relay's operator; no mail goes after that"
        )
    else:
        yield ok(f"{line.version()}, and the certificate of {relay} is right for {days} more days")


def password_looks(current: Settings) -> Findings:
    """What can be seen of a login without showing it."""
    password = current.smtp_password.get_secret_value() if current.smtp_password else ""
    host, username = (current.smtp_host or "").lower(), current.smtp_username or ""
    if re.search(r"\s", password):
        yield note(
            "SMTP_PASSWORD has spaces in it", "Google shows app passwords with spaces; write the 16 letters alone"
        )
    elif re.search(replies.GMAIL, host) and not re.fullmatch(r"[a-z]{16}", password):
        yield note("SMTP_PASSWORD does not look like an app password, which is 16 small letters", replies.APP_PASSWORD)
    if re.search(replies.SES, host) and (len(password) == 40 or not username.startswith("AKIA")):
        found = "SMTP_USERNAME or SMTP_PASSWORD looks like an IAM key or a login to the console"
        yield note(found, "SES console > SMTP settings > Create SMTP credentials")
