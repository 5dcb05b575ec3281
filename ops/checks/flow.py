"""Does mail flow: is somebody there to take it, does anything wait too long, and if asked, does one mail arrive?

Looks with commands that change nothing, never with RQ's own listings, which tidy up as they list. The canary is a mail
like any other: stored and queued as the API does it, taken by a worker, sent through the relay.
Keys: rq:workers:*, rq:worker:*, rq:scheduler-lock:* are RQ's; mail:* and relay:* are mail.outbox's and mail.pacing's.
"""

from __future__ import annotations

import json
import time
from datetime import datetime
from typing import Any

from redis import Redis

from mail import message
from mail.address import Mailbox
from mail.draft import Draft
from mail.outbox import Outbox
from mail.request import Invalid, parse
from mail.states import FINAL, State
from mail.store import OPEN, mail_key
from ops.checks import replies
from ops.checks.findings import Findings, Place, counted, fault, lasting, note, ok, warn
from ops.checks.store import asked
from queues import health
from queues.heartbeat import LOST_AFTER
from queues.jobs import EMAIL, JOBS, Jobs
from smtp.verdict import Phase, Reply

SILENT = 2 * LOST_AFTER  # seconds; RQ's own worker, of the queue jobs, speaks up twice a minute
LATE = 300  # seconds that a mail may wait while nothing is wrong
STUCK = 900  # seconds after the moment at which the sweep should have looked at a mail
CANARY_FOR = 60  # seconds

Worker = dict[str, str]


def workers(place: Place) -> Findings:
    """Those that have shown life of late, for each queue; and the scheduler, without which no mail is tried again."""
    with asked(place) as redis:
        for queue in (EMAIL, JOBS):
            known = [read(redis, key) for key in sorted(redis.smembers(f"rq:workers:{queue}"))]
            alive = [one for one in known if one and silence(one) < SILENT]
            if not alive:
                last = min((silence(one) for one in known if one), default=None)
                seen = f"; the last one was heard {lasting(last)} ago" if last else ""
                yield fault(f"no worker takes from the queue {queue}{seen}", place.restart(f"worker@{queue}"))
                continue
            yield from greedy(alive, place)
            if not redis.exists(f"rq:scheduler-lock:{queue}"):
                found = f"no scheduler for the queue {queue}: what was put off is not tried again"
                yield fault(found, place.restart(f"worker@{queue}"))
            else:
                yield ok(f"queue {queue}: {counted(len(alive), 'worker')} and a scheduler, heard of late")


def read(redis: Redis, key: Any) -> Worker:
    stored: dict[Any, Any] = redis.hgetall(key)
    return {name.decode(): value.decode("utf-8", "replace") for name, value in stored.items()}


def silence(worker: Worker) -> float:
    """Seconds since its last sign of life."""
    try:
        moment = datetime.fromisoformat(worker["last_heartbeat"].replace("Z", "+00:00"))
    except (KeyError, ValueError):
        return float("inf")
    return time.time() - moment.timestamp()


def greedy(alive: list[Worker], place: Place) -> Findings:
    several = [one for one in alive if "," in one.get("queues", "")]
    if several:
        found = (
            f"{counted(len(several), 'worker')} with more than one queue: killed, it loses the job it has just taken"
        )
        yield fault(found, "start one `worker.py QUEUE` for each queue, and no `rq worker` with several")


def waiting(place: Place) -> Findings:
    """How long the oldest waits, and why it may."""
    assert place.settings
    with asked(place) as redis:
        state, reasons = health.state(Jobs(redis)), list(reasons_to_wait(redis, place))
        failed = redis.zcard(f"rq:failed:{EMAIL}")
        first: list[Any] = redis.zrange(OPEN, 0, 0, withscores=True)
    overdue = time.time() - first[0][1] if first else 0
    yield from reasons
    age, queued = state["oldest_queued_seconds"] or 0, counted(state["queued"], "mail")
    if age > LATE and not reasons:
        found = f"{queued} in the queue, the oldest for {lasting(age)}: nothing drains it, or too slowly"
        yield warn(found, f"journalctl -u async-email-worker@email -n 50; {place.restart('worker@email')}")
    else:
        yield ok(f"{queued} in the queue" + (f", the oldest for {lasting(age)}" if age else ""))
    if state["overdue_seconds"] > LATE:
        found = f"mail that was put off should have been tried {lasting(state['overdue_seconds'])} ago"
        yield fault(found, place.restart("worker@email"))
    if overdue > STUCK:
        found = f"a mail is stuck for {lasting(overdue)}, and no sweep looks after it"
        yield fault(found, place.restart("worker@email"))
    if failed:
        mend = "look at the dashboard or GET /emails/ID; POST /jobs/ID/requeue sends one again"
        yield note(f"{counted(failed, 'mail')} failed for good", mend)


