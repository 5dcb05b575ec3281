"""Each fault, made real as far as a test can: the sentence that it gives, and the push when it begins and is over.

A fault is a context: within it the thing is broken. Workers are heartbeats written by hand, as in checks/test_flow.py;
Redis, relay and the receiver of the pushes are real.
"""

from __future__ import annotations

import json
import re
import resource
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from mail import figures
from mail.delivery import Delivery, Failed
from mail.outbox import Outbox
from mail.store import LAST_SENT
from ops import alerts, facts, watch
from ops.condition import Condition, judge
from ops.facts import Clock
from queues.jobs import Jobs
from settings import Settings
from tests import redis_troubles
from tests.checks.test_flow import ago, register
from tests.mails import accept, draft
from tests.relay import CUT, Relay
from tests.servers import ROOT, House, RedisServer, eventually, free_port
from tests.test_alerts import Hook
from tests.test_alerts import hook as hook


class World:
    """A service in which all is well, and somebody who watches it."""

    def __init__(self, server: RedisServer, hook: str, directory: Path, **given: Any) -> None:
        self.server, self.client, self.directory = server, server.client(), directory
        self.settings = Settings(redis_url=server.url, alert_url=hook, smtp_host="127.0.0.1", **given)
        self.watch = watch.Watch(self.settings)
        self.heal()

    def heal(self) -> None:
        for key in {*self.client.keys()} - {b"mail:watch"}:
            self.client.delete(key)
        for queue in ("email", "jobs"):
            register(self.client, queue)
        self.client.set(LAST_SENT, time.time())

    def outbox(self, **changes: Any) -> Outbox:
        return Outbox(Jobs(self.client), self.settings.model_copy(update=changes))

    def deliver(self, mails: int = 3, on_doubt: str | None = None, **changes: Any) -> None:
        """Lets a worker make an attempt at each of some new mails, with other settings."""
        made = Delivery(outbox := self.outbox(**{"smtp_security": "none", **changes}))
        for _ in range(mails):
            with suppress(Failed):
                made.deliver(accept(outbox, on_doubt=on_doubt))
        made.pool.close_all()

    def looks(self, later: float = 0) -> Condition:
        """Looks twice, as the watch does; `later`: by its clock. Returns what was seen."""
        for _ in range(alerts.LOOKS):
            seen = facts.gather(self.watch.outbox)
            assert self.watch.alerts
            self.watch.alerts.look(judge(seen), seen.now + later, blind=bool(seen.unavailable))
        return judge(seen)


@contextmanager
def broken_relay(world: World, **given: Any) -> Iterator[None]:
    with Relay(**{"tls": "starttls", **given}) as relay:
        known: dict[str, Any] = {name.lower(): value for name, value in relay.environment(world.directory).items()}
        known |= {"smtp_port": relay.port, "smtp_password": None}
        if "login" in given:
            known["smtp_username"] = "eve"  # who is not known there
        else:
            known["smtp_ca_file"] = None  # so that nobody knows its authority
        world.deliver(**known)
        yield


@contextmanager
def away(world: World) -> Iterator[None]:
    world.deliver(smtp_port=free_port())
    yield


@contextmanager
def rate_used_up(world: World) -> Iterator[None]:
    with Relay() as relay:
        world.deliver(3, smtp_port=relay.port, smtp_rate=world.settings.smtp_rate)
        yield


@contextmanager
def in_doubt(world: World) -> Iterator[None]:
    with Relay(data=[CUT]) as relay:
        world.deliver(1, on_doubt="hold", smtp_port=relay.port)
        yield


@contextmanager
def no_worker(world: World) -> Iterator[None]:
    accept(world.outbox())
    register(world.client, "email", silent_for=61)
    yield


@contextmanager
def stuck_scheduler(world: World) -> Iterator[None]:
    mail_id = accept(world.outbox())
    world.client.lrem("rq:queue:email", 0, mail_id)
    world.client.zadd("rq:scheduled:email", {mail_id: time.time() - 90})
    world.client.delete("rq:scheduler-lock:email")
    yield


