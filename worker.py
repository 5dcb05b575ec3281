"""Runs the jobs of one queue: `python worker.py [email|jobs]`.

`email` sends WORKER_CONCURRENCY mails at a time, in WORKER_PROCESSES processes. Each process is one RQ worker whose
threads run its jobs, for a mail is nearly all waiting. Its main thread looks after them: signals, heartbeats, RQ's
scheduler for mail that was put off, RQ's maintenance and our sweep. `jobs` is RQ's own worker, which forks for each
job, so that a task that hangs or crashes can be killed; RQ's scheduler is a process of its own there, which also queues
the tasks with `cron`. SIGTERM lets the jobs in hand finish.
"""

from __future__ import annotations

import logging
import os
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from types import FrameType
from typing import Any

import settings
import tasks
from process import log, prefork, sd_daemon
from process.memory import collect_seldom, return_free_memory, use_one_arena
from queues import keys
from queues.bulk import Bulk
from queues.connection import (
    RedisError,
    Unavailable,
    announcements,
    connect,
    is_hopeless,
    reach,
    translating_errors,
    why_unavailable,
)
from queues.executions import Turns
from queues.heartbeat import LEASE_SECONDS, MAINTENANCE_EVERY
from queues.offer import load_file, offered_on, with_cron
from queues.quarantine import put_aside, sift
from queues.replication import Replication
from queues.senders import Senders
from queues.table import EMAIL, QUEUES
from queues.workers import EmailWorker, Functions, JobsWorker, Scheduler, make_worker, register

FED_PER_SENDER = 50  # bulk mails that a sender may have before it; more than it can send in a second
# Seconds beyond its timeout after which an attempt is taken for stuck; and without progress, after which a process is.
STUCK_AFTER = 120
FEWEST = 4  # mails at a time that are worth a process of their own
Report = Callable[[str], None]


def allowed(queue: str) -> Functions:
    """Returns what a queue's workers may run, by the name that is in a job. TASKS_FILE must be loaded before."""
    return {name: getattr(tasks, name.removeprefix("tasks.")) for name in QUEUES[queue].runs} | offered_on(queue)


