"""systemd's units, nginx, open ports, and the clock."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import trustme

from ops.checks import configuration, machine, store, submission, system, units
from ops.checks.findings import FAULT, NOTE, OK, WARN
from ops.checks.target import Target
from tests.checks.support import Server, assert_finds, fake, listed, of, worst
from tests.conversations import server_context
from tests.scripted_relay import Act, ScriptedRelay, raw
from tests.servers import ROOT, free_port


def http(status: str, body: str = "", location: str = "") -> Act:
    return raw(f"HTTP/1.1 {status}\r\nLocation: {location}\r\nContent-Length: {len(body)}\r\n\r\n{body}".encode())


def test_nginx_in_front_is_asked_as_anybody_would(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    fake(server.folder, "nginx", "exit 0", monkeypatch)
    server.write("nginx/sites-enabled/async-email", "")
    well, moved = http("200 OK", '{"status": "ok"}'), http("301 Moved", location="https://acme.example/healthz")
    no_api, other = http("502 Bad Gateway"), http("404 Not Found")
    ready = http("200 OK", '{"status": "ready"}')
    with ScriptedRelay({"GREETING": raw(b""), "GET": [well, ready, moved, no_api, no_api, other]}) as front:
        server.target.http_port = front.port
        assert_finds(machine.nginx(server.target), OK, "the API answers through nginx")
        assert_finds(machine.nginx(server.target), OK, "to https")
        assert_finds(machine.nginx(server.target), FAULT, "nginx answers 502", "sudo systemctl restart async-email-api")
        server.write("enforce", "1\n")
        assert_finds(machine.nginx(server.target), FAULT, "SELinux", "httpd_can_network_connect 1")
        assert_finds(machine.nginx(server.target), FAULT, "another site", "sites-enabled/default")
    assert [line for line in front.commands if line.startswith("GET")][:2] == [
        "GET /healthz HTTP/1.1",
        "GET /readyz HTTP/1.1",
    ]


NOT_READY = (
    (
        "Redis does not accept our password; send this again in 5 seconds",
        "refuses mail with 503: Redis does not accept",
    ),
    ("Redis is out of memory (maxmemory is reached); send this again", "503: Redis is out of memory (maxmemory is rea"),
    ("Redis keeps no append-only file, so a crash loses accepted mail", "503: Redis keeps no append-only file"),
    ("Redis does not answer; send this again in 5 seconds", "503: Redis does not answer"),
    ("Redis cannot write to its disk, so it refuses writes; send this", "503: Redis cannot write to its disk"),
)


@pytest.mark.parametrize(("message", "found"), NOT_READY)
def test_an_api_that_is_up_and_refuses_every_mail_is_a_fault(
    server: Server, monkeypatch: pytest.MonkeyPatch, message: str, found: str
) -> None:
    """All was said to be well while 1,125 of 1,125 requests were answered 503: the API ran with an old password."""
    fake(server.folder, "nginx", "exit 0", monkeypatch)
    server.write("nginx/sites-enabled/async-email", "")
    well = http("200 OK", '{"status": "ok"}')
    refuses = http("503 Service Unavailable", json.dumps({"statusCode": 503, "message": message}))
    with ScriptedRelay({"GREETING": raw(b""), "GET": [well, refuses]}) as front:
        server.target.http_port = front.port
        said = listed(machine.nginx(server.target))
    [one] = said
    assert (one.level, found in one.found) == (FAULT, True)
    assert "sudo systemctl restart async-email-api" in one.fix


def test_an_api_that_does_not_start_is_not_blamed_on_nginx(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """Requests wait in systemd's socket for it, as on each fresh installation without SMTP_HOST."""
    fake(server.folder, "nginx", "exit 0", monkeypatch)
    server.write("nginx/sites-enabled/async-email", "")
    with socket.create_server(("127.0.0.1", 0)) as silent:
        server.target.http_port, server.target.timeout = silent.getsockname()[1], 0.2
        assert_finds(machine.nginx(server.target), FAULT, "the API does not answer", "settings and units")


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
        port = everybody.getsockname()[1]
        wide, narrow = f"127.0.0.1:{port}", f"127.0.0.1:{loopback.getsockname()[1]}"
        said = machine.ports(target, of(listen=wide, dashboard_listen=narrow))
        assert_finds(said, FAULT, f"the API listens on port {port} for everybody", "LISTEN=")
        said = machine.ports(target, of(listen=narrow, dashboard_listen=wide))
        assert_finds(said, FAULT, "the dashboard listens", "DASHBOARD_LISTEN=127.0.0.1")
        said = machine.ports(target, of(listen=narrow, redis_url=f"redis://{wide}/0"))
        assert_finds(said, FAULT, "Redis listens on port", "bind 127.0.0.1")
        settings = of(listen=narrow)
        assert_finds(machine.ports(target, settings), NOTE, str(port), "ss -ltnp")
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


