"""Says in one sentence whether all is well: what is wrong, since when, whether mail is lost, and the next step.

RULES is a table in order of gravity: the first rule that holds makes the sentence, the others that hold stand in
`also`, but for those that are only its consequence. Each is a pure function of the facts (facts.py). What a relay's
reply means is said by checks/replies.py, what fixes Redis by checks/store.py.

No sentence holds an address, a subject, a secret or a relay's own words: it is pushed to other services (alerts.py).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from datetime import datetime
from typing import Literal, NamedTuple

from mail.outbox import Outbox
from ops.checks import replies, store
from ops.checks.findings import counted, lasting, sized
from ops.facts import RECENT, STEP, Facts, gather
from process.relays import ONLY
from queues.connection import CANNOT_NOW, weaknesses
from queues.table import EMAIL, QUEUES
from smtp.policy import Phase
from smtp.published import Published
from smtp.verdict import Reply

Level = Literal["well", "warn", "bad"]
SOON = 60  # seconds that a mail may wait while all is well
LATE = 300  # seconds after which that is worth a push
QUIET = 600  # seconds without a mail sent
FEW = 5  # of so many mails nothing is a large share
SHARE = 0.2  # of the last mails that may fail
STUCK = 900  # seconds after the moment at which the sweep should have looked at a mail
NEEDS_RESTART = re.compile(r"\b(SMTP_\w+|MAIL_FROM|EHLO_NAME|WORKER_CONCURRENCY)\b")
REFUSED = "new mail is refused with 503, and none goes out; what was accepted is kept"


class Condition(NamedTuple):
    """One thing that can be said about the service. `push`: it is worth waking somebody."""

    level: Level
    kind: str
    sentence: str
    fix: str = ""
    since: float | None = None
    also: tuple[Condition, ...] = ()
    push: bool = False


def look(outbox: Outbox) -> Condition:
    """Returns how the service is at this moment."""
    return judge(gather(outbox))


def judge(facts: Facts) -> Condition:
    """Returns the gravest thing that the facts show, and the others in its `also`."""
    found: list[Condition] = []
    for _, rule, causes in RULES:
        if not any(one.kind in causes for one in found):
            found += rule(facts)
    first, *others = found or [well(facts)]
    return first._replace(also=tuple(others))


def hidden(seen: Condition) -> set[str]:
    """Returns the kinds of which cannot be said whether they hold, since others do that would cause them."""
    shown = {one.kind for one in (seen, *seen.also)}
    caused = {kind for kinds, _, causes in RULES for kind in kinds if causes & shown}
    return (caused | ({"relay_down"} if "relay" in shown else set())) - shown


def well(facts: Facts) -> Condition:
    sent, bulk = facts.today["sent"], facts.queues[EMAIL].jobs["bulk"] if facts.queues else 0
    today = f"{sent:,} sent today" if sent else "no mail has been sent today"
    if bulk:
        rest = f"and {mails(bulk, 'of priority bulk waits for its turn', 'of priority bulk wait for their turn')}"
    else:
        rest = f"and in the last hour nothing has waited longer than {lasting(max(1, facts.longest))}"
    return Condition("well", "well", f"All is well: {today}, {rest}.")


def unavailable(facts: Facts) -> Iterator[Condition]:
    why = facts.unavailable
    if why:
        kind = {CANNOT_NOW["MASTERDOWN"]: "replica", CANNOT_NOW["READONLY"]: "replica"}.get(why, "redis")
        yield Condition(
            "bad", kind, f"{why}: {REFUSED}.", f"{facts.target.command('doctor')} says what is wrong with it", push=True
        )


def unfit(facts: Facts) -> Iterator[Condition]:
    """Yields why Redis takes nothing, or does not keep what it takes."""
    at = store.address(facts.settings)
    limit, used = sized(facts.info.get("maxmemory", 0)), sized(facts.info.get("used_memory", 0))
    said = {
        "replica": ("replica", f"Redis is a read-only replica: {REFUSED}."),
        "aof_failing": ("disk", f"Redis cannot write its append-only file, so {REFUSED}."),
        "snapshot_failing": ("disk", "Redis cannot write its snapshot, and may refuse mail until it can."),
        "full": (
            "full",
            f"Redis is full ({used} of {limit}): new mail is refused with 503. {waits(facts)}",
        ),
        "no_aof": ("unsafe", "Redis keeps no append-only file: a crash would lose accepted mail."),
        "evicting": ("unsafe", "Redis may drop mail when its memory is short (maxmemory-policy is not noeviction)."),
    }
    weak = {name for name, _ in weaknesses(facts.info)} if facts.info else set()
    for name, (kind, sentence) in said.items():
        if name in weak:
            yield Condition("bad", kind, sentence, store.fix_of(name, at, facts.target), push=True)


def unconfirmed(facts: Facts) -> Iterator[Condition]:
    if facts.replicas and (why := facts.replicas.trouble):
        fix = f"{facts.target.command('doctor')} says which Redis or Sentinel is away, and what fixes it"
        yield Condition("bad", "unconfirmed", f"{why[0].upper()}{why[1:]}: {REFUSED}.", fix, push=True)


def fewer(facts: Facts) -> Iterator[Condition]:
    """Says that a replica or a Sentinel is away: one more, and nothing goes on."""
    if not (seen := facts.replicas):
        return
    fix = f"{facts.target.command('doctor')} says which, and what fixes it"
    if away := max(0, seen.known - seen.in_step):
        sentence = (
            f"Of Redis' {counted(seen.known, 'replica')} {away} {plural(away, 'is', 'are')} away or lagging behind."
        )
        yield Condition("warn", "replicas", sentence, fix, push=True)
    if away := seen.of_sentinels - seen.sentinels:
        sentence = (
            f"Of Redis' {counted(seen.of_sentinels, 'Sentinel')} {away} {plural(away, 'does', 'do')} not answer: "
        )
        yield Condition("warn", "sentinels", f"{sentence}without most of them none is replaced.", fix, push=True)


def no_worker(facts: Facts) -> Iterator[Condition]:
    for name in QUEUES:
        seen = facts.queues.get(name)
        if not seen or seen.workers:
            continue
        if name == EMAIL:
            sentence = f"No worker runs, so no mail goes out. {waits(facts)}"
            yield Condition("bad", "worker", sentence, facts.target.restart(f"worker@{name}"), push=True)
        elif jobs := seen.jobs["queued"] + seen.jobs["scheduled"]:
            sentence = f"No worker takes jobs from the queue {name}: {jobs:,} {plural(jobs, 'waits', 'wait')}."
            yield Condition("warn", f"worker_{name}", sentence, facts.target.restart(f"worker@{name}"), push=True)


def relay(facts: Facts) -> Iterator[Condition]:
    seen = facts.standing
    if not seen or not (seen.open_until or facts.waiting):
        return
    since = f", since {moment(seen.since, facts.now)}" if seen.since else ""
    said, fix = f"The relay is in trouble{since}", f"{facts.target.command('doctor')} tries it, and says what is wrong"
    if seen.reply:
        meaning, code, fix = meant(seen.reply, Published(ONLY, where=facts.settings.smtp_host or ""))
        said = f"{meaning[0].upper()}{meaning[1:]}{since}{code}"
        fix += f"; {facts.target.edit}" if NEEDS_RESTART.search(fix) else ""
    is_open = bool(seen.open_until)
    more = waits(facts) if is_open else "After three such mails in a row, all mail waits."
    yield Condition("bad" if is_open else "warn", "relay", f"{said}. {more}", fix, seen.since or None, push=is_open)


def meant(reply: Reply, at: Published) -> tuple[str, str, str]:
    """Returns what a relay's reply means, its code in brackets, and what fixes it."""
    meaning, fix = replies.explain_at(at, reply)
    meaning = re.split(r"[,;] (?:and )?(?:mail|they) waits?\b", meaning)[0]
    code = reply.text if reply.phase is Phase.CONNECT else reply.summary
    return meaning, "" if "certificate" in reply.text else f" ({code})", fix


