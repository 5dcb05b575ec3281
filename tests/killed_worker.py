"""worker.py, killed with SIGKILL when it reaches a named point: `killed_worker.py QUEUE POINT [N | MAIL]`.

The points are put in from here, so that the product carries no hook for its tests. Each lies between two lines of
tasks.deliver or of RQ, with nothing flushed or closed afterwards, as `kill -9` or a power cut would have it.

With a number it dies when it gets there for the Nth time, with a mail's id when it gets there with that mail.
"""

from __future__ import annotations

import itertools
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).parent.parent))

import rq.worker.base
from rq import Queue
from rq.registry import ScheduledJobRegistry

import worker
from mail import delivery
from mail.claim import Claim
from queues import executions, workers
from smtp import session


class Point(NamedTuple):
    """Before this function runs, of the visits that count."""

    owner: Any
    name: str
    counts: Callable[..., object] = lambda *_: True


POINTS = {
    "after pop, before RQ's registry": Point(executions.Turns, "take", lambda _, ended, job_id: job_id),
    "after claim": Point(delivery, "take_up"),
    "during connect": Point(session, "connect_any"),
    "before DATA": Point(session.Session, "send_envelope"),
    "before the final dot": Point(Claim, "mark_in_doubt"),
    "after the final dot, before the reply": Point(session.Session, "final_reply"),
    "after 250, before the marker": Point(delivery, "record"),
    "after the marker, before RQ's bookkeeping": Point(workers.EmailWorker, "handle_job_success"),
    "after the mail is delayed, before RQ's bookkeeping": Point(workers.EmailWorker, "handle_job_retry"),
    "after RQ says scheduled, before it schedules": Point(Queue, "schedule_job"),
    "after the mail is given up, before RQ's bookkeeping": Point(workers.EmailWorker, "handle_job_failure"),
    # RQ's scheduler runs on the main thread; in its tick it alone takes jobs out of the registry.
    "in the scheduler's tick": Point(ScheduledJobRegistry, "remove"),
    "in maintenance": Point(rq.worker.base, "clean_registries"),
}


def die() -> None:
    os.write(2, b"killed at the point\n")
    os.kill(os.getpid(), signal.SIGKILL)


def dying(point: Point, when: str) -> Callable[..., Any]:
    original = getattr(point.owner, point.name)
    visits = itertools.count(1)  # of all threads

    def visited(*args: Any, **kwargs: Any) -> Any:
        if not point.counts(*args):
            return original(*args, **kwargs)
        visit = next(visits)
        if visit == int(when) if when.isdigit() else any(getattr(one, "id", one) == when for one in args):
            die()
        return original(*args, **kwargs)

    return visited


if __name__ == "__main__":
    _, queue, name, *when = sys.argv
    sys.argv[2:] = []
    setattr(POINTS[name].owner, POINTS[name].name, dying(POINTS[name], *when or ["1"]))
    sys.exit(worker.main())
