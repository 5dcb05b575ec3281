"""Postfix as a side, the champion: no queue in Redis and no templates, only mail in by SMTP and out to the relay.

It runs from folders of its own inside the trial's (the system's instance is neither used nor touched), needs root, and
is started twice: to take the mails in and put them on hold, and to send them. It pipelines, and keeps its
sessions with the relay: tlsproxy holds the TLS side of them (`smtp_tls_connection_reuse`).
"""

from __future__ import annotations

import shutil
import socket
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from bench.install import PEERS, VENV, postfix_tool
from bench.rig import Rig
from bench.side import COMMON, SENDERS, Side
from tests.servers import free_port, kill_group

MAIN = """
compatibility_level = 3.6
queue_directory = {place}/queue
data_directory = {place}/data
maillog_file = {place}/data/mail.log
maillog_file_prefixes = /
myhostname = localhost
mydestination =
inet_interfaces = loopback-only
inet_protocols = ipv4
mynetworks = 127.0.0.0/8
alias_maps =
"""
RELAY = """
relayhost = [{SMTP_HOST}]:{SMTP_PORT}
smtp_tls_security_level = encrypt
smtp_tls_CAfile = {SMTP_CA_FILE}
smtp_tls_connection_reuse = yes
smtp_sasl_auth_enable = yes
smtp_sasl_password_maps = inline:{{ [{SMTP_HOST}]:{SMTP_PORT}={SMTP_USERNAME}:{SMTP_PASSWORD} }}
smtp_sasl_security_options = noanonymous
initial_destination_concurrency = {senders}
default_destination_concurrency_limit = {senders}
"""
HOLD = "smtpd_client_restrictions = check_client_access static:HOLD"
MASTER = """
127.0.0.1:{port} inet n - n - - smtpd
cleanup unix n - n - 0 cleanup
tlsmgr unix - - n 1000? 1 tlsmgr
rewrite unix - - n - - trivial-rewrite
bounce unix - - n - 0 bounce
defer unix - - n - 0 bounce
trace unix - - n - 0 bounce
proxymap unix - - n - - proxymap
retry unix - - n - - error
anvil unix - - n - 1 anvil
scache unix - - n - 1 scache
tlsproxy unix - - n - 0 tlsproxy
smtp unix - - n - {senders} smtp
qmgr unix n - n 300 1 qmgr
postlog unix-dgram n - n - 1 postlogd
"""


@dataclass(frozen=True)
class Postfix(Side):
    """Describes it as it is installed, with as many senders as the other sides have."""

    def fill(self, rig: Rig, mails: int) -> None:
        """Hands mails in by SMTP, to be put on hold."""
        for name in ("", "queue", "data", "etc"):
            (_place(rig) / name).mkdir(mode=0o755)
        shutil.chown(_place(rig) / "data", "postfix")
        rig.directory.chmod(0o711)  # so that Postfix' own user reaches its data
        master, port = _start(rig, HOLD, SENDERS)
        rig.wait_until(lambda: _listens(port), "Postfix did not answer")
        command = [str(VENV / "bin" / "python"), "fill.py", "postfix", str(mails)]
        environment = {**COMMON, "SUBMISSION_PORT": str(port)}
        subprocess.run(command, cwd=PEERS, env=environment, check=True)
        kill_group(master)
        queue = _place(rig) / "queue"
        for mail in (queue / "hold").iterdir():  # in one folder, as `incoming` is
            mail.rename(queue / "incoming" / mail.name)
        del rig.processes["postfix"]

    def start_workers(
        self, rig: Rig, relay: Mapping[str, str], senders: int = SENDERS
    ) -> list[subprocess.Popen[bytes]]:
        return [_start(rig, RELAY.format(senders=senders, **relay), senders)[0]]


def _start(rig: Rig, main: str, senders: int) -> tuple[subprocess.Popen[bytes], int]:
    """Starts its master: without `postfix start`, it stays in the session that `Rig` ends. Returns its port as well."""
    etc, port = _place(rig) / "etc", free_port()
    (etc / "main.cf").write_text(MAIN.format(place=_place(rig)) + main)
    (etc / "master.cf").write_text(MASTER.format(port=port, senders=senders))
    _run("postfix", rig, "check")  # makes its folders
    daemons = _run("postconf", rig, "-hx", "daemon_directory").strip()
    return rig.start("postfix", [f"{daemons}/master", "-c", str(etc), "-s"], {}), port


def _run(program: str, rig: Rig, *arguments: str) -> str:
    command = [str(postfix_tool(program)), "-c", str(_place(rig) / "etc"), *arguments]
    return subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout


def _place(rig: Rig) -> Path:
    return rig.directory / "postfix"


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0
