"""SMTP out: one conversation with the relay, and the one judgement of what its answers mean.

`send` carries one message to its recipients and returns an `Outcome`; it never raises for what a relay does or fails to
do. `judge` turns phase + reply into a verdict, and nothing else in the project interprets an SMTP code:

  accepted   the relay has taken responsibility (250 after the final dot)
  try again  this mail was put off (4xx); it has cost an attempt
  refused    this mail or recipient is refused for good (5xx)
  in doubt   the body went out whole and no answer came: it may have been accepted (RFC 1047)
  trouble    the relay, the login or our use of it: no mail can be blamed, so none loses an attempt

Certificates are verified, credentials never go in clear to another machine, and a conversation as a whole has a
deadline, so that a relay that drips a byte a second holds no worker. The only home of `smtplib`.
Standards: RFC 5321 (SMTP), 3207 (STARTTLS), 4954 (AUTH), 8314 (implicit TLS), 6531 (SMTPUTF8), 3463 (enhanced codes).
"""

from __future__ import annotations

import re
import smtplib
import socket
import ssl
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from enum import Enum
from functools import lru_cache
from typing import NamedTuple


class Verdict(str, Enum):
    ACCEPTED = "accepted"
    TRY_AGAIN = "try again"
    REFUSED = "refused"
    IN_DOUBT = "in doubt"
    TROUBLE = "trouble"


class Phase(str, Enum):
    """Where in the conversation a reply came, or did not."""

    CONNECT = "connect"  # DNS, TCP and implicit TLS
    GREETING = "greeting"
    HELLO = "hello"
    STARTTLS = "starttls"
    AUTH = "auth"
    MAIL = "mail"
    RCPT = "rcpt"
    DATA = "data"  # the command; 354 invites the body
    TRANSFER = "transfer"  # the body is going out; without its final dot the relay must drop it (RFC 5321 4.1.1.4)
    DOT = "dot"  # the final dot is out


SESSION = (Phase.CONNECT, Phase.GREETING, Phase.HELLO, Phase.STARTTLS, Phase.AUTH)
MESSAGE = (Phase.MAIL, Phase.RCPT, Phase.DATA, Phase.TRANSFER, Phase.DOT)

# The first row that matches decides: phases, code (none: no reply came), words of the reply, verdict.
JUDGEMENT: tuple[tuple[tuple[Phase, ...], str, str, Verdict], ...] = (
    # No reply. Before the final dot nothing was handed over; after it nobody knows.
    ((Phase.DOT,), "none", "", Verdict.IN_DOUBT),
    # Cut off in the middle of the body: the mail itself may be what the relay cannot take, so it costs an attempt.
    ((Phase.TRANSFER,), "none", "", Verdict.TRY_AGAIN),
    ((*SESSION, *MESSAGE), "none", "", Verdict.TROUBLE),
    # Good replies: 2xx, and 354 to DATA.
    ((Phase.DATA,), "354", "", Verdict.ACCEPTED),
    ((*SESSION, Phase.MAIL, Phase.RCPT, Phase.DOT), "2..", "", Verdict.ACCEPTED),
    # A session that does not come about is never a mail's fault: 421 and 554 greetings, 454 and 535 to AUTH.
    (SESSION, "...", "", Verdict.TROUBLE),
    # The relay wants STARTTLS or a login first (RFC 3207, 4954): our settings.
    (MESSAGE, "530|538", "", Verdict.TROUBLE),
    # Throttles. 454: SES "Maximum sending rate exceeded", "Daily message quota exceeded". 432 4.3.2: Microsoft 365,
    # too many connections. 550 5.4.5: Gmail's rolling daily quota. 550 5.2.251-255: Microsoft 365, sender throttled.
    (MESSAGE, "454|432", "", Verdict.TROUBLE),
    (MESSAGE, "5..", r"\b5\.4\.5\b|\b5\.2\.25[1-5]\b", Verdict.TROUBLE),
    # Microsoft 365 has ended basic authentication for this account.
    (MESSAGE, "550", r"\b5\.7\.30\b", Verdict.TROUBLE),
    # "Too many recipients" in its old form (RFC 5321 4.5.3.1.10): those refused get their turn in the next attempt.
    ((Phase.RCPT,), "552", "", Verdict.TRY_AGAIN),
    # 503 says that the two sides lost step, not that the mail is bad.
    (MESSAGE, "503", "", Verdict.TRY_AGAIN),
    (MESSAGE, "4..", "", Verdict.TRY_AGAIN),
    (MESSAGE, "5..", "", Verdict.REFUSED),
    # What is left is not SMTP (a 1xx, a 200 to DATA, "-1"). After the dot it tells us nothing about the mail.
    ((Phase.DOT,), ".*", "", Verdict.IN_DOUBT),
    (MESSAGE, ".*", "", Verdict.TROUBLE),
)


