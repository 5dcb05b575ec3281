"""nginx, open ports, and the clock."""

from __future__ import annotations

import os
import socket
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest

from ops.checks import machine
from ops.checks.findings import FAULT, NOTE, OK, WARN
from ops.checks.target import Target
from tests.checks.support import Server, assert_finds, fake, of, worst
from tests.servers import free_port


class Front(BaseHTTPRequestHandler):
    """Stands for nginx: what it answers is the server's to say."""

    def do_GET(self) -> None:
        status, body, location = self.server.says  # type: ignore[attr-defined]
        self.send_response(status)
        self.send_header("Location", location)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None: ...


@pytest.fixture
def front(server: Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    fake(server.folder, "nginx", "exit 0", monkeypatch)
    server.write("nginx/sites-enabled/async-email", "")
    with HTTPServer(("127.0.0.1", 0), Front) as http:
        http.says = (200, b'{"status": "ok"}', "")  # type: ignore[attr-defined]
        server.target.http_port = http.server_port
        thread = threading.Thread(target=http.serve_forever, args=[0.05])
        thread.start()
        yield http
        http.shutdown()
        thread.join()


def test_nginx_in_front_is_asked_as_anybody_would(server: Server, front: Any) -> None:
    assert worst(machine.nginx(server.target)).level == OK
    front.says = (301, b"", "https://acme.example/healthz")
    assert worst(machine.nginx(server.target)).level == OK
    front.says = (502, b"", "")
    assert_finds(machine.nginx(server.target), FAULT, "nginx answers 502", "sudo systemctl restart async-email-api")
    server.write("enforce", "1\n")
    assert_finds(machine.nginx(server.target), FAULT, "SELinux", "httpd_can_network_connect 1")
    front.says = (404, b"", "")
    assert_finds(machine.nginx(server.target), FAULT, "another site", "sites-enabled/default")


def test_nginx_that_is_not_set_up_is_named(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    assert_finds(machine.nginx(server.target), WARN, "nginx is not installed", "sudo bin/install")
    server.write("nginx/nginx.conf", "")
    server.target.http_port = free_port()
    said = 'nginx: [emerg] unknown directive "lisen" in /etc/nginx/sites-enabled/async-email:3'
    fake(server.folder, "nginx", f"echo '{said}' >&2; exit 1", monkeypatch)
    assert_finds(machine.nginx(server.target), FAULT, "the nginx site is not enabled", "sudo ln -s")
    assert_finds(machine.nginx(server.target), FAULT, "nothing answers on port", "sudo systemctl restart nginx")
    if os.geteuid() == 0:
        assert_finds(machine.nginx(server.target), FAULT, 'unknown directive "lisen"', "sudo nginx -t")


def test_a_port_of_ours_that_is_open_to_everybody_is_a_fault(target: Target) -> None:
    with socket.create_server(("0.0.0.0", 0)) as everybody, socket.create_server(("127.0.0.1", 0)) as loopback:
        api, dashboard = everybody.getsockname()[1], loopback.getsockname()[1]
        settings = of(listen=f"0.0.0.0:{api}", dashboard_listen=f"127.0.0.1:{dashboard}")
        assert_finds(machine.ports(target, settings), FAULT, f"the API listens on port {api} for everybody", "LISTEN=")
        settings = of(dashboard_listen=f"127.0.0.1:{api}", listen=f"127.0.0.1:{dashboard}")
        assert_finds(machine.ports(target, settings), FAULT, "the dashboard listens", "DASHBOARD_LISTEN=127.0.0.1")
        settings = of(redis_url=f"redis://127.0.0.1:{api}/0", listen=f"127.0.0.1:{dashboard}")
        assert_finds(machine.ports(target, settings), FAULT, "Redis listens on port", "bind 127.0.0.1")
        settings = of(listen=f"127.0.0.1:{dashboard}")
        assert_finds(machine.ports(target, settings), NOTE, f"{api}", "ss -ltnp")
        assert_finds(machine.ports(target, settings), OK, "nothing of ours listens")


@pytest.mark.parametrize(
    ("line", "local"),
    [
        ("0100007F", True),
        ("00000000", False),
        ("00000000000000000000000001000000", True),
        ("00000000000000000000000000000000", False),
        ("0000000000000000FFFF00000100007F", True),
    ],
)
@pytest.mark.skipif(sys.byteorder != "little", reason="the kernel of another machine writes them otherwise")
def test_addresses_are_read_as_the_kernel_writes_them(line: str, local: bool) -> None:
    assert machine.is_local(line) is local


def test_a_clock_that_nobody_sets_is_named(target: Target, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake(tmp_path, "timedatectl", "echo no", monkeypatch)
    assert_finds(machine.clock(target), WARN, "not synchronised", "sudo timedatectl set-ntp true")
    fake(tmp_path, "timedatectl", "echo yes", monkeypatch)
    assert worst(machine.clock(target)).level == OK
