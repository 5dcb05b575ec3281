"""The table of checks, in the order in which one cause explains the next.

To add one: write a function from a `Target`, and the `Settings` if it needs them, to findings, in the file where it
belongs, and add a row here. A check that fails itself is a finding too, and stops no other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from ops.checks import (
    alerts,
    configuration,
    flow,
    machine,
    mailboxes,
    names,
    relay,
    replication,
    store,
    submission,
    units,
    webhooks,
)
from ops.checks.findings import Finding, Findings, fault, note, warn
from ops.checks.target import Target
from process.log import where
from queues.connection import Unavailable, translating_errors
from settings import Settings, SettingsError

Check = Callable[[Target, Settings | None], Findings]


def alone(check: Callable[[Target], Findings]) -> Check:
    return lambda target, _: check(target)


def with_settings(check: Callable[[Target, Settings], Findings]) -> Check:
    unread = note("not checked: the settings cannot be read")
    return lambda target, settings: check(target, settings) if settings else iter([unread])


CHECKS = {
    "settings": alone(configuration.values),
    "shell": alone(configuration.shell),
    "files": alone(configuration.modes),
    "units": alone(units.running),
    "sentinels": with_settings(replication.sentinels),
    "redis": with_settings(store.reachable),
    "redis file": with_settings(store.append_only_file),
    "redis memory": with_settings(store.memory),
    "replicas": with_settings(replication.replicas),
    "relay": with_settings(relay.login),
    "workers": with_settings(flow.workers),
    "queue": with_settings(flow.waiting),
    "nginx": alone(machine.nginx),
    "tls": alone(machine.tls),
    "smtp": with_settings(submission.ports),
    "logs": alone(machine.logs),
    "ports": with_settings(machine.ports),
    "clock": alone(machine.clock),
    "redis clock": with_settings(store.clock),
    "dns": with_settings(names.sender),
    "mailboxes": with_settings(mailboxes.readable),
    "dkim": with_settings(names.signature),
    "alerts": with_settings(alerts.configured),
    "webhooks": with_settings(webhooks.delivered),
}
CANARY = {"canary": with_settings(flow.canary)}  # if --send-to asks for it


def examine(target: Target) -> Iterator[tuple[str, Finding]]:
    settings = configuration.load(target)
    for name, check in (CHECKS | CANARY if target.send_to else CHECKS).items():
        try:
            with translating_errors():
                yield from ((name, finding) for finding in check(target, settings))
        except Unavailable as why:
            yield name, note(f"not checked: {why}")
        except SettingsError as error:
            yield name, fault(str(error), target.edit)
        except Exception as error:
            yield name, warn(f"the doctor itself failed here: {where(error)}", "report this line to the project")
