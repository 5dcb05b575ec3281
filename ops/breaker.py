"""Shows whether all mail waits for the relay, and why; closes the breaker if asked: `bin/breaker [close]`.

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


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="bin/breaker", description="Shows and closes the breaker of the relay.")
    parser.add_argument("action", nargs="?", choices=["show", "close"], default="show")
    asked = parser.parse_args(arguments)
    target = Target(Path(__file__).parent.parent)
    settings = configuration.load_for(target, "bin/breaker")
    if not settings:
        return 1
    try:
        with translating_errors(), client(settings) as redis:
            is_open = in_trouble(redis)
            for found in flow.reasons_to_wait(redis, settings, target):
                print(f"{found.found}  ->  {found.fix}")
            if is_open and asked.action == "close":
                Pacing(redis, ()).close()
                print("The breaker is closed. Mail goes out within half a minute; what was in hand keeps its time.")
            elif not is_open:
                print("The breaker is closed: no mail waits for the relay as a whole.")
    except Unavailable as error:
        print(f"{error}; bin/doctor says more", file=sys.stderr)
        return 1
    return 0