def reasons_to_wait(redis: Redis, place: Place) -> Findings:
    if redis.exists("rq:suspended"):
        yield fault("workers are suspended (`rq suspend`), so nothing is sent", ".venv/bin/rq resume -u REDIS_URL")
    open_until: Any = redis.hget("relay:breaker", "open_until")
    if open_until:
        seconds = max(0.0, float(open_until) / 1000 - time.time())
        why, mend = last_trouble(redis, place)
        again = f"next try in {lasting(seconds)}" if seconds else "a mail may try now"
        yield fault(f"all mail waits, for the relay was in trouble several times in a row ({again}): {why}", mend)


def last_trouble(redis: Redis, place: Place) -> tuple[str, str]:
    """What the last attempt at one of the oldest waiting mails met with, in our words."""
    assert place.settings
    oldest: list[Any] = redis.zrange(OPEN, 0, 19)
    for mail_id in oldest:
        stored: Any = redis.hget(mail_key(mail_id.decode()), "attempts")
        attempts = json.loads(stored or b"[]")
        if attempts and attempts[-1].get("verdict") == "trouble":
            return explained(attempts[-1], place)
    return "its log says why", "journalctl -u async-email-worker@email -g breaker_opened -n 1"


def explained(attempt: dict[str, Any], place: Place) -> tuple[str, str]:
    assert place.settings
    reply = Reply(Phase(attempt["phase"]), attempt["code"], attempt["text"])
    meaning, mend = replies.explain(place.settings.smtp_host or "", reply)
    return f"{reply.summary}: {meaning}", mend


def canary(place: Place) -> Findings:
    """Sends one mail, the doctor's only act, and watches it for a minute."""
    assert place.settings
    try:
        asked_for = parse(
            {
                "to": [place.send_to],
                "subject": "async-email: a mail from the doctor",
                "text": "This mail went from the queue through a worker and the relay. In its source, the line\n"
                "Authentication-Results should say spf=pass, dkim=pass and dmarc=pass.\n",
            },
            default_sender=Mailbox.parse(place.settings.mail_from) if place.settings.mail_from else None,
            max_recipients=1,
        )
    except Invalid as invalid:
        yield fault(
            f"--send-to: {invalid.errors[0].field}: {invalid.errors[0].message}", "bin/doctor --send-to ada@example.com"
        )
        return
    with asked(place) as redis:
        outbox = Outbox(Jobs(redis), place.settings)
        mail_id = outbox.accept([Draft(message.compose(asked_for, None))]).id
        seen = watched(outbox, mail_id)
    yield from told(mail_id, seen, place)


def watched(outbox: Outbox, mail_id: str) -> dict[str, Any]:
    deadline = time.monotonic() + CANARY_FOR
    while True:
        seen = outbox.read(mail_id)
        if seen["status"] in (*FINAL, State.DELAYED) or time.monotonic() > deadline:
            return seen
        time.sleep(0.25)


def told(mail_id: str, seen: dict[str, Any], place: Place) -> Findings:
    state, attempts = seen["status"], seen["attempts"]
    if state == State.SENT:
        yield ok(f"mail {mail_id} was accepted by the relay; look whether it arrives, and whether as spam")
    elif attempts and "phase" in attempts[-1]:
        why, mend = explained(attempts[-1], place)
        yield fault(f"mail {mail_id} is {state}: {why}", mend)
    elif state == State.DELAYED:
        yield warn(f"mail {mail_id} has to wait: {seen['reason']}", "see the line about the relay or SMTP_RATE here")
    else:
        found = f"mail {mail_id} is still {state} after a minute: no worker has taken it"
        yield fault(found, place.restart("worker@email"))
