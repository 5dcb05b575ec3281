"""One connection to the relay and the mails that go over it.

Certificates are verified, STARTTLS never falls back to plain text, an address goes out exactly as it was accepted or
not at all. Which session a mail gets, and its deadline, are in smtp.pool. The only home of `smtplib`.
Standards: RFC 5321 (SMTP), 3207 (STARTTLS), 4954 (AUTH), 8314 (implicit TLS), 6531 (SMTPUTF8), 2920 (PIPELINING).
CHUNKING (RFC 3030) is left alone: it saves a round trip only where a mail goes out whole before anything of it is
accepted, which puts it in doubt if the connection dies; and gateways announce it that do not take it.
"""

from __future__ import annotations

import math
import re
import smtplib
import socket
import ssl
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from enum import Enum

from smtp import auth
from smtp.envelope import Envelope, crlf_lines, dot_stuffed
from smtp.oauth import NoToken
from smtp.policy import Phase, Verdict
from smtp.relay import Relay, connect_any, tls_context
from smtp.verdict import TIMED_OUT, Reply

CHUNK = 64 * 1024  # bytes of the body
SMALL = 16 * 1024  # bytes of a mail that goes out in one piece with its dot, as one record of TLS
LONGEST_LINE = 8192  # octets of a reply; RFC 5321 4.5.3.1.5 has 512
MOST_LINES = 200  # of a reply
PATIENCE = 2  # seconds per reply that is only needed to keep a session
LAST_WORDS = 0.2  # seconds; what the relay said before it hung up is here already
UNSPEAKABLE = (553, "5.1.3 this address cannot be written into an SMTP command")


class Stopped(Exception):
    """The conversation is over; `reply` says why."""

    def __init__(self, reply: Reply) -> None:
        super().__init__(reply.summary)
        self.reply = reply


class _Client(smtplib.SMTP):
    """Reads replies within bounds: smtplib keeps all lines of one that never ends. Raises for what is not SMTP, which
    must be the last: the next reply might answer anything."""

    ehlo_msg = "EHLO"  # as everybody writes it; some scanners look for it

    def getreply(self) -> tuple[int, bytes]:
        said: list[bytes] = []
        while len(said) < MOST_LINES:
            line = self._line()
            said.append(line[4:].strip())
            if not re.match(rb"[2-5]\d\d(?![^ \r\n-])", line):
                raise smtplib.SMTPResponseException(-1, said[-1])
            if line[3:4] != b"-":
                return int(line[:3]), b"\n".join(said)
        raise smtplib.SMTPResponseException(-1, b"a reply of more lines than any has")

    def _line(self) -> bytes:
        if not self.sock:
            raise smtplib.SMTPServerDisconnected("not connected")
        self.file = self.file or self.sock.makefile("rb")  # smtplib drops it at STARTTLS
        try:
            line: bytes = self.file.readline(LONGEST_LINE + 1)
        except OSError:
            self.close()
            raise
        if len(line) > LONGEST_LINE:
            self.close()
            raise smtplib.SMTPResponseException(-1, b"a reply longer than SMTP allows")
        if not line.endswith(b"\n"):  # what is cut off is no reply
            self.close()
            raise smtplib.SMTPServerDisconnected("closed")
        return line


Replies = dict[str, Reply]  # to RCPT, by address


@dataclass(eq=False)
class Transaction:
    """The commands of one mail (RFC 5321 3.3). `replies` has those for addresses that no command can be made of, and
    then the relay's."""

    mail: bytes
    rcpt: dict[str, bytes]
    replies: Replies

    @property
    def commands(self) -> list[bytes]:
        return [self.mail, *self.rcpt.values(), b"DATA\r\n"]


class State(Enum):
    """Names what the relay waits for, which decides what may be said to it."""

    NEW = "not connected"
    OPENING = "greeting, EHLO, STARTTLS, AUTH"
    READY = "the next mail"
    IN_TRANSACTION = "more of the envelope, DATA, or RSET"
    MID_DATA = "the rest of a mail: it would take any other word for a part of it"
    AWAITING_FINAL_REPLY = "nothing: it has the whole mail"
    BROKEN = "unknown"


