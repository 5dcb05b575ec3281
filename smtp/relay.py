"""Where the relay is, and the way to it: TCP and certificates.

Standards: RFC 8314 (implicit TLS), 3207 (STARTTLS); certificates are always verified.
"""

from __future__ import annotations

import socket
import ssl
from functools import lru_cache
from typing import NamedTuple

from process.relays import ONLY, RelaySettings
from queues.connection import Redis, connect
from settings import Settings
from smtp.pacing import key_prefix
from smtp.tokens import Tokens

SEND_BUFFER = 256 * 1024  # bytes


class Relay(NamedTuple):
    """Where the relay is and how to speak to it. Times in seconds."""

    host: str
    port: int
    security: str  # starttls, tls or none
    username: str | None
    password: str | None
    ca_file: str | None
    timeout: float  # for a connection, for one reply (but that to the final dot), for the next CHUNK of the body
    deadline: float  # for one conversation
    ehlo_name: str  # what we call ourselves
    tokens: Tokens | None = None  # to log in with, in place of a password

    @classmethod
    def of(cls, current: Settings, one: RelaySettings | None = None, redis: Redis | None = None) -> Relay:
        """Returns one relay of the settings; by default the first. `redis` is where a worker shares its tokens; others
        connect to it when they need one."""
        one = one or next(iter(current.all_relays), RelaySettings.model_construct(name=ONLY))
        return cls(
            host=one.host or "",
            port=one.port,
            security=one.security,
            username=one.username,
            password=one.password.get_secret_value() if one.password else None,
            ca_file=str(one.ca_file) if one.ca_file else None,
            timeout=current.smtp_timeout,
            deadline=current.deliver_timeout,
            ehlo_name=current.ehlo_name or own_name(),
            tokens=_tokens(current, one, redis),
        )

    def __str__(self) -> str:
        return f"{self.host}:{self.port}"

    def __repr__(self) -> str:
        """Hides the password, which a tuple's own would show to a program that prints a traceback's variables."""
        return str(self)


def _tokens(current: Settings, one: RelaySettings, redis: Redis | None) -> Tokens | None:
    if not one.oauth:
        return None
    shared = redis or connect(current.redis)
    return Tokens(shared, one.oauth, key_prefix(one.name), even_alone=redis is None)


@lru_cache(maxsize=1)
def own_name() -> str:
    """Returns this machine's full name, or the address from which it reaches others in RFC 5321 4.1.3's form; never
    `localhost` or a loopback address if it has another. Asked once: a resolver that is silent would cost seconds each
    time."""
    name = socket.getfqdn()
    if "." in name and not name.startswith("localhost"):
        return name
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))  # RFC 5737: an address of nobody; a datagram socket sends nothing by this
            return f"[{probe.getsockname()[0]}]"
        except OSError:
            return "[127.0.0.1]"


@lru_cache(maxsize=4)
def tls_context(ca_file: str | None) -> ssl.SSLContext:
    return ssl.create_default_context(cafile=ca_file)


def connect_any(relay: Relay) -> socket.socket:
    """Connects to the first of the relay's addresses that answers. They share one timeout: four dead ones cost no more
    than one, and a relay whose IPv6 is broken is still reached."""
    addresses = socket.getaddrinfo(relay.host, relay.port, type=socket.SOCK_STREAM)
    failure = OSError()
    for family, kind, protocol, _, address in addresses:
        sock = socket.socket(family, kind, protocol)
        try:
            sock.settimeout(relay.timeout / len(addresses))
            sock.connect(address)
            sock.settimeout(relay.timeout)
            # The final dot goes out as a packet of its own; Nagle's algorithm would hold it for the peer's ACK.
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            # What waits in this buffer, by default up to 4 MiB, is half a minute of a slow line. If the worker dies in
            # it, or the deadline passes, a mail that has not even arrived is in doubt.
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER)
            return sock
        except OSError as error:
            sock.close()
            failure = error
    raise failure