class WorkerPool:
    """The senders of one process, and what its main thread does for all of them, once a second."""

    def __init__(
        self, queue: str, current: settings.Settings, concurrency: int = 1, report: Report = sd_daemon.tell
    ) -> None:
        """`concurrency` is the number of mails at a time; `report` takes what is for the service manager."""
        from mail import delivery  # here, since the worker for `jobs` sends no mail

        self.settings = current
        self.report = report
        self.delivery = delivery.current()
        url = current.redis
        self.redis = connect(url)  # fails fast: each second is another try
        self.maintenance_worker = make_worker(EmailWorker, queue, self.redis, allowed(queue))  # takes no jobs
        self.queue = self.maintenance_worker.queues[0]
        self.worker = make_worker(EmailWorker, queue, self.delivery.outbox.jobs.redis, allowed(queue))
        self.worker.turns = Turns(self.worker, *self.delivery.outbox.claim_beside())
        self.senders = Senders(self.worker, connect(url, retrying=True), concurrency, self.is_paused)
        self.scheduler = Scheduler(queue, self.redis)
        self.bulk = Bulk(self.redis, FED_PER_SENDER * concurrency)
        self.suspended = False  # by `rq suspend`
        self.replication = Replication(self.redis, current.redis_replicas)
        self.confirms = not current.redis_replicas  # a mail that was taken could be marked and settled
        self.asked_to_stop = threading.Event()
        self.signalled_at = 0.0
        self.maintained_at = -float(MAINTENANCE_EVERY)  # at once

    def work(self) -> None:
        """Sends mail until SIGTERM or its like, and then until every mail in hand has been dealt with."""
        sd_daemon.on_stop(self.handle_signal)
        with suppress(RedisError):
            self.delivery.routes.start()
        while not self.asked_to_stop.is_set() or self.senders.threads:
            began = time.monotonic()
            self.tick()
            self.asked_to_stop.wait(max(0.0, began + 1 - time.monotonic()))
            if self.asked_to_stop.is_set():
                self.report("STOPPING=1")
                self.drain()
        self.worker.register_death()
        with suppress(RedisError):
            self.scheduler.stop()  # type: ignore[no-untyped-call]
            self.delivery.tally.erase(self.redis)

    def tick(self) -> None:
        """Does one duty after the other. An error in one keeps from no other, and ends nothing."""
        duties: list[Callable[[], object]] = [self.publish_heartbeats, self.watch, self.schedule, self.feed]
        if time.monotonic() - self.maintained_at >= MAINTENANCE_EVERY:
            self.maintained_at = time.monotonic()
            duties += [self.clamp_future_heartbeats, lambda: sift(self.queue)]
            duties += [self.maintenance_worker.run_maintenance_tasks, self.delivery.sweep]
            duties += [lambda: self.delivery.tally.forget_ended(self.redis), return_free_memory]
        for duty in (*duties, self.senders.replenish, self.look_at_replicas):
            try:
                duty()
                announcements.note(None)
            except Exception as error:
                if reason := why_unavailable(error):
                    self.confirms = not self.replication.replicas
                    announcements.note(reason)
                    self.report(f"STATUS=waiting: {reason}")
                    if not is_hopeless(reason):
                        self.report("WATCHDOG=1")  # waiting for a Redis that is away or full is not being stuck
                    return
                log.emit("crashed", logging.ERROR, where=log.where(error))

    def is_paused(self) -> bool:
        """Returns whether no mail should be taken: at `rq suspend`, while all relays are in trouble, and while Redis'
        replicas confirm nothing. It would only be put off, and a long queue would go round and round."""
        return self.suspended or not self.confirms or self.delivery.routes.is_closed

    def drain(self) -> None:
        """Lets the senders end, and waits for them a tenth of a second."""
        self.senders.stop()
        with suppress(RedisError):
            # Ours in BLMOVE sees that when it is woken; other programs' clients block again.
            for client in self.redis.client_list(_type="normal"):
                if client["cmd"] == "blmove":
                    self.redis.client_unblock(int(client["id"]))
        self.senders.join(0.1)

    def look_at_replicas(self) -> None:
        """Finds out whether what is written about a mail would be confirmed. Raises what tells why not."""
        self.replication.confirm()
        self.confirms = True

    def publish_heartbeats(self) -> None:
        """Writes the worker's heartbeat and our tally; looks for `rq suspend`, and whether Redis knows the worker."""
        with self.redis.pipeline(transaction=False) as pipeline:
            pipeline.exists(keys.SUSPENDED)
            pipeline.sismember(self.worker.redis_workers_keys, self.worker.key)
            self.worker.add_heartbeat(pipeline, bool(self.senders.busy_since))
            self.delivery.tally.write(pipeline)
            self.suspended, is_known = map(bool, pipeline.execute()[:2])
        if not is_known:
            register(self.worker, self.redis)

    def watch(self) -> None:
        """Feeds systemd's watchdog, unless an attempt at a mail takes longer than it can."""
        busy = self.senders.busy_since
        if not busy or time.monotonic() - min(busy) < self.settings.job_timeout + STUCK_AFTER:
            self.report("READY=1\nWATCHDOG=1\nSTATUS=")

    def schedule(self) -> None:
        """Queues mail that was put off and is due. What the scheduler fails at is set aside, for the next second."""
        try:
            self.scheduler.tick()
        except Exception as error:
            if why_unavailable(error) or not sift(self.queue):
                raise

    def feed(self) -> None:
        """Lets bulk mail into the queue."""
        self.bulk.feed(self.delivery.routes.room_for_bulk())

    def clamp_future_heartbeats(self) -> None:
        """Shortens leases that a clock set back by an hour has left: they would last for an hour."""
        wip, moment = self.queue.started_job_registry.key, time.time()
        ahead: list[Any] = self.redis.zrangebyscore(wip, moment + 2 * LEASE_SECONDS, "+inf")
        for entry in ahead:
            self.redis.zadd(wip, {entry: moment + LEASE_SECONDS}, xx=True)

    def handle_signal(self, number: int, frame: FrameType | None) -> None:
        """Lets the mail in hand finish. A second signal aborts it, but waits for the replies to final dots that are
        out."""
        if not self.asked_to_stop.is_set():
            self.signalled_at = time.monotonic()
            self.asked_to_stop.set()
        elif time.monotonic() - self.signalled_at > 1:  # sooner, it is the first one again: a group, a terminal
            threading.Thread(target=self.delivery.dots.abort_unsent).start()


