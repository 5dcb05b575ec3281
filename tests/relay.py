"""A relay as a mail meets it: accepts what it is sent, with STARTTLS and AUTH if asked, or answers as it is told.

It is a scripted relay with a few acts; what a test wants to happen in the middle of a conversation is in
tests/scripted_relay.py.
"""

from __future__ import annotations

import base64
import ssl
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import trustme

from tests.conversations import server_context, write_ca
from tests.scripted_relay import HungUp, Line, ScriptedRelay, command_address, header

CUT = "cut"


class Delivery(NamedTuple):
    """What a relay accepted with 250."""

    sender: str
    recipients: list[str]
    content: bytes

    @property
    def message_id(self) -> str:
        return header(self.content, "Message-ID")


@dataclass
class Relay:
    """A context manager. `rcpt[address]` and `data` are lists of replies to give, one each time, before it answers 250
    again; CUT in `data` accepts the mail and hangs up without a word."""

    login: tuple[str, str] | None = None
    tls: str = "none"  # none, starttls or tls
    host: str = "127.0.0.1"  # where it listens
    name: str = "127.0.0.1"  # by which it is called, and certified
    port: int = 0  # 0: any that is free
    rcpt: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))
    data: list[str] = field(default_factory=list)
    on_data: Callable[[], object] = lambda: None  # called when a body has come, before it is answered
    accepted: list[Delivery] = field(default_factory=list)
    seen_rcpt: list[str] = field(default_factory=list)
    refused_logins: int = 0
    takes_token: Callable[[str], bool] | None = None  # in place of a password: whether it is good
    authority: trustme.CA = field(default_factory=trustme.CA)

    def __enter__(self) -> Relay:
        self.server = ScriptedRelay(
            {"EHLO": self._ehlo, "AUTH": self._auth, "MAIL": self._mail, "RCPT": self._rcpt, ".": self._end},
            tls=server_context(self.authority, self.name),
            implicit=self.tls == "tls",
            host=self.host,
            port=self.port,
            patience=60,
        )
        self.server.__enter__()
        self.port = self.server.port
        return self

    def __exit__(self, *_: object) -> None:
        self.server.hang_up_on_all()  # workers keep their sessions for the next mail
        self.server.__exit__()

    @property
    def connections(self) -> int:
        return self.server.connections

    def environment(self, directory: Path) -> dict[str, str]:
        """Returns the settings with which a worker reaches this relay."""
        settings = {"SMTP_HOST": self.name, "SMTP_PORT": str(self.port), "SMTP_SECURITY": self.tls}
        settings |= {"SMTP_CA_FILE": write_ca(self.authority, directory)} if self.tls != "none" else {}
        return settings | ({"SMTP_USERNAME": self.login[0], "SMTP_PASSWORD": self.login[1]} if self.login else {})

    def _ehlo(self, line: Line) -> str:
        offers = ["relay of the tests", "8BITMIME", "SMTPUTF8"]
        encrypted = isinstance(line.socket, ssl.SSLSocket)
        offers += ["STARTTLS"] if self.tls == "starttls" and not encrypted else []
        offers += ["AUTH PLAIN"] if self.login and encrypted else []
        offers += ["AUTH XOAUTH2 OAUTHBEARER"] if self.takes_token else []
        return line.say("\r\n".join([*(f"250-{offer}" for offer in offers), "250 HELP"]))

    def _auth(self, line: Line) -> str:
        if self.takes_token:
            return self._token(line)
        _, user, password = base64.b64decode(line.command.split(" ")[2]).decode().split("\0")
        line.trusted = (user, password) == self.login
        return line.say("235 2.7.0 welcome" if line.trusted else "535 5.7.8 Authentication credentials invalid")

    def _token(self, line: Line) -> str:
        """Takes XOAUTH2: the response follows a 334, an error is JSON and wants an answer."""
        line.say("334 ")
        token = base64.b64decode(line.hear_until(b"\r\n")).split(b"\1")[1].decode().removeprefix("auth=Bearer ")
        line.token = token
        if self.takes_token and self.takes_token(token):
            line.trusted = True
            return line.say("235 2.7.0 Authentication successful")
        line.say("334 " + base64.b64encode(b'{"status":"401","schemes":"Bearer"}').decode())
        self.refused_logins += 1
        assert line.hear_until(b"\r\n") == b""
        return line.say("535 5.7.3 Authentication unsuccessful")

    def _mail(self, line: Line) -> str:
        line.sender = command_address(line.command)
        if self.takes_token and line.trusted and not self.takes_token(line.token):
            line.say("421 4.7.0 the token of this session has ended")
            raise HungUp
        is_open = not (self.login or self.takes_token)
        return line.say("250 2.1.0 ok" if line.trusted or is_open else "530 5.7.0 Authentication required")

    def _rcpt(self, line: Line) -> str:
        address = command_address(line.command)
        self.seen_rcpt.append(address)
        return line.say(self.rcpt[address].pop(0) if self.rcpt[address] else "250 2.1.5 Recipient ok")

    def _end(self, line: Line) -> str:
        self.on_data()
        reply = self.data.pop(0) if self.data else "250 2.0.0 Ok: queued"
        if reply == CUT or reply.startswith("2"):
            body = line.body.replace(b"\r\n..", b"\r\n.")
            self.accepted.append(Delivery(line.sender, list(line.recipients), body))
        if reply == CUT:
            raise HungUp
        return line.say(reply)
