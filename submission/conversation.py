"""One client's connection: aiosmtpd's protocol, with bounds, and with an end of the mail that nobody can move.

A mail ends at CRLF.CRLF and nowhere else. It is read as it comes, and what exceeds a few kilobytes is on the disk until
its turn, so that a slow client, or many large mails, take no memory from the others. All of a connection is bounded:
how long it may wait before its login, between two commands, for a mail, and in all.
Standards: RFC 5321 (SMTP), 6409 (submission), 4954 (AUTH), 3207 (STARTTLS), 2920 (PIPELINING), 1870 (SIZE).
"""

from __future__ import annotations

import asyncio
import re
import socket
import ssl
from collections import Counter
from contextlib import suppress
from tempfile import SpooledTemporaryFile
from typing import BinaryIO, cast

from aiosmtpd.smtp import SMTP, Envelope

from mail.address import Mailbox
from process.api_keys import ApiKey
from process.guesses import network
from process.sockets import open_files
from submission.handler import Handler

END = b"\r\n.\r\n"
IN_MEMORY = 32 * 1024  # bytes of a mail that is being read
AT_ONCE = 2**24  # more than the stream's buffer ever holds, so that nothing is left in it
IDLE = 300  # seconds: between two commands, and for a whole mail (RFC 5321 4.5.3.2.7)
LOGIN_WITHIN = 60  # seconds
LONGEST = 3600  # seconds of a connection; the client opens another
MOST = 1000  # connections
PER_CONNECTION, BESIDE = 2, 100  # files: a mail that is being read is one; sockets of Redis, what Python opens
MOST_OF_ONE = 100  # of them from one address, or one IPv6 network; loopback may have all
STARTTLS_PORT = 587  # RFC 6409 3.1
TLS_PORT = 465  # RFC 8314 3.3: TLS from the first byte
IDENT = "async-email"


