"""The measurements and what is hoped for: each one's sides, figures and targets.

A target compares one figure of ours with a peer's from the same round, or, where there is no peer, with a limit. Where
the peer is `BEST`, it is the one of them with the highest median. Postfix is none of them: it is shown beside them.
"""

from __future__ import annotations

from typing import NamedTuple

BEST = "best"  # as `Target.other`
CHAMPION = "postfix"


class Figure(NamedTuple):
    key: str
    heading: str
    form: str = ",.0f"  # as format() takes it


class Target(NamedTuple):
    """Asks that `figure` of `side`, divided by `other`'s `against` (empty: the same), is `relation` than `limit`."""

    words: str
    side: str
    figure: str
    relation: str = ""  # there is no target, the figure is only shown
    limit: float = 0
    other: str = ""  # nobody: the figure itself; or BEST
    against: str = ""

    def is_met(self, value: float) -> bool:
        return {"≥": value >= self.limit, ">": value > self.limit, "≤": value <= self.limit, "<": value < self.limit}[
            self.relation
        ]


class Measurement(NamedTuple):
    title: str
    words: str
    sides: dict[str, str]  # in the order in which they take turns, with their names
    figures: list[Figure]
    targets: list[Target]
    drawn: str = ""  # the figure that the plot shows
    limit: tuple[float, str] | None = None  # that no side can pass, with how it comes about


API = "async-email (Waitress, 2 processes)"
OURS = "async-email, 1 process"
SENDERS = {
    "ours": OURS,
    "ours2": "async-email, 2 processes",
    "celery": "Celery, default",
    "celery16": "Celery, 16 processes",
    "celery16_warm": "Celery, 16 processes, warm",
    "celery_threads_warm": "Celery, 16 threads, warm",
    "celery_threads2_warm": "Celery, 2 × 8 threads, warm",
    "dramatiq": "dramatiq, 2 × 8 threads",
    "dramatiq_warm": "dramatiq, 2 × 8 threads, warm",
    "taskiq": "taskiq + aiosmtplib, 2 × 8",
    "taskiq_warm": "taskiq + aiosmtplib, 2 × 8, warm",
    "bullmq": "BullMQ + nodemailer, 2 × 8, warm",
    "rq": "RQ, forking",
    "rq_simple": "RQ, SimpleWorker",
    "rq_simple_warm": "RQ, SimpleWorker, warm",
    CHAMPION: "Postfix",
}
SENDERS_64 = {
    "ours": OURS,
    "ours2": "async-email, 2 processes",
    "celery_threads2_warm": "Celery, 2 × 32 threads, warm",
    "dramatiq_warm": "dramatiq, 2 × 32 threads, warm",
    "taskiq_warm": "taskiq + aiosmtplib, 2 × 32, warm",
    "bullmq": "BullMQ + nodemailer, 2 × 32, warm",
    CHAMPION: "Postfix",
}
SENDING = [
    Figure("rate", "mails/s", ",.1f"),
    Figure("cpu", "CPU s per 1,000 mails", ".2f"),
    Figure("memory", "memory, MB (PSS)"),
    Figure("relay", "relay's core, % busy"),
    Figure("doubled", "sent twice"),
    Figure("lost", "lost"),
]

