"""One mail: what became of it, step by step, and what a person may do about it: `/mail/emails/<id>`.

Never shows a body or a file's name. Each action is a page that asks, and a POST to the same path that does it.
"""

from __future__ import annotations

import time
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from datetime import datetime
from typing import Any, NamedTuple

from flask import Response, abort, request

from mail.address import Mailbox
from mail.claim import timestamp
from mail.counters import number
from mail.message import Message
from mail.mime import head, to_mime
from mail.reader import NO_MAIL
from mail.states import FINAL, SCHEDULED, State, Status
from mail.store import mail_key
from mail.suppression import Entry
from ops.page import audit, timeline, webhooks
from ops.page.advice import advice, in_the_way
from ops.page.search import alike
from ops.page.view import View, go
from ops.page.words import masked, moment
from queues import keys
from queues.jobs import NotFound, NotPossible
from queues.overview import moment_of
from queues.quarantine import DAMAGED
from smtp.policy import Verdict

LARGEST = 64 * 1024  # bytes of a content, packed, of which the headers are shown; four times as many unpacked


class Action(NamedTuple):
    """What a person may do to a mail in one of `states`: the button, the question, and what is said about it."""

    name: str
    states: tuple[str, ...]
    button: str
    question: str
    text: str


TWICE = "The relay may have it, and then it arrives twice. The relay's log knows, by the Message-ID."
TOGETHER = (State.FAILED, State.UNKNOWN, State.DELAYED)  # of these, others may have met with the same
WAITING = (SCHEDULED, State.QUEUED.value, State.DELAYED.value)
ACTIONS = (
    Action(
        "arrived", (State.UNKNOWN,), "It arrived", "Did this mail arrive?",
        "Then it is noted as sent to those who are in doubt, and never sent to them again.",
    ),
    Action(
        "requeue", (State.UNKNOWN,), "It did not arrive: requeue it", "Requeue a mail that may have arrived?", TWICE,
    ),
    Action(
        "requeue", (State.FAILED,), "Requeue it", "Requeue this mail?",
        "It gets all its attempts again, and goes only to those recipients who are not known to have it.",
    ),
    Action(
        "requeue", (State.SUPPRESSED,), "Requeue it", "Requeue this mail?",
        "It goes to those of its recipients who are off the suppression list by then.",
    ),
    Action("move", (SCHEDULED,), "Move it", "Move this mail?", "It is not sent before its new time."),
    Action(
        "cancel", WAITING, "Cancel it", "Cancel this mail?",
        "Nothing more of it is sent, and its body is dropped at once. That cannot be undone.",
    ),
    Action(
        "cancel", (State.FAILED, State.UNKNOWN, State.SUPPRESSED), "Give it up", "Give this mail up?",
        "It cannot be sent again then, for its body is dropped at once.",
    ),
    Action(
        "copy", (*WAITING, State.SENDING, State.FAILED, State.UNKNOWN, State.SUPPRESSED), "Send a copy to me",
        "Send a copy of this mail?",
        "It goes to ALERT_TO alone, as a mail of its own, through the same relay.",
    ),
)  # fmt: skip


class Kept(NamedTuple):
    """What is kept of a mail besides what `GET /emails/{id}` shows. `content` is None where it is dropped or large."""

    outline: bytes
    settled_at: float
    has_content: bool
    content: bytes | None
    running: timeline.Step | None


def show(view: View, mail_id: str) -> Response:
    mail = view.outbox.read(mail_id)
    try:
        told = {**about(view, mail), **fates(mail)}
    except DAMAGED:
        raise NotFound(NO_MAIL) from None
    subject = mail["subject"] if view.settings.show_addresses else masked(mail["subject"])
    return view.render("email.html", subject or "(no subject)", mail=mail, **told)


def about(view: View, mail: Mapping[str, Any]) -> dict[str, Any]:
    """Returns what the page says besides the mail itself."""
    kept, state = look(view, mail["id"]), mail["status"]
    done, actions = audit.actions(view.redis, only=mail["id"]), possible(view, mail, kept.has_content)
    return {
        "kept": kept,
        "steps": timeline.steps(mail, kept.settled_at, kept.running, done),
        "last": mail["attempts"][-1] if mail["attempts"] else None,
        "sent_at": sent_at(mail, kept),
        "due": timestamp(mail["scheduled_at"] or mail["created_at"]),
        "overdue": 0 < timestamp(mail["next_attempt_at"] or "") <= time.time(),
        "trouble": state not in FINAL and view.outbox.relay_in_trouble(),
        "replied": in_the_way(mail) is not None,
        "advice": advice(mail),
        "alike": alike(mail["reason"], state) if mail["reason"] and state in TOGETHER else "",
        "actions": actions,
        "told": webhooks.of_mail(view.redis, mail["id"]),
        "alert_to": view.settings.alert_to,
        "final": state in FINAL,
        "listed": listed(view, mail),
        "headers": header_lines(view, mail, kept),
        "commands": commands(view, mail, actions),
    }


