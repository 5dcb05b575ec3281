"""One connection to the relay and the mails that go over it.

Certificates are verified, STARTTLS never falls back to plain text, an address goes out exactly as it was accepted or
not at all. Which session a mail gets, and its deadline, are in smtp.pool. The only home of `smtplib`.
Standards: RFC 5321 (SMTP), 3207 (STARTTLS), 4954 (AUTH), 8314 (implicit TLS), 6531 (SMTPUTF8), 2920 (PIPELINING),
3030 (CHUNKING).
"""

from __future__ import annotations

import re
import smtplib
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import lru_cache
from typing import NamedTuple

from settings import Settings
from smtp.verdict import Outcome, Phase, Reply, Verdict

CHUNK = 64 * 1024  # bytes of the body
SEND_BUFFER = 256 * 1024  # bytes
END = 2  # bytes of a chunk that are kept back like a final dot
FRESH = 1  # seconds since the last reply, for which a session is surely not dead
PATIENCE = 2  # seconds per reply that is only needed to keep a session
LAST_WORDS = 0.2  # seconds; what the relay said before it hung up is here already
ADDRESS = re.compile(r"[^\x00-\x20\x7f<>]+")  # what fits between < and >
UNSPEAKABLE = (553, "this address cannot be written into an SMTP command")


class Relay(NamedTuple):
    """Where the relay is and how to speak to it. Times in seconds."""

    host: str
    port: int
    security: str  # starttls, tls or none
    username: str | None
    password: str | None
    ca_file: str | None
    timeout: float  # for a connection, for one reply (but that to the final dot), for the next CHUNK of the body
    deadline: float  # for one conversation

    @classmethod
    def of(cls, current: Settings) -> Relay:
        """Returns the relay that the settings name."""
        return cls(
            host=current.smtp_host or "",
            port=current.smtp_port,
            security=current.smtp_security,
            username=current.smtp_username,
            password=current.smtp_password.get_secret_value() if current.smtp_password else None,
            ca_file=str(current.smtp_ca_file) if current.smtp_ca_file else None,
            timeout=current.smtp_timeout,
            deadline=current.deliver_timeout,
        )

    def __str__(self) -> str:
        return f"{self.host}:{self.port}"

    def __repr__(self) -> str:
        """A tuple's own would show the password to whatever prints the variables of a traceback."""
        return str(self)


class Stopped(Exception):
    """The conversation is over; `reply` says why."""

    def __init__(self, reply: Reply) -> None:
        super().__init__(reply.summary)
        self.reply = reply


@lru_cache(maxsize=1)
def own_name() -> str:
    """For EHLO. Asked once: a resolver that does not answer would cost seconds each time."""
    return str(smtplib.SMTP().local_hostname)


@lru_cache(maxsize=4)
def tls_context(ca_file: str | None) -> ssl.SSLContext:
    return ssl.create_default_context(cafile=ca_file)


class _Client(smtplib.SMTP):
    """smtplib's client, for which a reply that is not SMTP is the last: nobody could tell what the next one answers."""

    def getreply(self) -> tuple[int, bytes]:
        try:
            code, text = super().getreply()
        except smtplib.SMTPResponseException:  # so it calls a line of more than 8 KiB, and blames the relay for a 500
            code, text = -1, b"a reply longer than SMTP allows"
        if not 200 <= code <= 599:
            raise smtplib.SMTPResponseException(code, text)
        return code, text


class Letter(NamedTuple):
    """A mail as it goes out: its commands, and its body in lines that end in CRLF."""

    mail: bytes
    rcpt: dict[str, bytes]
    body: bytes


