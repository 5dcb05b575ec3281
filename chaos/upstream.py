"""A mail through two of ours in a row, by HTTP from one to the other, over a line that is cut at random.

`.venv/bin/python -m chaos.upstream --mails 10000`: a client gives mails to the first service, which posts each to the
second under its id; that one sends them to a relay, which writes down what it accepts. Between the two is a proxy that
cuts a share of all requests: before anything has arrived, in the middle of the request, after it (the answer is lost),
in the middle of the answer. Meanwhile workers of the first and the API of the second are killed with SIGKILL, again and
again. At the end each mail must have been accepted by the relay once, and none may be failed or in doubt anywhere.
"""

from __future__ import annotations

import argparse
import random
import shutil
import signal
import socket
import sys
import tempfile
import threading
import time
from collections import Counter
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from chaos.stage import TAKEN, Keeper
from mail.store import TOTALS
from tests.relay import Relay
from tests.servers import ROOT, Api, House, RedisServer, eventually, free_port

BATCH = 100
CUTS = ("before", "in the request", "answer lost", "in the answer")


class Proxy:
    """A context manager: carries requests to `target`, and cuts a share of them."""

    def __init__(self, target: int, share: float, seed: int) -> None:
        self.target, self.share, self.rng = target, share, random.Random(seed)
        self.cuts: Counter[str] = Counter()
        self.lock = threading.Lock()

    def __enter__(self) -> Proxy:
        self.listener = socket.create_server(("127.0.0.1", 0), backlog=128)
        self.port = self.listener.getsockname()[1]
        threading.Thread(target=self._serve, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.listener.shutdown(socket.SHUT_RDWR)
        self.listener.close()

    def _serve(self) -> None:
        with suppress(OSError):
            while True:
                client, _ = self.listener.accept()
                threading.Thread(target=self._carry, args=[client], daemon=True).start()

    def _chosen(self, size: int) -> tuple[str, int]:
        """Returns which cut it is to be, "" for none, and a place."""
        with self.lock:
            cut = self.rng.choice(CUTS) if self.rng.random() < self.share else ""
            self.cuts[cut] += 1
            return cut, self.rng.randrange(size)

    def _carry(self, client: socket.socket) -> None:
        with ExitStack() as parts, suppress(OSError):
            parts.enter_context(client)
            server = parts.enter_context(socket.create_connection(("127.0.0.1", self.target), timeout=30))
            asked, answered = (parts.enter_context(one.makefile("rb")) for one in (client, server))
            while request := message(asked):
                cut, at = self._chosen(len(request))
                if cut == "before":
                    return
                server.sendall(request[:at] if cut == "in the request" else request)
                if cut == "in the request":
                    return
                answer = message(answered)
                if cut == "answer lost":
                    return
                client.sendall(answer[: at % max(1, len(answer))] if cut else answer)
                if cut or not answer:
                    return


def message(stream: BinaryIO) -> bytes:
    """Reads one request, or one answer; b"" at the end."""
    head = b""
    while (line := stream.readline()) not in (b"\r\n", b""):
        head += line
    fields = [one.partition(b":") for one in head.lower().splitlines()[1:]]
    size = sum(int(value) for name, _, value in fields if name == b"content-length")
    return head + b"\r\n" + stream.read(size) if head else b""


class Result(NamedTuple):
    mails: int
    once: int
    doubled: int
    lost: int
    changed_id: int  # accepted with another Message-ID than the first service has given them
    totals: list[dict[str, int]]  # of each service
    cuts: dict[str, int]
    kills: int
    seconds: float

    @property
    def is_good(self) -> bool:
        wrong = [totals.get(name, 0) for totals in self.totals for name in ("failed", "unknown", "in_doubt", "expired")]
        return self.once == self.mails and not any((self.doubled, self.lost, self.changed_id, *wrong))

    def __str__(self) -> str:
        shown = [
            {name: totals.get(name, 0) for name in ("sent", "failed", "unknown", "in_doubt")} for totals in self.totals
        ]
        counted = f"{self.mails} mails, {self.once} once, {self.doubled} doubled, {self.lost} lost, {shown}"
        return f"{counted}, cuts {dict(self.cuts)}, {self.kills} killed, {self.seconds:.0f} s"


class Two:
    """The two services, the line between them, and the relay behind."""

    def __init__(self, directory: Path, share: float, seed: int, parts: ExitStack) -> None:
        self.rng, self.kills = random.Random(seed), 0
        self.relay = parts.enter_context(Relay())
        servers = [RedisServer(self._made(directory / f"redis-{number}")) for number in (1, 2)]
        self.clients = [parts.enter_context(parts.enter_context(server).client()) for server in servers]
        self.apis = [Api(free_port()), Api(free_port())]
        self.proxy = parts.enter_context(Proxy(self.apis[1].port, share, seed))
        relays = f'[up]\nkind = "resend"\nurl = "http://127.0.0.1:{self.proxy.port}"\napi_key = "full-key"\n'
        ways = [{"RELAYS": relays}, self.relay.environment(directory)]
        self.keepers = []
        for number, (server, api, way) in enumerate(zip(servers, self.apis, ways, strict=True)):
            place, listen = self._made(directory / f"service-{number + 1}"), f"127.0.0.1:{api.port}"
            house = parts.enter_context(House(place, server.url, LISTEN=listen, LOG_LEVEL="INFO", **way))
            del house.environment["RETRY_SCHEDULE"]
            self.keepers.append(parts.enter_context(Keeper(house)))
        for keeper in self.keepers:
            keeper.keep("api", [str(ROOT / "service.py")])
            keeper.keep("worker-0", [str(ROOT / "worker.py"), "email"])
        self.keepers[0].keep("worker-1", [str(ROOT / "worker.py"), "email"])
        for api in self.apis:
            eventually(lambda api=api: api.answers("/healthz"))  # type: ignore[misc]

    def _made(self, place: Path) -> Path:
        place.mkdir()
        return place

    def submit(self, mails: int) -> None:
        for start in range(0, mails, BATCH):
            some = range(start, min(mails, start + BATCH))
            batch = [{"to": f"m{one}@example.com", "subject": f"m{one}", "text": "Hello.\n.\n"} for one in some]
            status = 0
            while status not in TAKEN:
                with suppress(OSError):
                    status = self.apis[0].post("/emails/batch", batch, Idempotency_Key=f"batch-{start}").status

    def kill_some(self, every: float, over: threading.Event) -> None:
        """Kills a worker of the first service or the API of the second, now and then."""
        while not over.wait(self.rng.uniform(every / 2, every * 3 / 2)):
            self.kill(*self.rng.choice([(0, "worker-0"), (0, "worker-1"), (1, "api")]))

    def kill(self, service: int, name: str) -> None:
        with suppress(ProcessLookupError):
            self.keepers[service].signal_group(name, signal.SIGKILL)
            self.kills += 1

    def totals(self) -> list[dict[str, int]]:
        found: Any = [client.hgetall(TOTALS) for client in self.clients]
        return [{name.decode(): int(value) for name, value in one.items()} for one in found]

    def is_over(self, mails: int) -> bool:
        final = ("sent", "failed", "unknown", "expired")
        return all(sum(one.get(name, 0) for name in final) >= mails for one in self.totals())


def play(directory: Path, mails: int, *, share: float, every: float, seed: int, patience: float) -> Result:
    with ExitStack() as parts:
        two, over, began = Two(directory, share, seed, parts), threading.Event(), time.monotonic()
        killer = threading.Thread(target=two.kill_some, args=[every, over])
        killer.start()
        try:
            two.submit(mails)
            eventually(lambda: two.totals()[1].get("sent", 0) >= mails * 0.1, patience)
            two.kill(0, "worker-0")
            two.kill(1, "api")
            # Killed once a while, a mail may wait for as long as its lease: at the end nobody is killed any more.
            eventually(lambda: two.totals()[1].get("sent", 0) >= mails * 0.9, patience)
        finally:
            over.set()
            killer.join()
        with suppress(AssertionError):
            eventually(lambda: two.is_over(mails), patience)
        seconds = time.monotonic() - began
        copies = Counter(one.recipients[0].partition("@")[0] for one in two.relay.accepted)
        own = [one.message_id for one in two.relay.accepted]
        changed = sum(two.clients[0].exists(f"mail:{one[1:].partition('@')[0]}") == 0 for one in own)
        once = sum(copies[f"m{number}"] == 1 for number in range(mails))
        lost = sum(copies[f"m{number}"] == 0 for number in range(mails))
        cuts = {name: two.proxy.cuts[name] for name in CUTS}
        return Result(mails, once, mails - once - lost, lost, changed, two.totals(), cuts, two.kills, seconds)


def main() -> int:
    parser = argparse.ArgumentParser(prog="chaos.upstream", description="Cuts the line between two services.")
    parser.add_argument("--mails", type=int, default=1000)
    parser.add_argument("--share", type=float, default=0.3, help="of requests that are cut (default 0.3)")
    parser.add_argument("--every", type=float, default=10, help="seconds between kills (default 10)")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--patience", type=float, default=1800, help="seconds (default 1800)")
    options = parser.parse_args()
    directory = Path(tempfile.mkdtemp(prefix="chaos-upstream-"))
    result = play(directory, options.mails, **{name: value for name, value in vars(options).items() if name != "mails"})
    print(result, "" if result.is_good else f"\nNOT as promised; what was logged is in {directory}")
    if result.is_good:
        shutil.rmtree(directory)
    return 0 if result.is_good else 1


if __name__ == "__main__":
    sys.exit(main())
