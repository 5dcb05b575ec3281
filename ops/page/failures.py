"""Why mails were not sent, and jobs failed, by cause: `/mail/failures`; and what queues all of a cause again.

Of a mail, the reason is shown, what it means and what fixes it, never a relay's words. What a job's exception says goes
through `said`. Queueing again takes no longer than PATIENCE a request, and a button goes on with the rest.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterable
from functools import partial
from itertools import groupby
from typing import Any, NamedTuple
from urllib.parse import urlencode

from flask import Response, request

from mail.causes import Cause, causes, ids, left, newest
from mail.index import LAST, raw_id
from mail.states import EXPIRED, NOT_ADMITTED, TROUBLE_TOO_LONG, State, Status
from ops.checks import replies
from ops.checks.findings import counted, lasting
from ops.page import audit
from ops.page.advice import REPLY, because, in_the_way
from ops.page.search import alike
from ops.page.view import View, go
from queues.failures import Failure, failures
from queues.jobs import NotFound, NotPossible
from queues.table import JOBS
from smtp.pacing import WAITS
from smtp.policy import Phase, Verdict
from smtp.published import Published
from smtp.relay import Relay
from smtp.verdict import Reply

PATH = "/mail/failures"
MOST = 20  # causes of each state that are shown
SAMPLE = 2  # mails of a cause that are looked at
MOST_JOBS = 1000  # failed jobs that are looked at
PATIENCE = 3.0  # seconds
WAITING = {  # why mails wait though no relay has said anything about them
    WAITS["breaker"]: (
        "all mail waits until the relay is well again; none loses an attempt",
        "/mail/system says what the relay's last reply means, and what fixes it",
    ),
    WAITS["rate"]: (
        "each mail has its turn under SMTP_RATE, and goes at that moment",
        "nothing; or raise SMTP_RATE, if the relay takes more",
    ),
}
AT_ONE = (  # the same of one of several relays, by a pattern
    (
        r"the rate of relay \S+ is reached",
        "each mail has its turn under the relay's rate, and goes at that moment",
        "nothing; or raise rate in RELAYS, if the relay takes more",
    ),
    (
        r"the concurrency of relay \S+ is reached",
        "the relay has as many mails at a time as it may have",
        "nothing; or raise concurrency in RELAYS, if the relay takes more",
    ),
    (
        r"relay \S+ is configured no more",
        "the mails must go by a relay that the workers do not know",
        "put it back into RELAYS, or cancel the mails and submit them anew; they fail after TROUBLE_FOR",
    ),
    (
        "no relay takes mail from this domain",
        "each relay of RELAYS has domains, and that of their sender is not among them",
        "add it to the domains of one, or a relay without domains; they fail after TROUBLE_FOR",
    ),
)
IN_DOUBT = (
    "the relay may have accepted it: its answer to the final dot never came",
    "look for its Message-ID in the relay's log, and say on the mail's page whether it arrived",
)

NO_ANSWER = (
    "the relay took all of the mail and never answered, so it may have them; each attempt has the same Message-ID",
    "see whether they arrived before you send one again; ON_DOUBT=hold would hold such mail for you",
)


class Group(NamedTuple):
    """A cause of mails, what it means and what fixes it. `again`: what is to be said before all are queued again; None
    where that is not possible."""

    cause: Cause
    mails: str  # the URL of the page that shows them
    meaning: str
    fix: str
    next_attempt: str
    again: str | None

    @property
    def requeue(self) -> str:
        return f"{PATH}/mails?{urlencode({'reason': self.cause.reason})}"


class JobGroup(NamedTuple):
    """Failed jobs of a task with the same exception."""

    task: str
    error: str
    said: str  # by the last of them
    jobs: int
    first: float
    last: float
    example: str

    @property
    def requeue(self) -> str:
        return f"{PATH}/jobs?{urlencode({'task': self.task, 'error': self.error})}"


def show(view: View) -> Response:
    found = groups(view)
    jobs = job_groups(failures(view.redis, JOBS, MOST_JOBS))
    return view.render("failures.html", "Failures", found=found, jobs=jobs, most_jobs=MOST_JOBS)


def groups(view: View) -> dict[str, list[Group]]:
    """Returns the causes of each state, the one of most mails first."""
    found: dict[str, list[Cause]] = {state: [] for state in (State.FAILED, State.UNKNOWN, State.DELAYED)}
    for cause in causes(view.outbox):
        found[cause.state].append(cause)
    return {state: made(view, of_state[:MOST]) for state, of_state in found.items()}


def made(view: View, wanted: list[Cause]) -> list[Group]:
    """Returns of each cause what the page shows, from its newest mails."""
    samples = newest(view.outbox, wanted, SAMPLE)
    mails = {mail["id"]: mail for mail in view.outbox.read_all([one for sample in samples for one in sample])}
    return [
        group(view, cause, [mails[one] for one in sample if one in mails])
        for cause, sample in zip(wanted, samples, strict=True)
    ]


def group(view: View, cause: Cause, sample: list[dict[str, Any]]) -> Group:
    told = (in_the_way({**sample[0], "reason": cause.reason}) if sample else None) or read(view, cause.reason)
    meaning, fix = explained(view, cause, told)
    recipients = [one for mail in sample for one in mail["recipients"]]
    return Group(
        cause=cause,
        mails=alike(cause.reason, cause.state),
        meaning=meaning,
        fix=fix.replace("GET /emails/ID has", "each mail's page has"),
        next_attempt=min((one["next_attempt_at"] for one in sample if one["next_attempt_at"]), default=""),
        again=warning(cause, told, any(one["status"] == Status.IN_DOUBT for one in recipients)),
    )


def read(view: View, reason: str) -> tuple[Published, Reply] | None:
    """Returns the relay, the first if there are several, and its reply as the reason alone tells."""
    named = REPLY.search(reason)
    if not named:
        return None
    one = view.outbox.relays()[0]
    at = one._replace(where=str(Relay.of(view.settings))) if one.is_only else one
    return at, Reply(Phase(named[2] or Phase.RCPT), int(named[1]) if named[1] else None, "")


def explained(view: View, cause: Cause, told: tuple[Published, Reply] | None) -> tuple[str, str]:
    """Returns what the cause means, and what fixes it."""
    if cause.state == State.UNKNOWN:
        return IN_DOUBT
    if told and told[1].verdict is Verdict.IN_DOUBT:
        return NO_ANSWER
    known = because(cause.reason) or WAITING.get(cause.reason) or at_one(cause.reason)
    meaning, fix = known or (replies.explain_at(*told) if told else ("", ""))
    if cause.reason.startswith(TROUBLE_TOO_LONG):
        waited = f"they waited {lasting(view.settings.trouble_for)} for the relay (TROUBLE_FOR)"
        return (f"{waited}: {meaning}" if meaning else waited), fix or WAITING[WAITS["breaker"]][1]
    return meaning, fix


def at_one(reason: str) -> tuple[str, str] | None:
    why = reason.removeprefix(f"{TROUBLE_TOO_LONG}: ")
    return next(((meaning, fix) for pattern, meaning, fix in AT_ONE if re.fullmatch(pattern, why)), None)


def warning(cause: Cause, told: tuple[Published, Reply] | None, in_doubt: bool) -> str | None:
    """Returns what is to be said before all of a cause are queued again; None where that is not possible."""
    if cause.state != State.FAILED or cause.reason == EXPIRED:
        return None
    if cause.reason == NOT_ADMITTED:
        return "They will fail again as long as MAIL_ALLOWLIST and MAIL_REDIRECT_TO keep them from their recipients."
    if in_doubt or (told and told[1].verdict is Verdict.IN_DOUBT):
        return "The relay may have these mails already: requeued, what it has arrives twice."
    if told and told[1].verdict is Verdict.REFUSED:
        what = "these addresses" if told[1].phase is Phase.RCPT else "these mails"
        return f"The relay refused {what} for good: requeued, they will most likely fail again."
    return "Do it once the cause is fixed, or they will fail again."


def job_groups(failed: Iterable[Failure]) -> list[JobGroup]:
    """Returns the failed jobs by task and exception, the most first."""
    key = kind_of
    found = [jobs_alike(list(alike)) for _, alike in groupby(sorted(failed, key=key), key=key)]
    return sorted(found, key=lambda one: (-one.jobs, -one.last))


def kind_of(failure: Failure) -> tuple[str, str]:
    return failure.task, failure.error


def jobs_alike(failed: list[Failure]) -> JobGroup:
    last, times = max(failed, key=lambda one: one.at), [one.at for one in failed if one.at]
    first = min(times, default=0.0)
    return JobGroup(last.task, last.error, last.said, len(failed), first, last.at, last.id)


def ask_mails(view: View) -> Response:
    reason = request.args.get("reason", "")
    cause = next((one for one in causes(view.outbox) if (one.state, one.reason) == (State.FAILED, reason)), None)
    warned = made(view, [cause])[0].again if cause else None
    if not cause or warned is None:
        return go(PATH)
    text = f"{reason}. {warned} Each gets all its attempts again, and goes only to who is not known to have it."
    question, button = f"Requeue {counted(cause.mails, 'mail')}?", f"Requeue all {cause.mails:,}"
    return view.confirm(question, text=text, button=button, back=PATH, reason=reason)


def requeue_mails(view: View) -> Response:
    """Queues the mails of a cause again, the newest first."""
    reason, below = request.form.get("reason", ""), raw_id(request.form.get("below", "")) or LAST
    requeue = partial(view.outbox.requeue, in_doubt=False)  # a list may be older than a doubt
    done = queue_again(ids(view.outbox, State.FAILED, reason, below), requeue)
    left_over = left(view.outbox, State.FAILED, reason, raw_id(done.last) or b"")
    return result(view, "mail", done, reason, left_over, reason=reason, below=done.last)


def ask_jobs(view: View) -> Response:
    kind = request.args.get("task", ""), request.args.get("error", "")
    alike = [one for one in failures(view.redis, JOBS, MOST_JOBS) if kind_of(one) == kind]
    if not alike:
        return go(PATH)
    text = (
        f"{' '.join(kind)}. Each gets all its attempts again. Do it once the cause is fixed, or they will fail again."
    )
    question, button = f"Requeue {counted(len(alike), 'job')}?", f"Requeue all {len(alike):,}"
    return view.confirm(question, text=text, button=button, back=PATH, task=kind[0], error=kind[1])


def requeue_jobs(view: View) -> Response:
    kind = request.form.get("task", ""), request.form.get("error", "")
    alike = [one.id for one in failures(view.redis, JOBS, MOST_JOBS) if kind_of(one) == kind]
    done = queue_again(alike, view.outbox.jobs.requeue)
    left_over = len(alike) - done.queued - done.refused
    return result(view, "job", done, " ".join(kind), left_over, task=kind[0], error=kind[1])


class Done(NamedTuple):
    """How many were queued again, how many could not be, and the id of the last one."""

    queued: int
    refused: int
    last: str


def queue_again(found: Iterable[str], requeue: Callable[[str], None]) -> Done:
    """Queues one after the other again, as long as PATIENCE lasts."""
    deadline, done = time.monotonic() + PATIENCE, Done(0, 0, "")
    for one in found:
        try:
            requeue(one)
            done = Done(done.queued + 1, done.refused, one)
        except (NotFound, NotPossible):
            done = Done(done.queued, done.refused + 1, one)
        if time.monotonic() > deadline:
            break
    return done


def result(view: View, thing: str, done: Done, cause: str, left_over: int, **fields: str) -> Response:
    """Notes and says what was done, with a button that goes on if something is left."""
    if done.queued:
        audit.note(view.redis, view.who, "requeue_all", cause)
    title = f"{counted(done.queued, thing)} {'is' if done.queued == 1 else 'are'} queued again"
    return view.render("requeued.html", title, refused=done.refused, left=left_over, fields=fields, back=PATH)
