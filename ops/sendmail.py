#!/usr/bin/python3 -IS
"""Hands a mail from standard input over by SMTP, as `sendmail -t -i` does: `bin/sendmail`, for cron, PHP and others.

It has no queue: exit 0 says that the service has stored the mail, any other that it has not, with the reason on
standard error and in the system's log (facility mail). Where and as whom is in one file, since callers have no
environment. A connection that breaks is opened again; the mail has an idempotency key, so that it is one mail all the
same. Standard library only: elsewhere /usr/sbin/sendmail can be a copy of this file. Exit codes: sysexits.h.
"""

from __future__ import annotations

import base64
import getopt
import os
import re
import smtplib
import ssl
import sys
import syslog
import time
from email.utils import formataddr, getaddresses, parseaddr
from typing import Any, NamedTuple
from urllib.parse import unquote, urlsplit

FILE = "/etc/async-email-sendmail.conf"
USAGE = "sendmail [-t] [-i] [-f SENDER] [-F NAME] [-C FILE] [--] [RECIPIENT ...]"
OPTIONS = "A:B:C:F:GL:N:O:R:UV:X:b:e:f:h:imno:p:r:tv"  # what callers pass; only t, f, r, F, C and b mean something here
KNOWN = {"SUBMISSION_URL", "MAIL_FROM", "LOCAL_TO"}
OK, USAGE_ERROR, DATA, NO_USER, UNAVAILABLE, SOFTWARE, LATER, NO_PERMISSION, CONFIG = 0, 64, 65, 67, 69, 70, 75, 77, 78
PAUSES = (0, 1, 4)  # seconds before each try to connect
PATIENCE = 120  # seconds for a reply; the service waits 30 for its Redis
LONGEST_LINE = 998  # octets (RFC 5322 2.1.1)
FIELD = re.compile(rb"([!-9;-~]+)[ \t]*:([^\r\n]*\r\n(?:[ \t][^\r\n]*\r\n)*)")
USER = re.compile(rb"\s*([\w.+-]+)(\s*\([^()]*\))?\s*")  # To: root
IDEMPOTENCY_KEY = b"resend-idempotency-key"


class Stop(Exception):
    """The mail is not taken. The text says why, and nothing that the mail says."""

    def __init__(self, code: int, text: str) -> None:
        super().__init__(text)
        self.code = code


class Asked(NamedTuple):
    """The command line."""

    recipients: list[str]
    from_header: bool = False
    sender: str | None = None
    name: str = ""
    file: str = FILE


class Config(NamedTuple):
    url: str
    name: str
    sender: str
    local_to: str
    file: str


class Mail(NamedTuple):
    """Its header, field by field as (name, value with its CRLF), and its body."""

    fields: list[tuple[bytes, bytes]]
    body: bytes

    def values(self, *names: bytes) -> list[str]:
        return [
            value.replace(b"\r\n", b"").decode(errors="replace") for name, value in self.fields if name.lower() in names
        ]

    def octets(self) -> bytes:
        return b"".join(b"%b:%b" % field for field in self.fields) + b"\r\n" + self.body


def asked_of(arguments: list[str]) -> Asked:
    try:
        options, recipients = getopt.getopt(arguments, OPTIONS)
    except getopt.GetoptError:
        raise Stop(USAGE_ERROR, f"usage: {USAGE}") from None
    given = dict(options)
    if given.get("-b", "m") != "m":
        raise Stop(USAGE_ERROR, "of -b there is only -bm: give the mail on standard input, with -t -i")
    sender = given.get("-f", given.get("-r"))
    return Asked(recipients, "-t" in given, sender, given.get("-F", ""), given.get("-C", FILE))


def config_of(file: str) -> Config:
    try:
        with open(file, encoding="utf-8") as opened:
            lines = [line.strip() for line in opened]
    except PermissionError:
        raise Stop(NO_PERMISSION, f"{file} must be readable by this user") from None
    except (OSError, ValueError):
        raise Stop(CONFIG, f"{file} must be there: see docs/smtp.md") from None
    given = dict(line.split("=", 1) for line in lines if "=" in line and not line.startswith("#"))
    if unknown := sorted(given.keys() - KNOWN):
        raise Stop(CONFIG, f"{file}: {unknown[0]} is not a known setting")
    url, (name, sender) = given.get("SUBMISSION_URL", ""), parseaddr(given.get("MAIL_FROM", ""))
    if not re.fullmatch(r"smtps?://[^@/]+@[^@/]+", url):
        raise Stop(CONFIG, f"{file}: SUBMISSION_URL must be such as smtp://any:API-KEY@127.0.0.1:2525")
    if is_local(sender):
        raise Stop(CONFIG, f"{file}: MAIL_FROM must be an address: of mail from users of this machine")
    local_to = given.get("LOCAL_TO", "")
    if local_to and is_local(local_to):
        raise Stop(CONFIG, f"{file}: LOCAL_TO must be an address: it gets mail to users of this machine")
    return Config(url, name, sender, local_to, file)


