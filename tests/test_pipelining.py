"""Commands of several threads that go to Redis together: the replies, the errors, the round trips."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from redis.exceptions import ConnectionError, ResponseError

from queues.connection import Script, connect
from queues.pipelining import PipeliningRedis
from tests.servers import RedisServer


@pytest.fixture
def client(redis_server: RedisServer) -> PipeliningRedis:
    redis_server.reset()
    made = connect(redis_server.url, kind=PipeliningRedis)
    assert isinstance(made, PipeliningRedis)
    return made


def test_each_caller_gets_its_own_reply_or_error(client: PipeliningRedis) -> None:
    client.set("text", "no list")
    add = Script(client, "return ARGV[1] + 1")  # which Redis does not know at first

    def ask(number: int) -> object:
        if number % 3 == 0:
            with pytest.raises(ResponseError, match="WRONGTYPE"):
                client.lpush("text", number)
            return number + 1
        return add([], [number]) if number % 3 == 1 else int(client.incr(f"n{number}", number + 1))

    with ThreadPoolExecutor(16) as threads:
        assert list(threads.map(ask, range(600))) == list(range(1, 601))
    assert client.round_trips < 600


def test_what_is_asked_while_redis_answers_is_one_round_trip(client: PipeliningRedis) -> None:
    with ThreadPoolExecutor(9) as threads:
        slow = threads.submit(client.eval, "local n = 0 while n < 3e6 do n = n + 1 end return n", 0)
        while not client.round_trips:
            pass
        others = [threads.submit(client.incr, "n") for _ in range(8)]
        assert slow.result() == 3e6
        assert sorted(one.result() for one in others) == list(range(1, 9))
    assert client.round_trips <= 3


def test_all_are_told_that_redis_is_away_and_the_next_find_it_again(
    client: PipeliningRedis, redis_server: RedisServer
) -> None:
    client.ping()
    redis_server.kill()
    errors = []

    def ask() -> None:
        try:
            client.ping()
        except ConnectionError as error:
            errors.append(error)

    threads = [threading.Thread(target=ask) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    redis_server.start()
    assert len(errors) == 8
    assert client.ping()
