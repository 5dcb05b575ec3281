"""The account of a scene: what the client was told, what the relay accepted, what Redis has, held against each other.

A mail is acknowledged if its client was answered with 2xx. It is lost if the relay never accepted it, forgotten if
Redis does not have it. One that the relay accepted twice is doubled: said if its attempts say so (in doubt, or
interrupted), otherwise silent. Time is no fault of a run: `late` has what was slower than is promised.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from dataclasses import dataclass, field
from itertools import pairwise

import redis

from chaos.ha.stage import Stage
from mail.states import FINAL, State
from smtp.policy import Verdict

API_LIMIT, MAIL_LIMIT = 10, 15  # seconds
FINAL_WITHIN = 150  # seconds from the end of the load until every mail is final
DOUBT = (Verdict.IN_DOUBT.value, "interrupted")


@dataclass
class Row:
    scene: str
    server: str
    acknowledged: int = 0
    given_up: int = 0
    lost: int = 0
    doubled: int = 0
    silent: int = 0
    failed: int = 0  # or final in another way than sent
    forgotten: int = 0
    api: float = 0  # the longest time without an acknowledgement
    mail: float = 0  # and without a mail at the relay
    restarts: int = 0  # of processes of ours that ended by themselves
    broken: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        cells = [self.scene, self.server, self.acknowledged, self.given_up, self.lost, self.doubled, self.silent]
        cells += [self.failed, self.forgotten, f"{self.api:.1f} s", f"{self.mail:.1f} s", self.restarts]
        return f"| {' | '.join(map(str, cells))} | {'; '.join([*self.broken, *self.late]) or 'kept'} |"

    @property
    def late(self) -> list[str]:
        late = [f"the API was away for {self.api:.1f} s"] if self.api > API_LIMIT else []
        return late + ([f"no mail flowed for {self.mail:.1f} s"] if self.mail > MAIL_LIMIT else [])


HEADINGS = ["scene", "server", "acknowledged", "given up", "lost", "doubled", "of these silent", "failed", "forgotten"]
HEADINGS += ["API away", "mail away", "restarts", "promise"]


def account(stage: Stage) -> Row:
    """Waits until every mail is final, and counts."""
    row, client = Row(stage.scene.name, ""), stage.client
    with stage.redis(stage.primary()) as server:
        row.server = version(server)
        states = _final_states(server, client.acknowledged)
        copies = Counter(one.recipients[0].partition("@")[0] for one in stage.relay.log)
        row.acknowledged = len(client.acknowledged)
        row.given_up = len(client.submitted) - row.acknowledged
        for key, mail_id in client.acknowledged.items():
            state = states[mail_id]
            row.lost += not copies[key]
            row.forgotten += state is None
            row.failed += state not in (None, State.SENT)
            if copies[key] > 1:
                row.doubled += 1
                row.silent += _doubts(server, mail_id) < copies[key] - 1
    until = client.last_at
    row.api = _gap(client.acknowledged_at, stage.fault_at, until)
    row.mail = _gap([one.at for one in stage.relay.log], stage.fault_at, until)
    row.restarts = sum(len(service.exits) for service in stage.supervisor.services.values())
    for name in ("given_up", "lost", "silent", "failed", "forgotten"):
        if count := getattr(row, name):
            row.broken.append(f"{count} {name.replace('_', ' ')}")
    if odd := {status: count for status, count in client.answers.items() if status not in (0, 200, 503)}:
        row.broken.append(f"the API answered {odd}")
    return row


def version(server: redis.Redis) -> str:
    seen = server.info("server")
    return f"{seen.get('server_name', 'redis')} {seen.get('valkey_version', seen['redis_version'])}"


def _final_states(server: redis.Redis, acknowledged: dict[str, str]) -> dict[str, str | None]:
    """Returns the state of each mail by id, when all are final or it has taken too long; None: there is none."""
    states: dict[str, str | None] = dict.fromkeys(acknowledged.values(), "")
    deadline = time.monotonic() + FINAL_WITHIN
    while True:
        pending = [mail_id for mail_id, state in states.items() if state not in FINAL]
        with server.pipeline(transaction=False) as pipe:
            for mail_id in pending:
                pipe.hget(f"mail:{mail_id}", "state")
            seen = pipe.execute()
        states |= {mail_id: state and state.decode() for mail_id, state in zip(pending, seen, strict=True)}
        if all(state in FINAL or state is None for state in states.values()) or time.monotonic() > deadline:
            return states
        time.sleep(0.5)


def _doubts(server: redis.Redis, mail_id: str) -> int:
    attempts = json.loads(server.hget(f"mail:{mail_id}", "attempts") or b"[]")
    return sum(one.get("verdict") in DOUBT for one in attempts)


def _gap(moments: list[float], since: float, until: float) -> float:
    """Returns the longest time in which nothing happened."""
    between = [since, *sorted(one for one in moments if since <= one <= until), until]
    return max(later - earlier for earlier, later in pairwise(between))