def test_keys_in_the_clear_and_a_certificate_that_runs_out_are_named(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert_finds(machine.tls(server.target), NOTE, "not here: skipped")
    site = server.write("nginx/sites-enabled/async-email", (ROOT / "nginx" / "async-email.conf").read_text())
    assert_finds(machine.tls(server.target), NOTE, "without TLS", "docs/operations.md, TLS")
    certificate = server.folder / "site.crt"
    site.write_text(f"server {{\n    ssl_certificate {certificate}; # managed by Certbot\n}}\n")
    for days, level, found in (("60", OK, "is valid"), ("3", WARN, "expires within 14 days")):
        command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-subj", "/CN=x", "-days", days]
        subprocess.run([*command, "-keyout", "/dev/null", "-out", certificate], check=True, capture_output=True)
        assert_finds(machine.tls(server.target), level, f"{certificate} {found}")
    site.write_text(f"    listen [::]:443 ssl default_server;\n{site.read_text()}")
    monkeypatch.setattr(machine, "listeners", set)
    assert_finds(machine.tls(server.target), FAULT, "nothing listens on port 443", "sudo systemctl restart nginx")
    monkeypatch.setattr(machine, "listeners", lambda: {443})
    assert worst(machine.tls(server.target)).level == WARN
    server.target.redis_certificates = (certificate,)
    assert_finds(machine.tls(server.target), WARN, f"{certificate} expires", "scale.md, TLS and logins")
    server.target.redis_certificates = ()
    monkeypatch.setattr(machine, "runs_out", lambda *_: True)
    assert_finds(machine.tls(server.target), FAULT, f"{certificate} has expired", "sudo systemctl reload nginx")


def test_a_full_disk_of_logs_is_named_and_logs_that_nobody_rotates(
    server: Server, target: Target, monkeypatch: pytest.MonkeyPatch
) -> None:
    (server.folder / "nginx").mkdir()
    fake(server.folder, "logrotate", "exit 0", monkeypatch)
    assert_finds(machine.logs(target), NOTE, "skipped")
    assert worst(machine.logs(server.target)).level == OK
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=2**20))
    assert_finds(machine.logs(server.target), WARN, "1 MB free for logs", "journalctl --vacuum-size")
    monkeypatch.setattr(machine, "run", lambda *_: subprocess.CompletedProcess((), system.NOT_RUN, "", ""))
    assert_finds(machine.logs(server.target), WARN, "no logrotate", "sudo apt install logrotate")


# fmt: off
UFW = [  # what `ufw status` says of its rules -> the level of what the doctor says
    ("22/tcp                     ALLOW       Anywhere", WARN),
    ("80/tcp                     DENY        Anywhere", WARN),
    ("8080/tcp                   ALLOW       Anywhere", WARN),
    ("22/tcp                     ALLOW       Anywhere\n80,443/tcp                 ALLOW       Anywhere", OK),
    ("443/tcp                    LIMIT       10.0.0.0/8", OK),
    ("Nginx Full                 ALLOW       Anywhere", OK),
    ("Anywhere                   ALLOW       10.0.0.7", OK),
]
# fmt: on


@pytest.mark.parametrize(("rules", "level"), UFW)
def test_a_firewall_of_this_machine_that_lets_nobody_in_is_named(
    server: Server, monkeypatch: pytest.MonkeyPatch, rules: str, level: str
) -> None:
    monkeypatch.setattr(machine, "listeners", set)
    fake(server.folder, "ufw", f"printf 'Status: active\n\nTo  Action  From\n--  ------  ----\n{rules}\n'", monkeypatch)
    said = worst(machine.ports(server.target, of()))
    assert said.level == level, said
    assert level == OK or said.fix == "sudo ufw allow 80,443/tcp"


