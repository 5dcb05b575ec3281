"""The hosts of one scene: three Redis with a Sentinel each, two APIs, three hosts of workers, and outside of it all a
relay and a client, whom no fault reaches.

Redis is set up as docs/scale.md says, and a host's services are started again by a supervisor as systemd would. The
client submits at both APIs in turn, each mail with an Idempotency-Key, and again, at the other one, until it is
answered with 2xx: from then on the mail is acknowledged.
"""

from __future__ import annotations

import http.client
import json
import os
import shlex
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

import redis

from chaos.ha.network import Network
from chaos.ha.services import Service, Supervisor
from ops.aof import cut_unfinished
from tests.scripted_relay import OBLIGING, Line, ScriptedRelay
from tests.servers import ROOT, eventually

REDIS = ("redis1", "redis2", "redis3")  # the first is the primary when a scene begins
APIS = ("api1", "api2")
WORKERS = ("worker1", "worker2", "worker3")
OUTSIDE = "outside"
GROUP = "mymaster"
USER, PASSWORD, SENTINEL_PASSWORD, KEY = "mailer", "password-of-redis", "password-of-sentinel", "full-key"
LEAD = 5.0  # seconds of load before the fault
TAIL = 10.0  # seconds of load after it was healed
PATIENCE = 5.0  # seconds that the client waits for an answer
GIVE_UP = 60.0  # seconds after the last new mail at which the client stops
SETTLED_WITHIN = 120  # seconds for processes to start, and for a primary to have both replicas
CLIENTS = 120  # requests at a time
REDIS_CONF = """
port 6379
bind 0.0.0.0
protected-mode no
dir {directory}
save ""
appendonly yes
min-replicas-to-write 1
min-replicas-max-lag 2
repl-diskless-sync-delay 0
user default off ~* &* +@all
user {user} on >{password} ~* &* +@all
masteruser {user}
masterauth {password}
replica-announce-ip {address}
"""
SENTINEL_CONF = """
port 26379
bind 0.0.0.0
protected-mode no
dir {directory}
requirepass {sentinel_password}
sentinel sentinel-pass {sentinel_password}
sentinel monitor {group} {primary} 6379 2
sentinel auth-user {group} {user}
sentinel auth-pass {group} {password}
sentinel down-after-milliseconds {group} 3000
sentinel failover-timeout {group} 10000
sentinel parallel-syncs {group} 1
"""


@dataclass(frozen=True)
class Scene:
    """Describes a fault, and for how long the hosts stay at fault."""

    name: str
    fault: str  # one sentence
    play: Callable[[Stage], None]
    lasts: float = 20  # seconds from the fault until all is mended
    clocks: dict[str, int] = field(default_factory=dict)  # host -> seconds by which its clock is ahead
    slow_relay: float = 0  # seconds until the relay answers a mail that it has accepted
    mixed: bool = False  # half of the hosts run another version


class Choice(NamedTuple):
    """What a run of a scene is played with."""

    program: str  # of Redis or Valkey
    replicas: int = 1
    rate: float = 100  # mails a second
    tail: float = TAIL
    other: Path | None = None  # a checkout of another version


