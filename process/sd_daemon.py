"""Speaks systemd's two small protocols, sd_listen_fds(3) and sd_notify(3), and handles the signals that end a service.

`sockets` returns those on which systemd listens for us. They outlive this process: a restart refuses no connection.
`tell` sends `READY=1`, `STOPPING=1` or `WATCHDOG=1`. Send WATCHDOG=1 only after progress, never from a thread of its
own: a service that sends it while it hangs is never restarted. Without systemd, both do nothing; neither raises.
"""

from __future__ import annotations

import os
import signal
import socket
from collections.abc import Callable
from contextlib import suppress
from typing import Any

STOP = (signal.SIGTERM, signal.SIGINT, signal.SIGQUIT)
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


def on_stop(handler: Callable[..., Any]) -> None:
    """Calls `handler` on SIGTERM, SIGINT and SIGQUIT. Ignores SIGHUP, SIGUSR1 and SIGUSR2, which by default would kill
    the process and the work it has in hand; not with SIG_IGN, which a program that a task starts would inherit."""
    for number in STOP:
        signal.signal(number, handler)
    for number in (signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, lambda *_: None)