def fates(mail: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the recipients, and how many of them are served, refused, in doubt and suppressed."""
    statuses = [one["status"] for one in mail["recipients"]]
    names = {"served": Status.ACCEPTED, "refused": Status.REFUSED, "in_doubt": Status.IN_DOUBT}
    names |= {"suppressed": Status.SUPPRESSED, "bounced": Status.BOUNCED}
    return {"recipients": mail["recipients"], **{name: statuses.count(status) for name, status in names.items()}}


def listed(view: View, mail: Mapping[str, Any]) -> dict[str, Entry]:
    """Returns the entry in the suppression list of each recipient who was not served and is on it."""
    return view.outbox.suppressions.entries(
        [one["address"] for one in mail["recipients"] if one["status"] != Status.ACCEPTED]
    )


def sent_at(mail: Mapping[str, Any], kept: Kept) -> float:
    """Returns when the relay accepted the last of it, or a person said so, in seconds since 1970."""
    accepted = [one["at"] for one in mail["attempts"] if one["verdict"] in (Verdict.ACCEPTED, timeline.SETTLED)]
    return timestamp(accepted[-1]) if accepted else kept.settled_at


def look(view: View, mail_id: str) -> Kept:
    """Reads what is kept of a mail besides what `view.outbox.read` returns."""
    pipe, key = view.redis.pipeline(transaction=False), mail_key(mail_id)
    pipe.hmget(key, "outline", "settled_at")
    pipe.hstrlen(key, "content")
    pipe.hmget(keys.job(mail_id), "worker_name", "started_at")
    (outline, settled_at), size, job = pipe.execute(raise_on_error=False)
    worker, started = job if isinstance(job, list) else (None, None)
    running = None
    if worker and started:
        what = f"Claimed by worker {worker.decode(errors='replace')[:8]}, which has it in hand"
        running = timeline.Step(what, moment_of(started.decode(errors="replace")))
    packed: Any = view.redis.hget(key, "content") if 0 < size <= LARGEST else None
    return Kept(outline or b"", number(settled_at), size > 0, unpacked(packed) if packed else None, running)


def unpacked(packed: bytes) -> bytes | None:
    """Returns the content, or None if it cannot be read, or is larger than a page should read."""
    opened = zlib.decompressobj()
    try:
        text = opened.decompress(packed, 4 * LARGEST)
    except zlib.error:
        return None
    return text if opened.eof else None


def header_lines(view: View, mail: Mapping[str, Any], kept: Kept) -> str:
    """Returns the header lines as they are sent; without the mail's own and those of its body where the content is not
    read."""
    message = Message.from_json(kept.outline, kept.content or b"{}")
    if not view.settings.show_addresses:
        message = without_addresses(message)
    about = message, mail["message_id"], datetime.fromisoformat(mail["created_at"])
    shown = kept.content and (not message.raw or view.settings.show_addresses)  # one that came by SMTP is not rewritten
    return to_mime(*about).partition(b"\r\n\r\n")[0].decode(errors="replace") if shown else head(*about)


def without_addresses(message: Message) -> Message:
    def mask(boxes: list[Mailbox]) -> list[Mailbox]:
        return [Mailbox("", masked(box.address)) for box in boxes]

    return replace(
        message,
        sender=mask([message.sender])[0],
        to=mask(message.to),
        cc=mask(message.cc),
        bcc=mask(message.bcc),
        reply_to=mask(message.reply_to),
        subject=masked(message.subject),
        headers={name: masked(value) for name, value in message.headers.items()},
    )


def possible(view: View, mail: Mapping[str, Any], has_content: bool) -> list[Action]:
    """Returns what may be done to a mail as it is now."""
    expired = 0 < timestamp(mail["expires_at"] or "") <= time.time()
    no = {"requeue"} if expired else set()
    no |= {"copy"} if not has_content or not view.settings.alert_to else set()
    return [action for action in ACTIONS if mail["status"] in action.states and action.name not in no]


def commands(view: View, mail: Mapping[str, Any], actions: Sequence[Action]) -> list[tuple[str, str]]:
    """Returns what each of it is called, and the command that does it through the API, which knows not all of it."""
    api, mail_id, key = f"http://{view.settings.listen}", mail["id"], '-H "Authorization: Bearer $KEY"'
    body = """-H 'Content-Type: application/json' -d '{"scheduled_at": "in 2 hours"}'"""
    through = {
        "requeue": f"curl -X POST {api}/jobs/{mail_id}/requeue {key}",
        "move": f"curl -X PATCH {api}/emails/{mail_id} {key} {body}",
        "cancel": f"curl -X POST {api}/emails/{mail_id}/cancel {key}",
    }
    known = [(action.button, through[action.name]) for action in actions if action.name in through]
    return [("Read it", f"curl {api}/emails/{mail_id} {key}"), *known]


def ask(view: View, mail_id: str, action: str) -> Response:
    """Asks whether to do it, or says why it cannot be done."""
    mail, kept = view.outbox.read(mail_id), look(view, mail_id)
    if action not in DO:
        abort(404)
    for one in possible(view, mail, kept.has_content):
        if one.name == action == "move":
            return move_form(view, mail)
        if one.name == action:
            in_doubt = action == "requeue" and fates(mail)["in_doubt"]
            about = {"text": TWICE if in_doubt else one.text, "button": one.button, "back": f"/mail/emails/{mail_id}"}
            return view.confirm(one.question, **about, was=mail["status"])
    raise NotPossible(f"a mail that is {mail['status']} allows no such thing")


def act(view: View, mail_id: str, action: str) -> Response:
    """Does it, notes who did, and shows the mail."""
    if action not in DO:
        abort(404)
    if refused := DO[action](view, mail_id):
        return refused
    audit.note(view.redis, view.who, action, mail_id)
    return go(f"/mail/emails/{mail_id}?done={action}")


def copy(view: View, mail_id: str) -> None:
    if not view.settings.alert_to:
        raise NotPossible("ALERT_TO must be set: a copy goes there, and nowhere else")
    view.outbox.copy(mail_id, view.settings.alert_to)


def move_form(view: View, mail: Mapping[str, Any], status: int = 200, wrong: str = "") -> Response:
    about = {"back": f"/mail/emails/{mail['id']}", "wrong": wrong, "now": moment(mail["scheduled_at"])}
    return view.render("move.html", "Move this mail", status, mail=mail, **about)


def move(view: View, mail_id: str) -> Response | None:
    """Moves a scheduled mail to the time of the form, which is in the machine's time zone; or returns the form, and
    what is wrong with it."""
    # Here, as it comes with all that makes a mail.
    from mail.due import scheduled
    from mail.request import Invalid

    try:
        asked = scheduled(datetime.fromisoformat(request.form.get("when", "")).astimezone())
    except Invalid as error:
        return move_form(view, view.outbox.read(mail_id), 400, error.errors[0].message)
    except (ValueError, OverflowError):
        return move_form(view, view.outbox.read(mail_id), 400, "must be a day and a time, such as 2026-12-24T18:00")
    view.outbox.reschedule(mail_id, asked.timestamp())
    return None


DO: Mapping[str, Callable[[View, str], Response | None]] = {
    "arrived": lambda view, mail_id: view.outbox.arrived(mail_id),
    "requeue": lambda view, mail_id: view.outbox.requeue(mail_id, request.form.get("was") == State.UNKNOWN),
    "cancel": lambda view, mail_id: view.outbox.cancel(mail_id),
    "move": move,
    "copy": copy,
}


def gone(view: View, error: Exception) -> Response:
    """Answers 404, and says for how long mails are kept, and what else there is of this id."""
    mail_id = (request.view_args or {}).get("mail_id", "")
    try:
        job = mail_id and view.outbox.jobs.fetch(mail_id).id
    except NotFound:
        job = ""
    return view.render("gone.html", "There is no such mail", 404, job=job, why=str(error), settings=view.settings)


def refuse(view: View, error: Exception) -> Response:
    """Answers 409 with the reason for which something is not possible, any more or yet."""
    return view.render(
        "refused.html", "That is not possible", 409, why=str(error), back=request.path.rpartition("/")[0]
    )