MEASUREMENTS = {
    "accept": Measurement(
        "Accepting a mail",
        "`POST /start-job` behind the same nginx, 16 connections, for {seconds:g} s.",
        {"ours": API, "celery": "Flask + Celery (Gunicorn, 2 workers)"},
        [
            Figure("rate", "requests/s"),
            Figure("p50", "p50, ms", ".1f"),
            Figure("p99", "p99, ms", ".1f"),
            Figure("memory", "memory, MB (PSS)"),
            Figure("batched", "mails/s in batches of 100"),
        ],
        [
            Target("requests/s", "ours", "rate", "≥", 2, "celery"),
            Target("p99", "ours", "p99", "≤", 1, "celery"),
            Target("memory", "ours", "memory", "≤", 0.5, "celery"),
            Target("mails/s in batches, to the peer's single posts", "ours", "batched", "≥", 8, "celery", "rate"),
        ],
        "rate",
    ),
    "send20": Measurement(
        "Sending, a relay 20 ms away",
        "{mails:,} mails are queued, then the worker starts and is watched until they are sent, {sending:g} s at most. "
        "STARTTLS and AUTH.",
        SENDERS,
        SENDING,
        [
            Target("mails/s, 2 processes", "ours2", "rate", "≥", 3, BEST),
            Target("mails/s, 1 process", "ours", "rate", other=BEST),
            Target("mails/s, 2 processes, to Postfix", "ours2", "rate", other=CHAMPION),
            Target("mails/s, 1 process", "ours", "rate", "≥", 550),
            Target("memory, 1 process, to Celery's 16 processes", "ours", "memory", "≤", 1 / 3, "celery16"),
        ],
        "rate",
        (16 / 0.02, "16 sessions ÷ 20 ms"),
    ),
    "send0": Measurement(
        "Sending, a relay without latency",
        "The same with a relay on loopback.",
        SENDERS,
        SENDING,
        [
            Target("mails/s, 2 processes", "ours2", "rate", "≥", 2, BEST),
            Target("mails/s, 1 process", "ours", "rate", other=BEST),
            Target("mails/s, 2 processes, to Postfix", "ours2", "rate", other=CHAMPION),
            Target("CPU ms a mail, 1 process", "ours", "cpu", "≤", 1.2),
            Target("CPU ms a mail, 2 processes", "ours2", "cpu", "≤", 1.2),
        ],
        "rate",
    ),
    "send100": Measurement(
        "Sending, a relay 100 ms away, 64 mails at once",
        "The same with `WORKER_CONCURRENCY=64`, and as many for those peers that can have them.",
        SENDERS_64,
        SENDING,
        [
            Target("mails/s, 2 processes", "ours2", "rate", other=BEST),
            Target("mails/s, 1 process", "ours", "rate", "≥", 500),
        ],
        "rate",
        (64 / 0.1, "64 sessions ÷ 100 ms"),
    ),
    "idle": Measurement(
        "One mail in an idle system",
        "From `POST /start-job` to the relay's 250, {single} mails one after another, loopback, STARTTLS and AUTH.",
        {"ours": OURS},
        [Figure("p50", "p50, ms", ".1f"), Figure("p99", "p99, ms", ".1f")],
        [
            Target("p50, ms", "ours", "p50", "<", 5),
            Target("p99, ms", "ours", "p99", "<", 12),
        ],
    ),
    "queue": Measurement(
        "A long queue",
        "What one mail of 1 KB costs while {few:,} or {many:,} are queued, {run} mails each: accepted by turns into "
        "both queues, then sent from both at once.",
        {"ours": OURS},
        [
            Figure("accept_short", "accept, short queue, ms", ".2f"),
            Figure("accept_long", "long queue", ".2f"),
            Figure("send_short", "send, short queue, ms", ".2f"),
            Figure("send_long", "long queue", ".2f"),
            Figure("found", "`GET /emails?to=`, long queue, p99, ms", ".1f"),
            Figure("bytes", "Redis, bytes per mail"),
        ],
        [
            Target("accept, long to short", "ours", "accept_long", "≤", 1.1, "ours", "accept_short"),
            Target("send, long to short", "ours", "send_long", "≤", 1.1, "ours", "send_short"),
            Target("`GET /emails?to=` among all of them, p99, ms", "ours", "found", "<", 20),
            Target("Redis, bytes per queued mail of 1 KB", "ours", "bytes", "≤", 2560),
        ],
    ),
    "hurry": Measurement(
        "A mail in a hurry",
        "{bulk:,} mails of priority `bulk` wait under `SMTP_RATE=14/s`. For {hurrying:g} s, twice a second, one of "
        "priority `high` is accepted, and every tenth time a normal one: from there to the relay's 250.",
        {"ours": OURS},
        [
            Figure("high_p50", "high, p50, s", ".2f"),
            Figure("high_p99", "high, p99, s", ".2f"),
            Figure("normal", "normal, longest, s", ".1f"),
            Figure("kept", "sent, % of the rate", ".1f"),
        ],
        [
            Target("high, p99, s", "ours", "high_p99", "<", 2),
            Target("sent, % of the rate", "ours", "kept", "≥", 95),
        ],
    ),
}
