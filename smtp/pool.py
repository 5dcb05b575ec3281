"""Which session a mail gets: one that another mail has left, or a new one; and until when.

A session that is surely healthy is kept for the next mail of any thread, never for long: a relay counts the clients
that hold a connection, and drops idle ones. One that had died meanwhile costs its mail nothing but time: what has not
got as far as the final dot goes out at once on a new session, in the same attempt; what has is never repeated here.

One thread watches all of them. It closes those nobody used, and ends a conversation at its deadline (but for the DNS
lookup, whose limit is the resolver's), so that a relay that drips a byte a second holds no worker. It exists as long as
there is something to watch.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from smtp.envelope import Envelope
from smtp.policy import Verdict
from smtp.relay import Relay
from smtp.session import Replies, Session, Stopped, Transaction
from smtp.verdict import Outcome, Reply

MOST_MAILS = 100  # per session: some relays end it after that many, or slow it down
OLDEST = 300  # seconds
# Seconds without a mail. Long enough for a queue with mail in it, and so short that hardly a relay or a NAT on the way
# has dropped the connection; a later mail pays for a new session, and no NOOP is ever needed.
IDLE = 5
SOON = 0.5  # seconds


class SessionPool:
    """Keeps sessions for the next mail. Under the lock, each is in `running`, in `idle`, or with the thread that took
    it out: so the watcher aborts no mail that is not late, and no mail begins on a session that is being closed."""

    def __init__(self) -> None:
        self.changed = threading.Condition()
        self.running: dict[Session, float] = {}  # with its mail's deadline
        self.idle: dict[Session, float] = {}  # until when it is kept; the last used is the last
        self.one_by_one: set[Relay] = set()  # those that announce PIPELINING and do not take it
        self.watcher: threading.Thread | None = None
        self.wakes_at = 0.0

    @contextmanager
    def conversation(self, relay: Relay, announced: Conversation | None = None) -> Iterator[Conversation]:
        """Lends a session for one mail, or goes on with one that was announced. The body must write the outcome down:
        what is still to be said to the relay, RSET or QUIT, comes after it."""
        talk = announced or Conversation(self, relay)
        try:
            yield talk
        finally:
            talk.end()

    def acquire(self, relay: Relay, deadline: float, *, kept: bool = True) -> Session:
        """Returns a session for one mail: one that was kept, or a new one."""
        session = self._take_idle(relay) if kept else None
        while session and not session.is_quiet():
            session.close()
            session = self._take_idle(relay)
        session = session or Session(relay)
        session.may_pipeline = relay not in self.one_by_one
        with self.changed:
            self.running[session] = deadline
            self._watch_until(deadline)
        return session

    def _take_idle(self, relay: Relay) -> Session | None:
        with self.changed:
            session = next((one for one in reversed(self.idle) if one.relay == relay), None)
            if session:
                del self.idle[session]
            return session

    def may_follow(self, session: Session) -> bool:
        """Returns whether the commands of another mail may go out with this one's final dot: where the relay takes
        commands together, and has answered the last dot soon. Else a slow one would hold up two mails."""
        is_new = session.mails < MOST_MAILS and time.monotonic() - session.opened_at < OLDEST
        return is_new and session.pipelined and session.may_pipeline and session.dot_took < SOON

    def release(self, session: Session) -> None:
        """Keeps the session for the next mail if it is healthy and not worn out, or else closes it."""
        now = time.monotonic()
        if not (session.mails < MOST_MAILS and now - session.opened_at < OLDEST and session.reset()):
            return self.discard(session)
        with self.changed:
            self.running.pop(session, None)  # it may have been late and so aborted: then it is not quiet
            self.idle[session] = now + IDLE
            self._watch_until(now + IDLE)

    def prolong(self, session: Session, deadline: float) -> None:
        """Gives a session that is running another deadline."""
        with self.changed:
            if session in self.running:
                self.running[session] = deadline
                self._watch_until(deadline)

    def discard(self, session: Session) -> None:
        with self.changed:
            self.running.pop(session, None)
        session.close()

    def counts(self, relay: Relay | None = None) -> tuple[int, int]:
        """Returns how many sessions are busy with a mail, and how many are kept for the next; those with one relay, or
        all."""
        with self.changed:
            busy, idle = (sum(relay in (None, one.relay) for one in kept) for kept in (self.running, self.idle))
            return busy, idle

    def close_all(self) -> None:
        """Closes the sessions that no mail is using, with a QUIT each: for a process that ends."""
        with self.changed:
            idle, self.idle = list(self.idle), {}
            self.changed.notify()
        for session in idle:
            session.close()

    def _watch_until(self, moment: float) -> None:
        if not self.watcher:
            self.watcher = threading.Thread(target=self._watch, name="sessions", daemon=True)
            self.watcher.start()
        elif moment < self.wakes_at:
            self.changed.notify()

    def _watch(self) -> None:
        """Aborts what is late and closes what has been idle for too long, until there is nothing to watch any more."""
        while True:
            with self.changed:
                now = time.monotonic()
                for session in [one for one, deadline in self.running.items() if deadline <= now]:
                    del self.running[session]
                    session.abort()
                unused = [one for one, until in self.idle.items() if until <= now]
                for session in unused:
                    del self.idle[session]
                moments = [*self.running.values(), *self.idle.values()]
                if not moments and not unused:
                    self.watcher = None
                    return
                if not unused:
                    self.wakes_at = min(moments)
                    self.changed.wait(self.wakes_at - now)
            for session in unused:
                session.close()


class Conversation:
    """Sends one mail, with one deadline, on the session that it has.

    `begin` and `finish` return the outcome, or the replies to RCPT if all but the final dot is out and `finish` comes
    next. That may be so once after `finish`: where a kept session died at the dot, the mail has begun again on a new
    one, which is not replaced.
    """

    def __init__(self, pool: SessionPool, relay: Relay, before: Conversation | None = None) -> None:
        self.pool = pool
        self.relay = relay
        self.deadline = time.monotonic() + relay.deadline
        self.session: Session = before.session if before else pool.acquire(relay, self.deadline)
        self.planned: Transaction | None = None  # of a mail that was announced
        self.next: Conversation | None = None

    def announce(self, envelope: Envelope, mime: bytes) -> Conversation | None:
        """Lets the commands of the next mail go out with this one's final dot, so that two mails share a round trip.
        Returns its conversation, which comes next: `begin` goes on there; or None where it may not be."""
        if self.next or not self.pool.may_follow(self.session):
            return None
        with suppress(Stopped):  # its own conversation will find out
            planned = self.session.plan(envelope, len(mime))
            if planned.rcpt:
                self.next = Conversation(self.pool, self.relay, before=self)
                self.next.planned = planned
        return self.next

    @property
    def is_under_way(self) -> bool:
        """Returns whether the commands of this mail, which was announced, are out and wait for `begin`."""
        return self._is_announced and not self.session.aborted.is_set()

    @property
    def _is_announced(self) -> bool:
        return self.planned is not None and self.session.following is self.planned

    def end(self) -> None:
        """Lets go of the session, unless the next mail is under way there."""
        if not (self.next and self.next.is_under_way):
            self.pool.release(self.session)

    def drop(self) -> None:
        """Gives up a mail that was announced and will not begin. The relay waits for its text, so nothing else can be
        said there."""
        if self._is_announced:
            self.pool.discard(self.session)

    def begin(self, envelope: Envelope, mime: bytes) -> Replies | Outcome:
        self.envelope, self.mime = envelope, mime
        if self.is_under_way:
            self.pool.prolong(self.session, self.deadline)
        elif self.planned:
            self.drop()  # it was aborted, at the deadline of the mail before
            self.session = self.pool.acquire(self.relay, self.deadline)
        try:
            return self.session.begin(envelope, mime)
        except Stopped as stopped:
            return self._decided(stopped.reply)

    def finish(self) -> Replies | Outcome:
        try:
            return self._decided(self.session.finish(self.next.planned if self.next else None))
        except Stopped as stopped:
            return self._decided(stopped.reply)

    def figures(self, since: float) -> dict[str, Any]:
        """Returns the TLS version and size of the mail that was decided right now, and in how many ms since then (of
        time.monotonic()) its final dot was out, if it was, and the reply here."""
        took = [round((at - since) * 1000) if at else None for at in (self.session.dot_at, time.monotonic())]
        return {"dot_ms": took[0], "took_ms": took[1], "tls": self.session.tls, "bytes": len(self.mime)}

    def _decided(self, final: Reply) -> Replies | Outcome:
        relay, was_kept = self.session.relay, self.session.mails > 1
        unlearned = self.session.pipelined and (
            final.is_against_pipelining
            or (self.next is not None and final.refuses_what_follows)
            or (self.planned is not None and final.is_silence)
        )
        self.planned = None
        if unlearned:
            self.pool.one_by_one.add(relay)
        if (unlearned or (was_kept and final.is_the_sessions_end)) and not self.session.aborted.is_set():
            self.pool.discard(self.session)
            self.next = None  # it finds that it is not under way
            self.session = self.pool.acquire(relay, self.deadline, kept=False)
            return self.begin(self.envelope, self.mime)
        # A recipient that was refused at RCPT keeps that reply; the others share the fate of the mail.
        refused = {who: reply for who, reply in self.session.replies.items() if reply.verdict is not Verdict.ACCEPTED}
        return Outcome(final, {who: refused.get(who, final) for who in self.envelope.recipients})
