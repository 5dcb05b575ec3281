"""The table of checks, in the order in which one cause explains the next. To add one: a function that takes a `Place`
and yields findings, in the room where it belongs, and a row here.

A check that breaks is a finding too, and stops no other.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from ops.checks import configuration, flow, machine, names, relay, store, units
from ops.checks.findings import Finding, Look, Place, note, warn
from process.log import where
from queues.connection import Unavailable, unavailable


class Check(NamedTuple):
    name: str
    look: Look
    needs: str = ""  # settings; redis (and so settings); send_to


CHECKS = (
    Check("settings", configuration.values),
    Check("shell", configuration.shell),
    Check("files", configuration.modes),
    Check("units", units.running),
    Check("redis", store.reachable, "settings"),
    Check("redis file", store.keeps, "redis"),
    Check("redis memory", store.memory, "redis"),
    Check("relay", relay.lets_us_in, "settings"),
    Check("workers", flow.workers, "redis"),
    Check("queue", flow.waiting, "redis"),
    Check("nginx", machine.nginx),
    Check("ports", machine.ports, "settings"),
    Check("clock", machine.clock),
    Check("redis clock", store.clock, "redis"),
    Check("dns", names.sender, "settings"),
    Check("canary", flow.canary, "send_to"),
)


def examine(place: Place) -> Iterator[tuple[str, Finding]]:
    place.settings = configuration.load(place)
    for check in CHECKS:
        if check.needs != "send_to" or place.send_to:
            yield from ((check.name, finding) for finding in looked_at(check, place))


def looked_at(check: Check, place: Place) -> Iterator[Finding]:
    if check.needs and not place.settings:
        yield note("not looked at: the settings cannot be read")
        return
    try:
        with unavailable():
            yield from check.look(place)
    except Unavailable as why:
        yield note(f"not looked at: {why}")
    except Exception as error:
        yield warn(f"the doctor itself failed here: {where(error)}", "report this line to the project")
