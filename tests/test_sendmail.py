"""bin/sendmail, as cron, PHP and mail programs call it: what arrives, and what a caller is told where nothing does."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from email import message_from_bytes
from os import uname
from pathlib import Path
from typing import Any

import pytest

from tests.conversations import write_ca
from tests.relay import Delivery, Relay
from tests.servers import ROOT, House, RedisServer, eventually
from tests.submitting import Certified, Submission, Tap

MAIL = b"From: Ada <ada@example.com>\nTo: bob@example.com\nSubject: Hello\n\nHi Bob\n"
CRON = b"From: root (Cron Daemon)\nTo: root\nSubject: Cron <root@web> backup\n\ndone\n"
OF_CRON = b"From: CronDaemon <web@example.com>\nTo: root <admin@example.com>\nSubject: Cron <root@web> backup\n\ndone\n"
HIDDEN = b"Cc: c@example.com\nBCC: d@example.com,\n e@example.com\nSubject: x\n\n.\n..\nend\n"
LOCAL = b"From: Blog <blog@localhost>\nTo: Root <root@LOCALHOST>\nSubject: x\n\nx\n"
TWO = MAIL.replace(b"\nTo:", b",\n bob@example.com\nTo:")
WEB, ADA, BOB, ADMIN = "web@example.com", "ada@example.com", "bob@example.com", "admin@example.com"
FROM_WEB = b"From: Web 1 <web@example.com>\n"
ADDED = (b"Date:", b"Message-ID:", b"MIME-Version:")  # what the service puts in where it is missing
CALLS = {  # words, mail -> sender, recipients, content
    "as PHP": ("-t -i", MAIL, ADA, [BOB], MAIL),
    "CRLF": ("-ti", MAIL.replace(b"\n", b"\r\n")[:-2], ADA, [BOB], MAIL),
    "as mutt": ("-oi -oem -B8BITMIME -fb@example.com -- " + ADMIN, MAIL, "b@example.com", [ADMIN], MAIL),
    "null sender": ("-t -f <> " + ADMIN, MAIL, "", [BOB, ADMIN], MAIL),
    "mbox": ("-bm -r www-data -t", b"From x Mon Jan 1\n" + MAIL, WEB, [BOB], MAIL),
    "bcc": (
        "-t",
        HIDDEN,
        WEB,
        [f"{name}@example.com" for name in "cde"],
        FROM_WEB + HIDDEN.replace(b"BCC: d@example.com,\n e@example.com\n", b""),
    ),
    "as cron": ("-FCronDaemon -i -B8BITMIME -oem root", CRON, WEB, [ADMIN], OF_CRON),
    "no header": (BOB, b"no header: \xc3\xa4\rx\r\r\ny", WEB, [BOB], FROM_WEB + b"\nno header: \xc3\xa4\nx\ny\n"),
    "two authors": (BOB, TWO, ADA, [BOB], TWO),
    "local hosts": (
        "-t -fx@" + uname().nodename,
        LOCAL,
        WEB,
        [ADMIN],
        LOCAL.replace(b"<blog@localhost>", b"<web@example.com>"),
    ),
    "resent": (
        "-t",
        b"Resent-To: c@example.com\n" + MAIL,
        ADA,
        ["c@example.com"],
        b"Resent-To: c@example.com\n" + MAIL,
    ),
}


@pytest.fixture(scope="module")
def there(redis_server: RedisServer, far: Relay, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Submission]:
    folder = tmp_path_factory.mktemp("house")
    with House(folder, redis_server.url, MAX_RECIPIENTS="3", **far.environment(folder)) as house:
        house.worker()
        yield Submission(house)


def call(directory: Path, mail: bytes, *words: str, authority: str = "", **settings: str) -> tuple[int, str]:
    """Returns its exit code and what it says."""
    given = {"MAIL_FROM": "Web 1 <web@example.com>", "LOCAL_TO": "admin@example.com", **settings}
    lines = [f"{name}={value}\n" for name, value in given.items() if value]
    (directory / "sendmail.conf").write_text("# settings\n" + "".join(lines))
    command = [str(ROOT / "bin" / "sendmail"), "-C", str(directory / "sendmail.conf"), *words]
    ran = subprocess.run(command, input=mail, capture_output=True, env={"SSL_CERT_FILE": authority}, timeout=60)
    return ran.returncode, (ran.stdout + ran.stderr).decode()


def url(port: int, key: str = "send-key") -> str:
    return f"smtp://any:{key}@127.0.0.1:{port}"


def sent(there: Submission, far: Relay, directory: Path, mail: bytes, *words: str) -> Delivery:
    before = len(far.accepted)
    assert call(directory, mail, *words, SUBMISSION_URL=url(there.port)) == (0, "")
    eventually(lambda: len(far.accepted) > before)
    sender, recipients, content = far.accepted[-1]
    kept = [line for line in content.splitlines(True) if not line.startswith(ADDED)]
    return Delivery(sender, recipients, b"".join(kept).replace(b"\r\n", b"\n"))


@pytest.mark.parametrize(("words", "mail", "sender", "recipients", "content"), CALLS.values(), ids=CALLS)
def test_a_mail_arrives_as_its_caller_meant_it(
    there: Submission,
    far: Relay,
    tmp_path: Path,
    words: str,
    mail: bytes,
    sender: str,
    recipients: list[str],
    content: bytes,
) -> None:
    assert sent(there, far, tmp_path, mail, *words.split()) == (sender, recipients, content)


@pytest.mark.parametrize("body", [b"x" * 999 + b"\n", b"a\0b\n", b"\xc3\xa4" * 600 + b"\n"])
def test_what_smtp_cannot_carry_is_encoded(there: Submission, far: Relay, tmp_path: Path, body: bytes) -> None:
    cron = b"Content-Type: text/plain; charset=UTF-8\nContent-Transfer-Encoding: 8bit\n"
    for head in (b"", cron):
        content = sent(there, far, tmp_path, head + MAIL.replace(b"Hi Bob\n", body), "-t").content
        assert message_from_bytes(content).get_payload(decode=True) == body.replace(b"\n", b"\r\n")


@pytest.mark.parametrize(
    ("code", "said", "words", "changes"),
    [
        (64, "usage", "--help", {}),
        (64, "-bm", "-bs", {}),
        (64, "must have a recipient", "-i", {}),
        (65, "554 5.6.0 the mail must have one", "-t", {"mail": b"From: x@example.com\n" + MAIL}),
        (65, "a line's end", "-f a@example.com\nx", {"words": [BOB]}),
        (67, "LOCAL_TO must be set", "root", {"LOCAL_TO": ""}),
        (67, "553 5.1.3", "bob@elsewhere", {}),
        (69, "452 4.5.3", "a@x.example b@x.example c@x.example d@x.example", {}),
        (75, "does not answer", "-t", {"port": 1}),
        (77, "535 5.7.8", "-t", {"key": "wrong"}),
        (78, "SUBMISSION_URL must be", "-t", {"SUBMISSION_URL": "127.0.0.1"}),
        (78, "MAIL_FROM must be", "-t", {"MAIL_FROM": "root"}),
        (78, "COLOR is not", "-t", {"COLOR": "red"}),
        (78, "/nowhere must be there", "-C /nowhere -t", {}),
    ],
)
def test_a_mail_that_is_not_taken_is_said_by_code_and_words(
    there: Submission, tmp_path: Path, code: int, said: str, words: str, changes: dict[str, Any]
) -> None:
    mail, more = changes.pop("mail", MAIL), changes.pop("words", [])
    changes = {"SUBMISSION_URL": url(changes.pop("port", there.port), changes.pop("key", "send-key")), **changes}
    told = call(tmp_path, mail, *words.split(" "), *more, **changes)
    assert told[0] == code
    assert said in told[1]
    assert not [word for word in ("@example", "Hello", "Hi Bob", "send-key", "Traceback") if word in told[1]]


def test_a_mail_whose_reply_was_lost_is_handed_over_again_and_is_one_mail(
    there: Submission, far: Relay, tmp_path: Path
) -> None:
    before = len(far.accepted)
    with Tap(there.port, cuts=2) as tap:
        assert call(tmp_path, MAIL, "-t", SUBMISSION_URL=url(tap.port)) == (0, "")
    assert len(tap.mails) == len(set(tap.mails)) + 2 == 3
    sent(there, far, tmp_path, MAIL, BOB)
    assert len(far.accepted) == before + 2


@pytest.mark.parametrize("scheme", ["smtp", "smtps"])
def test_another_machines_service_is_spoken_to_over_tls_with_its_own_certificate(
    there: Submission, tmp_path: Path, scheme: str
) -> None:
    certified = Certified(tmp_path, "0.0.0.0")  # which is this machine, and not among the names of loopback
    ports = "main.TLS_PORT = {port}" if scheme == "smtps" else "conversation.STARTTLS_PORT = {port}"
    other = Submission(there.house, ports, **certified.settings)
    to = {"SUBMISSION_URL": f"{scheme}://any:send-key@0.0.0.0:{other.port}"}
    assert call(tmp_path, MAIL, "-t", authority=write_ca(certified.authority, tmp_path), **to) == (0, "")
    assert call(tmp_path, MAIL, "-t", **to)[0] == 75
    assert call(tmp_path, MAIL, "-t", SUBMISSION_URL=f"smtp://any:send-key@0.0.0.0:{there.port}")[0] == 78
