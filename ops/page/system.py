"""The relay, workers, queues, timed tasks and Redis: `/mail/system`; and what pauses, resumes and closes."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from itertools import groupby
from typing import Any, NamedTuple

from flask import Response, abort

from ops.checks import replies
from ops.checks.store import address, program
from ops.page import audit
from ops.page.view import View, go
from process.relays import ONLY
from process.values import Rate
from queues import overview
from queues.connection import Redis, ResponseError, translating_errors, weaknesses
from queues.cron import Timing, timetable
from queues.health import queue_states, replicas
from queues.quarantine import DAMAGED
from queues.table import EMAIL, QUEUES
from smtp.pacing import Pacing, standing, used
from smtp.published import Published
from smtp.relay import Relay
from smtp.tally import Sessions, sessions

PATH = "/mail/system"


class Action(NamedTuple):
    """What a button of the page does, once the question has been answered; `done` is a key of view.DONE."""

    question: str
    text: str
    button: str
    done: str
    do: Callable[[Redis], None]


def close_breaker(redis: Redis, name: str = ONLY) -> None:
    Pacing(redis, (), name).close()


ALL_WAITS = "All mail waits because the relay was in trouble."
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
        f"{ALL_WAITS} The breaker closes by itself within a minute after the cause "
        "is gone; close it by hand where the relay asked for a long pause and you know better. It opens again after "
        "three troubles in a row. No mail loses an attempt by it.",
        "Close it now",
        "breaker_closed",
        close_breaker,
    ),
}


def show(view: View) -> Response:
    info: dict[str, Any] = {}
    with suppress(ResponseError):  # INFO may be forbidden
        info = view.redis.info()
    replicated = replicas(view.outbox.jobs, info)
    return view.render(
        "system.html",
        "Relay and workers",
        relays=(relays := [relay(view, one) for one in view.outbox.relays()]),
        all_closed=all(one.breaker and one.breaker["open_until"] for one in relays),
        last_sent=view.outbox.last_sent(),
        staging=view.settings.staging,
        paused=overview.is_paused(view.redis),
        processes=list(processes(view.redis)),
        queues=queue_states(view.outbox.jobs),
        email=EMAIL,
        tasks=tasks(view.redis),
        info=info,
        program=program(info) if info else "",
        at=str(address(view.settings)) if replicated else "",
        replicas=replicated,
        weaknesses=[sentence for _, sentence in weaknesses(info)] if info else [],
    )


def ask(view: View, act: str) -> Response:
    action, name = chosen(view, act)
    if name:
        why = f"Mail goes by another relay, if one takes it, because {name} was in trouble."
        action = action._replace(text=action.text.replace(ALL_WAITS, why), button=f"{action.button}: {name}")
    return view.confirm(action.question, text=action.text, button=action.button, back=PATH)


def do(view: View, act: str) -> Response:
    action, name = chosen(view, act)
    with translating_errors():
        if name:
            close_breaker(view.redis, name)
        else:
            action.do(view.redis)
    audit.note(view.redis, view.who, act.partition(":")[0], name)
    return go(f"{PATH}?done={action.done}")


def chosen(view: View, act: str) -> tuple[Action, str]:
    """Returns the action, and the relay that it is about where there are several: `close-breaker:second`."""
    what, _, name = act.partition(":")
    known = [one.name for one in view.outbox.relays() if not one.is_only] if name else []
    action = ACTIONS.get(what if name in known and what == "close-breaker" else act) or abort(404)
    return action, name


class Shown(NamedTuple):
    """A relay as the page shows it."""

    one: Published
    where: str
    breaker: dict[str, Any] | None
    sessions: Sessions
    rates: list[tuple[Rate, int]]

    @property
    def close(self) -> str:
        return f"{PATH}/close-breaker" + ("" if self.one.is_only else f":{self.one.name}")


def relay(view: View, one: Published) -> Shown:
    rates = view.settings.smtp_rate if one.is_only else one.rate
    return Shown(
        one, where(view, one), breaker(view, one), sessions(view.redis, one.name), used(view.redis, rates, one.name)
    )


def where(view: View, one: Published) -> str:
    if not one.is_only:
        return f"{one.where} (by HTTP)" if one.kind == "resend" else one.where
    if not view.settings.smtp_host:
        return ""
    how = {"tls": "TLS from the beginning", "starttls": "TLS by STARTTLS", "none": "no TLS"}
    return f"{view.settings.smtp_host}:{view.settings.smtp_port}, {how[view.settings.smtp_security]}"


def breaker(view: View, one: Published) -> dict[str, Any] | None:
    """Returns how a relay stands while there is trouble, and what its last reply means and fixes."""
    now = standing(view.redis, one.name)
    if not now:
        return None
    known = one._replace(where=str(Relay.of(view.settings)) if view.settings.smtp_host else "") if one.is_only else one
    meaning, fix = replies.explain_at(known, now.reply) if now.reply else ("", "")
    if known.kind == "smtp" and known.where and now.relay not in ("", known.where):
        names = "SMTP_HOST and SMTP_PORT name" if one.is_only else "host and port name"
        meaning, fix = f"that was {now.relay}, and {names} another now", "close the breaker"
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