class Session:
    """Carries mails over one connection, one after the other: `begin`, `finish`, `reset`, the next; in the end `close`.

    Each step raises `Stopped` with the phase it reached where the relay does not say yes.
    """

    def __init__(self, relay: Relay) -> None:
        self.relay = relay
        self.state = State.NEW
        self.pending_replies = 0  # to what has been sent
        self.last: Reply | None = None
        self.mails = 0
        self.transaction: Transaction | None = None
        self.following: Transaction | None = None  # the next one, whose commands went out with this mail's final dot
        self.unsent = b""  # of the mail, before its final dot
        self.dot_at: float | None = None  # when this mail's was out, of time.monotonic()
        self.dot_took = math.inf  # seconds until the last final reply
        self.tls = ""  # its version
        self.may_pipeline, self.pipelined = True, False
        self.opened_at = time.monotonic()
        self.aborted = threading.Event()
        self.handle: socket.socket | None = None
        self.smtp = _Client(local_hostname=relay.ehlo_name)
        # starttls() checks the certificate against this name, which smtplib knows only when it connects by itself.
        self.smtp._host = relay.host  # type: ignore[attr-defined]

    @property
    def replies(self) -> Replies:
        """Returns the replies to RCPT of this mail."""
        return self.transaction.replies if self.transaction else {}

    @property
    def sock(self) -> socket.socket:
        """Returns smtplib's socket: another one after STARTTLS. Raises an `OSError` if there is none any more."""
        if not self.smtp.sock:
            raise smtplib.SMTPServerDisconnected("not connected")
        return self.smtp.sock

    @contextmanager
    def step(self, phase: Phase) -> Iterator[None]:
        """Turns every failure in one phase into `Stopped`, without the relay's words in an exception text."""
        try:
            yield
        except BaseException as error:
            if self.state not in (State.NEW, State.MID_DATA):  # in which not even QUIT may be said
                self.state = State.BROKEN
            if isinstance(error, smtplib.SMTPResponseException):
                raise Stopped(Reply(phase, error.smtp_code, _text(error.smtp_error))) from None
            if isinstance(error, (OSError, ValueError)):  # OSError is the base of smtplib's exceptions, too
                text = "the conversation took too long" if self.aborted.is_set() else _reason(error)
                raise Stopped(Reply(phase, None, text)) from None
            raise

    def expect(self, reply: Reply) -> None:
        if reply.verdict is not Verdict.ACCEPTED:
            raise Stopped(reply)

    def open(self) -> None:
        with self.step(Phase.AUTH):  # before there is a connection: it may take seconds, and no relay waits for that
            token = self.relay.tokens.take() if self.relay.tokens else ""
        with self.step(Phase.CONNECT):
            self.connect()
        self.tls = _tls_version(self.sock)
        self.state = State.OPENING
        self.pending_replies = 1  # the greeting
        self.expect(self.answer(Phase.GREETING))
        self.say_hello()
        if self.relay.security == "starttls":
            with self.step(Phase.STARTTLS):
                self.smtp.starttls(context=tls_context(self.relay.ca_file))
                self.tls = _tls_version(self.sock)
            self.say_hello()
        if self.relay.username:
            with self.step(Phase.AUTH):
                self.login(self.relay.username, token)
        self.state = State.READY

    def connect(self) -> None:
        self.smtp.sock = sock = connect_any(self.relay)
        # `abort` needs a handle of its own, for during a TLS handshake smtplib's socket is nobody's. It sets `aborted`
        # before it looks at `handle`, and here it is the other way round, so one of the two notices.
        self.handle = sock.dup()
        self.handle.setblocking(False)
        if self.aborted.is_set():
            raise TimeoutError
        if self.relay.security == "tls":
            self.smtp.sock = tls_context(self.relay.ca_file).wrap_socket(sock, server_hostname=self.relay.host)

    def say_hello(self) -> None:
        """Sends EHLO, and HELO only to a relay that does not know it (RFC 5321 3.2): another refusal stands."""
        with self.step(Phase.HELLO):
            code, text = self.smtp.ehlo()
            if code in (500, 502):
                code, text = self.smtp.helo()
        self.expect(Reply(Phase.HELLO, code, _text(text)))

    def login(self, username: str, token: str) -> None:
        """Logs in with the password, or with a token: with another one, if the relay does not take it any more."""
        offered, tokens = self.smtp.esmtp_features.get("auth", "").upper().split(), self.relay.tokens
        if not tokens:
            code, text = auth.log_in(self.smtp.docmd, offered, username, self.relay.password or "")
            return self.expect(Reply(Phase.AUTH, code, _text(text)))
        code, text = auth.log_in_by_token(self.smtp.docmd, offered, username, token)
        if code == 535 and tokens.refused(token) and (another := tokens.take()) != token:
            token = another
            code, text = auth.log_in_by_token(self.smtp.docmd, offered, username, token)
        self.expect(Reply(Phase.AUTH, code, _text(text)))
        tokens.accepted(token)

    def begin(self, envelope: Envelope, mime: bytes) -> Replies:
        """Sends a mail but for its final dot, and of a small one only the envelope, in as few round trips as the relay
        allows: until `finish`, it cannot have accepted anything. Opens the connection for the first mail. Returns the
        replies to RCPT, which are in `replies` also where this, or `finish`, raises `Stopped`."""
        self.transaction, self.dot_at = None, None
        if self.state is State.NEW:
            self.open()
        self.mails += 1
        self.transaction = self.following or self.plan(envelope, len(mime))
        if not self.transaction.rcpt:
            raise Stopped(_gravest(self.replies.values()))
        self.send_envelope(self.transaction, is_out=self.following is not None)
        self.pending_replies += 1
        self.state, body = State.MID_DATA, dot_stuffed(crlf_lines(mime))
        self.unsent = body if len(body) <= SMALL else b""
        if not self.unsent and self.send_mail(body) < len(body):
            raise Stopped(self.final_reply())
        return self.replies

    def finish(self, following: Transaction | None = None) -> Reply:
        """Sends the final dot, with the text of a small mail, and returns the final reply. If it does not get out, or
        the relay has hung up before, nothing is in doubt. The commands of the `following` mail go out with it
        (RFC 2920 3.1), so that `begin` finds the replies here; if the session is over, `following` is None then.

        Once it is, silence is doubt, and is borne to the deadline: some relays scan for viruses before they answer,
        RFC 5321 4.5.3.2.6 asks for ten minutes, and a client that gives up earlier sends again what was accepted.
        """
        commands = following.commands if following else []
        mail = self.unsent + b".\r\n"
        data = b"".join((mail, *commands))
        sent = 0 if self.has_hung_up() else self.send_mail(data)
        if sent >= len(mail):  # the relay may have the mail, whatever became of the commands
            self.state, self.dot_at = State.AWAITING_FINAL_REPLY, time.monotonic()
            self.sock.settimeout(None)
            self.pending_replies += len(commands)
        reply = self.final_reply()
        if following and sent == len(data) and self.state is State.READY and reply.leaves_the_session:
            self.state, self.following = State.IN_TRANSACTION, following
        return reply

    def plan(self, envelope: Envelope, size: int) -> Transaction:
        """Builds the SMTP commands. An address that cannot be written into a command is refused permanently, without
        asking the relay. Raises `Stopped` if the mail as a whole cannot."""
        if envelope.smtputf8 and not self.smtp.has_extn("smtputf8"):
            # RFC 6531 3.3: such a mail cannot go through this relay, now or later.
            raise Stopped(Reply(Phase.MAIL, 550, "5.6.7 the relay does not offer SMTPUTF8, which the mail needs"))
        if envelope.eight_bit and not self.smtp.has_extn("8bitmime"):  # RFC 6152 3
            raise Stopped(Reply(Phase.MAIL, 550, "5.6.3 the relay does not offer 8BITMIME, which the mail needs"))
        mail = envelope.mail_from(*([f"SIZE={size}"] if self.smtp.has_extn("size") else []))
        if not mail:
            raise Stopped(Reply(Phase.MAIL, *UNSPEAKABLE))
        commands = envelope.rcpt_to()
        rcpt = {address: command for address, command in commands.items() if command}
        replies = {address: Reply(Phase.RCPT, *UNSPEAKABLE) for address in commands.keys() - rcpt.keys()}
        return Transaction(mail, rcpt, replies)

    def send_envelope(self, planned: Transaction, is_out: bool) -> None:
        """Sends MAIL, RCPT and DATA, together where the relay allows it (RFC 2920), unless they are out already. One
        recipient refused does not stop the others, unless the relay closes on all (421)."""
        self.state, self.following = State.IN_TRANSACTION, None
        self.pipelined = self.may_pipeline and self.smtp.has_extn("pipelining")
        if self.pipelined and not is_out:
            with self.step(Phase.MAIL):
                self.write(*planned.commands)
        self.expect(self.ask(Phase.MAIL, planned.mail))
        for address, command in planned.rcpt.items():
            planned.replies[address] = reply = self.ask(Phase.RCPT, command)
            if reply.code == 421:
                raise Stopped(reply)
        if not any(reply.verdict is Verdict.ACCEPTED for reply in planned.replies.values()):
            raise Stopped(_gravest(planned.replies.values()))
        self.expect(self.ask(Phase.DATA, b"DATA\r\n"))

    def send_mail(self, data: bytes) -> int:
        """Hands a part of the mail to the kernel. Returns how many octets that took: a relay that wants no more (552,
        421) says so and hangs up, and its last words are the final reply."""
        sent, left = 0, memoryview(data)
        try:
            while sent < len(data):
                sent += self.sock.send(left[sent : sent + CHUNK])
        except OSError:
            self.sock.settimeout(LAST_WORDS)
        return sent

    def has_hung_up(self) -> bool:
        """Returns whether the relay has closed the connection, as far as the kernel knows: a write would be taken."""
        try:
            return not (self.handle and self.handle.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT))
        except OSError as error:
            return not isinstance(error, BlockingIOError)

    def final_reply(self) -> Reply:
        """Returns the reply to the mail as a whole."""
        complete = self.state is State.AWAITING_FINAL_REPLY
        reply = self.answer(Phase.DOT if complete else Phase.TRANSFER)
        if complete:
            self.state, self.dot_took = State.READY, time.monotonic() - (self.dot_at or 0)
            self.sock.settimeout(self.relay.timeout)
        return reply

    def write(self, *commands: bytes) -> None:
        self.pending_replies += len(commands)
        self.smtp.send(b"".join(commands))

    def ask(self, phase: Phase, command: bytes) -> Reply:
        """Returns the reply to a command, which has been sent already if replies are pending (RFC 2920)."""
        if not self.pending_replies:
            with self.step(phase):
                self.write(command)
        return self.answer(phase)

    def answer(self, phase: Phase) -> Reply:
        self.pending_replies -= 1
        complete = self.state is State.AWAITING_FINAL_REPLY
        with self.step(Phase.DOT if complete else phase):
            code, text = self.smtp.getreply()
        lost_step = complete and 300 <= code < 400  # asks for more of a mail that is complete: it refuses nothing
        self.last = Reply(Phase.DOT if lost_step else phase, code, _text(text))
        if lost_step:
            raise Stopped(self.last)
        return self.last

    def reset(self) -> bool:
        """Resets the session for the next mail. Returns False if its state is unknown: then it must be closed."""
        if self.state not in (State.READY, State.IN_TRANSACTION) or (self.last and not self.last.leaves_the_session):
            return False
        try:
            self.sock.settimeout(PATIENCE)
            while self.pending_replies:  # to what followed a refused command; a 354 among them awaits a mail
                if not 400 <= self.smtp.getreply()[0] <= 599:
                    return False
                self.pending_replies -= 1
            if self.state is not State.READY and self.smtp.docmd("RSET")[0] != 250:
                return False
        except OSError:
            return False
        self.state = State.READY
        return True

    def is_quiet(self) -> bool:
        """Returns whether the relay has neither hung up nor said a word unasked (421), which would pass for a reply."""
        try:
            self.sock.settimeout(0)  # with it, read() returns None for nothing; smtplib's buffer may hold words already
            return self.smtp.file is not None and self.smtp.file.read(1) is None
        except ssl.SSLWantReadError:
            return True
        except OSError:
            return False
        finally:
            self.sock.settimeout(self.relay.timeout)

    def abort(self) -> None:
        """Ends a read or write that the session is in, from another thread, at the deadline."""
        self.aborted.set()
        if self.handle:
            with suppress(OSError):
                self.handle.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Closes the connection, with QUIT where that may be said, and does not wait for the answer to it."""
        self.following = None
        with suppress(OSError):
            if self.state not in (State.NEW, State.MID_DATA) and not self.pending_replies:
                self.smtp.putcmd("QUIT")
        self.smtp.close()
        if self.handle:
            self.handle.close()


def _tls_version(sock: socket.socket) -> str:
    return (sock.version() or "") if isinstance(sock, ssl.SSLSocket) else ""


def _gravest(replies: Iterable[Reply]) -> Reply:
    order = (Verdict.TROUBLE, Verdict.TRY_AGAIN, Verdict.REFUSED)
    return min(replies, key=lambda reply: order.index(reply.verdict))


def _text(reply: bytes | str) -> str:
    text = reply.decode("utf-8", "replace") if isinstance(reply, bytes) else reply
    return " ".join(text.split())[:500]


def _reason(error: Exception) -> str:
    """Returns why there was no reply, in words of ours or of the system, never of the mail."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"the relay's certificate is not valid: {error.verify_message}"
    if isinstance(error, TimeoutError) or isinstance(error.__context__, TimeoutError):  # smtplib: closed, timed out
        return TIMED_OUT
    if isinstance(error, smtplib.SMTPServerDisconnected):
        return "the relay closed the connection"
    if isinstance(error, (smtplib.SMTPNotSupportedError, auth.NotOffered, NoToken)):
        return str(error)
    return getattr(error, "strerror", None) or type(error).__name__
