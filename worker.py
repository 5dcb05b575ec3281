"""Runs the jobs of one queue: `python worker.py [email|jobs]`.

`email` is a pool: WORKER_CONCURRENCY RQ workers as threads of this process, each with its own Redis connection and SMTP
session, for a mail is nearly all waiting. The main thread looks after them: signals, heartbeats, RQ's scheduler for
mail that was put off, RQ's maintenance and our sweep. `jobs` is RQ's own worker, which forks for each job, so that a
task that hangs or crashes can be killed; RQ's scheduler is a process of its own there, which also queues the tasks with
`cron`. SIGTERM lets the jobs in hand finish.
"""

from __future__ import annotations

import logging
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from types import FrameType
from typing import Any

import settings
import tasks
from process import log, sd_daemon
from process.memory import return_free_memory, use_one_arena
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
from queues.heartbeat import LEASE_SECONDS, MAINTENANCE_EVERY
from queues.offer import load_file, offered_on, with_cron
from queues.quarantine import put_aside, sift
from queues.table import EMAIL, QUEUES
from queues.workers import EmailWorker, Functions, JobsWorker, Scheduler, make_worker

FED_PER_WORKER = 50  # bulk mails that a worker may have before it; more than it can send in a second
STUCK_AFTER = 120  # seconds beyond its timeout after which an attempt is taken for stuck


def allowed(queue: str) -> Functions:
    """Returns what a queue's workers may run, by the name that is in a job. TASKS_FILE must be loaded before."""
    return {name: getattr(tasks, name.removeprefix("tasks.")) for name in QUEUES[queue].runs} | offered_on(queue)


