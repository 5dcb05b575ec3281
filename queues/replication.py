"""Waits until replicas have what was written: only then does it outlive the primary.

Behind the commands, on the same connection and in the same write, stand a PUBLISH and a WAIT. WAIT is about the last
write of its connection, and PUBLISH is one that takes no memory and no place in the append-only file: so also what a
script found done already, and did not write, is confirmed. (In a cluster it is none; there a key is touched.) A primary
that stood still while it was replaced may be confirmed by a replica that the new one overwrites; so most Sentinels must
call it healthy right after.
WAIT: https://redis.io/docs/latest/commands/wait/
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from redis.client import Pipeline
from redis.exceptions import ConnectionError, NoScriptError

from process.redis_url import Place
from queues.connection import NOT_CONFIRMED, Redis, RedisError, Script, Unavailable
from queues.keys import TAG
from queues.pipelining import PipeliningRedis
from queues.primary import Primary

WAIT = 900  # milliseconds for the replicas; less than the shortest time-out of a client
# A write that always goes to the replicas, also of a full Redis: to a channel that nobody hears. In a cluster PUBLISH
# does not go to them; there it is one to a key in our slot.
TOUCH = "return redis.call('EXPIRE', KEYS[1], 86400) == 1 or redis.call('SET', KEYS[1], '')"
WRITE = ("EVAL", TOUCH, 1, f"{TAG}confirm") if TAG else ("PUBLISH", "async-email:confirm", "")


class Unconfirmed(Unavailable):
    """Fewer replicas than REDIS_REPLICAS are known to have what was written. It may be stored, and may yet be lost; the
    same may be done again."""

    def __init__(self) -> None:
        super().__init__(NOT_CONFIRMED)


class Replication:
    """Confirms what a client writes: `replicas` must have it. With 0 no command is sent for that, and none waits."""

    def __init__(self, redis: Redis, replicas: int) -> None:
        self.redis, self.replicas = redis, replicas
        self.primary: Primary | None = redis.connection_pool.connection_kwargs.get("primary")

    def run(self, fill: Callable[[Pipeline], object]) -> tuple[list[Any], bool]:
        """Sends the commands that `fill` puts into a pipeline, in one round trip. Returns their replies, an exception
        for one that Redis refused, and whether they are confirmed. Raises redis-py's errors."""
        at = (self.primary.at or self.primary.find()) if self.primary and self.replicas else None
        with self.redis.pipeline(transaction=False) as pipe:
            fill(pipe)
            if self.replicas:
                pipe.execute_command(*WRITE)  # type: ignore[no-untyped-call]
                pipe.execute_command("WAIT", self.replicas, WAIT)  # type: ignore[no-untyped-call]
            replies: list[Any] = pipe.execute(raise_on_error=False)
        if not self.replicas:
            return replies, True
        *replies, published, number = replies
        for one in (published, number):
            if isinstance(one, Exception):
                raise one
        is_confirmed = self._is_healthy(at) and number >= self.replicas  # looks first: it may be another by now
        if not is_confirmed and self.primary:
            self.primary.doubt()
        return replies, is_confirmed

    def _is_healthy(self, at: Place | None) -> bool:
        """Returns whether the primary that has answered is still the one, and about to be replaced by none."""
        if not self.primary:
            return True
        try:
            view = self.primary.look()
        except ConnectionError:
            return False
        return view.healthy and view.at == at

    def execute(self, *words: Any) -> Any:
        """Returns the reply to one command, once it is confirmed. Raises `Unconfirmed`, and redis-py's errors."""
        if not self.replicas:
            return self.redis.execute_command(*words)  # type: ignore[no-untyped-call]
        if isinstance(self.redis, PipeliningRedis):
            reply, is_confirmed = self.redis.execute_confirmed(self.run, *words)
        else:
            [reply], is_confirmed = self.run(lambda pipe: pipe.execute_command(*words))  # type: ignore[no-untyped-call]
        if isinstance(reply, Exception):
            raise reply
        if not is_confirmed:
            raise Unconfirmed
        return reply

    def call(self, script: Script, keys: Sequence[str], args: Sequence[Any] = ()) -> Any:
        """Returns what a script of this client returns, once that is confirmed. Raises as `execute`."""
        if not self.replicas:
            return script(keys, args)
        try:
            return self.execute("EVALSHA", script.digest, len(keys), *keys, *args)
        except NoScriptError:
            return self.execute("EVAL", script.source, len(keys), *keys, *args)

    @property
    def at(self) -> Place | None:
        """Returns where the primary was last; None where it is the one of REDIS_URL."""
        return self.primary.at if self.primary else None

    def confirm(self, since: Place | None = None) -> None:
        """Returns once replicas have all that the primary has now, which must be the one it was `since` then, if that
        is given. Raises `Unconfirmed`, and redis-py's errors."""
        if self.replicas:
            self.execute("PING")
            if since not in (None, self.at):
                raise Unconfirmed

    @property
    def works(self) -> bool:
        """Returns whether something can be confirmed now."""
        try:
            self.confirm()
        except (Unconfirmed, RedisError):
            return False
        return True
