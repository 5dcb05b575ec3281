"""Brings back what bin/backup has saved: `sudo bin/restore [--settings] FILE`.

Restoring means going back in time: what was accepted since is gone, and what was sent since is queued again. This
machine's journal knows what it has sent; those mails are canceled. The workers stay stopped, so that a person looks.
What was there is moved aside, never deleted; until the backup is unpacked whole, nothing is stopped.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import socket
import sys
import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path

from mail.outbox import Outbox
from mail.states import RETURNED
from ops.checks import configuration, replication
from ops.checks.store import OUR_UNIT, client
from ops.checks.target import Target
from ops.server import Fault, Server, text_of
from queues.connection import RedisError, Unavailable
from queues.jobs import Jobs, NotFound, NotPossible

ID = re.compile(r"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}")
PATIENCE = 120  # seconds for Redis to read its file


def unpack(server: Server, file: Path) -> Path:
    """Unpacks beside the queue, on the same disk. Returns the folder."""
    folder = server.redis_data.with_name(f"{server.redis_data.name}.new")
    shutil.rmtree(folder, ignore_errors=True)
    server.folder(folder, 0o700)
    try:
        server.run("tar", "-xzpf", file.resolve(), "-C", folder)
        if not list(folder.glob("redis-async-email/appendonlydir/*.manifest")):
            raise Fault(f"{file} is no backup of bin/backup: it has no append-only file of Redis")
    except BaseException:
        shutil.rmtree(folder)
        raise
    return folder


def bring_back(server: Server, folder: Path, settings: Path | None) -> None:
    """Brings the archive back; with `settings`, the file that has them, those too."""
    server.run("systemctl", "stop", "async-email.target", OUR_UNIT)
    aside = server.redis_data.with_name(f"{server.redis_data.name}.{time.strftime('%Y%m%d-%H%M%S')}")
    if server.redis_data.exists():
        server.say(f"move {server.redis_data} to {aside}")
        server.redis_data.rename(aside)
    (folder / "redis-async-email").rename(server.redis_data)
    if settings:
        server.run("tar", "-xzpf", settings.resolve(), "-C", server.etc.parents[1], "etc")
    server.run("systemctl", "start", OUR_UNIT, "async-email-api.service")
    if settings:
        server.run("systemctl", "reload-or-restart", "nginx.service")


def must_be_alone(target: Target) -> None:
    """Raises `Fault` where another Redis would overwrite what is brought back: of several, only the one that the
    Sentinels name may get it, and while the others are stopped."""
    settings = configuration.load(target)
    redis = client(settings) if settings else None
    primary = redis.connection_pool.connection_kwargs.get("primary") if redis else None
    if not (redis and primary):
        return
    try:
        named, known = primary.look().at, replication.known_to(primary)
    except RedisError as error:
        raise Fault(f"{error}: they must answer, to say which Redis may get it") from None
    if not is_of_this_machine(named.host):
        raise Fault(f"the Sentinels name {named}, which is not on this machine: bring it back there")
    if up := [str(one) for one in known if one != named and replication.ask(redis, one).why != replication.SILENT]:
        stop = f"sudo systemctl stop async-email.target {OUR_UNIT}"
        raise Fault(f"the Redis at {', '.join(up)} would overwrite it: on each machine but this, first {stop}")


def is_of_this_machine(host: str) -> bool:
    for family, *_, at in socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM):
        with suppress(OSError), socket.socket(family) as own:
            own.bind(at)
            return True
    return False


def sent_since(server: Server, moment: str) -> set[str]:
    """Returns the ids of the mails that the journal of this machine names as sent since then."""
    log = server.ask("journalctl", "-u", "async-email-worker@email", "--since", f"@{moment}", "-o", "cat")
    return {found[0] for line in log.splitlines() if re.search(r"\bsent\b", line) and (found := ID.search(line))}


def cancel(outbox: Outbox, ids: Iterable[str]) -> tuple[int, list[str]]:
    """Cancels what is queued again. Returns how many, and the ids of those that cannot be canceled now."""
    canceled, left = 0, []
    for mail_id in ids:
        try:
            outbox.cancel(mail_id)
            canceled += 1
        except NotFound:  # accepted after the backup
            pass
        except NotPossible:  # it was in hand at the moment of the backup
            if outbox.read(mail_id)["status"] not in ("sent", "canceled", *RETURNED):
                left.append(mail_id)
    return canceled, left


def cancel_what_was_sent(server: Server, target: Target, moment: str) -> None:
    settings = configuration.load(target)
    if not settings:
        raise Fault(f"{target.file} cannot be read; bin/doctor says why. The queue is back, the workers are stopped")
    ids = sent_since(server, moment)
    with client(settings) as redis:
        deadline = time.monotonic() + PATIENCE
        while True:
            try:
                canceled, left = cancel(Outbox(Jobs(redis), settings), sorted(ids))
                break
            except Unavailable as error:
                if time.monotonic() > deadline:
                    raise Fault(f"{error}; see journalctl -u {OUR_UNIT}") from None
                time.sleep(1)
    server.say(f"sent since the backup, by the journal: {len(ids)} mails; {canceled} were in it, and are canceled")
    for mail_id in left:
        server.say(f"{mail_id} was in hand at the moment of the backup, and goes out again")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="bin/restore", description="Brings a backup of bin/backup back.")
    parser.add_argument("file", type=Path, metavar="FILE")
    parser.add_argument("--settings", action="store_true", help="also settings, secrets, nginx site: on a new machine")
    asked = parser.parse_args(arguments)
    if os.geteuid() != 0:
        print("it needs root: sudo bin/restore", file=sys.stderr)
        return 1
    root = Path(__file__).resolve().parent.parent
    return restore(Server(root), Target(root), asked.file, settings=asked.settings)


def restore(server: Server, target: Target, file: Path, *, settings: bool) -> int:
    try:
        must_be_alone(target)
        folder = unpack(server, file)
        bring_back(server, folder, file if settings else None)
        moment = (text_of(folder / "made-at") or "").strip() or str(int(file.stat().st_mtime))
        shutil.rmtree(folder)
        cancel_what_was_sent(server, target, moment)
    except (Fault, OSError) as fault:
        print(f"\nStopped: {fault}", file=sys.stderr)
        return 1
    then = time.strftime("%F %T", time.localtime(int(moment)))
    print(
        f"\nThe queue is as it was at {then}; the workers are stopped. Look at it on the dashboard\n"
        "or with bin/doctor, then let it go: sudo systemctl start async-email.target\n"
        "Mail that another machine has sent since is not known here: cancel it first (DELETE /jobs/ID)."
    )
    return 0