@contextmanager
def dead_queue(world: World) -> Iterator[None]:
    world.client.hset(f"rq:job:{accept(world.outbox())}", "enqueued_at", ago(61))
    world.client.set(LAST_SENT, time.time() - 61)
    yield


@contextmanager
def clock_ahead(world: World) -> Iterator[None]:
    register(world.client, "email", silent_for=-3600)
    yield


@contextmanager
def clock_set(world: World) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        offset = Clock._offset()
        patch.setattr(Clock, "_offset", lambda *_: offset - 3600)
        patch.setattr(facts, "CLOCK", Clock())
        patch.setattr(Clock, "_offset", lambda *_: offset)
        yield


@contextmanager
def suspended(world: World) -> Iterator[None]:
    world.client.hset(f"rq:job:{accept(world.outbox())}", "enqueued_at", ago(601))
    world.client.set("rq:suspended", "1")
    yield


@contextmanager
def disk_full(world: World) -> Iterator[None]:
    """No file of Redis may become longer: it cannot write its append-only file."""
    pid, unlimited = world.server.process.pid, resource.RLIM_INFINITY
    resource.prlimit(pid, resource.RLIMIT_FSIZE, (1, unlimited))
    with suppress(Exception):
        world.client.set("one", "more")
    try:
        eventually(lambda: world.client.info("persistence")["aof_last_write_status"] == "err", 10)
        yield
    finally:
        resource.prlimit(pid, resource.RLIMIT_FSIZE, (unlimited, unlimited))
        eventually(lambda: world.client.info("persistence")["aof_last_write_status"] == "ok", 10)


def of_redis(trouble: Callable[[RedisServer], AbstractContextManager[object]]) -> Fault:
    return lambda world: trouble(world.server)


Fault = Callable[[World], AbstractContextManager[object]]
# fmt: off
FAULTS: list[tuple[str, Fault, str, str, str]] = [  # name, fault, kind, the sentence, its fix
    ("relay away", away, "relay", "The relay cannot be reached{at} (Connection refused). 3 mails wait, none is lost.",
     "check SMTP_HOST and SMTP_PORT"),
    ("535", lambda world: broken_relay(world, login=("ada", "right")), "relay",
     "The relay does not accept this login{at} (535 at auth). 3 mails wait, none is lost.", "SMTP_PASSWORD; some"),
    ("certificate", broken_relay, "relay",
     "The relay's certificate comes from an authority that this machine does not know{at}. 3 mails", "SMTP_CA_FILE="),
    ("rate", rate_used_up, "rate", "SMTP_RATE (2/h) is used up: mail waits for its turn, the last until", "raise"),
    ("Redis full", of_redis(redis_troubles.full), "full", "Redis is full (", "maxmemory"),
    ("Redis read-only", of_redis(redis_troubles.replica_of_the_dead), "replica", "Redis is a read-only replica: new "
     "mail is refused with 503, and none goes out; what was accepted is kept.", "name the primary in REDIS_URL"),
    ("Redis mute", of_redis(redis_troubles.lonely_replica), "replica", "Redis is a replica without its master: ", ""),
    ("Redis gone", of_redis(redis_troubles.killed), "redis", "Redis does not answer: new mail is", "bin/doctor"),
    ("no worker", no_worker, "worker", "No worker runs, so no mail goes out. 1 mail waits, none is", "worker.py"),
    ("stuck scheduler", stuck_scheduler, "scheduler",
     "The worker's scheduler stands still: 1 mail was due, the first 9", "worker.py email"),
    ("in doubt", in_doubt, "doubt", "1 mail is in doubt: the relay may have accepted it, and a person must", ""),
    ("snapshot", of_redis(redis_troubles.disk_refuses), "disk", "Redis cannot write its snapshot, and may", "df -h"),
    ("disk", disk_full, "disk", "Redis cannot write its append-only file, so new mail is refused with 503", "df -h"),
    ("clock", clock_ahead, "clock", "A worker's clock is 60 min ahead of ours, so mail is tried at", "timedatectl"),
    ("clock set", clock_set, "clock", "This machine's clock was set forward by 60 min at ", "timedatectl"),
    ("dead queue", dead_queue, "stuck", "Workers run, and take nothing: 1 mail waits in the queue, the oldest for 6",
     "worker.py email"),
    ("suspended", suspended, "suspended", "A person has paused all sending. 1 mail waits, none is lost.", "rq resume"),
]
# fmt: on


