"""Says what a job that runs, in this thread, may ask of RQ: when it was queued, what was taken with it, to run again.

RQ: https://python-rq.org/docs/jobs/#accessing-the-current-job-from-within-the-job-function
"""

from __future__ import annotations

import socket
from collections.abc import Callable
from typing import Any

from rq import Retry as Retry
from rq import get_current_job


def queued_at() -> float:
    """Returns when the job that runs in this thread was queued, in seconds since 1970; 0 outside of a job."""
    job = get_current_job()
    return job.enqueued_at.timestamp() if job and job.enqueued_at else 0


def taken_with_it() -> Any:
    """Returns what the script that took the job of this thread has done beside, if it has; see queues.executions."""
    return getattr(get_current_job(), "beside", None)


def take_next() -> tuple[str, Any]:
    """Takes the next job for this thread already, while it runs this one, if nobody idle could have it. Returns its id
    and what the script has done beside; "" and None if there is none."""
    take: Callable[[], tuple[str, Any]] | None = getattr(get_current_job(), "take_next", None)
    return take() if take else ("", None)


def run_by() -> str:
    """Returns the machine, and the worker that runs the job of this thread, if there is one: `host/1a2b3c4d`."""
    job = get_current_job()
    return "/".join([socket.gethostname(), *([job.worker_name[:8]] if job and job.worker_name else [])])


def allow_exceptions(number: int) -> None:
    """Sets after how many more exceptions RQ tries the job that runs in this thread again; at 0 it fails for good."""
    if job := get_current_job():
        job.retries_left = number


def run_again_in(seconds: float) -> Retry:
    """Returns what a function returns to be run again. RQ counts this apart from the tries after an exception."""
    return Retry(max=1_000_000, interval=max(1, round(seconds)))
