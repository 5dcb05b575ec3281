"""Lists the queues, a row each. Imports nothing, so that bin/install can read it before there is a .venv.

A new queue is a row here and functions in tasks.py with `@task(queue=...)`; the installation, bin/dev, the doctor,
readyz and the metrics follow. A worker takes from one queue only: with two or more, RQ loses the job that a killed
worker had just taken.
"""

from __future__ import annotations

from typing import NamedTuple

EMAIL, JOBS = "email", "jobs"
BULK = "bulk"  # the list of mails that wait until the queue `email` is short; no worker takes from it


class Row(NamedTuple):
    """A queue, and how its jobs are run."""

    name: str
    pooled: bool  # one RQ worker a process, whose threads run a job each; else RQ's own, which forks for each job
    runs: tuple[str, ...]  # the functions that its workers may run, beside those of tasks.py that name the queue
    needs: tuple[str, ...] = ()  # the settings that its worker cannot do without


QUEUES = {
    row.name: row
    for row in (
        # Sending a mail is nearly all waiting, so WORKER_CONCURRENCY of them share a process.
        Row(EMAIL, pooled=True, runs=("tasks.deliver",), needs=("smtp_host",)),
        # A task may hang or crash, so each has a process of its own that can be killed.
        Row(JOBS, pooled=False, runs=()),
    )
}
