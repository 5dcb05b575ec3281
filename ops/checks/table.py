"""The table of checks, in the order in which one cause explains the next.

To add one: write a function from a `Target`, and the `Settings` if it needs them, to findings, in the file where it
belongs, and add a row here. A check that fails itself is a finding too, and stops no other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

from ops.checks import configuration, flow, machine, names, relay, store, units
from ops.checks.findings import Finding, Findings, note, warn
from ops.checks.target import Target
from process.log import where
from queues.connection import Unavailable, translating_errors
from settings import Settings


class Check(NamedTuple):
    name: str
    run: Callable[[Target, Settings | None], Findings]


def alone(check: Callable[[Target], Findings]) -> Callable[[Target, Settings | None], Findings]:
    return lambda target, _: check(target)


def with_settings(check: Callable[[Target, Settings], Findings]) -> Callable[[Target, Settings | None], Findings]:
    unread = note("not checked: the settings cannot be read")
    return lambda target, settings: check(target, settings) if settings else iter([unread])


CHECKS = (
    Check("settings", alone(configuration.values)),
    Check("shell", alone(configuration.shell)),
    Check("files", alone(configuration.modes)),
    Check("units", alone(units.running)),
    Check("redis", with_settings(store.reachable)),
    Check("redis file", with_settings(store.append_only_file)),
    Check("redis memory", with_settings(store.memory)),
    Check("relay", with_settings(relay.login)),
    Check("workers", with_settings(flow.workers)),
    Check("queue", with_settings(flow.waiting)),
    Check("nginx", alone(machine.nginx)),
    Check("ports", with_settings(machine.ports)),
    Check("clock", alone(machine.clock)),
    Check("redis clock", with_settings(store.clock)),
    Check("dns", with_settings(names.sender)),
)
CANARY = Check("canary", with_settings(flow.canary))  # if --send-to asks for it


def examine(target: Target) -> Iterator[tuple[str, Finding]]:
    settings = configuration.load(target)
    for check in (*CHECKS, CANARY) if target.send_to else CHECKS:
        yield from ((check.name, finding) for finding in findings_of(check, target, settings))


def findings_of(check: Check, target: Target, settings: Settings | None) -> Findings:
    try:
        with translating_errors():
            yield from check.run(target, settings)
    except Unavailable as why:
        yield note(f"not checked: {why}")
    except Exception as error:
        yield warn(f"the doctor itself failed here: {where(error)}", "report this line to the project")