def test_a_clock_that_nobody_sets_is_named(target: Target, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake(tmp_path, "timedatectl", "echo no", monkeypatch)
    assert_finds(machine.clock(target), WARN, "not synchronised", "sudo timedatectl set-ntp true")
    fake(tmp_path, "timedatectl", "echo yes", monkeypatch)
    assert worst(machine.clock(target)).level == OK


# fmt: off
MEMORY = [  # what a container sees -> the bytes that it may use
    ({}, None),  # no container
    ({"proc/1/cgroup": "0::/init.scope\n", "sys/fs/cgroup/memory.max": "536870912\n"}, 512 << 20),  # nspawn, Docker
    ({"proc/1/cgroup": "0::/init.scope\n", "sys/fs/cgroup/memory.max": "max\n"}, None),
    ({"proc/1/cgroup": "0::/machine.slice/mail.scope/init.scope\n",  # without a namespace of its own
      "sys/fs/cgroup/machine.slice/mail.scope/memory.max": "268435456\n",
      "sys/fs/cgroup/machine.slice/memory.max": "536870912\n"}, 256 << 20),
    ({"proc/1/cgroup": "4:cpu,cpuacct:/\n3:memory:/docker/1a\n",
      "sys/fs/cgroup/memory/docker/1a/memory.limit_in_bytes": "1073741824\n"}, 1 << 30),  # version 1
    ({"proc/1/cgroup": "3:memory:/\n",
      "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n"}, None),  # its word for no limit
    ({"proc/meminfo": "MemTotal:         524288 kB\nMemFree: 1 kB\n"}, 512 << 20),  # LXC, as in Proxmox
]
# fmt: on


@pytest.mark.parametrize(("files", "limit"), MEMORY)
def test_the_memory_of_a_container_is_what_it_may_use(tmp_path: Path, files: dict[str, str], limit: int | None) -> None:
    """In a container of 512 MB on a machine with 24 GB, Redis got 9.6 GB, and was killed 141 times."""
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert system.memory(tmp_path) == (limit or os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))


WORKER = "async-email-worker@email.service"
DEAD = {"ActiveState": "failed", "SubState": "failed", "Result": "exit-code"}


# fmt: off
UNITS = [
    ({}, OK, "running, from the current release", ""),
    ({**DEAD, "ExecMainStatus": "203"}, FAULT, "203/EXEC", "/opt/async-email"),
    ({**DEAD, "ExecMainStatus": "127"}, FAULT, "no .venv", "sudo bin/install"),
    ({**DEAD, "ExecMainStatus": "226"}, FAULT, "226/NAMESPACE", f"journalctl -u {WORKER}"),
    ({**DEAD, "ExecMainStatus": "243"}, FAULT, "243/CREDENTIALS", "/etc/async-email/credentials"),
    ({**DEAD, "ExecMainStatus": "217"}, FAULT, "217/USER", "sudo bin/install"),
    ({**DEAD, "ExecMainStatus": "2"}, FAULT, "refuses its settings", "settings"),
    ({**DEAD, "ExecMainStatus": "77"}, FAULT, "last exit code was 77", f"journalctl -u {WORKER} -n 50"),
    ({**DEAD, "Result": "start-limit-hit", "ExecMainStatus": "1"}, FAULT, "systemd gave up", "reset-failed"),
    ({**DEAD, "Result": "oom-kill", "ExecMainStatus": "9"}, FAULT, "out of memory", "WORKER_CONCURRENCY"),
    ({**DEAD, "ExecMainStatus": "2", "Restart": "always"}, FAULT, "gave up, and it refuses", "reset-failed"),
    ({"ActiveState": "activating", "SubState": "auto-restart", "ExecMainStatus": "1"}, FAULT, "auto-restart", "Redis"),
    ({"ActiveState": "activating", "SubState": "start"}, WARN, "just starting", "look again"),
    ({"ActiveState": "inactive", "SubState": "dead"}, FAULT, "not started", f"sudo systemctl start {WORKER}"),
    ({"LoadState": "not-found"}, FAULT, "not installed: async", "sudo bin/install"),
    ({"LoadState": "bad-setting"}, FAULT, "bad-setting", "systemd-analyze verify"),
    ({"LoadState": "masked"}, FAULT, "masked", f"sudo systemctl unmask {WORKER}"),
    ({"UnitFileState": "disabled"}, WARN, "gone after the next reboot", f"sudo systemctl enable {WORKER}"),
    ({"KillMode": "control-group"}, FAULT, "a restart kills the jobs", "KillMode=mixed"),
    ({"NeedDaemonReload": "yes"}, WARN, "changed on disk", "daemon-reload"),
    ({"LimitNOFILE": "12"}, FAULT, "may open 12 files", f"systemctl edit {WORKER}"),
]
# fmt: on


