"""SMTP as the relay of the measurements speaks it: it takes every mail from a client that has logged in, and counts.

STARTTLS, AUTH PLAIN and LOGIN (RFC 4954), PIPELINING (RFC 2920), 8BITMIME, SIZE and SMTPUTF8.
Without a TLS context it offers neither STARTTLS nor AUTH and wants no login.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Callable
from contextlib import suppress

from bench.wire import Rules, Wire

USERNAME, PASSWORD = "mailer", "password"
LARGEST = 32 * 2**20
LONGEST_LINE = 4096


class Conversation(Wire):
    """Holds one client's session. Replies to all that came together go out together (RFC 2920)."""

    def __init__(self, rules: Rules) -> None:
        super().__init__(rules)
        self.unread = bytearray()
        self.replies: list[str] = []
        self.read: Callable[[], bool] = self.read_command  # takes one thing from `unread`; False: it is not all there
        self.may_send = rules.tls is None
        self.asked: Callable[[str], str] | None = None  # takes the next line, in the middle of AUTH
        self.reset()

    def reset(self) -> None:
        self.sender: str | None = None
        self.recipients: list[str] = []
        self.smtputf8 = False

    def greet(self) -> None:
        self.say(b"220 relay.example ESMTP\r\n")

    def hear(self, data: bytes) -> None:
        self.unread += data
        while self.unread and self.read():
            pass
        self.flush()

    def flush(self) -> None:
        if self.replies:
            self.say("".join(f"{reply}\r\n" for reply in self.replies).encode())
            self.replies.clear()

    def read_command(self) -> bool:
        end = self.unread.find(b"\r\n")
        if end < 0 and len(self.unread) < LONGEST_LINE:
            return False
        line = bytes(self.unread[: max(end, 0)]).decode("utf-8", "replace")
        del self.unread[: end + 2 if end >= 0 else len(self.unread)]
        if self.asked:
            take, self.asked = self.asked, None
            self.replies.append(take(line))
            return True
        verb, _, rest = line.partition(" ")
        act = VERBS.get(verb.upper())
        reply = act(self, rest.strip()) if act else "500 5.5.2 what?"
        self.replies += [reply] if reply else []
        return True

    # --- commands: each returns its reply ---

    def ehlo(self, _: str) -> str:
        self.reset()
        offers = ["relay.example", "PIPELINING", f"SIZE {LARGEST}", "8BITMIME", "SMTPUTF8"]
        if self.rules.tls:
            offers.append("AUTH PLAIN LOGIN" if self.is_secure else "STARTTLS")
        return "\r\n".join(f"250{' ' if offer is offers[-1] else '-'}{offer}" for offer in offers)

    def helo(self, _: str) -> str:
        self.reset()
        return "250 relay.example"

    def starttls(self, _: str) -> str:
        if not self.rules.tls or self.is_secure:
            return "503 5.5.1 not now"
        self.unread.clear()  # anybody may have sent what came before the handshake
        self.replies.append("220 2.0.0 go ahead")
        self.flush()
        self.begin_tls(self.rules.tls)
        return ""

    def auth(self, rest: str) -> str:
        mechanism, _, initial = rest.partition(" ")
        if not self.rules.tls or not self.is_secure or self.may_send:
            return "503 5.5.1 not now"
        if mechanism.upper() == "PLAIN":
            return self.take_plain(initial) if initial else self.ask("", self.take_plain)
        if mechanism.upper() == "LOGIN":
            return self.take_username(initial) if initial else self.ask("Username:", self.take_username)
        return "504 5.5.4 PLAIN or LOGIN"

    def ask(self, words: str, take: Callable[[str], str]) -> str:
        self.asked = take
        return f"334 {base64.b64encode(words.encode()).decode()}"

    def take_plain(self, line: str) -> str:
        parts = _decoded(line).split("\0")
        return self.judge(*parts[1:]) if len(parts) == 3 else "501 5.5.2 that is not PLAIN"

    def take_username(self, line: str) -> str:
        username = _decoded(line)
        return self.ask("Password:", lambda answer: self.judge(username, _decoded(answer)))

    def judge(self, username: str, password: str) -> str:
        self.may_send = (username, password) == (USERNAME, PASSWORD)
        return "235 2.7.0 welcome" if self.may_send else "535 5.7.8 wrong username or password"

    def mail(self, rest: str) -> str:
        if not self.may_send:
            return "530 5.7.0 STARTTLS and AUTH first"
        if self.sender is not None:
            return "503 5.5.1 one mail at a time"
        address, options = _path(rest, "FROM:")
        names = {option.partition("=")[0].upper(): option.partition("=")[2] for option in options}
        if address is None or names.keys() - {"SIZE", "BODY", "SMTPUTF8"}:
            return "501 5.5.4 MAIL FROM:<address> with SIZE, BODY, SMTPUTF8"
        if names.get("BODY", "7BIT").upper() not in ("7BIT", "8BITMIME"):
            return "501 5.5.4 BODY is 7BIT or 8BITMIME"
        if int(names.get("SIZE") or 0) > LARGEST:
            return "552 5.3.4 too large"
        if not address.isascii() and "SMTPUTF8" not in names:
            return "553 5.6.7 this address needs SMTPUTF8"
        self.sender, self.smtputf8 = address, "SMTPUTF8" in names
        return "250 2.1.0 ok"

    def rcpt(self, rest: str) -> str:
        address, _ = _path(rest, "TO:")
        if self.sender is None:
            return "503 5.5.1 MAIL first"
        if not address:
            return "501 5.5.4 RCPT TO:<address>"
        if not address.isascii() and not self.smtputf8:
            return "553 5.6.7 this address needs SMTPUTF8"
        self.recipients.append(address)
        return "250 2.1.5 ok"

    def data(self, _: str) -> str:
        if not self.recipients:
            return "503 5.5.1 RCPT first"
        self.unread[:0] = b"\r\n"  # so that a body of nothing but its dot ends as every other
        self.searched = 0
        self.read = self.read_body
        return "354 end with a dot"

    def read_body(self) -> bool:
        end = self.unread.find(b"\r\n.\r\n", max(0, self.searched - 4))
        self.searched = len(self.unread)
        if end < 0:
            return False
        body = bytes(self.unread[:end]).replace(b"\r\n.", b"\r\n") + b"\r\n"
        del self.unread[: end + 5]
        self.read = self.read_command
        self.replies.append(self.accept(body[2:]))
        return True

    def accept(self, body: bytes) -> str:
        recipients = self.recipients
        self.reset()
        if len(body) > LARGEST:
            return "552 5.3.4 too large"
        self.rules.tally.add(body, recipients)
        return "250 2.0.0 ok"

    def rset(self, _: str) -> str:
        self.reset()
        return "250 2.0.0 ok"

    def noop(self, _: str) -> str:
        return "250 2.0.0 ok"

    def quit(self, _: str) -> str:
        return self.leave("221 2.0.0 bye")

    def leave(self, words: str) -> str:
        self.replies.append(words)
        self.flush()
        self.hang_up()
        return ""


VERBS: dict[str, Callable[[Conversation, str], str]] = {
    name.upper(): getattr(Conversation, name)
    for name in ("ehlo", "helo", "starttls", "auth", "mail", "rcpt", "data", "rset", "noop", "quit")
}


def _decoded(line: str) -> str:
    """Returns base64 as text, and "", which is no login, where it cannot be read."""
    with suppress(binascii.Error, UnicodeDecodeError):
        return base64.b64decode(line, validate=True).decode()
    return ""


def _path(rest: str, words: str) -> tuple[str | None, list[str]]:
    """Returns address and options of `FROM:<address> OPTION=...`."""
    path, *options = rest[len(words) :].split() or [""]
    if rest[: len(words)].upper() != words or path[:1] + path[-1:] != "<>":
        return None, []
    return path[1:-1], options