class WorkerPool:
    """The e-mail workers of one process, and what their main thread does for all of them, once a second.

    Replaces a worker whose thread has ended, so the process outlives what made it quit: a Redis that was away for
    minutes, a fault of ours.
    """

    def __init__(self, queue: str, current: settings.Settings) -> None:
        from mail import delivery  # here, since the worker for `jobs` sends no mail

        self.settings = current
        self.delivery = delivery.current()
        self.redis = connect(current.redis_url.get_secret_value())  # fails fast: each second is another try
        self.maintenance_worker = make_worker(EmailWorker, queue, self.redis, allowed(queue))  # takes no jobs
        self.queue = self.maintenance_worker.queues[0]
        self.scheduler = Scheduler(queue, self.redis)
        self.bulk = Bulk(self.redis, FED_PER_WORKER * current.worker_concurrency)
        self.workers: dict[threading.Thread, EmailWorker] = {}
        self.suspended = False  # by `rq suspend`
        self.asked_to_stop = threading.Event()
        self.signalled_at = 0.0
        self.maintained_at = -float(MAINTENANCE_EVERY)  # at once

    def work(self) -> None:
        """Sends mail until SIGTERM or its like, and then until every mail in hand has been dealt with."""
        sd_daemon.on_stop(self.handle_signal)
        with suppress(RedisError):
            self.delivery.pacing.start()
        while not self.asked_to_stop.is_set() or self.workers:
            began = time.monotonic()
            self.tick()
            self.asked_to_stop.wait(max(0.0, began + 1 - time.monotonic()))
            if self.asked_to_stop.is_set():
                sd_daemon.tell("STOPPING=1")
                self.drain()
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
        for duty in (*duties, self.replenish):
            try:
                duty()
                announcements.note(None)
            except Exception as error:
                if reason := why_unavailable(error):
                    announcements.note(reason)
                    sd_daemon.tell(f"STATUS=waiting: {reason}")
                    if not is_hopeless(reason):
                        sd_daemon.tell("WATCHDOG=1")  # waiting for a Redis that is away or full is not being stuck
                    return
                log.emit("crashed", logging.ERROR, where=log.where(error))

    def replenish(self) -> None:
        """Starts as many workers as are missing."""
        self.workers = {thread: worker for thread, worker in self.workers.items() if thread.is_alive()}
        while len(self.workers) < self.settings.worker_concurrency and not self.asked_to_stop.is_set():
            redis = connect(self.settings.redis_url.get_secret_value(), retrying=True)
            worker = make_worker(EmailWorker, self.queue.name, redis, allowed(self.queue.name))
            worker.is_paused = self.is_paused
            thread = threading.Thread(target=worker.work, kwargs={"logging_level": None}, name=worker.name)
            self.workers[thread] = worker
            thread.start()

    def is_paused(self) -> bool:
        """Returns whether no mail should be taken: at `rq suspend`, and while the relay is in trouble. It would only be
        put off, and a long queue would go round and round."""
        return self.suspended or self.delivery.pacing.closed_for() > 0

    def drain(self) -> None:
        """Lets workers that wait for a job end, and forgets those that have."""
        for worker in self.workers.values():
            worker.stopping = True
        with suppress(RedisError):
            # Our workers in BLMOVE see `stopping` when they are woken; other programs' clients block again.
            for client in self.redis.client_list(_type="normal"):
                if client["cmd"] == "blmove":
                    self.redis.client_unblock(int(client["id"]))
        for thread in list(self.workers):
            thread.join(0.1 / len(self.workers))
        self.workers = {thread: worker for thread, worker in self.workers.items() if thread.is_alive()}

    def publish_heartbeats(self) -> None:
        """Writes all workers' heartbeats and our tally; looks for `rq suspend` and workers that Redis has forgotten."""
        workers = list(self.workers.values())
        with self.redis.pipeline(transaction=False) as pipeline:
            for worker in workers:
                worker.add_heartbeat(pipeline)
            self.delivery.tally.write(pipeline)
            for worker in workers:
                pipeline.sismember(worker.redis_workers_keys, worker.key)
            pipeline.exists(keys.SUSPENDED)
            seen = pipeline.execute()
        self.suspended = bool(seen.pop())
        for worker, known in zip(workers, seen[len(seen) - len(workers) :], strict=True):
            worker.forgotten = not known

    def watch(self) -> None:
        """Feeds systemd's watchdog, unless an attempt at a mail takes longer than it can."""
        busy = [worker.busy_since for worker in self.workers.values() if worker.busy_since]
        if not busy or time.monotonic() - min(busy) < self.settings.job_timeout + STUCK_AFTER:
            sd_daemon.tell("READY=1\nWATCHDOG=1\nSTATUS=")

    def schedule(self) -> None:
        """Queues mail that was put off and is due. What the scheduler fails at is set aside, for the next second."""
        try:
            self.scheduler.tick()
        except Exception as error:
            if why_unavailable(error) or not sift(self.queue):
                raise

    def feed(self) -> None:
        """Lets bulk mail into the queue."""
        self.bulk.feed(self.delivery.pacing.room_for_bulk())

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
        url = current.redis_url.get_secret_value()
        if current.tasks_file:
            load_file(current.tasks_file)
        reach(url)
        with translating_errors():
            redis, pooled = connect(url, retrying=True), QUEUES[queue].pooled
            put_aside(redis, keys.kinds(queue))  # RQ could not even register
            worker = WorkerPool(queue, current) if pooled else make_worker(JobsWorker, queue, redis, allowed(queue))
            if isinstance(worker, JobsWorker):
                worker.cron = with_cron(queue, current)
    except settings.SettingsError as error:
        log.say_why_not(error)
        return 2
    except Unavailable as error:
        log.say_why_not(f"REDIS_URL: {error}")
        return 1
    announcements.begin(redis)
    log.emit("worker_started", queue=queue, recipients=current.staging if pooled else "")
    if isinstance(worker, WorkerPool):
        worker.work()
        worker.delivery.pool.close_all()
    else:
        sd_daemon.on_stop(worker.request_stop)
        sd_daemon.tell("READY=1")
        worker.work(with_scheduler=True, logging_level=None)
    return 0


if __name__ == "__main__":
    sys.exit(main())
