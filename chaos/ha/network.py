"""Hosts on one machine: a network namespace for each, and a switch between them that swallows what it is told to.

Nothing is added to the machine's own namespace, and every stage has the same addresses on a switch of its own; so any
number of them run side by side. The switch drops packets without a word, as a broken network does: nobody is refused.
"""

from __future__ import annotations

import ctypes
import os
import secrets
import subprocess
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

NAMESPACES = Path("/var/run/netns")
CLONE_NEWNET = 0x40000000
NEEDED = ("ip", "nft")
RULES = "add table bridge cuts; add chain bridge cuts passing { type filter hook forward priority 0; }"


def sh(*command: str, given: str | None = None) -> None:
    """Runs a command. Raises with what it complained of."""
    ran = subprocess.run(command, input=given, capture_output=True, text=True)
    if ran.returncode:
        raise RuntimeError(f"{' '.join(command)}: exit {ran.returncode}\n{ran.stdout}{ran.stderr}")


class Network:
    """A context manager: hosts by name, at 10.17.0.1 and so on, in the order in which they are given."""

    def __init__(self, hosts: Iterable[str]) -> None:
        self.address = {name: f"10.17.0.{number}" for number, name in enumerate(hosts, 1)}
        self.prefix = f"aeha-{secrets.token_hex(4)}"

    def namespace(self, host: str) -> str:
        return f"{self.prefix}-{host}"

    def __enter__(self) -> Network:
        with ExitStack() as undo:
            switch = self._add("switch", undo)
            sh("ip", "-n", switch, "link", "add", "br0", "type", "bridge")
            sh("ip", "-n", switch, "link", "set", "br0", "up")
            sh("ip", "netns", "exec", switch, "nft", RULES)
            for name, address in self.address.items():
                there = self._add(name, undo)
                sh("ip", "-n", switch, "link", "add", name, "type", "veth", "peer", "name", "eth0", "netns", there)
                sh("ip", "-n", switch, "link", "set", name, "master", "br0", "up")
                sh("ip", "-n", there, "address", "add", f"{address}/24", "dev", "eth0")
                sh("ip", "-n", there, "link", "set", "eth0", "up")
            self.undo = undo.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self.undo.close()

    def there(self) -> list[str]:
        """Returns the namespaces that there are."""
        return [one.name for one in NAMESPACES.glob(f"{self.prefix}-*")]

    def _add(self, name: str, undo: ExitStack) -> str:
        namespace = self.namespace(name)
        sh("ip", "netns", "add", namespace)
        undo.callback(sh, "ip", "netns", "delete", namespace)
        sh("ip", "-n", namespace, "link", "set", "lo", "up")
        return namespace

    def command(self, host: str, *command: str) -> list[str]:
        """Returns the command that runs one on a host, in a process of the same id."""
        return ["ip", "netns", "exec", self.namespace(host), *command]

    @contextmanager
    def inside(self, host: str) -> Iterator[None]:
        """Puts this thread, and the threads that it starts meanwhile, onto a host."""
        before = os.open("/proc/thread-self/ns/net", os.O_RDONLY)
        try:
            with open(NAMESPACES / self.namespace(host)) as there:
                _enter(there.fileno())
            yield
        finally:
            _enter(before)
            os.close(before)

    def link(self, host: str, state: str) -> None:
        """Sets the link of a host `up` or `down`."""
        sh("ip", "-n", self.namespace("switch"), "link", "set", host, state)

    def cut(self, some: Iterable[str], others: Iterable[str]) -> None:
        """Lets no packet pass between hosts of the one set and hosts of the other."""
        here, there = ("{" + ", ".join(self.address[name] for name in names) + "}" for names in (some, others))
        rules = [
            f"add rule bridge cuts passing ip saddr {a} ip daddr {b} drop" for a, b in ((here, there), (there, here))
        ]
        self._rule("; ".join(rules))

    def mend(self) -> None:
        """Takes back all cuts, and sets all links up."""
        self._rule("flush chain bridge cuts passing")
        for name in self.address:
            self.link(name, "up")

    def _rule(self, rule: str) -> None:
        sh("ip", "netns", "exec", self.namespace("switch"), "nft", rule)


def _enter(namespace: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.setns(namespace, CLONE_NEWNET):
        raise OSError(ctypes.get_errno(), "setns")
