"""Speaks systemd's small protocols, sd_listen_fds(3), sd_notify(3) and the priorities of sd-daemon(3), and handles the
signals that end a service.

`sockets` returns those on which systemd listens for us. They outlive this process: a restart refuses no connection.
`tell` sends `READY=1`, `STOPPING=1` or `WATCHDOG=1`. Send WATCHDOG=1 only after progress, never from a thread of its
own: a service that sends it while it hangs is never restarted. Without systemd, both do nothing; neither raises.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
from collections.abc import Callable
from contextlib import suppress
from typing import Any

STOP = (signal.SIGTERM, signal.SIGINT, signal.SIGQUIT)
# logging's level -> syslog's priority, which systemd takes
PRIORITIES = ((logging.CRITICAL, 2), (logging.ERROR, 3), (logging.WARNING, 4), (logging.INFO, 6), (0, 7))
FIRST_SOCKET = 3  # SD_LISTEN_FDS_START


def sockets() -> list[socket.socket]:
    """Returns the listening sockets that systemd has opened for this process; none if it was started otherwise."""
    if os.environ.get("LISTEN_PID") != str(os.getpid()):
        return []
    count = int(os.environ.get("LISTEN_FDS", "0"))
    return [socket.socket(fileno=number) for number in range(FIRST_SOCKET, FIRST_SOCKET + count)]


def tell(state: str) -> None:
    """Sends one assignment, such as `READY=1`, to the service manager, if there is one."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address:
        return
    with suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notify:
        notify.sendto(state.encode(), address.replace("@", "\0", 1) if address.startswith("@") else address)


def prioritized(text: str, level: int) -> str:
    """Returns the text as the journal wants it: before each line its priority (`<4>`: a warning), for `journalctl -p`.
    Elsewhere than in the journal, in a terminal or a file, it stays as it is."""
    if not _in_journal():
        return text
    priority = next(number for least, number in PRIORITIES if level >= least)
    return "\n".join(f"<{priority}>{line}" for line in text.split("\n"))


def _in_journal() -> bool:
    """Returns whether standard error or output is the stream to the journal that systemd has made for this process, and
    not a file or pipe to which somebody has redirected it since (systemd.exec(5), JOURNAL_STREAM)."""
    stream = os.environ.get("JOURNAL_STREAM", "")
    with suppress(OSError):
        return bool(stream) and stream in {f"{one.st_dev}:{one.st_ino}" for one in map(os.fstat, (1, 2))}
    return False


def on_stop(handler: Callable[..., Any]) -> None:
    """Calls `handler` on SIGTERM, SIGINT and SIGQUIT. Ignores SIGHUP, SIGUSR1 and SIGUSR2, which by default would kill
    the process and the work it has in hand; not with SIG_IGN, which a program that a task starts would inherit."""
    for number in STOP:
        signal.signal(number, handler)
    for number in (signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, lambda *_: None)