class Stage:
    """Holds the hosts, the relay and the client of a scene, from `set_up` on."""

    def __init__(self, scene: Scene, directory: Path, choice: Choice) -> None:
        self.scene, self.directory, self.choice = scene, directory, choice
        self.network = Network((*REDIS, *APIS, *WORKERS, OUTSIDE))
        self.address = self.network.address
        self.supervisor = Supervisor()
        self.client = Client(self)
        self.relay = ScriptedRelay({".": self._take}, offers=["PIPELINING"], host=self.address[OUTSIDE], patience=300)
        self.over = threading.Event()
        self.fault_at = self.mended_at = 0.0

    @contextmanager
    def set_up(self) -> Iterator[Stage]:
        with ExitStack() as parts:
            parts.enter_context(self.network)
            parts.enter_context(self.supervisor)
            parts.enter_context(self.network.inside(OUTSIDE))
            self.relay.__enter__()
            parts.callback(self.relay.__exit__)
            parts.callback(self.relay.hang_up_on_all)
            parts.callback(self.over.set)
            self._start_redis()
            self._start_ours()
            yield self

    def play(self) -> None:
        """Plays the fault while mail is under way, and mends all. Returns when the client is done."""
        load = threading.Thread(target=self.client.submit_all, name="client")
        load.start()
        try:
            self.over.wait(LEAD)
            self.fault_at = time.monotonic()
            self.scene.play(self)
            self.over.wait(max(0, self.fault_at + self.scene.lasts - time.monotonic()))
            self.mend()
            self.client.last_at = time.monotonic() + self.choice.tail
        except BaseException:
            self.over.set()
            raise
        finally:
            load.join()

    def mend(self) -> None:
        self.network.mend()
        self.supervisor.back()
        self.mended_at = time.monotonic()

    def _take(self, line: Line) -> str:
        """Is the relay's answer to a final dot."""
        line.accept()
        self.over.wait(self.scene.slow_relay)
        return line.say(OBLIGING["."])

    # --- what runs ---

    def _keep(self, host: str, name: str, *command: str, **more: object) -> None:
        place = self.directory / host
        place.mkdir(exist_ok=True)
        command = tuple(self.network.command(host, *command))
        environment = {"PATH": os.environ["PATH"], **self._settings(host)} if host not in REDIS else dict(os.environ)
        self.supervisor.keep(Service(name, list(command), place, environment, **more))  # type: ignore[arg-type]

    def _start_redis(self) -> None:
        values = {"user": USER, "password": PASSWORD, "sentinel_password": SENTINEL_PASSWORD, "group": GROUP}
        values |= {"primary": self.address[REDIS[0]]}
        url_file = self.directory / "redis_url"
        url_file.write_text(self._url())
        places = {host: self.directory / host for host in REDIS}
        for host, place in places.items():
            place.mkdir()
            conf = REDIS_CONF + ("" if host == REDIS[0] else "replicaof {primary} 6379\n")
            (place / "redis.conf").write_text(conf.format(directory=place, address=self.address[host], **values))
            (place / "first-start").touch()
            gate = [sys.executable, "-I", f"{ROOT}/ops/gate.py", str(url_file), "", f"{place}/redis.conf", str(place)]
            command = f"{shlex.join(gate)} && exec {shlex.quote(self.choice.program)} {place}/redis.conf"
            prepare = partial(cut_unfinished, self.choice.program, place)
            self._keep(host, host, "sh", "-c", command, prepare=prepare, restart_after=1)
        eventually(lambda: self.role_of(REDIS[0]) == ("master", 2), SETTLED_WITHIN)
        for host, place in places.items():
            (place / "sentinel.conf").write_text(SENTINEL_CONF.format(directory=place, **values))
            self._keep(host, sentinel_of(host), self.choice.program, f"{place}/sentinel.conf", "--sentinel")
        eventually(self.is_watched, SETTLED_WITHIN)
        for place in places.values():
            (place / "first-start").unlink()

    def _start_ours(self) -> None:
        hosts = [*APIS, *WORKERS]
        for host in hosts:
            is_other = self.scene.mixed and self.choice.other and hosts.index(host) % 2
            root = self.choice.other if is_other else ROOT
            command = [f"{root}/service.py"] if host in APIS else [f"{root}/worker.py", "email"]
            if host in self.scene.clocks:
                clock = self.directory / f"clock-{host}"
                clock.write_text(str(self.scene.clocks[host]))
                command = [f"{ROOT}/tests/stepped_clock.py", str(clock), *command]
            self._keep(host, host, sys.executable, *command)
        eventually(lambda: all(self.logged(host, "worker_started") for host in WORKERS), SETTLED_WITHIN)
        eventually(lambda: all(self.client.answers_at(host) for host in APIS), SETTLED_WITHIN)

    def _url(self) -> str:
        sentinels = ",".join(self.address[name] for name in REDIS)
        return f"redis+sentinel://{USER}:{PASSWORD}@{sentinels}/{GROUP}/0?sentinel_password={SENTINEL_PASSWORD}"

    def _settings(self, host: str) -> dict[str, str]:
        return {
            "REDIS_URL": self._url(),
            "REDIS_REPLICAS": str(self.choice.replicas),
            "API_KEYS": f"full:{sha256(KEY.encode()).hexdigest()}:full",
            "MAIL_FROM": "Sender <sender@example.com>",
            "LISTEN": f"{self.address[host]}:8000",
            "API_PROCESSES": "1",
            "WORKER_PROCESSES": "1",
            "SMTP_HOST": self.address[OUTSIDE],
            "SMTP_PORT": str(self.relay.port),
            "SMTP_SECURITY": "none",
        }

    def logged(self, host: str, words: str) -> bool:
        return words in (self.directory / host / f"{host}.log").read_text()

    # --- Redis, as the scene and the account see it ---

    def redis(self, host: str) -> redis.Redis:
        return redis.Redis(
            self.address[host], username=USER, password=PASSWORD, socket_timeout=2, socket_connect_timeout=1
        )

    def role_of(self, host: str) -> tuple[str, int]:
        """Returns `master` or `slave`, and how many replicas it has in step; ("", 0) if it does not answer."""
        try:
            with self.redis(host) as client:
                seen = client.info("replication")
        except redis.RedisError:
            return "", 0
        online = sum(seen[f"slave{number}"]["state"] == "online" for number in range(seen["connected_slaves"]))
        return seen["role"], online

    def is_watched(self) -> bool:
        """Returns whether each Sentinel knows the two others and both replicas."""
        return all(
            (seen := self.sentinel(host, "MASTER", GROUP)) is not None
            and (seen["num-other-sentinels"], seen["num-slaves"], seen["flags"]) == (2, 2, "master")
            for host in REDIS
        )

    def sentinel(self, host: str, *words: str) -> Any:
        """Returns what a host's Sentinel says, None if it says nothing."""
        try:
            with redis.Redis(
                self.address[host],
                26379,
                password=SENTINEL_PASSWORD,
                socket_timeout=2,
                socket_connect_timeout=1,
                decode_responses=True,
            ) as client:
                return client.execute_command(f"SENTINEL {words[0]}", *words[1:])
        except redis.RedisError:
            return None

    def primary(self) -> str:
        """Returns the host that is the primary of both others, once there is one."""
        return eventually(lambda: next((one for one in REDIS if self.role_of(one) == ("master", 2)), ""), 60)


