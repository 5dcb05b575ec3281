"""Checks the ports on which mail is taken by SMTP: each greets, and where others reach it there is a certificate that
does not run out."""

from __future__ import annotations

import socket
import ssl

from ops.checks.findings import Findings, fault, lasting, note, ok, warn
from ops.checks.machine import SOON, runs_out
from ops.checks.target import Target
from process.values import Address, is_loopback
from settings import Settings

TLS_PORT = 465


def ports(target: Target, settings: Settings) -> Findings:
    if not settings.submission_listen:
        yield note("SUBMISSION_LISTEN is not set: no mail is taken by SMTP")
        return
    install = "sudo bin/install, in your clone" if target.installed else target.restart("submission")
    for one in settings.submission_listen:
        if greets(one, target.timeout):
            yield ok(f"mail is taken by SMTP on port {one.port}")
        else:
            fix = f"{install}, opens it; sudo journalctl -u async-email-submission -n 20"
            yield fault(f"nothing takes mail by SMTP on port {one.port}", fix)
    cert = settings.submission_tls_cert
    others = [one.port for one in settings.submission_listen if not is_loopback(one.host)]
    if others and not cert:
        found = f"port {others[0]} is open to other machines, which cannot log in without TLS"
        yield warn(found, f"set SUBMISSION_TLS_CERT and SUBMISSION_TLS_KEY, then: {install}")
    if cert and runs_out(str(cert), SOON):
        fix = "renew it, then: sudo systemctl restart async-email-submission"
        yield warn(f"{cert}, for mail by SMTP, expires within {lasting(SOON)}, or has", fix)


def greets(one: Address, timeout: float) -> bool:
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(one.host, one.host)
    try:
        with socket.create_connection((host, one.port), timeout) as connection:
            if one.port != TLS_PORT:
                return connection.recv(3) == b"220"
            context = ssl.create_default_context()
            context.check_hostname, context.verify_mode = False, ssl.CERT_NONE  # it is asked whether it speaks
            with context.wrap_socket(connection) as encrypted:
                return encrypted.recv(3) == b"220"
    except OSError:
        return False
