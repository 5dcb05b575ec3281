"""A real IMAP server with TLS, for one test module: Dovecot, where it is installed and the tests run as root."""

from __future__ import annotations

import imaplib
import os
import shutil
import ssl
import subprocess
import tempfile
from base64 import b64encode
from pathlib import Path
from types import TracebackType
from urllib.parse import quote

import trustme

from tests.programs import missing, program
from tests.servers import eventually, free_port

USER, PASSWORD = "bounces@acme.example", 'p@ss/w:"rd%\\'
CONFIGURATION = """
base_dir = {directory}/run
state_dir = {directory}/state
log_path = {directory}/log
protocols = imap
listen = 127.0.0.1
ssl = required
ssl_cert = <{directory}/cert.pem
ssl_key = <{directory}/key.pem
mail_location = maildir:{directory}/mail/%n:LAYOUT=fs
first_valid_uid = 1
first_valid_gid = 1
passdb {{
  driver = passwd-file
  args = {directory}/users
}}
userdb {{
  driver = static
  args = uid=nobody gid=nogroup home={directory}/mail
}}
service imap-login {{
  inet_listener imap {{
    port = 0
  }}
  inet_listener imaps {{
    port = {port}
    ssl = yes
  }}
}}
namespace inbox {{
  inbox = yes
  separator = /
  mailbox "[Gmail]/Sent Mail" {{
    auto = create
  }}
}}
"""


class Dovecot:
    def __init__(self, authority: trustme.CA) -> None:
        self.program = program("REQUIRE_CLIENTS", "dovecot")
        if os.geteuid():
            missing("REQUIRE_CLIENTS", "Dovecot is started by root only")
        self.directory = Path(tempfile.mkdtemp(prefix="imap"))  # short, for its sockets are below it
        self.directory.chmod(0o755)
        self.port = free_port()
        certificate = authority.issue_cert("localhost")
        certificate.private_key_pem.write_to_path(str(self.directory / "key.pem"))
        certificate.cert_chain_pems[0].write_to_path(str(self.directory / "cert.pem"))
        authority.cert_pem.write_to_path(str(self.directory / "ca.pem"))
        (self.directory / "users").write_text(f"{USER}:{{PLAIN.b64}}{b64encode(PASSWORD.encode()).decode()}\n")
        (self.directory / "mail").mkdir()
        shutil.chown(self.directory / "mail", "nobody", "nogroup")
        file = self.directory / "dovecot.conf"
        file.write_text(CONFIGURATION.format(directory=self.directory, port=self.port))

    def __enter__(self) -> Dovecot:
        self.process = subprocess.Popen([self.program, "-F", "-c", str(self.directory / "dovecot.conf")])
        try:
            eventually(self.answers)
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def answers(self) -> bool:
        try:
            with self.client():
                return True
        except OSError:
            return False

    def __exit__(self, _: type[BaseException] | None, __: BaseException | None, ___: TracebackType | None) -> None:
        self.process.terminate()
        self.process.wait(10)
        shutil.rmtree(self.directory)

    def client(self) -> imaplib.IMAP4_SSL:
        context = ssl.create_default_context(cafile=str(self.directory / "ca.pem"))
        client = imaplib.IMAP4_SSL("localhost", self.port, ssl_context=context)
        client.login(USER, PASSWORD)
        return client

    def url(self, folder: str = "INBOX", user: str = USER, password: str = PASSWORD) -> str:
        return f"imaps://{quote(user, '')}:{quote(password, '')}@localhost:{self.port}/{quote(folder)}"

    def put(self, folder: str, *mails: bytes) -> None:
        with self.client() as client:
            for mail in mails:
                assert client.append(f'"{folder}"', "", "", mail)[0] == "OK"

    def flags(self, folder: str = "INBOX") -> list[bool]:
        """Returns of each mail whether it has been read."""
        with self.client() as client:
            client.select(f'"{folder}"', readonly=True)
            return [b"\\Seen" in line for line in client.fetch("1:*", "(FLAGS)")[1] if isinstance(line, bytes)]

    def empty(self, folder: str = "INBOX") -> None:
        with self.client() as client:
            if client.select(f'"{folder}"')[1] != [b"0"]:
                client.store("1:*", "+FLAGS", "\\Deleted")
                client.expunge()
