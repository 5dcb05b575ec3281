"""A relay that only counts, in a process of its own: `python -m bench.relay --latency 0.02 --ca-file ca.pem`.

Its first line on stdout says where it listens; each line on its stdin (`report`, `moments`, `wait N`) is answered with
a line of JSON. It ends with its stdin, so it does not outlive its starter, `RelayProcess`.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import ssl
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import trustme

from bench.conversation import PASSWORD, USERNAME, Conversation
from bench.wire import Rules, Tally

ROOT = Path(__file__).parent.parent
PATIENCE = 30  # seconds for `wait`


async def serve(latency: float, ca_file: str | None) -> None:
    tally = Tally()
    rules = Rules(tally, certified(ca_file) if ca_file else None, latency)
    server = await asyncio.get_running_loop().create_server(lambda: Conversation(rules), "127.0.0.1", backlog=1024)
    print(json.dumps({"port": server.sockets[0].getsockname()[1]}), flush=True)
    orders = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(orders), sys.stdin)
    while order := (await orders.readline()).decode().split():
        print(json.dumps(await obey(tally, *order)), flush=True)


async def obey(tally: Tally, order: str, mails: str = "0") -> dict[str, Any]:
    if order == "moments":
        return tally.moments
    if order == "wait":
        with suppress(asyncio.TimeoutError):
            await asyncio.wait_for(tally.reach(int(mails)), PATIENCE)
    return tally.report()


def certified(ca_file: str) -> ssl.SSLContext:
    """Makes a certificate for loopback and writes its authority to `ca_file`."""
    authority, context = trustme.CA(), ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("127.0.0.1").configure_cert(context)
    authority.cert_pem.write_to_path(ca_file)
    return context


class RelayProcess:
    def __init__(self, directory: Path, *, latency: float = 0, secure: bool = True) -> None:
        self.ca_file = directory / "ca.pem"
        self.command = [sys.executable, "-m", "bench.relay", "--latency", str(latency)]
        self.command += ["--ca-file", str(self.ca_file)] if secure else []

    def __enter__(self) -> RelayProcess:
        self.process = subprocess.Popen(
            self.command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True, text=True
        )
        self.port: int = self._answer()["port"]
        return self

    def __exit__(self, *_: object) -> None:
        assert self.process.stdin
        assert self.process.stdout
        self.process.stdin.close()
        self.process.stdout.close()
        self.process.kill()
        self.process.wait()

    def ask(self, order: str) -> dict[str, Any]:
        assert self.process.stdin
        self.process.stdin.write(f"{order}\n")
        self.process.stdin.flush()
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout
        return dict(json.loads(self.process.stdout.readline()))

    def environment(self) -> dict[str, str]:
        """Returns the settings by which a worker finds it: ours, which the peers read as well."""
        return {
            "SMTP_HOST": "127.0.0.1",
            "SMTP_PORT": str(self.port),
            "SMTP_SECURITY": "starttls",
            "SMTP_CA_FILE": str(self.ca_file),
            "SMTP_USERNAME": USERNAME,
            "SMTP_PASSWORD": PASSWORD,
        }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="bench.relay", description="An SMTP relay that only counts.")
    parser.add_argument("--latency", type=float, default=0, metavar="SECONDS", help="of a round trip")
    parser.add_argument("--ca-file", metavar="FILE", help="where to write its authority; without, no STARTTLS, no AUTH")
    options = parser.parse_args()
    asyncio.run(serve(options.latency, options.ca_file))
