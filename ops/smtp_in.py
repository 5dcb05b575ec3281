"""Mail by SMTP on a server: turned on, moved and turned off as SUBMISSION_LISTEN says, with the certificate of
SUBMISSION_TLS_CERT.

The sockets belong to systemd, and root alone reads the certificate; so both are named to systemd, in a file beside each
unit. A process reads its certificate when it starts: with one, it is started anew each day, which finds a renewed one,
whoever renews it. Clients wait in the sockets meanwhile. Standard library only, as ops/install.py.
"""

from __future__ import annotations

from pathlib import Path

from ops.server import Server, text_of

SERVICE = "async-email-submission.service"
SOCKET = "async-email-submission.socket"
MADE = "# Made by bin/install from {} in async-email.env.\n"


def set_up_submission(server: Server) -> None:
    listen = server.value("SUBMISSION_LISTEN") if server.has_role("api") else ""
    sockets, certificate = server.units / f"{SOCKET}.d/listen.conf", server.units / f"{SERVICE}.d/tls.conf"
    is_on = server.ask("systemctl", "is-enabled", SOCKET) == "enabled"
    if not listen:
        if is_on and text_of(sockets) is not None:  # and not turned on by somebody's own hand
            server.run("systemctl", "disable", "--now", SOCKET, SERVICE)
        return
    lines = [f"ListenStream={one.strip().replace('localhost:', '127.0.0.1:')}\n" for one in listen.split(",")]
    changed = [SOCKET in server.changed_units, written(server, sockets, "SUBMISSION_LISTEN", "Socket", lines)]
    changed += [written(server, certificate, "SUBMISSION_TLS_CERT", "Service", of_the_certificate(server))]
    if any(changed):
        server.run("systemctl", "daemon-reload")
    if any(changed) and is_on:
        server.say("for a moment it takes no mail")
        server.run("systemctl", "stop", SERVICE, SOCKET)
    if any(changed) or not is_on:
        server.run("systemctl", "enable", "--now", SOCKET)
        server.run("systemctl", "start", SERVICE, may_fail=True)  # else the first client would; the doctor is next


def of_the_certificate(server: Server) -> list[str]:
    cert, key = server.value("SUBMISSION_TLS_CERT"), server.value("SUBMISSION_TLS_KEY")
    if not cert or not key:
        return []
    return [
        f"LoadCredential=tls_cert:{cert}\n",
        f"LoadCredential=tls_key:{key}\n",
        "Environment=SUBMISSION_TLS_CERT=%d/tls_cert SUBMISSION_TLS_KEY=%d/tls_key\n",
        "RuntimeMaxSec=1d\n",
    ]


def written(server: Server, path: Path, setting: str, section: str, lines: list[str]) -> bool:
    """Puts the lines in place of what the unit has. Returns whether that is new."""
    reset = "ListenStream=\n" if section == "Socket" else ""
    text = f"{MADE.format(setting)}[{section}]\n{reset}{''.join(lines)}"
    if text_of(path) == text or not (lines or path.exists()):
        return False
    server.write(path, text, 0o644)
    return True