class Session:
    """One connection and its mails, one after the other. Each step raises `Stopped` with the phase it reached when the
    relay does not say yes."""

    def __init__(self, relay: Relay) -> None:
        self.relay = relay
        self.phase = Phase.CONNECT
        self.sound = False  # the last step came to its end
        self.owed = 0  # replies to what is out already
        self.begun = False  # a transaction, that the relay has not ended
        self.unfinished = False  # a part of a mail is out, and not its end: any word now would be taken for mail
        self.out = False  # all of the mail
        self.last: Reply | None = None
        self.mails = 0
        self.opened_at = self.heard_at = time.monotonic()
        self.late = threading.Event()
        self.line: socket.socket | None = None
        self.smtp = _Client(local_hostname=own_name(), timeout=relay.timeout)
        # starttls() checks the certificate against this name, which smtplib knows only when it connects by itself.
        self.smtp._host = relay.host  # type: ignore[attr-defined]

    @contextmanager
    def step(self, phase: Phase) -> Iterator[None]:
        """One phase: whatever goes wrong in it becomes `Stopped`, without the relay's words in an exception text."""
        self.phase, self.sound = phase, False
        try:
            yield
            self.sound = True
        except smtplib.SMTPResponseException as error:
            raise Stopped(Reply(phase, error.smtp_code, _text(error.smtp_error))) from None
        except (OSError, ValueError) as error:  # OSError is the base of smtplib's exceptions, too
            text = "the conversation took too long" if self.late.is_set() else _reason(error)
            raise Stopped(Reply(phase, None, text)) from None

    def reply(self, answer: tuple[int, bytes]) -> Reply:
        return Reply(self.phase, answer[0], _text(answer[1]))

    def expect(self, reply: Reply) -> None:
        if reply.verdict is not Verdict.ACCEPTED:
            raise Stopped(reply)

    def open(self) -> None:
        with self.step(Phase.CONNECT):
            self.connect()
        with self.step(Phase.GREETING):
            self.expect(self.reply(self.smtp.getreply()))
        with self.step(Phase.HELLO):
            self.smtp.ehlo_or_helo_if_needed()
        if self.relay.security == "starttls":
            with self.step(Phase.STARTTLS):
                self.smtp.starttls(context=tls_context(self.relay.ca_file))
                self.smtp.ehlo_or_helo_if_needed()
        if self.relay.username:
            with self.step(Phase.AUTH):
                self.login(self.relay.username, self.relay.password or "")
        self.heard_at = time.monotonic()

    def connect(self) -> None:
        self.smtp.sock = line = _dial(self.relay)
        # `hang_up` needs a handle of its own, for during a TLS handshake smtplib's socket is nobody's. It sets `late`
        # before it looks at `line`, and here it is the other way round, so one of the two notices.
        self.line = line.dup()
        if self.late.is_set():
            raise TimeoutError
        if self.relay.security == "tls":
            self.smtp.sock = tls_context(self.relay.ca_file).wrap_socket(line, server_hostname=self.relay.host)

    def login(self, username: str, password: str) -> None:
        """Tries one mechanism: smtplib's login() tries all, and a wrong password then counts as three break-ins."""
        offered = self.smtp.esmtp_features.get("auth", "").upper().split()
        mechanism = next((name for name in ("PLAIN", "LOGIN", "CRAM-MD5") if name in offered), None)
        if not mechanism:
            raise smtplib.SMTPNotSupportedError("the relay offers no AUTH PLAIN, LOGIN or CRAM-MD5")
        self.smtp.user, self.smtp.password = username, password
        self.smtp.auth(mechanism, getattr(self.smtp, "auth_" + mechanism.lower().replace("-", "_")))

    def letter(
        self, sender: str, recipients: Sequence[str], mime: bytes, smtputf8: bool, replies: dict[str, Reply]
    ) -> Letter:
        """Whose address cannot stand in a command is refused here, for good and unsent: it would be no better next
        time. Of recipients that is noted in `replies`."""
        if smtputf8 and not self.smtp.has_extn("smtputf8"):
            # RFC 6531 3.3: such a mail cannot go through this relay, now or later.
            raise Stopped(Reply(Phase.MAIL, 550, "5.6.7 the relay does not offer SMTPUTF8, which an address needs"))
        options = [f"SIZE={len(mime)}"] if self.smtp.has_extn("size") else []
        options += ["SMTPUTF8"] if smtputf8 else []
        encoding = "utf-8" if smtputf8 else "ascii"
        mail = _command("MAIL FROM", sender, encoding, *options)
        if not mail:
            raise Stopped(Reply(Phase.MAIL, *UNSPEAKABLE))
        commands = {who: _command("RCPT TO", who, encoding) for who in recipients}
        replies.update({who: Reply(Phase.RCPT, *UNSPEAKABLE) for who, line in commands.items() if not line})
        return Letter(mail, {who: line for who, line in commands.items() if line}, _lines(mime))

    def transact(self, letter: Letter, replies: dict[str, Reply], before_dot: Callable[[], None]) -> Reply:
        """From MAIL to the reply to the final dot, in as few round trips as the relay allows. Until `before_dot` has
        returned, it cannot have accepted anything."""
        if not letter.rcpt:
            raise Stopped(_gravest(replies.values()))
        self.out, self.begun = False, True
        if self.may_chunk(letter):
            return self.chunk(letter, replies, before_dot)
        if self.smtp.has_extn("pipelining"):
            with self.step(Phase.MAIL):
                self.write(letter.mail, *letter.rcpt.values(), b"DATA\r\n")
        self.introduce(letter, replies)
        return self.body(letter.body, before_dot)

    def may_chunk(self, letter: Letter) -> bool:
        """Where not a reply is awaited before the end of the mail, a connection that died unnoticed would leave it in
        doubt. So it must be known to live, and the mail one that the kernel takes at once."""
        offered = self.smtp.has_extn("pipelining") and self.smtp.has_extn("chunking")
        return offered and len(letter.body) <= SEND_BUFFER and time.monotonic() - self.heard_at < FRESH

    def introduce(self, letter: Letter, replies: dict[str, Reply]) -> None:
        """MAIL and RCPT. One recipient refused does not stop the others, unless the relay closes on all (421)."""
        self.expect(self.ask(Phase.MAIL, letter.mail))
        for who, line in letter.rcpt.items():
            replies[who] = self.ask(Phase.RCPT, line)
            if replies[who].code == 421:
                raise Stopped(replies[who])
        if not any(reply.verdict is Verdict.ACCEPTED for reply in replies.values()):
            raise Stopped(_gravest(replies.values()))

    def body(self, lines: bytes, before_dot: Callable[[], None]) -> Reply:
        """DATA, the body, the final dot."""
        self.expect(self.ask(Phase.DATA, b"DATA\r\n"))
        self.owed += 1
        self.push(_stuffed(lines))
        before_dot()
        self.push(b".\r\n")  # a dot that does not get out leaves nothing in doubt
        self.is_out()
        reply = self.answer(Phase.DOT)
        self.begun = False
        return reply

    def chunk(self, letter: Letter, replies: dict[str, Reply], before_dot: Callable[[], None]) -> Reply:
        """MAIL, RCPT, BDAT and the body in one go. Its last bytes take the place of the final dot: without them the
        chunk is not whole, and nothing may come of it (RFC 3030 2)."""
        bdat = b"BDAT %d LAST\r\n" % len(letter.body)
        self.owed += len(letter.rcpt) + 2
        whole = self.hand_over(b"".join([letter.mail, *letter.rcpt.values(), bdat, letter.body[:-END]]))
        if whole:
            before_dot()
            whole = self.hand_over(letter.body[-END:])
        if whole:
            self.is_out()
        self.introduce(letter, replies)
        reply = self.answer(Phase.DOT if whole else Phase.TRANSFER)
        self.begun = reply.verdict is not Verdict.ACCEPTED
        return reply

    def push(self, data: bytes) -> None:
        """A part of the mail. A relay that wants no more of it (552, 421) says so and hangs up: that is the reply."""
        if not self.hand_over(data):
            raise Stopped(self.answer(Phase.TRANSFER))

    def hand_over(self, data: bytes) -> bool:
        """A part of the mail to the kernel, or not all of it: then what the relay said before it hung up is read."""
        assert self.smtp.sock
        self.phase, self.unfinished = Phase.TRANSFER, True
        try:
            for start in range(0, len(data), CHUNK):  # a timeout is for a whole sendall()
                self.smtp.sock.sendall(data[start : start + CHUNK])
        except OSError:
            self.smtp.sock.settimeout(LAST_WORDS)
            return False
        return True

    def is_out(self) -> None:
        """From here on silence is doubt, and is borne to the deadline: some relays scan for viruses before they answer,
        RFC 5321 4.5.3.2.6 asks for ten minutes, and whoever gives up earlier sends again what was accepted."""
        self.out, self.unfinished = True, False
        self.smtp.sock.settimeout(None)  # type: ignore[union-attr]

    def write(self, *commands: bytes) -> None:
        self.owed += len(commands)
        self.smtp.send(b"".join(commands))

    def ask(self, phase: Phase, command: bytes) -> Reply:
        """The reply to a command, which is out already where replies are owed (RFC 2920)."""
        if not self.owed:
            with self.step(phase):
                self.write(command)
        return self.answer(phase)

    def answer(self, phase: Phase) -> Reply:
        self.owed -= 1
        with self.step(Phase.DOT if self.out else phase):
            code, text = self.smtp.getreply()
        self.heard_at = time.monotonic()
        lost_step = self.out and 300 <= code < 400  # which no reply to a mail that is out can be: it refuses nothing
        self.last = Reply(Phase.DOT if lost_step else phase, code, _text(text))
        if lost_step:
            raise Stopped(self.last)
        return self.last

    def make_ready(self) -> bool:
        """For another mail. False where anything is in doubt about what the relay waits for, or whether it is there."""
        if not self.sound or self.unfinished or (self.last and not self.last.leaves_the_session):
            return False
        assert self.smtp.sock
        try:
            self.smtp.sock.settimeout(PATIENCE)
            while self.owed:  # to what went out behind a command that was refused; a 354 among them awaits a mail
                if not 400 <= self.smtp.getreply()[0] <= 599:
                    return False
                self.owed -= 1
            if self.begun and self.smtp.docmd("RSET")[0] != 250:
                return False
        except OSError:
            return False
        self.begun = False
        return True

    def is_quiet(self) -> bool:
        """Whether the relay has neither hung up nor said anything unasked (421), which would pass for a reply."""
        assert self.smtp.sock
        assert self.smtp.file
        self.smtp.sock.settimeout(0)
        try:
            return self.smtp.file.read(1) is None
        except ssl.SSLWantReadError:
            return True
        except OSError:
            return False
        finally:
            self.smtp.sock.settimeout(self.relay.timeout)

    def hang_up(self) -> None:
        """At the deadline: ends whatever read or write the session is in."""
        self.late.set()
        if self.line:
            with suppress(OSError):
                self.line.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """QUIT, whose answer is nobody's concern and is not waited for: a relay may well hang up instead."""
        with suppress(OSError):
            if self.phase is not Phase.CONNECT and not self.unfinished and not self.owed:
                self.smtp.putcmd("QUIT")
        self.smtp.close()
        if self.line:
            self.line.close()


