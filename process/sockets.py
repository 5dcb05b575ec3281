"""Opens the sockets on which a process listens, or takes those of systemd. See sd_listen_fds(3)."""

from __future__ import annotations

import errno
import resource
import socket
from typing import Any

from process import sd_daemon


def listen_on(listen: tuple[str, int]) -> list[socket.socket]:
    """Returns the sockets that systemd has opened, else new ones; localhost has two addresses. Raises OSError."""
    given = sd_daemon.sockets()
    if given:
        return given
    try:
        found = socket.getaddrinfo(*listen, type=socket.SOCK_STREAM)
    except (OSError, ValueError):
        raise OSError(errno.EADDRNOTAVAIL, "there is no such host") from None
    return [bound(family, address) for family, _, _, _, address in found]


def bound(family: int, address: Any) -> socket.socket:
    one = socket.socket(family, socket.SOCK_STREAM)
    one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    if family == socket.AF_INET6:
        one.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
    try:
        one.bind(address)
    except OSError:
        one.close()
        raise
    return one


def open_files(wanted: int) -> int:
    """Returns how many files this process may open. Raises that to `wanted` first, as far as may be."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if 0 <= soft < wanted:  # below 0: no limit
        soft = min(wanted, hard) if hard >= 0 else wanted
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    return soft if soft >= 0 else wanted
