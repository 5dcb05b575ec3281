"""What a team writes: a small mail, and an SMTP session for it, or with KEEP_SESSION one that is kept for the next.

All peers in Python call `send`, but taskiq, which has an async one of its own. The TLS context is made once and the own
name is not looked up in DNS, which is more than most such code does. A session that turns out dead is opened anew and
its mail sent again, once; where only the last reply was lost, that mail goes out twice.
"""

import os
import smtplib
import ssl
import threading
from email.message import EmailMessage
from email.utils import formatdate, make_msgid

TLS = ssl.create_default_context(cafile=os.environ.get("SMTP_CA_FILE"))
KEPT = threading.local()  # its `relay` is the session of a thread, which is that of a process where it has one thread
BODY = """Hello {name},

your account is ready. Nothing more is needed; this mail is your confirmation.

If you did not sign up, you can ignore it.
"""


def message(name: str, email: str) -> EmailMessage:
    mail = EmailMessage()
    mail["Subject"] = f"Welcome, {name}"
    mail["From"] = os.environ["MAIL_FROM"]
    mail["To"] = email
    mail["Date"] = formatdate()
    mail["Message-ID"] = make_msgid(domain="example.com")
    mail.set_content(BODY.format(name=name))
    return mail


def send(name: str, email: str) -> None:
    mail = message(name, email)
    if os.environ.get("KEEP_SESSION"):
        send_in_kept_session(mail)
    else:
        with session() as relay:
            relay.send_message(mail)


def session() -> smtplib.SMTP:
    relay = smtplib.SMTP(os.environ["SMTP_HOST"], int(os.environ["SMTP_PORT"]), local_hostname="localhost")
    relay.starttls(context=TLS)
    relay.login(os.environ["SMTP_USERNAME"], os.environ["SMTP_PASSWORD"])
    return relay


def send_in_kept_session(mail: EmailMessage) -> None:
    if hasattr(KEPT, "relay"):
        try:
            KEPT.relay.send_message(mail)
            return
        except OSError as error:  # of which all of smtplib's are
            is_dead = KEPT.relay.sock is None or getattr(error, "smtp_code", 0) == 421  # smtplib closes what broke
            KEPT.relay.close()
            del KEPT.relay
            if not is_dead:
                raise
    KEPT.relay = session()
    KEPT.relay.send_message(mail)
