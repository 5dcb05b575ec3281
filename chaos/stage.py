"""One scene's stage: Redis, the API, e-mail workers and a relay of its own, a client that submits, a keeper.

Everything is real but the relay, which writes down each mail that it accepts and misbehaves on request. The
processes run as an operator runs them, with default settings but for addresses, on loopback and free ports. The client
is a good one: it sends each mail with an Idempotency-Key, and the same request again until it is accepted. The
keeper starts again whatever ends, as systemd does with Restart=always.
"""

from __future__ import annotations

import http.client
import json
import os
import random
import shutil
import signal
import smtplib
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import redis
import trustme

from chaos.proxy import Proxy
from mail.states import FINAL
from ops.dev import bundled_server
from tests.conversations import server_context, write_ca
from tests.scripted_relay import ScriptedRelay, Step, take
from tests.servers import ROOT, Api, House, RedisServer, eventually, free_port

QUICK = ",".join(["1s"] * 50)  # a RETRY_SCHEDULE that no scene uses up
PROMISE = 120  # seconds in which what a killed worker held is sent, with default settings and no operator
REFUSED = "refused-"  # how an address begins that the relay refuses for good, if the scene wants that
TAKEN = (200, 202)  # how a request is answered that the API has stored
REPEAT_AFTER = 0.5  # seconds until the client sends a request again
TESTS = ROOT / "tests"


def programs(choice: str) -> dict[str, str]:
    """Returns the servers asked for, by name. Raises SystemExit where one is missing."""
    found = {"redis": shutil.which("redis-server"), "valkey": bundled_server() or shutil.which("valkey-server")}
    wanted = ["valkey", "redis"] if choice == "both" else [choice]
    for name in wanted:
        if not found[name]:
            raise SystemExit(f"there is no {name}-server on PATH; --server takes another")
    return {name: str(found[name]) for name in wanted}


@dataclass(frozen=True)
class Scene:
    """Describes a fault, and what it needs to be played."""

    name: str
    fault: str  # one sentence
    play: Callable[[Stage], None]  # returns when the fault is over
    settings: Mapping[str, str] = field(default_factory=dict)
    workers: int = 1
    dies_at: str = ""  # a point of tests/killed_worker.py at which the first worker dies
    secure: bool = False  # the relay wants STARTTLS and a login
    proxied: bool = False  # Redis is reached through a proxy
    pipelined: bool = False  # the relay surely announces PIPELINING
    clocked: bool = False  # the wall clock can be set
    held: bool = True  # whether it is worth playing with ON_DOUBT=hold, too
    uncounted: bool = False  # the fault may cost no mail an attempt
    refuses: bool = False  # some recipients are refused for good
    spread: float = 5  # seconds over which the mails are submitted
    by_smtp: bool = False  # the client knows nothing of us: the same mail again until it hears 250
    standby: bool = False  # there is a second relay, by RELAYS
    times: int = 1  # so many times the usual number of mails
    limit: float = PROMISE  # seconds from the end of the fault until every mail is final


@dataclass(frozen=True)
class Mail:
    key: str
    recipients: list[str]

    @property
    def body(self) -> dict[str, Any]:
        return {"to": self.recipients, "subject": self.key, "text": "Hello.\n.\nThat was a dot."}


class Keeper:
    """Starts each process again that ends, by itself or by our hand; not while somebody else holds its lock."""

    def __init__(self, house: House) -> None:
        self.house = house
        self.commands: dict[str, list[str]] = {}
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        self.exits: list[tuple[str, int]] = []
        self.lock = threading.RLock()
        self.over = threading.Event()
        self.thread = threading.Thread(target=self._watch, name="keeper")

    def keep(self, name: str, command: list[str], first: list[str] | None = None) -> None:
        """Starts a process, and again when it ends: `first` the first time, if it is given, then `command`."""
        with self.lock:
            self.commands[name] = command
            self.processes[name] = self.house.run(name, *(first or command))

    def _watch(self) -> None:
        while not self.over.wait(0.1):
            with self.lock:
                for name, process in self.processes.items():
                    code = process.poll()
                    if code is not None:
                        self.exits.append((name, code))
                        self.processes[name] = self.house.run(name, *self.commands[name])

    def signal_group(self, name: str, number: signal.Signals) -> None:
        with self.lock:
            os.killpg(self.processes[name].pid, number)

    def __enter__(self) -> Keeper:
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.over.set()
        self.thread.join()


