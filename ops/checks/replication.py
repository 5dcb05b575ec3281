"""Checks a Redis with replicas: whether its Sentinels could replace the primary, and what is lost if they do.

Asks the Sentinels of REDIS_URL, and each Redis that they name at that address, with the login of REDIS_URL: any of them
may be the primary next. Sends what reads, and one message to a channel that nobody hears. What an ACL forbids is told
as not seen.
https://redis.io/docs/latest/operate/oss_and_stack/management/sentinel/
"""

from __future__ import annotations

import re
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any, NamedTuple

from redis import Redis
from redis.connection import Connection, ConnectionPool, SSLConnection
from redis.exceptions import AuthenticationError, NoPermissionError, RedisError, ResponseError

from ops.checks import store
from ops.checks.findings import Findings, counted, fault, lasting, note, ok, sized, warn
from ops.checks.target import Target
from process.redis_url import Place
from queues.connection import weaknesses
from queues.health import IN_STEP, why_unconfirmed
from queues.primary import Primary
from queues.replication import Replication
from settings import Settings

DOWN_AFTER = (3000, 30_000)  # milliseconds
MAX_LAG = 10  # seconds that min-replicas-max-lag may be
MAX_SKEW = 1  # second between two clocks
BEHIND = 2**20  # bytes
SLAVE = re.compile(r"slave\d+")
SILENT = "does not answer"
SET = "redis-cli -p 26379 SENTINEL"
ANSWERS = "systemctl status 'redis-sentinel*' there; let this machine through its firewall"


class Node(NamedTuple):
    """A Redis that the Sentinels, or the primary, know: its INFO, what CONFIG says of replication (None: it may not be
    asked), and by how many seconds its clock is ahead of ours; or `why` it cannot be asked. One of priority 0 never
    becomes the primary."""

    at: Place
    priority: int = 100
    info: Mapping[str, Any] = {}
    config: Mapping[str, str] | None = None
    skew: float = 0
    why: str = ""

    @property
    def is_primary(self) -> bool:
        return bool(self.info.get("role") == "master")


def sentinels(target: Target, settings: Settings) -> Findings:
    """Checks that most Sentinels answer, agree, and replace a primary soon, but not at once."""
    primary: Primary | None = store.client(settings).connection_pool.connection_kwargs.get("primary")
    if not primary:
        return
    answers, number = dict[Place, Mapping[str, Any]](), len(primary.clients)
    for place, one in zip(primary.sentinels.places, primary.clients, strict=True):
        try:
            answers[place] = one.sentinel_master(primary.sentinels.name)  # type: ignore[assignment]
        except (AuthenticationError, NoPermissionError):
            yield warn(f"the Sentinel at {place} refuses our login", f"sentinel_password in REDIS_URL: {target.file}")
        except ResponseError:
            found = f"the Sentinel at {place} knows no primary called {primary.sentinels.name}"
            yield warn(found, f"correct the name in REDIS_URL: {target.file}; or SENTINEL MONITOR there")
        except (RedisError, OSError):
            yield warn(f"the Sentinel at {place} does not answer", ANSWERS)
    if len(answers) <= number // 2:
        found = f"only {len(answers)} of {number} Sentinels can be asked: no new connection is made, nothing confirmed"
        yield fault(found, ANSWERS)
        return
    wrong = [*together(answers, number), *(one for place, seen in answers.items() for one in alone(place, seen))]
    yield from wrong or [ok(f"{len(answers)} of {counted(number, 'Sentinel')} answer, and agree")]


def together(answers: Mapping[Place, Mapping[str, Any]], number: int) -> Findings:
    """Yields what is wrong with the answers beside each other."""
    places = sorted({f"{seen['ip']}:{seen['port']}" for seen in answers.values()})
    if len(places) > 1:
        yield warn(f"the Sentinels do not agree where the primary is: {', '.join(places)}", f"look again; {ANSWERS}")
    if number < 3:
        found = f"REDIS_URL names {counted(number, 'Sentinel')}: with one away, most must still answer"
        yield warn(found, "run three, on three machines, and name all of them")
    others = {seen["num-other-sentinels"] + 1 for seen in answers.values()}
    if others != {number}:
        found = f"REDIS_URL names {counted(number, 'Sentinel')}, and they know of {', '.join(map(str, sorted(others)))}"
        yield warn(found, f"name all of them; of one that is gone for good: {SET} RESET NAME, on one after the other")
    quorum = {seen["quorum"] for seen in answers.values()}
    if len(quorum) > 1 or not number // 2 < max(quorum) <= number:
        found = f"the quorum is {' and '.join(map(str, sorted(quorum)))}: it must be most of the {number} Sentinels"
        yield warn(f"{found}, the same at each", f"{SET} SET NAME quorum {number // 2 + 1}, at each")


