"""Checks the relay as the worker uses it: name, port, TLS and login, up to where a mail would begin.

The session is smtp.session's own, so what fails here would fail for a mail; nothing is sent. Only if there is no
connection the other usual ports are tried, since a provider or firewall that blocks one often leaves another open.
RFC 5321 (SMTP), 8314 (ports and TLS), 4954 (AUTH)
"""

from __future__ import annotations

import re
import socket
import ssl
import threading
import time
from concurrent.futures import ThreadPoolExecutor

from ops.checks import replies
from ops.checks.findings import FAULT, Findings, fault, note, ok, warn
from ops.checks.target import Target
from process.relays import ONLY, RelaySettings
from process.values import is_loopback
from settings import Settings
from smtp.policy import Phase, Verdict
from smtp.relay import Relay
from smtp.session import Session, Stopped
from upstream.client import Upstream

SOON = 14 * 86400  # seconds before a certificate ends
SESSION = 6  # times `timeout`: the longest that a whole session may take
IMPLICIT_TLS = (465, 2465)  # ports


def login(target: Target, settings: Settings) -> Findings:
    if settings.staging:
        yield note(settings.staging, target.edit)
    for one in settings.all_relays:
        yield from at(one, target, settings)
    if settings.all_relays:
        return
    if not target.has_role("worker"):
        yield note("SMTP_HOST is not set; no mail goes out from this machine, which has no worker")
    elif target.installed:
        yield fault("SMTP_HOST is not set, so no mail can go out", target.edit)
    else:
        yield note("SMTP_HOST is not set; bin/dev has a mail catcher of its own")


def at(one: RelaySettings, target: Target, settings: Settings) -> Findings:
    """Checks one relay. What is found at one of several begins with its name, and names settings as RELAYS does."""
    for each in spoken_to(one, target, settings):
        if one.name != ONLY:
            fix = replies.of_one(each.fix.replace(target.edit, target.edit_relays))
            each = each._replace(found=f"relay {one.name}: {replies.of_one(each.found)}", fix=fix)
        yield each


def spoken_to(one: RelaySettings, target: Target, settings: Settings) -> Findings:
    if one.kind != "smtp":
        yield from upstream(Upstream(one, target.timeout), target)
        return
    reached = list(port(one.host or "", one.port, target))
    yield from reached
    if not any(each.level == FAULT for each in reached):
        yield from session(Relay.of(settings, one), target, settings)


def upstream(there: Upstream, target: Target) -> Findings:
    """Asks an upstream for what needs the key: its mails. A key that may only send is told so, and is good."""
    reply = there.check(SESSION * target.timeout)
    if reply.verdict is Verdict.ACCEPTED or re.match("restricted_api_key", reply.text):
        yield ok(f"{there} accepts our API key")
    elif reply.phase is Phase.CONNECT:
        fix = f"nothing, if it is down; else correct url, and let HTTPS out to it ({target.edit})"
        yield fault(f"{there} cannot be reached: {reply.text}", fix)
    else:
        meaning, fix = replies.explain(str(there), reply)
        yield fault(f"{there}: {reply.summary}: {meaning}", f"{fix}; {target.edit}")


def port(host: str, wanted: int, target: Target) -> Findings:
    """Checks that the name resolves, and that its port answers."""
    try:
        addresses = sorted({str(one[4][0]) for one in socket.getaddrinfo(host, wanted, type=socket.SOCK_STREAM)})
    except OSError as error:
        if error.errno == socket.EAI_AGAIN:
            fix = "cat /etc/resolv.conf names the name servers; let port 53 out to them (UDP and TCP), or name others"
            yield fault(f"no name server answers, so {host} cannot be resolved", fix)
        else:
            yield fault(f"the name {host} cannot be resolved: there is none", f"correct SMTP_HOST ({target.edit})")
        return
    outcomes = {address: connect(address, wanted, target.timeout) for address in addresses}
    dead = {address: outcome for address, outcome in outcomes.items() if outcome != ANSWERS}
    why = ", ".join(sorted(set(dead.values())))
    if len(dead) == len(outcomes):
        yield fault(f"{host} does not answer on port {wanted}: {why}", another_port(host, wanted, why, target))
    elif dead:
        yield note(f"{host}:{wanted} answers, but not at {', '.join(dead)} ({why})")
    else:
        yield ok(f"{host}:{wanted} answers")


ANSWERS, SILENT, REFUSED = "answers", "silent, as behind a firewall", "refused"


def connect(host: str, number: int, timeout: float) -> str:
    try:
        socket.create_connection((host, number), timeout=timeout).close()
    except TimeoutError:
        return SILENT
    except ConnectionRefusedError:
        return REFUSED
    except OSError as error:
        return (error.strerror or type(error).__name__).lower()
    return ANSWERS


