"""What looks at a replicated Redis: each page, figure and command goes on after a failover, and says what is amiss."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from ops import breaker
from ops.dashboard import make_app
from settings import Settings
from tests.http_api import MAIL
from tests.relay import Relay
from tests.sentinels import Set, sentinel_set
from tests.servers import ROOT, House, eventually
from tests.test_metrics import figures
from tests.test_monitoring import REPLICATED

REPLICATION = {"role": "primary", "needed": 1, "in_step": 2, "known": 2, "sentinels": 3, "of_sentinels": 3}


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Set]:
    with sentinel_set(tmp_path_factory.mktemp("redis")) as started:
        yield started


@pytest.fixture(scope="module")
def house(servers: Set, tmp_path_factory: pytest.TempPathFactory, far: Relay) -> Iterator[House]:
    directory = tmp_path_factory.mktemp("house")
    with House(directory, servers.url, REDIS_REPLICAS="1", **far.environment(directory)) as house:
        yield house


def rq(house: House, *words: str) -> str:
    command = [str(Path(sys.executable).parent / "rq"), *words, "-c", "ops.rq_config"]
    environment = house.environment | {"PYTHONWARNINGS": ""}
    told: subprocess.CompletedProcess[str] = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60, check=False
    )
    assert "secret" not in told.stdout + told.stderr
    assert told.returncode == 0, told
    return told.stdout


def test_all_that_looks_goes_on_after_a_failover(
    servers: Set, house: House, far: Relay, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    api = house.api()
    for queue in ("email", "jobs"):
        house.worker(queue)
    settings = Settings(redis_url=servers.url, redis_replicas=1)
    page = make_app(settings, login=False).test_client()
    far.rcpt["ada@example.com"] = ["554 5.7.1 refused"]
    mail_id = api.submit(MAIL | {"to": "ada@example.com"})
    api.wait_for(mail_id, "failed")
    for name, value in (("REDIS_URL", servers.url), ("REDIS_REPLICAS", "1")):
        monkeypatch.setenv(name, value)

    def looked_at() -> None:
        assert "email" in rq(house, "info")
        assert "Suspending" in rq(house, "suspend")
        assert breaker.main([]) == 0
        assert "suspended" in capsys.readouterr().out
        assert "Resuming" in rq(house, "resume")
        for path in ("/mail/", "/mail/system", "/rq/", "/rq/0/data/queues.json", "/rq/0/data/workers.json"):
            assert page.get(path).status_code == 200, path
        assert "mymaster of the Sentinels" in page.get("/rq/").get_data(as_text=True)
        assert "secret" not in page.get("/rq/").get_data(as_text=True)

    looked_at()
    assert api.get("/readyz").body["replication"] == REPLICATION | {"confirms": True}
    seen = {f"async_email_{name}": value for name, value in figures(api).items()}
    assert seen | REPLICATED == seen
    old = servers.primary()
    old.kill()
    without_one = REPLICATION | {"confirms": True, "in_step": 1}
    eventually(lambda: api.get("/readyz").body.get("replication") == without_one)  # each process finds it for itself
    looked_at()
    assert "Requeueing 1 jobs" in rq(house, "requeue", "--queue", "email", "--all", "-S", "json")
    api.wait_for(mail_id, "sent")
    assert "1 of 2 in step, 1 must confirm" in page.get("/mail/system").get_data(as_text=True)
    old.start()
    eventually(lambda: api.get("/readyz").body["replication"]["in_step"] == 2)
    eventually(lambda: page.get("/mail/").get_data(as_text=True).count("All is well"))


def test_what_confirms_nothing_is_not_ready(servers: Set, house: House) -> None:
    api, primary = house.api(), servers.primary()
    replicas = [one for one in servers.data if one is not primary]
    for one in replicas:
        one.kill()
    try:
        eventually(lambda: api.answers("/readyz", 503))
        eventually(lambda: "must confirm what is written (1), 0 are in step" in str(api.get("/readyz").body))
        assert (figures(api)["redis_confirms"], figures(api)["redis_up"]) == (0, 1)
        assert api.post("/emails", MAIL).status == 503
    finally:
        for one in replicas:
            one.start()
    eventually(lambda: api.get("/readyz").body["replication"]["in_step"] == 2)
