"""RQ and Redis as we use them: the atomic accept, a look at a job, requeue and cancel.

Where only our own logic is at stake, Redis is fakeredis; atomicity and a full memory are tested on a real one.
"""

from __future__ import annotations

import json
import threading
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from datetime import datetime, timezone
from typing import Any

import fakeredis
import pytest
import redis
from redis import exceptions
from rq import Queue, Retry
from rq.executions import Execution
from rq.job import Job, JobStatus
from rq.results import Result
from rq.serializers import JSONSerializer

import queues.acceptance
from queues import connection, heartbeat
from queues.acceptance import Acceptance, IdempotencyConflict
from queues.connection import Unavailable
from queues.jobs import Accepted, Beside, Call, Idempotency, Jobs, NotFound, NotPossible, Place, Policy
from queues.table import EMAIL, JOBS
from tests.http_api import fail
from tests.redis_troubles import configured
from tests.servers import RedisServer

ONE = "00000000-0000-4000-8000-000000000001"
TWO = "00000000-0000-4000-8000-000000000002"
THREE = "00000000-0000-4000-8000-000000000003"


@pytest.fixture
def store() -> Jobs:
    return Jobs(fakeredis.FakeRedis())


@pytest.fixture
def real(redis_server: RedisServer, client: redis.Redis) -> Iterator[Jobs]:
    with connection.connect(redis_server.url) as connected:
        yield Jobs(connected)


POLICY = Policy(timeout=60, retry_in=(10, 20), result_ttl=100, failure_ttl=200)


def accept(store: Jobs, job_id: str = ONE, policy: Policy = POLICY, **more: Any) -> Accepted:
    return store.accept(acceptance(store, job_id, policy, **more))


def acceptance(store: Jobs, job_id: str = ONE, policy: Policy = POLICY, **more: Any) -> Acceptance:
    return store.acceptance(JOBS, "tasks.why_failed", {job_id: Call((), {})}, policy, **more)


def stored(store: Jobs, job_id: str = ONE) -> Job:
    return Job.fetch(job_id, store.redis, serializer=JSONSerializer)


def queued(store: Jobs, queue: str = JOBS) -> list[str]:
    ids: Any = store.redis.lrange(f"rq:queue:{queue}", 0, -1)
    return [one.decode() for one in ids]


# --- Idempotency ------------------------------------------------------------------------------------------------------


def of(caller: str = "shop", endpoint: str = "/emails", key: str = "k", body: object = None) -> Idempotency:
    return Idempotency.of(caller, endpoint, key, body)


def test_the_order_of_members_is_no_difference_at_any_depth() -> None:
    assert of(body={"a": 1, "b": {"c": [1, 2], "d": "é"}}) == of(body={"b": {"d": "é", "c": [1, 2]}, "a": 1})


@pytest.mark.parametrize("body", [{"a": 2}, {"a": "1"}, {"a": True}, {"a": [1]}, {"a": 1, "b": None}, {}, [1], None])
def test_another_body_has_the_same_key_and_another_fingerprint(body: object) -> None:
    assert of(body=body).key == of(body={"a": 1}).key
    assert of(body=body).fingerprint != of(body={"a": 1}).fingerprint


def test_the_caller_and_his_key_are_not_to_be_read_in_redis() -> None:
    assert "secret" not in str(of("secret", "/emails", "secret", {"secret": "secret"}))


# --- accept -----------------------------------------------------------------------------------------------------------


def test_an_accepted_job_is_queued_once(store: Jobs) -> None:
    assert accept(store) == Accepted((ONE,), replayed=False)
    assert queued(store) == [ONE]
    assert store.redis.smembers("rq:queues") == {b"rq:queue:jobs"}


def kept_in(redis: Any) -> tuple[Any, ...]:
    """Where a job waits, and the fields that it has."""
    lists = [redis.lrange(f"rq:queue:{name}", 0, -1) for name in (EMAIL, "bulk")]
    return (*lists, redis.zrange("rq:scheduled:email", 0, -1, withscores=True), set(redis.hkeys(f"rq:job:{ONE}")))


