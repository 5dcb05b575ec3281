"""Measures whether a mail costs more while a million others wait, a short queue and a long one at the same time; and
how long it takes to find the mails of one recipient among the million.

Each has a Redis, a relay and a worker of its own. Mails are accepted by turns, and both workers send at once, so that
what else the machine does meets both alike; the difference that is looked for is smaller than that.
"""

from __future__ import annotations

import os
import time
from contextlib import ExitStack
from pathlib import Path
from statistics import median, quantiles

from bench.backlog import copy, drafted, outbox_at
from bench.relay import RelayProcess
from bench.rig import NotMeasured, Rig
from bench.side import KEY
from bench.sides import SIDES
from tests.servers import Api, free_port

PATIENCE = 300  # seconds until those in front are sent


class Backlog:
    """Holds a queue with `run` mails in front that are really sent, and copies behind them."""

    def __init__(self, parts: ExitStack, directory: Path, queued: int, run: int) -> None:
        directory.mkdir()
        self.run = run
        self.relay = parts.enter_context(RelayProcess(directory))
        # Rewriting the file of a million mails takes a while, and is not what is measured.
        self.rig = parts.enter_context(Rig(directory, "--auto-aof-rewrite-percentage", "0"))
        self.outbox = outbox_at(self.rig.redis_server.url)
        for number in range(run):
            mail_id, _ = self.accept(number)
        with self.rig.redis_server.client() as redis:
            self.weight = copy(redis, mail_id, queued - run)

    def accept(self, number: int) -> tuple[str, float]:
        """Accepts a mail with a text of 1 KB. Returns its id, and how many milliseconds it took."""
        mail = drafted({"to": f"m{number}@example.com", "subject": "A kilobyte", "text": "1234567 " * 128})
        began = time.monotonic()
        mail_id = self.outbox.accept([mail]).id
        return mail_id, 1000 * (time.monotonic() - began)

    def finding(self, searches: int) -> list[float]:
        """Returns the milliseconds of `GET /emails?to=` for the recipients of those in front, over HTTP."""
        port, times = free_port(), list[float]()
        SIDES["ours"].start_api(self.rig, port)
        api = Api(port, KEY)
        self.rig.wait_until(lambda: api.answers("/healthz"), "the API did not answer")
        for number in range(searches):
            began = time.monotonic()
            answer = api.get(f"/emails?to=m{number % self.run}@example.com")
            times.append(1000 * (time.monotonic() - began))
            if not answer.body["data"]:
                raise NotMeasured("GET /emails did not find a mail")
        return times

    def start_worker(self) -> None:
        SIDES["ours"].start_workers(self.rig, self.relay.environment())

    def sending(self) -> float:
        """Returns the milliseconds from one of those in front to the next."""
        self.rig.wait_until(self._is_sent, "the mails were not sent", PATIENCE)
        moments = sorted(self.relay.ask("moments").values())
        return float(1000 * (moments[self.run - 1] - moments[0]) / (self.run - 1))

    def _is_sent(self) -> bool:
        return bool(self.relay.ask("report")["accepted"] >= self.run)


def compare(directory: Path, few: int, many: int, run: int) -> dict[str, float]:
    with ExitStack() as parts:
        queues = {
            name: Backlog(parts, directory / name, queued, run) for name, queued in (("short", few), ("long", many))
        }
        os.sync()  # a million mails are gigabytes of Redis' file, whose writing would be measured with what follows
        times = [(queues["short"].accept(number)[1], queues["long"].accept(number)[1]) for number in range(run)]
        figures = {"bytes": queues["long"].weight}
        figures["accept_short"], figures["accept_long"] = map(median, zip(*times, strict=True))
        figures["found"] = quantiles(queues["long"].finding(2 * run), n=100, method="inclusive")[98]
        for queue in queues.values():
            queue.start_worker()
        return figures | {f"send_{name}": queue.sending() for name, queue in queues.items()}
