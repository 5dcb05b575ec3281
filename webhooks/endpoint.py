"""One endpoint: takes its events one by one, posts each, and says what became of it.

Some threads do so side by side; the one whose turn it is looks into Redis, so that an endpoint without events costs one
look a second. Whatever goes wrong with one event costs the others nothing.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from mail.reader import Reader
from process.log import emit, where
from process.webhooks import EndpointSettings
from queues.connection import Redis, RedisError, Unavailable
from webhooks.event import body, event_id, headers
from webhooks.post import Answer, Poster
from webhooks.queue import Line, Post, Queue, Taken

THREADS = 8
LONGEST_WAIT = 1.0  # seconds between two looks


class Endpoint:
    def __init__(
        self,
        settings: EndpointSettings,
        redis: Redis,
        reader: Reader,
        *,
        clock: Callable[[], float] = time.time,
        post: Callable[[bytes, dict[str, str]], Answer] | None = None,
    ) -> None:
        self.settings, self.reader, self.clock = settings, reader, clock
        self.queue = Queue(redis, settings.name)
        self.poster = Poster(settings.url.get_secret_value(), settings.private)
        self.post = post or self.poster.post
        self.keys = settings.keys
        self.turn, self.stopping = threading.Lock(), threading.Event()

    def start(self) -> list[threading.Thread]:
        threads = [threading.Thread(target=self.run, name=self.settings.name) for _ in range(THREADS)]
        for one in threads:
            one.start()
        return threads

    def run(self) -> None:
        while not self.stopping.is_set():
            try:
                if taken := self._next():
                    self.deliver(taken)
            except (RedisError, Unavailable):  # said by the process, and over one day; a lease keeps what was taken
                self.stopping.wait(LONGEST_WAIT)
            except Exception as error:
                emit("crashed", logging.ERROR, where=where(error))
                self.stopping.wait(LONGEST_WAIT)
        self.poster.close()

    def _next(self) -> Taken | None:
        """Returns an event that is due, or None after a while."""
        with self.turn:
            if self.stopping.is_set():
                return None
            taken = self.queue.take(self.clock())
            if isinstance(taken, Taken):
                return taken
            self.stopping.wait(min(taken, LONGEST_WAIT))
        return None

    def deliver(self, taken: Taken) -> None:
        """Posts an event, and writes down what became of it."""
        line = Line.parse(taken.line)
        content = body(self.reader, taken.mail_id, line)
        started, now = time.monotonic(), self.clock()
        signed = headers(self.keys, event_id(taken.mail_id, line), content, now)
        answer = self.post(content, signed)
        ms = round((time.monotonic() - started) * 1000)
        post = Post(now, taken.mail_id, taken.line, answer.status, answer.said, ms)
        about: dict[str, Any] = {"to": self.settings.name, "kind": line.type, "id": taken.mail_id}
        if answer.is_good:
            self.queue.delivered(taken, self.clock(), post)
            emit("webhook_delivered", **about, status=answer.status, ms=ms)
            return
        next_in = self.queue.failed(taken, self.clock(), post, answer.trouble, answer.pause)
        if next_in < 0:
            emit("webhook_given_up", logging.WARNING, **about, reason=answer.said)
        else:
            emit("webhook_failed", logging.WARNING, **about, reason=answer.said, next_in=f"{next_in}s", ms=ms)

    def stop(self) -> None:
        self.stopping.set()


def drain(endpoints: list[Endpoint], threads: list[threading.Thread], seconds: float) -> None:
    """Waits until the posts in hand have ended; not for ever."""
    for one in endpoints:
        one.stop()
    deadline = time.monotonic() + seconds
    for thread in threads:
        with suppress(RuntimeError):
            thread.join(max(0.0, deadline - time.monotonic()))