def main() -> int:
    queue = sys.argv[1] if len(sys.argv) > 1 else EMAIL
    if queue not in QUEUES or len(sys.argv) > 2:
        print(f"usage: worker.py [{'|'.join(QUEUES)}]", file=sys.stderr)
        return 2
    try:
        current = settings.load(*QUEUES[queue].needs)
        log.set_up(current.log_level, current.log_format)
        use_one_arena()
        url = current.redis
        if current.tasks_file:
            load_file(current.tasks_file)
        reach(url)
        with translating_errors():
            redis, pooled = connect(url, retrying=True), QUEUES[queue].pooled
            put_aside(redis, keys.kinds(queue))  # RQ could not even register
            worker = None if pooled else make_worker(JobsWorker, queue, redis, allowed(queue))
            if pooled:
                from mail.dkim import Signer  # here, since the worker for `jobs` sends no mail

                Signer.of(current)  # before the processes are forked: a key that is none is told once
            if worker:
                worker.cron, worker.replicas = with_cron(queue, current), current.redis_replicas
    except settings.SettingsError as error:
        log.say_why_not(error)
        return 2
    except Unavailable as error:
        log.say_why_not(f"REDIS_URL: {error}")
        return 1
    announcements.begin(redis)
    log.emit("worker_started", queue=queue, recipients=current.staging if pooled else "")
    if worker:
        sd_daemon.on_stop(worker.request_stop)
        sd_daemon.tell("READY=1")
        worker.work(with_scheduler=True, logging_level=None)
    else:
        send(queue, current)
    return 0


def send(queue: str, current: settings.Settings) -> None:
    """Sends mail until SIGTERM, in as many processes as are set. All share WORKER_CONCURRENCY, which is what a relay
    sees: where it allows three connections, a machine with more cores must not open more."""
    import mail.delivery  # noqa: F401  # before the processes are forked, which share it

    collect_seldom()
    together, processes = division(current)

    def work(report: Report, place: int = 0) -> None:
        pool = WorkerPool(queue, current, together // processes + (place < together % processes), report)
        pool.delivery.routes.share(place, processes)
        pool.work()
        pool.delivery.pool.close_all()
        pool.delivery.routes.close()

    def work_in_child(alive: Callable[[], None], place: int) -> None:
        work(lambda said: alive() if "WATCHDOG=1" in said else None, place)  # systemd listens to the parent alone

    if processes == 1:
        work(sd_daemon.tell)
    else:
        prefork.run(processes, work_in_child, STUCK_AFTER)


def division(current: settings.Settings) -> tuple[int, int]:
    """Returns how many mails at a time all processes send, and how many processes there are: each has at least one of
    what a relay takes at a time."""
    limits = [one.concurrency for one in current.all_relays]
    together = min(current.worker_concurrency, sum(limit or current.worker_concurrency for limit in limits))
    processes = current.worker_processes or min(cores(), max(1, together // FEWEST))
    return together, min([together, processes, *filter(None, limits)])


def cores() -> int:
    """Returns how many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


if __name__ == "__main__":
    sys.exit(main())