@pytest.mark.parametrize("place", [Place(), Place(front=True), Place(aside="bulk"), Place(at=1_900_000_000)])
@pytest.mark.parametrize("retry_in", [(), (1, 5, 30)])
def test_what_is_written_for_a_job_is_what_rq_would_write(real: Jobs, retry_in: tuple[int, ...], place: Place) -> None:
    times: dict[str, Any] = {"timeout": 150, "result_ttl": 300, "failure_ttl": 400}
    real.redis.rpush("rq:queue:email", "other")
    call, policy = Call(["é"], {"a": [1]}, place), Policy(retry_in=retry_in, **times)
    real.accept(real.acceptance(EMAIL, "tasks.deliver", {ONE: call}, policy))
    ours, seen = stored(real).to_dict(), kept_in(real.redis)
    real.redis.flushdb()
    real.redis.rpush("rq:queue:email", "other")
    job = Job.create(
        "tasks.deliver",
        args=["é"],
        kwargs={"a": [1]},
        id=ONE,
        origin=EMAIL,
        description=f"tasks.deliver {ONE}",
        retry=Retry(max=3, interval=[1, 5, 30]) if retry_in else None,
        connection=real.redis,
        serializer=JSONSerializer,
        **times,
    )
    job.enqueue_at_front = place.front
    if place.at:
        real.queues[EMAIL].schedule_job(job, datetime.fromtimestamp(place.at, timezone.utc))
    else:
        real.queues[EMAIL].enqueue_job(job, at_front=place.front)
    if place.aside:
        real.redis.lmove("rq:queue:email", "rq:queue:bulk", "RIGHT", "LEFT")
    theirs = stored(real).to_dict()
    assert seen == kept_in(real.redis)
    assert ours.get("enqueued_at") == (None if place.at else ours["created_at"])
    for written in (ours, theirs):
        written["created_at"] = written["enqueued_at"] = None
    assert json.loads(zlib.decompress(ours.pop("data"))) == json.loads(zlib.decompress(theirs.pop("data")))
    assert ours == theirs


def test_what_is_stored_beside_a_job_is_stored_with_it(store: Jobs) -> None:
    source = "local function beside(at) redis.call('MSET', 'text', ARGV[at], 'binary', ARGV[at + 1]) end\n"
    accept(store, beside=Beside(source, ["line\nline \0 é", b"\xff\x00"]))
    assert store.redis.get("text") == "line\nline \0 é".encode()
    assert store.redis.get("binary") == b"\xff\x00"


def test_a_job_accepted_twice_is_stored_once_and_both_are_told_so(store: Jobs) -> None:
    key = of()
    assert accept(store, idempotency=key) == accept(store, idempotency=key) == Accepted((ONE,), replayed=False)
    assert queued(store) == [ONE]


@pytest.mark.parametrize(("error", "calls"), [(exceptions.ConnectionError, 2), (exceptions.TimeoutError, 1)])
def test_accept_is_asked_again_after_a_connection_that_broke_and_not_after_a_time_out(
    store: Jobs, monkeypatch: pytest.MonkeyPatch, error: type[Exception], calls: int
) -> None:
    run, heard = queues.acceptance._run, []

    def lose_the_first_reply(*given: Any) -> Any:
        heard.append(run(*given))
        if len(heard) == 1:
            raise error
        return heard[-1]

    monkeypatch.setattr(queues.acceptance, "_run", lose_the_first_reply)
    with nullcontext() if calls == 2 else pytest.raises(Unavailable):
        assert accept(store) == Accepted((ONE,), replayed=False)
    assert len(heard) == calls
    assert queued(store) == [ONE]


def test_requests_that_go_together_have_each_its_own_answer(real: Jobs) -> None:
    accept(real)
    real.redis.script_flush()  # what Redis has forgotten is sent whole
    keyed = [(TWO, of(body="a")), (THREE, of(body="a")), (THREE, of(body="b")), (THREE, None)]
    asked = [acceptance(real, job_id, idempotency=key) for job_id, key in keyed]
    asked.insert(1, asked[0]._replace(keys=["none", "rq:queue:jobs"]))  # which is no string
    replies = queues.acceptance.replies(real.replication, asked)
    assert asked[0].result(replies[0]) == asked[2].result(replies[2])._replace(replayed=False)
    for one in (1, 3):
        with pytest.raises(IdempotencyConflict if one == 3 else Unavailable):
            asked[one].result(replies[one])
    assert asked[4].result(replies[4]).id == THREE
    assert queued(real) == [ONE, TWO, THREE]