def relays(facts: Facts) -> Iterator[Condition]:
    """Says that all of several relays are in trouble, or some, though mail goes by another."""
    closed = [(one.relay, one.standing) for one in facts.relays if one.standing and one.standing.open_until]
    if not closed:
        return
    one, seen = closed[0]
    said, fix = "", f"{facts.target.command('doctor')} tries it, and says what is wrong"
    if seen.reply:
        meaning, code, fix = meant(seen.reply, one)
        said, fix = f": {meaning}{code}", f"{fix}; {facts.target.edit_relays}"
    since = f", since {moment(seen.since, facts.now)}" if seen.since else ""
    if len(closed) == len(facts.relays):
        who, then = f"All relays are in trouble; {one.name}", waits(facts)
    else:
        down = [each.name for each, _ in closed]
        works = [each.relay.name for each in facts.relays if each.relay.serves_all and each.relay.name not in down]
        who = f"Relay {one.name} is in trouble" if len(down) == 1 else f"Relays {', '.join(down)} are in trouble"
        then = f"Mail goes by {works[0]}." if works else "Mail that no other takes waits."
    level: tuple[Level, str] = ("bad", "relay") if len(closed) == len(facts.relays) else ("warn", "relay_down")
    yield Condition(*level, f"{who}{since}{said}. {then}", fix, seen.since or None, push=True)