def send(
    session: Session,
    sender: str,
    recipients: Sequence[str],
    mime: bytes,
    *,
    smtputf8: bool,
    before_dot: Callable[[Mapping[str, Reply]], None],
) -> Outcome:
    """One mail over one session, from connecting (its first) to the answer to the final dot.

    `before_dot` is called once, with the replies to RCPT as far as they are known, when everything but the final dot
    (or the end of the chunk) is out; what it raises ends the attempt there, and nothing was sent. Nothing is said to
    the relay after the answer: the caller writes the outcome down first.
    """
    replies: dict[str, Reply] = {}
    try:
        if not session.mails:
            session.open()
        session.mails += 1
        letter = session.letter(sender, recipients, mime, smtputf8, replies)
        final = session.transact(letter, replies, lambda: before_dot(replies))
    except Stopped as stopped:
        final = stopped.reply
    # Whoever was refused at RCPT keeps that reply; everybody else shares the fate of the conversation.
    refused = {address: reply for address, reply in replies.items() if reply.verdict is not Verdict.ACCEPTED}
    return Outcome(final, {address: refused.get(address, final) for address in recipients})


def _dial(relay: Relay) -> socket.socket:
    """TCP to the first of the relay's addresses that answers. They share one timeout: four dead ones cost no more than
    one, and a relay whose IPv6 is broken is still reached."""
    addresses = socket.getaddrinfo(relay.host, relay.port, type=socket.SOCK_STREAM)
    failure = OSError()
    for family, kind, protocol, _, address in addresses:
        line = socket.socket(family, kind, protocol)
        try:
            line.settimeout(relay.timeout / len(addresses))
            line.connect(address)
            line.settimeout(relay.timeout)
            # The final dot goes out as a packet of its own; Nagle's algorithm would hold it for the peer's ACK.
            line.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            # What waits in this buffer, by default up to 4 MiB, is half a minute of a slow line. If the worker dies in
            # it, or the deadline passes, a mail that has not even arrived is in doubt.
            line.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER)
            return line
        except OSError as error:
            line.close()
            failure = error
    raise failure


