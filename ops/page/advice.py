"""What it means that a mail waits or has failed, and what to do: ops.checks.replies for a relay's reply, and a table
for what is no reply. Pure.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from mail.states import ALL_SUPPRESSED, EXPIRED, LOST, NOT_ADMITTED, UNSAYABLE, State
from ops.checks import replies
from process.relays import ONLY
from smtp.policy import Phase, Verdict
from smtp.published import Published
from smtp.verdict import Reply

# How a reply stands in a reason: smtp.verdict's Reply.summary, or `550 before` of a recipient.
REPLY = re.compile(rf"(?:(\d{{3}})|no reply) (?:at ({'|'.join(Phase)})\b|before)")
# A reason, or what stands there before a colon -> what it means, and what to do.
REASONS = {
    EXPIRED: (
        "its expires_at passed before the relay had taken it, so it was not sent any more",
        "submit it anew, if it is still of use",
    ),
    NOT_ADMITTED: (
        "this is a staging system, and the mail was accepted before that was set",
        "submit it anew, or change the setting and requeue it",
    ),
    ALL_SUPPRESSED: (
        "no mail goes to an address on the suppression list, since the relay refused it once, or somebody added it",
        "if the address is good again, take it off at /mail/suppressions, then requeue the mail",
    ),
    UNSAYABLE: (
        "it came by SMTP, and what is named there cannot be said to a relay of kind resend as it is",
        "put a relay of kind smtp into RELAYS too, then requeue it; or send it through the API",
    ),
    LOST["failed"]: (
        "its worker ended in each of four attempts; if other mail goes out, this mail itself may be why",
        "journalctl -u async-email-worker@email shows how they ended; then requeue it",
    ),
    LOST["stopped"]: ("somebody has stopped its job in RQ", "requeue it"),
    LOST["canceled"]: ("somebody has canceled its job in RQ", "requeue it"),
    LOST[""]: ("somebody has deleted its job in RQ, with rq empty for example", "requeue it"),
}


def advice(mail: Mapping[str, Any]) -> tuple[str, str] | None:
    """Returns what it means and what to do; None for a mail of which nothing needs to be said."""
    if known := because(mail["reason"] or ""):
        return known
    told = in_the_way(mail)
    if mail["status"] not in (State.FAILED, State.DELAYED) or not told or told[1].verdict is Verdict.IN_DOUBT:
        return None
    meaning, fix = replies.explain_at(*told)
    return meaning, fix.replace("GET /emails/ID has", "below are")


def because(reason: str) -> tuple[str, str] | None:
    """Returns what a reason means and what to do about it, where it is no reply of a relay."""
    return REASONS.get(reason.partition(":")[0])


def in_the_way(mail: Mapping[str, Any]) -> tuple[Published, Reply] | None:
    """Returns the relay and its reply that the mail's reason names first, with the words of that reply."""
    named = REPLY.search(mail["reason"] or "")
    attempts = [one for one in mail["attempts"] if "phase" in one]
    if not named or not attempts:
        return None
    code = int(named[1]) if named[1] else None
    heard = [one["text"] for one in (*attempts[::-1], *mail["recipients"]) if one["code"] == code]
    at = Published(attempts[-1].get("relay_name", ONLY), where=attempts[-1]["relay"])
    return at, Reply(Phase(named[2] or Phase.RCPT), code, heard[0] if heard else "")
