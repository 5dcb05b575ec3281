"""Workers that die, and how long it takes until somebody else has their mail: in real time, with the default settings.

The promise is two minutes. Nothing is put forward here, so these tests wait; they run side by side, each on its own
Redis and with its own processes, and take as long as the slowest.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.servers import Api, House, RedisServer, Relay, eventually
from tests.test_delivery import put_the_clock_forward

PROMISE = 120  # seconds from the kill until the mail is sent, without an operator
KILLED_WORKER = str(Path(__file__).parent / "killed_worker.py")
MAIL = {"to": "ada@example.com", "subject": "s", "text": "t"}


def killed_at(point: str) -> Callable[[House, Api, Relay, RedisServer], None]:
    def kill(house: House, api: Api, relay: Relay, redis_server: RedisServer) -> None:
        assert house.run("worker-killed", KILLED_WORKER, "email", point).wait(30) == -9

    return kill


def killed_while_popping(house: House, api: Api, relay: Relay, redis_server: RedisServer) -> None:
    """What RQ calls the intermediate queue: popped, and not yet in the registry of started jobs."""
    with redis_server.client() as client:
        assert client.lmove("rq:queue:email", "rq:queue:email:intermediate", "LEFT", "RIGHT")


def killed_in_maintenance(house: House, api: Api, relay: Relay, redis_server: RedisServer) -> None:
    """The lock that it held stays behind, and so does what it was about to find."""
    killed_at("before the final dot")(house, api, relay, redis_server)
    with redis_server.client() as client:
        client.set("rq:clean_registries:email", 1, ex=60)


SCENES = {
    "killed after the claim": killed_at("after claim"),
    "killed before the final dot": killed_at("before the final dot"),
    "killed while popping": killed_while_popping,
    "killed in maintenance": killed_in_maintenance,
}


@pytest.fixture(scope="module")
def seconds(tmp_path_factory: pytest.TempPathFactory) -> dict[str, float]:
    """How long each scene took to its end, all of them played at once."""
    with ThreadPoolExecutor(len(SCENES) + 1) as stages:
        running = {name: stages.submit(play, name, tmp_path_factory.mktemp("scene")) for name in SCENES}
        running["a mail that kills its worker"] = stages.submit(play_poison, tmp_path_factory.mktemp("scene"))
        return {name: one.result() for name, one in running.items()}


@contextmanager
def stage(directory: Path) -> Iterator[tuple[RedisServer, Relay, House, Api]]:
    (directory / "redis").mkdir()
    with (
        RedisServer(directory / "redis") as redis_server,
        Relay() as relay,
        House(directory, redis_server.url, **relay.environment(directory)) as house,
    ):
        del house.environment["RETRY_SCHEDULE"]
        yield redis_server, relay, house, house.api()


def play_poison(directory: Path) -> float:
    """Here the time until a dead worker is given up is put forward: four times three quarters of a minute."""
    with stage(directory) as (redis_server, relay, house, api), redis_server.client() as client:
        started = time.monotonic()
        poison = api.post("/emails", MAIL).body["id"]
        for _ in range(4):
            assert house.run("worker-killed", KILLED_WORKER, "email", "after claim").wait(60) == -9
            put_the_clock_forward(client, poison)
        other = api.post("/emails", MAIL).body["id"]
        house.worker()
        api.wait_for(other, "sent")
        eventually(lambda: client.zrange("rq:failed:email", 0, -1) == [poison.encode()])
        assert api.email(poison)["status"] == "failed"
        assert len(relay.accepted) == 1
        return time.monotonic() - started


def play(name: str, directory: Path) -> float:
    with stage(directory) as (redis_server, relay, house, api):
        mail_id = api.post("/emails", MAIL).body["id"]
        SCENES[name](house, api, relay, redis_server)
        started = time.monotonic()
        house.worker()
        api.wait_for(mail_id, "sent", seconds=PROMISE + 60)
        assert len(relay.accepted) == 1
        return time.monotonic() - started


@pytest.mark.parametrize("scene", SCENES)
def test_a_mail_whose_worker_was_killed_is_sent_once_and_within_two_minutes(
    seconds: dict[str, float], scene: str
) -> None:
    assert seconds[scene] < PROMISE


def test_a_mail_that_kills_its_worker_each_time_is_parked_as_failed_and_the_queue_goes_on(
    seconds: dict[str, float],
) -> None:
    assert "a mail that kills its worker" in seconds  # its scene ended as it asserts
