"""Programs that speak SMTP, unchanged: what each says to the service arrives at the far end, octet by octet.

A program or package that is not here is skipped, but with REQUIRE_CLIENTS=1 (as in CI) it fails.
"""

from __future__ import annotations

import os
import pwd
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from bench.postfix import MAIN
from tests import programs
from tests.relay import Relay
from tests.servers import ROOT, House, RedisServer, eventually, free_port, kill_group, start
from tests.submitting import Submission, Tap

PAGE = (ROOT / "docs" / "smtp.md").read_text()
ADDED = rb"(?:(?:Date|Message-ID|MIME-Version): [^\r]*\r\n)*"  # in front, where they are missing
HIDDEN = re.compile(rb"(?im)^(?:bcc|return-path|resend-idempotency-key):.*\r\n")
MAIL = """\
From: Ada <ada@example.com>
To: bob@example.com, =?utf-8?q?C=C3=A4r?= <c@example.com>
Subject: H\u00e4llo
Date: Mon, 1 Jan 2024 00:00:00 +0000
Message-ID: <1@example.com>
DKIM-Signature: v=1; a=rsa-sha256; bh=abc; b=def;
\td=example.com
MIME-Version: 1.0
Content-Type: text/plain; charset=utf-8
Content-Transfer-Encoding: 8bit

.
..dots  \t
\u00e4\u00f6\u00fc\u00df
{x}

""".replace("{x}", "x" * 998)


def of_the_page(language: str, marker: str) -> str:
    (found,) = [one for one in re.findall(rf"```{language}\n(.*?)```", PAGE, re.DOTALL) if marker in one]
    return str(found)


@pytest.fixture(scope="module")
def tap(redis_server: RedisServer, far: Relay, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tap]:
    folder = tmp_path_factory.mktemp("house")
    with House(folder, redis_server.url, **far.environment(folder)) as house:
        house.worker()
        with Tap(Submission(house).port) as tap:
            yield tap


def here(text: str, tap: Tap) -> str:
    """What a page says, for this service."""
    return re.sub(r"\bdev\b", "send-key", text.replace("2525", str(tap.port)))


# --- the programs: each returns its command, whose standard input is MAIL ---------------------------------------------

SMTPLIB = """
import smtplib, sys
mail = sys.stdin.buffer.read().replace(b"\\n", b"\\r\\n")
with smtplib.SMTP("127.0.0.1", 2525) as client:
    client.login("any", "dev")
    client.sendmail("ada@example.com", ["bob@example.com", "c@example.com"], mail, ["BODY=8BITMIME"])
"""
DJANGO = """
from django.conf import settings
settings.configure(**{name: value for name, value in globals().items() if name.isupper()})
from django.core.mail import EmailMultiAlternatives, get_connection
with get_connection() as connection:
    for n in range(2):
        text, to, bcc = ".\\n..\\n\u00e4\\n" + "x" * 2000, ["bob@example.com"], ["secret@example.com"]
        mail = EmailMultiAlternatives("H\u00e4llo", text, None, to, bcc)
        mail.attach_alternative("<p>H\u00e4llo</p>", "text/html")
        mail.attach("\u00e4.bin", bytes(range(256)), "application/octet-stream")
        mail.connection = connection
        assert mail.send() == 1
"""
NODEMAILER = """
const attachments = [{ filename: "\u00e4.bin", content: Buffer.from([...Array(256).keys()]) }];
const text = ".\\n..\\n\u00e4\\n" + "x".repeat(2000);
await transport.sendMail({ ...mail, bcc: "secret@example.com", subject: "H\u00e4llo", text, attachments });
"""
PHP = """
$head = ['From' => 'Ada <ada@example.com>', 'Bcc' => 'secret@example.com', 'MIME-Version' => '1.0'];
exit(mail('bob@example.com', 'Hello', ".\\n..\\nHi\\n", $head, '-fbounce@example.com') ? 0 : 1);
"""


def of_smtplib(directory: Path, tap: Tap) -> list[str]:
    return [sys.executable, "-c", here(SMTPLIB, tap)]


def of_django(directory: Path, tap: Tap) -> list[str]:
    return [
        os.environ.get("CLIENTS_PYTHON", sys.executable),
        "-c",
        here(of_the_page("python", "EMAIL_HOST"), tap) + DJANGO,
    ]


def of_nodemailer(directory: Path, tap: Tap) -> list[str]:
    (directory / "x.mjs").write_text(here(of_the_page("js", "nodemailer"), tap) + NODEMAILER)
    if modules := os.environ.get("CLIENTS_NODE_MODULES"):
        (directory / "node_modules").symlink_to(modules)
    return ["node", str(directory / "x.mjs")]


def of_swaks(directory: Path, tap: Tap) -> list[str]:
    (directory / "mail").write_text(MAIL)
    server = ["--server", "127.0.0.1", "--port", str(tap.port), "--auth", "LOGIN", "--auth-user", "any"]
    envelope = ["--auth-password", "send-key", "--from", "ada@example.com", "--to", "bob@example.com,c@example.com"]
    return ["swaks", *server, *envelope, "--data", f"@{directory / 'mail'}"]


