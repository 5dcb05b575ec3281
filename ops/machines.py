"""Several machines: what each of them is (its roles), and what they share: addresses, passwords, an authority.

The first machine (--hosts) makes /etc/async-email/machines.json, which only root reads; the others (--join) take from
it what they need, and keep no copy. Each makes its own key, and a certificate that the authority in that file signs.
Files that are there already, such as your own authority's, stay. Standard library only, as ops/install.py.
"""

from __future__ import annotations

import ipaddress
import json
import secrets
import socket
import tempfile
from contextlib import suppress
from hashlib import sha256
from pathlib import Path
from typing import NamedTuple

from ops.gate import Sentinels, ask_all, parse_url, primary_of
from ops.server import Fault, Server, text_of

ROLES = ("redis", "sentinel", "api", "worker")
PORT, NAME = 6380, "mymaster"
KEY_OF = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "3650")
SENTINEL = "redis-sentinel@async-email.service"


class Machines(NamedTuple):
    """What the machines share."""

    hosts: list[str]  # each with a Redis, a Sentinel or both; the first is the first primary
    passwords: dict[str, str]  # by the names of the users in deploy/redis/
    authority: str
    authority_key: str
    api_keys: str

    @property
    def url(self) -> str:
        login = f"sentinel_username=async-email&sentinel_password={self.passwords['async-email']}"
        hosts = ",".join(f"{host}:26379" for host in self.hosts)
        return f"rediss+sentinel://async-email:{self.passwords['async-email']}@{hosts}/{NAME}/0?{login}"


def parse_roles(given: list[str]) -> frozenset[str]:
    """Raises `Fault`."""
    roles = frozenset(",".join(given).replace(" ", "").split(",")) - {""}
    if unknown := roles - set(ROLES):
        raise Fault(f"--role must be one or several of {', '.join(ROLES)}; not {', '.join(sorted(unknown))}")
    return roles


def parse_hosts(given: str) -> list[str]:
    """Raises `Fault`."""
    hosts = [one.strip() for one in given.split(",") if one.strip()]
    for host in hosts:
        try:
            ipaddress.IPv4Address(host)
        except ValueError:
            raise Fault(f"--hosts must be IPv4 addresses of the private network, and {host} is none") from None
    if len(set(hosts)) < 3 or len(set(hosts)) < len(hosts):
        raise Fault("--hosts must be three addresses or more: of two Sentinels, none can replace the other's primary")
    return hosts


def own(hosts: list[str]) -> str | None:
    """Returns the address that this machine has."""
    for host in hosts:
        with suppress(OSError), socket.socket() as probe:
            probe.bind((host, 0))
            return host
    return None


def read_machines(server: Server) -> Machines | None:
    text = text_of(server.bundle)
    if text is None:
        return None
    try:
        return Machines(**json.loads(text))
    except (ValueError, TypeError):
        raise Fault(f"{server.bundle} must be the machines.json that bin/install made on the first machine") from None


def set_up_machines(server: Server) -> None:
    """Notes the roles, and makes what the machines share if this is the first."""
    if not server.roles:
        return
    server.folder(server.etc, 0o700)
    if server.hosts and text_of(server.bundle) is None:
        if own(server.hosts) != server.hosts[0]:
            server.stop_here(f"--hosts must begin with an address of this machine; {server.hosts[0]} is none")
        make_machines(server)
    machines = read_machines(server)
    if server.hosts and machines and machines.hosts != server.hosts:
        server.stop_here(f"--hosts must be {','.join(machines.hosts)}, as in {server.bundle}")
    if server.joins and not machines:
        raise Fault(f"{server.bundle} cannot be read")
    keeps = server.roles & {"redis", "sentinel"}
    missing = [conf for role, conf in configurations(server).items() if role in keeps and text_of(conf) is None]
    if missing and not (machines or server.dry):
        raise Fault("for these roles the first machine needs --hosts, and each other --join with its machines.json")
    if missing and machines and not own(machines.hosts):
        server.stop_here(f"none of {', '.join(machines.hosts)} is an address of this machine")
    roles = "".join(f"{role}\n" for role in ROLES if role in server.roles)
    if text_of(server.etc / "roles") != roles:
        server.write(server.etc / "roles", roles, 0o644)


def configurations(server: Server) -> dict[str, Path]:
    return {"redis": server.redis_conf, "sentinel": server.sentinel_conf}


