"""Checks that somebody is told when something is wrong: ALERT_URL's host and its certificate; and a test, if asked.

Says nothing of the URL but its host: who knows the rest may write there.
"""

from __future__ import annotations

import socket
import ssl
import time
from urllib.parse import urlsplit

from ops.checks.findings import Findings, fault, note, ok, warn
from ops.checks.target import Target
from ops.push import News, NotPushed, ways
from settings import Settings

TEST = "This is a test by bin/doctor --test-alert. Nothing is wrong."


def configured(target: Target, settings: Settings) -> Findings:
    restart = target.restart("dashboard")
    if not ways(settings):
        fix = f"ALERT_URL or ALERT_TO, unless Prometheus watches: {target.edit}"
        yield note("ALERT_URL and ALERT_TO are not set: nobody is told when something is wrong", fix)
    elif not settings.all_relays and settings.alert_to:
        yield warn("ALERT_TO is set and SMTP_HOST is not, so no mail goes there", target.edit)
    elif target.test_alert:
        yield from tested(target, settings)
    elif settings.alert_url:
        yield from reached(settings.alert_url.get_secret_value(), target)
    else:
        yield note("ALERT_TO is told what is wrong, but not while the relay is in trouble", f"ALERT_URL; {restart}")


def reached(url: str, target: Target) -> Findings:
    """Connects to the host, and says nothing there."""
    at = urlsplit(url)
    host, fix = at.hostname or "", f"ALERT_URL: {target.edit}; or let this machine's firewall let it out"
    try:
        with socket.create_connection((host, at.port or {"http": 80}.get(at.scheme, 443)), target.timeout) as sock:
            if at.scheme == "https":
                ssl.create_default_context().wrap_socket(sock, server_hostname=host).close()
    except ssl.SSLCertVerificationError as error:
        yield fault(f"ALERT_URL: the certificate of {host} is not valid: {error.verify_message}", fix)
    except OSError as error:
        why = "it does not answer" if isinstance(error, TimeoutError) else error.strerror or type(error).__name__
        yield fault(f"ALERT_URL: {host} cannot be reached: {why}", fix)
    else:
        yield ok(f"{host} can be told what is wrong; bin/doctor --test-alert tries it")


def tested(target: Target, settings: Settings) -> Findings:
    for name, push in ways(settings).items():
        try:
            push(News("test", "test", "well", TEST, time.time(), socket.gethostname()))
        except NotPushed as error:
            yield fault(f"{name}: the test was not taken: {error}", f"{name}: {target.edit}")
        else:
            yield ok(f"{name}: the test was taken; see whether it is there")