def of_msmtp(directory: Path, tap: Tap) -> list[str]:
    (directory / "msmtprc").write_text(here(of_the_page("conf", "msmtprc"), tap))
    (directory / "msmtprc").chmod(0o600)
    return ["msmtp", "-C", str(directory / "msmtprc"), "-t", "--read-envelope-from"]


def of_php(directory: Path, tap: Tap) -> list[str]:
    (directory / "conf").write_text(here(of_the_page("ini", "SUBMISSION_URL"), tap))
    path = of_the_page("ini", "sendmail_path").partition("= ")[2].strip()
    path = path.replace("/opt/async-email/current", str(ROOT)).replace(
        "/etc/shop-sendmail.conf", str(directory / "conf")
    )
    return ["php", "-d", f"sendmail_path={path}", "-r", PHP]


CLIENTS = {
    "smtplib": (of_smtplib, 1),
    "Django": (of_django, 2),
    "nodemailer": (of_nodemailer, 2),
    "swaks": (of_swaks, 1),
    "msmtp": (of_msmtp, 1),
    "PHP": (of_php, 1),
}


def as_it_went_in(said: bytes, arrived: bytes) -> bool:
    """Returns whether all that is new stands in front, and all that is gone is what may go."""
    head, empty, body = said.partition(b"\r\n\r\n")
    return bool(re.fullmatch(ADDED + re.escape(HIDDEN.sub(b"", head + b"\r\n") + empty[2:] + body), arrived))


@pytest.mark.parametrize("client", CLIENTS)
def test_what_a_client_says_arrives_to_the_octet(tap: Tap, far: Relay, tmp_path: Path, client: str) -> None:
    command_of, mails = CLIENTS[client]
    command = command_of(tmp_path, tap)
    programs.program("REQUIRE_CLIENTS", command[0])
    said, arrived = len(tap.mails), len(far.accepted)
    ran = subprocess.run(command, input=MAIL.encode(), capture_output=True, timeout=60)
    if re.search(rb"No module named|ERR_MODULE_NOT_FOUND", ran.stderr):
        programs.missing("REQUIRE_CLIENTS", "a package of it is not installed")
    assert ran.returncode == 0, (ran.stdout + ran.stderr).decode()
    eventually(lambda: len(far.accepted) == arrived + mails)
    assert len(tap.mails) == said + mails
    for heard in tap.mails[said:]:
        assert [one for one in far.accepted[arrived:] if as_it_went_in(heard, one.content)]
    for one in far.accepted[arrived:]:
        assert b"secret@" not in one.content
        assert set(one.recipients) <= {"ada@example.com", "bob@example.com", "c@example.com", "secret@example.com"}


# --- Postfix, with all of its mail ------------------------------------------------------------------------------------

MASTER = """
127.0.0.1:{port} inet n - n - - smtpd
cleanup unix n - n - 0 cleanup
rewrite unix - - n - - trivial-rewrite
bounce unix - - n - 0 bounce
defer unix - - n - 0 bounce
trace unix - - n - 0 bounce
proxymap unix - - n - - proxymap
anvil unix - - n - 1 anvil
smtp unix - - n - - smtp
qmgr unix n - n 300 1 qmgr
postlog unix-dgram n - n - 1 postlogd
"""


@contextmanager
def postfix(settings: str) -> Iterator[int]:
    """One of our own, in folders of its own; the system's is neither used nor touched. Yields its port."""
    program, postconf = (programs.program("REQUIRE_CLIENTS", name) for name in ("postfix", "postconf"))
    if os.geteuid() or "postfix" not in {user.pw_name for user in pwd.getpwall()}:
        programs.missing("REQUIRE_CLIENTS", "Postfix needs root, and its user")
    port = free_port()
    with TemporaryDirectory(prefix="async-email-postfix-") as folder:
        place = Path(folder)
        place.chmod(0o711)  # so that Postfix' own user reaches its data; pytest's folders are closed again and again
        for name in ("queue", "data", "etc"):
            (place / name).mkdir()
        shutil.chown(place / "data", "postfix")
        (place / "etc" / "main.cf").write_text(MAIN.format(place=place) + settings)
        (place / "etc" / "master.cf").write_text(MASTER.format(port=port))
        for command in (
            [program, "-c", f"{place}/etc", "check"],
            [postconf, "-c", f"{place}/etc", "-hx", "daemon_directory"],
        ):
            said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        master = start([f"{said.strip()}/master", "-c", f"{place}/etc", "-s"], place / "master.log")
        try:
            yield port
        finally:
            kill_group(master)


def test_a_postfix_relays_all_of_its_mail_to_the_octet(tap: Tap, far: Relay) -> None:
    said, arrived = len(tap.mails), len(far.accepted)
    with postfix(here(of_the_page("ini", "relayhost"), tap)) as port:

        def hand_over() -> bool:
            command = [
                sys.executable,
                "-c",
                SMTPLIB.replace("2525", str(port)).replace('client.login("any", "dev")', ""),
            ]
            return subprocess.run(command, input=MAIL.encode(), capture_output=True).returncode == 0

        eventually(hand_over)
        eventually(lambda: len(far.accepted) == arrived + 1)
    assert far.accepted[-1].content == tap.mails[said]
    own, _, rest = far.accepted[-1].content.partition(b"From: Ada")
    assert own.startswith(b"Received: ")
    assert b"From: Ada" + rest == MAIL.encode().replace(b"\n", b"\r\n")
