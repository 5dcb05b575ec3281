"""What has happened to a mail, step by step, and what comes next. Pure.

Attempts of an earlier version have no worker and no figures: then those steps are left out.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence, Set
from typing import Any, NamedTuple

from mail.claim import timestamp
from mail.outbox import BY_A_PERSON
from mail.states import FINAL, SCHEDULED, State
from ops.checks.findings import sized
from ops.page.audit import Action
from ops.page.view import WITHOUT_LOGIN
from smtp.policy import Verdict

SETTLED = "settled"  # the verdict of what is no attempt: mail.outbox's `arrived`
VERDICTS = {  # of an attempt -> what it is called, and how it looks
    Verdict.ACCEPTED.value: ("The relay accepted it", "well"),
    Verdict.TRY_AGAIN.value: ("The relay put it off", "warn"),
    Verdict.REFUSED.value: ("The relay refused it", "bad"),
    Verdict.IN_DOUBT.value: ("No answer to the final dot: the relay may have it", "warn"),
    Verdict.TROUBLE.value: ("The relay is in trouble, which costs the mail no attempt", "warn"),
    SETTLED: ("Settled", "well"),  # and how that is known
    State.BOUNCED.value: ("It came back", "bad"),
    State.COMPLAINED.value: ("A recipient called it spam", "bad"),
    "interrupted": ("The worker died in this attempt", "warn"),
}
ENDS = {  # a state -> what it is called, how it looks, and what a person does to bring it about
    State.SENT: ("Sent", "well", ""),
    State.FAILED: ("Failed", "bad", ""),
    State.UNKNOWN: ("In doubt, and held", "warn", ""),
    State.CANCELED: ("Canceled", "", "cancel"),
    State.SUPPRESSED: ("Suppressed: each recipient is on the suppression list", "warn", ""),
    State.BOUNCED: ("Bounced", "bad", ""),
    State.COMPLAINED: ("Complained of", "bad", ""),
}
DONE = {"requeue": "Queued again", "cancel": "Canceled", "move": "Moved to another time"}
DONE |= {"arrived": "Said to have arrived", "copy": "A copy sent to ALERT_TO"}


class Step(NamedTuple):
    """`at` is in seconds since 1970, 0 where nobody knows; `gap` is how many seconds passed since the step before."""

    what: str
    at: float = 0
    reply: str = ""  # code and phase, or a reason of ours
    said: str = ""  # the relay's words
    facts: tuple[str, ...] = ()
    look: str = ""  # well, warn, bad, or ahead: it is still to come
    gap: float | None = None


def steps(mail: Mapping[str, Any], settled_at: float, running: Step | None, done: Sequence[Action]) -> list[Step]:
    """Returns the steps in their order. `running` is the attempt that has not ended yet, `done` what people did."""
    told = {one.what for one in done}
    attempts = [one for one in mail["attempts"] if not (one["text"] == BY_A_PERSON and "arrived" in told)]
    found = [*_begin(mail), *(step for one in attempts for step in _attempt(one))]
    found += [Step(f"{DONE.get(one.what, one.what)} {_by(one.who)}", one.at) for one in done]
    found += [running] if running and mail["status"] == State.SENDING else []
    found = sorted(found, key=lambda step: step.at)  # those of the same moment stay in their order
    found += _end(mail, settled_at, told)
    before = found[0].at
    for place, step in enumerate(found):
        if step.at and step.look != "ahead":
            found[place] = step._replace(gap=max(0.0, step.at - before) if place else None)
            before = step.at
    return found


def _by(who: str) -> str:
    return who if who == WITHOUT_LOGIN else f"by {who}"


def _begin(mail: Mapping[str, Any]) -> Iterator[Step]:
    key = f" by key {mail['key']}" if mail["key"] else ""
    yield Step(f"Accepted{key}", timestamp(mail["created_at"]))
    if mail["scheduled_at"] and mail["status"] != SCHEDULED:
        yield Step("Its time has come", timestamp(mail["scheduled_at"]))


def _attempt(one: Mapping[str, Any]) -> Iterator[Step]:
    began, dot, took = timestamp(one.get("began") or ""), one.get("dot_ms"), one.get("took_ms")
    if began:
        yield Step(f"Claimed by worker {one.get('worker')}", began)
    if began and dot is not None:
        yield Step("Final dot sent", began + dot / 1000)
    ended = began + took / 1000 if began and took is not None else timestamp(one["at"])
    what, look = VERDICTS.get(one["verdict"], (one["verdict"], ""))
    size = sized(one["bytes"]) if one.get("bytes") else ""
    tls = one.get("tls") or ("no TLS" if "tls" in one else "")
    relay = ", ".join(str(one[name]) for name in ("relay_name", "relay") if one.get(name))
    facts = tuple(filter(None, (relay, tls, size, "it goes to another relay" if one.get("moved") else "")))
    if one["verdict"] == SETTLED:
        yield Step(one["text"][:1].upper() + one["text"][1:], ended, look=look)
        return
    yield Step(what, ended, reply(one), one["text"], facts, look)


def reply(attempt: Mapping[str, Any]) -> str:
    """Returns code and phase of what the relay said in an attempt: `550 at rcpt`; "" if it did not come to that."""
    if "phase" not in attempt:
        return ""
    return f"{'no reply' if attempt['code'] is None else attempt['code']} at {attempt['phase']}"


def _end(mail: Mapping[str, Any], settled_at: float, done: Set[str]) -> Iterator[Step]:
    state, attempts = mail["status"], mail["attempts"]
    if state in FINAL:
        what, look, by = ENDS[state]
        accepted = bool(attempts) and attempts[-1]["verdict"] in (Verdict.ACCEPTED, SETTLED)
        told_of = (state == State.SENT and accepted) or (attempts and attempts[-1]["verdict"] == state)
        if by not in done and not told_of:  # those steps say it already
            why = mail["reason"] if state in (State.FAILED, State.UNKNOWN) else ""
            told = bool(attempts) and why == reply(attempts[-1])
            yield Step(what, settled_at, "" if told else why or "", look=look)
        return
    if state == SCHEDULED:
        yield Step("Due", timestamp(mail["scheduled_at"]), look="ahead")
    if mail["next_attempt_at"]:
        yield Step("Next attempt", timestamp(mail["next_attempt_at"]), look="ahead")
    if mail["expires_at"]:
        yield Step("Expires, if it is not sent by then", timestamp(mail["expires_at"]), look="ahead")
