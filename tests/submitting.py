"""What the tests of submission share: its process, and clients that say what they are told to the octet."""

from __future__ import annotations

import base64
import re
import smtplib
import socket
import ssl
import subprocess
import threading
from contextlib import suppress
from pathlib import Path
from typing import Any

import trustme

from tests.servers import House, eventually, free_port

MAIL = b"From: Ada <ada@example.com>\r\nTo: bob@example.com\r\nSubject: Hello\r\n\r\nHi Bob\r\n"
ENVELOPE = b"MAIL FROM:<ada@example.com>\r\nRCPT TO:<bob@example.com>\r\nDATA\r\n"
LOGIN = b"AUTH PLAIN " + base64.b64encode(b"\0resend\0send-key") + b"\r\n"


class Submission:
    """The process that takes mail by SMTP, with settings of its own; `changes` are made to its code first."""

    def __init__(self, house: House, changes: str = "", **settings: str) -> None:
        self.house, self.port = house, free_port()
        patched = f"import sys; from submission import __main__ as main, conversation, handler; {changes}"
        self.command = (
            ["-c", f"{patched.format(port=self.port)}; sys.exit(main.main())"] if changes else ["-m", "submission"]
        )
        self.settings = {"SUBMISSION_LISTEN": f"127.0.0.1:{self.port}", "PYTHONPATH": str(house.root), **settings}
        self.start()

    def start(self) -> subprocess.Popen[bytes]:
        environment = self.house.environment | self.settings
        self.process = self.house.run("submission", *self.command, env=environment)
        eventually(self.answers)
        return self.process

    def answers(self) -> bool:
        with suppress(OSError), socket.create_connection(("127.0.0.1", self.port), timeout=1) as connection:
            return connection.recv(3) == b"220" if "TLS_PORT" not in self.command[-1] else True
        return False

    def client(self, key: str = "send-key", **options: Any) -> smtplib.SMTP:
        client = smtplib.SMTP("127.0.0.1", self.port, timeout=60, **options)
        client.login("resend", key)
        return client

    def send(self, mail: bytes = MAIL, key: str = "send-key", sender: str = "ada@example.com", *to: str) -> str:
        """Sends a mail as smtplib does, to the octet, and returns the reply to it."""
        with self.client(key) as client:
            client.mail(sender)
            for one in to or ("bob@example.com",):
                client.rcpt(one)
            code, text = client.data(mail)
        return f"{code} {text.decode()}"

    def talk(self, login: bool = True) -> Talk:
        talk = Talk(self.port)
        if login:
            talk.say(b"EHLO test\r\n" + LOGIN, 3)
        return talk


class Talk:
    """A client that says what it likes."""

    def __init__(self, port: int) -> None:
        self.socket = socket.create_connection(("127.0.0.1", port), timeout=60)
        self.file = self.socket.makefile("rb")

    def say(self, octets: bytes, replies: int = 1) -> list[str]:
        """Returns so many replies, each as its last line."""
        self.socket.sendall(octets)
        return [self.reply() for _ in range(replies)]

    def reply(self) -> str:
        while (line := self.file.readline())[3:4] == b"-":
            pass
        return line.decode().strip()

    def __enter__(self) -> Talk:
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()
        self.socket.close()


class Tap:
    """A wire to the process: each mail is heard as it goes in, and the first `cuts` replies to mails are cut off."""

    def __init__(self, port: int, cuts: int = 0) -> None:
        self.far, self.cuts = port, cuts
        self.heard: list[bytearray] = []  # of each connection, what the client said
        self.listening = socket.create_server(("127.0.0.1", 0))
        self.port = self.listening.getsockname()[1]
        threading.Thread(target=self._serve, daemon=True).start()

    @property
    def mails(self) -> list[bytes]:
        found = (re.findall(rb"(?is)DATA\r\n(.*?\r\n)\.\r\n", bytes(heard)) for heard in self.heard)
        return [mail.replace(b"\r\n..", b"\r\n.") for mails in found for mail in mails]

    def __enter__(self) -> Tap:
        return self

    def __exit__(self, *_: object) -> None:
        self.listening.shutdown(socket.SHUT_RDWR)
        self.listening.close()

    def _serve(self) -> None:
        with suppress(OSError):
            while True:
                near = self.listening.accept()[0]
                up = socket.create_connection(("127.0.0.1", self.far))
                self.heard.append(bytearray())
                for pair in ((near, up, self.heard[-1]), (up, near, bytearray())):
                    threading.Thread(target=self._pass_on, args=pair, daemon=True).start()

    def _pass_on(self, one: socket.socket, other: socket.socket, heard: bytearray) -> None:
        with one, suppress(OSError):
            while data := one.recv(2**16):
                heard += data
                if self.cuts and data.startswith(b"250 2.6.0"):
                    self.cuts -= 1
                    break
                other.sendall(data)
        with suppress(OSError):
            other.shutdown(socket.SHUT_RDWR)


class Certified:
    """A certificate for the process, which may be issued again."""

    def __init__(self, folder: Path, *names: str) -> None:
        self.names = names or ("127.0.0.1", "localhost")
        self.authority = trustme.CA()
        self.cert, self.key = folder / "cert.pem", folder / "key.pem"
        self.issue()

    def issue(self) -> None:
        made = self.authority.issue_cert(*self.names)
        made.private_key_pem.write_to_path(str(self.key))
        with self.cert.open("wb") as file:
            file.writelines(blob.bytes() for blob in made.cert_chain_pems)

    @property
    def settings(self) -> dict[str, str]:
        return {"SUBMISSION_TLS_CERT": str(self.cert), "SUBMISSION_TLS_KEY": str(self.key)}

    @property
    def context(self) -> ssl.SSLContext:
        context = ssl.create_default_context()
        self.authority.configure_trust(context)
        return context
