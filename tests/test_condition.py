"""The one sentence: facts in, and out what is wrong, since when, and the next step. Real faults are in
test_condition_faults.py."""

from __future__ import annotations

import re
import time
from collections import Counter
from datetime import datetime
from typing import Any

import pytest
from redis import Redis

from mail.outbox import Outbox
from ops.condition import judge
from ops.facts import At, Clock, Facts, gather
from process.relays import parse_relays
from process.values import Rate
from queues.health import QueueState, Replicas
from settings import Settings
from smtp.pacing import Pacing, Standing
from smtp.policy import Phase
from smtp.published import Published, publish
from smtp.verdict import Reply
from tests.checks.support import GMAIL
from tests.mails import accept
from webhooks.queue import Standing as Endpoint

NOW = datetime(2026, 11, 27, 14, 0).timestamp()
INFO = {"aof_enabled": 1, "role": "master", "used_memory": 900 << 20}


def queue(oldest: float = 0, overdue: float = 0, workers: int = 16, ahead: float = 0, **jobs: int) -> QueueState:
    return QueueState(Counter(jobs), workers, oldest or None, overdue, ahead)


def since(reply: Reply | None = None, seconds: float = 60, open_until: float = NOW + 9) -> Standing:
    return Standing(open_until, NOW - seconds, reply, "")


def facts(email: QueueState | None = None, jobs: QueueState | None = None, **given: Any) -> Facts:
    settings = Settings(smtp_host=GMAIL, **given.pop("settings", {}))
    known = {"info": INFO | given.pop("info", {}), "queues": {"email": email or queue(), "jobs": jobs or queue()}}
    return Facts(NOW, settings, **{"last_sent": NOW - 5, **known, **given})


def at(name: str, reply: Reply | None = None, until: float = 0, serves_all: bool = True) -> At:
    one = Published(name, "smtp", f"{name}.example:587", (Rate(20, 3600),), serves_all)
    return At(one, since(reply) if reply else None, until)


def hook(name: str = "shop", **given: Any) -> Endpoint:
    known: dict[str, Any] = {"events": [], "seen": NOW - 30, "waiting": 212, "given_up": 0, "since": NOW - 900}
    known |= {"host": f"{name}.example", "is_down": True, "reply": "HTTP 502", "answered": 0, "counts": {}}
    return Endpoint(name, **(known | given))


