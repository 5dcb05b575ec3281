"""Three machines of which one may be gone: installed as docs/scale.md says, the primary's switched off under load, back
again as a replica, and the primary handed over."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from itertools import count

import pytest

from tests.deploy.machine import Machine, booted, image, missing
from tests.deploy.server import CA_FILE, CLONE, COMMANDS, ENV, KEY, Load, Server, name_the_relay
from tests.relay import Relay
from tests.servers import eventually

pytestmark = pytest.mark.deploy

ROLES = "--role redis,sentinel,api,worker"
RELAY = "smtp.shop.internal"
REDIS = "redis-cli -s /run/redis-async-email/redis.sock --user async-email"
PASSWORD = "REDISCLI_AUTH=$(sed 's|.*//async-email:||; s|@.*||' /etc/async-email/credentials/redis_url)"


@pytest.fixture
def machines() -> Iterator[list[Machine]]:
    if os.environ.get("REQUIRE_DEPLOY") != "1":
        pytest.skip("it boots three machines and takes minutes; REQUIRE_DEPLOY=1 asks for it")
    if reason := missing():
        pytest.fail(reason)
    with ExitStack() as undo:
        system = undo.enter_context(image("trixie"))
        yield [undo.enter_context(booted(system, part)) for part in "abc"]


def install(machine: Machine, options: str) -> str:
    machine.clone(CLONE)
    return machine.admin(f"cd {CLONE} && sudo bin/install {ROLES} {options}").stdout


def join(machine: Machine, first: Machine) -> None:
    """With two files of the first, which root alone may read."""
    machine.run("install -d -m 700 /etc/async-email && umask 077 && touch /var/tmp/machines.json " + ENV)
    for source, copy in (("/etc/async-email/machines.json", "/var/tmp/machines.json"), (ENV, ENV)):
        machine.write(copy, first.run(f"cat {source}").stdout)
    install(machine, "--join /var/tmp/machines.json")


def replication(machine: Machine) -> dict[str, str]:
    said = machine.run(f"{PASSWORD} {REDIS} info replication", check=False).stdout
    return dict(re.findall(r"^(\w+):(\S+)", said, re.MULTILINE))


def is_known(machine: Machine) -> bool:
    """Its Sentinel knows both others, and both replicas, for which it asks every ten seconds: before that, none of them
    could be promoted."""
    sentinel = f"redis-cli --tls --cacert /etc/ssl/async-email-redis.pem -h {machine.address} -p 26379"
    said = machine.run(f"{PASSWORD} {sentinel} --user async-email sentinel master mymaster", check=False).stdout
    return bool(re.search(r"num-slaves\n2\nnum-other-sentinels\n2\n", said))


def is_in_step(machine: Machine) -> bool:
    said = replication(machine)
    return said.get("master_link_status") == "up" or said.get("min_slaves_good_slaves") == "2"


def test_a_mail_that_was_acknowledged_outlives_the_primarys_machine(machines: list[Machine]) -> None:
    first, *others = machines
    host, addresses = first.network.host, [machine.address for machine in machines]
    with Relay(("user", "the relay's password"), "starttls", host=host, name=RELAY, port=587) as relay:
        for machine in machines:
            name_the_relay(machine, relay)
            machine.network.names.zone[relay.name, "A"] = [host]
        (key,) = set(KEY.findall(install(first, f"--hosts {','.join(addresses)}")))
        servers = [Server(machine, relay, str(key), count(10_000 * n)) for n, machine in enumerate(machines)]
        login = dict(zip(("SMTP_USERNAME", "SMTP_PASSWORD"), relay.login or (), strict=True))
        servers[0].edit(SMTP_HOST=RELAY, SMTP_CA_FILE=CA_FILE, MAIL_FROM="Shop <hello@shop.internal>", **login)
        with ThreadPoolExecutor() as pool:
            list(pool.map(join, others, [first, first]))
        for server in servers:
            eventually(server.is_up, 120)
            eventually(lambda one=server.machine: is_in_step(one) and is_known(one))  # type: ignore[misc]
            server.delivers()

        with Load(servers[1]) as load:
            first.kill()
            gone = len(load.taken)
            eventually(lambda: len(load.taken) > gone + 20, 90)
        servers[1].arrives(*load.taken, seconds=120)

        first.boot()
        eventually(lambda: is_in_step(first), 90)
        assert replication(first)["role"] == "slave"
        primary = next(machine for machine in others if replication(machine)["role"] == "master")
        said = primary.admin(f"sudo {COMMANDS}/failover").stdout
        assert f"is the primary now; {primary.address} follows it" in said
        eventually(lambda: replication(primary)["role"] == "slave" and is_in_step(primary), 60)
        servers[0].delivers()
