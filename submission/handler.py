"""What each command is answered: who may log in, who may send, to whom, and when a mail is ours.

`250` to a mail means that it is stored, by the same step as a request of the API. Redis is asked in threads, so that no
client waits for another's mail; a Redis that is away is waited for, since many clients drop what is not taken at once.
aiosmtpd calls the `handle_` methods: https://aiosmtpd.aio-libs.org/en/latest/handlers.html
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any, BinaryIO, NamedTuple

from aiosmtpd.smtp import MISSING, AuthResult, Envelope, LoginPassword, Session, TLSSetupException

from mail.address import Mailbox
from mail.counters import ACCEPT, Gathered
from mail.index import new_id
from mail.message import who_gets
from mail.outbox import Outbox
from mail.raw import address_of
from process.api_keys import ApiKey, find_key
from process.guesses import Guesses, network
from process.log import emit, where
from queues.connection import CANNOT_NOW, Unavailable
from queues.jobs import IdempotencyConflict, Jobs
from queues.limits import Limits
from settings import Settings
from submission import intake
from submission.intake import Refused, take

THREADS = 8  # that speak with Redis; a mail's work in one of them is short
LARGE = 256 * 1024  # bytes; of mails beyond that, one at a time is in memory
PATIENCE = 30  # seconds for which Redis may be away
PAUSE = 1.0  # seconds between tries
SLOW = 1.0  # seconds before a login is looked at, once one from this address was wrong
FULL = "452 4.3.1 the queue is full: send this again later"
AWAY = "451 4.3.0 the mail cannot be stored now: send this again later"
CLIENTS = (TLSSetupException, ConnectionError, asyncio.LimitOverrunError, asyncio.IncompleteReadError)  # their faults
LONGEST_REPLY = 500  # characters; RFC 5321 4.5.3.1.5 has 512 octets


class Outcome(NamedTuple):
    """What a mail was answered. `id` is empty if it was not taken."""

    reply: str
    reason: str = ""
    id: str = ""
    replayed: bool = False


class Handler:
    """Answers for all connections of this process."""

    def __init__(self, jobs: Jobs, settings: Settings) -> None:
        self.settings = settings
        self.outbox = Outbox(jobs, settings)
        self.limits = Limits(jobs.redis)
        self.accepting = Gathered(jobs.redis, ACCEPT)
        self.guesses = Guesses()
        self.wrong: set[str] = set()  # networks whose last login was wrong
        self.threads = ThreadPoolExecutor(THREADS, "store")
        self.large = asyncio.Semaphore(1)

    async def handle_EHLO(self, server: Any, session: Session, envelope: Envelope, name: str, said: list[str]) -> Any:
        session.host_name = name
        hidden = "250-STARTTLS" if server.needs_no_tls else "250-AUTH" if not server.may_log_in else None
        shown = [line for line in said if not (hidden and line.startswith(hidden))]
        return [*shown[:-1], "250-PIPELINING", shown[-1]]

    async def handle_AUTH(self, server: Any, session: Session, envelope: Envelope, words: list[str]) -> Any:
        """Counts a login before it is looked at, and slows it down if one from its address was wrong."""
        if not server.may_log_in:
            return "538 5.7.11 the connection must be encrypted: STARTTLS, or port 465"
        if network(server.address) in self.wrong:
            await asyncio.sleep(SLOW)
        if not self.guesses.take(server.address) and network(server.address) != "loopback":
            emit("login_refused", logging.WARNING, at="submission", reason="too many")
            return "454 4.7.0 too many wrong logins from this address: wait a minute"
        return MISSING

    def authenticate(self, server: Any, session: Session, envelope: Envelope, mechanism: str, given: Any) -> AuthResult:
        """Takes an API key as the password, and anything as the user. Scopes: each may send."""
        assert isinstance(given, LoginPassword)
        key, place = find_key(self.settings.api_keys, given.password.strip()), network(server.address)
        if not key:
            self.wrong = {place, *list(self.wrong)[:1000]}
            emit("login_refused", logging.WARNING, at="submission")
            return AuthResult(success=False, handled=False, message="535 5.7.8 the password must be an API key")
        self.guesses.give_back(server.address)
        self.wrong.discard(place)
        return AuthResult(success=True, auth_data=key)

    async def handle_MAIL(self, server: Any, session: Session, envelope: Envelope, given: str, options: Any) -> str:
        if not session.authenticated:
            return "530 5.7.0 the client must log in: the password is an API key"
        address, reply = ("", "") if given == "<>" else self._address(given, "553 5.1.8")
        key = server.key
        if address and not key.may_send_from(address):
            reply = f"550 5.7.1 the sender must be at {' or '.join(key.domains)}, as the API key is for"
        if reply:
            return self._refuse(server, "mail", reply)
        server.sender, server.recipients = address, {}
        envelope.mail_from = given  # which opens the transaction
        return "250 2.1.0 OK"

    async def handle_RCPT(self, server: Any, session: Session, envelope: Envelope, given: str, options: Any) -> str:
        address, reply = self._address(given, "553 5.1.3")
        box, most, known = Mailbox("", address), self.settings.max_recipients, server.recipients
        if not reply and not who_gets(box, self.settings):
            reply = "550 5.7.1 the recipient must be on MAIL_ALLOWLIST: this service sends to nobody else"
        if not reply and len(known) >= most and address not in known:
            reply = f"452 4.5.3 a mail may have {most} recipients: send it to the others apart"
        if reply:
            return self._refuse(server, "rcpt", reply)
        known[address] = box
        envelope.rcpt_tos.append(given)
        return "250 2.1.5 OK"

    def _address(self, given: str, code: str) -> tuple[str, str]:
        """Returns the address as it goes into an envelope; or "" and why it cannot."""
        try:
            address = address_of(given)
        except ValueError:
            return "", f"{code} the address must be a mailbox (RFC 5321 4.1.2)"
        if Mailbox("", address).is_local and not self.settings.allow_local_domains:
            return "", f"{code} the address must have a domain with a dot, unless ALLOW_LOCAL_DOMAINS=yes"
        return address, ""

    def _refuse(self, server: Any, phase: str, reply: str) -> str:
        emit("submission", status=reply[:3], phase=phase, reason=reply.split(" ", 2)[-1], key=server.key.name)
        return reply

    async def receive(self, server: Any, envelope: Envelope) -> str:
        """Answers for the mail in `server.body`, of which nobody else knows yet."""
        started = time.perf_counter()
        asked = intake.Envelope(server.sender, list(server.recipients.values()), envelope.smtp_utf8)
        outcome = await self.store(server.body, server.size, asked, server.key)
        seconds = time.perf_counter() - started
        if outcome.id:
            self.accepting.add(seconds)
        emit(
            "submission",
            logging.WARNING if outcome.reply.startswith("451") else logging.INFO,
            status=outcome.reply[:3],
            reason=outcome.reason,
            ms=seconds * 1000,
            bytes=server.size,
            key=server.key.name,
            old_key=server.key.old or None,
            id=outcome.id,
            replayed=outcome.replayed or None,
        )
        return outcome.reply

    async def store(self, body: BinaryIO, size: int, envelope: intake.Envelope, key: ApiKey) -> Outcome:
        """Stores a mail, and tries again while Redis is away: with the same id, since a try may have done it."""
        deadline, mail_id, counted = time.monotonic() + PATIENCE, new_id(), not key.rate
        loop = asyncio.get_running_loop()
        while True:
            try:
                if not counted:
                    await loop.run_in_executor(self.threads, self._hold_to_its_rate, key)
                    counted = True
                if size <= LARGE:
                    return await loop.run_in_executor(self.threads, self._accept, body, envelope, key, mail_id)
                async with self.large:
                    return await loop.run_in_executor(self.threads, self._accept, body, envelope, key, mail_id)
            except Refused as refused:
                return Outcome(str(refused)[:LONGEST_REPLY], refused.reason)
            except Unavailable as error:
                if str(error) == CANNOT_NOW["OOM"]:
                    return Outcome(FULL, str(error))
                if time.monotonic() + PAUSE > deadline:
                    return Outcome(AWAY, str(error))
                await asyncio.sleep(PAUSE)

    def _hold_to_its_rate(self, key: ApiKey) -> None:
        if key.rate and (wait := self.limits.take(f"key:{key.name}", key.rate)):
            raise Refused(f"451 4.7.0 this API key may send {key.rate}: send this again in {math.ceil(wait)} seconds")

    def _accept(self, body: BinaryIO, envelope: intake.Envelope, key: ApiKey, mail_id: str) -> Outcome:
        taken = take(plain(body), envelope, key, self.settings)
        try:
            stored = self.outbox.accept([taken.draft], taken.idempotency, ids=[mail_id], known_for=taken.known_for)
        except IdempotencyConflict:
            raise Refused("554 5.6.0 Resend-Idempotency-Key: was used before, for another mail") from None
        return Outcome(f"250 2.6.0 stored as {stored.id}", "", stored.id, stored.replayed)

    async def handle_exception(self, error: Exception) -> str:
        if isinstance(error, CLIENTS) or isinstance(error.__context__, CLIENTS):
            return "500 5.5.2 this cannot be understood"
        emit("crashed", logging.ERROR, where=where(error))
        return "451 4.3.0 this is a fault of the service, whose log says where"


def plain(body: BinaryIO) -> bytes:
    """Returns the mail without what SMTP has put in: the CRLF before its first line, and a second dot at the beginning
    of a line (RFC 5321 4.5.2)."""
    body.seek(0)
    return body.read().replace(b"\r\n.", b"\r\n")[2:]