def suspended(facts: Facts) -> Iterator[Condition]:
    if facts.suspended:
        sentence = f"A person has paused all sending. {waits(facts)}"
        fix = f"resume all workers at /mail/system, with the key p of {facts.target.command('top')}, or with rq resume"
        yield Condition("warn", "suspended", sentence, fix, push=oldest(facts)[0] > QUIET)  # has it been forgotten?


def stuck(facts: Facts) -> Iterator[Condition]:
    """Says that living workers leave the mail where it is."""
    age, jobs = oldest(facts)
    if age > SOON and facts.now - facts.last_sent > SOON and not facts.in_hand:
        sentence = f"Workers run, and take nothing: {jobs:,} {plural(jobs, 'mail waits', 'mails wait')} in the queue, "
        sentence += f"the oldest for {lasting(age)}. None is lost."
        yield Condition("bad", "stuck", sentence, facts.target.restart("worker@email"), facts.now - age, push=True)


def scheduler(facts: Facts) -> Iterator[Condition]:
    late = facts.queues[EMAIL].overdue if facts.queues else 0
    if late > (SOON if facts.has_scheduler else SOON / 4):
        many = plural(facts.overdue, "mail was due", "mails were due")
        sentence = f"The worker's scheduler stands still: {facts.overdue:,} {many}, the first {lasting(late)} ago, and "
        sentence += "nobody queues them. None is lost."
        fix = facts.target.restart("worker@email")
        yield Condition("bad", "scheduler", sentence, fix, facts.now - late, push=late > SOON)


def quiet(facts: Facts) -> Iterator[Condition]:
    """Says that mail waits and none gets through, for whatever reason."""
    age, _ = oldest(facts)
    silent = facts.now - facts.last_sent
    put_off = facts.recent["delayed"] >= FEW
    if silent > QUIET and (age > SOON or put_off) and not facts.recent["sent"]:
        since = f"since {moment(facts.last_sent, facts.now)}" if facts.last_sent else "so far"
        why, fix = "though mail is in hand: the relay takes long", f"{facts.target.command('doctor')} tries the relay"
        if put_off:
            why, fix = "the relay puts all of it off", "/mail/failures has the relay's replies, and what each means"
        sentence = f"No mail has been sent {since}, {why}. {waits(facts)}"
        yield Condition("bad", "quiet", sentence, fix, facts.last_sent or None, push=True)


