"""What comes back: a report is matched to a mail of ours, and what it says is written down, once.

A bounce or a complaint is believed if it names the mail by its return path, which only who has had the mail can know
(mail.verp), or by a Message-ID of ours, 74 bits of which are random; and the recipient by an address to which we have
sent that mail. Anything else changes nothing. A mail that is being sent at this moment may be reported on, too: `later`
asks for the same report again.

The mail becomes `bounced` or `complained`, its recipient too, and the report stands in its history. A mail that has
failed for other recipients stays failed, so that it can be queued again for these; so does one in doubt about them.

Of a mail to one recipient alone, the address goes on the suppression list: at a complaint, or a bounce that says that
there is no such address. Whoever has had a mail to several could report on the others.
"""

from __future__ import annotations

import json
import re
import time
from contextlib import suppress
from dataclasses import replace
from typing import Any, NamedTuple

from mail import reports
from mail.claim import Recipient, attempts_to_json, iso, recipients_from_json, recipients_to_json
from mail.outbox import Outbox
from mail.reader import MAIL_ID
from mail.reports import BOUNCE, Failed, Report
from mail.states import EVENTS, RETURNED, SERVED, State, Status
from mail.store import mail_key
from mail.verp import mails_in
from process.log import emit
from queues.connection import translating_errors
from queues.jobs import NotFound, NotPossible
from queues.quarantine import DAMAGED
from smtp.policy import names_no_address

OF_KIND = {reports.BOUNCE: State.BOUNCED, reports.COMPLAINT: State.COMPLAINED}
# KEYS: mail. ARGV: mail id, the state, attempts and recipients that were read, the new ones, the new state ("": the
# mail's own), the reason, the event that webhooks are told; then what goes on the suppression list. Returns whether it
# is written: by this call, or by one whose reply was lost.
NOTE_REPORT = """
local state, attempts, recipients = unpack(redis.call('HMGET', KEYS[1], 'state', 'attempts', 'recipients'))
if attempts == ARGV[5] then return 1 end
if state ~= ARGV[2] or (attempts or '') ~= ARGV[3] or recipients ~= ARGV[4] then return 0 end
local fields = {'attempts', ARGV[5], 'recipients', ARGV[6]}
if ARGV[7] == '' then
  redis.call('HSET', KEYS[1], unpack(fields))
else
  become(ARGV[1], ARGV[7], nil, nil, {'reason', ARGV[8], unpack(fields)})
end
if ARGV[7] == '' or ARGV[7] == state then announce(ARGV[1], ARGV[9], ARGV[8]) end  -- which a change of state does
for at = 10, #ARGV, 2 do suppress(ARGV[at], ARGV[at + 1]) end
return 1
"""


class Found(NamedTuple):
    """What a report has led to. `noted` is how many recipients it is news about; `why` says why there are none."""

    kind: str = ""
    mail_id: str = ""
    noted: int = 0
    why: str = ""
    later: bool = False