@pytest.mark.parametrize(("changes", "level", "found", "fix"), UNITS)
def test_a_unit_that_runs_is_fine_and_one_that_is_not_well_is_explained(
    server: Server, changes: dict[str, str], level: str, found: str, fix: str
) -> None:
    server.units(WORKER, **changes)
    assert_finds(units.running(server.target), level, found, fix)


def test_what_is_wrong_with_all_units_is_one_line(server: Server) -> None:
    server.units(*units.UNITS, ActiveState="inactive", UnitFileState="disabled")
    said = listed(units.running(server.target))
    assert [one.level for one in said] == [FAULT, WARN]
    assert said[0].fix == f"sudo systemctl start {' '.join(units.UNITS)}"


@pytest.mark.parametrize(("roles", "level"), [("", WARN), ("redis", OK)])
def test_a_redis_that_sentinel_changes_need_not_be_restarted_for_it(
    server: Server, monkeypatch: pytest.MonkeyPatch, roles: str, level: str
) -> None:
    monkeypatch.setattr(store, "OUR_CONF", str(server.write("redis.conf", "replicaof 10.0.0.2 6380\n")))
    server.write("etc/roles", roles)
    server.units(store.OUR_UNIT, ExecMainStartTimestampMonotonic="1")
    assert worst(units.running(server.target)).level == level


@pytest.mark.parametrize(
    ("roles", "expected"),
    [
        ("redis sentinel", "redis-server@async-email.service redis-sentinel@async-email.service"),
        ("api", "async-email-api.socket async-email-api.service nginx.service"),
        (
            "worker",
            "async-email-worker@email.service async-email-worker@jobs.service async-email-dashboard.service",
        ),
    ],
)
def test_of_several_machines_each_is_asked_for_what_is_its_own(server: Server, roles: str, expected: str) -> None:
    server.write("etc/roles", roles)
    server.write("nginx/nginx.conf", "")
    assert sorted(units.expected(server.target)) == sorted(["async-email.target", *expected.split()])
    server.write("etc/async-email.env", "MAIL_FROM=a@example.com\n", 0o600)
    is_fault = worst(configuration.values(server.target)).level == FAULT
    assert is_fault is (roles == "worker")  # which alone wants a relay


def test_a_unit_that_was_restarted_often_and_lately_is_named(server: Server) -> None:
    since = int(time.monotonic() * 1e6)
    server.units(WORKER, NRestarts="12", ActiveEnterTimestampMonotonic=str(since))
    assert_finds(units.running(server.target), WARN, "after 12 restarts", "journalctl")
    server.units(WORKER, NRestarts="12", ActiveEnterTimestampMonotonic=str(since - 7200 * 10**6))
    assert worst(units.running(server.target)).level == OK


def test_a_unit_that_still_runs_the_last_release_is_named(server: Server) -> None:
    for release, level in (("1.0", WARN), ("2.0", OK)):
        folder = server.folder / "opt/releases" / release
        with subprocess.Popen(["sleep", "60"], cwd=folder) as process:
            server.units(WORKER, MainPID=str(process.pid))
            said = worst(units.running(server.target))
            process.kill()
        assert said.level == level, said
    assert "still runs" not in said.found