class Conversations:
    """All that are open in this process."""

    def __init__(self, handler: Handler, tls: ssl.SSLContext | None, hostname: str) -> None:
        self.handler = handler
        self.tls = tls
        self.hostname = hostname
        self.open: set[Conversation] = set()
        self.places: Counter[str] = Counter()
        self.most = max(1, min(MOST, (open_files(MOST * PER_CONNECTION + BESIDE) - BESIDE) // PER_CONNECTION))

    def admit(self, one: Conversation) -> bool:
        place = network(one.address)
        if len(self.open) >= self.most or (self.places[place] >= MOST_OF_ONE and place != "loopback"):
            return False
        self.open.add(one)
        self.places[place] += 1
        return True

    def forget(self, one: Conversation) -> None:
        if one in self.open:
            self.open.remove(one)
            self.places -= Counter([network(one.address)])

    def stop(self) -> None:
        """Ends those that have no mail in hand, and each other one after its mail."""
        for one in list(self.open):
            one.leave_soon("the service is stopping")


class Conversation(SMTP):
    """A client, from its greeting to its end."""

    AuthLoginUsernameChallenge = "Username:"  # as clients know it
    AuthLoginPasswordChallenge = "Password:"

    def __init__(self, all_of_them: Conversations, encrypted: bool) -> None:
        handler = all_of_them.handler
        super().__init__(
            handler,
            hostname=all_of_them.hostname,  # else it asks the DNS for each
            ident=IDENT,
            data_size_limit=handler.settings.max_message_bytes,
            enable_SMTPUTF8=True,
            timeout=IDLE,
            tls_context=None if encrypted else all_of_them.tls,
            auth_require_tls=False,  # the handler sees to it, which knows loopback
            authenticator=handler.authenticate,
            loop=asyncio.get_running_loop(),
        )
        self.all_of_them = all_of_them
        self.encrypted = encrypted
        self.address = ""
        self.sender = ""
        self.recipients: dict[str, Mailbox] = {}
        self.body: BinaryIO | None = None
        self.size = 0
        self.timer: asyncio.TimerHandle | None = None
        self.ending = ""  # why no further mail is taken

    @property
    def key(self) -> ApiKey:
        return cast(ApiKey, self.session.auth_data if self.session else None)

    @property
    def may_log_in(self) -> bool:
        """Returns whether nobody on the way can read a password."""
        is_encrypted = self.encrypted or bool(self.session and self.session.ssl)
        return is_encrypted or network(self.address) in ("loopback", "")  # or a socket file

    @property
    def needs_no_tls(self) -> bool:
        """Returns whether TLS is not offered: to this machine, or a program that takes what is offered would refuse a
        certificate that is not for 127.0.0.1. On port 587 it is, for a program there that was told to use it."""
        here = self.transport.get_extra_info("sockname") if self.transport else None
        return self.may_log_in and not (isinstance(here, tuple) and here[1] == STARTTLS_PORT)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        if self.session is None:  # and not the second time, after STARTTLS
            peer = transport.get_extra_info("peername")
            self.address = peer[0] if isinstance(peer, tuple) else ""
            if not self.all_of_them.admit(self):
                cast(asyncio.Transport, transport).write(b"421 4.3.2 too many connections: try again later\r\n")
                transport.close()
                return
            self.timer = self.loop.call_later(LOGIN_WITHIN, self._end_unless_logged_in)
        super().connection_made(transport)

    def connection_lost(self, error: Exception | None) -> None:
        if self.timer:
            self.timer.cancel()
        if self in self.all_of_them.open:
            self.all_of_them.forget(self)
            super().connection_lost(error)

    def eof_received(self) -> bool | None:
        return super().eof_received() if self.session else False

    def _end_unless_logged_in(self) -> None:
        if not self.key:
            self.leave("log in within a minute")
            return
        self.timer = self.loop.call_later(LONGEST, self.leave_soon, "this connection has been open long enough")

    def leave_soon(self, why: str) -> None:
        """Ends the conversation; if a transaction is open, after that."""
        self.ending = why
        if self.body is None and not (self.envelope and self.envelope.mail_from):
            self.leave(why)

    def leave(self, why: str) -> None:
        if self.transport:
            with suppress(OSError):
                cast(asyncio.Transport, self.transport).write(f"421 4.3.2 {why}\r\n".encode())
            self.transport.close()

    async def hang_up(self, arg: str | None) -> None:
        """Ends with what speaks HTTP: a page in somebody's browser could send a whole conversation in a form."""
        raise ConnectionResetError

    smtp_GET = smtp_HEAD = smtp_POST = smtp_PUT = smtp_OPTIONS = smtp_CONNECT = smtp_PRI = hang_up

    async def smtp_AUTH(self, arg: str | None) -> None:
        """Takes the mechanism in small letters, too (RFC 4422 3.1)."""
        mechanism, _, rest = (arg or "").partition(" ")
        await super().smtp_AUTH(f"{mechanism.upper()} {rest}".strip())

    async def smtp_MAIL(self, arg: str | None) -> None:
        """Takes AUTH=, which Postfix adds for a server that knows AUTH, and means nothing here (RFC 4954 5); and names
        the limit of SIZE= by its code."""
        if self.ending:
            self.leave(self.ending)
            return
        address, bracket, options = (arg or "").partition(">")
        options = re.sub(r"(?i)\s+AUTH=\S+", "", options)
        size = re.search(r"(?i)\sSIZE=([0-9]{1,20})(?!\S)", options)
        if self.key and size and int(size[1]) > (self.data_size_limit or 0):
            await self.push(self._too_large)
            return
        await super().smtp_MAIL(f"{address}{bracket}{options}" or None)

    @property
    def _too_large(self) -> str:
        return f"552 5.3.4 the mail must have at most {self.data_size_limit} bytes"

    async def smtp_DATA(self, arg: str | None) -> None:
        """Reads the mail, and answers what becomes of it."""
        if await self.check_helo_needed():
            return
        if arg or not (self.envelope and self.envelope.rcpt_tos):
            await self.push("501 5.5.4 DATA has no parameter" if arg else "503 5.5.1 RCPT must come before DATA")
            return
        await self.push("354 End data with <CR><LF>.<CR><LF>")
        with SpooledTemporaryFile(IN_MEMORY) as body:
            self.body = cast(BinaryIO, body)
            try:
                self.size = await self._read_mail(self.body)
                if self.size > (self.data_size_limit or 0):
                    reply = self._too_large
                else:
                    reply = await self.handler.receive(self, self.envelope)
            finally:
                self.body, self.envelope = None, Envelope()
        await self.push(reply)
        if self.ending:
            self.leave(self.ending)

    @property
    def handler(self) -> Handler:
        return self.all_of_them.handler

    async def _read_mail(self, body: BinaryIO) -> int:
        """Reads to the end of the mail and returns its size. Writes it as it came, behind a CRLF, which is that of DATA
        (a mail of nothing but a dot ends with it); no more of one that is too large. What follows the end was sent
        ahead, and is the next command."""
        size, held = 0, b"\r\n"
        while True:
            piece = await self._reader.read(AT_ONCE)
            if not piece:
                raise ConnectionResetError
            held += piece
            end = held.find(END)
            stop = end + 2 if end >= 0 else max(0, len(held) - len(END) + 1)
            size += stop
            if size <= (self.data_size_limit or 0) + 2:
                body.write(held[:stop])
            if end >= 0:
                if rest := held[end + len(END) :]:
                    self._reader.feed_data(rest)
                return size - 2
            held = held[stop:]


def hostname(ehlo_name: str | None) -> str:
    return ehlo_name or socket.gethostname()
