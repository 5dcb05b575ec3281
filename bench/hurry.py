"""Measures how long a mail of priority `high` takes while bulk mail waits that SMTP_RATE lets out for hours.

The worker starts with all of the bulk mail in front of it. Twice a second a mail in a hurry is accepted, and every
tenth time a normal one; the relay says when it took each.
"""

from __future__ import annotations

import time
from pathlib import Path
from statistics import quantiles

from bench.backlog import drafted, outbox_at
from bench.relay import RelayProcess
from bench.rig import Rig
from bench.sides import SIDES
from mail.message import Draft
from mail.outbox import Outbox

RATE = 14  # mails a second
BATCH = 100
SETTLED = 5  # seconds after the start that are not measured


def hurried(directory: Path, bulk: int, seconds: float) -> dict[str, float]:
    with RelayProcess(directory) as relay, Rig(directory) as rig:
        outbox = outbox_at(rig.redis_server.url)
        for first in range(0, bulk, BATCH):
            outbox.accept([mail(f"bulk{number}", "bulk") for number in range(first, min(first + BATCH, bulk))])
        SIDES["ours"].start_workers(rig, relay.environment() | {"SMTP_RATE": f"{RATE}/s"})
        rig.wait_until(lambda: relay.ask("report")["accepted"] > 0, "no mail was sent")
        time.sleep(SETTLED)
        began, sent = time.monotonic(), relay.ask("report")["accepted"]
        posted = accepted_meanwhile(outbox, began + seconds)
        took, sent = time.monotonic() - began, relay.ask("report")["accepted"] - sent
        rig.wait_until(lambda: posted.keys() <= relay.ask("moments").keys(), "not all were sent", seconds)
        moments = relay.ask("moments")
        waits = {name: moments[name] - then for name, then in posted.items()}
        high, normal = ([wait for name, wait in waits.items() if name.startswith(one)] for one in ("high", "normal"))
        percentiles = quantiles(high, n=100, method="inclusive")
        kept = 100 * sent / (RATE * took)
        return {"high_p50": percentiles[49], "high_p99": percentiles[98], "normal": max(normal), "kept": kept}


def accepted_meanwhile(outbox: Outbox, until: float) -> dict[str, float]:
    """Accepts mails until that moment. Returns when each was, by its recipient."""
    posted: dict[str, float] = {}
    while (now := time.monotonic()) < until:
        names = [f"high{len(posted)}"] + ([f"normal{len(posted)}"] if len(posted) % 10 == 0 else [])
        for name in names:
            outbox.accept([mail(name, name.rstrip("0123456789"))])
            posted[f"{name}@example.com"] = now
        time.sleep(0.5)
    return posted


def mail(name: str, priority: str) -> Draft:
    return drafted({"to": f"{name}@example.com", "subject": "Hello", "text": "Hello.", "priority": priority})
