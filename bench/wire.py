"""Below the relay's conversation: bytes that lie half a round trip on the way, TLS, and the tally of its mails.

Whatever comes or goes is held for half of `Rules.latency`, so that a TLS handshake costs its round trips as well, and
pipelined commands share one. The greeting comes after two, one of them for TCP's own handshake.
"""

from __future__ import annotations

import asyncio
import ssl
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Tally:
    """Counts accepted mails. Moments are of time.monotonic(), which all processes of a machine share."""

    accepted: int = 0
    size: int = 0  # bytes
    sessions: int = 0
    first: float = 0
    last: float = 0
    message_ids: set[bytes] = field(default_factory=set)
    moments: dict[str, float] = field(default_factory=dict)  # by recipient, the first time
    doubled: int = 0  # times a recipient was served again
    news: asyncio.Event = field(default_factory=asyncio.Event)

    def add(self, body: bytes, recipients: list[str]) -> None:
        self.accepted += 1
        self.size += len(body)
        self.last = time.monotonic()
        self.first = self.first or self.last
        headers = body.partition(b"\r\n\r\n")[0].split(b"\r\n")
        self.message_ids |= {line[11:].strip() for line in headers if line[:11].lower() == b"message-id:"}
        for address in recipients:
            self.doubled += address in self.moments
            self.moments.setdefault(address, self.last)
        self.news.set()

    def report(self) -> dict[str, Any]:
        counts = {name: getattr(self, name) for name in ("accepted", "size", "sessions", "first", "last", "doubled")}
        return counts | {"message_ids": len(self.message_ids), "recipients": len(self.moments)}

    async def reach(self, mails: int) -> None:
        while self.accepted < mails:
            self.news.clear()
            await self.news.wait()


@dataclass(frozen=True)
class Rules:
    tally: Tally
    tls: ssl.SSLContext | None  # None: in clear and without a login
    latency: float = 0


class Wire(asyncio.Protocol):
    """Carries bytes to and from one client, each way half a round trip long, under TLS from `begin_tls` on."""

    def __init__(self, rules: Rules) -> None:
        self.rules = rules
        self.inbound: deque[bytes] = deque()
        self.outbound: deque[bytes | None] = deque()  # None: hang up
        self.tls: ssl.SSLObject | None = None
        self.is_secure = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport
        self.rules.tally.sessions += 1
        if self.rules.latency:
            asyncio.get_running_loop().call_later(1.5 * self.rules.latency, self.greet)
        else:
            self.greet()

    def data_received(self, data: bytes) -> None:
        self.inbound.append(data)
        self._after_half_a_round_trip(self._arrive)

    def _send(self, data: bytes | None) -> None:
        self.outbound.append(data)
        self._after_half_a_round_trip(self._depart)

    def _after_half_a_round_trip(self, then: Callable[[], None]) -> None:
        """Calls `then` half a round trip later. Timers may fire in any order, so what they move comes from a queue."""
        if self.rules.latency:
            asyncio.get_running_loop().call_later(self.rules.latency / 2, then)
        else:
            then()

    def _depart(self) -> None:
        data = self.outbound.popleft()
        if data is None:
            self.transport.close()
        elif not self.transport.is_closing():
            self.transport.write(data)

    def _arrive(self) -> None:
        data = self.inbound.popleft()
        if not self.tls:
            self.hear(data)
            return
        self.tls_in.write(data)
        try:
            self._decrypt(self.tls)
        except ssl.SSLWantReadError:
            self._send_if_any(self.tls_out.read())
        except ssl.SSLError:
            self.transport.close()

    def _decrypt(self, tls: ssl.SSLObject) -> None:
        """Returns all that has come. Raises SSLWantReadError when there is no more."""
        if not self.is_secure:
            tls.do_handshake()
            self.is_secure = True
            self._send_if_any(self.tls_out.read())
        while True:
            data = tls.read(65536)
            if not data:
                self.transport.close()
                return
            self.hear(data)

    def _send_if_any(self, data: bytes) -> None:
        if data:
            self._send(data)

    def begin_tls(self, context: ssl.SSLContext) -> None:
        self.tls_in, self.tls_out = ssl.MemoryBIO(), ssl.MemoryBIO()
        self.tls = context.wrap_bio(self.tls_in, self.tls_out, server_side=True)

    def say(self, data: bytes) -> None:
        if self.tls and self.is_secure:
            self.tls.write(data)
            data = self.tls_out.read()
        self._send(data)

    def hang_up(self) -> None:
        self._send(None)

    def greet(self) -> None:
        raise NotImplementedError

    def hear(self, data: bytes) -> None:
        raise NotImplementedError