def test_many_at_once_with_few_keys_make_few_jobs(real: Jobs) -> None:
    together = threading.Barrier(40)

    def submit(number: int) -> Accepted:
        together.wait(10)
        key = of(key=f"k{number % 5}")
        return accept(real, f"{number:08}-0000-4000-8000-000000000000", idempotency=key)

    with ThreadPoolExecutor(40) as pool:
        answers = list(pool.map(submit, range(40)))
    assert {answer.id for answer in answers} == set(queued(real))
    assert len(queued(real)) == 5
    assert [answer.replayed for answer in answers].count(False) == 5


def test_a_redis_that_fills_up_holds_whole_jobs_only(redis_server: RedisServer, real: Jobs) -> None:
    def submit(numbers: range) -> None:
        for number in numbers:
            job_id = f"{number:08}-0000-4000-8000-000000000000"
            source = "local function beside(at) redis.call('SET', ARGV[at], ARGV[at + 1]) end\n"
            beside = Beside(source, [f"mail:{job_id}", "x" * 20_000])
            accept(real, job_id, idempotency=of(key=str(number)), beside=beside)

    submit(range(1))
    used: Any = real.redis.info("memory")
    limit = used["used_memory"] + 1_500_000
    with configured(redis_server, maxmemory=limit), pytest.raises(Unavailable, match="out of memory"):
        submit(range(1, 200))
    assert 2 < len(queued(real)) < 200
    for pattern in ("rq:job:*", "mail:*", "idempotency:*"):
        assert len(real.redis.keys(pattern)) == len(queued(real))


# --- read -------------------------------------------------------------------------------------------------------------


def test_a_job_of_another_program_is_not_found(store: Jobs) -> None:
    job = Queue("theirs", connection=store.redis, serializer=JSONSerializer).enqueue("print")
    for look in (store.read, store.requeue, store.cancel):
        with pytest.raises(NotFound):
            look(job.id)
    assert queued(store, "theirs") == [job.id]


def test_a_job_that_another_program_pickled_into_our_queue_can_be_seen_and_removed(store: Jobs) -> None:
    job = Queue(JOBS, connection=store.redis).enqueue("tasks.why_failed", hours=1)
    assert store.read(job.id)["task"] == ""
    store.cancel(job.id)
    assert not queued(store)


def test_a_job_shows_its_last_result_only(store: Jobs) -> None:
    accept(store)
    job = stored(store)
    Result.create_failure(job, 100, 'Traceback\n  File "x"\nValueError: line\nof the reason\n')
    assert store.read(ONE)["error"] == "of the reason"
    Result.create(job, Result.Type.SUCCESSFUL, 100, return_value={"a": [1, None]})
    seen = store.read(ONE)
    assert seen["result"] == {"a": [1, None]}
    assert "error" not in seen
    Result.create(job, Result.Type.SUCCESSFUL, 100, return_value=None)
    assert store.read(ONE)["result"] is None


# --- requeue and cancel -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("retry_in", [(), (10, 20)])
def test_a_requeued_job_is_as_it_was_when_it_was_accepted(store: Jobs, retry_in: tuple[int, ...]) -> None:
    accept(store, policy=POLICY._replace(retry_in=retry_in))
    fail(store.redis, stored(store))
    store.requeue(ONE)
    job = stored(store)
    assert (job.get_status(), job.retries_left or 0) == (JobStatus.QUEUED, len(retry_in))
    assert (job.started_at, job.ended_at) == (None, None)
    assert queued(store) == [ONE]
    assert not store.redis.zcard("rq:failed:jobs")


def test_a_stopped_job_can_be_queued_again_or_canceled_which_leaves_nothing(store: Jobs) -> None:
    for act in (store.requeue, store.cancel):
        accept(store)
        fail(store.redis, stored(store)).set_status(JobStatus.STOPPED)
        Result.create_failure(stored(store), 100, "ValueError")
        act(ONE)
    assert store.redis.keys("*") == [b"rq:queues"]


@pytest.mark.parametrize("status", ["queued", "scheduled", "started", "finished", "deferred"])
def test_only_a_failed_job_can_be_queued_again_and_none_canceled_that_runs_or_has_run(store: Jobs, status: str) -> None:
    accept(store)
    stored(store).set_status(JobStatus(status))
    with pytest.raises(NotPossible, match=f"this one is {status}$"):
        store.requeue(ONE)
    assert queued(store) == [ONE]
    if status not in ("queued", "scheduled"):
        with pytest.raises(NotPossible, match=f"a job that is {status} "):
            store.cancel(ONE)
        assert stored(store).get_status() == status


