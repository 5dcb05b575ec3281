"""Where the primary is: what the Sentinels' answers come to, and connections that follow it on real servers."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast
from unittest.mock import Mock

import pytest
import redis
from redis.exceptions import ConnectionError

from process.redis_url import Place, Sentinels
from queues import primary
from queues.connection import connect, fail_fast, reach
from queues.pipelining import PipeliningRedis
from queues.primary import View, judge
from queues.replication import Replication, Unconfirmed
from tests.sentinels import Set, sentinel_set
from tests.servers import eventually


def said(flags: str = "master", epoch: int = 1, ip: str = "10.0.0.1", quorum: int = 2) -> dict[str, Any]:
    return {"ip": ip, "port": "6379", "flags": flags, "config-epoch": str(epoch), "quorum": str(quorum)}


ONE, TWO = Place("10.0.0.1", 6379), Place("10.0.0.2", 6379)


@pytest.mark.parametrize(
    ("answers", "view"),
    [
        ([said(), said(), said()], View(ONE, True)),
        ([said(), said()], View(ONE, True)),
        ([said("master,s_down"), said(), said()], View(ONE, True)),  # its own link is bad; it can replace nothing
        ([said("master,s_down"), said()], View(ONE, False)),  # with the third, it could
        ([said("master,s_down"), said("master,s_down"), said()], View(ONE, False)),
        ([said("master,s_down,o_down"), said(), said()], View(ONE, False)),
        ([said("master,failover_in_progress"), said(), said()], View(ONE, False)),
        ([said(), said(epoch=2, ip="10.0.0.2"), said()], View(TWO, True)),  # the others will hear of it
        ([said("master,s_down,o_down"), said(epoch=2, ip="10.0.0.2")], View(TWO, True)),
        ([said(), said(ip="10.0.0.2")], View(ONE, False)),
        ([said(quorum=1), said(quorum=1)], View(ONE, False)),  # the third alone could replace it
    ],
)
def test_the_latest_word_of_most_sentinels_counts(answers: list[Any], view: View) -> None:
    assert judge(answers, 3) == view


@pytest.mark.parametrize(("answers", "number"), [([], 1), ([said()], 2), ([said()], 3), ([said(), said()], 4)])
def test_fewer_than_most_say_nothing(answers: list[Any], number: int) -> None:
    with pytest.raises(ConnectionError, match="most of the Sentinels"):
        judge(answers, number)


@pytest.fixture
def asked() -> primary.Primary:
    return primary.Primary(Sentinels((ONE, TWO, Place("10.0.0.3", 1)), "mymaster", None, None, tls=False), {})


@pytest.mark.parametrize("answer", [None, 3, [], [b"ip"], {"ip": "10.0.0.1"}, said() | {"quorum": "x"}, said(ip="")])
def test_nonsense_is_no_answer_and_its_sentinel_is_asked_again(asked: primary.Primary, answer: Any) -> None:
    asked.clients = [cast(Any, SimpleNamespace(execute_command=lambda *_: answer))] * 3
    with pytest.raises(ConnectionError, match="most of the Sentinels"):
        asked.look()
    assert asked.survey() == []
    answer = said()
    asked.doubt()
    assert asked.look() == View(ONE, True)


def test_without_a_thread_to_be_had_nothing_is_known_until_there_is_one(
    asked: primary.Primary, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(asked, "_ask", lambda _: said())
    with monkeypatch.context() as patched:
        patched.setattr(threading.Thread, "start", Mock(side_effect=RuntimeError))
        assert not succeeds(asked.look)
    asked.doubt()
    assert asked.look() == View(ONE, True)


def test_those_who_wait_for_a_look_that_finds_no_primary_do_not_look_one_by_one(
    asked: primary.Primary, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Busy:
        """A lock that another has at first, who looks."""

        def __enter__(self) -> None:
            asked._lock = threading.Lock()
            succeeds(asked.look)

        def __exit__(self, *_: object) -> None: ...

    monkeypatch.setattr(primary, "FRESH", 0)
    looks = Mock(return_value=[])
    monkeypatch.setattr(asked, "_answers", looks)
    for healthy, number in ((False, 1), (True, 3)):  # a good word of before is none of now
        asked._lock = cast(Any, Busy())
        assert succeeds(asked.look) is healthy
        assert looks.call_count == number
        looks.return_value = [said()] * 3


@pytest.fixture
def started(tmp_path: Path) -> Iterator[Set]:
    with sentinel_set(tmp_path) as servers:
        yield servers


def test_clients_of_all_kinds_are_on_the_new_primary_without_a_restart(started: Set) -> None:
    reach(started.url)
    quick, patient = connect(started.url), connect(started.url, retrying=True, kind=PipeliningRedis)
    blocked, popped = connect(started.url, retrying=True), list[Any]()
    waits = threading.Thread(target=lambda: popped.append(blocked.blpop(["queue"], 60)))
    waits.start()
    old = started.primary()
    assert patient.set("a", "1")
    assert Replication(quick, 1).execute("SET", "b", "2")
    assert Replication(patient, 2).execute("GET", "a") == b"1"
    eventually(lambda: old.client.info("clients")["blocked_clients"] == 1)
    old.kill()
    assert patient.set("a", "2")  # outlasts it
    eventually(lambda: succeeds(lambda: Replication(quick, 1).execute("RPUSH", "queue", "here")))
    waits.join(60)
    assert popped == [(b"queue", b"here")]
    assert fail_fast(quick).get("a") == b"2"
    assert started.primary() is not old
    old.start()  # comes back as a primary, until the Sentinels make it a replica
    eventually(lambda: old.answers() and old.client.info("replication")["role"] == "slave")
    assert quick.get("a") == b"2"


def succeeds(what: Any) -> bool:
    try:
        what()
    except (redis.RedisError, Unconfirmed):
        return False
    return True


def test_a_server_that_was_demoted_is_left_at_once(started: Set) -> None:
    old = started.primary()
    quick, patient = connect(started.url), connect(started.url, retrying=True)
    assert quick.set("a", "1")
    assert patient.set("a", "1")
    place = next(one for one in started.data if one is not old)
    with quick.pipeline() as watching:
        watching.watch("a")  # type: ignore[no-untyped-call]
        words = ("FAILOVER", "TO", "127.0.0.1", place.port, "TIMEOUT", 5000)
        old.client.execute_command(*words)  # type: ignore[no-untyped-call]
        eventually(lambda: old.client.info("replication")["role"] == "slave")
        watching.multi()
        watching.set("a", "2")
        with pytest.raises(redis.WatchError):  # and not EXEC on another server, which watches nothing
            watching.execute()
    with pytest.raises(ConnectionError):  # which is for the caller to see, within its three seconds
        quick.set("a", "2")


def test_one_sentinel_that_is_away_keeps_nobody_waiting(started: Set, monkeypatch: pytest.MonkeyPatch) -> None:
    quick = connect(started.url)
    assert quick.ping()
    asked: primary.Primary = quick.connection_pool.connection_kwargs["primary"]
    started.sentinels[0].process.send_signal(19)  # SIGSTOP: it accepts connections, and does not answer
    try:
        asked.doubt()
        assert asked.look().healthy
        assert len(asked.survey()) == 2
        monkeypatch.setattr(primary, "ANSWERS_WITHIN", 3600)
        asked.doubt()
        looked = list[View]()
        threading.Thread(target=lambda: looked.append(asked.look()), daemon=True).start()
        eventually(lambda: looked and looked[0].healthy)
        started.sentinels[1].kill()
        monkeypatch.setattr(primary, "ANSWERS_WITHIN", 0.5)
        asked.doubt()
        with pytest.raises(ConnectionError, match="most of the Sentinels"):
            asked.look()
    finally:
        started.sentinels[0].process.send_signal(18)
    eventually(lambda: succeeds(asked.look))
    eventually(lambda: asked.look() and asked._present == {0, 2})  # and is waited for again