class Bounces:
    def __init__(self, outbox: Outbox) -> None:
        self.outbox = outbox

    def take(self, data: bytes) -> Found:
        """Reads a report and writes down what it says. Raises `Unavailable`."""
        report = reports.read(data)
        if not report:
            return Found(why="it is no report of a bounce or a complaint")
        mail_id, proven = self._mail_of(report)
        if not mail_id:
            return Found(report.kind, why="it names no mail of this service")
        replication = self.outbox.jobs.replication
        at = replication.at
        for _ in range(5):
            found = self._note(mail_id, report, proven)
            if found and not found.noted:  # who sent it may not send it again, and the next primary may know the mail
                with translating_errors():
                    replication.confirm(at)
            if found:
                return found
        return Found(report.kind, mail_id, why="the mail is changing at this moment", later=True)

    def _mail_of(self, report: Report) -> tuple[str, bool]:
        """Returns the id of the mail that a report is about, and whether its return path shows it. One with a forged
        return path is about none, whatever else it says."""
        bounces = self.outbox.settings.bounce_address
        if bounces and (named := mails_in(report.envelopes, bounces, self.outbox.index.proof)):
            return (named[0], True) if "" not in named and len(named) == 1 else ("", False)
        in_message_id = re.match(rf"<({MAIL_ID.pattern})@", report.message_id)
        return (in_message_id[1] if in_message_id else ""), False

    def _note(self, mail_id: str, report: Report, proven: bool) -> Found | None:
        """Writes a report down; None if the mail has changed meanwhile."""
        with translating_errors():
            names = ("state", "attempts", "recipients", "message_id", "test")
            stored: Any = self.outbox.jobs.redis.hmget(mail_key(mail_id), names)
        state, attempts, recipients, message_id, test = ((one or b"").decode(errors="replace") for one in stored)
        found = Found(report.kind, mail_id)
        if not (proven or report.message_id == message_id) or test or not state:
            return found._replace(mail_id="", why="it names no mail of this service that is still kept")
        if state == State.SENDING:
            return found._replace(why="the mail is being sent; its outcome is not known yet", later=True)
        if state == State.UNKNOWN and _is_about_doubt(recipients, report, proven):
            return self._resolved(found, report)
        if state not in (State.SENT, State.FAILED, State.UNKNOWN, *RETURNED):
            return found._replace(mail_id="", why="it names a mail that was not sent")
        try:
            change = changed(recipients_from_json(recipients), report, proven)
            history = [*json.loads(attempts or "[]"), *change.history]
        except DAMAGED:
            return found._replace(mail_id="", why="it names a mail that cannot be read")
        if not change.history:
            return found._replace(why=change.why, mail_id=mail_id if change.known else "")
        becomes = "" if state in (State.FAILED, State.UNKNOWN) else OF_KIND[report.kind].value
        args: list[Any] = [mail_id, state, attempts, recipients, attempts_to_json(history)]
        args += [recipients_to_json(change.recipients), becomes, change.reason, EVENTS[OF_KIND[report.kind]]]
        args += self._suppressed(mail_id, report.kind, change)
        with translating_errors():
            if not self.outbox.store.confirmed(NOTE_REPORT, [mail_key(mail_id)], args):
                return None
        emit(OF_KIND[report.kind], id=mail_id, reason=change.reason)
        return found._replace(noted=len(change.history))

    def _suppressed(self, mail_id: str, kind: str, change: Change) -> list[bytes]:
        """Returns what a report adds to the suppression list, as scripts take it."""
        suppressions, [one, *others] = self.outbox.suppressions, change.recipients
        hopeless = kind == reports.COMPLAINT or names_no_address(one.code, one.text)
        if others or not hopeless or one.address == suppressions.redirect_to:
            return []
        return suppressions.words(one.address, kind, mail_id, change.reason)

    def _resolved(self, found: Found, report: Report) -> Found | None:
        """Settles a mail in doubt about which a report has come: the relay has taken it. Then the report is noted."""
        try:
            self.outbox.arrived(found.mail_id, f"a {report.kind} came back")
        except (NotFound, NotPossible) as error:
            return found._replace(why=str(error), later=True)
        return None


def _is_about_doubt(recipients: str, report: Report, proven: bool) -> bool:
    """Returns whether a report names somebody in doubt. One who was served before says nothing of the others."""
    taken = {Status.IN_DOUBT: Status.ACCEPTED}
    with suppress(*DAMAGED):
        were = [replace(one, status=taken.get(one.status, Status.PENDING)) for one in recipients_from_json(recipients)]
        return bool(changed(were, report, proven).history)
    return False


class Change(NamedTuple):
    """What a report changes: the recipients as they are then, and what their mail's history gains. `known` if it is
    about recipients of whom the same is known already."""

    recipients: list[Recipient]
    history: list[dict[str, Any]]
    reason: str = ""
    known: bool = False
    why: str = ""


def changed(recipients: list[Recipient], report: Report, proven: bool) -> Change:
    """Returns what a report says of a mail's recipients. Of those served alone, and never the same twice."""
    status, known = Status(OF_KIND[report.kind].value), False
    history: list[dict[str, Any]] = []
    reason = ""
    for failed in report.recipients:
        one = _meant(recipients, failed, proven)
        if not one or one.status not in SERVED:
            continue
        if one.status == status or (status == Status.BOUNCED and one.status == Status.COMPLAINED):
            known = True
            continue
        said = failed.text if failed.text.startswith(failed.status) else f"{failed.status} {failed.text}".strip()
        code = failed.code or (550 if failed.status.startswith("5.") else None)
        one.status, one.code, one.text = status, code, said
        history.append({"at": iso(time.time()), "relay": report.by, "code": code, "text": said})
        history[-1] |= {"verdict": status.value, "to": one.address}
        reason = reason or reason_of(report.kind, failed)
    why = "it is known already" if known else "it names nobody to whom this mail went"
    return Change(recipients, history, reason, known, "" if history else why)


def reason_of(kind: str, failed: Failed) -> str:
    """Returns why, without a word that a stranger wrote: `bounced: 550 5.1.1`, `complaint: abuse`."""
    words = [str(failed.code or ""), failed.status]
    return f"{'bounced' if kind == BOUNCE else kind}: {' '.join(filter(None, words)) or 'no code'}"


def _meant(recipients: list[Recipient], failed: Failed, proven: bool) -> Recipient | None:
    """Returns the recipient of ours who is meant. A mail to one alone, by its return path, is about that one, wherever
    it was forwarded; so is a complaint from which the address was taken out."""
    by_address = {one.address.lower(): one for one in recipients}
    for address in failed.addresses:
        if found := by_address.get(address.lower()):
            return found
    return recipients[0] if len(recipients) == 1 and (proven or not failed.addresses) else None