def clock(facts: Facts) -> Iterator[Condition]:
    by, at = facts.clock_set
    fix = "timedatectl shows whether it is synchronised; sudo timedatectl set-ntp true"
    ahead = facts.queues[EMAIL].ahead if facts.queues else 0
    if abs(facts.skew) > STEP:
        way = "ahead of" if facts.skew > 0 else "behind"
        sentence = f"Redis' clock is {lasting(abs(facts.skew))} {way} ours, so mail is tried at the wrong moment."
    elif ahead > STEP:
        sentence = f"A worker's clock is {lasting(ahead)} ahead of ours, so mail is tried at the wrong moment."
    elif by and 0 <= facts.now - at < QUIET:
        way, then = ("forward", "sooner") if by > 0 else ("back", "later")
        sentence = f"This machine's clock was set {way} by {lasting(abs(by))} at {moment(at, facts.now)}: "
        sentence += f"mail that was put off before is tried so much {then}."
    else:
        return
    yield Condition("warn", "clock", sentence, fix, at or None, push=True)


def rate(facts: Facts) -> Iterator[Condition]:
    lines = [("SMTP_RATE", "", facts.rate_until, facts.settings.smtp_rate, facts.target.edit)]
    for one in facts.relays:
        lines.append(("rate", f" of relay {one.relay.name}", one.rate_until, one.relay.rate, facts.target.edit_relays))
    for name, of_one, until, rates, edit in lines:
        if until - facts.now > SOON and rates:
            sentence = f"{name[0].upper()}{name[1:]}{of_one} ({','.join(map(str, rates))}) is used up: mail waits "
            sentence += f"for its turn, the last until about {moment(until, facts.now)}. {waits(facts)}"
            fix = f"nothing, if the relay allows no more; else raise {name}: {edit}"
            yield Condition("warn", "rate", sentence, fix, push=until - facts.now > LATE)
            return


def slow(facts: Facts) -> Iterator[Condition]:
    age, _ = oldest(facts)
    if age > LATE:
        sentence = f"Mail goes out too slowly: the oldest in the queue has waited for {lasting(age)}. {waits(facts)}"
        more = 2 * facts.settings.worker_concurrency
        fix = f"set WORKER_CONCURRENCY={more}, if the relay allows it: {facts.target.edit}"
        yield Condition("warn", "slow", sentence, fix, facts.now - age, push=True)


def in_doubt(facts: Facts) -> Iterator[Condition]:
    if many := facts.in_doubt:
        sentence = f"{many:,} {plural(many, 'mail is', 'mails are')} in doubt: the relay may have accepted "
        sentence += f"{plural(many, 'it', 'them')}, and a person must decide."
        fix = f"open {plural(many, 'it', 'each')} from /mail/failures, look for its Message-ID in the relay's log, "
        fix += "and say whether it arrived"
        yield Condition("warn", "doubt", sentence, fix, push=True)


def failing(facts: Facts) -> Iterator[Condition]:
    failed = facts.recent["failed"]
    ended = failed + facts.recent["sent"]
    if failed >= FEW and failed > SHARE * ended:
        sentence = f"{failed:,} of the {ended:,} mails of the last {RECENT} minutes have failed. "
        sentence += "They are kept, and can be requeued."
        yield Condition("warn", "failing", sentence, "/mail/failures shows why, and what fixes it", push=True)


def unswept(facts: Facts) -> Iterator[Condition]:
    late = facts.now - facts.to_sweep if facts.to_sweep else 0
    if late > STUCK:
        sentence = f"A mail has been stuck for {lasting(late)}, and no sweep takes care of it."
        yield Condition("warn", "sweep", sentence, facts.target.restart("worker@email"), facts.to_sweep, push=True)


def disk(facts: Facts) -> Iterator[Condition]:
    free, file = facts.disk_free, facts.info.get("aof_current_size", 0)
    if free is not None and free < max(store.LITTLE / 4, file):
        sentence = f"Redis' disk is nearly full, with {sized(free)} free: soon it will refuse mail."
        yield Condition("warn", "disk", sentence, "make room: sudo du -xh / | sort -h | tail", push=True)