def alone(place: Place, seen: Mapping[str, Any]) -> Findings:
    """Yields what is wrong with one Sentinel."""
    flags, after, (least, most) = set(seen["flags"].split(",")), seen["down-after-milliseconds"], DOWN_AFTER
    if flags & {"s_down", "o_down", "disconnected"}:
        yield warn(f"the Sentinel at {place} does not reach the primary", f"see the network from {place.host} to it")
    if "failover_in_progress" in flags:
        yield note(f"the Sentinel at {place} is replacing the primary", "look again in half a minute")
    if not least <= after <= most:
        why = "what it knows of the replicas may be too old" if after < least else "nothing is accepted for so long"
        found = f"the Sentinel at {place} has down-after-milliseconds {after}, and must have {least} to {most}: {why}"
        yield warn(found, f"{SET} SET NAME down-after-milliseconds 3000, there")


def replicas(target: Target, settings: Settings) -> Findings:
    """Checks each Redis, and what REDIS_REPLICAS promises with so many."""
    client, needed = store.client(settings), settings.redis_replicas
    primary: Primary | None = client.connection_pool.connection_kwargs.get("primary")
    if not (primary or needed):
        return
    with client:
        info: Mapping[str, Any] = client.info()
        why = why_unconfirmed(Replication(client, needed))
    listed = {Place(one["ip"], one["port"]): one for name, one in info.items() if SLAVE.fullmatch(name)}
    nodes = [ask(client, *one) for one in (known_to(primary) if primary else dict.fromkeys(listed, 100)).items()]
    others = [one for one in nodes if not one.is_primary]
    yield from enough(target, needed, others, is_followed=bool(primary))
    if why and needed <= len(others):
        fix = "see the other lines here; the user in REDIS_URL must be allowed PUBLISH, WAIT and all channels (&*)"
        yield fault(f"nothing is confirmed, so nothing is accepted: {why}", fix)
    for one in nodes:
        yield from keeps(one, is_followed=bool(primary))
    yield from in_step(others, listed, info)
    yield from alike([one for one in nodes if not one.why])
    if primary and others:
        yield note(f"the primary to another host, planned: {target.command('failover')}; docs/scale.md")


def known_to(primary: Primary) -> dict[Place, int]:
    """Returns each Redis that the Sentinels know, with its priority. Raises redis-py's `ConnectionError`."""
    found = {primary.look().at: 100}
    for one in primary.clients:
        with suppress(RedisError, OSError):
            for seen in one.sentinel_slaves(primary.sentinels.name):
                found.setdefault(Place(seen["ip"], int(seen["port"])), int(seen["slave-priority"]))
    return found


def ask(client: Redis, at: Place, priority: int = 100) -> Node:
    """Asks one Redis, with the login of `client`."""
    pool = client.connection_pool
    given = {name: one for name, one in pool.connection_kwargs.items() if name not in ("primary", "path")}
    # Not the client's own kind, which goes on to the primary in a cluster.
    kind = SSLConnection if issubclass(pool.connection_class, SSLConnection) else Connection
    with Redis(connection_pool=ConnectionPool(kind, **(given | {"host": at.host, "port": at.port}))) as one:
        try:
            before = time.time()
            seconds, micros = one.time()
            skew = seconds + micros / 1e6 - (before + time.time()) / 2
            info: Any = one.info()
        except AuthenticationError:
            return Node(at, priority, why="refuses the login of REDIS_URL")
        except NoPermissionError:
            return Node(at, priority, why="cannot be seen: its ACL refuses us INFO or TIME")
        except (RedisError, OSError):
            return Node(at, priority, why=SILENT)
        config: Any = None
        with suppress(RedisError):
            config = one.config_get("min-replicas-*")
        return Node(at, priority, info, config, skew)


