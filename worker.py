"""The process that takes jobs from one queue: `python worker.py [email|jobs]`.

`email` is a pool: WORKER_CONCURRENCY RQ workers as threads of this process, each with its own Redis connection and SMTP
session, for a mail is nearly all waiting. The main thread looks after them: signals, heartbeats, RQ's scheduler for
mail that was put off, RQ's maintenance and our sweep. `jobs` is RQ's own worker, which forks for each job, so that a
task that hangs or crashes can be killed. SIGTERM lets the jobs in hand finish.
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

from redis.exceptions import RedisError
from rq.scheduler import RQScheduler
from rq.serializers import JSONSerializer
from rq.suspension import WORKERS_SUSPENDED

import settings
import tasks
from mail import delivery
from process import log, sd_daemon
from queues.connection import Unavailable, connect, translating_errors, why_unavailable
from queues.heartbeat import LEASE_SECONDS, LOCKED_FOR, MAINTENANCE_EVERY
from queues.offer import offered_on
from queues.quarantine import sift
from queues.table import EMAIL, QUEUES
from queues.workers import EmailWorker, Functions, email_worker, jobs_worker

ALLOWED: dict[str, Functions] = {
    row.name: {name: getattr(tasks, name.removeprefix("tasks.")) for name in row.runs} | offered_on(row.name)
    for row in QUEUES.values()
}
STUCK_AFTER = 120  # seconds beyond its timeout after which an attempt is taken for stuck


class WorkerPool:
    """The e-mail workers of one process, and what their main thread does for all of them, once a second.

    A worker whose thread ends is replaced, so the process outlives whatever made it quit: a Redis that was away for
    minutes, a fault of ours.
    """

    def __init__(self, current: settings.Settings) -> None:
        self.settings = current
        self.delivery = delivery.current()
        # Here nobody waits for Redis to come back: the next second is the next try.
        self.redis = connect(current.redis_url.get_secret_value())
        # RQ's maintenance is a worker's; this one takes no jobs.
        self.maintenance_worker = email_worker(self.redis, ALLOWED[EMAIL], self.delivery.pacing.closed_for)
        self.queue = self.maintenance_worker.queues[0]
        # RQ keeps the lock of a scheduler that is dead for interval + 60 s; we keep it alive once a second.
        self.scheduler = RQScheduler([EMAIL], self.redis, interval=LOCKED_FOR - 60, serializer=JSONSerializer)
        self.workers: dict[threading.Thread, EmailWorker] = {}
        self.asked_to_stop = threading.Event()
        self.signalled_at = 0.0
        self.maintained_at = -float(MAINTENANCE_EVERY)  # at once

    def work(self) -> None:
        """Until SIGTERM or its like, and until every mail in hand has been dealt with."""
        sd_daemon.on_stop(self.handle_signal)
        while not self.asked_to_stop.is_set() or self.workers:
            self.tick()
            self.asked_to_stop.wait(1)
            if self.asked_to_stop.is_set():
                sd_daemon.tell("STOPPING=1")
                self.drain()
        with suppress(RedisError):
            self.scheduler.stop()  # type: ignore[no-untyped-call]

    def tick(self) -> None:
        """One duty after the other. What goes wrong in one keeps from no other, and ends nothing."""
        duties: list[Callable[[], object]] = [self.publish_heartbeats, self.watch, self.schedule]
        if time.monotonic() - self.maintained_at >= MAINTENANCE_EVERY:
            self.maintained_at = time.monotonic()
            duties += [self.clamp_future_heartbeats, lambda: sift(self.queue)]
            duties += [self.maintenance_worker.run_maintenance_tasks, self.delivery.sweep]
        for duty in (*duties, self.replenish):
            try:
                duty()
            except Exception as error:
                if why_unavailable(error):
                    sd_daemon.tell("WATCHDOG=1")  # it is away, or full: who waits for it is not stuck
                    return
                log.emit("crashed", logging.ERROR, where=log.where(error))

    def replenish(self) -> None:
        """Sees to it that there are as many workers as asked for."""
        self.workers = {thread: worker for thread, worker in self.workers.items() if thread.is_alive()}
        while len(self.workers) < self.settings.worker_concurrency and not self.asked_to_stop.is_set():
            redis = connect(self.settings.redis_url.get_secret_value(), retrying=True)
            worker = email_worker(redis, ALLOWED[EMAIL], self.delivery.pacing.closed_for)
            thread = threading.Thread(target=worker.work, kwargs={"logging_level": None}, name=worker.name)
            self.workers[thread] = worker
            thread.start()

    def drain(self) -> None:
        for worker in self.workers.values():
            worker.stopping = True
        with suppress(RedisError):
            self.wake()
        for thread in list(self.workers):
            thread.join(0.1 / len(self.workers))
        self.workers = {thread: worker for thread, worker in self.workers.items() if thread.is_alive()}

    def publish_heartbeats(self) -> None:
        """Of all workers, and looks for `rq suspend` and for those that Redis has forgotten."""
        workers = list(self.workers.values())
        with self.redis.pipeline(transaction=False) as pipeline:
            for worker in workers:
                worker.add_heartbeat(pipeline)
            for worker in workers:
                pipeline.sismember(worker.redis_workers_keys, worker.key)
            pipeline.exists(WORKERS_SUSPENDED)
            *_, suspended = seen = pipeline.execute()
        EmailWorker.suspended = bool(suspended)
        for worker, known in zip(workers, seen[-1 - len(workers) : -1], strict=True):
            worker.forgotten = not known

    def watch(self) -> None:
        """Feeds systemd's watchdog, unless an attempt at a mail has outlasted all that could keep it."""
        busy = [worker.busy_since for worker in self.workers.values() if worker.busy_since]
        if not busy or time.monotonic() - min(busy) < self.settings.job_timeout + STUCK_AFTER:
            sd_daemon.tell("READY=1\nWATCHDOG=1")

    def schedule(self) -> None:
        """Queues mail that was put off and is due, if no other process does."""
        if self.scheduler.acquired_locks or self.scheduler.acquire_locks():  # type: ignore[no-untyped-call]
            self.scheduler.heartbeat()  # type: ignore[no-untyped-call]
            try:
                self.scheduler.enqueue_scheduled_jobs()  # type: ignore[no-untyped-call]
            except Exception as error:
                if why_unavailable(error) or not sift(self.queue):
                    raise

    def clamp_future_heartbeats(self) -> None:
        """A clock that was set back an hour leaves heartbeats that would hold for an hour."""
        wip, moment = self.queue.started_job_registry.key, time.time()
        ahead: list[Any] = self.redis.zrangebyscore(wip, moment + 2 * LEASE_SECONDS, "+inf")
        for entry in ahead:
            self.redis.zadd(wip, {entry: moment + LEASE_SECONDS}, xx=True)

    def wake(self) -> None:
        """Those who wait for a job, so that they notice. Whoever else is woken waits on."""
        for client in self.redis.client_list(_type="normal"):
            if client["cmd"] == "blmove":
                self.redis.client_unblock(int(client["id"]))

    def handle_signal(self, number: int, frame: FrameType | None) -> None:
        """The first lets the mail in hand finish. A second one breaks off what nobody will be in doubt about: it waits
        for the answers to final dots that are out, and lets no other dot go out."""
        if not self.asked_to_stop.is_set():
            self.signalled_at = time.monotonic()
            self.asked_to_stop.set()
        elif time.monotonic() - self.signalled_at > 1:  # sooner, it is the echo of the first: a group, a terminal
            threading.Thread(target=self.delivery.dots.abort_unsent).start()


def main() -> int:
    queue = sys.argv[1] if len(sys.argv) > 1 else EMAIL
    if queue not in ALLOWED or len(sys.argv) > 2:
        print(f"usage: worker.py [{'|'.join(ALLOWED)}]", file=sys.stderr)
        return 2
    try:
        current = settings.load(*QUEUES[queue].needs)
    except settings.SettingsError as error:
        print(error, file=sys.stderr)
        return 2
    log.set_up(current.log_level, current.log_format)
    try:
        with translating_errors():
            redis = connect(current.redis_url.get_secret_value(), retrying=True)
            worker = WorkerPool(current) if QUEUES[queue].pooled else jobs_worker(queue, redis, ALLOWED[queue])
    except Unavailable as error:
        print(f"REDIS_URL: {error}", file=sys.stderr)
        return 1
    log.emit("worker_started", queue=queue)
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
