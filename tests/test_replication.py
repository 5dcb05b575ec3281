"""What REDIS_REPLICAS promises: nothing counts that replicas have not confirmed, and no final dot goes out before."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, cast

import pytest
from rq import Retry

from mail import claim, delivery
from mail.bounces import Bounces
from mail.outbox import Outbox
from mail.states import State, Status
from process.redis_url import Place
from queues import keys
from queues.acceptance import Idempotency
from queues.connection import NOT_CONFIRMED, Script, Unavailable, announcements, connect, is_silent, translating_errors
from queues.jobs import Jobs
from queues.pipelining import PipeliningRedis
from queues.primary import View
from queues.replication import Replication, Unconfirmed
from queues.workers import JobsWorker, make_worker
from settings import Settings
from tests.conversations import POOL, served
from tests.mails import accept, draft
from tests.servers import RedisServer
from tests.test_bounces import UNKNOWN, about


@pytest.fixture(params=["plain", "pipelining"])
def client(request: pytest.FixtureRequest, redis_server: RedisServer) -> Any:
    """A client of a Redis that has no replica."""
    redis_server.reset()
    kind: dict[str, Any] = {"kind": PipeliningRedis, "retrying": True} if request.param == "pipelining" else {}
    return connect(redis_server.url, **kind)


@pytest.fixture(autouse=True)
def briefly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("queues.replication.WAIT", 20)
    monkeypatch.setattr(claim, "CONFIRMED_WITHIN", 0)


def test_without_enough_replicas_what_is_stored_does_not_count(client: Any) -> None:
    script = Script(client, "return redis.call('INCR', KEYS[1])")  # which Redis does not know at first
    assert Replication(client, 0).call(script, ["a"]) == 1
    for stored in (b"2", b"3"):
        with pytest.raises(Unconfirmed, match=NOT_CONFIRMED):
            Replication(client, 1).call(script, ["a"])
        assert client.get("a") == stored
    assert not Replication(client, 1).works
    client.rpush("b", 1)
    with pytest.raises(Exception, match="wrong kind"):  # its own error first
        Replication(client, 1).execute("INCR", "b")


def test_a_server_that_was_demoted_confirms_nothing(client: Any) -> None:
    client.execute_command("REPLICAOF", "127.0.0.1", 1)
    try:
        with pytest.raises(Unavailable, match="read-only replica"), translating_errors():
            Replication(client, 1).confirm()  # nothing of it is refused as a write, but WAIT as such
    finally:
        client.execute_command("REPLICAOF", "NO", "ONE")


class Sentinels:
    """Names one place, and another each time it has looked."""

    at = Place("127.0.0.1", 1)

    def look(self) -> View:
        self.at = Place("127.0.0.1", self.at.port + 1)
        return View(self.at, healthy=True)

    def doubt(self) -> None: ...


def test_where_too_few_confirm_the_sentinels_are_asked_who_is_the_primary(client: Any) -> None:
    confirms = Replication(client, 1)
    confirms.primary = asked = cast(Any, Sentinels())
    since = confirms.at
    with pytest.raises(Unconfirmed):
        confirms.confirm()
    assert asked.at.port == 2
    confirms.execute = lambda *_: None  # type: ignore[method-assign]  # as if the new one had all
    with pytest.raises(Unconfirmed):
        confirms.confirm(since)
    confirms.confirm(confirms.at)


def test_in_a_batch_only_those_that_asked_are_refused(redis_server: RedisServer) -> None:
    client = connect(redis_server.url, kind=PipeliningRedis)
    together, said = threading.Barrier(8), list[Any]()

    def call(number: int) -> None:
        together.wait()
        try:
            said.append(Replication(client, number % 2).execute("ECHO", number))
        except Unconfirmed:
            said.append(None)

    threads = [threading.Thread(target=call, args=[number]) for number in range(8)]
    for one in threads:
        one.start()
    for one in threads:
        one.join()
    assert sorted(said, key=str) == [None, None, None, None, b"0", b"2", b"4", b"6"]


def test_a_mail_is_not_accepted_and_a_repeat_is_not_either_until_it_is_confirmed(client: Any) -> None:
    jobs = Jobs(client, 1)
    outbox, key = Outbox(jobs, Settings()), Idempotency("key", "fingerprint")
    for _ in range(2):
        with pytest.raises(Unavailable, match=NOT_CONFIRMED):
            outbox.accept([draft()], key)
        with pytest.raises(Unavailable, match=NOT_CONFIRMED):
            jobs.recall(key)
    jobs.replication.replicas = 0
    known = outbox.accept([draft()], key)
    assert known.replayed
    jobs.replication.replicas = 1
    client.hset(keys.job(known.id), "status", "failed")
    changes: list[Callable[[], object]] = [lambda: outbox.requeue(known.id), lambda: outbox.cancel(known.id)]
    changes += [lambda: outbox.reschedule(known.id, 1e11), lambda: outbox.suppressions.remove("ada@example.com")]
    changes += [lambda: outbox.suppressions.add("ada@example.com", "manual")]
    for change in changes:
        with pytest.raises(Unavailable, match=NOT_CONFIRMED):
            change()


def test_a_report_about_no_mail_is_not_done_with_before_that_is_confirmed(client: Any) -> None:
    outbox = Outbox(Jobs(client, 1), Settings())
    report = about(outbox, "postfix", UNKNOWN, path="")
    with pytest.raises(Unavailable, match=NOT_CONFIRMED):
        Bounces(outbox).take(report)
    outbox.jobs.replication.replicas = 0
    assert "still kept" in Bounces(outbox).take(report).why


def test_no_final_dot_goes_out_before_the_mark_is_confirmed(client: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    outbox = Outbox(Jobs(client), Settings())
    mail_id = accept(outbox)
    with served() as (there, to):
        made = delivery.Delivery(outbox)
        made.routes.ways[0].relay, made.pool = to, POOL
        outbox.jobs.replication.replicas = 1
        assert isinstance(made.deliver(mail_id), Retry)
        seen = outbox.read(mail_id)
        assert (there.accepted, seen["status"], seen["reason"]) == ([], State.DELAYED, NOT_CONFIRMED)
        assert {one["status"] for one in seen["recipients"]} == {"pending"}  # nothing is in doubt without a dot
        assert isinstance(made.deliver("gone"), Retry)  # which another primary may have
        outbox.jobs.replication.replicas = 0
        assert made.deliver(mail_id) == "sent"
        with pytest.raises(delivery.Failed, match="gone"):
            made.deliver("gone")
        outbox.jobs.replication.replicas = 1
        monkeypatch.setattr(outbox.jobs.replication, "confirm", lambda _: None)
        assert made.deliver("gone") == "gone", "a mail that was never acknowledged leaves no failed job"
        client.hset(keys.job("gone"), "status", "started")
        with pytest.raises(delivery.Failed, match="gone"):  # its job is there, so a person must look
            made.deliver("gone")
    assert len(there.accepted) == 1


def test_a_mail_counts_as_sent_once_that_is_confirmed(client: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    outbox = Outbox(Jobs(client), Settings())
    mail_id, replication = accept(outbox), outbox.jobs.replication
    taken = outbox.claim(mail_id, 0)
    assert isinstance(taken, claim.Claim)
    for one in taken.recipients:
        one.status = Status.ACCEPTED
    replication.replicas = 1
    pauses = list[float]()

    def pause(seconds: float) -> None:
        pauses.append(seconds)
        replication.replicas = 0 if len(pauses) == 3 else 1
        assert not is_silent()  # or the others that insist would take turns

    monkeypatch.setattr("mail.store.time", SimpleNamespace(sleep=pause, monotonic=time.monotonic))
    taken.settle(State.SENT)
    assert pauses == [1, 1, 1]
    assert outbox.read(mail_id)["status"] == "sent"


def test_a_jobs_worker_gives_a_job_back_that_it_may_have_of_a_replaced_primary(
    client: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker, ran = make_worker(JobsWorker, "jobs", client, {}), list[str]()
    monkeypatch.setattr(worker, "fork_work_horse", lambda job, queue: ran.append(job.id))
    monkeypatch.setattr(worker, "monitor_work_horse", lambda *_: None)
    queue = worker.queues[0]
    job_id = queue.enqueue("tasks.report").id
    for worker.replication.replicas, waiting in ((1, [job_id]), (0, [])):
        client.lmove(queue.key, queue.intermediate_queue_key)
        worker.execute_job(worker.job_class.fetch(job_id, client), queue)
        assert (queue.job_ids, ran) == (waiting, [] if waiting else [job_id])


def test_a_jobs_worker_takes_no_job_while_nothing_is_confirmed(client: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    worker, pauses = make_worker(JobsWorker, "jobs", client, {}), list[float]()

    def pause(seconds: float) -> None:
        pauses.append(seconds)
        worker._stop_requested = len(pauses) == 3

    monkeypatch.setattr("queues.workers.time", SimpleNamespace(sleep=pause))
    monkeypatch.setattr(announcements, "place", "there")
    monkeypatch.setattr(announcements, "reason", None)
    for worker.replication.replicas in (0, 1):
        worker.check_for_suspension(burst=False)
    assert (pauses, announcements.reason) == ([1, 1, 1], NOT_CONFIRMED)
