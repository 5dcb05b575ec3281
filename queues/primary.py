"""Finds the primary of a replicated Redis through its Sentinels, and keeps connections to no other server.

A Sentinel that is cut off together with an old primary still names that one. So all are asked, most must answer, and
the latest configuration decides; while the primary may be about to be replaced, nothing is. A connection asks each time
it connects, looks whether it has found a primary, and is given up when that is no longer the one.
Sentinel: https://redis.io/docs/latest/operate/oss_and_stack/management/sentinel/
"""

from __future__ import annotations

import os
import re
import socket
import threading
import time
import weakref
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import suppress
from functools import cache
from typing import Any, NamedTuple

from redis import Redis
from redis.backoff import NoBackoff
from redis.connection import Connection, ConnectionPool, SSLConnection
from redis.exceptions import ConnectionError, MovedError, ResponseError
from redis.maint_notifications import MaintNotificationsConfig
from redis.retry import Retry

from process.redis_url import Place, Sentinels
from queues.keys import TAG

ANSWERS_WITHIN = 0.5  # seconds for a Sentinel
FRESH = 0.1  # seconds for which a look at the Sentinels holds: they take longer from a suspicion to a new primary
NO_MAJORITY = "most of the Sentinels of REDIS_URL do not answer, or know no primary of that name"
BEING_REPLACED = "Redis' primary is being replaced"
NOT_A_PRIMARY = "READONLY what the Sentinels name is not a primary yet"
# What a server says that is no primary (any more), or cannot be one now. Before Redis 7 it may be inside a script's
# error. UNBLOCKED: it has become a replica while a command waited. From MOVED on: of a cluster, the last in scripts.
NOT_PRIMARY = re.compile(
    r"\b(READONLY|NOREPLICAS|UNBLOCKED|MASTERDOWN|WAIT cannot be used|"
    r"MOVED|CLUSTERDOWN|non local key|cluster is down|slot not served)\b"
)
# A server that is gone without a word is noticed after six seconds, also by a command that waits for a job.
KEEPALIVE = {
    number: value
    for name, value in {"TCP_KEEPIDLE": 3, "TCP_KEEPINTVL": 1, "TCP_KEEPCNT": 3, "TCP_USER_TIMEOUT": 6000}.items()
    if (number := getattr(socket, name, None)) is not None
}


class View(NamedTuple):
    """What most Sentinels say: where the primary is, and whether it is `healthy`: so few of them suspect it, or do not
    answer, that they could not replace it."""

    at: Place
    healthy: bool


def judge(answers: list[Mapping[str, Any]], number: int) -> View:
    """Returns what the answers of some of `number` Sentinels to SENTINEL MASTER come to. Pure. Raises
    `ConnectionError` where most have not answered."""
    if len(answers) <= number // 2:
        raise ConnectionError(NO_MAJORITY)
    latest = max(int(one["config-epoch"]) for one in answers)
    current = [one for one in answers if int(one["config-epoch"]) == latest]
    places = {Place(str(one["ip"]), int(one["port"])) for one in current}
    flags = [set(str(one["flags"]).split(",")) for one in current]
    suspecting = sum("s_down" in one for one in flags) + number - len(answers)
    replaced = any({"o_down", "failover_in_progress"} & one for one in flags) or len(places) > 1
    return View(min(places), not replaced and suspecting < max(int(one["quorum"]) for one in current))