def test_a_unit_whose_program_was_replaced_while_it_ran_is_named(server: Server) -> None:
    program = server.folder / "sleep"
    shutil.copy2("/bin/sleep", program)
    with subprocess.Popen([program, "60"]) as process:
        server.units(WORKER, MainPID=str(process.pid))
        assert worst(units.running(server.target)).level == OK
        program.unlink()
        assert_finds(units.running(server.target), WARN, "still runs a program that was replaced", "systemctl restart")
        process.kill()


API, DASHBOARD = "async-email-api.service", "async-email-dashboard.service"


def test_a_service_that_runs_with_an_older_file_than_there_is_now_is_named(server: Server) -> None:
    """The commonest mistake: an edit without a restart. The doctor read the new file, and all was well."""
    now = str(int(time.monotonic() * 1e6))
    for path in (server.env, *(server.folder / "etc/credentials").iterdir()):
        os.utime(path, (time.time() - 3600,) * 2)
    server.units(*units.UNITS, ExecMainStartTimestampMonotonic=now)
    assert worst(units.running(server.target)).level == OK
    os.utime(server.env, (time.time() + 60,) * 2)
    [said] = listed(units.running(server.target))
    assert said.level == WARN
    assert said.found.startswith(f"{server.env} was changed after it was read by {API} and async-email-worker@email")
    assert said.fix == f"sudo systemctl restart {' '.join(configuration.SERVICES)}"
    server.units(API, ActiveState="activating", SubState="auto-restart", ExecMainStartTimestampMonotonic=now)
    assert not any("was changed" in one.found for one in listed(units.running(server.target)))


@pytest.mark.parametrize("unit", configuration.SERVICES)
def test_what_a_service_has_read_is_compared_with_what_is_there(server: Server, unit: str) -> None:
    """Also a file that came back from a backup with its old date."""
    passed = configuration.passed_to(unit, server.target)
    for name, path in passed.items():
        server.write(f"run/{unit}/{name}", path.read_text(), 0o600)
        os.utime(path, (time.time() + 60,) * 2)  # saved again as it was
    server.units(unit, ExecMainStartTimestampMonotonic="1")
    assert worst(units.running(server.target)).level == OK
    for path in passed.values():
        before = path.read_text()
        path.write_text(f"{before}#\n")
        os.utime(path, (1, 1))
        level = NOTE if unit == DASHBOARD else WARN
        assert_finds(units.running(server.target), level, f"{path} was changed", f"sudo systemctl restart {unit}")
        path.write_text(before)


def test_where_there_is_no_systemd_nginx_or_timedatectl_nothing_is_wrong(
    target: Target, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.units(*units.UNITS, LoadState="not-found")
    target.systemd = server.target.systemd
    assert_finds(units.running(target), NOTE, "not installed as services here")
    monkeypatch.setenv("PATH", "/nowhere")
    assert_finds(units.running(target), NOTE, "skipped")
    target.systemd = server.folder / "none"
    for check in (units.running, machine.nginx, machine.clock):
        assert_finds(check(target), NOTE, "skipped")


def test_ports_that_take_mail_by_smtp_greet_and_are_encrypted(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    assert_finds(submission.ports(server.target, of()), NOTE, "SUBMISSION_LISTEN is not set")
    away = of(submission_listen=f"127.0.0.1:{free_port()}")
    assert_finds(submission.ports(server.target, away), FAULT, "nothing takes mail by SMTP", "sudo bin/install")
    tls = {"submission_tls_cert": "/c.pem", "submission_tls_key": "/k"}
    for implicit in (False, True):
        with ScriptedRelay(implicit=implicit, tls=server_context(trustme.CA(), "127.0.0.1")) as there:
            monkeypatch.setattr(submission, "TLS_PORT", there.port if implicit else 0)
            settings = {"submission_listen": f"0.0.0.0:{there.port}"}
            assert_finds(submission.ports(server.target, of(**settings)), OK, f"on port {there.port}")
            assert_finds(submission.ports(server.target, of(**settings)), WARN, "without TLS", "SUBMISSION_TLS_CERT")
            assert worst(submission.ports(server.target, of(**settings, **tls))).level == OK
    fake(server.folder, "openssl", "echo Certificate will expire", monkeypatch)
    assert_finds(submission.ports(server.target, of(**settings, **tls)), WARN, "/c.pem, for mail by SMTP, expires")