class Stage:
    """Holds the processes and the client of a scene, from `set_up` on. Faults use its public part."""

    def __init__(
        self, scene: Scene, directory: Path, *, seed: int, mails: int, on_doubt: str, program: str | None
    ) -> None:
        self.scene = scene
        self.directory = directory
        self.on_doubt = on_doubt
        self.rng = random.Random(f"{seed} {scene.name}")
        self.mails = [self._mail(number) for number in range(mails * scene.times)]
        self.redis_server = RedisServer(directory, program=program)
        self.proxy = Proxy(self.redis_server.port)
        self.authority = trustme.CA()
        self.relay = self._make_relay()
        self.second = ScriptedRelay({"BODY": lambda _: "", ".": take}, port=free_port(), patience=300)  # for `standby`
        self.api = Api(free_port())
        self.smtp_port = free_port()
        self.pauses = [self.rng.uniform(0, 2 * scene.spread / len(self.mails)) for _ in self.mails]
        self.accepted: dict[str, str] = {}  # key -> id
        self.accepted_at: dict[str, float] = {}  # key -> moment, as all of time.monotonic()
        self.answers: Counter[int] = Counter()  # by HTTP status; 0 for none
        # Keys of mails that must end as failed.
        self.doomed = {mail.key for mail in self.mails if any(who.startswith(REFUSED) for who in mail.recipients)}
        self.has_stopped_a_worker = False  # one that went on later, so that it and another may have sent
        self.fault_over = 0.0
        self.back_at = 0.0  # when the first of two relays was well again
        self.submitted = False
        self.over = threading.Event()

    def _mail(self, number: int) -> Mail:
        people = self.rng.choice((1, 1, 1, 2, 3))
        names = [f"m{number}-{person}" for person in range(people)]
        if self.scene.refuses and (number == 0 or self.rng.random() < 0.4):
            names[-1] = REFUSED + names[-1]
        return Mail(f"m{number}", [f"{name}@example.com" for name in names])

    def _make_relay(self) -> ScriptedRelay:
        # Plain dialogue or in groups of commands: what the relay lets us do, as it falls.
        offers = self.rng.choice([[], ["PIPELINING"]]) if not self.scene.pipelined else ["PIPELINING"]
        offers = offers + (["STARTTLS", "AUTH PLAIN"] if self.scene.secure else [])
        context = server_context(self.authority) if self.scene.secure else None
        return ScriptedRelay(
            {"BODY": lambda _: "", ".": take}, offers=offers, tls=context, port=free_port(), patience=300
        )

    @contextmanager
    def set_up(self) -> Iterator[Stage]:
        with ExitStack() as parts:
            parts.enter_context(self.redis_server)
            if self.scene.proxied:
                parts.enter_context(self.proxy)
            self.relay.__enter__()
            parts.callback(self.leave_relay)
            if self.scene.standby:
                self.second.__enter__()
                parts.callback(self.leave_relay, self.second)
            port = self.proxy.port if self.scene.proxied else self.redis_server.port
            self.house = parts.enter_context(House(self.directory, f"redis://127.0.0.1:{port}/0", **self._settings()))
            if "RETRY_SCHEDULE" not in self.scene.settings:
                del self.house.environment["RETRY_SCHEDULE"]
            self.keeper = parts.enter_context(Keeper(self.house))
            self.client = parts.enter_context(self.redis_server.client())
            parts.callback(self.over.set)
            self._start()
            yield self

    def _settings(self) -> dict[str, str]:
        settings = {
            "LISTEN": f"127.0.0.1:{self.api.port}",
            "SMTP_HOST": "127.0.0.1",
            "SMTP_PORT": str(self.relay.port),
            "SMTP_SECURITY": "none",
            "ON_DOUBT": self.on_doubt,
        }
        if self.scene.standby:
            settings = {name: value for name, value in settings.items() if not name.startswith("SMTP_")}
            settings["RELAYS"] = "".join(
                f'[{name}]\nhost = "127.0.0.1"\nport = {relay.port}\nsecurity = "none"\n'
                for name, relay in (("first", self.relay), ("second", self.second))
            )
        if self.scene.secure:
            settings |= {"SMTP_SECURITY": "starttls", "SMTP_CA_FILE": write_ca(self.authority, self.directory)}
            settings |= {"SMTP_USERNAME": "mailer", "SMTP_PASSWORD": "password"}
        if self.scene.by_smtp:
            settings |= {"SUBMISSION_LISTEN": f"127.0.0.1:{self.smtp_port}", "PYTHONPATH": str(ROOT)}
            settings |= {"SUBMISSION_DEDUPE": "10m"}
        return settings | dict(self.scene.settings)

    def _start(self) -> None:
        self.keeper.keep("api", self.program("service.py"))
        if self.scene.by_smtp:
            self.keeper.keep("submission", ["-m", "submission"])
            self.has_logged("submission", "submission_started")
        for number in range(self.scene.workers):
            first = None
            if number == 0 and self.scene.dies_at:
                first = [str(TESTS / "killed_worker.py"), "email", self.scene.dies_at, str(self._fatal_visit())]
            self.keeper.keep(f"worker-{number}", self.program("worker.py", "email"), first)
        eventually(self.is_up, 60)
        for name in self.workers():
            self.has_logged(name, "worker_started")

    def _fatal_visit(self) -> int:
        """Returns at which visit to its point a worker dies. Maintenance comes at the start and then every 20 s, and
        sessions are kept from one mail to the next, so of these it is the first."""
        if "maintenance" in self.scene.dies_at or "connect" in self.scene.dies_at:
            return 1
        return self.rng.randint(1, len(self.doomed) if self.scene.refuses else max(1, len(self.mails) // 4))

    @property
    def front(self) -> str:
        """Returns the name of the process that accepts mail."""
        return "submission" if self.scene.by_smtp else "api"

    def program(self, name: str, *arguments: str) -> list[str]:
        command = [str(ROOT / name), *arguments]
        if not self.scene.clocked:
            return command
        if not self.clock_file.exists():
            self.set_clock(0)
        return [str(TESTS / "stepped_clock.py"), str(self.clock_file), *command]

    @property
    def clock_file(self) -> Path:
        return self.directory / "clock"

    def set_clock(self, seconds: int) -> None:
        """Sets the clock in one step: a reader finds the old or the new, never an empty file."""
        (self.directory / "clock.new").write_text(str(seconds))
        (self.directory / "clock.new").rename(self.clock_file)

    def is_up(self) -> bool:
        return self.get("/healthz") is not None

    # --- what happens on it ---

    def wait(self, low: float, high: float | None = None) -> None:
        """Waits so many seconds, or between `low` and `high`."""
        self.over.wait(self.rng.uniform(low, high or low))

    def relay_has(self, mails: int) -> None:
        eventually(lambda: len(self.relay.log) >= mails, 60)

    def relay_hears_a_mail(self) -> None:
        heard = len(self.relay.bodies)
        eventually(lambda: len(self.relay.bodies) > heard, 60)

    def has_logged(self, name: str, words: str, times: int = 1) -> None:
        eventually(lambda: self.house.log(name).count(words) >= times, 90)

    def signal(self, name: str, number: signal.Signals = signal.SIGKILL) -> None:
        """Sends a signal to the process that has this name now."""
        with self.keeper.lock:
            self.keeper.processes[name].send_signal(number)

    def senders(self) -> list[int]:
        """Returns the processes that have the workers of RQ in them."""
        found = [self.client.hget(key, "pid") for key in self.client.smembers("rq:workers")]
        return sorted(pid for pid in map(int, filter(None, found)) if os.path.exists(f"/proc/{pid}"))

    def workers(self) -> list[str]:
        return [f"worker-{number}" for number in range(self.scene.workers)]

    @contextmanager
    def relay_says(self, relay: ScriptedRelay | None = None, /, **steps: Step | list[Step]) -> Iterator[None]:
        """Changes a relay's replies while the body runs. `DOT` is the final dot."""
        script = (relay or self.relay).script
        changed = {"." if name == "DOT" else name: step for name, step in steps.items()}
        before = {name: script.get(name) for name in changed}
        for name, step in changed.items():
            script[name] = list(step) if isinstance(step, list) else [step]
        yield
        for name, steps_before in before.items():
            if steps_before is None:
                del script[name]
            else:
                script[name] = steps_before

    def leave_relay(self, relay: ScriptedRelay | None = None) -> None:
        relay = relay or self.relay
        relay.hang_up_on_all()
        relay.__exit__()

    @contextmanager
    def relay_away(self, relay: ScriptedRelay | None = None) -> Iterator[None]:
        """Lets a relay refuse connections while the body runs."""
        self.leave_relay(relay)
        try:
            yield
        finally:
            (relay or self.relay).__enter__()

    # --- the client ---

    def submit_all(self) -> None:
        """Submits the mails over `spread` seconds, four at a time."""
        with ThreadPoolExecutor(4, thread_name_prefix="client") as callers:
            for mail, pause in zip(self.mails, self.pauses, strict=True):
                callers.submit(self._submit, mail)
                self.over.wait(pause)
        self.submitted = True

    def _submit(self, mail: Mail) -> None:
        while not self.over.is_set():
            mail_id = self.post(mail)
            if mail_id:
                self.accepted_at[mail.key] = time.monotonic()
                self.accepted[mail.key] = mail_id
                return
            self.over.wait(REPEAT_AFTER)

    def post(self, mail: Mail) -> str | None:
        """Returns the mail's id, if it was accepted."""
        if self.scene.by_smtp:
            return self._submit_by_smtp(mail)
        try:
            answer = self.api.post("/emails", mail.body, Idempotency_Key=mail.key)
        except (OSError, http.client.HTTPException, json.JSONDecodeError):
            self.answers[0] += 1
            return None
        self.answers[answer.status] += 1
        return str(answer.body["id"]) if answer.status in TAKEN else None

    def _submit_by_smtp(self, mail: Mail) -> str | None:
        text = f"From: ada@example.com\r\nSubject: {mail.key}\r\n\r\nHello.\r\n.\r\nThat was a dot.\r\n"
        try:
            with smtplib.SMTP("127.0.0.1", self.smtp_port, timeout=60) as client:
                client.login("any", self.api.key)
                client.mail("ada@example.com")
                for address in mail.recipients:
                    client.rcpt(address)
                code, said = client.data(text)
        except OSError:  # smtplib's own are, too
            code, said = 0, b""
        self.answers[{250: 200, 451: 503, 452: 503}.get(code, code)] += 1  # as the API would say it
        return said.decode().split()[-1] if code == 250 else None

    def get(self, path: str) -> dict[str, Any] | None:
        try:
            answer = self.api.get(path)
        except (OSError, http.client.HTTPException, json.JSONDecodeError):
            return None
        return dict(answer.body) if answer.status == 200 else None

    def wait_until_final(self) -> float:
        """Waits until every mail is final. Returns the slowest's seconds from the fault's end or its answer."""
        deadline = time.monotonic() + self.scene.limit + 30  # beyond the promise, to see by how much it was broken
        pending, slowest = dict(self.accepted), 0.0
        while pending and time.monotonic() < deadline:
            for key, mail_id in list(pending.items()):
                slowest = max(slowest, time.monotonic() - max(self.fault_over, self.accepted_at[key]))
                if self.is_final(mail_id):
                    del pending[key]
            self.over.wait(0.5)
        if not pending:
            self._wait_until_quiet(deadline)
        return slowest

    def is_final(self, mail_id: str) -> bool:
        seen = self.get(f"/emails/{mail_id}")
        return seen is not None and seen["status"] in FINAL

    def _wait_until_quiet(self, deadline: float) -> None:
        """Waits until RQ, too, has nothing in hand: a job that it still has may be run again."""
        while time.monotonic() < deadline:
            try:
                if not any(self.in_hand()):
                    return
            except redis.RedisError:
                pass
            self.over.wait(0.5)

    def in_hand(self) -> list[int]:
        with self.client.pipeline(transaction=False) as pipe:
            pipe.llen("rq:queue:email")
            pipe.llen("rq:queue:email:intermediate")
            pipe.zcard("rq:wip:email")
            pipe.zcard("rq:scheduled:email")
            return [int(one) for one in pipe.execute()]
