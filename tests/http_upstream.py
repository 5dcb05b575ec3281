"""An upstream that answers each request as it is told, to the octet, or not at all."""

from __future__ import annotations

import re
import socket
import ssl
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from itertools import takewhile
from typing import Any, NamedTuple

CUT = b""  # hangs up instead of an answer
TAKEN = b'HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 12\r\n\r\n{"id":"abc"}'


def answer(status: int, body: str = "", *headers: str) -> bytes:
    lines = [f"HTTP/1.1 {status} Whatever", f"Content-Length: {len(body.encode())}", *headers, "", body]
    return "\r\n".join(lines).encode()


class Asked(NamedTuple):
    line: str
    headers: dict[str, str]
    body: bytes


class Scripted:
    """A context manager. `acts` are answers, one a request; the last one again and again; a number is a pause of so
    many seconds between its octets from then on."""

    def __init__(self, acts: Sequence[bytes | float] = (TAKEN,), tls: ssl.SSLContext | None = None) -> None:
        self.acts, self.tls = list(acts), tls
        self.asked: list[Asked] = []
        self.connections = 0

    def __enter__(self) -> Scripted:
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.port = self.listener.getsockname()[1]
        self.url = f"{'https' if self.tls else 'http'}://127.0.0.1:{self.port}"
        threading.Thread(target=self._serve, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.listener.shutdown(socket.SHUT_RDWR)
        self.listener.close()

    def _serve(self) -> None:
        with suppress(OSError):
            while True:
                sock, _ = self.listener.accept()
                self.connections += 1
                threading.Thread(target=self._talk, args=[sock], daemon=True).start()

    def _talk(self, sock: Any) -> None:
        with sock, suppress(OSError):
            sock = self.tls.wrap_socket(sock, server_side=True) if self.tls else sock
            with sock, sock.makefile("rb") as lines:
                while head := b"".join(takewhile(lambda line: line not in (b"", b"\r\n"), lines)):
                    line, *fields = head.decode().splitlines()
                    headers = {name.lower(): value for name, _, value in (one.partition(": ") for one in fields)}
                    self.asked.append(Asked(line, headers, lines.read(int(headers.get("content-length", 0)))))
                    act, pause = self.acts[0], 0.0
                    if isinstance(act, float):
                        pause, act = act, TAKEN
                    elif len(self.acts) > 1:
                        del self.acts[0]
                    if not act:
                        return
                    for octet in re.findall(b"(?s)." if pause else b"(?s).+", act):
                        sock.sendall(octet)
                        time.sleep(pause)
