"""A network between the tests and a machine of theirs: a namespace, a pair of interfaces, a way out, and a name server.

The machine has ports 22, 80 and 443 to itself, whatever else runs here, and the tests come to it from outside, as the
Internet does. The way out (NAT, by nftables) is for apt and pip; the addresses are of TEST-NET-2 (RFC 5737), which no
real network has. The name server answers for the names of the story, which exist nowhere else, and asks the host's own
about all others. All of it is taken away again, also after a failure.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import NamedTuple

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


class Network(NamedTuple):
    """One /30: `host` is where the tests (their relay, their name server) are, `address` is the machine's."""

    name: str
    host: str
    address: str
    names: NameServer


@contextmanager
def network(part: str = "") -> Iterator[Network]:
    """`part` tells several of one process apart."""
    name, inside, outside = (f"{kind}{os.getpid()}{part}" for kind in ("aedeploy", "aei", "aeo"))
    subnet, host, address = free_subnet()
    with ExitStack() as undo:
        sh("ip", "netns", "add", name)
        undo.callback(sh, "ip", "netns", "delete", name)
        sh("ip", "link", "add", outside, "type", "veth", "peer", "name", inside, "netns", name)
        undo.callback(sh, "ip", "link", "delete", outside)
        sh("ip", "address", "add", f"{host}/30", "dev", outside)
        sh("ip", "link", "set", outside, "up")
        sh("ip", "-n", name, "address", "add", f"{address}/30", "dev", inside)
        sh("ip", "-n", name, "link", "set", inside, "up")
        sh("ip", "-n", name, "link", "set", "lo", "up")
        sh("ip", "-n", name, "route", "add", "default", "via", host)
        undo.callback(FORWARDING.write_text, FORWARDING.read_text())
        FORWARDING.write_text("1")
        rule = f'ip saddr {subnet} oifname != "{outside}" masquerade'
        chain = f"chain out {{ type nat hook postrouting priority srcnat; {rule}; }}"
        sh("nft", "-f", "-", given=f"table ip {name} {{ {chain}; }}")
        undo.callback(sh, "nft", "delete", "table", "ip", name)
        yield Network(name, host, address, undo.enter_context(Names(host)))


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
        lines = Path("/etc/resolv.conf").read_text().splitlines()
        self.upstream = next(line.split()[1] for line in lines if line.startswith("nameserver") and "." in line)

    def _answer(self, query: dns.message.Message) -> bytes:
        if query.question[0].name.to_text(omit_final_dot=True).endswith(OWN):
            return super()._answer(query)
        try:
            return dns.query.udp(query, self.upstream, timeout=10).to_wire()
        except (OSError, dns.exception.DNSException):
            return super()._answer(query)  # which says that there is no such name
