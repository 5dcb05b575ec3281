"""bin/key, run as an operator runs it: what it prints, what it writes, what it refuses, and that the service obeys."""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from ops import key as keys
from ops.key import KeyFile
from process.api_keys import ApiKey
from tests.servers import ROOT, Api, House, RedisServer, mode

DIGEST = hashlib.sha256(b"a key").hexdigest()
SHOP = f"shop:{DIGEST}:send\n"


def run(file: Path, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([ROOT / "bin" / "key", "--file", file, *words], capture_output=True, text=True)


@pytest.fixture
def credential(tmp_path: Path) -> Path:
    return tmp_path / "api_keys"


def test_a_new_key_is_printed_once_and_only_its_digest_is_written(credential: Path) -> None:
    ran = run(credential, "new", "shop")
    assert ran.returncode == 0
    assert re.fullmatch(r"ae_[A-Za-z0-9_-]{32}\n", ran.stdout)
    key = ran.stdout.strip()
    assert credential.read_text() == f"shop:{hashlib.sha256(key.encode()).hexdigest()}:send\n"
    assert mode(credential) == 0o600
    assert key not in ran.stderr
    assert "restart the API" in ran.stderr


@pytest.mark.parametrize(
    ("name", "content", "words", "text"),
    [
        ("api_keys", SHOP, ("new", "shop"), "there is a key shop already"),
        ("api_keys", SHOP, ("new", "a:b"), "a name must be 1 to 64 letters"),
        ("api_keys", SHOP, ("new", ""), "a name must be 1 to 64 letters"),
        ("api_keys", f"shop:{DIGEST}:send:9/x", ("new", "other"), "a rate such as 50/s"),
        ("api_keys", f"shop:{DIGEST}:send:0/s", ("new", "other"), "must be a rate per second"),
        ("api_keys", SHOP, ("revoke", "other"), "there is no key other; there are: shop"),
        ("api_keys", "shop:a-key-in-clear", ("new", "other"), "entry 1 must be name:sha256hex"),
        (".env", "API_KEYS_FILE=/elsewhere\n", ("new", "shop"), "name that file with --file"),
    ],
)
def test_what_is_refused_changes_nothing_and_quotes_no_key(
    tmp_path: Path, name: str, content: str, words: tuple[str, ...], text: str
) -> None:
    (tmp_path / name).write_text(content)
    ran = run(tmp_path / name, *words)
    assert (ran.returncode, ran.stdout) == (1, "")
    assert text in ran.stderr
    assert "a-key-in-clear" not in ran.stderr
    assert (tmp_path / name).read_text() == content


def test_names_and_scopes_are_listed_and_the_last_key_is_revoked_with_a_warning(credential: Path) -> None:
    run(credential, "new", "shop")
    run(credential, "new", "admin", "--scope", "full")
    run(credential, "new", "reports", "--rate", "600/m")
    assert run(credential, "new", "blog", "--from", "a@acme.example").returncode == 2
    run(credential, "new", "blog", "--from", "Acme.example", "--from", "müller.example")
    listed = [line.split() for line in run(credential, "list").stdout.splitlines()]
    mine = ["blog", "send", "from", "acme.example", "xn--mller-kva.example"]
    assert listed == [["shop", "send"], ["admin", "full"], ["reports", "send", "600/m"], mine]
    for name in ("reports", "blog"):
        run(credential, "revoke", name)
    assert "WARNING" not in run(credential, "revoke", "shop").stderr
    ran = run(credential, "revoke", "admin")
    assert ran.returncode == 0
    assert "WARNING: it was the last one" in ran.stderr
    assert credential.read_text() == ""


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("", "API_KEYS={}\n"),
        ("# mine\nLISTEN=127.0.0.1:1", "# mine\nLISTEN=127.0.0.1:1\nAPI_KEYS={}\n"),
        ("A=1\n#API_KEYS=\n# A file.\n#API_KEYS_FILE=\n", "A=1\nAPI_KEYS={}\n# A file.\n#API_KEYS_FILE=\n"),
        (f"#API_KEYS=\nAPI_KEYS='old:{DIGEST}'\nB=2\n", f"#API_KEYS=\nAPI_KEYS=old:{DIGEST}:full,{{}}\nB=2\n"),
    ],
)
def test_in_an_env_file_only_the_line_of_the_keys_changes(tmp_path: Path, before: str, after: str) -> None:
    file = tmp_path / "async-email.env"
    file.write_text(before)
    file.chmod(0o640)
    key = run(file, "new", "shop").stdout.strip()
    assert file.read_text() == after.format(f"shop:{hashlib.sha256(key.encode()).hexdigest()}:send")
    assert mode(file) == 0o640


