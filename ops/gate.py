"""Holds Redis back until the Sentinels have said what it is: `gate.py URL_FILE CA_FILE CONFIGURATION DIRECTORY`.

It runs before each start of a Redis that has replicas. A primary that crashed and comes back is a primary still, and
lacks what a replica took from it last, or has what nobody else has; it must not serve before another is promoted. So:

they name another       it starts as a replica of that one, once that one is up, or after a minute
they name this one      it waits until they name another; if no replica is up, or nobody has taken over within half a
                        minute, it starts as the primary: but never without data, or its replicas would be emptied
most do not answer      it waits: those who answer may be cut off together with it

The latest epoch decides. A line of the log says what it waits for. `first-start` in the directory, where bin/install
puts it for a moment, lets it start before there are Sentinels. bin/install copies this file out of the release, for the
system's Python: it may import nothing of ours.
https://redis.io/docs/latest/operate/oss_and_stack/management/sentinel/
"""

from __future__ import annotations

import os
import re
import shutil
import socket
import ssl
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple
from urllib.parse import parse_qs, unquote, urlsplit

PORT = 26379
PATIENCE = 1  # seconds for one Sentinel
PROMOTION = 30  # seconds until nobody takes over any more: a second attempt begins after twice failover-timeout
RETURN = 60  # seconds for the primary to come back; longer, so that after a power cut it starts before its replicas
DOWN = {"s_down", "o_down", "disconnected"}

Address = tuple[str, int]


class Sentinels(NamedTuple):
    """Where they are, and how to log in: what a redis+sentinel:// URL says."""

    addresses: tuple[Address, ...]
    name: str  # of the primary
    user: str
    password: str
    context: ssl.SSLContext | None


class View(NamedTuple):
    """What one Sentinel says."""

    epoch: int
    primary: Address
    is_up: bool
    replicas: dict[Address, bool]  # whether each is up


def parse_url(url: str, ca_file: str) -> Sentinels:
    parts = urlsplit(url)
    asked = {name: values[0] for name, values in parse_qs(parts.query).items()}
    hosts = [one.partition(":") for one in parts.netloc.rpartition("@")[2].split(",")]
    context = ssl.create_default_context(cafile=ca_file) if parts.scheme.startswith("rediss") else None
    login = (asked.get("sentinel_username", "default"), asked.get("sentinel_password", ""))
    name = unquote(parts.path.split("/")[1])
    return Sentinels(tuple((host, int(port or PORT)) for host, _, port in hosts), name, *login, context)


def read_reply(file: BinaryIO) -> Any:
    """Reads one reply (RESP 2). Raises OSError if it is an error, or if there is none."""
    line = file.readline()
    kind, rest = line[:1], line[1:].strip().decode()
    if kind == b"*":
        return [read_reply(file) for _ in range(int(rest))]
    if kind == b"$":
        return file.read(int(rest) + 2)[:-2].decode() if rest != "-1" else None
    if kind not in (b"+", b":"):
        raise OSError(rest or "it hung up")
    return rest


@contextmanager
def conversation(
    address: Address, login: tuple[str, str], context: ssl.SSLContext | None
) -> Iterator[Callable[..., Any]]:
    """Connects to a Sentinel or a Redis. Yields what sends it a command and returns its reply, or raises OSError."""
    with ExitStack() as opened:
        plain = opened.enter_context(socket.create_connection(address, PATIENCE))
        wrapped = opened.enter_context(context.wrap_socket(plain, server_hostname=address[0])) if context else plain
        file = opened.enter_context(wrapped.makefile("rb"))

        def ask(*words: str) -> Any:
            wrapped.sendall(f"*{len(words)}\r\n".encode() + b"".join(map(bulk, words)))
            return read_reply(file)

        if login[1]:
            ask("AUTH", *login)
        yield ask


