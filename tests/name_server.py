"""A DNS server, on loopback if not told otherwise, that answers what a test has written into its zone, over UDP."""

from __future__ import annotations

import socket
import threading

import dns.flags
import dns.message
import dns.rcode
import dns.rrset

Zone = dict[tuple[str, str], list[str]]  # (name, type) -> records as a zone file has them


class NameServer:
    """A name of which the zone has no record of any type does not exist. With `silent` it answers nothing,
    with `fails` SERVFAIL."""

    def __init__(
        self, zone: Zone, *, silent: bool = False, fails: bool = False, at: tuple[str, int] = ("127.0.0.1", 0)
    ) -> None:
        self.zone = zone
        self.at = at
        self.silent = silent
        self.fails = fails

    def __enter__(self) -> NameServer:
        self.socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self.socket.bind(self.at)
        self.address: tuple[str, int] = self.socket.getsockname()
        self.thread = threading.Thread(target=self._serve, name="name server")
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as bell:
            bell.sendto(b"", self.address)
        self.thread.join()
        self.socket.close()

    def _serve(self) -> None:
        while True:
            wire, sender = self.socket.recvfrom(4096)
            if not wire:
                return
            if not self.silent:
                self.socket.sendto(self._answer(dns.message.from_wire(wire)), sender)

    def _answer(self, query: dns.message.Message) -> bytes:
        question = query.question[0]
        name, kind = question.name.to_text(omit_final_dot=True), dns.rdatatype.to_text(question.rdtype)
        answer = dns.message.make_response(query)
        answer.flags |= dns.flags.RA
        records = self.zone.get((name, kind), [])
        if records:
            answer.answer.append(dns.rrset.from_text(question.name, 60, "IN", kind, *records))
        elif self.fails:
            answer.set_rcode(dns.rcode.SERVFAIL)
        elif not any(one == name for one, _ in self.zone):
            answer.set_rcode(dns.rcode.NXDOMAIN)
        return answer.to_wire()
