"""An append-only file whose end is missing, as a crash leaves it: on every Redis and Valkey that there is here."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import redis

from ops.aof import cut_unfinished
from tests.http_api import MAIL, keys, stored
from tests.servers import ROOT, House, RedisServer, redis_servers

SERVERS = redis_servers()
every_server = pytest.mark.parametrize("program", SERVERS, ids=lambda program: Path(program).name)
every_redis = pytest.mark.parametrize(
    "program", [one for one in SERVERS if "valkey" not in one], ids=lambda program: Path(program).name
)


def command(*words: str) -> bytes:
    return b"*%d\r\n" % len(words) + b"".join(b"$%d\r\n%s\r\n" % (len(word), word.encode()) for word in words)


def transaction(number: int) -> bytes:
    """Its first value looks like the end of a transaction, for those who search the file for one."""
    sets = (command("SET", f"{name}{number}", "*1\r\n$4\r\nEXEC") for name in ("a", "b"))
    return b"".join([command("MULTI"), *sets, command("EXEC")])


def test_what_a_killed_redis_left_half_written_is_removed_before_the_next_start(tmp_path: Path) -> None:
    """1.7 GB of them lay in the folder after 141 kills for want of memory."""
    left = ("temp-rewriteaof-812.aof", "temp-rewriteaof-bg-812.aof", "temp-812.rdb")
    kept = ("dump.rdb", "appendonly.aof", "temp-notes.txt", "a-temp-1.aof")
    for name in (*left, *kept):
        (tmp_path / name).touch()
    command: list[str | Path] = [sys.executable, "-I", ROOT / "ops" / "aof.py", "/nowhere/redis-server", tmp_path]
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    assert f"{tmp_path}: removed 3 unfinished files of an earlier run" in ran.stdout
    assert {path.name for path in tmp_path.iterdir()} == set(kept)


WHOLE = command("SELECT", "0") + command("SET", "c", "1") + transaction(1)
MULTI = len(command("MULTI"))


def files(directory: Path, appended: bytes) -> Path:
    """The files of Redis 7.0 and later. Returns the last of them."""
    place = directory / "appendonlydir"
    place.mkdir(parents=True)
    base, last = "file base.rdb seq 1 type b\n", "file log.incr.aof seq 1 type i\n"
    (place / "appendonly.aof.manifest").write_text(base + last)
    (place / "log.incr.aof").write_bytes(appended)
    return place / "log.incr.aof"


def mails(client: redis.Redis) -> int:
    """How many are stored whole, with their counters and, but for the first, their idempotency keys."""
    number = len(stored(client))
    assert client.hget("mail:totals", "accepted") == str(number).encode()
    assert len(keys(client, "idempotency:*")) == number - 1
    return number


@every_server
def test_a_power_cut_in_the_middle_of_an_accept_leaves_the_whole_mail_or_nothing(program: str, tmp_path: Path) -> None:
    """What a power cut takes is the end of the append-only file, at any byte. The second start counts, too: it reads
    what was written behind the cut."""
    whole = tmp_path / "whole"
    whole.mkdir()
    with RedisServer(whole, program=program) as server, House(tmp_path, server.url) as house:
        api = house.api()
        api.submit(MAIL)
        # One of several, or before Redis 7.0 the only one.
        [log] = [*whole.glob("appendonlydir/*.incr.aof"), *whole.glob("appendonly.aof")]
        before = log.stat().st_size
        api.submit(MAIL, Idempotency_Key="a key")
        after = log.stat().st_size
    found = []
    for cut in (before + (after - before) * twelfth // 12 for twelfth in range(13)):
        place = tmp_path / f"cut at {cut}"
        shutil.copytree(whole, place)
        os.truncate(place / log.relative_to(whole), cut)
        with RedisServer(place, program=program) as server, server.client() as client:
            first = mails(client)
            client.pipeline().set("later", 1).set("later still", 1).execute()
            server.kill()
            server.start()
            found.append((first, mails(client), client.exists("later", "later still")))
    assert found == [(1, 1, 2)] * 12 + [(2, 2, 2)]


@every_server
def test_at_whatever_byte_a_transaction_is_cut_it_is_removed_whole(program: str, tmp_path: Path) -> None:
    """But within the word MULTI, which is a command like any other as long as it is not whole."""
    last = transaction(2)
    log = files(tmp_path, b"")
    for kept in range(len(last) + 1):
        log.write_bytes(WHOLE + last[:kept])
        said = cut_unfinished(program, tmp_path)
        cut = MULTI <= kept < len(last)
        assert log.read_bytes() == (WHOLE if cut else WHOLE + last[:kept]), kept
        assert said == (
            f"{log}: cut off the last transaction, which is not finished: {kept} bytes, from byte {len(WHOLE)} on"
            if cut
            else ""
        )


@every_server
def test_what_is_wrong_elsewhere_than_at_the_end_is_not_mended(program: str, tmp_path: Path) -> None:
    log = files(tmp_path, b"")
    for wrong in (
        WHOLE.replace(b"$2\r\nb1", b"$2\r\nb1\0"),
        WHOLE.replace(b"$2\r\nb1", b"\0\0\0\0b1"),
        WHOLE.replace(command("EXEC"), b""),  # what Redis made of a cut before it was cut off here
    ):
        log.write_bytes(wrong + transaction(2))
        assert f"{log} is damaged and stays as it is" in cut_unfinished(program, tmp_path)
        assert log.read_bytes() == wrong + transaction(2)


@every_server
def test_what_is_in_no_transaction_is_left_to_redis(program: str, tmp_path: Path) -> None:
    log = files(tmp_path, b"")
    for end in (b"", b"*2\r\n$3\r\nGE", b"\0\0\0\0", command("SET", "d", "1")):
        log.write_bytes(WHOLE + end)
        assert cut_unfinished(program, tmp_path) == ""
        assert log.read_bytes() == WHOLE + end


@every_redis
def test_one_file_that_begins_with_a_snapshot_is_cut_too(program: str, tmp_path: Path) -> None:
    """As Redis 6.2 writes it, and as Redis 7.0 takes it over."""
    with RedisServer(tmp_path, program=program) as server, server.client() as client:
        client.set("a", 1)
        client.save()
    snapshot = (tmp_path / "dump.rdb").read_bytes()
    one = tmp_path / "alone" / "appendonly.aof"
    one.parent.mkdir()
    one.write_bytes(snapshot + WHOLE + transaction(2)[:-1])
    assert "cut off the last transaction" in cut_unfinished(program, one.parent)
    assert one.read_bytes() == snapshot + WHOLE
    one.write_bytes(snapshot)
    assert cut_unfinished(program, one.parent) == ""


@every_server
def test_where_there_is_no_file_yet_there_is_nothing_to_do(program: str, tmp_path: Path) -> None:
    assert cut_unfinished(program, tmp_path / "none") == ""
    assert cut_unfinished(program, tmp_path) == ""
    files(tmp_path, b"")
    assert cut_unfinished(program, tmp_path) == ""


def test_alone_and_with_no_package_it_runs_as_systemd_runs_it(tmp_path: Path) -> None:
    log = files(tmp_path / "data", WHOLE + transaction(2)[:-1])
    copy = shutil.copy(ROOT / "ops" / "aof.py", tmp_path)
    command = [sys.executable, "-I", "-S", copy, SERVERS[0], tmp_path / "data"]
    ran = subprocess.run(command, capture_output=True, text=True, check=True, cwd="/")
    assert ran.stdout.startswith(f"{log}: cut off the last transaction")
