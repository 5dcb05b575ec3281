"""Checks that mail flows: workers are there, nothing waits too long and, if asked, one test mail arrives.

Uses commands that change nothing, never RQ's own listings, which clean up as they list. The test mail is one like any
other: stored and queued as the API does it, taken by a worker, sent through the relay.
"""

from __future__ import annotations

import time
from typing import Any

from redis import Redis

from mail.address import Mailbox
from mail.counters import number
from mail.draft import prepare, redirected
from mail.outbox import Outbox
from mail.request import Invalid
from mail.states import FINAL, State
from mail.store import LAST_SENT, OPEN, mail_key
from ops.checks import replies
from ops.checks.findings import Findings, counted, fault, lasting, note, ok, warn
from ops.checks.store import client
from ops.checks.target import Target
from process.relays import ONLY
from queues import health, keys
from queues.cron import planned
from queues.heartbeat import LEASE_SECONDS
from queues.jobs import Jobs
from queues.quarantine import UNREADABLE, UNREADABLE_KEPT
from queues.table import EMAIL, QUEUES
from settings import Settings
from smtp.pacing import Standing, standing
from smtp.policy import Phase
from smtp.published import Published, published
from smtp.relay import Relay
from smtp.verdict import Reply

SILENT = 2 * LEASE_SECONDS  # seconds; RQ's own worker, of the queue jobs, has a heartbeat of 30 seconds
LATE = 300  # seconds that a mail may wait while nothing is wrong
STUCK = 900  # seconds after the moment at which the sweep should have examined a mail
CANARY_TIMEOUT = 60  # seconds
TEST_MAIL = {
    "subject": "async-email: a mail from the doctor",
    "text": "This mail went from the queue through a worker and the relay. In its source, the line\n"
    "Authentication-Results should say spf=pass, dkim=pass and dmarc=pass.\n",
}


def workers(target: Target, settings: Settings) -> Findings:
    """Checks that each queue has workers with a recent heartbeat, and a scheduler, without which no mail is retried."""
    with client(settings) as redis:
        for queue in QUEUES:
            keys_of_workers: Any = redis.smembers(keys.workers(queue))
            known = [redis.hmget(key, "last_heartbeat", "queues") for key in keys_of_workers]
            heard = [(age, queues) for beat, queues in known if (age := health.age(beat)) is not None]
            alive = [queues or b"" for age, queues in heard if age < SILENT]
            if not alive:
                seen = f"; the last heartbeat was {lasting(min(age for age, _ in heard))} ago" if heard else ""
                yield fault(f"no worker takes from the queue {queue}{seen}", target.restart(f"worker@{queue}"))
                continue
            several = sum(b"," in queues for queues in alive)
            if several:
                found = f"{counted(several, 'worker')} with more than one queue: killed, it loses the job it just took"
                yield fault(found, "start one `worker.py QUEUE` for each queue, and no `rq worker` with several")
            if not redis.exists(keys.scheduler_lock(queue)):
                found = f"no scheduler for the queue {queue}: delayed mail is not tried again"
                yield fault(found, target.restart(f"worker@{queue}"))
            else:
                yield ok(f"queue {queue}: {counted(len(alive), 'worker')} and a scheduler, with recent heartbeats")
            for task, due in planned(redis, queue).items():
                yield ok(f"{task}: cron queues it next at {due.astimezone():%Y-%m-%d %H:%M}")


def waiting(target: Target, settings: Settings) -> Findings:
    """Checks how long the oldest mail has waited, and whether there is a reason for it."""
    with client(settings) as redis:
        state, reasons = health.queue_states(Jobs(redis))[EMAIL], list(reasons_to_wait(redis, settings, target))
        unreadable = redis.zcount(UNREADABLE, time.time() - UNREADABLE_KEPT, "+inf")
        first: list[Any] = redis.zrange(OPEN, 0, 0, withscores=True)
        failed, orphaned = failed_mails(redis)
        last_sent = number(redis.get(LAST_SENT))
    overdue = time.time() - first[0][1] if first else 0
    yield from reasons
    age, bulk = state.oldest_queued or 0, state.jobs["bulk"]
    found = f"{counted(state.jobs['queued'], 'mail')} in the queue" + (f" and {bulk} of priority bulk" if bulk else "")
    found += f", the oldest for {lasting(age)}" if age else ""
    goes_out = bulk and time.time() - last_sent < LATE  # then what was let in is old, and all is well
    if age > LATE and not reasons and not goes_out:
        fix = f"sudo journalctl -u async-email-worker@email -n 50; {target.restart('worker@email')}"
        yield warn(f"{found}: nothing drains the queue, or too slowly", fix)
    else:
        yield ok(found)
    if state.overdue > LATE:
        found = f"delayed or scheduled mail should have been tried {lasting(state.overdue)} ago"
        yield fault(found, target.restart("worker@email"))
    if overdue > STUCK:
        found = f"a mail has been stuck for {lasting(overdue)}, and no sweep takes care of it"
        yield fault(found, target.restart("worker@email"))
    if failed:
        fix = "/mail/failures shows why, and requeues; or GET /emails/ID, and POST /jobs/ID/requeue"
        yield note(f"{counted(failed, 'mail')} failed, or {'is' if failed == 1 else 'are'} in doubt and held", fix)
    if orphaned:
        found = f"{counted(orphaned, 'failed job')} without a mail: it is no longer kept, or was never accepted"
        yield note(found, "the dashboard's button empties the list; there is nothing to send")
    if unreadable:
        fix = f"redis-cli ZRANGE {UNREADABLE} 0 -1; redis-cli HGETALL {UNREADABLE}:ID"
        yield note(f"unreadable jobs set aside: {unreadable}", fix)


