"""A TCP proxy in front of Redis that loses replies: it lets a request through and cuts the line before the answer.

What was asked for has then been done, and who asked cannot know it. `lose(words, times)` arms it: a request that holds
all of the words, and whose reply holds what is `said`, is the next to lose it, and `then` is called before anybody can
notice. Everything else passes.
"""

from __future__ import annotations

import selectors
import socket
import threading
from collections.abc import Callable
from contextlib import suppress

from tests.servers import free_port


class Proxy:
    def __init__(self, target: int) -> None:
        self.target = target
        self.port = free_port()
        self.words: tuple[bytes, ...] = ()
        self.said = b""
        self.left = 0
        self.then: Callable[[], object] = lambda: None
        self.lost = 0
        self.lock = threading.Lock()
        self.over = threading.Event()
        self.threads: list[threading.Thread] = []

    def lose(
        self, words: tuple[bytes, ...], times: int, then: Callable[[], object] = lambda: None, said: bytes = b""
    ) -> None:
        with self.lock:
            self.words, self.left, self.then, self.said = words, times, then, said

    def __enter__(self) -> Proxy:
        self.listener = socket.create_server(("127.0.0.1", self.port), backlog=64)
        self.threads.append(threading.Thread(target=self._serve, name="proxy"))
        self.threads[0].start()
        return self

    def __exit__(self, *_: object) -> None:
        self.over.set()
        self.listener.shutdown(socket.SHUT_RDWR)
        for thread in self.threads:
            thread.join()
        self.listener.close()

    def _serve(self) -> None:
        while True:
            try:
                client, _ = self.listener.accept()
            except OSError:
                return
            thread = threading.Thread(target=self._carry, args=[client], name="proxy's line")
            thread.start()
            self.threads.append(thread)

    def _carry(self, client: socket.socket) -> None:
        with client, suppress(OSError), socket.create_connection(("127.0.0.1", self.target), timeout=5) as server:
            server.settimeout(None)
            with selectors.DefaultSelector() as selector:
                selector.register(client, selectors.EVENT_READ, server)
                selector.register(server, selectors.EVENT_READ, client)
                while not self.over.is_set():
                    for key, _ in selector.select(0.2):
                        heard = key.fileobj.recv(1 << 16)  # type: ignore[union-attr]
                        if not heard:
                            return
                        key.data.sendall(heard)
                        if key.fileobj is client and self.left and all(word in heard for word in self.words):
                            reply = server.recv(1 << 16)  # so it was done
                            if self._is_to_be_lost(reply):
                                self.then()
                                return
                            client.sendall(reply)

    def _is_to_be_lost(self, reply: bytes) -> bool:
        with self.lock:
            if self.left == 0 or self.said not in reply:
                return False
            self.left -= 1
            self.lost += 1
            return True
