"""The scenes by name: each a fault in one sentence, and what is done to which host.

Who is the primary is asked in the moment of the fault. What a scene breaks is mended when it is over (`Stage.mend`).
"""

from __future__ import annotations

import time
from functools import partial

from chaos.ha.stage import APIS, GROUP, REDIS, WORKERS, Scene, Stage, sentinel_of
from tests.servers import eventually


def others(host: str) -> list[str]:
    return [one for one in REDIS if one != host]


def kill(stage: Stage) -> None:
    stage.supervisor.kill(stage.primary())


def kill_and_restart(stage: Stage) -> None:
    stage.supervisor.kill(stage.primary(), off=False)


def kill_with_sentinel(stage: Stage) -> None:
    primary = stage.primary()
    stage.supervisor.kill(primary, sentinel_of(primary))


def switch_off(stage: Stage) -> None:
    primary = stage.primary()
    stage.network.link(primary, "down")
    stage.supervisor.kill(primary, sentinel_of(primary))


def stall_and_switch_off(stage: Stage) -> None:
    primary = stage.primary()
    stage.network.cut([primary], others(primary))
    stage.over.wait(2)
    switch_off(stage)


def split(stage: Stage) -> None:
    cut_off = [stage.primary(), APIS[0], WORKERS[0]]
    stage.network.cut(cut_off, [host for host in (*REDIS, *APIS, *WORKERS) if host not in cut_off])


def cut_between(stage: Stage) -> None:
    primary = stage.primary()
    stage.network.cut([primary], others(primary))


def pause(stage: Stage, seconds: float) -> None:
    primary = stage.primary()
    stage.supervisor.pause(primary)
    stage.over.wait(seconds)
    stage.supervisor.back()


def fail_over(stage: Stage) -> None:
    """Asks the Sentinel of another host, which alone knows of it at first."""
    primary = stage.primary()
    stage.sentinel(others(primary)[0], "FAILOVER", GROUP)
    eventually(lambda: stage.primary() != primary, 60)


def kill_both(stage: Stage) -> None:
    """Leaves one of three, which nobody can confirm. What is counted begins when the others are started again."""
    primary = stage.primary()
    stage.supervisor.kill(others(primary)[0])
    stage.over.wait(5)
    stage.supervisor.kill(primary)
    stage.over.wait(10)
    stage.fault_at = time.monotonic()
    stage.supervisor.back()


def cut_off_worker(stage: Stage) -> None:
    stage.network.cut([WORKERS[0]], REDIS)


FAULTS = [
    Scene("kill -9", "the primary is killed", kill),
    Scene("killed and restarted", "the primary is killed, and started again after a second", kill_and_restart),
    Scene("host off", "the primary's host is off", switch_off),
    Scene("lag", "nothing reaches the replicas for 2 s, then the primary's host is off", stall_and_switch_off),
    Scene("split", "the primary, an API and a host of workers are cut off from all others", split, lasts=30),
    Scene("between", "the primary is cut off from the two other Redis hosts; all else reaches all", cut_between, 30),
    Scene("Sentinel, too", "the primary and the Sentinel beside it are killed in the same moment", kill_with_sentinel),
    Scene("replica, then primary", "a replica is killed, then the primary; both start 10 s later", kill_both),
    Scene("planned", "SENTINEL FAILOVER", fail_over),
    Scene("worker cut off", "workers are cut off from Redis, not from the relay", cut_off_worker, 100, slow_relay=0.3),
    Scene("clocks apart", "of two hosts of workers clocks are 30 s off, and the primary is killed", kill,
          clocks={WORKERS[0]: 30, WORKERS[1]: -30}),
    Scene("versions mixed", "half of the hosts run another version, and the primary is killed", kill, mixed=True),
    *(
        Scene(f"paused {seconds} s", f"the primary stands still for {seconds} s", partial(pause, seconds=seconds))
        for seconds in (1, 2.5, 3.1, 3.4, 3.8, 4.2, 6, 10)
    ),
]  # fmt: skip
SCENES = {scene.name: scene for scene in FAULTS}