def webhooks(facts: Facts) -> Iterator[Condition]:
    """Says that an application is not told what becomes of its mails."""
    silent = [one for one in facts.webhooks if one.is_silent(facts.now)]
    down = [one for one in facts.webhooks if one.is_down and one not in silent]
    for one, others in ((found[0], found[1:]) for found in (silent, down) if found):
        if one in silent:
            since, fix = one.seen, facts.target.restart("webhooks")
            sentence = f"No process posts to the webhook at {one.host} since {moment(since, facts.now)}"
        else:
            since, fix = one.since, "see why it does, at /mail/webhooks; what waits goes out once it answers"
            sentence = f"The webhook at {one.host} has failed since {moment(since, facts.now)} ({one.reply})"
        sentence += f"; what became of {counted(one.waiting, 'mail')} waits to be told." if one.waiting else "."
        sentence += f" So it is with {len(others)} more." if others else ""
        kind = "webhooks" if one in silent else "webhook"
        yield Condition("warn", kind, sentence, fix, since or None, push=facts.now - since > LATE)


REDIS = frozenset({"redis", "replica", "disk", "full", "unconfirmed"})
STANDS = REDIS | {"worker", "relay", "suspended", "stuck"}  # mail stands still, and it is known why
Rule = Callable[[Facts], Iterator[Condition]]
# fmt: off
RULES: tuple[tuple[tuple[str, ...], Rule, frozenset[str]], ...] = (
    # the kinds that a rule yields, the rule, the kinds of which it would only be a consequence
    (("redis", "replica"), unavailable, frozenset()),
    (("replica", "disk", "full", "unsafe"), unfit, frozenset()),
    (("unconfirmed",), unconfirmed, frozenset({"redis", "replica"})),
    (("worker", *(f"worker_{name}" for name in QUEUES)), no_worker, frozenset({"redis", "replica", "disk"})),
    (("relay",), relay, frozenset()),
    (("relay", "relay_down"), relays, frozenset()),
    (("suspended",), suspended, frozenset()),
    (("stuck",), stuck, STANDS),
    (("scheduler",), scheduler, STANDS - {"suspended", "relay"}),
    (("quiet",), quiet, STANDS | {"rate"}),
    (("replicas", "sentinels"), fewer, frozenset({"redis", "replica", "unconfirmed"})),
    (("clock",), clock, frozenset()),
    (("rate",), rate, STANDS),
    (("slow",), slow, STANDS | {"quiet"}),
    (("doubt",), in_doubt, frozenset()),
    (("failing",), failing, frozenset()),
    (("sweep",), unswept, STANDS | {"scheduler"}),
    (("webhooks", "webhook"), webhooks, frozenset()),
    (("disk",), disk, frozenset({"disk"})),
)
# fmt: on


def oldest(facts: Facts) -> tuple[float, int]:
    """Returns for how long the oldest mail in the queue has waited, and how many are there. Bulk mail that was let in
    is old, and nothing is wrong as long as mail goes out."""
    if not facts.queues:
        return 0, 0
    seen = facts.queues[EMAIL]
    is_bulk = seen.jobs["bulk"] and facts.now - facts.last_sent < LATE
    return 0 if is_bulk else seen.oldest_queued or 0, seen.jobs["queued"]


def waits(facts: Facts) -> str:
    """Returns the sentence that says how many mails wait, and whether one may be lost."""
    if not facts.waiting:
        return "No mail waits."
    kept = "" if {name for name, _ in weaknesses(facts.info)} & {"no_aof"} else ", none is lost"
    return f"{mails(facts.waiting, 'waits', 'wait')}{kept}."


def mails(number: int, one: str, several: str) -> str:
    return f"{number:,} {plural(number, f'mail {one}', f'mails {several}')}"


def plural(number: int, one: str, several: str) -> str:
    return one if number == 1 else several


def moment(at: float, now: float) -> str:
    """Returns a moment as `14:02` or, if that was not today, `24 Nov 14:02`."""
    try:
        then, today = datetime.fromtimestamp(at), datetime.fromtimestamp(now)
    except (ValueError, OverflowError, OSError):  # no year that Python knows
        return "a moment that is none"
    return f"{then:%H:%M}" if then.date() == today.date() else f"{then.day} {then:%b %H:%M}"