def mail_of(data: bytes) -> Mail:
    """Reads a mail as programs write it: with lines that end as they like, and perhaps without a header."""
    if data.startswith(b"From "):  # of an mbox
        data = data.partition(b"\n")[2]
    data = re.sub(rb"\r*\n|\r", b"\r\n", data)
    if not data.endswith(b"\r\n"):
        data += b"\r\n"
    fields, at = [], 0
    while found := FIELD.match(data, at):
        fields.append((found[1], found[2]))
        at = found.end()
    return Mail(fields, data[at:].removeprefix(b"\r\n"))


def addressed(mail: Mail, asked: Asked, config: Config) -> tuple[str, list[str]]:
    """Returns sender and recipients of the envelope. Raises `Stop`."""
    resent = [b"resent-to", b"resent-cc", b"resent-bcc"]
    named = mail.values(*(resent if mail.values(*resent) else (b"to", b"cc", b"bcc"))) if asked.from_header else []
    recipients = [address for _, address in getaddresses([*asked.recipients, *named]) if address]
    if not recipients:
        raise Stop(USAGE_ERROR, "the mail must have a recipient: in its header, with -t, or on the command line")
    if not config.local_to and any(map(is_local, recipients)):
        raise Stop(NO_USER, f"{config.file}: LOCAL_TO must be set, for mail to users of this machine")
    recipients = [config.local_to if is_local(one) else one for one in recipients]
    sender = asked.sender
    if sender is None:
        sender = next((one for _, one in getaddresses(mail.values(b"from")) if not is_local(one)), "")
    elif sender in ("", "<>"):
        return "", list(dict.fromkeys(recipients))
    return (config.sender if is_local(sender) else sender.strip("<>")), list(dict.fromkeys(recipients))


def is_local(address: str) -> bool:
    """Returns whether it is a user of this machine; never of a name with a dot, which may be a domain of mail."""
    _, at, domain = address.strip("<>").lower().partition("@")
    return not at or domain in ("localhost", "localhost.localdomain", os.uname().nodename.lower().partition(".")[0])


def completed(mail: Mail, asked: Asked, config: Config) -> Mail:
    """Puts in a From with a whole address, the address for a local user, and a key by which a repeat is known."""
    fields = [(name, _qualified(name, value, config)) for name, value in mail.fields]
    written = ", ".join(mail.values(b"from"))
    if "@" not in written or all(one and is_local(one) for _, one in getaddresses([written])):
        fields = [field for field in fields if field[0].lower() != b"from"]
        name = asked.name or next(filter(None, parseaddr(written)), config.name)
        name = re.sub(r"[\x00-\x1f\x7f]", " ", name.encode(errors="surrogateescape").decode(errors="replace"))
        fields.insert(0, (b"From", f" {formataddr((name, config.sender))}\r\n".encode()))
    if not mail.values(IDEMPOTENCY_KEY):
        fields.insert(0, (IDEMPOTENCY_KEY.title(), b" " + os.urandom(16).hex().encode() + b"\r\n"))
    return Mail(fields, mail.body)


def _qualified(name: bytes, value: bytes, config: Config) -> bytes:
    """Gives a user of this machine, alone in To or Cc, a whole address: some relays refuse `To: root`."""
    found = USER.fullmatch(value) if config.local_to and name.lower() in (b"to", b"cc") else None
    return b" %b <%b>\r\n" % (found[1], config.local_to.encode()) if found else value


def encoded(mail: Mail) -> Mail:
    """Encodes a plain body that SMTP cannot carry: with long lines, as programs print them, or an octet 0."""
    if b"\0" not in mail.body and max(map(len, mail.body.split(b"\r\n"))) <= LONGEST_LINE:
        return mail
    given = {name.lower(): value.strip().lower() for name, value in mail.fields}
    is_plain = not given.get(b"content-type", b"text/plain").startswith((b"multipart/", b"message/"))
    if not is_plain or given.get(b"content-transfer-encoding", b"8bit") not in (b"7bit", b"8bit", b"binary"):
        return mail
    fields = [field for field in mail.fields if field[0].lower() != b"content-transfer-encoding"]
    if b"content-type" not in given:
        fields.append((b"Content-Type", b" text/plain; charset=utf-8\r\n"))
    fields.append((b"Content-Transfer-Encoding", b" base64\r\n"))
    return Mail(fields, base64.encodebytes(mail.body).replace(b"\n", b"\r\n"))