REFUSED = Reply(Phase.AUTH, 535, "5.7.8 planted words")
AWAY = Reply(Phase.CONNECT, None, "Connection refused")
EXPIRED = Reply(Phase.STARTTLS, None, "the relay's certificate is not valid: certificate has expired")
# fmt: off
TABLE: list[tuple[Facts, str, str, str]] = [  # facts, level and kind (! for a push), words of the sentence, of its fix
    (facts(today=Counter(sent=1204), longest=3), "well well",
     "All is well: 1,204 sent today, and in the last hour nothing has waited longer than 3 s.", ""),
    (facts(queue(9999, bulk=12000, queued=5), longest=9999), "well well", "12,000 mails of priority bulk wait for", ""),
    (Facts(NOW, Settings(), unavailable="Redis does not answer"), "bad redis!", "does not answer: new", "bin/doctor"),
    (Facts(NOW, Settings(), unavailable="Redis is a replica without its master"), "bad replica!", "without its", ""),
    (facts(info={"role": "slave"}), "bad replica!", "Redis is a read-only replica: new mail is refused", "primary"),
    (facts(info={"maxmemory": 900 << 20, "maxmemory_policy": "noeviction"}, waiting=2), "bad full!",
     "Redis is full (900 MB of 900 MB): new mail is refused with 503. 2 mails wait, none is lost.", "maxmemory"),
    (facts(info={"aof_last_write_status": "err"}), "bad disk!", "cannot write its append-only file, so new", "df -h"),
    (facts(info={"rdb_last_bgsave_status": "err"}), "bad disk!", "cannot write its snapshot", "df -h"),
    (facts(info={"aof_enabled": 0}), "bad unsafe!", "a crash would lose", "appendonly yes"),
    (facts(replicas=Replicas("primary", 1, 0, 2, 3, 3, "x")), "bad unconfirmed!",
     "Of the replicas that must confirm what is written (1), 0 are in step: new mail is refused with 503", "doctor"),
    (facts(replicas=Replicas("primary", 1, 2, 2, 1, 3, "x")), "bad unconfirmed!", "Only 1 of 3 Sentinels answer", ""),
    (facts(replicas=Replicas("primary", 1, 2, 2, 3, 3, "x")), "bad unconfirmed!", "Nothing is confirmed (x): new", ""),
    (facts(replicas=Replicas("primary", 1, 1, 2, 3, 3)), "warn replicas!", "Of Redis' 2 replicas 1 is away", ""),
    (facts(replicas=Replicas("primary", 0, 2, 2, 2, 3)), "warn sentinels!", "3 Sentinels 1 does not", "doctor"),
    (facts(replicas=Replicas("primary", 1, 2, 2, 3, 3)), "well well", "", ""),
    (facts(webhooks=[hook(is_down=False), hook(seen=NOW - 100, is_down=False)]), "well well", "All is well", ""),
    (facts(webhooks=[hook(), hook("two")]), "warn webhook!",
     "The webhook at shop.example has failed since 13:45 (HTTP 502); what became of 212 mails waits to be told. "
     "So it is with 1 more.", "/mail/webhooks"),
    (facts(webhooks=[hook(since=NOW - 100, waiting=1)]), "warn webhook", "what became of 1 mail waits", "goes out"),
    (facts(webhooks=[hook(seen=NOW - 600)]), "warn webhooks!", "No process posts to the webhook at shop.example since",
     "webhooks"),
    (facts(queue(workers=0, queued=1), waiting=1), "bad worker!",
     "No worker runs, so no mail goes out. 1 mail waits, none is lost.", "worker.py email"),
    (facts(jobs=queue(workers=0)), "well well", "", ""),
    (facts(jobs=queue(workers=0, queued=3)), "warn worker_jobs!", "No worker takes jobs from the queue jobs: 3", ""),
    (facts(standing=since(REFUSED, 11 * 3600 + 46 * 60), waiting=212), "bad relay!",
     "does not accept this login: SMTP_USERNAME must be the whole address, SMTP_PASSWORD an app password, since 02:14 "
     "(535 at auth). 212 mails wait, none is lost.", "apppasswords"),
    (facts(standing=since(AWAY, 86400)), "bad relay!",
     "The relay cannot be reached, since 26 Nov 14:00 (Connection refused). No mail waits.", "SMTP_HOST"),
    (facts(standing=since(EXPIRED)), "bad relay!",
     "The relay's certificate is not valid at this moment", "timedatectl"),
    (facts(standing=since(Reply(Phase.DOT, 550, "5.4.5 limit exceeded"))), "bad relay!",
     "without Workspace), since 13:59 (550 at dot). No mail waits.", "SMTP_RATE=2000/d"),
    (facts(standing=Standing(NOW, 0, None, "")), "bad relay!", "The relay is in trouble. No mail waits.", "bin/doctor"),
    (facts(standing=since(REFUSED, 5, 0), waiting=1), "warn relay", "13:59 (535 at auth). After three such mails", ""),
    (facts(standing=since(REFUSED, 5, 0)), "well well", "", ""),
    (facts(queue(9), suspended=True, waiting=2), "warn suspended", "has paused all sending. 2 mails wait", "rq resume"),
    (facts(queue(9999), suspended=True), "warn suspended!", "A person has paused", "/mail/"),
    (facts(queue(61, queued=3), last_sent=NOW - 61), "bad stuck!",
     "Workers run, and take nothing: 3 mails wait in the queue, the oldest for 61 s. None is lost.", "worker.py email"),
    (facts(queue(61, queued=3), last_sent=NOW - 59), "well well", "", ""),
    (facts(queue(61), last_sent=0, in_hand=1), "bad quiet!", "No mail has been sent so far, though mail", "doctor"),
    (facts(last_sent=NOW - 700, recent=Counter(delayed=5)), "bad quiet!",
     "No mail has been sent since 13:48, the relay puts all of it off.", "/mail/failures"),
    (facts(queue(1), last_sent=NOW - 30000), "well well", "", ""),  # the first after a quiet night
    (facts(queue(overdue=90), overdue=2), "bad scheduler!", "stands still: 2 mails were due, the first 90 s ago", ""),
    (facts(queue(overdue=16), overdue=1, has_scheduler=False), "bad scheduler", "1 mail was due, the first 16 s", ""),
    (facts(queue(overdue=16)), "well well", "", ""),
    (facts(skew=3), "warn clock!", "Redis' clock is 3 s ahead of ours", "set-ntp"),
    (facts(skew=-130), "warn clock!", "Redis' clock is 2 min behind ours", "set-ntp"),
    (facts(queue(ahead=3600)), "warn clock!", "A worker's clock is 60 min ahead of ours", "set-ntp"),
    (facts(clock_set=(-3600, NOW - 60)), "warn clock!", "was set back by 60 min at 13:59: mail that was", ""),
    (facts(clock_set=(-3600, NOW - 601)), "well well", "", ""),
    (facts(rate_until=NOW + 200, waiting=31, settings={"smtp_rate": "20/h"}), "warn rate",
     "SMTP_RATE (20/h) is used up: mail waits for its turn, the last until about 14:03. 31 mails", "raise SMTP_RATE"),
    (facts(rate_until=NOW + 301, settings={"smtp_rate": "20/h"}), "warn rate!", "until about 14:05", ""),
    (facts(rate_until=NOW + 59, settings={"smtp_rate": "20/h"}), "well well", "", ""),
    (facts(queue(301, queued=40), waiting=40), "warn slow!", "in the queue has waited for 5 min. 40 mails", "Y=32"),
    (facts(in_doubt=1), "warn doubt!", "1 mail is in doubt: the relay may have accepted it, and a", ""),
    (facts(recent=Counter(failed=5, sent=15)), "warn failing!", "5 of the 20 mails of the last 10 minutes", "/mail/"),
    (facts(recent=Counter(failed=4)), "well well", "", ""),
    (facts(recent=Counter(failed=5, sent=20)), "well well", "", ""),
    (facts(to_sweep=NOW - 901), "warn sweep!", "A mail has been stuck for 15 min", "worker.py"),
    (facts(relays=(at("first", REFUSED), at("second"))), "warn relay_down!",
     "Relay first is in trouble, since 13:59: the relay does not accept this login (535 at auth). Mail goes by second.",
     "check username and password; some relays want an API key as the password; edit RELAYS"),
    (facts(relays=(at("first", AWAY), at("second", serves_all=False))), "warn relay_down!", "no other takes waits", ""),
    (facts(relays=(at("first", AWAY), at("second", AWAY)), waiting=2), "bad relay!",
     "All relays are in trouble; first, since 13:59: the relay cannot be reached (Connection refused). 2", "host"),
    (facts(relays=(at("first"), at("second", until=NOW + 200))), "warn rate",
     "Rate of relay second (20/h) is used up", "RELAYS"),
    (facts(relays=(at("first"), at("second"))), "well well", "", ""),
    (facts(disk_free=100 << 20), "warn disk!", "Redis' disk is nearly full, with 100 MB free", "du"),
]
# fmt: on