class Primary:
    """Knows where the primary is. One in a process for each `Sentinels`: see `primary_of`."""

    def __init__(self, sentinels: Sentinels, tls: Mapping[str, Any]) -> None:
        self.sentinels = sentinels
        how: dict[str, Any] = {"username": sentinels.username, "password": sentinels.password, **tls}
        how |= {"socket_connect_timeout": ANSWERS_WITHIN, "socket_timeout": ANSWERS_WITHIN}
        how |= {"retry": Retry(NoBackoff(), 1), "socket_keepalive_options": KEEPALIVE, "protocol": 2}
        how |= {"maint_notifications_config": MaintNotificationsConfig(enabled=False)}
        kind = SSLConnection if sentinels.tls else Connection
        self.clients = [
            Redis(connection_pool=ConnectionPool(kind, host=one.host, port=one.port, **how)) for one in sentinels.places
        ]
        self.at: Place | None = None  # where it was last
        self._reset()
        weak = weakref.WeakMethod(self._reset)
        os.register_at_fork(after_in_child=lambda: (reset := weak()) and reset())

    def _reset(self) -> None:
        """Forgets what belongs to threads: a forked process has none of them."""
        self._lock = threading.Lock()
        self._looked_at = self._ended_at = -FRESH  # when the last look began, and when it was over
        self._view: View | ConnectionError = ConnectionError(NO_MAJORITY)
        self._asked: set[int] = set()  # the Sentinels that have been asked and have not answered yet
        self._present = set(range(len(self.clients)))  # those that answered the last time

    def look(self) -> View:
        """Returns what most Sentinels said no more than `FRESH` seconds ago. Raises redis-py's `ConnectionError`.

        Where a look that took long finds no healthy primary, those who waited for it do not ask again, one by one."""
        came = time.monotonic()
        with self._lock:
            is_bad = isinstance(self._view, ConnectionError) or not self._view.healthy
            if time.monotonic() - self._looked_at >= FRESH and not (is_bad and self._ended_at >= came):
                began = time.monotonic()
                try:
                    self._view = judge(self._answers(), len(self.clients))
                    self.at = self._view.at if self._view.healthy else self.at
                except ConnectionError as error:
                    self._view = error
                self._looked_at, self._ended_at = began, time.monotonic()
            view = self._view
        if isinstance(view, ConnectionError):
            raise ConnectionError(str(view))
        return view

    def find(self) -> Place:
        """Returns the primary's address. Raises redis-py's `ConnectionError` while there is none to be sure of."""
        view = self.look()
        if not view.healthy:
            raise ConnectionError(BEING_REPLACED)
        return view.at

    def doubt(self) -> None:
        """Forgets the last look, so that the next one asks the Sentinels."""
        self._looked_at = -FRESH

    def survey(self) -> list[Mapping[str, Any]]:
        """Returns what each Sentinel says of the primary. Waits half a second for each, where `look` does not wait for
        one that is away."""

        def ask(client: Redis) -> Mapping[str, Any]:
            with suppress(Exception):
                return self._ask(client)
            return {}

        threads = ThreadPoolExecutor(len(self.clients))
        ended, _ = wait([threads.submit(ask, one) for one in self.clients], ANSWERS_WITHIN)
        threads.shutdown(wait=False)
        return [said for one in ended if (said := one.result())]

    def _answers(self) -> list[Mapping[str, Any]]:
        """Asks all Sentinels at once. Waits half a second for those that answered the last time; one that is away is
        waited for only as long as most have not answered."""
        answers: dict[int, Mapping[str, Any]] = {}
        changed = threading.Condition()

        def ask(number: int) -> None:
            answer: Mapping[str, Any] | None = None
            with suppress(Exception):  # one that stayed in `_asked` would never be asked again
                answer = self._ask(self.clients[number])
            with changed:
                self._asked.discard(number)
                self._present.discard(number)
                ended.add(number)
                if answer:  # perhaps too late for this look: the next one waits for it again
                    self._present.add(number)
                    answers[number] = answer
                changed.notify()

        ended: set[int] = set()
        with changed:
            for number in set(range(len(self.clients))) - self._asked:
                self._asked.add(number)
                try:
                    threading.Thread(target=ask, args=[number], name="sentinel", daemon=True).start()
                except RuntimeError:  # there can be no more threads now
                    self._asked.discard(number)
                    self._present.discard(number)
            asked, present = set(self._asked), set(self._present)

            def enough() -> bool:
                return asked <= ended or (present <= ended and len(answers) > len(self.clients) // 2)

            changed.wait_for(enough, ANSWERS_WITHIN)
            self._present -= self._asked
            return list(answers.values())

    def _ask(self, client: Redis) -> Mapping[str, Any]:
        words: Any = client.execute_command("SENTINEL", "MASTER", self.sentinels.name)  # type: ignore[no-untyped-call]
        words = words.items() if isinstance(words, Mapping) else zip(words[::2], words[1::2], strict=True)
        said = {_text(name): _text(value) for name, value in words}
        if not (
            said["ip"] and said["flags"] and all(said[one].isdigit() for one in ("port", "config-epoch", "quorum"))
        ):
            raise ValueError
        return said


def _text(word: Any) -> str:
    return word.decode() if isinstance(word, bytes) else str(word)


@cache
def primary_of(sentinels: Sentinels, tls: tuple[tuple[str, Any], ...]) -> Primary:
    """Returns the one that all connections of this process share. `tls` has redis-py's parameters for that."""
    return Primary(sentinels, dict(tls))


class ToPrimary(Connection):
    """A connection to a primary, and to no server that is not.

    With a `Primary`, it asks where that is whenever it connects, and what a demoted server says is a lost connection to
    the client, which so connects again. Without, the name in REDIS_URL is looked up again after such an answer: where a
    provider fails over, it moves the name. In a cluster of one shard any server says which is the primary.
    """

    def __init__(self, *args: Any, primary: Primary | None = None, **options: Any) -> None:
        super().__init__(*args, **options)  # type: ignore[no-untyped-call]
        self.primary = primary
        self._at: Place | None = None
        self._named = Place(self.host, self.port)  # in REDIS_URL
        self._moved: Place | None = None  # where a server of the cluster has just sent us
        self._demoted = False

    @property
    def is_outdated(self) -> bool:
        """Returns whether it is connected to what is not, or no longer, the primary."""
        return self._demoted or (self.primary is not None and self._at != self.primary.at)

    def connect(self) -> None:
        """Connects, and first lets go of a server that is not the primary any more."""
        if self.is_outdated and self.is_connected:
            self.disconnect()  # type: ignore[no-untyped-call]
        super().connect()  # type: ignore[no-untyped-call]

    def _connect(self) -> Any:
        self._demoted = False
        if self.primary:
            self._at = self.primary.find()
            self.host, self.port = self._at
        elif TAG:
            self.host, self.port = self._moved or self._named
        return super()._connect()  # type: ignore[no-untyped-call]

    def on_connect_check_health(self, check_health: bool = True) -> None:
        super().on_connect_check_health(check_health)
        if self.primary:
            self.send_command("ROLE", check_health=False)  # type: ignore[no-untyped-call]
            if _text(self.read_response()[0]) != "master":
                self.primary.doubt()
                raise ConnectionError(NOT_A_PRIMARY)
        elif TAG:
            self._follow(check_health)

    def _follow(self, check_health: bool) -> None:
        """Connects to the primary of a cluster, if this server says that it is another."""
        self.send_command("EXISTS", TAG, check_health=False)  # type: ignore[no-untyped-call]
        try:
            super().read_response()
        except ResponseError as error:
            if self._moved or not isinstance(error, MovedError):
                raise ConnectionError(f"{error.status_code or ''} {error}") from None
            self._moved = Place(error.host or self.host, error.port)
            try:
                self.disconnect()  # type: ignore[no-untyped-call]
                self.connect_check_health(check_health)
            finally:
                self._moved = None

    def send_packed_command(self, command: Any, check_health: bool = True) -> None:
        if self.is_outdated and self.is_connected:
            # And not in silence: what the server knows of this connection (WATCH) is gone.
            self.disconnect()  # type: ignore[no-untyped-call]
            raise ConnectionError("Redis' primary is another now")
        super().send_packed_command(command, check_health)  # type: ignore[no-untyped-call]

    def read_response(self, *args: Any, **options: Any) -> Any:
        try:
            return super().read_response(*args, **options)
        except ResponseError as error:
            said = f"{error.status_code or ''} {error}"
            if not NOT_PRIMARY.search(said):
                raise
            self._demoted = True
            if not self.primary and not TAG:
                raise
            if self.primary:
                self.primary.doubt()
            raise ConnectionError(said) from None


class ToPrimaryByTLS(ToPrimary, SSLConnection):
    """The same with TLS."""
