"""The one judgement of what a relay's reply means. Pure.

`judge` turns phase + reply into a verdict, and nothing else in the project interprets an SMTP code:

  accepted   the relay has taken responsibility (250 after the final dot)
  try again  this mail was put off (4xx); it has cost an attempt
  refused    this mail or recipient is refused permanently (5xx)
  in doubt   the body went out whole and no answer came: it may have been accepted (RFC 1047)
  trouble    the relay, the login or our use of it: no mail can be blamed, so none loses an attempt

Standards: RFC 5321 (SMTP), 3463 (enhanced codes), 2034 (where they stand), 1047 (doubt).
"""

from __future__ import annotations

import re
from enum import Enum
from typing import NamedTuple


class Verdict(str, Enum):
    ACCEPTED = "accepted"
    TRY_AGAIN = "try again"
    REFUSED = "refused"
    IN_DOUBT = "in doubt"
    TROUBLE = "trouble"


class Phase(str, Enum):
    """Names where in the conversation a reply came, or did not."""

    CONNECT = "connect"  # DNS, TCP and implicit TLS
    GREETING = "greeting"
    HELLO = "hello"
    STARTTLS = "starttls"
    AUTH = "auth"
    MAIL = "mail"
    RCPT = "rcpt"
    DATA = "data"  # the command; 354 invites the body
    TRANSFER = "transfer"  # the body is going out; without its final dot the relay must drop it (RFC 5321 4.1.1.4)
    DOT = "dot"  # the final dot is out


LONGEST_HINT = 12 * 3600  # seconds; what a relay asks for beyond that is not believed
HINT = re.compile(  # "try again in 5 minutes", "retry after 300 seconds", "please come back in 00:04:59"
    r"\b(?:in|after|wait|for)\s+(?:(\d{1,5})\s*(seconds?|secs?|s|minutes?|mins?|m|hours?|h)\b|(\d\d):(\d\d):(\d\d)\b)",
    re.IGNORECASE,
)
SESSION = (Phase.CONNECT, Phase.GREETING, Phase.HELLO, Phase.STARTTLS, Phase.AUTH)
MESSAGE = (Phase.MAIL, Phase.RCPT, Phase.DATA, Phase.TRANSFER, Phase.DOT)
# The first row that matches decides: phases, code (none: no reply came), how the text begins, verdict. Only the text's
# beginning is the relay's own (RFC 2034); further on it may repeat an address, which anybody may have chosen.
JUDGEMENT: tuple[tuple[tuple[Phase, ...], str, str, Verdict], ...] = (
    # No reply to the final dot: nobody knows. Before it nothing was handed over, so it is trouble, by the last row.
    ((Phase.DOT,), "none", "", Verdict.IN_DOUBT),
    # Cut off in the middle of the body: the mail itself may be what the relay cannot take, so it costs an attempt.
    ((Phase.TRANSFER,), "none", "", Verdict.TRY_AGAIN),
    # Good replies. Another 2xx to STARTTLS or AUTH has neither encrypted nor logged in.
    ((Phase.STARTTLS,), "220", "", Verdict.ACCEPTED),
    ((Phase.AUTH,), "235", "", Verdict.ACCEPTED),
    ((Phase.DATA,), "354", "", Verdict.ACCEPTED),
    ((Phase.GREETING, Phase.HELLO, Phase.MAIL, Phase.RCPT, Phase.DOT), "2..", "", Verdict.ACCEPTED),
    # A session that does not come about is never a mail's fault: 421 and 554 greetings, 454 and 535 to AUTH.
    (SESSION, ".*", "", Verdict.TROUBLE),
    # The relay wants STARTTLS or a login first (RFC 3207, 4954): our settings.
    (MESSAGE, "530|534|535|538", "", Verdict.TROUBLE),
    # Throttles. 454: SES "Maximum sending rate exceeded", "Daily message quota exceeded". 432 4.3.2: Microsoft 365,
    # too many connections. 550 5.4.5: Gmail's rolling daily quota. 550 5.2.251-255: Microsoft 365, sender throttled;
    # its 554 5.2.252 is another matter, a sender that this login may not use.
    (MESSAGE, "454|432", "", Verdict.TROUBLE),
    (MESSAGE, "550", r"5\.4\.5(?!\S)|5\.2\.25[1-5](?!\S)", Verdict.TROUBLE),
    # Microsoft 365 has ended basic authentication for this account.
    (MESSAGE, "550", r"5\.7\.30(?!\S)", Verdict.TROUBLE),
    # "Too many recipients" in its old form (RFC 5321 4.5.3.1.10): those refused get their turn in the next attempt.
    ((Phase.RCPT,), "552", "", Verdict.TRY_AGAIN),
    # 503 says that the two sides lost step, not that the mail is bad.
    (MESSAGE, "503", "", Verdict.TRY_AGAIN),
    (MESSAGE, "4..", "", Verdict.TRY_AGAIN),
    (MESSAGE, "5..", "", Verdict.REFUSED),
    # What is left answers something else (a 250 to DATA) or is not SMTP (1xx, -1). After the dot it tells us nothing.
    ((Phase.DOT,), ".*", "", Verdict.IN_DOUBT),
    (MESSAGE, ".*", "", Verdict.TROUBLE),
)


def judge(phase: Phase, code: int | None, text: str = "") -> Verdict:
    """Returns the verdict on a reply. `code` is None where none came."""
    written = "none" if code is None else str(code)
    rows = (row for row in JUDGEMENT if phase in row[0])
    return next(verdict for _, codes, words, verdict in rows if re.fullmatch(codes, written) and re.match(words, text))


class Reply(NamedTuple):
    """Holds what the relay said at the moment that decided. `text` may hold addresses: for the mail's record only."""

    phase: Phase
    code: int | None
    text: str

    @property
    def verdict(self) -> Verdict:
        return judge(self.phase, self.code, self.text)

    @property
    def pause(self) -> int:
        """Returns for how many seconds a relay that puts us off asks to be left alone; 0 if it does not say."""
        hint = HINT.search(self.text) if self.verdict in (Verdict.TRY_AGAIN, Verdict.TROUBLE) else None
        if not hint:
            return 0
        number, unit, *clock = hint.groups()
        if unit:
            return min(LONGEST_HINT, int(number) * {"s": 1, "m": 60, "h": 3600}[unit[0].lower()])
        hours, minutes, seconds = map(int, clock)
        return min(LONGEST_HINT, hours * 3600 + minutes * 60 + seconds)

    @property
    def leaves_the_session(self) -> bool:
        """Returns whether the relay may be given another mail after it, at once."""
        return self.code not in (421, 503) and self.verdict not in (Verdict.TROUBLE, Verdict.IN_DOUBT)

    @property
    def is_the_sessions_end(self) -> bool:
        """Returns whether the mail did not get to its final dot because there was no session any more."""
        return self.phase in MESSAGE[:-1] and self.code in (None, 421)

    @property
    def summary(self) -> str:
        """Returns code and phase without a word of the relay's: fit for logs and exception texts."""
        return f"no reply at {self.phase.value}" if self.code is None else f"{self.code} at {self.phase.value}"


class Outcome(NamedTuple):
    """Holds the reply that decided an attempt, and the one that decided about each recipient."""

    reply: Reply
    recipients: dict[str, Reply]