def failed_mails(redis: Redis) -> tuple[int, int]:
    """Returns how many of the failed jobs have a mail, and how many have none."""
    ids: list[Any] = redis.zrange(keys.failed(EMAIL), 0, -1)
    kept = 0
    for start in range(0, len(ids), 1000):
        with redis.pipeline(transaction=False) as pipe:
            for one in ids[start : start + 1000]:
                pipe.exists(mail_key(one.decode(errors="replace")))
            kept += sum(pipe.execute())
    return kept, len(ids) - kept


def reasons_to_wait(redis: Redis, settings: Settings, target: Target) -> Findings:
    if redis.exists(keys.SUSPENDED):
        fix = f"resume all workers at /mail/system, with the key p of {target.command('top')}, or with rq resume"
        yield fault("workers are suspended (`rq suspend`), so nothing is sent", fix)
    relays = published(redis)
    seen = [(one, standing(redis, one.name)) for one in relays]
    opened = [(one, now) for one, now in seen if now and now.open_until]
    for one, now in opened:
        seconds = max(0.0, now.open_until - time.time())
        why, fix = last_trouble(one, now, settings)
        again = f"next try in {lasting(seconds)}" if seconds else "a mail may try now"
        if one.is_only:
            yield fault(f"all mail waits, since the relay was in trouble several times in a row ({again}): {why}", fix)
        elif len(opened) == len(relays):
            yield fault(f"all relays are in trouble, so all mail waits; {one.name} ({again}): {why}", fix)
        else:
            yield warn(f"relay {one.name} is in trouble, and mail goes by another ({again}): {why}", fix)


def last_trouble(one: Published, seen: Standing, settings: Settings) -> tuple[str, str]:
    """Returns what the last trouble was, in our words, and its fix."""
    if not seen.reply:  # its worker is of an earlier version
        return "its log says why", "sudo journalctl -u async-email-worker@email -g breaker_opened -n 1"
    now = (str(Relay.of(settings)) if settings.smtp_host else "") if one.is_only else one.where
    if one.kind == "smtp" and now and seen.relay not in ("", now):
        names, which = ("SMTP_HOST and SMTP_PORT name", "") if one.is_only else ("host and port name", f" {one.name}")
        return f"that was {seen.relay}, and {names} another now", f"bin/breaker close{which}"
    meaning, fix = replies.explain_at(one._replace(where=now), seen.reply)
    return f"{seen.reply.summary}: {meaning}", fix


def canary(target: Target, settings: Settings) -> Findings:
    """Sends one mail, which is all that the doctor ever changes, and watches it for a minute."""
    sender = Mailbox.parse(settings.mail_from) if settings.mail_from else None
    try:
        draft = prepare({"to": [target.send_to], **TEST_MAIL}, default_sender=sender, max_recipients=1)
        draft = draft._replace(message=redirected(draft.message, settings))
    except Invalid as invalid:
        wrong = invalid.errors[0]
        fix = f"MAIL_FROM: {target.edit}" if wrong.field == "from" else "bin/doctor --send-to ada@example.com"
        yield fault(f"--send-to: {wrong.field}: {wrong.message}", fix)
        return
    with client(settings) as redis:
        outbox = Outbox(Jobs(redis), settings)
        mail_id = outbox.accept([draft]).id
        deadline = time.monotonic() + CANARY_TIMEOUT
        while time.monotonic() < deadline:
            seen = outbox.read(mail_id)
            goes_on = any(one.get("moved") for one in seen["attempts"][-1:])  # to another relay, in a second
            if seen["status"] in FINAL or (seen["status"] == State.DELAYED and not goes_on):
                break
            time.sleep(0.25)
    yield from what_became_of(mail_id, seen, target, settings)


def what_became_of(mail_id: str, seen: dict[str, Any], target: Target, settings: Settings) -> Findings:
    state, attempts = seen["status"], seen["attempts"]
    if state == State.SENT:
        yield ok(f"mail {mail_id} was accepted by the relay; see whether it arrives, and whether as spam")
    elif attempts and "phase" in attempts[-1]:
        last = attempts[-1]
        reply = Reply(Phase(last["phase"]), last["code"], last["text"])
        at = Published(last.get("relay_name", ONLY), where=last.get("relay") or settings.smtp_host or "")
        meaning, fix = replies.explain_at(at, reply)
        yield fault(f"mail {mail_id} is {state}: {reply.summary}: {meaning}", fix)
    elif state == State.DELAYED:
        yield warn(f"mail {mail_id} has to wait: {seen['reason']}", "see the line about the relay or SMTP_RATE here")
    else:
        found = f"mail {mail_id} is still {state} after a minute: no worker has taken it"
        yield fault(found, target.restart("worker@email"))
