"""The threads of one worker that run its jobs: `Senders`.

Each takes a job, runs it, and takes the next in the step that ends the last. Where there is none it is idle, and one
more thread waits for the queue in the name of all that are: so a long queue costs nobody a wait, and an empty one keeps
a single connection.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from queue import SimpleQueue
from typing import Any

from process.log import emit, where
from queues import keys
from queues.connection import Redis, announcements, why_unavailable
from queues.executions import Taken
from queues.workers import EmailWorker

WAIT = 5  # seconds for a job, in one command; less than the client's time-out
PAUSE = 0.5  # seconds between looks while no job may be taken


def log_and_pause(error: Exception) -> None:
    """Logs what is wrong, and waits a second, before the same is tried again."""
    if reason := why_unavailable(error):
        announcements.note(reason)
    else:
        emit("crashed", logging.ERROR, where=where(error))
    time.sleep(1)


class Sender(threading.Thread):
    """Runs one job after the other, until told to stop."""

    def __init__(self, senders: Senders) -> None:
        super().__init__(name="sender")
        self.senders, self.worker = senders, senders.worker
        self.busy_since: float | None = None  # time.monotonic(), while it runs a job
        self.unwritten: list[list[Any]] = []  # ends of jobs
        self.next: Taken | None = None  # the next job, if it was taken before its turn
        self.holds_next = ExitStack()

    def run(self) -> None:
        job_id: str | None = ""  # of the job to take; "": whichever is next
        while job_id is not None:
            try:
                job_id = self.turn(job_id)
            except Exception as error:
                log_and_pause(error)
                # A thread that is to stop waits for no Redis: what is unwritten is found when its lease ends.
                job_id = None if self.senders.stopping and not self.next else ""

    def turn(self, job_id: str) -> str | None:
        """Takes a job and runs it. Returns which is to be next, or None to end."""
        taken, self.next = self.next, None
        if taken:
            self.perform(taken)
            return ""
        if not job_id and self.senders.may_not_take():
            self.write_ends(0)
            return self.senders.wait()
        taken = self.take(job_id)
        announcements.note(None)
        if not taken:
            return self.senders.wait()
        self.perform(taken)
        return ""

    def take(self, job_id: str = "") -> Taken | None:
        self.write_ends(1)
        taken = self.worker.turns.take(self.unwritten[0] if self.unwritten else [], job_id)
        self.unwritten = []
        return taken

    def write_ends(self, but: int) -> None:
        """Writes the ends of jobs, `but` for so many, which go with the next step."""
        while len(self.unwritten) > but:
            self.worker.turns.end(self.unwritten[0])
            del self.unwritten[0]

    def perform(self, taken: Taken) -> None:
        self.busy_since = time.monotonic()
        taken.job.take_next = self.take_next
        try:
            with self.worker.held(taken):
                self.holds_next.close()
                ended = self.worker.perform(taken)
        finally:
            self.busy_since = None
        if ended:
            self.unwritten.append(ended)

    def take_next(self) -> tuple[str, Any]:
        """Takes the next job while one runs, if all are busy, and holds it until its turn comes."""
        if not (self.next or self.senders.idle or self.senders.may_not_take()):
            with suppress(Exception):  # the job that runs must not fail of it; the next step will say what is wrong
                self.next = self.take()
        if not self.next:
            return "", None
        self.holds_next.enter_context(self.worker.held(self.next))
        return self.next.job.id, self.next.job.beside


class Senders:
    """Keeps `number` senders, and the thread that waits for jobs, with a Redis client of its own."""

    def __init__(self, worker: EmailWorker, waiting: Redis, number: int, is_paused: Callable[[], bool]) -> None:
        self.worker, self.waiting, self.number, self.is_paused = worker, waiting, number, is_paused
        self.threads: list[Sender] = []
        self.waiter: threading.Thread | None = None
        self.asked = threading.Semaphore(0)  # as often as a sender waits for a job that nobody looks for yet
        self.idle = 0  # senders that wait
        self.found: SimpleQueue[str | None] = SimpleQueue()
        self.lock = threading.Lock()  # around `stopping` and what is put into `found`
        self.stopping = False

    def replenish(self) -> None:
        """Starts as many threads as are missing."""
        self.threads = [thread for thread in self.threads if thread.is_alive()]
        if self.stopping:
            return
        while len(self.threads) < self.number:
            self.threads.append(Sender(self))
            self.threads[-1].start()
        if not (self.waiter and self.waiter.is_alive()):
            self.waiter = threading.Thread(target=self._wait_for_jobs, name="waiter", daemon=True)
            self.waiter.start()

    @property
    def busy_since(self) -> list[float]:
        """Returns since when each sender that has a job has had it."""
        return [since for thread in self.threads if (since := thread.busy_since)]

    def may_not_take(self) -> bool:
        return self.stopping or self.is_paused()

    def stop(self) -> None:
        """Lets the senders end after the jobs in hand."""
        with self.lock:
            if not self.stopping:
                self.stopping = True
                for _ in range(self.number):
                    self.found.put(None)

    def join(self, seconds: float) -> None:
        """Waits for the senders to end, and forgets those that have."""
        until = time.monotonic() + seconds
        for thread in self.threads:
            thread.join(max(0.0, until - time.monotonic()))
        self.threads = [thread for thread in self.threads if thread.is_alive()]

    def wait(self) -> str | None:
        """Waits in a sender's thread for a job. Returns its id, or None to end."""
        with self.lock:
            self.idle += 1
        self.asked.release()
        found = self.found.get()
        with self.lock:
            self.idle -= 1
        return found

    def _wait_for_jobs(self) -> None:
        while not self.stopping:
            if self.asked.acquire(timeout=WAIT):
                found = False
                try:
                    found = self._find_one()
                except Exception as error:
                    log_and_pause(error)
                finally:
                    if not found:
                        self.asked.release()  # or a sender would wait for good

    def _find_one(self) -> bool:
        """Moves a job for an idle sender out of the queue, as RQ does, to where it is found if this process dies."""
        name = self.worker.queues[0].name
        if self.may_not_take():
            time.sleep(PAUSE)
            return False
        moved: Any = self.waiting.blmove(keys.queue(name), keys.intermediate(name), WAIT)
        announcements.note(None)
        if not moved:
            return False
        job_id = moved.decode(errors="replace")
        with self.lock:
            if not self.stopping:
                self.found.put(job_id)
                return True
        self._give_back(name, job_id)
        return True

    def _give_back(self, name: str, job_id: str) -> None:
        with self.waiting.pipeline() as pipeline:
            pipeline.lrem(keys.intermediate(name), 1, job_id)
            pipeline.lpush(keys.queue(name), job_id)
            pipeline.execute()
