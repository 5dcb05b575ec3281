"""`bin/install`, step by step, in a folder that stands for the machine; tests/deploy runs all of it on a whole one.

What a step would have systemctl, apt-get or nginx do is only noted. Redis is real: the configuration that is written is
the one under which the service has to work.
"""

from __future__ import annotations

import hashlib
import os
import re
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import redis

from ops import install, redis_server, release, services, site, smtp_in, webhooks
from ops.server import Fault, Server
from process.api_keys import ApiKey
from process.relays import parse_relays
from settings import from_credentials, from_file, load
from tests.http_api import MAIL
from tests.relay import Relay
from tests.servers import ROOT, House, RedisServer, copy_project, eventually, mode

GIT = ("git", "-c", "user.name=a", "-c", "user.email=a@example.com")


@pytest.fixture(autouse=True)
def noted(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The commands that would have been run."""
    commands: list[str] = []

    def run(self: Server, *command: str | Path, may_fail: bool = False) -> bool:
        commands.append(" ".join(map(str, command)))
        return True

    monkeypatch.setattr(Server, "run", run)
    monkeypatch.setattr(Server, "ask", lambda *_, **__: "")
    return commands


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """A clone whose one commit is the project as it stands."""
    source = copy_project(tmp_path / "clone")
    for command in (["init", "-q"], ["add", "-A"], ["commit", "-q", "-m", "as it stands"]):
        subprocess.run([*GIT, "-C", source, *command], check=True)
    return source


@pytest.fixture
def server(clone: Path, tmp_path: Path) -> Server:
    return Server(clone, under=tmp_path / "machine")


def content(folder: Path) -> dict[str, str | bytes]:
    """Every file and link below it."""
    paths = [path for path in folder.rglob("*") if path.is_symlink() or path.is_file()]
    return {str(path): os.readlink(path) if path.is_symlink() else path.read_bytes() for path in paths}


@pytest.mark.parametrize("option", [[], ["--rollback"]])
def test_a_dry_run_as_anybody_changes_nothing(clone: Path, option: list[str]) -> None:
    os.utime(clone / "service.py", (1, 1))  # else `git status` has nothing new to write down
    before = content(clone)
    ran = subprocess.run([clone / "bin/install", "--dry-run", *option], capture_output=True, text=True, cwd="/")
    assert "==> " in ran.stdout
    assert ran.stdout.endswith("Nothing was changed.\n") or "there is none" in ran.stderr
    assert content(clone) == before


def test_a_dry_run_of_each_step_changes_nothing(clone: Path, tmp_path: Path) -> None:
    dry = Server(clone, dry=True, under=tmp_path / "machine")
    install.run(dry, install.INSTALL)
    assert not (tmp_path / "machine").exists()


def test_a_step_that_fails_ends_it_and_shows_the_key_that_was_made(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """Its SHA-256 is stored by then, and nobody could ever find out the key."""

    def full(_: Server) -> None:
        raise OSError("the disk is full")

    machine = tmp_path / "machine"
    monkeypatch.setattr(install, "Server", lambda source, dry: Server(source, dry=dry, under=machine))
    steps = tuple(("a step", action) for action in (install.configure, full, release.switch))
    monkeypatch.setattr(install, "INSTALL", steps)
    assert install.main([]) == 1
    said = capsys.readouterr()
    assert "Stopped: the disk is full" in said.err
    key = said.out.split()[-1]
    assert hashlib.sha256(key.encode()).hexdigest() in (machine / "etc/async-email/credentials/api_keys").read_text()
    assert not (machine / "opt").exists()


# --- the release ------------------------------------------------------------------------------------------------------


def test_a_release_is_named_by_its_version_and_commit_and_what_is_not_committed_is_another(clone: Path) -> None:
    commit = subprocess.run(["git", "-C", clone, "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    version = re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert version
    committed = release.release_id(clone)
    assert committed == f"{version[1]}-{commit.stdout.strip()}"
    (clone / "tasks.py").write_text("# another task\n")
    changed = release.release_id(clone)
    assert changed.startswith(f"{committed}-changed-")
    assert release.release_id(clone) == changed


def test_a_copy_has_what_git_tracks_and_can_be_read_by_everybody(clone: Path, tmp_path: Path) -> None:
    (clone / ".env").write_text("SMTP_PASSWORD=secret\n")
    (clone / "notes.txt").write_text("mine\n")
    (clone / "service.py").chmod(0o600)
    release.copy_files(clone, copy := tmp_path / "release")
    copied = {str(path.relative_to(copy)) for path in copy.rglob("*")}
    assert {"service.py", "bin/install", "templates/welcome/subject.txt"} <= copied
    assert not copied & {".env", ".git", "notes.txt"}
    assert (mode(copy / "service.py"), mode(copy / "bin/install")) == (0o644, 0o755)


def test_without_git_a_release_is_named_by_what_is_in_it(clone: Path) -> None:
    (clone / ".git").rename(clone.parent / "git")
    secret = {Path(".env"), Path("machines.json"), Path("async-email.env")}
    for path in secret:
        (clone / path).write_text("SMTP_PASSWORD=secret\n")
    name = release.release_id(clone)
    assert name == release.release_id(clone)
    assert not secret.intersection(release.files_of(clone))
    (clone / "tasks.py").write_text("")
    assert release.release_id(clone) != name


def test_a_release_that_was_not_finished_is_made_again(server: Server, noted: list[str]) -> None:
    release.make_release(server)
    assert any("--require-hashes" in command for command in noted)
    (server.release / release.MARK).unlink()
    (server.release / "left-over").write_text("")
    noted.clear()
    release.make_release(server)
    assert noted
    assert not (server.release / "left-over").exists()
    noted.clear()
    release.make_release(server)
    assert noted == []


def test_the_systems_next_python_gets_a_release_of_its_own_and_what_runs_keeps_its_files(server: Server) -> None:
    release.make_release(server)
    first = server.release
    (first / release.MARK).write_text("Python 3.9")
    release.make_release(server)
    assert server.release.name.startswith(f"{first.name}-python3.")
    assert (first / release.MARK).read_text() == "Python 3.9"
    assert (server.release / "worker.py").exists()


def test_the_switch_remembers_what_was_and_a_rollback_goes_there_and_back(server: Server, clone: Path) -> None:
    with pytest.raises(Fault, match="there is none"):
        release.find_previous_release(server)
    release.make_release(server)
    release.switch(server)
    first = server.release
    (clone / "tasks.py").write_text("")
    release.make_release(server)
    assert server.current.resolve() == first
    second = server.release
    for _ in range(2):  # a second run changes nothing
        release.switch(server)
        assert (server.current.resolve(), server.previous.resolve()) == (second, first)
    for expected in (first, second):
        release.find_previous_release(server)
        release.switch(server)
        assert server.current.resolve() == expected


def test_a_rollback_turns_off_what_the_earlier_release_does_not_have(
    server: Server, monkeypatch: pytest.MonkeyPatch, noted: list[str]
) -> None:
    monkeypatch.setattr(Server, "ask", lambda *_, **__: "enabled")
    services.stop_what_is_newer(server)
    assert noted == []
    (server.tree / "systemd/async-email-webhooks.service").unlink()
    services.stop_what_is_newer(server)
    assert noted == ["systemctl disable --now async-email-webhooks.service"]


def test_three_releases_are_kept_and_what_is_used_is_among_them(server: Server) -> None:
    for number in range(6):
        (server.releases / str(number)).mkdir(parents=True)
        os.utime(server.releases / str(number), (number, number))
    server.link(server.current, "releases/4")
    server.link(server.previous, "releases/0")  # after a rollback, say
    release.remove_old_releases(server)
    assert sorted(path.name for path in server.releases.iterdir()) == ["0", "4", "5"]


# --- configuration ----------------------------------------------------------------------------------------------------


def test_secrets_are_made_once_and_only_root_reads_them(server: Server) -> None:
    install.configure(server)
    key = server.new_key
    assert key
    secrets = from_credentials(str(server.credentials))
    settings = load(from_file=from_file(server.env), **secrets)  # as the service reads it
    assert settings.api_keys == (ApiKey("default", hashlib.sha256(key.encode()).hexdigest(), "full"),)
    assert settings.redis.startswith("unix://async-email:")
    assert settings.dashboard_password
    assert not settings.smtp_password
    assert mode(server.etc) == mode(server.credentials) == 0o700
    relays = server.relays
    assert {mode(path) for path in (server.env, relays, *server.credentials.iterdir())} == {0o600}
    assert parse_relays(relays.read_text()) == ()
    examples = [line[2:] for line in relays.read_text().splitlines() if re.match(r"# (\[|\w+ =)", line)]
    assert [one.name for one in parse_relays("\n".join(examples))] == ["first", "second"]
    before = content(server.etc)
    install.configure(server)
    assert content(server.etc) == before
    assert server.new_key == key


def test_what_the_operator_has_set_is_neither_overwritten_nor_made(server: Server) -> None:
    server.etc.mkdir(parents=True)
    server.env.write_text("REDIS_URL=rediss://elsewhere/0\nDASHBOARD_PASSWORD_FILE=/etc/password\n#API_KEYS=\n")
    install.configure(server)
    redis_server.start_redis(server)
    assert server.env.read_text().startswith("REDIS_URL=rediss://elsewhere/0\n")
    assert (server.credentials / "redis_url").read_text() == ""
    assert (server.credentials / "dashboard_password").read_text() == ""
    assert server.new_key
    assert not server.redis_conf.exists()


class InstalledRedis(RedisServer):
    """A Redis under the configuration that is written, in a place of its own."""

    def arguments(self) -> list[str]:
        return [str(self.directory / "redis.conf")]

    def client(self) -> redis.Redis:
        return redis.Redis.from_url(self.url)


@pytest.fixture
def installed_redis(server: Server, tmp_path: Path) -> Iterator[InstalledRedis]:
    place = tmp_path / "redis"
    place.mkdir()
    install.configure(server)
    text = redis_server.redis_configuration(server)
    assert "maxmemory MAXMEMORY" not in text
    assert "#SHA256" not in text
    text = text.replace("/run/redis-async-email", str(place)).replace("/var/lib/redis-async-email", str(place))
    (place / "redis.conf").write_text(f"{text}logfile {place}/log\n")
    server_there = InstalledRedis(place)
    server_there.url = (server.credentials / "redis_url").read_text().strip()
    server_there.url = server_there.url.replace("/run/redis-async-email", str(place))
    with server_there:
        yield server_there


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
def test_a_restart_of_its_redis_takes_no_mail(
    installed_redis: InstalledRedis, tmp_path: Path, how: signal.Signals
) -> None:
    """Redis reads its file as the user `default`, and skips what this user may not do."""
    with House(tmp_path, installed_redis.url) as house:
        api = house.api()
        kept = [api.submit(MAIL) for _ in range(3)]
        with installed_redis.client() as client:
            before = client.dbsize()
            installed_redis.kill(how)
            installed_redis.start()
            assert {api.email(mail_id)["status"] for mail_id in kept} == {"queued"}
            assert client.dbsize() == before
            assert client.llen("rq:queue:email") == 3
    assert "CRITICAL" not in (installed_redis.directory / "log").read_text()


def test_its_redis_stops_also_where_it_cannot_write_and_has_everything_afterwards(
    installed_redis: InstalledRedis,
) -> None:
    """A full disk, a folder of another user's: by default Redis goes on, and systemd waits for it without end."""
    with installed_redis.client() as client:
        client.set("kept", "1")
    (installed_redis.directory / "dump.rdb").mkdir()  # so that the snapshot cannot be written
    installed_redis.process.send_signal(signal.SIGTERM)
    assert installed_redis.process.wait(20) == 0
    assert "Exit anyway" in (installed_redis.directory / "log").read_text()
    installed_redis.start()
    with installed_redis.client() as client:
        assert client.get("kept") == b"1"


@pytest.mark.parametrize(("version", "forced"), [("6.2.6", False), ("7.0.15", True), ("8.0.2", True)])
def test_redis_6_gets_no_line_that_it_does_not_know(
    server: Server, monkeypatch: pytest.MonkeyPatch, version: str, forced: bool
) -> None:
    monkeypatch.setattr(Server, "ask", lambda *_, **__: f"Redis server v={version} sha=00000000:0")
    assert ("\nshutdown-on-sigterm" in redis_server.redis_configuration(server)) is forced


@pytest.mark.parametrize(
    ("machine", "redis"), [(256 << 20, 64 << 20), (512 << 20, 128 << 20), (1 << 30, 409 << 20), (24 << 30, 9830 << 20)]
)
def test_redis_gets_two_fifths_of_the_memory_or_a_quarter_of_little(
    monkeypatch: pytest.MonkeyPatch, machine: int, redis: int
) -> None:
    monkeypatch.setattr(redis_server, "memory", lambda: machine)
    assert redis_server.most_memory() >> 20 == redis >> 20


def test_under_its_redis_the_service_does_all_it_does(installed_redis: InstalledRedis, tmp_path: Path) -> None:
    with Relay() as relay, House(tmp_path, installed_redis.url, **relay.environment(tmp_path)) as house:
        api = house.api()
        workers = [house.worker(), house.worker("jobs")]
        api.wait_for(api.submit(MAIL), "sent")
        relay.rcpt["put-off@example.com"] = ["451 later"]
        api.wait_for(api.submit(MAIL | {"to": "put-off@example.com"}), "sent")
        job = api.post("/jobs", {"task": "why_failed"}).body["job_id"]
        eventually(lambda: api.get(f"/jobs/{job}").body["status"] == "finished")
        ready = api.get("/readyz")
        assert (ready.status, ready.body["reasons"]) == (200, [])
        for worker in workers:  # which wakes those who wait for a job
            worker.terminate()
            assert worker.wait(30) == 0
    with installed_redis.client() as client:
        calls = client.info("commandstats")
    refused = {name for name, counts in calls.items() if counts.get("rejected_calls")}
    assert refused <= {"cmdstat_client|maint_notifications"}


def test_what_its_unit_runs_first_is_copied_with_it(server: Server) -> None:
    redis_server.copy_redis_unit(server)
    drop_in = (server.units / "redis-server@async-email.service.d" / "async-email.conf").read_text()
    assert " /opt/async-email/aof.py " in drop_in
    assert (server.opt / "aof.py").read_text() == (ROOT / "ops" / "aof.py").read_text()


def test_redis_may_read_back_whatever_it_wrote() -> None:
    """It reads its file as `default`. Redis 7.0 skips a transaction there that this user may not run; Valkey 9 does
    not, so with that one the test above cannot tell."""
    lines = (ROOT / "deploy" / "redis" / "async-email.conf").read_text().splitlines()
    assert "user default off ~* &* +@all" in lines


def test_its_redis_keeps_what_it_takes_and_obeys_nobody_else(installed_redis: InstalledRedis) -> None:
    with installed_redis.client() as client:
        persistence, memory = client.info("persistence"), client.info("memory")
        assert persistence["aof_enabled"] == 1
        assert memory["maxmemory_policy"] == "noeviction"
        assert memory["maxmemory"] == pytest.approx(redis_server.most_memory(), rel=0.01)
        for command in ("FLUSHALL", "KEYS *", "CONFIG SET appendonly no", "SHUTDOWN", "ACL LIST", "REPLICAOF NO ONE"):
            with pytest.raises(redis.exceptions.NoPermissionError):
                client.execute_command(*command.split())
    path = installed_redis.url.rpartition("@")[2]
    with redis.Redis(unix_socket_path=path) as nobody, pytest.raises(redis.exceptions.AuthenticationError):
        nobody.ping()


# --- nginx ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def nginx(server: Server, monkeypatch: pytest.MonkeyPatch) -> Path:
    """/etc/nginx as the package leaves it."""
    for folder in ("sites-available", "sites-enabled"):
        (server.nginx / folder).mkdir(parents=True)
    (server.nginx / "sites-available/default").write_text("welcome\n")
    (server.nginx / "sites-enabled/default").symlink_to(server.nginx / "sites-available/default")
    known = f" {server.nginx}/sites-available/default {hashlib.md5(b'welcome' + bytes([10])).hexdigest()}"
    monkeypatch.setattr(Server, "ask", lambda _, *command, **__: known if command[0] == "dpkg-query" else "")
    return server.nginx


@pytest.mark.parametrize(("default", "left"), [("welcome\n", set()), ("my shop\n", {"default"})])
def test_the_site_replaces_the_welcome_page_unless_somebody_has_changed_it(
    server: Server, nginx: Path, default: str, left: set[str]
) -> None:
    (nginx / "sites-available/default").write_text(default)
    site.set_up_nginx(server)
    assert {path.name for path in (nginx / "sites-enabled").iterdir()} == {"async-email"} | left
    assert (nginx / "sites-enabled/async-email").read_text() == (server.source / "nginx/async-email.conf").read_text()


def test_a_site_that_was_edited_stays_and_one_that_was_not_is_brought_up_to_date(server: Server, nginx: Path) -> None:
    release.make_release(server)
    site.set_up_nginx(server)
    installed, ours = nginx / "sites-available/async-email", server.source / "nginx/async-email.conf"
    ours.write_text(ours.read_text() + "# of the next release\n")
    site.set_up_nginx(server)
    assert installed.read_text() == ours.read_text()
    installed.write_text("server_name mail.example.com; # managed by Certbot\n")
    site.set_up_nginx(server)
    assert installed.read_text().startswith("server_name mail.example.com")


def test_a_site_that_nginx_does_not_take_is_taken_out_again(
    server: Server, nginx: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(self: Server, *command: str, may_fail: bool = False) -> bool:
        if command == ("nginx", "-t"):
            raise Fault("duplicate default server")
        return True

    def refused() -> None:
        before = content(nginx)
        with monkeypatch.context() as patch:
            patch.setattr(Server, "run", run)
            with pytest.raises(Fault, match="duplicate default server"):
                site.set_up_nginx(server)
        assert content(nginx) == before

    refused()
    release.make_release(server)
    site.set_up_nginx(server)
    (server.source / "nginx/async-email.conf").write_text("nonsense\n")
    refused()


# --- the services -----------------------------------------------------------------------------------------------------


def test_a_service_whose_secret_was_made_anew_is_restarted(
    server: Server, monkeypatch: pytest.MonkeyPatch, noted: list[str]
) -> None:
    """Else it runs on with the old one: 503 to every request, after the doctor's own remedy."""
    install.configure(server)
    release.make_release(server)
    services.install_units(server)
    again = Server(server.source, under=server.units.parents[2])
    release.make_release(again)
    services.install_units(again)
    (again.credentials / "redis_url").unlink()
    (again.credentials / "api_keys").unlink()
    install.configure(again)
    monkeypatch.setattr(Server, "ask", lambda _, *command, **__: "1" if "--property=MainPID" in command else "")
    monkeypatch.setattr(os, "readlink", lambda _: str(again.release))
    units = (*services.WORKERS, services.API, services.DASHBOARD)
    assert [unit for unit in units if services.runs_something_else(again, unit)] == list(units)
    again.written = {again.credentials / "api_keys"}
    assert [unit for unit in units if services.runs_something_else(again, unit)] == [services.API]
    again.written = set()
    assert not any(services.runs_something_else(again, unit) for unit in units)


SOCKETS = "systemctl stop async-email-submission.service async-email-submission.socket"
ON = "systemctl enable --now async-email-submission.socket", "systemctl start async-email-submission.service"
OFF = "systemctl disable --now async-email-submission.socket async-email-submission.service"


def test_mail_by_smtp_is_turned_on_moved_and_turned_off_as_its_settings_say(
    server: Server, monkeypatch: pytest.MonkeyPatch, noted: list[str]
) -> None:
    def does(settings: str, is_on: bool) -> list[str]:
        server.write(server.env, settings, 0o600)
        monkeypatch.setattr(Server, "ask", lambda *_, **__: "enabled" if is_on else "disabled")
        noted.clear()
        smtp_in.set_up_submission(server)
        return noted

    socket = server.units / "async-email-submission.socket.d/listen.conf"
    certificate = server.units / "async-email-submission.service.d/tls.conf"
    assert does("#SUBMISSION_LISTEN=127.0.0.1:2525\nSUBMISSION_LISTEN=\nMAIL_FROM=x\n", False) == []
    assert does("", True) == []  # by somebody's own hand
    assert does("SUBMISSION_LISTEN='localhost:2525, [::]:465' # x\n", False) == ["systemctl daemon-reload", *ON]
    lines = ["[Socket]", "ListenStream=", "ListenStream=127.0.0.1:2525", "ListenStream=[::]:465"]
    assert socket.read_text().splitlines()[1:] == lines
    assert not certificate.exists()
    tls = "SUBMISSION_LISTEN=127.0.0.1:465\nSUBMISSION_TLS_CERT=/a b/c.pem\nSUBMISSION_TLS_KEY=/k\n"
    assert does(tls, True) == ["systemctl daemon-reload", SOCKETS, *ON]
    assert "LoadCredential=tls_cert:/a b/c.pem\nLoadCredential=tls_key:/k\n" in certificate.read_text()
    assert does(tls, True) == []
    assert does("SUBMISSION_LISTEN=127.0.0.1:465\n", True) == ["systemctl daemon-reload", SOCKETS, *ON]
    assert "tls_cert" not in certificate.read_text()
    assert does("", True) == [OFF]
    assert does("", False) == []


def test_webhooks_are_turned_on_and_off_as_their_settings_say(
    server: Server, monkeypatch: pytest.MonkeyPatch, noted: list[str]
) -> None:
    service, url = "async-email-webhooks.service", server.credentials / "webhook_url"

    def does(is_on: bool) -> list[str]:
        monkeypatch.setattr(Server, "ask", lambda *_, **__: "enabled" if is_on else "disabled")
        noted.clear()
        webhooks.set_up_webhooks(server)
        return noted

    files = {server.env: "WEBHOOK_URL=https://a.example\n", url: "https://a.example\n", server.webhooks: "[shop]\n"}
    for file in files:
        server.write(file, "\n" if file == url else "#WEBHOOK_URL=\n# [shop]\n", 0o600)
    assert does(False) == []
    assert does(True) == [f"systemctl disable --now {service}"]
    for file, text in files.items():
        before = file.read_text()
        server.write(file, text, 0o600)
        assert does(True) == []
        assert does(False) == [f"systemctl enable {service}", f"systemctl start {service}"]
        server.write(file, before, 0o600)


# --- the units --------------------------------------------------------------------------------------------------------


def test_units_are_copied_only_where_they_differ(server: Server, noted: list[str]) -> None:
    services.install_units(server)
    assert "async-email-api.service" in server.changed_units
    assert noted == ["systemctl daemon-reload"]
    again = Server(server.source, under=server.units.parents[2])
    noted.clear()
    services.install_units(again)
    assert (again.changed_units, noted) == (set(), [])