@pytest.mark.parametrize("left", [{}, {"last_heartbeat": 1}])  # a heartbeat came late, after the record had expired
def test_a_job_one_of_whose_attempts_lost_its_worker_can_be_canceled(store: Jobs, left: dict[Any, Any]) -> None:
    accept(store)
    with store.redis.pipeline() as pipe:
        execution = Execution.create(stored(store), heartbeat.LEASE_SECONDS, pipe, worker_name="a-dead-worker")
        pipe.execute()
    store.redis.delete(execution.key)
    if left:
        store.redis.hset(execution.key, mapping=left)
    stored(store).set_status(JobStatus.SCHEDULED)
    store.cancel(ONE)
    assert not store.redis.keys(f"rq:*{ONE}")


def test_a_job_whose_attempt_ends_while_it_is_canceled_is_left_as_it_is(
    store: Jobs, monkeypatch: pytest.MonkeyPatch
) -> None:
    accept(store)
    with store.redis.pipeline() as pipe:
        execution = Execution.create(stored(store), heartbeat.LEASE_SECONDS, pipe, worker_name="a-worker")
        pipe.execute()
    monkeypatch.setattr(Jobs, "_forget_lost_executions", lambda *_: store.redis.delete(execution.key))
    with pytest.raises(NotPossible, match="look again"):
        store.cancel(ONE)
    assert queued(store) == [ONE]


@pytest.mark.parametrize(("moved", "told"), [(JobStatus.STARTED, "is started"), (JobStatus.SCHEDULED, "look again")])
def test_a_job_that_moves_on_at_this_moment_is_not_canceled(
    store: Jobs, monkeypatch: pytest.MonkeyPatch, moved: JobStatus, told: str
) -> None:
    accept(store)
    delete = Job.delete

    def late(job: Job, pipeline: Any) -> None:
        delete(job, pipeline)
        stored(store).set_status(moved)

    monkeypatch.setattr(Job, "delete", late)
    with pytest.raises(NotPossible, match=told):
        store.cancel(ONE)
    assert stored(store).get_status() == moved


def test_a_job_that_another_queues_again_at_this_moment_is_queued_once(
    real: Jobs, monkeypatch: pytest.MonkeyPatch
) -> None:
    accept(real)
    fail(real.redis, stored(real))
    looked_at = Job.get_status

    def late(job: Job, refresh: bool = True) -> JobStatus:
        status = looked_at(job, refresh)
        if refresh:
            monkeypatch.setattr(Job, "get_status", looked_at)
            real.requeue(ONE)
        return status

    monkeypatch.setattr(Job, "get_status", late)
    with pytest.raises(NotPossible):
        real.requeue(ONE)
    assert queued(real) == [ONE]


@pytest.mark.parametrize("act", ["requeue", "cancel"])
def test_a_job_that_vanishes_while_we_look_is_not_found(store: Jobs, monkeypatch: pytest.MonkeyPatch, act: str) -> None:
    accept(store)
    job = stored(store)
    store.redis.delete(job.key)
    monkeypatch.setattr(store, "fetch", lambda *_, **__: job)
    with pytest.raises(NotFound):
        getattr(store, act)(ONE)


def test_a_job_can_be_canceled_on_a_full_redis(redis_server: RedisServer, real: Jobs) -> None:
    accept(real)
    with configured(redis_server, maxmemory=1):
        real.cancel(ONE)
    assert real.redis.keys("*") == [b"rq:queues"]


def test_what_a_full_redis_refuses_is_not_half_done(redis_server: RedisServer, real: Jobs) -> None:
    accept(real)
    fail(real.redis, stored(real))
    before = real.redis.hgetall(f"rq:job:{ONE}")
    with configured(redis_server, maxmemory=1), pytest.raises(Unavailable, match="out of memory"):
        real.requeue(ONE)
    assert real.redis.hgetall(f"rq:job:{ONE}") == before
    assert real.redis.zrange("rq:failed:jobs", 0, -1) == [ONE.encode()]
    assert not queued(real)
