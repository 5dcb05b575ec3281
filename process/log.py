"""Logs one line per event, with names from a closed list.

LOG_FORMAT=plain writes `time LEVEL name key=value ...`. LOG_FORMAT=json writes one object per line: `time` (ISO 8601,
UTC), `level`, and then `event` with its fields, or, for a warning of RQ or Waitress, `logger` and `message`.

In systemd's journal each line also has its priority: `journalctl -p warning`.

No address, subject, body or secret is ever a value. RQ's and Waitress's own lines below WARNING appear in DEBUG only.
"""

from __future__ import annotations

import json
import logging
import sys
import traceback
from datetime import datetime, timezone
from pathlib import Path

from process.sd_daemon import prioritized

# fmt: off
EVENTS = frozenset({
    "api_started", "worker_started", "dashboard_started", "submission_started", "webhooks_started",
    # an HTTP request was answered: method, route, status, ms, name of the key, old_key (a newer one has its name), id,
    # request_id; of a refusal also the error's name, the field, and the reason of a 503
    "request",
    # a mail came by SMTP, or was refused, whole or at `phase`: status, reason, ms, bytes, key, id, replayed
    "submission",
    "crashed",  # a fault of ours in a request or a duty of the worker pool: where, and never what
    "few_descriptors",  # a process may open so few files that it takes only `connections`
    "stuck",  # a process of the API made no progress and was killed: process
    # the result of an attempt, or a mail expired: id, reason, next_in, test
    "sent", "delayed", "failed", "unknown", "suppressed",
    "task_finished", "task_failed",  # the result of a job of POST /jobs: id, task, error
    "cron_queued",  # the time of a task with `cron` has come: id of its job, task, due
    "nothing_to_do",  # a job for a mail that is sent, canceled, given up or gone already
    "busy",  # a job for a mail that another attempt holds
    "early",  # a job for a mail that was moved to a later time just as it was due: id, next_in
    "breaker_opened", "breaker_closed",  # all mail waits for the relay, or `relay` of several: reason; it flows again
    "bounced", "complained",  # a report has come about a mail that was sent: id, reason
    "mailbox_unreachable",  # a mailbox cannot be read: at (the setting that names it), reason
    "repaired", "given_up",  # what the sweep did with a mail that was stuck: id, reason
    "redis_unavailable", "redis_back",  # this process cannot use Redis, because of `reason`; it can again: at
    "alert_sent", "alert_failed",  # people were told something; they could not be: to, kind, status, reason, next_in
    # an event was posted to the endpoint `to`; it will be again; it was too often: kind, id of the mail, status, reason
    "webhook_delivered", "webhook_failed", "webhook_given_up",
    "operator",  # somebody has done something on the dashboard: who, what, id of the mail or job
    # a wrong login at the dashboard, or at=submission; once there were ten, at most one every ten seconds is looked at
    "login_refused",
    "unreadable",  # a job or an entry of a registry that was set aside, so that the others go on: id, reason
})
# fmt: on

_log = logging.getLogger("async-email")


class Event:
    """The message of a `logging` record: an event and its fields."""

    def __init__(self, name: str, fields: dict[str, object]) -> None:
        self.name = name
        self.fields = {name: _number_or_text(value) for name, value in fields.items() if value not in (None, "")}

    def __str__(self) -> str:
        texts = {name: str(value) for name, value in self.fields.items()}
        words = (f'{name}="{text}"' if " " in text else f"{name}={text}" for name, text in texts.items())
        return " ".join([self.name, *words])


class JsonFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        moment = datetime.fromtimestamp(record.created, timezone.utc).isoformat(timespec="milliseconds")
        line: dict[str, object] = {"time": moment, "level": record.levelname}
        if isinstance(record.msg, Event):
            line |= {"event": record.msg.name} | record.msg.fields
        else:
            line |= {"logger": record.name, "message": record.getMessage()}
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line)


class JournalFormatter(logging.Formatter):
    """Formats as another does, and adds what the journal wants."""

    def __init__(self, inner: logging.Formatter) -> None:
        super().__init__()
        self.inner = inner

    def format(self, record: logging.LogRecord) -> str:
        return prioritized(self.inner.format(record), record.levelno)


def set_up(level: str, form: str = "plain") -> None:
    # No line shows source, thread or process, and finding them takes longer than writing the line.
    logging._srcfile = None
    logging.logThreads = logging.logProcesses = logging.logMultiprocessing = False
    handler = logging.StreamHandler(sys.stdout)
    if level != "DEBUG":
        handler.addFilter(_ours_or_a_warning)  # on the handler, since RQ sets the levels of its loggers itself
        logging.getLogger("rq.worker").setLevel(logging.WARNING)  # where it does not, it need not make the lines
    plain = logging.Formatter("%(asctime)s %(levelname)s %(message)s")
    handler.setFormatter(JournalFormatter(JsonFormatter() if form == "json" else plain))
    logging.basicConfig(handlers=[handler], level=level)


def say_why_not(reason: object) -> None:
    """Writes to standard error why a process does not start, before it has a log."""
    print(prioritized(str(reason), logging.ERROR), file=sys.stderr)


def _ours_or_a_warning(record: logging.LogRecord) -> bool:
    return record.name == _log.name or record.levelno >= logging.WARNING


def emit(event: str, level: int = logging.INFO, **fields: object) -> None:
    """Logs one event; fields that are None or empty are left out."""
    if event not in EVENTS:
        raise ValueError(f"{event} is not in EVENTS")
    if _log.isEnabledFor(level):
        _log.log(level, Event(event, fields))


def where(error: BaseException) -> str:
    """Returns an exception's type and the lines it passed, without its text, which may quote a request or a job."""
    frames = traceback.extract_tb(error.__traceback__)
    shown = [frame for frame in frames if "site-packages" not in frame.filename] + frames[-1:]
    return " ".join([type(error).__name__, *(f"{Path(frame.filename).name}:{frame.lineno}" for frame in shown[-8:])])


def _number_or_text(value: object) -> object:
    """Returns a number, a float with one digit after its point, and anything else as text."""
    if isinstance(value, float):
        return round(value, 1)
    return value if isinstance(value, (bool, int, str)) else str(value)