def enough(target: Target, needed: int, others: Sequence[Node], is_followed: bool) -> Findings:
    """Says what REDIS_REPLICAS is worth with these replicas."""
    have, ranks = counted(len(others), "replica"), {one.priority for one in others if one.priority}
    never = [one for one in others if not one.priority]
    if needed > len(others):
        found = f"REDIS_REPLICAS is {needed}, and Redis has {have}: nothing is confirmed, so nothing is accepted"
        yield fault(found, f"start more, or {target.edit}")
    elif needed == 0:
        found = f"REDIS_REPLICAS is 0, and Redis has {have}: a failover loses mail that was acknowledged"
        yield warn(found, f"REDIS_REPLICAS=1, with two replicas: {target.edit}")
    elif needed == len(others):
        found = (
            f"REDIS_REPLICAS is {needed}, and Redis has {have}: while one is away nothing is accepted, and none sent"
        )
        yield warn(found, "start one more, on another machine" if needed == 1 else "start one more, or set one fewer")
    elif needed <= len(never):
        places = ", ".join(str(one.at) for one in never)
        found = f"{places} has replica-priority 0: it confirms what is written, and never becomes the primary"
        yield warn(found, f"REDIS_REPLICAS={len(never) + 1}, or a priority of 100 there")
    elif len(ranks) > 1 and needed < len(others) - len(never):
        found = "the replicas differ in replica-priority: the first is promoted, also if it lacks what others confirmed"
        yield warn(found, "give each replica-priority 100")
    elif is_followed:
        yield ok(f"REDIS_REPLICAS is {needed}, and Redis has {have}: {len(others) - needed} may be away")
    else:
        yield ok(
            f"REDIS_REPLICAS is {needed}, and Redis has {have}; what fails over to one of them is not seen from here"
        )


def keeps(one: Node, is_followed: bool) -> Findings:
    """Says where a Redis would lose mail, now or as the next primary."""
    cli = f"redis-cli -h {one.at.host} -p {one.at.port}"
    if one.why:
        yield warn(f"the Redis at {one.at} {one.why}", "systemctl status 'redis*' 'valkey*' there; its log says more")
        return
    fixes = {"no_aof": "appendonly yes", "evicting": "maxmemory-policy noeviction"}
    for name, sentence in weaknesses(one.info):
        if not one.is_primary and name in (*fixes, "aof_failing", "snapshot_failing"):
            fix = f"{cli} CONFIG SET {fixes[name]}, and the same in its file" if name in fixes else store.LOOK
            yield fault(f"the replica at {one.at}: {re.split('[:;] ', sentence)[0]}", fix)
    if not is_followed:
        return
    lag = int(one.config["min-replicas-max-lag"]) if one.config else 0
    if "min_slaves_good_slaves" not in one.info:  # it is there where both are set
        found = f"the Redis at {one.at} goes on taking writes when its replicas are gone, as a primary that is cut off"
        yield warn(found, f"min-replicas-to-write 1 and min-replicas-max-lag 3: {cli} CONFIG SET, and in its file")
    elif lag > MAX_LAG:
        found = f"the Redis at {one.at} takes writes for {lag} s after its replicas are gone (min-replicas-max-lag)"
        yield warn(found, f"{cli} CONFIG SET min-replicas-max-lag 3, and the same in its file")
    elif one.is_primary and not one.config:
        yield note("min-replicas-max-lag cannot be seen: Redis' ACL forbids CONFIG. It should be 2 or 3")


def in_step(others: Sequence[Node], listed: Mapping[Place, Mapping[str, Any]], info: Mapping[str, Any]) -> Findings:
    """Says which replicas lack what the primary has. `listed`: what the primary, whose INFO it is, says of each."""
    late = 0
    for one in [one for one in others if not one.why]:
        seen = listed.get(one.at)
        behind = int(info.get("master_repl_offset", 0)) - int(seen["offset"]) if seen else 0
        if not seen or seen["state"] != "online" or one.info.get("master_link_status", "up") != "up":
            why = "is not connected to the primary" if not seen else "is still reading what the primary has"
        elif int(seen["lag"]) > IN_STEP or behind > BEHIND:
            why = f"lags behind: {lasting(int(seen['lag']))}, {sized(behind)}"
        else:
            continue
        late += 1
        yield warn(
            f"the replica at {one.at} {why}", "see its log, and the network to the primary; replicaof, masterauth"
        )
    if others and not late and not any(one.why for one in others):
        yield ok(f"{counted(len(others), 'replica')} in step")


def alike(nodes: Sequence[Node]) -> Findings:
    """Says where clocks or versions differ."""
    skewed = [one for one in nodes if abs(one.skew) > MAX_SKEW]
    for one in skewed:
        found = (
            f"the clock of the Redis at {one.at} differs from ours by {lasting(abs(one.skew))}: it must be within 1 s"
        )
        yield warn(found, "sudo timedatectl set-ntp true, on both machines")
    versions = sorted({store.program(dict(one.info)) for one in nodes})
    if len(versions) > 1:
        found = f"not all run the same version: {', '.join(versions)}"
        yield warn(
            found, "upgrade the replicas first, then fail over; an older one may not read what a newer one sends"
        )
    if nodes and not skewed:
        yield ok(f"the clocks of {len(nodes)} agree with ours")
