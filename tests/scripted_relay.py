"""An SMTP relay that does what a test tells it, byte by byte: for what a well-behaved server cannot be made to do.

`script` maps a command to what comes back: a reply, an act, or a list of these, one each time and the last for good.
Beside the commands there are `GREETING`, `TLS` (the client has begun a handshake), `BODY` (the first bytes of the mail
are here, and no more is read yet), `.` (its end) and `500` (no command). The rest is answered as in
`OBLIGING`.

    with ScriptedRelay({"RCPT": ["250 ok", "550 no"], ".": hang_up}) as relay: ...

It serves each connection in a thread of its own, and writes down all it hears. What an act takes responsibility for
with `Line.accept` is in `log`, with what became of the answer: whether the client can have learnt of it decides whether
a second copy is its fault.
"""

from __future__ import annotations

import select
import socket
import ssl
import struct
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import KW_ONLY, InitVar, dataclass

OBLIGING = {
    "GREETING": "220 relay.example ESMTP",
    "HELO": "250 relay.example",
    "STARTTLS": "220 2.0.0 go ahead",
    "AUTH": "235 2.7.0 welcome",
    "MAIL": "250 2.1.0 ok",
    "RCPT": "250 2.1.5 ok",
    "DATA": "354 end with a dot",
    ".": "250 2.0.0 queued as 4711",
    "RSET": "250 2.0.0 flushed",
    "QUIT": "221 2.0.0 bye",
    "500": "500 5.5.2 what?",  # anything else
}


class HungUp(Exception):
    """The connection is over, whoever ended it."""


@dataclass
class Acceptance:
    """A mail for which the relay has taken responsibility. Moments are of time.monotonic()."""

    body: bytes
    recipients: list[str]
    at: float
    answered_at: float | None = None  # the 250 went out, and the client was there to hear it
    acknowledged_at: float | None = None  # the client spoke again after it, so it has written down what it heard
    hung_up_at: float | None = None


def header(content: bytes, name: str) -> str:
    line = next(line for line in content.splitlines() if line.lower().startswith(f"{name}:".lower().encode()))
    return line.split(b":", 1)[1].strip().decode()


class Line:
    """The relay's end of one connection."""

    def __init__(self, relay: ScriptedRelay, connection: socket.socket) -> None:
        self.relay = relay
        self.socket = connection
        self.unread = bytearray()
        self.command = ""
        self.recipients: list[str] = []
        self.body = b""
        self.acceptance: Acceptance | None = None
        self.spoke = False
        self.sender = ""
        self.trusted = False  # has logged in, where an act asks for it
        self.token = ""  # with this

    def accept(self) -> Acceptance:
        """From here on the mail is the relay's, whether or not it gets to say so."""
        self.acceptance = Acceptance(self.body, self.recipients, time.monotonic())
        self.relay.log.append(self.acceptance)
        return self.acceptance

    def has_left(self) -> bool:
        """Returns whether the client has hung up. That it speaks already is no sign: the next mail's commands may come
        with a final dot."""
        if not select.select([self.socket], [], [], 0)[0]:
            return False
        return isinstance(self.socket, ssl.SSLSocket) or not self.socket.recv(1, socket.MSG_PEEK)

    def say(self, text: str) -> str:
        self.say_raw(text.encode() + b"\r\n")
        return text

    def say_raw(self, data: bytes) -> None:
        self.socket.sendall(data)
        self.spoke = True

    def hear_more(self) -> None:
        all_answered, self.spoke = self.spoke and not self.unread, False
        heard = self.socket.recv(1 << 20)
        if not heard:
            raise HungUp
        if self.acceptance and self.acceptance.answered_at and not self.acceptance.acknowledged_at:
            self.acceptance.acknowledged_at = time.monotonic()  # what came with the dot was said before the answer
        if all_answered:
            self.relay.turns += 1
            time.sleep(self.relay.latency)
        self.unread += heard
        self.relay.heard += heard

    def hear(self, size: int) -> bytes:
        while len(self.unread) < size:
            self.hear_more()
        heard = bytes(self.unread[:size])
        del self.unread[:size]
        return heard

    def hear_until(self, end: bytes) -> bytes:
        searched = 0
        while (found := self.unread.find(end, searched)) < 0:
            searched = max(0, len(self.unread) - len(end))
            self.hear_more()
        return self.hear(found + len(end)).removesuffix(end)


Act = Callable[[Line], str]  # returns the reply it gave
Step = str | Act
Script = Mapping[str, Step | Sequence[Step]]


def hang(line: Line) -> str:
    """Neither speaks nor listens until the test is over."""
    line.relay.over.wait()
    raise HungUp


def hang_up(line: Line) -> str:
    raise HungUp


def reset(line: Line) -> str:
    """Hangs up in such a way that the other side's next write fails at once."""
    line.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    raise HungUp


def take_after(pause: float) -> Act:
    """Accepts at once and answers after `pause` seconds."""

    def act(line: Line) -> str:
        acceptance = line.accept()
        line.relay.over.wait(pause)
        has_given_up = line.has_left()
        line.say(OBLIGING["."])
        if not has_given_up:
            acceptance.answered_at = time.monotonic()
        return OBLIGING["."]

    return act


take = take_after(0)


def swallow(line: Line) -> str:
    """Accepts and hangs up without a word."""
    line.accept()
    raise HungUp


def then(text: str, act: Act) -> Act:
    """A reply, and what the relay does right after it."""

    def both(line: Line) -> str:
        line.say(text)
        return act(line)

    return both


