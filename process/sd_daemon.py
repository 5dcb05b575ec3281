"""What systemd tells a service and hears from it, over its two small protocols; without systemd, nothing.

`sockets`: those on which systemd listens for us (sd_listen_fds(3)). They outlive this process: a restart refuses no
connection. `tell`: `READY=1`, `STOPPING=1`, `WATCHDOG=1` (sd_notify(3)). A service that says WATCHDOG=1 while it does
nothing would never be restarted, so it is said from where work is seen to be done, never from a thread of its own.

Refuses nothing and raises nothing: a service manager that is not there, or has gone, is no reason not to work.
"""

from __future__ import annotations

import os
import socket
from contextlib import suppress

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
