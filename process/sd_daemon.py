"""What systemd tells a service and hears from it, over its two small protocols and by signals.

`sockets`: those on which systemd listens for us (sd_listen_fds(3)). They outlive this process: a restart refuses no
connection. `tell`: `READY=1`, `STOPPING=1`, `WATCHDOG=1` (sd_notify(3)). A service that says WATCHDOG=1 while it does
nothing would never be restarted, so it is said from where work is seen to be done, never from a thread of its own.
`on_stop`: what ends a service, and what does not.

Refuses nothing and raises nothing: a service manager that is not there, or has gone, is no reason not to work.
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
    """Those that systemd has opened for this process, listening; none if it was started in another way."""
    if os.environ.get("LISTEN_PID") != str(os.getpid()):
        return []
    count = int(os.environ.get("LISTEN_FDS", "0"))
    return [socket.socket(fileno=number) for number in range(FIRST_SOCKET, FIRST_SOCKET + count)]


def tell(state: str) -> None:
    """One assignment, such as `READY=1`, to whoever started this process and wants to know."""
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
