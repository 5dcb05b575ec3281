"""What runs on the hosts, and is started again when it ends, as systemd does with Restart=always.

A service that a scene has ended for good (`off`) stays away until the scene has it back. Each is a process group with
a log of its own, and is ended by its id.
"""

from __future__ import annotations

import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from tests.servers import kill_group, start

RESTART_AFTER = 3  # seconds, as in systemd/


@dataclass
class Service:
    """A process on a host. `prepare` is called before each start."""

    name: str
    command: list[str]
    directory: Path
    environment: Mapping[str, str]
    prepare: Callable[[], object] = lambda: None
    restart_after: float = RESTART_AFTER
    wanted: bool = True
    stopped: bool = False  # by SIGSTOP
    exits: list[int] = field(default_factory=list)  # by itself
    process: subprocess.Popen[bytes] | None = None
    due: float = 0

    def start(self) -> None:
        self.prepare()
        log = self.directory / f"{self.name}.log"
        self.process = start(self.command, log, cwd=self.directory, env=dict(self.environment))

    def look(self) -> None:
        """Starts it again if it has ended and is wanted."""
        if self.process and (code := self.process.poll()) is not None:
            self.process = None
            self.due = time.monotonic() + self.restart_after
            if self.wanted and code != -signal.SIGKILL:
                self.exits.append(code)
        if self.wanted and not self.process and time.monotonic() >= self.due:
            self.start()

    def signal(self, number: signal.Signals) -> None:
        if self.process:
            with suppress(ProcessLookupError):
                os.killpg(self.process.pid, number)


class Supervisor:
    """A context manager: keeps services running. Everything is ended at the end."""

    def __init__(self) -> None:
        self.services: dict[str, Service] = {}
        self.lock = threading.RLock()
        self.over = threading.Event()
        self.thread = threading.Thread(target=self._watch, name="supervisor")

    def keep(self, service: Service) -> None:
        with self.lock:
            service.start()
            self.services[service.name] = service

    def _watch(self) -> None:
        while not self.over.wait(0.05):
            with self.lock:
                for service in self.services.values():
                    service.look()

    def kill(self, *names: str, off: bool = True) -> None:
        """Kills services at the same moment; started again by `back` only, or without `off` when their time comes."""
        with self.lock:
            for name in names:
                self.services[name].wanted = not off
            for name in names:
                self.services[name].signal(signal.SIGKILL)

    def pause(self, *names: str) -> None:
        with self.lock:
            for name in names:
                self.services[name].stopped = True
                self.services[name].signal(signal.SIGSTOP)

    def back(self) -> None:
        """Has everything go on, and start that was ended for good."""
        with self.lock:
            for service in self.services.values():
                service.wanted = True
                if service.stopped:
                    service.stopped = False
                    service.signal(signal.SIGCONT)

    def __enter__(self) -> Supervisor:
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.over.set()
        self.thread.join()
        for service in self.services.values():
            if service.process:
                kill_group(service.process)