def look(address: Address, sentinels: Sentinels) -> View:
    """Asks one Sentinel. Raises OSError."""
    with conversation(address, (sentinels.user, sentinels.password), sentinels.context) as ask:
        primary = pairs(ask("SENTINEL", "MASTER", sentinels.name))
        replicas = [pairs(one) for one in ask("SENTINEL", "REPLICAS", sentinels.name)]
    up = {address_of(one): not is_down(one) for one in replicas}
    return View(int(primary["config-epoch"]), address_of(primary), not is_down(primary), up)


def bulk(word: str) -> bytes:
    return f"${len(word.encode())}\r\n{word}\r\n".encode()


def pairs(words: list[str]) -> dict[str, str]:
    return dict(zip(words[::2], words[1::2], strict=True))


def address_of(instance: dict[str, str]) -> Address:
    return instance["ip"], int(instance["port"])


def is_down(instance: dict[str, str]) -> bool:
    return bool(DOWN & set(instance["flags"].split(",")))


def ask_all(sentinels: Sentinels) -> list[View]:
    views = []
    for address in sentinels.addresses:
        with suppress(OSError, ValueError, KeyError):  # the others: it is no Sentinel, or does not know this primary
            views.append(look(address, sentinels))
    return views


def primary_of(views: Sequence[View], sentinels: Sentinels) -> Address | None:
    """Returns the primary that most Sentinels stand behind; None where most do not answer."""
    return max(views, key=lambda view: view.epoch).primary if len(views) * 2 > len(sentinels.addresses) else None


class Wait(Exception):
    """Says what is waited for."""


def decide(primary: Address, views: Sequence[View], me: Address, has_data: bool, waited: float) -> Address | None:
    """Returns whose replica this one is, None if it is the primary. Raises `Wait`."""
    most = len(views) // 2 + 1
    if primary != me:
        if sum(view.is_up and view.primary == primary for view in views) < most and waited < RETURN:
            raise Wait(f"the primary, {primary[0]}, must be up before its replicas are")
        return primary
    others = [{one: up for one, up in view.replicas.items() if one != me} for view in views]
    if not has_data and any(others):
        raise Wait("this one, which the Sentinels call the primary, has no data: another must be promoted")
    if sum(any(known.values()) for known in others) and waited < PROMOTION:
        raise Wait("this one was the primary, and another must be promoted if any can")
    return None


def address_in(configuration: str) -> Address:
    """Returns where the Sentinels know this Redis."""
    told = dict(re.findall(r'^(replica-announce-ip|bind|tls-port|port) "?([^\s"]+)', configuration, re.MULTILINE))
    return told.get("replica-announce-ip") or told["bind"], int(told.get("tls-port") or told["port"])


def make_replica_of(primary: Address | None, path: Path) -> None:
    """Writes it into Redis' configuration, which keeps its owner and mode."""
    before = path.read_text()
    text = re.sub(r"^(replicaof|slaveof) .*\n", "", before, flags=re.MULTILINE)
    text += f"replicaof {primary[0]} {primary[1]}\n" if primary else ""
    if text == before:
        return
    new = path.with_name(f".{path.name}.new")
    new.unlink(missing_ok=True)
    with os.fdopen(os.open(new, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600), "w") as file:
        file.write(text)
        os.fsync(file.fileno())
    shutil.copymode(path, new)
    new.replace(path)


def main(url_file: str, ca_file: str, configuration: str, directory: str) -> None:
    path, data = Path(configuration), Path(directory)
    sentinels = parse_url(Path(url_file).read_text().strip(), ca_file)
    me, began, said = address_in(path.read_text()), time.monotonic(), ""
    while True:
        views = ask_all(sentinels)
        primary = primary_of(views, sentinels)
        try:
            if primary:
                has_data = any((data / name).exists() for name in ("appendonlydir", "appendonly.aof"))
                make_replica_of(decide(primary, views, me, has_data, time.monotonic() - began), path)
                return
            if (data / "first-start").exists():
                return
            raise Wait(f"most of the {len(sentinels.addresses)} Sentinels must answer, and {len(views)} did")
        except Wait as why:
            if str(why) != said:
                said = str(why)
                print(f"Redis is held back: {said}", flush=True)
        time.sleep(0.5)


if __name__ == "__main__":
    main(*sys.argv[1:])