def hand_over(url: str, sender: str, recipients: list[str], octets: bytes) -> None:
    """Raises `Stop` unless the service has said that it is stored."""
    reason = ""
    for pause in PAUSES:
        time.sleep(pause)
        try:
            with connected(url) as client:
                return converse(client, sender, recipients, octets)
        except smtplib.SMTPAuthenticationError as error:
            raise refused("login", error.smtp_code, error.smtp_error) from None
        except smtplib.SMTPNotSupportedError:
            raise Stop(CONFIG, "SUBMISSION_URL must name a port where there is TLS and a login") from None
        except smtplib.SMTPException as error:  # an OSError, too
            reason = type(error).__name__
        except OSError as error:
            reason = error.strerror or type(error).__name__
    raise Stop(LATER, f"the service does not answer: {reason}")


def connected(url: str) -> smtplib.SMTP:
    parts = urlsplit(url)
    host, port = parts.hostname or "", parts.port
    options: dict[str, Any] = {"local_hostname": "localhost", "timeout": PATIENCE}  # else it asks the DNS for its name
    if parts.scheme == "smtps":
        context = ssl.create_default_context()
        client: smtplib.SMTP = smtplib.SMTP_SSL(host, port or 465, context=context, **options)
    else:
        client = smtplib.SMTP(host, port or 587, **options)
        if not re.fullmatch(r"localhost|127\..*|::1", host):
            client.starttls(context=ssl.create_default_context())
    client.login(unquote(parts.username or ""), unquote(parts.password or ""))
    return client


def converse(client: smtplib.SMTP, sender: str, recipients: list[str], octets: bytes) -> None:
    eight_bit = [] if octets.isascii() else ["BODY=8BITMIME"]
    wide = [] if all(map(str.isascii, [sender, *recipients])) else ["SMTPUTF8"]
    client.command_encoding = "utf-8"
    try:
        check("mail", *client.mail(sender, [*eight_bit, *wide]))
        for one in recipients:  # to all of them or to nobody: what is half sent cannot be repeated
            check("rcpt", *client.rcpt(one))
        check("data", *client.data(octets))
    except smtplib.SMTPDataError as error:
        raise refused("data", error.smtp_code, error.smtp_error) from None
    except ValueError:
        raise Stop(DATA, "no address may contain a line's end") from None


def check(phase: str, code: int, text: bytes) -> None:
    if code == 421:  # it ends the connection; another one may be taken
        raise smtplib.SMTPServerDisconnected
    if not 200 <= code < 300:
        raise refused(phase, code, text)


def refused(phase: str, code: int, text: bytes | str) -> Stop:
    """Returns what a reply means to the caller."""
    words = text.decode(errors="replace") if isinstance(text, bytes) else text
    if words.startswith("4.5.3"):  # too many recipients: it is no better later
        meaning = UNAVAILABLE
    elif code < 500:
        meaning = LATER
    elif code == 552:
        meaning = UNAVAILABLE
    elif phase == "rcpt":
        meaning = NO_USER
    else:
        meaning = NO_PERMISSION if code in (530, 534, 535, 538, 550) else DATA
    return Stop(meaning, f"{code} {words}")


def main() -> int:
    try:
        asked = asked_of(sys.argv[1:])
        config = config_of(asked.file)
        mail = mail_of(sys.stdin.buffer.read())
        sender, recipients = addressed(mail, asked, config)
        hand_over(config.url, sender, recipients, encoded(completed(mail, asked, config)).octets())
        return OK
    except Stop as stop:
        code, text = stop.code, str(stop)
    except Exception as error:  # whose text may be of the mail
        code, text = SOFTWARE, f"a fault of this program: {type(error).__name__}"
    print(f"sendmail: the mail is not sent: {text}", file=sys.stderr)
    syslog.openlog("sendmail", 0, syslog.LOG_MAIL)
    syslog.syslog(syslog.LOG_ERR, f"the mail is not sent: {text}")
    return code


if __name__ == "__main__":
    sys.exit(main())
