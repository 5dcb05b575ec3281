"""Sends the commands of several threads to Redis together: a client for those who wait for one command after the other.

What is called while Redis answers is the next batch, so the busier the threads, the fewer round trips each costs, and
nobody waits to fill one (group commit). Each caller gets its own reply, or its own error.
Pipelining: https://redis.io/docs/latest/develop/use/pipelining/
"""

from __future__ import annotations

import threading
from typing import Any

from queues.connection import Redis


class Call:
    """A command and its reply. `done` is released when that is there, or when this caller is to send the next batch."""

    def __init__(self, words: tuple[Any, ...], options: dict[str, Any]) -> None:
        self.words, self.options = words, options
        self.reply: Any = None
        self.error: BaseException | None = None
        self.sends = False
        self.done = threading.Lock()
        self.done.acquire()


class PipeliningRedis(Redis):
    """A Redis client whose single commands share round trips. Blocking commands (BLMOVE) need another client: all
    others would wait. With a client that repeats commands, a whole batch is repeated."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._lock = threading.Lock()
        self._waiting: list[Call] = []
        self._is_sending = False
        # Has a connection of its own: to borrow one for each command takes as long as the command.
        self._alone: Redis | None = None
        self.round_trips = 0  # so far

    def execute_command(self, *words: Any, **options: Any) -> Any:
        call = Call(words, options)
        with self._lock:
            self._waiting.append(call)
            call.sends, self._is_sending = not self._is_sending, True
        if not call.sends:
            call.done.acquire()
        if call.sends:
            self._send()
        if call.error:
            raise call.error
        return call.reply

    def _send(self) -> None:
        """Sends what waits, the caller's own among it; then lets the first of those who came meanwhile send."""
        with self._lock:
            batch, self._waiting = self._waiting, []
        try:
            self._ask(batch)
        except BaseException as error:
            for call in batch:
                call.error = error
            raise
        finally:
            with self._lock:
                following = self._waiting[0] if self._waiting else None
                self._is_sending = following is not None
            if following:
                following.sends = True
                following.done.release()
            for call in batch:
                if not call.sends:
                    call.done.release()

    def _ask(self, batch: list[Call]) -> None:
        self.round_trips += 1
        if len(batch) == 1:
            self._alone = self._alone or Redis(connection_pool=self.connection_pool, single_connection_client=True)
            batch[0].reply = self._alone.execute_command(*batch[0].words, **batch[0].options)  # type: ignore[no-untyped-call]
            return
        with self.pipeline(transaction=False) as pipe:
            for call in batch:
                pipe.execute_command(*call.words, **call.options)  # type: ignore[no-untyped-call]
            for call, reply in zip(batch, pipe.execute(raise_on_error=False), strict=True):
                call.error, call.reply = (reply, None) if isinstance(reply, Exception) else (None, reply)
