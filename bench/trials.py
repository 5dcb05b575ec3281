"""One trial: one side, set up from nothing, measured once, taken down. `bench.measure` repeats them in turn.

Each returns its figures by name; which of them the report shows, and beside which target, is in `bench/report.py`.
Raises `NotMeasured` where there is nothing to show.
"""

from __future__ import annotations

import json
import smtplib
import ssl
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from http.client import HTTPException
from pathlib import Path
from statistics import quantiles
from typing import Any
from urllib.parse import urlsplit

from bench.conversation import PASSWORD, USERNAME
from bench.hurry import hurried
from bench.load import Request, put_load
from bench.longqueue import compare
from bench.relay import RelayProcess
from bench.rig import NotMeasured, Rig, cpu_seconds, pss
from bench.side import KEY, SENDERS
from bench.sides import SIDES
from tests.servers import Api, free_port

Figures = dict[str, float]
CONNECTIONS = 16
BATCH = 100
PAUSE = 0.02  # seconds between mails of an idle system


@dataclass
class Size:
    """Says how much is measured in one trial."""

    seconds: float = 10  # of requests
    mails: int = 4000  # queued before the worker starts
    sending: float = 10  # seconds that the worker is watched, if it has not sent all by then
    single: int = 200  # mails, one after another
    few: int = 1000
    many: int = 1_000_000
    run: int = 500  # of the queued, how many are really sent
    bulk: int = 100_000
    hurrying: float = 120  # seconds


QUICK = Size(seconds=2, mails=150, sending=3, single=30, many=10_000, run=60, bulk=1000, hurrying=6)


# --- accepting --------------------------------------------------------------------------------------------------------


def post(port: int, path: str, body: Any) -> Request:
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {KEY}"}
    return Request(f"http://127.0.0.1:{port}{path}", "POST", json.dumps(body), headers)


def status(request: Request) -> int:
    """Returns the status of one answer; 0 where there is none."""
    url = urlsplit(request.url)
    with suppress(OSError, HTTPException):
        api = Api(url.port or 80)
        return api.call(request.method, url.path, headers=dict(request.headers), raw=request.body.encode()).status
    return 0


def accept(name: str, size: Size, directory: Path) -> Figures:
    """Measures requests a second behind nginx, and the memory of the API processes after them."""
    side = SIDES[name]
    with Rig(directory) as rig:
        api_port = free_port()
        api = side.start_api(rig, api_port)
        port = rig.nginx(api_port)
        request = post(port, "/start-job", {"name": "Ada", "email": "ada@example.com"})
        rig.wait_until(lambda: status(request) == 202, "POST /start-job was not answered 202")
        put_load(request, seconds=1, connections=CONNECTIONS, directory=directory)  # to warm up
        figures = measured(request, size, directory)
        figures["memory"] = pss([api])
        return figures | ({} if side.framework else accept_batches(port, size, directory))


def measured(request: Request, size: Size, directory: Path) -> Figures:
    load = put_load(request, seconds=size.seconds, connections=CONNECTIONS, directory=directory)
    if load.failed:
        raise NotMeasured(f"{load.failed} requests were not answered 2xx")
    return {"rate": load.rate, "p50": load.p50, "p99": load.p99}


def accept_batches(port: int, size: Size, directory: Path) -> Figures:
    mails = [{"to": f"m{n}@example.com", "subject": "Hello", "text": "Hello Ada."} for n in range(BATCH)]
    request = post(port, "/emails/batch", mails)
    answer = status(request)
    if answer not in (200, 202):
        raise NotMeasured(f"POST /emails/batch was answered {answer}")
    return {"batched": BATCH * measured(request, size, directory)["rate"]}


def load_ceiling(directory: Path) -> float:
    """Measures the requests a second that the load generator gets out of nginx alone."""
    with Rig(directory) as rig:
        request = Request(f"http://127.0.0.1:{rig.nginx(free_port())}/nothing")
        rig.wait_until(lambda: status(request) == 200, "nginx did not answer")
        return put_load(request, seconds=2, connections=CONNECTIONS, directory=directory).rate


# --- sending ----------------------------------------------------------------------------------------------------------


