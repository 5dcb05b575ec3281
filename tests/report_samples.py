"""Reports in the shapes of those who write them (tests/reports/), and what looks like one and is none, or is forged."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

SHAPES = {file.stem: file.read_text() for file in sorted((Path(__file__).parent / "reports").glob("*.eml"))}
BOUNCES = "bounces@acme.example"
STATUS_PART = "Content-Type: message/delivery-status"
AUTOREPLIES = {  # each comes to the return path, which is right, and quotes the mail
    "vacation": "Auto-Submitted: auto-replied\nSubject: Out of office\n\nI am away. 550 5.1.1 is my extension.",
    "vacation, old": "Precedence: junk\nX-Autoreply: yes\nSubject: Automatic reply\n\nUser unknown.",
    "challenge": "Subject: Please confirm your message\n\nadA@example.com: your mail is held until you click.",
    "ticket": "Auto-Submitted: auto-generated\nX-Failed: no\nSubject: [#550 5.1.1] Ticket opened\n\nThank you.",
    "reply by hand": "Subject: Re: Your invoice\nIn-Reply-To: MESSAGE_ID\n\n550 5.1.1 user unknown, ha ha.",
    "html": "Content-Type: text/html\nSubject: Undelivered Mail Returned to Sender\n\n<p>Action: failed</p>",
    "fields in text": "Subject: failure\n\nFinal-Recipient: rfc822; ada@example.com\nAction: failed\nStatus: 5.1.1",
    "a delay, by Exim": "From: Mail Delivery System <Mailer-Daemon@x.example>\nSubject: delayed 24 hours\n\nNo action.",
    "qmail's words, by hand": "From: Eve <eve@x.example>\n\nHi. This is the qmail.\n\n<ada@example.com>:\nno",
    "Exim's field, by hand": "From: Eve <eve@x.example>\nX-Failed-Recipients: ada@example.com\n\nada@example.com\n 550",
    "qmail without a paragraph": "From: MAILER-DAEMON@x.example\n\nHi. This is the qmail-send program at x.\nSorry.\n",
    "calendar": "Content-Type: multipart/alternative; boundary=x\n\n--x\nContent-Type: text/calendar\n\n--x--",
    "nothing": "\n\n",
    "no end": "Content-Type: multipart/report; report-type=delivery-status; boundary=x\n\n--x",
    "no boundary": f"Content-Type: multipart/report; report-type=delivery-status\n\n--\n{STATUS_PART}\n\nAction: x",
}
MDN = """Content-Type: multipart/report; report-type=disposition-notification; boundary=x

--x
Content-Type: message/disposition-notification

Final-Recipient: rfc822;ada@example.com
Original-Message-ID: MESSAGE_ID
Disposition: automatic-action/MDN-sent-automatically; failed
Action: failed

--x--
"""


def filled(shape: str, message_id: str, return_path: str, to: str = "ada@example.com") -> bytes:
    named = shape.replace("MESSAGE_ID", message_id).replace("RETURN_PATH", return_path)
    return named.replace("ada@example.com", to).replace("\n", "\r\n").encode()


def as_none() -> Iterator[tuple[str, str]]:
    """Yields what is no report, whoever writes it: a name and a shape."""
    yield "read receipt", MDN
    for name, text in AUTOREPLIES.items():
        yield name, f"To: RETURN_PATH\n{text}\n\n> MESSAGE_ID"
    for name, shape in SHAPES.items():
        quoted = f"Content-Type: message/rfc822\n\n{shape}"
        yield (
            f"{name}, forwarded",
            f"To: RETURN_PATH\nContent-Type: multipart/mixed; boundary=out\n\n--out\n{quoted}\n--out--",
        )
        yield f"{name}, quoted", "To: RETURN_PATH\nSubject: Fwd\n\n" + re.sub("^", "> ", shape, flags=re.MULTILINE)
        if re.search("multipart/report", shape, re.IGNORECASE):
            for kind in ("mixed", "alternative"):
                yield f"{name}, {kind}", re.sub("multipart/report", f"multipart/{kind}", shape, flags=re.IGNORECASE)
            cut = re.search("Content-Type: message/(global-)?(delivery-status|feedback-report)", shape, re.IGNORECASE)
            assert cut
            yield f"{name}, cut", shape[: cut.start()]
        for action in ("delayed", "relayed", "delivered", "expanded", ""):
            if "Action: failed" in shape:
                yield f"{name}, {action or 'no action'}", shape.replace("Action: failed", f"Action: {action}")
        for kind in ("not-spam", "auth-failure", "other", "dmarc"):
            if "Feedback-Type: abuse" in shape:
                yield f"{name}, {kind}", shape.replace("Feedback-Type: abuse", f"Feedback-Type: {kind}")
    yield "good status", SHAPES["postfix"].replace("Status: 5.1.1", "Status: 2.0.0")
