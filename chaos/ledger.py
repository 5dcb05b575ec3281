"""The account of a scene: the client's 202s, the relay's log and `GET /emails/{id}`, held against each other.

A copy is doubled where the relay took responsibility for the same recipient's mail before. It is allowed only with
ON_DOUBT=retry and only if nobody can have known of the earlier one: its answer did not reach the worker (the relay cut,
or had not answered yet), or the worker died before it spoke to the relay again, which it does when it has written the
answer down. A mail is lost where a recipient was neither served nor reported. `Row.broken` lists what was promised and
not kept, in words.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field

from chaos.stage import TAKEN, Mail, Stage
from chaos.standby import preferred
from mail.states import FINAL, State, Status
from ops.checks.store import program
from tests.scripted_relay import Acceptance, header


@dataclass
class Row:
    scene: str
    server: str
    on_doubt: str
    accepted: int = 0
    once: int = 0
    doubled: int = 0
    allowed: int = 0
    lost: int = 0
    in_doubt: int = 0
    failed: int = 0
    disagree: int = 0
    recovery: float = 0  # seconds
    broken: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        cells = [self.scene, self.server, self.on_doubt, self.accepted, self.once, self.doubled, self.allowed]
        cells += [self.lost, self.in_doubt, self.failed, self.disagree, f"{self.recovery:.0f} s"]
        return f"| {' | '.join(map(str, cells))} | {'; '.join(self.broken) or 'kept'} |"


def account(stage: Stage) -> Row:
    """Waits until every mail is final, and counts. Is called when the fault is over and the client is done."""
    version = program(stage.client.info("server"))
    row = Row(stage.scene.name, version, stage.on_doubt, accepted=len(stage.accepted))
    row.recovery = stage.wait_until_final()
    copies: dict[str, list[Acceptance]] = defaultdict(list)
    for one in sorted(stage.relay.log + stage.second.log, key=lambda one: one.at):
        for address in one.recipients:
            copies[address].append(one)
    for mail in stage.mails:
        if mail.key in stage.accepted:
            _count(row, stage, mail, copies)
        else:
            row.broken.append(f"{mail.key} was never accepted: {dict(stage.answers)}")
    _check(row, stage)
    return row


def _count(row: Row, stage: Stage, mail: Mail, copies: dict[str, list[Acceptance]]) -> None:
    mail_id = stage.accepted[mail.key]
    seen = stage.get(f"/emails/{mail_id}") or {"status": "not found", "recipients": [], "message_id": ""}
    reported = {one["address"]: one["status"] for one in seen["recipients"]}
    served = {address: copies[address] for address in mail.recipients}
    state = seen["status"]
    row.in_doubt += state == State.UNKNOWN
    row.failed += state == State.FAILED
    row.once += state == State.SENT and all(len(each) == 1 for each in served.values())
    if state not in FINAL or any(
        not each and reported.get(who) in (Status.ACCEPTED, None) for who, each in served.items()
    ):
        row.lost += 1
        row.broken.append(f"{mail_id} is lost: it is {state}, the relay has {_counts(served)}")
    for address, each in served.items():
        _count_copies(row, stage, mail_id, each)
        if not _agree(state, reported.get(address, ""), each):
            row.disagree += 1
            row.broken.append(f"{mail_id}: {state} and {reported.get(address)}, the relay has {_counts(served)}")
    if any(header(one.body, "Message-ID") != seen["message_id"] for each in served.values() for one in each):
        row.broken.append(f"{mail_id} went out with another Message-ID")
    if stage.scene.uncounted and int(stage.client.hget(f"mail:{mail_id}", "counted") or 0):
        row.broken.append(f"{mail_id} was charged an attempt for the relay's trouble")
    if state == State.FAILED and mail.key not in stage.doomed:
        row.broken.append(f"{mail_id} failed: {seen['reason']}")
    if state != State.FAILED and mail.key in stage.doomed:
        row.broken.append(f"{mail_id} should have failed and is {state}")
    if stage.post(mail) != mail_id:
        row.broken.append(f"{mail_id}: its Idempotency-Key no longer leads to it")


def _count_copies(row: Row, stage: Stage, mail_id: str, copies: list[Acceptance]) -> None:
    for number, copy in enumerate(copies[1:], 1):
        row.doubled += 1
        earlier = copies[:number]
        if stage.on_doubt == "retry" and all(_unknown_to_all(stage, one, copy.at) for one in earlier):
            row.allowed += 1
        else:
            row.broken.append(f"{mail_id} was doubled: {'; '.join(_steps(one, copy.at) for one in earlier)}")


def _unknown_to_all(stage: Stage, acceptance: Acceptance, moment: float) -> bool:
    """Returns whether at this moment no worker that was left could know that the relay had accepted."""
    if _later(acceptance.answered_at, moment):
        return True
    hung_up = not _later(acceptance.hung_up_at, moment)
    return _later(acceptance.acknowledged_at, moment) and (hung_up or stage.has_stopped_a_worker)


def _later(event: float | None, moment: float) -> bool:
    return event is None or event > moment


def _steps(acceptance: Acceptance, moment: float) -> str:
    """Returns how long before `moment` each step was."""
    steps = {
        "taken": acceptance.at,
        "answered": acceptance.answered_at,
        "acknowledged": acceptance.acknowledged_at,
        "hung up": acceptance.hung_up_at,
    }
    return ", ".join(f"{name} {moment - at:.1f} s before" for name, at in steps.items() if at is not None)


def _agree(state: str, reported: str, copies: list[Acceptance]) -> bool:
    if state == State.SENT:
        return bool(reported == Status.ACCEPTED and copies)
    if reported == Status.ACCEPTED:
        return bool(copies)
    return reported == Status.IN_DOUBT or state not in FINAL or not copies


def _counts(served: dict[str, list[Acceptance]]) -> list[int]:
    return [len(each) for each in served.values()]


def _check(row: Row, stage: Stage) -> None:
    if row.recovery > stage.scene.limit:
        row.broken.append(f"it took {row.recovery:.0f} s, more than {stage.scene.limit:.0f}")
    if stage.on_doubt == "retry" and row.in_doubt:
        row.broken.append("ON_DOUBT=retry holds no mail")
    known = {address for mail in stage.mails for address in mail.recipients}
    if any(address not in known for one in stage.relay.log + stage.second.log for address in one.recipients):
        row.broken.append("the relay has mail that nobody submitted")
    row.broken += preferred(stage) if stage.scene.standby else ()
    odd = {status: count for status, count in stage.answers.items() if status not in (0, *TAKEN, 503)}
    if odd:
        row.broken.append(f"the API answered {odd}")
