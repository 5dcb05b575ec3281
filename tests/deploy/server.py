"""The service on a machine, as its operators and its clients use it: by README's own commands.

`Bare` has a clone and nothing else, `Installed` is what `bin/install` left and said, `Server` sends mail. A mail is
told from another by its recipient, and the relay's list of what it accepted is what counts as sent.
"""

from __future__ import annotations

import json
import re
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.client import HTTPException
from itertools import count
from typing import NamedTuple

from ops.checks.findings import Finding
from tests.deploy.machine import Machine, Ran
from tests.relay import Relay
from tests.servers import Api, eventually

CLONE = "async-email"  # in the administrator's home
COMMANDS = "/opt/async-email/current/bin"
ENV = "/etc/async-email/async-email.env"
CA_FILE = "/etc/ssl/relay-authority.pem"  # no secret, and the services must be able to read it
REDIS, NGINX = "redis-server@async-email.service", "nginx.service"
API, DASHBOARD = "async-email-api.service", "async-email-dashboard.service"
EMAIL, JOBS = "async-email-worker@email.service", "async-email-worker@jobs.service"
OURS = (API, EMAIL, JOBS, DASHBOARD)
UNITS = (*OURS, "async-email-api.socket", "async-email.target", REDIS, NGINX)
KEY = re.compile(r"(?<![\w-])[\w-]{43}(?![\w-])")
DOMAIN = "customers.example"


class Diagnosis(NamedTuple):
    exit: int
    text: str
    findings: list[Finding]

    def troubles(self) -> list[Finding]:
        return [finding for finding in self.findings if finding.level in ("warn", "fault")]


@dataclass
class Bare:
    machine: Machine
    relay: Relay

    def install(self) -> Installed:
        """`git clone`, a look at what would be done, and `sudo bin/install`."""
        self.machine.clone(CLONE)
        self.machine.admin("sudo true")  # it leaves a mark in the home, the first time
        before = self.machine.files()
        dry_run = self.machine.admin(f"cd {CLONE} && sudo bin/install --dry-run")
        touched = before ^ self.machine.files()
        install = self.machine.admin(f"cd {CLONE} && sudo bin/install")
        doctor = diagnose(self.machine)
        return Installed(self.machine, self.relay, dry_run, touched, install, doctor)


@dataclass
class Installed:
    """What was seen between the clone and the first edit."""

    machine: Machine
    relay: Relay
    dry_run: Ran
    touched_by_dry_run: set[str]
    install: Ran
    doctor: Diagnosis

    @property
    def key(self) -> str:
        """The API key that was printed, once."""
        (key,) = set(KEY.findall(self.install.stdout))
        return str(key)

    def configure(self) -> Server:
        """The one file is edited, and the services take it up."""
        name_the_relay(self.machine, self.relay)
        server = Server(self.machine, self.relay, self.key)
        assert self.relay.login
        user, password = self.relay.login
        server.edit(
            SMTP_HOST=self.relay.name,
            SMTP_USERNAME=user,
            SMTP_PASSWORD=password,
            SMTP_CA_FILE=CA_FILE,
            MAIL_FROM="Shop <hello@shop.internal>",
        )
        eventually(server.is_up, 60)
        return server


def name_the_relay(machine: Machine, relay: Relay) -> None:
    """What the operator's network has already: the relay's name, its authority, and what DNS says of the sender."""
    machine.write(CA_FILE, relay.authority.cert_pem.bytes().decode())
    names = machine.network.names.zone
    names[relay.name, "A"] = [machine.network.host]
    names["shop.internal", "MX"] = [f"10 {relay.name}."]
    names["shop.internal", "TXT"] = [f'"v=spf1 ip4:{machine.network.host} -all"']
    names["_dmarc.shop.internal", "TXT"] = ['"v=DMARC1; p=quarantine"']


def diagnose(machine: Machine) -> Diagnosis:
    ran = machine.admin(f"sudo {COMMANDS}/doctor --json", check=False)
    assert ran.returncode in (0, 1, 2), ran
    try:
        reported = json.loads(ran.stdout)
    except ValueError:
        raise AssertionError(ran.stdout + ran.stderr) from None
    return Diagnosis(ran.returncode, ran.stdout, [Finding(f["level"], f["found"], f["fix"]) for f in reported])


