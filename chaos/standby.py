"""Scenes with two relays, `first` and `second`: each pair of their faults, and the first is well again meanwhile.

Beside the common promise: no mail is at both relays, for only trouble before the final dot moves one; and from a minute
after the first's return on, all mail goes by it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from itertools import product

from chaos.stage import QUICK, Scene, Stage
from tests.scripted_relay import ScriptedRelay, hang, swallow
from tests.servers import eventually

LASTS = 18  # seconds that the first's fault lasts; the second's begins and ends so much later
LATER = 9
PREFERRED_AFTER = 60  # seconds
Fault = Callable[[Stage, ScriptedRelay], AbstractContextManager[None]]


@contextmanager
def well(stage: Stage, relay: ScriptedRelay) -> Iterator[None]:
    yield


FAULTS: dict[str, Fault] = {
    "well": well,
    "down": lambda stage, relay: stage.relay_away(relay),
    "slow": lambda stage, relay: stage.relay_says(relay, GREETING=hang, MAIL=hang),
    "cuts after the dot": lambda stage, relay: stage.relay_says(relay, DOT=swallow),
}


def pair(first: Fault, second: Fault) -> Callable[[Stage], None]:
    def play(stage: Stage) -> None:
        stage.wait(3)
        with ExitStack() as seconds:
            with first(stage, stage.relay):
                stage.wait(LATER)
                seconds.enter_context(second(stage, stage.second))
                stage.wait(LASTS - LATER)
                if second is well:
                    eventually(lambda: stage.second.log, 30)
            stage.relay.hang_up_on_all()  # those that hang, too
            stage.back_at = time.monotonic()
            stage.wait(LATER)
        stage.second.hang_up_on_all()
        eventually(lambda: stage.submitted, 180)

    return play


def preferred(stage: Stage) -> Iterator[str]:
    """Yields what is wrong with how two relays were used."""
    first, second = (
        {address: one.at for one in reversed(relay.log) for address in one.recipients}
        for relay in (stage.relay, stage.second)
    )  # when each had the first copy of a mail: one in doubt may come there again
    if both := first.keys() & second.keys():
        yield f"{len(both)} recipients were served by both relays"
    if late := sum(at > stage.back_at + PREFERRED_AFTER for at in second.values()):
        yield f"{late} mails went by the second relay a minute after the first's return"
    if not any(at > stage.back_at + PREFERRED_AFTER for at in first.values()):
        yield "no mail shows that the first relay is preferred again"


SCENES = [
    Scene(
        f"first {one}, second {other}",
        f"of two relays the first is {one} and then well again, the second is {other}",
        pair(FAULTS[one], FAULTS[other]),
        settings={"RETRY_SCHEDULE": QUICK, "SMTP_TIMEOUT": "2s", "WORKER_PROCESSES": "2", "WORKER_CONCURRENCY": "8"},
        standby=True,
        held="cuts" in one + other,
        uncounted="cuts" not in one + other,
        spread=LASTS + PREFERRED_AFTER + 18,
        times=8,
    )
    for one, other in product(list(FAULTS)[1:], FAULTS)
]