def judge(phase: Phase, code: int | None, text: str = "") -> Verdict:
    """The one judgement. `code` is None where no reply came."""
    written = "none" if code is None else str(code)
    for phases, codes, words, verdict in JUDGEMENT:
        if phase in phases and re.fullmatch(codes, written) and re.search(words, text):
            return verdict
    return Verdict.TROUBLE


class Reply(NamedTuple):
    """What the relay said at the moment that decided. `text` may hold addresses: it is for the mail's record only."""

    phase: Phase
    code: int | None
    text: str

    @property
    def verdict(self) -> Verdict:
        return judge(self.phase, self.code, self.text)

    @property
    def summary(self) -> str:
        """Code and phase, without a word of the relay's: fit for logs and exception texts."""
        return f"{self.code} at {self.phase.value}" if self.code else f"no reply at {self.phase.value}"


@dataclass
class Outcome:
    """One attempt: the reply that decided it, and for each recipient the reply that decided about him."""

    reply: Reply
    recipients: dict[str, Reply] = field(default_factory=dict)

    @property
    def verdict(self) -> Verdict:
        return self.reply.verdict


class Relay(NamedTuple):
    """Where the relay is and how to speak to it. Times in seconds."""

    host: str
    port: int
    security: str  # starttls, tls or none
    username: str | None
    password: str | None
    ca_file: str | None
    timeout: float  # for one reply
    deadline: float  # for one conversation

    def __str__(self) -> str:
        return f"{self.host}:{self.port}"


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


class Session:
    """A conversation. Each step raises `Stopped` with the phase it reached when the relay does not say yes."""

    def __init__(self, relay: Relay) -> None:
        self.relay = relay
        self.phase = Phase.CONNECT
        self.late = threading.Event()
        implicit = relay.security == "tls"
        context = tls_context(relay.ca_file)
        self.smtp: smtplib.SMTP = (
            smtplib.SMTP_SSL(local_hostname=own_name(), timeout=relay.timeout, context=context)
            if implicit
            else smtplib.SMTP(local_hostname=own_name(), timeout=relay.timeout)
        )
        # smtplib checks the certificate against this name, which it knows only when the constructor connects.
        self.smtp._host = relay.host  # type: ignore[attr-defined]

    @contextmanager
    def step(self, phase: Phase) -> Iterator[None]:
        """One phase: whatever goes wrong in it becomes `Stopped`, without the relay's words in an exception text."""
        self.phase = phase
        try:
            if self.late.is_set():
                raise TimeoutError
            yield
        except smtplib.SMTPResponseException as error:
            raise Stopped(Reply(phase, error.smtp_code, _text(error.smtp_error))) from None
        except smtplib.SMTPNotSupportedError as error:
            raise Stopped(Reply(phase, None, str(error))) from None
        except (OSError, smtplib.SMTPException, ValueError) as error:
            text = "the conversation took too long" if self.late.is_set() else _reason(error)
            raise Stopped(Reply(phase, None, text)) from None

    def expect(self, phase: Phase, reply: tuple[int, bytes]) -> None:
        answer = Reply(phase, reply[0], _text(reply[1]))
        if answer.verdict is not Verdict.ACCEPTED:
            raise Stopped(answer)

    def open(self) -> None:
        with self.step(Phase.CONNECT):
            greeting = self.smtp.connect(self.relay.host, self.relay.port)
            # The final dot goes out as a packet of its own; Nagle's algorithm would hold it for the peer's ACK.
            self.smtp.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # type: ignore[union-attr]
        self.expect(Phase.GREETING, greeting)
        with self.step(Phase.HELLO):
            self.smtp.ehlo_or_helo_if_needed()
        if self.relay.security == "starttls":
            with self.step(Phase.STARTTLS):
                self.expect(Phase.STARTTLS, self.smtp.starttls(context=tls_context(self.relay.ca_file)))
                self.smtp.ehlo_or_helo_if_needed()
        if self.relay.username:
            with self.step(Phase.AUTH):
                self.smtp.login(self.relay.username, self.relay.password or "")

    def envelope(self, sender: str, recipients: Sequence[str], size: int, smtputf8: bool) -> dict[str, Reply]:
        """MAIL FROM and RCPT TO. Returns the reply to each recipient; one refused does not stop the others."""
        if smtputf8 and not self.smtp.has_extn("smtputf8"):
            # RFC 6531 3.3: such a mail cannot go through this relay, now or later.
            raise Stopped(Reply(Phase.MAIL, 550, "5.6.7 the relay does not offer SMTPUTF8, which an address needs"))
        options = [f"SIZE={size}"] if self.smtp.has_extn("size") else []
        options += ["SMTPUTF8"] if smtputf8 else []
        with self.step(Phase.MAIL):
            self.expect(Phase.MAIL, self.smtp.mail(sender, options))
        replies: dict[str, Reply] = {}
        with self.step(Phase.RCPT):
            for recipient in recipients:
                code, text = self.smtp.rcpt(recipient)
                replies[recipient] = reply = Reply(Phase.RCPT, code, _text(text))
                if code == 421:  # the relay is closing: nobody will be served in this conversation
                    raise Stopped(reply)
        return replies

    def body(self, mime: bytes, before_dot: Callable[[], None]) -> Reply:
        """DATA, the body, the final dot. Until `before_dot` has returned, the relay cannot have accepted anything."""
        with self.step(Phase.DATA):
            self.expect(Phase.DATA, self.smtp.docmd("DATA"))
        with self.step(Phase.TRANSFER):
            self.smtp.send(_dot_stuffed(mime))
        before_dot()
        with self.step(Phase.DOT):
            self.smtp.send(b".\r\n")
            code, text = self.smtp.getreply()
            return Reply(Phase.DOT, code, _text(text))

    def close(self) -> None:
        """QUIT, whose answer is nobody's concern: a relay may well hang up instead."""
        with suppress(OSError, smtplib.SMTPException):
            if self.phase not in (Phase.CONNECT, Phase.TRANSFER):  # in mid-body it would be a line of the mail
                self.smtp.quit()
        self.smtp.close()