def send(name: str, size: Size, directory: Path, latency: float = 0, senders: int = SENDERS) -> Figures:
    """Measures mails a second from the first to the last acceptance; CPU and memory of the workers meanwhile."""
    side = SIDES[name]
    with RelayProcess(directory, latency=latency) as relay, Rig(directory) as rig:
        side.fill(rig, size.mails)
        workers = side.start_workers(rig, relay.environment(), senders)
        rig.wait_until(lambda: relay.ask("report")["accepted"] > 0, "no mail was sent")
        began, before = time.monotonic(), relay.ask("report")
        cpu, relay_cpu = cpu_seconds(workers), cpu_seconds([relay.process])
        while (seen := relay.ask("report"))["accepted"] < size.mails and time.monotonic() < began + size.sending:
            time.sleep(0.1)
        took, sent = time.monotonic() - began, seen["accepted"] - before["accepted"]
        if not sent:
            raise NotMeasured(f"one mail was sent, and no other: {rig.last_words()}")
        return {
            "rate": (seen["accepted"] - 1) / (seen["last"] - seen["first"]),
            "cpu": 1000 * (cpu_seconds(workers) - cpu) / sent,
            "memory": pss(workers),
            "relay": 100 * (cpu_seconds([relay.process]) - relay_cpu) / took,
            "doubled": seen["doubled"],
            "lost": size.mails - seen["recipients"] if seen["accepted"] >= size.mails else 0,
        }


def idle(name: str, size: Size, directory: Path) -> Figures:
    """Measures milliseconds from POST to the relay's 250, one mail at a time."""
    side = SIDES[name]
    with RelayProcess(directory) as relay, Rig(directory) as rig:
        port = free_port()
        side.start_api(rig, port)
        side.start_workers(rig, relay.environment())
        first = post(port, "/start-job", {"name": "Ada", "email": "first@example.com"})
        rig.wait_until(lambda: status(first) == 202, "POST /start-job was not answered 202")
        reached(relay, 1)
        posted = {}
        for number in range(size.single):
            time.sleep(PAUSE)
            address = f"m{number}@example.com"
            posted[address] = time.monotonic()
            if status(post(port, "/start-job", {"name": "Ada", "email": address})) != 202:
                raise NotMeasured("a mail was not accepted")
            reached(relay, number + 2)
        moments = relay.ask("moments")
    percentiles = quantiles(
        [1000 * (moments[address] - then) for address, then in posted.items()], n=100, method="inclusive"
    )
    return {"p50": percentiles[49], "p99": percentiles[98]}


def reached(relay: RelayProcess, mails: int) -> None:
    if relay.ask(f"wait {mails}")["accepted"] < mails:
        raise NotMeasured("a mail that was accepted was not sent")


def queue(_: str, size: Size, directory: Path) -> Figures:
    """Measures the cost of a mail to accept and to send while few or many others are queued."""
    return compare(directory, size.few, size.many, size.run)


def hurry(_: str, size: Size, directory: Path) -> Figures:
    """Measures how long mail in a hurry takes while bulk mail waits under SMTP_RATE."""
    return hurried(directory, size.bulk, size.hurrying)


def relay_ceiling_kept(directory: Path) -> float:
    """Measures the mails a second that one core of the relay takes over one connection, command by command."""
    with RelayProcess(directory) as relay, smtplib.SMTP("127.0.0.1", relay.port) as client:
        client.starttls(context=ssl.create_default_context(cafile=relay.ca_file))
        client.login(USERNAME, PASSWORD)
        before = cpu_seconds([relay.process])
        for number in range(1000):
            client.sendmail("a@example.com", [f"m{number}@example.com"], f"Message-ID: <{number}>\r\n\r\nHello.")
        return 1000 / (cpu_seconds([relay.process]) - before)


def relay_ceiling(directory: Path) -> float:
    """Measures the same, each in a session of its own with STARTTLS and AUTH."""
    with RelayProcess(directory) as relay, Rig(directory) as rig:
        side = SIDES["dramatiq"]
        side.fill(rig, 300)
        before = cpu_seconds([relay.process])
        side.start_workers(rig, relay.environment())
        rig.wait_until(lambda: relay.ask("report")["accepted"] >= 300, "the relay's ceiling")
        return 300 / (cpu_seconds([relay.process]) - before)


Trial = Callable[[str, Size, Path], Figures]
TRIALS: dict[str, Trial] = {
    "accept": accept,
    "send20": partial(send, latency=0.02),
    "send0": send,
    "send100": partial(send, latency=0.1, senders=64),
    "idle": idle,
    "queue": queue,
    "hurry": hurry,
}