def test_a_rotated_key_is_two_of_a_name_until_the_old_one_is_revoked(credential: Path) -> None:
    old = run(credential, "new", "shop", "--rate", "9/s", "--from", "acme.example").stdout.strip()
    run(credential, "new", "blog")
    assert "no older one" in run(credential, "revoke", "shop", "--old").stderr
    new = run(credential, "rotate", "shop").stdout.strip()
    assert "revoke shop --old when nobody uses" in run(credential, "rotate", "shop").stderr
    assert "there is no key other; there are: shop, blog" in run(credential, "rotate", "other").stderr
    may = ["send", "9/s", "from", "acme.example"]
    listed = [line.split() for line in run(credential, "list").stdout.splitlines()]
    assert listed == [["shop", *may, "old"], ["blog", "send"], ["shop", *may]]
    known = [(one.name, one.sha256) for one in KeyFile(credential).read()]
    run(credential, "revoke", "shop", "--old")
    assert [(one.name, one.sha256) for one in KeyFile(credential).read()] == known[1:]
    assert [known[0], known[2]] == [("shop", hashlib.sha256(key.encode()).hexdigest()) for key in (old, new)]


def test_a_link_stays_one_and_what_it_leads_to_is_written(tmp_path: Path, credential: Path) -> None:
    credential.touch(0o600)
    link = tmp_path / "link"
    link.symlink_to(credential)
    run(link, "new", "shop")
    assert link.is_symlink()
    assert credential.read_text().startswith("shop:")


def test_nobody_sees_half_a_file_and_a_failure_leaves_the_old_one(
    credential: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = ApiKey("shop", DIGEST, "send")
    KeyFile(credential).write([one])
    inode = credential.stat().st_ino
    KeyFile(credential).write([one])
    assert credential.stat().st_ino != inode  # another file took its place

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        KeyFile(credential).write([])
    assert KeyFile(credential).read() == (one,)
    assert os.listdir(credential.parent) == ["api_keys"]


def test_two_at_once_lose_no_key(credential: Path) -> None:
    with ThreadPoolExecutor(6) as pool:
        list(pool.map(lambda number: run(credential, "new", f"key-{number}"), range(6)))
    assert len(run(credential, "list").stdout.splitlines()) == 6


def test_who_may_not_read_it_is_told_to_use_sudo(
    credential: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "open", refuse)
    assert keys.main(["--file", str(credential), "list"]) == 1
    assert capsys.readouterr().err == f"{credential} is not yours to read or write; run this with sudo.\n"


def test_what_lies_in_the_working_directory_is_not_imported(tmp_path: Path, credential: Path) -> None:
    (tmp_path / "settings.py").write_text("raise SystemExit('imported')")
    (tmp_path / "argparse.py").write_text("raise SystemExit('imported')")
    command = [str(ROOT / "bin" / "key"), "new", "shop", "--file", "api_keys"]
    ran = subprocess.run(command, cwd=tmp_path, env=os.environ | {"PYTHONPATH": "."}, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert credential.exists()  # a relative name is the caller's


def test_on_a_server_it_is_the_services_file(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert keys.default_file() == ROOT / ".env"
    monkeypatch.setattr(keys, "SERVER", tmp_path)
    assert keys.default_file() == tmp_path / "credentials" / "api_keys"
    keys.changed(KeyFile(keys.default_file()))
    assert "systemctl try-restart async-email-api async-email-submission" in capsys.readouterr().err


def test_the_service_goes_by_the_keys_of_its_last_start(
    redis_server: RedisServer, tmp_path: Path, credential: Path
) -> None:
    first, second = (run(credential, "new", name).stdout.strip() for name in ("first", "second"))
    body = {"name": "Ada", "email": "ada@example.com"}

    def answers() -> list[int]:
        with House(tmp_path, redis_server.url, API_KEYS="", API_KEYS_FILE=str(credential)) as house:
            port = house.api().port
            return [Api(port, key).post("/start-job", body).status for key in (first, second)]

    assert answers() == [202, 202]
    run(credential, "revoke", "first")
    assert answers() == [403, 202]
