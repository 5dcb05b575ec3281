"""One reply of the relay, or its absence, and what it means for a mail; the meaning itself is smtp.policy's. Pure.

Nothing else in the project interprets an SMTP code.
Standards: RFC 5321 (SMTP), 3463 (enhanced codes), 2034 (where they stand), 1047 (doubt).
"""

from __future__ import annotations

import re
from typing import NamedTuple

from smtp.policy import (
    ASKED_TWICE,
    CHOSEN,
    MESSAGE,
    TOO_MANY,
    WITHOUT_RCPT,
    Phase,
    Verdict,
    names_no_address,
    row_for,
)

TIMED_OUT = "timed out"  # the text of a reply that did not come in time
LONGEST_HINT = 12 * 3600  # seconds; what a relay asks for beyond that is not believed
# "try again in 5 minutes", "retry after 300s", "come back in 00:04:59", "greylisted for 60 seconds". A time in what a
# relay says of its limits ("400 per 24 hours") is none of these.
HINT = re.compile(
    r"\b(?:again|retry|resend|back|wait|reset|greylisted|deferred|delayed|blocked|blacklisted)"
    r"(?:\s+(?:in|after|for|at|least|another|about))*\s+"
    r"(?:(\d{1,5}(?:\.\d+)?)\s*(seconds?|secs?|s|minutes?|mins?|m|hours?|hrs?|h)\b|(\d\d):(\d\d):(\d\d)\b)",
    re.IGNORECASE,
)


def judge(phase: Phase, code: int | None, text: str = "") -> Verdict:
    """Returns the verdict on a reply. `code` is None where none came."""
    return row_for(phase, code, text).verdict


class Reply(NamedTuple):
    """Holds what the relay said at the moment that decided. `text` may hold addresses: for the mail's record only."""

    phase: Phase
    code: int | None
    text: str
    repeated: bool = False  # several different mails in a row have met with it: it is about the account

    @property
    def verdict(self) -> Verdict:
        return Verdict.TROUBLE if self.repeated else judge(self.phase, self.code, self.text)

    @property
    def is_about_the_mail(self) -> bool:
        """Returns whether it puts off or refuses the mail as a whole, for no reason that is surely its own:
        address, size or form. At RCPT it would be about one recipient."""
        its_own = self.code in (413, 552) or re.match(r"[45]\.[136]\.", self.text)
        refused = self.verdict in (Verdict.TRY_AGAIN, Verdict.REFUSED)
        return self.phase in (*WITHOUT_RCPT, Phase.HTTP) and refused and not its_own

    @property
    def words(self) -> str:
        """Returns what is the same when another mail meets with it: no address, number or id."""
        return f"{self.code} {re.sub(r'[^ ]*[0-9@<>][^ ]*', '', self.text).lower()}"

    @property
    def is_no_address(self) -> bool:
        """Returns whether it refuses a recipient because there is no such address. Behind RCPT it may be about any of
        them."""
        about_one = self.phase in (Phase.RCPT, Phase.DATA, Phase.DOT) and self.verdict is Verdict.REFUSED
        return about_one and names_no_address(self.code, self.text)

    @property
    def is_too_many(self) -> bool:
        """Returns whether the recipient is one too many for this transaction, and may go in the next."""
        return row_for(self.phase, self.code, self.text).meaning == TOO_MANY

    @property
    def pause(self) -> int:
        """Returns for how many seconds a relay that puts us off asks to be left alone; 0 if it does not say."""
        hint = HINT.search(self.text) if self.verdict in (Verdict.TRY_AGAIN, Verdict.TROUBLE) else None
        if not hint:
            return 0
        number, unit, *clock = hint.groups()
        if unit:
            return min(LONGEST_HINT, int(float(number) * {"s": 1, "m": 60, "h": 3600}[unit[0].lower()]))
        hours, minutes, seconds = map(int, clock)
        return min(LONGEST_HINT, hours * 3600 + minutes * 60 + seconds)

    @property
    def may_have_been_taken(self) -> bool:
        """Returns whether an upstream may have the mail all the same: there was no answer, or one that somebody on the
        way may have given, after the request had arrived."""
        refused = self.code is not None and 400 <= self.code < 500 and self.code not in (408, 409, 425)
        return self.phase is Phase.HTTP and not refused and self.verdict is not Verdict.ACCEPTED

    @property
    def is_being_answered(self) -> bool:
        """Returns whether an upstream is at this mail now, since an earlier request."""
        return row_for(self.phase, self.code, self.text).meaning == ASKED_TWICE

    @property
    def is_against_pipelining(self) -> bool:
        """Returns whether it may be about several commands at once, which the relay has announced and does not take."""
        lost = self.code == 503 or re.search("pipelin|synchroni", CHOSEN.sub("", self.text), re.IGNORECASE)
        return self.phase in (Phase.MAIL, Phase.RCPT, Phase.DATA) and bool(self.code and lost)

    @property
    def refuses_what_follows(self) -> bool:
        """Returns whether a mail was refused at its dot because of the commands that came with that."""
        out_of_step = re.search("pipelin|synchroni", CHOSEN.sub("", self.text), re.IGNORECASE)
        return self.phase is Phase.DOT and (self.code or 0) >= 400 and bool(out_of_step)

    @property
    def is_silence(self) -> bool:
        """Returns whether the first command of a mail was not answered in time."""
        return self.phase is Phase.MAIL and self.code is None and self.text == TIMED_OUT

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
        """Returns code and phase without a word of the relay's: fit for logs and exception texts. While connecting,
        nothing of a mail is said, so the system's words are shown: `no reply at connect (Connection refused)`; as are
        ours where there is no token."""
        may_show = self.phase is Phase.CONNECT or (self.phase is Phase.AUTH and self.text.startswith("no token: "))
        why = f" ({self.text})" if may_show and self.text else ""
        return f"no reply at {self.phase.value}{why}" if self.code is None else f"{self.code} at {self.phase.value}"


class Outcome(NamedTuple):
    """Holds the reply that decided an attempt, and the one that decided about each recipient."""

    reply: Reply
    recipients: dict[str, Reply]

    def repeated(self) -> Outcome:
        """Returns the same outcome, met with by several different mails in a row."""
        reply = self.reply._replace(repeated=True)
        return Outcome(reply, {who: reply if one is self.reply else one for who, one in self.recipients.items()})
