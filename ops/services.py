"""The services of this machine: their units, and what of them is started, restarted and turned off.

Standard library only, as ops/install.py.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable

from ops.release import MARK
from ops.server import Server, text_of
from ops.smtp_in import SERVICE as SUBMISSION
from ops.smtp_in import SOCKET as SUBMISSION_SOCKET
from ops.webhooks import SERVICE as WEBHOOKS
from queues.table import QUEUES

WORKERS = tuple(f"async-email-worker@{queue}.service" for queue in QUEUES)
WORKER = "async-email-worker@.service"
API = "async-email-api.service"
DASHBOARD = "async-email-dashboard.service"
SOCKET = "async-email-api.socket"
TARGET = "async-email.target"


def install_units(server: Server) -> None:
    server.copy_units(*(path.name for path in sorted((server.tree / "systemd").glob("async-email*"))))


def role_of(unit: str) -> str:
    """Returns which of several machines run it. The dashboard is with the workers: it tells people by mail, too, and so
    needs the relay's login, which the machines that can be reached from outside need not have."""
    return "api" if unit in (API, SOCKET) else "worker"


def units_of(server: Server, order: Iterable[str]) -> list[str]:
    return [unit for unit in order if server.has_role(role_of(unit))]


def start_services(server: Server) -> None:
    enabled = [unit for unit in WORKERS if server.ask("systemctl", "is-enabled", unit) == "enabled"]
    all_of_them = (SOCKET, *WORKERS, API, DASHBOARD)
    is_new = server.ask("systemctl", "is-enabled", TARGET) != "enabled"
    if is_new or server.etc / "roles" in server.written:
        wanted = units_of(server, all_of_them)
        server.run("systemctl", "enable", TARGET, *wanted)
        others = [unit for unit in all_of_them if unit not in wanted]
        if others and not is_new:
            server.run("systemctl", "disable", "--now", *others)
    elif enabled and WORKER in server.changed_units:  # it may have another [Install] now
        server.run("systemctl", "enable", *enabled)
    if SOCKET in server.changed_units and server.ask("systemctl", "is-active", SOCKET) == "active":
        server.say("its unit has changed, so the API's socket is opened anew; for a moment requests are refused")
        server.run("systemctl", "restart", SOCKET)
    # A reader of the queue must understand what is written to it: new workers know the old jobs, not the reverse.
    order = units_of(server, (API, *WORKERS, DASHBOARD) if server.going_back else (*WORKERS, API, DASHBOARD))
    beside = (SUBMISSION, WEBHOOKS)
    for unit in (*beside, *order) if server.going_back else (*order, *beside):
        if runs_something_else(server, unit):
            server.run("systemctl", "restart", unit, may_fail=True)
    server.run("systemctl", "start", TARGET)
    if order and server.release / MARK in server.written:  # that they could not start without it counts no longer
        server.run("systemctl", "reset-failed", *order)
    if server.dry:
        return
    waiting = [unit for unit in order if server.ask("systemctl", "is-active", unit) != "active"]
    for unit in order:
        server.say(f"{unit}: not running yet. {last_words(server, unit)}" if unit in waiting else f"{unit}: running")
    if waiting and server.previous.is_symlink() and not server.going_back:
        server.say("the previous release is still there: sudo bin/install --rollback")


def runs_something_else(server: Server, unit: str) -> bool:
    """Returns whether it runs, but not this release, not as its unit says, or with a file that has been made anew."""
    pid = server.ask("systemctl", "show", "--property=MainPID", "--value", unit)
    if pid in ("", "0"):
        return False
    template = re.sub("@.*", "@.service", unit)
    if any(f"/{path.name}\n" in (text_of(server.units / template) or "") for path in server.written):
        return True
    try:
        return template in server.changed_units or os.readlink(f"/proc/{pid}/cwd") != str(server.release)
    except OSError:
        return True


def last_words(server: Server, unit: str) -> str:
    """Returns the last line of the unit's log."""
    name = unit.removesuffix(".service").replace("@", "-")
    return server.ask("journalctl", "--identifier", name, "--lines=1", "--output=cat")


def stop_what_is_newer(server: Server) -> None:
    """Turns off what the release does not have, and could only fail at, again and again; an upgrade turns it on."""
    for unit, *others in ((SUBMISSION_SOCKET, SUBMISSION), (WEBHOOKS,)):
        is_known = (server.tree / "systemd" / unit).exists()
        if not is_known and server.ask("systemctl", "is-enabled", unit) == "enabled":
            server.run("systemctl", "disable", "--now", unit, *others)
