"""Webhooks on a server: turned on and off as WEBHOOK_URL, or /etc/async-email/webhooks.toml, says. Standard library
only, as ops/install.py.
"""

from __future__ import annotations

import re

from ops.server import Server, text_of

SERVICE = "async-email-webhooks.service"


def set_up_webhooks(server: Server) -> None:
    is_on = server.ask("systemctl", "is-enabled", SERVICE) == "enabled"
    if are_wanted(server) and not is_on:
        server.run("systemctl", "enable", SERVICE)
        server.run("systemctl", "start", SERVICE, may_fail=True)  # the doctor is next, and says why not
    elif is_on and not are_wanted(server):
        server.run("systemctl", "disable", "--now", SERVICE)


def are_wanted(server: Server) -> bool:
    if not server.has_role("worker"):
        return False
    in_files = [server.webhooks, server.credentials / "webhook_url"]
    is_set = any(server.is_set(name) for name in ("WEBHOOK_URL", "WEBHOOKS"))
    return is_set or any(re.search(r"^\s*[^\s#]", text_of(file) or "", re.MULTILINE) for file in in_files)
