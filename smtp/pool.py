"""Which session a mail gets: one that another mail has left, or a new one; and until when.

A session that is surely in order is kept for the next mail of any thread, never for long: a relay counts the clients
that hold a connection, and drops idle ones. One that had died meanwhile costs its mail nothing but time: what has not
got as far as the final dot goes out at once on a new session, in the same attempt; what has is never repeated here.

One thread watches all of them. It closes those nobody used, and ends a conversation at its deadline (but for the DNS
lookup, whose limit is the resolver's), so that a relay that drips a byte a second holds no worker. It exists as long as
there is something to watch.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

from smtp.session import Relay, Session, send
from smtp.verdict import Outcome, Reply

MOST_MAILS = 100  # per session: some relays end it after that many, or slow it down
OLDEST = 300  # seconds
# Seconds without a mail. Long enough for a queue with mail in it, and so short that hardly a relay or a NAT on the way
# has dropped the connection; who comes later pays for a new session, and no NOOP is ever needed.
IDLE = 5


class Keeper:
    """A session is in `running`, in `idle`, or one thread's alone. Whoever takes it out, under the lock, has it: the
    watcher cannot hang up on a mail that is not late, nor a mail begin on what is being closed."""

    def __init__(self) -> None:
        self.changed = threading.Condition()
        self.running: dict[Session, float] = {}  # with its mail's deadline
        self.idle: dict[Session, float] = {}  # until when it is kept; the last used is the last
        self.watcher: threading.Thread | None = None
        self.wakes_at = 0.0

    def take(self, to: Relay, until: float) -> Session:
        """A session for one mail: a kept one, or one that is still to be opened."""
        while session := self._take_kept(to):
            if session.is_quiet():
                break
            session.close()
        session = session or Session(to)
        self.run(session, until)
        return session

    def _take_kept(self, to: Relay) -> Session | None:
        with self.changed:
            kept = next((one for one in reversed(self.idle) if one.relay == to), None)
            if kept:
                del self.idle[kept]
            return kept

    def run(self, session: Session, until: float) -> None:
        with self.changed:
            self.running[session] = until
            self._watch_until(until)

    def give_back(self, session: Session) -> None:
        """After its mail: kept, or closed."""
        now = time.monotonic()
        ready = session.mails < MOST_MAILS and now - session.opened_at < OLDEST and session.make_ready()
        if not ready:
            return self.drop(session)
        with self.changed:
            self.running.pop(session, None)  # was it late, so that it has been hung up on? Then it is not quiet
            self.idle[session] = now + IDLE
            self._watch_until(now + IDLE)

    def drop(self, session: Session) -> None:
        with self.changed:
            self.running.pop(session, None)
        session.close()

    def close_all(self) -> None:
        """Those that no mail is using."""
        with self.changed:
            kept, self.idle = list(self.idle), {}
            self.changed.notify()
        for session in kept:
            session.close()

    def _watch_until(self, moment: float) -> None:
        if not self.watcher:
            self.watcher = threading.Thread(target=self._watch, name="sessions", daemon=True)
            self.watcher.start()
        elif moment < self.wakes_at:
            self.changed.notify()

    def _watch(self) -> None:
        while (unused := self._wait()) is not None:
            for session in unused:
                session.close()

    def _wait(self) -> list[Session] | None:
        """Sessions that have been idle for too long, after a while; None: there is nothing to watch any more."""
        with self.changed:
            now = time.monotonic()
            for session in [one for one, until in self.running.items() if until <= now]:
                del self.running[session]
                session.hang_up()
            unused = [one for one, until in self.idle.items() if until <= now]
            for session in unused:
                del self.idle[session]
            moments = [*self.running.values(), *self.idle.values()]
            if not moments and not unused:
                self.watcher = None
                return None
            if not unused:
                self.wakes_at = min(moments)
                self.changed.wait(self.wakes_at - now)
            return unused


keeper = Keeper()


class Conversation:
    """One mail's, with one deadline, on whatever session it has."""

    def __init__(self, to: Relay) -> None:
        self.until = time.monotonic() + to.deadline
        self.session = keeper.take(to, self.until)

    def send(
        self,
        sender: str,
        recipients: Sequence[str],
        mime: bytes,
        *,
        smtputf8: bool,
        before_dot: Callable[[Mapping[str, Reply]], None],
    ) -> Outcome:
        """As `send`; `before_dot` is called a second time where the session is replaced after the first."""
        used = self.session.mails > 0
        outcome = send(self.session, sender, recipients, mime, smtputf8=smtputf8, before_dot=before_dot)
        if not used or not outcome.reply.is_the_sessions_end or self.session.late.is_set():
            return outcome
        self._replace()
        return send(self.session, sender, recipients, mime, smtputf8=smtputf8, before_dot=before_dot)

    def _replace(self) -> None:
        keeper.drop(self.session)
        self.session = Session(self.session.relay)
        keeper.run(self.session, self.until)


@contextmanager
def conversation(to: Relay) -> Iterator[Conversation]:
    """The caller writes the outcome down in it: what is still to be said to the relay, RSET or QUIT, comes after it."""
    one = Conversation(to)
    try:
        yield one
    finally:
        keeper.give_back(one.session)


def close_all() -> None:
    """For a process that ends: says QUIT on each session that is kept."""
    keeper.close_all()
