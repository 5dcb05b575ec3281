"""The relay, workers, queues, timed tasks and Redis: `/mail/system`; and what pauses, resumes and closes."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from itertools import groupby
from typing import Any, NamedTuple

from flask import Response, abort

from ops.checks import replies
from ops.checks.store import program
from ops.page import audit
from ops.page.view import View, go
from queues import overview
from queues.connection import Redis, ResponseError, translating_errors, weaknesses
from queues.cron import Timing, timetable
from queues.health import queue_states
from queues.quarantine import DAMAGED
from queues.table import EMAIL, QUEUES
from smtp.pacing import Pacing, standing, used
from smtp.relay import Relay
from smtp.tally import sessions

PATH = "/mail/system"


class Action(NamedTuple):
    """What a button of the page does, once the question has been answered; `done` is a key of view.DONE."""

    question: str
    text: str
    button: str
    done: str
    do: Callable[[Redis], None]


ACTIONS = {
    "pause": Action(
        "Pause all workers?",
        "No worker of any queue will take another mail or job; what is in hand is finished. Nothing is lost: the API "
        "accepts mail as before, and it waits until you resume. It is RQ's own `rq suspend`.",
        "Pause all workers",
        "paused",
        overview.pause,
    ),
    "resume": Action(
        "Resume all workers?",
        "Workers of all queues take mails and jobs again, those that have waited first.",
        "Resume all workers",
        "resumed",
        overview.resume,
    ),
    "close-breaker": Action(
        "Close the breaker now?",
        "All mail waits because the relay was in trouble. The breaker closes by itself within a minute after the cause "
        "is gone; close it by hand where the relay asked for a long pause and you know better. It opens again after "
        "three troubles in a row. No mail loses an attempt by it.",
        "Close it now",
        "breaker_closed",
        lambda redis: Pacing(redis, ()).close(),
    ),
}


def show(view: View) -> Response:
    info: dict[str, Any] = {}
    with suppress(ResponseError):  # INFO may be forbidden
        info = view.redis.info()
    return view.render(
        "system.html",
        "Relay and workers",
        relay=relay(view),
        breaker=breaker(view),
        sessions=sessions(view.redis),
        rates=used(view.redis, view.settings.smtp_rate),
        last_sent=view.outbox.last_sent(),
        staging=view.settings.staging,
        paused=overview.is_paused(view.redis),
        processes=list(processes(view.redis)),
        queues=queue_states(view.outbox.jobs),
        email=EMAIL,
        tasks=tasks(view.redis),
        info=info,
        program=program(info) if info else "",
        weaknesses=[sentence for _, sentence in weaknesses(info)] if info else [],
    )


def ask(view: View, act: str) -> Response:
    action = ACTIONS.get(act) or abort(404)
    return view.confirm(action.question, text=action.text, button=action.button, back=PATH)


def do(view: View, act: str) -> Response:
    action = ACTIONS.get(act) or abort(404)
    with translating_errors():
        action.do(view.redis)
    audit.note(view.redis, view.who, act, "")
    return go(f"{PATH}?done={action.done}")


def relay(view: View) -> str:
    if not view.settings.smtp_host:
        return ""
    how = {"tls": "TLS from the beginning", "starttls": "TLS by STARTTLS", "none": "no TLS"}
    return f"{view.settings.smtp_host}:{view.settings.smtp_port}, {how[view.settings.smtp_security]}"


def breaker(view: View) -> dict[str, Any] | None:
    """Returns how the relay stands while there is trouble, and what its last reply means and fixes."""
    now = standing(view.redis)
    if not now:
        return None
    meaning, fix = replies.explain(view.settings.smtp_host or "", now.reply) if now.reply else ("", "")
    current = str(Relay.of(view.settings))
    if view.settings.smtp_host and now.relay not in ("", current):
        meaning, fix = f"that was {now.relay}, and SMTP_HOST and SMTP_PORT name another now", "close the breaker"
    return {**now._asdict(), "meaning": meaning, "fix": fix, "may_try": now.open_until <= time.time()}


class Process(NamedTuple):
    """The workers of one process; an e-mail worker has a job for each of its threads."""

    host: str
    pid: str
    queues: str
    workers: list[overview.Seen]

    @property
    def jobs(self) -> list[overview.Running]:
        return sorted((job for one in self.workers for job in one.jobs), key=lambda job: job.since)

    @property
    def silent(self) -> int:
        return sum(one.is_silent for one in self.workers)


def processes(redis: Redis) -> Iterator[Process]:
    for where, workers in groupby(overview.workers(redis), key=lambda one: (one.host, one.pid, one.queues)):
        yield Process(*where, list(workers))


def tasks(redis: Redis) -> list[Timing]:
    """Returns the tasks of all queues that are queued by themselves. What cannot be read is left out."""
    found: list[Timing] = []
    with translating_errors():
        for queue in QUEUES:
            try:
                found += timetable(redis, queue)
            except DAMAGED:
                continue
    return found
