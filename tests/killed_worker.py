"""worker.py, killed with SIGKILL when it reaches a named point: `killed_worker.py QUEUE POINT`.

The points are put in from here, so that the product carries no hook for its tests. Each lies between two lines of
tasks.deliver or of RQ, with nothing flushed or closed afterwards, as `kill -9` or a power cut would have it.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

from rq import Queue

import tasks
import worker
from mail.outbox import Claim

POINTS: dict[str, tuple[Any, str]] = {
    "after claim": (tasks, "_take_up"),
    "before the final dot": (Claim, "before_dot"),
    "after 250, before the marker": (tasks, "_record"),
    "after the marker, before RQ's bookkeeping": (worker.EmailWorker, "handle_job_success"),
    "after the mail is delayed, before RQ's bookkeeping": (worker.EmailWorker, "handle_job_retry"),
    "after RQ says scheduled, before it schedules": (Queue, "schedule_job"),
    "after the mail is given up, before RQ's bookkeeping": (worker.EmailWorker, "handle_job_failure"),
}


def die(*_: object, **__: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    owner, name = POINTS[sys.argv.pop()]
    setattr(owner, name, die)
    sys.exit(worker.main())
