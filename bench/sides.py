"""All sides, by the names that bench/targets.py has for them. All but the defaults send equally many mails at once."""

from __future__ import annotations

from bench.postfix import Postfix
from bench.side import Side
from tests.servers import ROOT

OURS = (str(ROOT / "worker.py"), "email")
CELERY = ("-m", "celery", "--app", "celery_app", "--quiet", "worker")
CELERY_16 = (*CELERY, "--concurrency", "{each}")
CELERY_THREADS = (*CELERY_16, "--pool", "threads", "--hostname", "{number}@%h")
DRAMATIQ = ("-m", "dramatiq", "--processes", "2", "--threads", "{each}", "dramatiq_app")
TASKIQ = ("-m", "taskiq", "worker", "--workers", "2", "--max-async-tasks", "{each}", "taskiq_app:broker")
RQ = ("-m", "rq.cli", "worker", "--quiet")
RQ_SIMPLE = (*RQ, "--worker-class", "rq.worker.SimpleWorker")
SIDES = {
    "ours": Side(None, OURS),
    "ours2": Side(None, OURS, processes=2),
    "celery": Side("celery", CELERY),
    "celery16": Side("celery", CELERY_16),
    "celery16_warm": Side("celery", CELERY_16, warm=True),
    "celery_threads_warm": Side("celery", CELERY_THREADS, warm=True),
    "celery_threads2_warm": Side("celery", CELERY_THREADS, processes=2, commands=2, warm=True),
    "dramatiq": Side("dramatiq", DRAMATIQ, processes=2),
    "dramatiq_warm": Side("dramatiq", DRAMATIQ, processes=2, warm=True),
    "taskiq": Side("taskiq", TASKIQ, processes=2),
    "taskiq_warm": Side("taskiq", TASKIQ, processes=2, warm=True),
    "bullmq": Side("bullmq", ("worker.js",), processes=2, commands=2, warm=True),
    "rq": Side("rq", RQ),  # forks for each mail, so there is nothing to keep
    "rq_simple": Side("rq", RQ_SIMPLE),
    "rq_simple_warm": Side("rq", RQ_SIMPLE, warm=True),
    "postfix": Postfix("postfix"),
}
