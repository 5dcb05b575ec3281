"""A Redis that cannot serve us: one sentence at the start, one event when it begins and one when it ends.

Cases that other projects were asked about: onetimesecret#766, will#273, rq-dashboard#395, django-rq#674, bugbug#4028.
"""

from __future__ import annotations

import re
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import trustme

from queues import connection
from queues.connection import Unavailable, connect, reach
from settings import SettingsError
from tests.conversations import server_context
from tests.servers import ROOT, House, RedisServer, eventually, free_port


@contextmanager
def tls_server(context: ssl.SSLContext) -> Iterator[int]:
    """Something that takes TLS connections and says no more."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            while True:
                try:
                    line, _ = listener.accept()
                    with context.wrap_socket(line, server_side=True) as safe:
                        safe.recv(100)
                except ssl.SSLError:
                    continue
                except OSError:
                    return

        threading.Thread(target=serve, daemon=True).start()
        yield int(listener.getsockname()[1])


def why(url: str) -> str:
    with pytest.raises(Unavailable) as caught:
        reach(url)
    return str(caught.value)


def test_a_database_that_there_is_not_is_named(redis_server: RedisServer) -> None:
    url = redis_server.url.removesuffix("/0") + "/99"
    told = "Redis has no database of the number in REDIS_URL"
    assert why(url) == f"{told} (127.0.0.1:{redis_server.port}, database 99)"


def test_a_certificate_that_is_not_trusted_is_named(authority: trustme.CA) -> None:
    with tls_server(server_context(authority)) as port:
        assert why(f"rediss://127.0.0.1:{port}/0").startswith("Redis' certificate is not trusted")


def test_tls_with_a_server_that_speaks_none_is_named(redis_server: RedisServer) -> None:
    assert why(redis_server.url.replace("redis:", "rediss:")).startswith(
        ("Redis does not speak TLS", "Redis does not ans")
    )


def test_a_cluster_is_named(tmp_path: Path) -> None:
    # Its bus would be 10,000 above its port, which may be no port.
    with RedisServer(tmp_path, "--cluster-enabled", "yes", "--cluster-port", str(free_port())) as server:
        assert why(server.url).startswith("Redis is a cluster")


def test_a_wrong_password_is_named_and_not_shown(tmp_path: Path) -> None:
    with RedisServer(tmp_path, "--requirepass", "right", password="right") as server:
        told = why(f"redis://:planted-wrong@127.0.0.1:{server.port}/0")
    assert told == f"Redis does not accept our password (127.0.0.1:{server.port}, database 0)"


@pytest.mark.parametrize(
    ("parameter", "named"),
    [
        ("foo=bar", "foo"),
        ("ssl_cert_reqs=CERT_NONE", "ssl_cert_reqs"),  # Celery's form
        ("virtual_host=x", "virtual_host"),
        ("socket_timeout=soon", "one of its parameters"),
        ("db=x", "one of its parameters"),
    ],
)
def test_a_parameter_that_is_not_known_is_a_wrong_setting(parameter: str, named: str) -> None:
    scheme = "rediss" if "ssl" in parameter else "redis"
    with pytest.raises(SettingsError, match=f"^REDIS_URL: {named} must be"):
        connect(f"{scheme}://:planted-password@127.0.0.1:6379/0?{parameter}")


@pytest.mark.parametrize("queue", ["email", "jobs"])
@pytest.mark.parametrize("end", ["/0", "/0?foo=bar"])
def test_a_worker_that_cannot_start_says_why_in_one_line(queue: str, end: str, tmp_path: Path) -> None:
    url = f"redis://127.0.0.1:{free_port()}{end}"
    ran = subprocess.run(
        [sys.executable, ROOT / "worker.py", queue],
        cwd=tmp_path,
        env={"REDIS_URL": url, "SMTP_HOST": "relay.example.com"},
        capture_output=True,
        text=True,
        timeout=20,
    )
    assert ran.returncode in (1, 2)
    assert ran.stdout == ""
    assert re.fullmatch(
        r"REDIS_URL: (Redis does not answer \(127.0.0.1:\d+, database 0\)|foo must be .*)\n", ran.stderr
    )


def test_each_process_says_once_when_it_begins_and_once_when_it_ends(tmp_path: Path) -> None:
    settings = {"API_PROCESSES": "1", "WORKER_CONCURRENCY": "1", "SMTP_HOST": "relay.example.com"}
    with RedisServer(tmp_path) as server, House(tmp_path, server.url, **settings) as house:
        api, _ = house.api(), house.worker()
        eventually(
            lambda: api.get("/readyz").body["workers"]
        )  # a worker that begins outlasts a restart, and says nothing
        server.kill()
        for _ in range(5):
            assert api.get("/readyz").status == 503
        eventually(lambda: "redis_unavailable" in house.log("worker-email"))
        server.start()
        eventually(lambda: api.get("/readyz").status == 200)
        for name in ("api", "worker-email"):
            eventually(lambda name=name: "redis_back" in house.log(name))  # type: ignore[misc]
            events = re.findall(r"redis_(?:unavailable|back)", house.log(name))
            assert events == ["redis_unavailable", "redis_back"], house.log(name)
            assert f'reason="Redis does not answer" at="127.0.0.1:{server.port}, database 0"' in house.log(name)


def test_an_api_that_starts_before_its_redis_says_so(tmp_path: Path) -> None:
    server = RedisServer(tmp_path)
    with House(tmp_path, server.url, API_PROCESSES="1") as house:
        api = house.api()
        assert "redis_unavailable" in house.log("api")
        assert api.get("/healthz").status == 200


def test_a_pool_of_one_connection_has_it(redis_server: RedisServer) -> None:
    with connect(f"{redis_server.url}?max_connections=1") as client:
        assert client.ping()


def test_a_redis_that_refuses_writes_is_not_back_because_it_answers_a_question(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    told = connection.Announcements()
    told.place = "here"
    clock = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    with caplog.at_level("INFO", logger="async-email"):
        for _ in range(3):
            told.note(connection.CANNOT_NOW["OOM"])
            told.note(None)
        clock[0] += 61
        told.note(None)
    assert [record.getMessage().split()[0] for record in caplog.records] == ["redis_unavailable", "redis_back"]
