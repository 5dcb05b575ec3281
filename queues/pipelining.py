"""Sends the commands of several threads to Redis together: a client for those who wait for one command after the other.

What is called while Redis answers is the next batch, so the busier the threads, the fewer round trips each costs, and
nobody waits to fill one (group commit). Each caller gets its own reply, or its own error.
Pipelining: https://redis.io/docs/latest/develop/use/pipelining/
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

from redis.client import Pipeline

from queues.connection import Redis

# Takes what fills a pipeline; returns the replies, and whether replicas have what was written: Replication.run.
Run = Callable[[Callable[[Pipeline], object]], tuple[list[Any], bool]]


class Call:
    """A command and its reply. `done` is released when that is there, or when this caller is to send the next batch.
    `confirm` is what a batch with it is sent by, if replicas are to have it."""

    def __init__(self, words: tuple[Any, ...], options: dict[str, Any], confirm: Run | None = None) -> None:
        self.words, self.options, self.confirm = words, options, confirm
        self.reply: Any = None
        self.is_confirmed = False
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
        return self._execute(Call(words, options)).reply

    def execute_confirmed(self, run: Run, *words: Any) -> tuple[Any, bool]:
        """Returns the reply and whether replicas have what was written."""
        call = self._execute(Call(words, {}, run))
        return call.reply, call.is_confirmed

    def _execute(self, call: Call) -> Call:
        with self._lock:
            self._waiting.append(call)
            call.sends, self._is_sending = not self._is_sending, True
        if not call.sends:
            call.done.acquire()
        if call.sends:
            self._send()
        if call.error:
            raise call.error
        return call

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
        confirm = next((call.confirm for call in batch if call.confirm), self._run)
        if len(batch) == 1 and not batch[0].confirm:
            self._alone = self._alone or Redis(connection_pool=self.connection_pool, single_connection_client=True)
            batch[0].reply = self._alone.execute_command(*batch[0].words, **batch[0].options)  # type: ignore[no-untyped-call]
            return

        def fill(pipe: Pipeline) -> None:
            for call in batch:
                pipe.execute_command(*call.words, **call.options)  # type: ignore[no-untyped-call]

        replies, is_confirmed = confirm(fill)
        for call, reply in zip(batch, replies, strict=True):
            call.error, call.reply = (reply, None) if isinstance(reply, Exception) else (None, reply)
            call.is_confirmed = is_confirmed

    def _run(self, fill: Callable[[Pipeline], object]) -> tuple[list[Any], bool]:
        with self.pipeline(transaction=False) as pipe:
            fill(pipe)
            return pipe.execute(raise_on_error=False), False
