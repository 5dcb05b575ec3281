"""A cluster of one shard, as providers offer it: with a hash tag in RQ_KEY_PREFIX all of the service runs on it, and
follows the primary when a replica is promoted."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import pytest
import redis

from tests.receiver import Receiver
from tests.relay import Relay
from tests.servers import Api, House, RedisServer, eventually, free_port, project_with, redis_servers
from tests.submitting import Submission
from tests.test_webhooks import NEW

MAIL = {"to": "ada@example.com", "subject": "Hello", "text": "Hello."}
TASKS = """
@task(cron="0 0 1 1 *", concurrency=1)
def report() -> str:
    return "made"
"""
PAGES = ("/", "/mail/", "/mail/activity", "/mail/failures", "/mail/system", "/mail/scheduled", "/mail/webhooks")


@contextmanager
def shard(directory: Path, program: str) -> Iterator[list[RedisServer]]:
    """A primary that has all slots, and its replica."""
    nodes = []
    try:
        for name in ("first", "second"):
            (directory / name).mkdir()
            bus = ("--cluster-enabled", "yes", "--cluster-port", str(free_port()), "--repl-diskless-sync-delay", "0")
            nodes.append(RedisServer(directory / name, *bus, program=program))
            nodes[-1].start()
        first, second = (node.client() for node in nodes)  # type: Any, Any
        first.execute_command("CLUSTER ADDSLOTSRANGE", 0, 16383)
        second.execute_command("CLUSTER MEET", "127.0.0.1", nodes[0].port, nodes[0].options[3])
        eventually(lambda: replicates(second, first.execute_command("CLUSTER MYID")))
        eventually(lambda: first.execute_command("CLUSTER INFO")["cluster_state"] == "ok")
        yield nodes
    finally:
        for node in nodes:
            node.kill()


def replicates(replica: Any, of: bytes) -> bool:
    with suppress(redis.RedisError):
        replica.execute_command("CLUSTER REPLICATE", of)
    return bool(replica.info("replication").get("master_link_status") == "up")


class Cluster:
    """The service on it, and who speaks with the service."""

    def __init__(self, house: House, relay: Relay, receiver: Receiver) -> None:
        self.house, self.relay, self.receiver = house, relay, receiver
        house.environment["DASHBOARD_LISTEN"] = f"127.0.0.1:{(dashboard := free_port())}"
        self.api, self.dashboard, self.submission = house.api(), Api(dashboard), Submission(house)
        for queue in ("email", "jobs"):
            house.worker(queue)
        house.run("webhooks", "-m", "webhooks", cwd=house.root)
        house.run("dashboard", "-m", "ops.dashboard", "--no-login", cwd=house.root)
        eventually(lambda: self.dashboard.answers("/", 302) and "webhooks_started" in house.log("webhooks"))

    def runs(self, primary: Any) -> None:
        """Goes the ordinary ways once."""
        api, begun = self.api, time.time()
        sent = api.submit(MAIL, Idempotency_Key=f"key-{begun}")
        assert api.submit(MAIL, Idempotency_Key=f"key-{begun}") == sent
        soon = (datetime.now(timezone.utc) + timedelta(seconds=2)).isoformat()
        later = [api.submit(MAIL | {"scheduled_at": "in 1 hour"}) for _ in range(3)]
        assert api.call("PATCH", f"/emails/{later[0]}", {"scheduled_at": soon}).status == 200
        assert api.post(f"/emails/{later[1]}/cancel", None).status == 200
        primary.zadd("{ae}:mail:open", {later[2]: 0})
        api.post("/emails/batch", [MAIL | {"priority": "bulk"}] * 3)
        assert self.submission.send().startswith("250")
        self.relay.rcpt["refused@example.com"] = ["554 5.7.1 no"]
        self.relay.rcpt[f"{begun}@example.com"] = ["550 5.1.1 nobody"]
        failed, bounced = (api.submit(MAIL | {"to": f"{to}@example.com"}) for to in ("refused", begun))
        for mail_id in (failed, bounced):
            api.wait_for(mail_id, "failed")
        api.wait_for(api.submit(MAIL | {"to": f"{begun}@example.com"}), "suppressed")
        command = ["rq.cli", "requeue", "--queue", "email", "-S", "json", "-c", "ops.rq_config"]
        ran = subprocess.run(
            [sys.executable, "-m", *command, failed], cwd=self.house.root, env=self.house.environment, check=False
        )
        assert ran.returncode == 0
        jobs = [api.post("/jobs", {"task": "report", "args": {}}).body["job_id"] for _ in range(2)]
        for mail_id in (ours := {sent, later[0], failed}):
            api.wait_for(mail_id, "sent")
        eventually(lambda: ours <= {one.event["data"]["email_id"] for one in self.receiver.got})
        eventually(lambda: all(api.get(f"/jobs/{one}").body["status"] == "finished" for one in jobs))
        eventually(lambda: float(primary.zscore("{ae}:mail:open", later[2]) or 0) > time.time())
        assert [api.answers(path) for path in ("/readyz", "/metrics", "/emails", "/suppressions")] == [True] * 4
        assert [path for path in PAGES if self.dashboard.get(path).status not in (200, 302)] == []


@pytest.mark.parametrize("program", redis_servers(), ids=lambda program: Path(program).parts[-2])
def test_all_of_it_runs_on_a_cluster_of_one_shard_and_on_the_replica_that_is_promoted(
    program: str, tmp_path: Path, relay: Relay
) -> None:
    settings = {"RQ_KEY_PREFIX": "{ae}:rq", "REDIS_REPLICAS": "1", "WEBHOOK_SECRET": NEW}
    with shard(tmp_path, program) as nodes, Receiver() as receiver:
        settings |= relay.environment(tmp_path) | {"WEBHOOK_URL": receiver.url, "PYTHONWARNINGS": ""}
        one, two = (node.client() for node in nodes)  # type: Any, Any
        with House(tmp_path, nodes[0].url, **settings) as house:
            house.root = project_with(tmp_path, TASKS)
            house.environment["PYTHONPATH"] = str(house.root)
            one.zadd("{ae}:rq:cron_jobs", {"tasks.report 0 0 1 1 *": time.time() - 400 * 86400})
            service = Cluster(house, relay, receiver)
            service.runs(one)
            two.execute_command("CLUSTER FAILOVER")
            eventually(lambda: two.info("replication")["role"] == "master")
            eventually(lambda: service.api.post("/emails", MAIL).status == 200, 10)
            service.runs(two)
            logs = {path.stem: path.read_text() for path in tmp_path.glob("*.log")}
            assert "cron_queued" in logs["worker-jobs"]
            assert {key for key in two.scan_iter() if not key.startswith(b"{ae}:")} == set()
    for word in ("crashed", "Traceback", "CROSSSLOT", "MOVED", "slot"):
        assert [name for name, said in logs.items() if word in said] == [], word