def sentinel_of(host: str) -> str:
    """Returns the name of the Sentinel beside a Redis."""
    return host.replace("redis", "sentinel")


class Client:
    """Submits mails at a steady rate, whatever the answers are, and keeps what was answered."""

    def __init__(self, stage: Stage) -> None:
        self.stage = stage
        self.submitted: list[str] = []
        self.acknowledged: dict[str, str] = {}  # key -> id
        self.acknowledged_at: list[float] = []
        self.answers: Counter[int] = Counter()  # by HTTP status; 0 for none
        self.last_at = float("inf")  # when the last new mail is submitted

    def submit_all(self) -> None:
        began = time.monotonic()
        with ThreadPoolExecutor(CLIENTS, thread_name_prefix="client") as callers:
            while (now := time.monotonic()) < self.last_at and not self.stage.over.is_set():
                number = len(self.submitted)
                if now < (due := began + number / self.stage.choice.rate):
                    time.sleep(due - now)
                self.submitted.append(f"m{number}")
                callers.submit(self._submit, number)

    def _submit(self, number: int) -> None:
        key, attempt = f"m{number}", 0
        while time.monotonic() < self.last_at + GIVE_UP and not self.stage.over.is_set():
            mail_id = self.post(APIS[(number + attempt) % 2], key)
            if mail_id:
                self.acknowledged[key] = mail_id
                self.acknowledged_at.append(time.monotonic())
                return
            attempt += 1
            self.stage.over.wait(0.5)

    def post(self, host: str, key: str) -> str:
        """Returns the mail's id if it was accepted, else ""."""
        body = json.dumps({"to": f"{key}@example.com", "subject": key, "text": "Hello."})
        status, said = self._call(host, "POST", "/emails", body, {"Idempotency-Key": key})
        self.answers[status] += 1
        return str(json.loads(said)["id"]) if status == 200 else ""

    def answers_at(self, host: str) -> bool:
        return self._call(host, "GET", "/readyz")[0] == 200

    def _call(
        self, host: str, method: str, path: str, body: str | None = None, headers: dict[str, str] | None = None
    ) -> tuple[int, bytes]:
        sent = {"Authorization": f"Bearer {KEY}", "Content-Type": "application/json", **(headers or {})}
        connection = http.client.HTTPConnection(self.stage.address[host], 8000, timeout=PATIENCE)
        try:
            connection.request(method, path, body, sent)
            response = connection.getresponse()
            return response.status, response.read()
        except (OSError, http.client.HTTPException):
            return 0, b""
        finally:
            connection.close()