def _gravest(replies: Iterable[Reply]) -> Reply:
    order = (Verdict.TROUBLE, Verdict.TRY_AGAIN, Verdict.REFUSED)
    return min(replies, key=lambda reply: order.index(reply.verdict))


def _command(words: str, address: str, encoding: str, *options: str) -> bytes | None:
    """The address to the letter; smtplib's own methods send what their parser makes of it. None where that is not
    possible."""
    if not ADDRESS.fullmatch(address):
        return None
    with suppress(ValueError):
        return (" ".join([f"{words}:<{address}>", *options]) + "\r\n").encode(encoding)
    return None


def _lines(mime: bytes) -> bytes:
    """Lines that end in CRLF and nothing else (RFC 5321 2.3.8). A lone CR or LF by a dot would end the mail for some
    relays and not for others, and what follows it would be another: SMTP smuggling."""
    lines = mime.replace(b"\r\n", b"\n").replace(b"\r", b"\n").replace(b"\n", b"\r\n")
    return lines if lines.endswith(b"\r\n") else lines + b"\r\n"


def _stuffed(lines: bytes) -> bytes:
    """RFC 5321 4.5.2."""
    return re.sub(rb"(?m)^\.", b"..", lines)


def _text(reply: bytes | str) -> str:
    text = reply.decode("utf-8", "replace") if isinstance(reply, bytes) else reply
    return " ".join(text.split())[:500]


def _reason(error: Exception) -> str:
    """Why there was no reply, in words of ours or of the system, never of the mail."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"the relay's certificate is not valid: {error.verify_message}"
    if isinstance(error, TimeoutError) or isinstance(error.__context__, TimeoutError):  # smtplib: closed, timed out
        return "timed out"
    if isinstance(error, smtplib.SMTPServerDisconnected):
        return "the relay closed the connection"
    if isinstance(error, smtplib.SMTPNotSupportedError):
        return str(error)
    return getattr(error, "strerror", None) or type(error).__name__
