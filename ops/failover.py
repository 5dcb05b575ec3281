"""Makes another host's Redis the primary, as planned and without losing anything: `sudo bin/failover`.

SENTINEL FAILOVER alone loses what the old primary still takes (redis#6062), and Redis' own FAILOVER TO leaves the
Sentinels behind for half a minute. So the primary holds its writes first: within milliseconds its replicas have all of
it, and then the Sentinels replace it. Clients wait meanwhile, a second or two. Standard library only.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from ops.gate import Address, Sentinels, ask_all, conversation, parse_url, primary_of
from ops.server import Fault, Server, text_of

HELD = 6000  # milliseconds, in which the Sentinels must have replaced it; then it takes writes again by itself
PATIENCE = 15  # seconds for them to agree


def fail_over(sentinels: Sentinels, password: str) -> tuple[Address, Address]:
    """Returns the old and the new primary. Raises `Fault`."""
    views = ask_all(sentinels)
    old = primary_of(views, sentinels)
    if not old:
        raise Fault(f"most of the {len(sentinels.addresses)} Sentinels must answer, and {len(views)} did")
    if sum(any(view.replicas.values()) for view in views) * 2 <= len(sentinels.addresses):
        raise Fault(f"another Redis than {old[0]} must be up")
    login = "operator", password
    try:
        with conversation(old, login, sentinels.context) as ask:
            ask("CLIENT", "PAUSE", str(HELD), "WRITE")
            try:
                replace(old, sentinels, login)
            except OSError:
                ask("CLIENT", "UNPAUSE")
                raise
    except OSError as error:
        raise Fault(f"it cannot be done now, and nothing has changed: {error}") from None
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        new = primary_of(ask_all(sentinels), sentinels)
        if new and new != old:
            return old, new
        time.sleep(0.2)
    raise Fault(f"{old[0]} is the primary still: journalctl -u redis-sentinel@async-email says why")


def replace(old: Address, sentinels: Sentinels, login: tuple[str, str]) -> None:
    """Has one Sentinel begin; one of another host first, which needs not be reached by way of the old primary's."""
    error = OSError("no Sentinel answers")
    for address in sorted(sentinels.addresses, key=lambda one: one[0] == old[0]):
        try:
            with conversation(address, login, sentinels.context) as ask:
                ask("SENTINEL", "FAILOVER", sentinels.name)
            return
        except OSError as reason:
            error = reason
    raise error


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="sudo bin/failover", description="Makes another host's Redis the primary.")
    parser.parse_args(arguments)
    server = Server(Path(__file__).resolve().parent.parent)
    url, password = text_of(server.credentials / "redis_url"), text_of(server.operator)
    try:
        if not url or not password:
            raise Fault("it needs root, on a host with a Redis or a Sentinel: sudo bin/failover")
        old, new = fail_over(parse_url(url.strip(), str(server.redis_ca)), password.strip())
    except Fault as fault:
        print(f"Stopped: {fault}", file=sys.stderr)
        return 1
    print(f"{new[0]} is the primary now; {old[0]} follows it.")
    return 0