def make_machines(server: Server) -> None:
    users = ("async-email", "replica", "sentinel", "operator")
    certificate, key = issue(server, "async-email", "-addext", "keyUsage=critical,keyCertSign,cRLSign")
    passwords = {user: secrets.token_urlsafe(32) for user in users}
    api_keys = (text_of(server.credentials / "api_keys") or "").strip()
    machines = Machines(server.hosts, passwords, certificate, key, api_keys or server.make_key())
    server.write(server.bundle, json.dumps(machines._asdict(), indent=1) + "\n", 0o600)


def issue(server: Server, name: str, *options: str | Path) -> tuple[str, str]:
    """Makes a key and a certificate, and returns the certificate and the key."""
    if not server.announce(f"make a key and a certificate for {name}"):
        return "", ""
    with tempfile.TemporaryDirectory() as folder:
        key, certificate = Path(folder, "key"), Path(folder, "certificate")
        files = ("-subj", f"/CN={name}", "-keyout", key, "-out", certificate)
        server.run("openssl", "req", "-x509", *KEY_OF, *files, *options)
        return certificate.read_text(), key.read_text()


def set_up_certificates(server: Server) -> None:
    machines = read_machines(server)
    if not server.roles or not machines:
        return
    if text_of(server.redis_ca) is None:
        server.write(server.redis_ca, machines.authority, 0o644)
    certificate, key = (server.redis_conf.parent / f"async-email.{ending}" for ending in ("crt", "key"))
    host = own(machines.hosts)
    if not server.roles & {"redis", "sentinel"} or not host:
        return
    if text_of(server.operator) is None:
        server.write(server.operator, f"{machines.passwords['operator']}\n", 0o600)
    if text_of(certificate) is not None:
        return
    with tempfile.TemporaryDirectory() as folder:
        authority, authority_key = Path(folder, "authority"), Path(folder, "authority-key")
        authority.write_text(machines.authority)
        authority_key.write_text(machines.authority_key)
        extensions = (f"subjectAltName=IP:{host}", "basicConstraints=critical,CA:FALSE")
        options = [word for one in extensions for word in ("-addext", one)]
        made = issue(server, host, *options, "-CA", authority, "-CAkey", authority_key)
    server.write(key, made[1], 0o600, owner="redis", group="redis")
    server.write(certificate, made[0], 0o644)


def filled_in(server: Server, name: str, machines: Machines) -> str:
    """Returns a file of deploy/redis/ with the words in capitals filled in."""
    text = (server.tree / "deploy/redis" / name).read_text()
    for user in ("replica", "sentinel", "operator"):
        text = text.replace(f"{user.upper()}_SHA256", sha256(machines.passwords[user].encode()).hexdigest())
        text = text.replace(f"{user.upper()}_PASSWORD", machines.passwords[user])
    text = text.replace("SERVICE_SHA256", sha256(machines.passwords["async-email"].encode()).hexdigest())
    words = {"HOST": own(machines.hosts) or "", "PRIMARY": primary(machines)}
    words["QUORUM"] = str(len(machines.hosts) // 2 + 1)
    for word, value in words.items():
        text = text.replace(f" {word}", f" {value}")
    return text


def primary(machines: Machines) -> str:
    """Returns the primary that the Sentinels name; if there are too few of them yet, the first machine."""
    sentinels = sentinels_of(machines)
    named = primary_of(ask_all(sentinels), sentinels)
    return named[0] if named else machines.hosts[0]


def sentinels_of(machines: Machines) -> Sentinels:
    with tempfile.NamedTemporaryFile("w") as file:
        file.write(machines.authority)
        file.flush()
        return parse_url(machines.url, file.name)


def replicated_part(server: Server, machines: Machines) -> str:
    """Returns what Redis' configuration has besides that of one machine."""
    host, leader = own(machines.hosts), primary(machines)
    if leader == host and server.joins:  # it has been here before, and the others do not answer; the gate knows more
        leader = next(one for one in machines.hosts if one != host)
    text = filled_in(server, "replicated.conf", machines)
    return text if leader == host else f"{text}replicaof {leader} {PORT}\n"


def start_sentinel(server: Server) -> None:
    if "sentinel" not in server.roles:
        return
    is_new = text_of(server.sentinel_conf) is None
    machines = read_machines(server)
    if is_new and machines:
        text = filled_in(server, "sentinel.conf", machines)
        server.write(server.sentinel_conf, text, 0o600, owner="redis", group="redis")
    server.copy_units("redis-sentinel@async-email.service.d/async-email.conf")
    if is_new or not server.is_on(SENTINEL):
        server.run("systemctl", "enable", SENTINEL)
        server.run("systemctl", "restart", SENTINEL)
