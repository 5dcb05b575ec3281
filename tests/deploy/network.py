"""A network between the tests and a machine of theirs: a namespace, a pair of interfaces, a way out, and a name server.

The machine has ports 22, 80 and 443 to itself, whatever else runs here, and the tests come to it from outside, as the
Internet does. The way out (NAT, by nftables) is for apt and pip; the addresses are of TEST-NET-2 (RFC 5737), which no
real network has. The name server answers for the names of the story, which exist nowhere else, and asks the host's own
about all others. All of it is taken away again, also after a failure.
"""

from __future__ import annotations

import os
import subprocess
from contextlib import ExitStack
from pathlib import Path

import dns.exception
import dns.message
import dns.query

from tests.name_server import NameServer

OWN = (".internal", ".example")  # the first is nobody's on the Internet (ICANN, 2024); the second, RFC 2606
FORWARDING = Path("/proc/sys/net/ipv4/ip_forward")


def sh(*command: str, given: str | None = None) -> str:
    """What the command prints; raises with what it complained of."""
    ran = subprocess.run(command, input=given, capture_output=True, text=True)
    if ran.returncode:
        raise RuntimeError(f"{' '.join(command)}: exit {ran.returncode}\n{ran.stdout}{ran.stderr}")
    return ran.stdout


class Network:
    """One /30: `host` is where the tests (their relay, their name server) are, `address` is the machine's."""

    def __init__(self) -> None:
        self.name = f"aedeploy{os.getpid()}"
        self.undo = ExitStack()

    def __enter__(self) -> Network:
        with self.undo:
            self._lay()
            self.names = self.undo.enter_context(Names(self.host))
            self.undo = self.undo.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self.undo.close()

    def _lay(self) -> None:
        inside, outside = f"aei{os.getpid()}", f"aeo{os.getpid()}"
        subnet, self.host, self.address = free_subnet()
        sh("ip", "netns", "add", self.name)
        self.undo.callback(sh, "ip", "netns", "delete", self.name)
        sh("ip", "link", "add", outside, "type", "veth", "peer", "name", inside, "netns", self.name)
        self.undo.callback(sh, "ip", "link", "delete", outside)
        sh("ip", "address", "add", f"{self.host}/30", "dev", outside)
        sh("ip", "link", "set", outside, "up")
        sh("ip", "-n", self.name, "address", "add", f"{self.address}/30", "dev", inside)
        sh("ip", "-n", self.name, "link", "set", inside, "up")
        sh("ip", "-n", self.name, "link", "set", "lo", "up")
        sh("ip", "-n", self.name, "route", "add", "default", "via", self.host)
        self.undo.callback(FORWARDING.write_text, FORWARDING.read_text())
        FORWARDING.write_text("1")
        rule = f'ip saddr {subnet} oifname != "{outside}" masquerade'
        chain = f"chain out {{ type nat hook postrouting priority srcnat; {rule}; }}"
        sh("nft", "-f", "-", given=f"table ip {self.name} {{ {chain}; }}")
        self.undo.callback(sh, "nft", "delete", "table", "ip", self.name)


def free_subnet() -> tuple[str, str, str]:
    """A /30 that nobody here uses, with its two addresses."""
    used = sh("ip", "-4", "route")
    for first in ((os.getpid() + attempt) % 64 * 4 for attempt in range(64)):
        if f"198.51.100.{first}/30" not in used:
            return f"198.51.100.{first}/30", f"198.51.100.{first + 1}", f"198.51.100.{first + 2}"
    raise RuntimeError("all of 198.51.100.0/24 is taken; is anything left of earlier runs? (ip netns, ip link)")


class Names(NameServer):
    """Ours are in `zone`; about all others the host's own name server is asked."""

    def __init__(self, address: str) -> None:
        super().__init__({}, at=(address, 53))
        self.upstream = host_resolver()

    def _answer(self, query: dns.message.Message) -> bytes:
        if query.question[0].name.to_text(omit_final_dot=True).endswith(OWN):
            return super()._answer(query)
        try:
            return dns.query.udp(query, self.upstream, timeout=10).to_wire()
        except (OSError, dns.exception.DNSException):
            return super()._answer(query)  # which says that there is no such name


def host_resolver() -> str:
    lines = Path("/etc/resolv.conf").read_text().splitlines()
    return next(line.split()[1] for line in lines if line.startswith("nameserver") and "." in line)