def _hang_up(session: Session) -> None:
    """At the deadline: ends whatever read or write the conversation is in."""
    session.late.set()
    if session.smtp.sock:
        with suppress(OSError):
            session.smtp.sock.shutdown(socket.SHUT_RDWR)


@contextmanager
def conversation(relay: Relay) -> Iterator[Session]:
    session = Session(relay)
    alarm = threading.Timer(relay.deadline, _hang_up, [session])
    alarm.daemon = True
    alarm.start()
    try:
        yield session
    finally:
        session.close()
        alarm.cancel()


def send(
    session: Session,
    sender: str,
    recipients: Sequence[str],
    mime: bytes,
    *,
    smtputf8: bool,
    before_dot: Callable[[Mapping[str, Reply]], None],
) -> Outcome:
    """One attempt, from connecting to the answer to the final dot.

    `before_dot` is called once, with the replies to RCPT, when everything but the final dot is out; what it raises
    ends the attempt there, and nothing was sent. QUIT comes later, when the caller has written the outcome down.
    """
    replies: dict[str, Reply] = {}
    try:
        session.open()
        replies = session.envelope(sender, recipients, len(mime), smtputf8)
        served = [address for address, reply in replies.items() if reply.verdict is Verdict.ACCEPTED]
        if not served:
            return Outcome(_gravest(replies.values()), replies)
        final = session.body(mime, lambda: before_dot(replies))
    except Stopped as stopped:
        final = stopped.reply
    # Whoever was refused at RCPT keeps that reply; everybody else shares the fate of the conversation.
    refused = {address: reply for address, reply in replies.items() if reply.verdict is not Verdict.ACCEPTED}
    return Outcome(final, {address: refused.get(address, final) for address in recipients})


def _gravest(replies: Iterable[Reply]) -> Reply:
    order = (Verdict.TROUBLE, Verdict.TRY_AGAIN, Verdict.REFUSED)
    return min(replies, key=lambda reply: order.index(reply.verdict))


def _dot_stuffed(mime: bytes) -> bytes:
    """RFC 5321 4.5.2. `mime` has CRLF line ends throughout (mail.message made it), so no bare CR or LF can end it."""
    stuffed = re.sub(rb"(?m)^\.", b"..", mime)
    return stuffed if stuffed.endswith(b"\r\n") else stuffed + b"\r\n"


def _text(reply: bytes | str) -> str:
    text = reply.decode("utf-8", "replace") if isinstance(reply, bytes) else reply
    return " ".join(text.split())[:500]


def _reason(error: Exception) -> str:
    """Why there was no reply, in words of ours or of the system, never of the mail."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"the relay's certificate is not valid: {error.verify_message}"
    if isinstance(error, smtplib.SMTPServerDisconnected):
        return "the relay closed the connection"
    if isinstance(error, TimeoutError):
        return "timed out"
    return getattr(error, "strerror", None) or type(error).__name__
