"""A token server on loopback, as RFC 6749, RFC 8628 and the two providers' documents have it: tokens that end, refresh
tokens that are replaced, refusals, and answers that are none."""

from __future__ import annotations

import json
import ssl
import threading
import time
from collections.abc import Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qsl

from process.grants import Grant

FIRST = "refresh-0"
EXPIRED = {
    "error": "invalid_grant",
    "error_description": "AADSTS700082: The refresh token of ada@acme.example has expired due to inactivity.",
}


class TokenServer:
    """A context manager. `answers` are given first, in turn: (status, body, headers), or seconds to wait before the
    next. After that it gives tokens with a `life`, to who has the last refresh token that it gave, or the first."""

    def __init__(self, life: float = 3600, rotates: bool = False, tls: ssl.SSLContext | None = None) -> None:
        self.life, self.rotates, self.tls = life, rotates, tls
        self.answers: list[tuple[int, Any, Mapping[str, str]] | float] = []
        self.asked: list[dict[str, str]] = []
        self.issued: dict[str, float] = {}  # a token -> when, of time.monotonic()
        self.good: dict[str, float] = {}  # a token -> until when
        self.refresh = {FIRST}
        self.lock = threading.Lock()

    def __enter__(self) -> TokenServer:
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                form = self.rfile.read(int(self.headers["Content-Length"])).decode()
                status, body, headers = server._answer(dict(parse_qsl(form)))
                data = body if isinstance(body, bytes) else json.dumps(body).encode()
                self.send_response(status)
                for name, value in {"Content-Length": str(len(data)), **headers}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *_: object) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        if self.tls:
            self.http.socket = self.tls.wrap_socket(self.http.socket, server_side=True, do_handshake_on_connect=False)
        self.url = f"http{'s' if self.tls else ''}://127.0.0.1:{self.http.server_port}/token"
        self.thread = threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.05})
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.http.shutdown()
        self.thread.join()
        self.http.server_close()

    def grant(self, **more: Any) -> Grant:
        return Grant(**{"token_url": self.url, "client_id": "app", "refresh_token": FIRST, **more})

    def takes(self, token: str) -> bool:
        return self.good.get(token, 0) > time.monotonic()

    def revoke_all(self) -> None:
        self.good.clear()

    def _answer(self, form: dict[str, str]) -> tuple[int, Any, Mapping[str, str]]:
        self.asked.append(form)
        while self.answers:
            answer = self.answers.pop(0)
            if isinstance(answer, tuple):
                return answer
            time.sleep(answer)
        if form["grant_type"] == "refresh_token" and form["refresh_token"] not in self.refresh:
            return 400, EXPIRED, {}
        with self.lock:
            token = f"token-{len(self.issued)}-{'x' * 1500}"  # Microsoft's are as long
            self.issued[token] = now = time.monotonic()
            self.good[token] = now + self.life
        said = {"token_type": "Bearer", "access_token": token, "expires_in": self.life}
        if self.rotates or form["grant_type"] == "authorization_code" or "device_code" in form:
            said["refresh_token"] = f"refresh-{len(self.issued)}"
            self.refresh = {FIRST, str(said["refresh_token"])}
        return 200, said, {}