@pytest.mark.parametrize("row", range(len(TABLE)), ids=lambda row: TABLE[row][1])
def test_facts_become_one_sentence(row: int) -> None:
    given, expected, sentence, fix = TABLE[row]
    said = judge(given)
    assert f"{said.level} {said.kind}{'!' if said.push else ''}" == expected
    assert sentence in said.sentence
    assert fix in said.fix
    assert (said.also, "planted" in repr(said)) == ((), False)
    assert re.fullmatch(r"[A-Z1-9].*[.]", said.sentence)


def test_the_gravest_comes_first_and_what_only_follows_from_it_is_left_out() -> None:
    stands: dict[str, Any] = {"last_sent": NOW - 9999, "standing": since(AWAY), "in_doubt": 1}
    said = judge(facts(queue(9999, overdue=9999, workers=0, queued=9), **stands))
    assert [said.kind, *(one.kind for one in said.also)] == ["worker", "relay", "doubt"]
    said = judge(facts(queue(9999, overdue=9999, workers=0), info={"role": "slave"}, **stands))
    assert [said.kind, *(one.kind for one in said.also)] == ["replica", "relay", "doubt"]


def test_none_is_lost_is_not_said_where_a_crash_would_lose_it() -> None:
    said = judge(facts(queue(workers=0), info={"aof_enabled": 0}, waiting=5))
    assert [one.sentence.endswith("5 mails wait.") for one in said.also] == [True]


def test_a_clock_that_was_set_is_noticed_and_one_that_goes_on_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    offsets = iter([5.0, 6.0, 3607.0, 3607.5, 7.0])
    monkeypatch.setattr(Clock, "_offset", lambda self: next(offsets))
    monkeypatch.setattr(time, "time", lambda: NOW)
    clock = Clock()
    assert [clock.look() for _ in range(4)] == [(0, 0), (3601, NOW), (3601, NOW), (-3600.5, NOW)]


def test_the_facts_are_gathered_and_nothing_is_changed(outbox: Outbox, client: Redis) -> None:
    mail_ids = [accept(outbox) for _ in range(3)]
    Pacing(client, ()).trouble(reply=REFUSED)
    client.hset(f"rq:job:{mail_ids[0]}", "enqueued_at", "2026-01-01T00:00:00.000000Z")
    client.zadd("rq:scheduled:email", {"a": NOW - 1e9})
    client.lpush("relay:told", round(NOW * 1000))
    client.set("rq:suspended", "1")
    before = client.info("persistence")["rdb_changes_since_last_save"]
    seen = gather(outbox)
    assert client.info("persistence")["rdb_changes_since_last_save"] == before
    assert (seen.waiting, seen.overdue, seen.suspended, seen.in_doubt, seen.rate_until) == (3, 1, True, 0, NOW)
    assert (seen.today["accepted"], seen.queues["email"].workers, seen.has_scheduler) == (3, 0, False)
    assert (seen.standing and seen.standing.reply, seen.info["aof_enabled"], bool(seen.disk_free)) == (REFUSED, 1, True)
    publish(client, parse_relays('[first]\nhost = "a.example"\n[second]\nhost = "b.example"\ndomains = ["b.example"]'))
    Pacing(client, (), "second").trouble(60, reply=REFUSED)
    client.lpush("relay:second:told", round(NOW * 1000))
    assert [(one.relay.name, bool(one.standing), one.rate_until) for one in gather(outbox).relays] == [
        ("first", False, 0),
        ("second", True, NOW),
    ]
    assert gather(outbox).standing is None
    assert abs(seen.skew) < 0.5
    assert 1e6 < seen.longest < NOW