def another_port(host: str, wanted: int, outcome: str, target: Target) -> str:
    others = [one for one in target.smtp_ports if one != wanted]
    with ThreadPoolExecutor(len(others) or 1) as pool:
        outcomes = pool.map(lambda one: connect(host, one, target.timeout), others)
        open_ones = [one for one, outcome in zip(others, outcomes, strict=True) if outcome == ANSWERS]
    if open_ones:
        best = next((one for one in (587, 2587, 2525, 465, 2465) if one in open_ones), open_ones[0])
        security = "tls" if best in IMPLICIT_TLS else "starttls"
        listed = ", ".join(map(str, open_ones))
        return f"SMTP_PORT={best} and SMTP_SECURITY={security}, since it answers on {listed}: {target.edit}"
    if wanted == 25:
        return "SMTP_PORT=587: Amazon EC2 and most clouds block 25. No other port answers: see SMTP_HOST, firewall"
    if outcome == REFUSED:
        listens = f"nothing listens there, or a firewall rejects it: correct SMTP_HOST and SMTP_PORT ({target.edit})"
        return f"{listens}, or let TCP to port {wanted} out (sudo nft list ruleset); no other usual port answers either"
    return f"let TCP to port {wanted} out (security group, firewall); no other usual port answers either"


def session(to: Relay, target: Target, settings: Settings) -> Findings:
    """Opens a session as the worker does: greeting, EHLO, TLS, AUTH; then QUIT."""
    one = Session(to._replace(timeout=min(to.timeout, target.timeout)))
    limit = threading.Timer(SESSION * target.timeout, one.abort)  # a relay may send a byte a second
    limit.start()
    try:
        one.open()
        yield from encryption_and_login(one, target, settings)
    except Stopped as stopped:
        meaning, fix = replies.explain(to.host, stopped.reply)
        enhanced = re.match(r"[245]\.\d{1,3}\.\d{1,3}\b", stopped.reply.text)  # RFC 3463
        summary = stopped.reply.summary + (f" ({enhanced[0]})" if enhanced else "")  # none of the relay's words
        yield fault(f"{to}: {summary}: {meaning}", f"{fix}; {target.edit}")
        yield from likely_mistakes(to)
    finally:
        limit.cancel()
        one.close()


def encryption_and_login(one: Session, target: Target, settings: Settings) -> Findings:
    if isinstance(one.smtp.sock, ssl.SSLSocket):
        yield from certificate(one.smtp.sock, one.relay)
    elif not is_loopback(one.relay.host):
        yield warn("mail goes to the relay unencrypted", f"SMTP_SECURITY=starttls; {target.edit}")
    if one.relay.username:
        yield ok(f"{one.relay} accepts our login{' by token' if one.relay.tokens else ''}")
    elif one.smtp.has_extn("auth") and not is_loopback(one.relay.host):
        found = f"{one.relay} offers a login and SMTP_USERNAME is not set: it may refuse mail for others"
        yield warn(found, f"SMTP_USERNAME and SMTP_PASSWORD: {target.edit}")
    else:
        yield ok(f"{one.relay} wants no login")
    if re.search(replies.MICROSOFT, one.relay.host.lower()) and settings.worker_concurrency > 3:
        found = f"Microsoft 365 allows a mailbox 3 connections, WORKER_CONCURRENCY is {settings.worker_concurrency}"
        yield warn(found, f"WORKER_CONCURRENCY=3; {target.edit}")


def certificate(sock: ssl.SSLSocket, relay: Relay) -> Findings:
    shown = sock.getpeercert() or {}
    seconds = ssl.cert_time_to_seconds(str(shown["notAfter"])) - time.time()
    if seconds < SOON:
        found = f"the certificate of {relay} expires in {int(seconds / 86400)} days"
        yield warn(found, "tell the relay's operator; no mail goes out after that")
    else:
        yield ok(f"{sock.version()}, and the certificate of {relay} is valid for {int(seconds / 86400)} more days")


def likely_mistakes(to: Relay) -> Findings:
    """Finds what can be said of a refused login without showing it."""
    if to.tokens:
        return
    password, host, username = to.password or "", to.host.lower(), to.username or ""
    if re.search(r"\s", password):
        yield note("SMTP_PASSWORD has spaces in it", "Google shows app passwords with spaces; write the letters only")
    elif re.search(replies.GMAIL, host) and not re.fullmatch(r"[a-z]{16}", password):
        yield note("SMTP_PASSWORD does not look like an app password, which is 16 small letters", replies.APP_PASSWORD)
    if re.search(replies.SES, host) and (len(password) == 40 or not username.startswith("AKIA")):
        found = "SMTP_USERNAME or SMTP_PASSWORD looks like an IAM key or a console login"
        yield note(found, "SES console > SMTP settings > Create SMTP credentials")
