"""docs/operations.md: what it names exists, its settings load, and its backup is whole whatever Redis does meanwhile.

Its commands for a server are run on one, in tests/deploy/test_operations.py.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import redis

import settings
from ops import breaker, restore
from ops.checks import configuration, replies
from ops.checks.configuration import credentials_directory
from ops.checks.target import Target
from ops.server import Server
from process.log import EVENTS
from process.relays import parse_relays
from settings import Settings
from smtp import pacing
from smtp.published import publish
from tests.checks.support import fake
from tests.http_api import MAIL
from tests.operations import BLOCKS, PAGE, block, line
from tests.servers import ROOT, House, RedisServer, eventually, project_files

GRANT = '{"provider": "microsoft", "client_id": "a", "refresh_token": "b"}'  # what bin/oauth writes
OTHERS = {  # variables of redis-cli, of RQ and of clients
    *("REDISCLI_AUTH", "RQ_REDIS_URL"),
    *("REQUESTS_CA_BUNDLE", "SSL_CERT_FILE", "NODE_EXTRA_CA_CERTS", "MAIL_URL", "MAIL_KEY"),
}
SAID_BY_OTHERS = {  # symptoms whose words are not ours
    "535 5.7.8 Username and Password not accepted": "Gmail",
    "Connection timed out": os.strerror(110),
    "454 4.7.1 Relay access denied": "Postfix",
    "Bad file format reading the append only file": "Redis, see tests/deploy/test_operations.py",
    "502 Bad Gateway": "nginx, see tests/test_nginx.py",
}


def section(heading: str) -> str:
    found = re.search(rf"^## {re.escape(heading)}\n(.*?)(?=^## |\Z)", PAGE, re.MULTILINE | re.DOTALL)
    assert found, heading
    return found[1]


def test_each_unit_is_one_that_is_installed() -> None:
    units = {file.name for file in (ROOT / "systemd").iterdir()}
    named = re.findall(r"(?<![\w/.-])async-email-(?:api|worker|dashboard)[\w@.*-]*|async-email\.target", PAGE)
    assert len(set(named)) > 5
    for name in named:
        template = re.sub(r"@(\w+|\*)", "@", name.rstrip("."))
        assert {template, f"{template}.service"} & units, name
    assert set(re.findall(r"redis-server@[\w*-]+", PAGE)) == {"redis-server@async-email", "redis-server@*"}


def test_each_path_is_one_of_the_installation() -> None:
    server = Server(ROOT)
    made = {value for value in vars(server).values() if isinstance(value, Path)}
    made |= {server.nginx / folder / "async-email" for folder in ("sites-available", "sites-enabled")}
    made |= {server.credentials / name for name in settings.SECRETS}
    of_others = ("/etc/redis/async-email.", "/etc/systemd/system/", "/etc/postfix/")
    for path in re.findall(r"(?<![\w$.])/(?:etc|opt|var/lib|usr/local)/[\w./@-]*async-email[\w./@-]*", PAGE):
        inside = Path(path).relative_to(server.current) if path.startswith(f"{server.current}/") else None
        if inside:
            assert (ROOT / inside).exists() or inside == Path(".venv/bin/rq"), path
        elif not path.startswith(of_others) and "appendonlydir" not in path and not path.startswith("/etc/ssl/"):
            assert Path(path.rstrip(".")) in made, path


def test_each_setting_is_one() -> None:
    known = {name.upper() for name in settings.Settings.model_fields} | OTHERS
    told = set(re.findall(r"(?<![\w*$])[A-Z]{2,}(?:_[A-Z]+)+(?!\w)", PAGE))
    assert len(told) > 10
    assert told - known == set()


@pytest.mark.parametrize("text", [text for language, text in BLOCKS if language == "ini"], ids=lambda text: text[:20])
def test_each_example_of_settings_is_right(text: str, tmp_path: Path) -> None:
    (tmp_path / "async-email.env").write_text(text)
    (tmp_path / "smtp_oauth").write_text(GRANT if "bin/oauth" in text else "")
    with credentials_directory(tmp_path):
        loaded = settings.load(*(["smtp_host", "mail_from"] if "SMTP_HOST" in text else []))
    assert loaded.smtp_security == "starttls"
    assert bool(loaded.smtp_rate) == ("SMTP_RATE" in text)


def test_the_example_of_several_relays_is_right() -> None:
    examples = [parse_relays(text) for language, text in BLOCKS if language == "toml"]
    assert [[one.name for one in relays] for relays in examples] == [["first", "second", "newsletters"], ["up"]]


def test_the_examples_are_for_the_relays_whose_refusals_the_doctor_explains() -> None:
    hosts = re.findall(r"^SMTP_HOST=(\S+)", PAGE, re.MULTILINE)
    for pattern in (replies.GMAIL, replies.MICROSOFT, replies.SES):
        assert any(re.search(pattern, host) for host in hosts), pattern


def test_a_task_of_an_operators_own_sends_a_mail(redis_server: RedisServer, tmp_path: Path) -> None:
    text = block("def remind(") + block("def remind_all(")
    shutil.copytree(ROOT / "templates" / "welcome", tmp_path / "templates" / "reminder")
    for part in (tmp_path / "templates" / "reminder").iterdir():
        part.write_text("Dear {{ customer }}")
    names = {"TASKS_FILE": str(tmp_path / "own.py"), "TEMPLATES_DIR": str(tmp_path / "templates")}
    with House(tmp_path, redis_server.url, **names) as house:
        (tmp_path / "key").write_text("full-key\n")
        (tmp_path / "unpaid.json").write_text('{"Ada": "ada@example.com"}')
        (tmp_path / "own.py").write_text(text)
        api = house.api()
        (tmp_path / "own.py").write_text(text.replace("127.0.0.1", f"127.0.0.1:{api.port}"))
        house.worker("jobs")
        jobs = [api.post("/jobs", {"task": "remind_all"}).body["job_id"] for _ in range(2)]
        eventually(lambda: all("result" in api.get(f"/jobs/{one}").body for one in jobs))
        (mail_id,) = {one_id for one in jobs for one_id in api.get(f"/jobs/{one}").body["result"]}
        assert api.get(f"/emails/{mail_id}").body["subject"] == "Dear Ada"


def test_a_password_with_odd_characters_goes_into_its_own_file(tmp_path: Path) -> None:
    odd = "a#b 'c\" ${d} $e"
    (tmp_path / "async-email.env").write_text("SMTP_HOST=smtp.example.com\nSMTP_USERNAME=ada\n")
    (tmp_path / "smtp_password").write_text(f"{odd}\n")
    with credentials_directory(tmp_path):
        password = settings.load("smtp_host").smtp_password
    assert password
    assert password.get_secret_value() == odd


def test_the_table_of_events_is_complete() -> None:
    rows = re.findall(r"^\| (`.+?) \|", section("Logs"), re.MULTILINE)
    assert {name for row in rows for name in re.findall(r"`(\w+)`", row)} == EVENTS


def test_each_symptom_and_each_503_is_titled_by_what_is_said_somewhere() -> None:
    files = [ROOT / file for file in project_files() if file.suffix == ".py" or file.parts[0] == "nginx"]
    said = "\n".join(file.read_text() for file in files)  # by the processes, the doctor and nginx
    titles = re.findall(r"^### .+$|^- `.+?`:", section("Symptoms"), re.MULTILINE)
    assert len(titles) > 20
    for words in re.findall("`(.+?)`", "\n".join(titles)):
        spelled = re.sub(r" at (connect|greeting|starttls|auth)$", " at {self.phase.value}", words)
        assert words in SAID_BY_OTHERS or spelled in said, words


def test_what_is_said_of_the_breaker_is_so() -> None:
    assert (pacing.TROUBLES, pacing.PAUSE, pacing.LONGEST) == (3, 30, 15 * 60)


def test_the_breaker_is_shown_and_closed_by_command(
    client: redis.Redis, redis_server: RedisServer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = Settings(redis_url=redis_server.url, smtp_host="smtp.example.com")
    monkeypatch.setattr(configuration, "load", lambda _: settings)
    paces = pacing.Pacing(client, ())
    assert breaker.main([]) == 0
    assert capsys.readouterr().out.startswith("The breaker is closed: ")
    assert paces.trouble(5 * 60)
    assert breaker.main([]) == 0
    assert "all mail waits" in (said := capsys.readouterr().out)
    assert "next try in 5 min" in said
    assert paces.admit() is not None
    assert breaker.main(["close"]) == 0
    assert "The breaker is closed. " in capsys.readouterr().out
    assert paces.admit() is None
    publish(client, parse_relays('[first]\nhost = "a.example"\n[second]\nhost = "b.example"'))
    pacing.Pacing(client, (), "first").trouble(5 * 60)
    assert breaker.main([]) == 0
    assert "relay first is in trouble, and mail goes by another (next try in 5 min)" in capsys.readouterr().out
    assert (breaker.main(["close", "third"]), breaker.main(["close", "second"])) == (2, 0)
    assert pacing.in_trouble(client, "first")
    assert breaker.main(["close", "first"]) == 0
    assert not pacing.in_trouble(client, "first")


def test_without_settings_or_redis_the_breaker_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for loaded in (None, Settings(redis_url="redis://127.0.0.1:1/0")):
        monkeypatch.setattr(configuration, "load", lambda _, loaded=loaded: loaded)
        assert breaker.main([]) == 1
        assert "bin/doctor" in capsys.readouterr().err


def test_the_site_has_the_name_that_is_to_be_replaced() -> None:
    site = (ROOT / "nginx/async-email.conf").read_text()
    found = re.search("'s/(.*?)/", line("sudo sed -i 's/server_name"))
    assert found
    assert site.count(found[1]) == 1
    assert "rate=100r/s" in site


def test_links_to_a_heading_lead_to_one() -> None:
    """Whether there is a file where a link leads, tests/test_readme.py knows."""
    for path, fragment in re.findall(r"\]\((?!http)([^)#]*)#([^)]+)\)", PAGE):
        page = (ROOT / "docs" / path).read_text() if path else PAGE
        headings = re.findall(r"^#+ (.+)$", page, re.MULTILINE)
        assert fragment in {re.sub(r"[^\w -]", "", one.lower()).replace(" ", "-") for one in headings}, fragment


def test_a_backup_is_whole_although_redis_writes_meanwhile(data: Path, tmp_path: Path) -> None:
    """A writer counts up, in a list and beside it, in one transaction each. Whatever number the copy has got to, all
    before it are there."""
    over = threading.Event()
    options = ("--auto-aof-rewrite-percentage", "1", "--auto-aof-rewrite-min-size", "1")
    with RedisServer(data, *options) as server, ThreadPoolExecutor() as pool:
        writer = pool.submit(count, server, over)
        try:
            copies = [backup(tmp_path, number) for number in range(5)]
        finally:
            over.set()
        writer.result()
    reached = [restored(tmp_path / f"restored-{number}", copy) for number, copy in enumerate(copies)]
    assert reached == sorted(reached)
    assert reached[-1] > reached[0] >= 0


def test_a_copy_into_which_a_rewrite_fell_is_made_again(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """cp comes to the manifest last, and before that, the first time, Redis replaces all that it has copied."""
    fake(tmp_path, "cp", SLOW_CP.replace("HERE", str(tmp_path)).replace("CP", str(shutil.which("cp"))), monkeypatch)
    with RedisServer(data) as server, server.client() as client:
        client.rpush("numbers", 0)
        client.set("last", 0)
        with ThreadPoolExecutor() as pool:
            rewriter = pool.submit(rewrite, client, tmp_path)
            copy = backup(tmp_path, 0)
            rewriter.result()
    assert restored(tmp_path / "restored", copy) == 0


SLOW_CP = """
to=$3/redis-async-email/appendonlydir
mkdir -p "$to"
CP -a "$2"/appendonlydir/*.rdb "$2"/appendonlydir/*.aof "$to"
touch HERE/copied
until [ -e HERE/rewritten ]; do sleep 0.05; done
CP -a "$2"/appendonlydir/*.manifest "$to"
"""


def rewrite(client: redis.Redis, folder: Path) -> None:
    manifest = folder / "redis-async-email/appendonlydir/appendonly.aof.manifest"
    before = manifest.read_text()
    eventually((folder / "copied").exists)
    client.bgrewriteaof()
    eventually(lambda: not client.info("persistence")["aof_rewrite_in_progress"] and manifest.read_text() != before)
    (folder / "rewritten").touch()


def test_a_restore_brings_back_the_queue_and_cancels_what_was_sent_since(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with RedisServer(data) as redis_server, House(tmp_path, redis_server.url) as house:
        api = house.api()
        sent, waits, in_hand = (api.submit(MAIL) for _ in range(3))
        with redis_server.client() as client:
            client.hset(f"rq:job:{in_hand}", "status", "started")
            client.lrem("rq:queue:email", 0, in_hand)
        file = backup(tmp_path, 0)
        later = api.submit(MAIL)
        log = tmp_path / "journal"
        lines = (f"INFO sent id={sent} relay=x", f"INFO failed id={waits}", f"INFO sent id={in_hand}")
        log.write_text("\n".join([*lines, json.dumps({"event": "sent", "id": later}), ""]))
        fake(tmp_path, "journalctl", f'case "$*" in *--since\\ @1[0-9]*) cat {log};; esac', monkeypatch)
        server = Server(ROOT, under=tmp_path / "machine")
        server.redis_data = data
        (tmp_path / "machine").mkdir()
        server.run = stand_in(redis_server, server.run)  # type: ignore[method-assign]
        loaded = Settings(redis_url=redis_server.url)
        monkeypatch.setattr(configuration, "load", lambda _: loaded)
        assert restore.restore(server, Target(ROOT), file, settings=True) == 0
        assert [api.get(f"/emails/{one}").status for one in (sent, waits, in_hand, later)] == [200, 200, 200, 404]
        assert [api.email(one)["status"] for one in (sent, waits)] == ["canceled", "queued"]
    said = capsys.readouterr().out
    assert "3 mails; 1 were in it, and are canceled" in said
    assert f"{in_hand} was in hand" in said
    assert (tmp_path / "machine/etc/async-email/async-email.env").read_text() == "A=B\n"
    assert len(list(tmp_path.glob("redis-async-email.2*"))) == 1
    assert not (tmp_path / "redis-async-email.new").exists()


def stand_in(redis_server: RedisServer, run: Callable[..., bool]) -> Callable[..., bool]:
    """What systemctl would do with Redis."""

    def instead(*command: str | Path, may_fail: bool = False) -> bool:
        if command[:2] == ("systemctl", "stop"):
            redis_server.kill(signal.SIGTERM)
        elif command[:2] == ("systemctl", "start"):
            redis_server.start()
        return command[0] == "systemctl" or run(*command)

    return instead


@pytest.mark.parametrize("content", [b"", b"nonsense", b"another archive", b"cut"])
def test_what_is_no_backup_stops_nothing(data: Path, tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "file.tar.gz"
    file.write_bytes(content)
    if content == b"another archive":
        subprocess.run(["tar", "-czf", file, "-C", tmp_path, "etc"], check=True)
    if content == b"cut":
        with RedisServer(data) as redis_server, redis_server.client() as client:
            client.set("ballast", os.urandom(100_000))
            whole = backup(tmp_path, 0).read_bytes()
        file.write_bytes(whole[: len(whole) // 2])
    before = sorted(path for path in data.rglob("*"))
    server = Server(ROOT, under=tmp_path / "machine")
    server.redis_data = data
    commands: list[str] = []
    run = server.run
    server.run = lambda *command, may_fail=False: commands.append(str(command[0])) or run(*command)  # type: ignore[method-assign, func-returns-value]
    assert restore.restore(server, Target(ROOT), file, settings=False) == 1
    assert "systemctl" not in commands
    assert not (tmp_path / "redis-async-email.new").exists()
    assert sorted(path for path in data.rglob("*")) == before


@pytest.fixture
def data(tmp_path: Path) -> Path:
    (tmp_path / "etc/async-email").mkdir(parents=True)
    (tmp_path / "etc/async-email/async-email.env").write_text("A=B\n")
    (tmp_path / "redis-async-email").mkdir()
    return tmp_path / "redis-async-email"


def count(server: RedisServer, over: threading.Event) -> None:
    number = 0
    with server.client() as client:
        while not over.is_set():
            with client.pipeline() as commands:
                for _ in range(20):
                    commands.rpush("numbers", number).set("last", number).set(f"ballast:{number % 500}", "x" * 2000)
                    number += 1
                commands.execute()


def backup(tmp_path: Path, number: int) -> Path:
    script = (ROOT / "bin" / "backup").read_text().replace("/var/lib", str(tmp_path)).replace("$(id -u)", "0")
    script = re.sub(r"-C / etc/async-email .*", f"-C {tmp_path} etc", script)
    file = tmp_path / f"backup-{number}.tar.gz"
    command = ["sh", "-c", script, "backup", str(file)]
    subprocess.run(command, check=True, capture_output=True)
    assert [path for path in tmp_path.iterdir() if path.name.startswith(f"{file.name}.")] == []
    return file


def restored(folder: Path, copy: Path) -> int:
    """The number that it has got to; -1: none yet."""
    folder.mkdir()
    subprocess.run(["tar", "-xzpf", copy, "-C", folder, "redis-async-email"], check=True)
    with RedisServer(folder / "redis-async-email") as server, server.client() as client:
        numbers = [int(number) for number in client.lrange("numbers", 0, -1)]
        last = int(client.get("last") or -1)
    assert numbers == list(range(last + 1))
    return last