@pytest.fixture(scope="module")
def redis_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    """One that does not die of a file that may not become longer."""
    directory = tmp_path_factory.mktemp("redis")
    program = directory / "redis"
    server = RedisServer(directory / "data")
    program.write_text(f"#!/bin/sh\ntrap '' XFSZ\nexec {server.program} \"$@\"\n")
    program.chmod(0o755)
    server.directory.mkdir()
    server.program = str(program)
    with server:
        yield server


def pushed(number: int) -> list[dict[str, str]]:
    eventually(lambda: len(Hook.got) >= number, 10)
    return [json.loads(body) for _, _, body in Hook.got]


@pytest.mark.parametrize("row", range(len(FAULTS)), ids=lambda row: FAULTS[row][0].replace(" ", "-"))
def test_a_fault_gives_the_right_sentence_and_the_right_push(
    redis_server: RedisServer, hook: str, tmp_path: Path, row: int
) -> None:
    name, fault, kind, sentence, fix = FAULTS[row]
    redis_server.reset()
    world = World(redis_server, hook, tmp_path, smtp_rate="2/h" if name == "rate" else "")
    assert world.looks().kind == "well"
    with fault(world):
        seen = world.looks()
        assert (seen.kind, [one.kind for one in seen.also], fix in seen.fix) == (kind, [], True)
        assert re.match(re.escape(sentence).replace(r"\{at\}", r", since \d\d:\d\d"), seen.sentence)
        [news] = pushed(1)
        assert (news["status"], news["kind"], news["text"].startswith(seen.sentence)) == ("begins", kind, True)
    eventually(world.server.answers)
    world.heal()
    assert world.looks(later=alerts.QUIET).kind == "well"
    _, over = pushed(2)
    assert (over["status"], over["kind"]) == ("ended", kind)
    assert over["text"].startswith("Over after ")
    assert "All is well: " in over["text"]
    assert watch.EVERY * alerts.LOOKS <= 30


def test_bulk_mail_that_is_lined_up_is_no_fault(redis_server: RedisServer, hook: str, tmp_path: Path) -> None:
    redis_server.reset()
    world = World(redis_server, hook, tmp_path)
    ids = world.outbox().accept([draft()._replace(priority="bulk") for _ in range(9)]).ids
    world.client.rpush("rq:queue:email", ids[0])
    world.client.hset(f"rq:job:{ids[0]}", "enqueued_at", ago(9999))
    assert world.looks()[:2] == ("well", "well")


def test_the_watch_notes_depth_and_age_and_marks_what_has_happened(
    redis_server: RedisServer, hook: str, tmp_path: Path
) -> None:
    redis_server.reset()
    world = World(redis_server, hook, tmp_path)
    world.watch.look()
    with away(world):
        world.watch.look()
    world.client.delete("relay:breaker")
    world.client.hset("mail:watch", "redis", "another")
    world.watch.look()
    with clock_set(world):
        world.watch.look()
    marks = [(one.kind, one.text) for one in figures.marks(world.client, 0)]
    kinds = ["redis_restarted", "release", "breaker_opened", "breaker_closed", "clock"]
    assert sorted(kind for kind, _ in marks) == sorted(kinds)
    assert ("breaker_opened", "no reply at connect (Connection refused)") in marks
    assert figures.minutes(world.client, 2)[-1].counts["depth"] == 3


def test_the_dashboard_watches(redis_server: RedisServer, tmp_path: Path) -> None:
    redis_server.reset()
    port = free_port()
    with (
        House(tmp_path, redis_server.url, DASHBOARD_LISTEN=f"127.0.0.1:{port}") as house,
        redis_server.client() as client,
    ):
        house.run("dashboard", "-m", "ops.dashboard", "--no-login", cwd=ROOT)
        eventually(lambda: client.hget("mail:watch", "release"))
        eventually(lambda: [key for key in client.keys("mail:minute:*") if client.hexists(key, "depth")])