def last_words(text: str) -> Act:
    return then(text, hang_up)


def raw(data: bytes, size: int = 1 << 20, pause: float = 0) -> Act:
    """Any bytes, in packets of `size` with `pause` seconds after each. Stops when the test is over."""

    def act(line: Line) -> str:
        for start in range(0, len(data), size):
            line.say_raw(data[start : start + size])
            if pause and line.relay.over.wait(pause):
                raise HungUp
        return data.decode("latin-1")

    return act


def drip(data: bytes, pause: float = 0.05) -> Act:
    return raw(data, size=1, pause=pause)


def read_slowly(pause: float) -> Act:
    def act(line: Line) -> str:
        while b"\r\n.\r\n" not in line.unread[-(1 << 20) - 5 :]:
            time.sleep(pause)
            line.hear_more()
        return ""

    return act


def command_address(command: str) -> str:
    return command.partition("<")[2].partition(">")[0]


@dataclass(eq=False)
class ScriptedRelay:
    """A context manager. After it, `commands`, `heard`, `bodies` and `accepted` are complete."""

    given: InitVar[Script | None] = None
    _: KW_ONLY
    offers: Sequence[str] = ()
    tls: ssl.SSLContext | None = None
    implicit: bool = False
    receive_buffer: int = 64 * 1024
    host: str = "127.0.0.1"
    port: int = 0
    patience: float = 10  # seconds of the client's silence
    latency: float = 0  # seconds of a round trip

    def __post_init__(self, given: Script | None) -> None:
        ehlo = "\r\n".join([*(f"250-{line}" for line in ("relay.example", *self.offers)), "250 HELP"])
        steps: Script = {"EHLO": ehlo, **OBLIGING, **(given or {})}
        self.script = {name: [one] if isinstance(one, str) or callable(one) else [*one] for name, one in steps.items()}
        self.turns = 0  # how often the client spoke when all it had said was answered
        self.commands: list[str] = []
        self.heard = bytearray()  # everything, as it came out of TLS if there was any
        self.bodies: list[bytes] = []  # between the reply to DATA and the final dot
        self.accepted: list[bytes] = []  # those among them that were answered with 2xx
        self.log: list[Acceptance] = []
        self.connections = 0
        self.announced = 0  # mails whose commands came with the final dot of another
        self.over = threading.Event()
        self.lines: list[tuple[threading.Thread, Line]] = []

    def __enter__(self) -> ScriptedRelay:
        self.over.clear()
        self.listener = socket.socket()
        self.listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, self.receive_buffer)
        self.listener.bind((self.host, self.port))
        self.listener.listen()
        self.port = int(self.listener.getsockname()[1])
        self.thread = threading.Thread(target=self._serve, name="scripted relay")
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        """May be entered again: a relay that was away."""
        self.over.set()
        self.listener.shutdown(socket.SHUT_RDWR)  # wakes accept()
        self.thread.join()
        self.listener.close()
        for thread, _line in self.lines:
            thread.join()
        self.lines.clear()

    def hang_up_on_all(self) -> None:
        for _thread, line in self.lines:
            with suppress(OSError):
                line.socket.shutdown(socket.SHUT_RDWR)

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self.listener.accept()
            except OSError:
                return
            self.connections += 1
            connection.settimeout(self.patience)
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            line = Line(self, connection)
            thread = threading.Thread(target=self._attend, args=[line], name="scripted relay's line")
            self.lines = [one for one in self.lines if one[0].is_alive()] + [(thread, line)]
            thread.start()

    def _attend(self, line: Line) -> None:
        with line.socket:
            with suppress(HungUp, OSError):
                self._converse(line)
            line.socket.close()
            if line.acceptance:
                line.acceptance.hung_up_at = time.monotonic()

    def _converse(self, line: Line) -> None:
        if self.implicit:
            self._encrypt(line)
        self._perform(line, "GREETING")
        while True:
            command = line.hear_until(b"\r\n").decode("utf-8", "replace")
            self.commands.append(command)
            line.command = command
            self._answer(line, command.split(" ")[0].split(":")[0].upper())

    def _answer(self, line: Line, verb: str) -> None:
        reply = self._perform(line, verb)
        if verb == "STARTTLS" and reply.startswith("220"):
            self._encrypt(line)
        if verb == "MAIL":
            line.recipients = []
        if verb == "RCPT" and reply.startswith("2"):
            line.recipients.append(command_address(line.command))
        if verb == "DATA" and reply.startswith("354"):
            self._take(line)
        if verb == "QUIT":
            raise HungUp

    def _encrypt(self, line: Line) -> None:
        if "TLS" in self.script:
            line.hear_more()
            self._perform(line, "TLS")
        assert self.tls
        line.socket = self.tls.wrap_socket(line.socket, server_side=True)
        line.unread.clear()

    def _take(self, line: Line) -> None:
        if "BODY" in self.script:
            if not line.unread:
                line.hear_more()
            self._perform(line, "BODY")
        line.body = line.hear_until(b"\r\n.\r\n") + b"\r\n"
        self.bodies.append(line.body)
        self.announced += line.unread.startswith(b"MAIL")
        if self._perform(line, ".").startswith("2"):
            self.accepted.append(line.body)

    def _perform(self, line: Line, name: str) -> str:
        steps = self.script.get(name) or self.script["500"]
        step = steps.pop(0) if len(steps) > 1 else steps[0]
        return step(line) if callable(step) else line.say(step)
