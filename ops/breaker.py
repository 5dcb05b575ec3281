"""Shows whether all mail waits for the relay, and why; closes the breaker if asked: `bin/breaker [close [relay]]`.

It closes by itself half a minute after the cause is gone. By hand only where the relay has asked for a long pause ("try
again in 5 hours") and you know better.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from ops.checks import configuration, flow
from ops.checks.store import client
from ops.checks.target import Target
from queues.connection import Unavailable, translating_errors
from smtp.pacing import Pacing, in_trouble
from smtp.published import published


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="bin/breaker", description="Shows and closes the breaker of the relay.")
    parser.add_argument("action", nargs="?", choices=["show", "close"], default="show")
    parser.add_argument("relay", nargs="?", default="", help="the name of one of several relays; by default all")
    asked = parser.parse_args(arguments)
    target = Target(Path(__file__).parent.parent)
    settings = configuration.load_for(target, "bin/breaker")
    if not settings:
        return 1
    try:
        with translating_errors(), client(settings) as redis:
            relays = [one.name for one in published(redis)]
            if asked.relay and asked.relay not in relays:
                print(f"there is no relay {asked.relay}: {', '.join(relays)}", file=sys.stderr)
                return 2
            opened = [name for name in relays if asked.relay in ("", name) and in_trouble(redis, name)]
            for found in flow.reasons_to_wait(redis, settings, target):
                print(f"{found.found}  ->  {found.fix}")
            for name in opened if asked.action == "close" else ():
                Pacing(redis, (), name).close()
                print("The breaker is closed. Mail goes out within half a minute; what was in hand keeps its time.")
            if not opened:
                print("The breaker is closed: no mail waits for the relay as a whole.")
    except Unavailable as error:
        print(f"{error}; bin/doctor says more", file=sys.stderr)
        return 1
    return 0
