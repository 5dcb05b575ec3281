"""What a team writes first: a small mail, and one SMTP session for it.

Both peers call this. The TLS context is made once and the own name is not looked up in DNS, which is more than most
such code does.
"""

import os
import smtplib
import ssl
from email.message import EmailMessage
from email.utils import formatdate, make_msgid

TLS = ssl.create_default_context(cafile=os.environ.get("SMTP_CA_FILE"))
BODY = """Hello {name},

your account is ready. Nothing more is needed; this mail is your confirmation.

If you did not sign up, you can ignore it.
"""


def send(name: str, email: str) -> None:
    mail = EmailMessage()
    mail["Subject"] = f"Welcome, {name}"
    mail["From"] = os.environ["MAIL_FROM"]
    mail["To"] = email
    mail["Date"] = formatdate()
    mail["Message-ID"] = make_msgid(domain="example.com")
    mail.set_content(BODY.format(name=name))
    with smtplib.SMTP(os.environ["SMTP_HOST"], int(os.environ["SMTP_PORT"]), local_hostname="localhost") as relay:
        relay.starttls(context=TLS)
        relay.login(os.environ["SMTP_USERNAME"], os.environ["SMTP_PASSWORD"])
        relay.send_message(mail)