@dataclass
class Server:
    machine: Machine
    relay: Relay
    key: str
    numbers: Iterator[int] = field(default_factory=count)

    # as an application

    @property
    def api(self) -> Api:
        """The public side: through nginx, from another machine."""
        return Api(80, self.key, self.machine.address)

    def post(self, recipient: str = "") -> tuple[str, str]:
        """POST /start-job. Returns recipient and id."""
        recipient = recipient or self.somebody()
        answer = self.api.post("/start-job", {"name": "Ada", "email": recipient})
        assert answer.status == 202, answer
        return recipient, str(answer.body["job_id"])

    def somebody(self) -> str:
        return f"customer-{next(self.numbers)}@{DOMAIN}"

    def copies(self) -> Counter[str]:
        """How many mails the relay has accepted for whom."""
        return Counter(recipient for mail in list(self.relay.accepted) for recipient in mail.recipients)

    def arrives(self, *recipients: str, seconds: float = 60) -> None:
        eventually(lambda: self.copies().keys() >= set(recipients), seconds)

    def delivers(self, seconds: float = 60) -> str:
        """Posts a mail and waits until it has arrived. Returns its recipient."""
        recipient, _ = self.post()
        self.arrives(recipient, seconds=seconds)
        return recipient

    @contextmanager
    def relay_away(self) -> Iterator[None]:
        self.relay.__exit__()
        try:
            yield
        finally:
            self.relay.__enter__()

    # as its administrator

    def edit(self, **settings: str) -> None:
        """As with an editor: a line that is there is changed, another comes at the end."""
        lines = self.machine.says(f"cat {ENV}").splitlines()
        for name, value in settings.items():
            lines = [line for line in lines if not line.startswith(f"{name}=")] + [f"{name}={value}"]
        self.machine.write(ENV, "\n".join(lines) + "\n")

    def restart(self) -> None:
        self.machine.admin("sudo systemctl restart async-email.target")
        eventually(self.is_up, 60)

    def doctor(self) -> Diagnosis:
        return diagnose(self.machine)

    def install(self, *options: str) -> Ran:
        return self.machine.admin(f"cd {CLONE} && sudo bin/install {' '.join(options)}")

    def shows(self, unit: str, what: str) -> str:
        return self.machine.says(f"systemctl show --value -p {what} {unit}")

    def main_pid(self, unit: str) -> int:
        return int(self.shows(unit, "MainPID"))

    def main_pids(self) -> dict[str, int]:
        return {unit: self.main_pid(unit) for unit in (*OURS, REDIS, NGINX)}

    def processes(self, unit: str) -> list[int]:
        """All of the unit's, as the kernel counts them."""
        group = self.shows(unit, "ControlGroup")
        tops = f"/sys/fs/cgroup/systemd{group}", f"/sys/fs/cgroup{group}"  # cgroup v1 and v2
        listed = self.machine.says(f"cat {tops[0]}/cgroup.procs || cat {tops[1]}/cgroup.procs")
        return [int(pid) for pid in listed.split()]

    def is_up(self) -> bool:
        states = self.machine.run(f"systemctl is-active {' '.join(UNITS)}", check=False).stdout.split()
        try:
            return states == ["active"] * len(UNITS) and self.api.get("/healthz").status == 200
        except (OSError, ValueError, HTTPException):
            return False


class Load:
    """Applications that post and post, from outside, until it is over. Bounded, whatever happens, in count and time."""

    def __init__(self, server: Server) -> None:
        self.server = server
        self.over = threading.Event()
        self.refused: list[str] = []
        self.taken: list[str] = []

    def __enter__(self) -> Load:
        self.deadline = time.monotonic() + 180
        self.pool = ThreadPoolExecutor(3)
        for _ in range(3):
            self.pool.submit(self._post)
        eventually(lambda: len(self.taken) > 10 or self.refused)
        return self

    def __exit__(self, *_: object) -> None:
        self.over.set()
        self.pool.shutdown()

    def _post(self) -> None:
        while not self.over.wait(0.05) and len(self.taken) < 3000 and time.monotonic() < self.deadline:
            recipient = self.server.somebody()
            try:
                answer = self.server.api.post("/start-job", {"name": "Ada", "email": recipient})
            except (OSError, ValueError, HTTPException) as error:
                self.refused.append(repr(error))
                continue
            if answer.status == 202:
                self.taken.append(recipient)
            else:
                self.refused.append(repr(answer))
