"""Sends requests, one after the other on each of several connections: with wrk where there is one, else by itself.

Both take the time from the first byte sent to the last received, and keep connections open. The generator of ours is
one process with asyncio; the report says how many requests a second it makes at most, so that nobody takes its ceiling
for the service's.
"""

from __future__ import annotations

import asyncio
import json
import shutil
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path
from statistics import quantiles
from typing import NamedTuple
from urllib.parse import urlsplit

WRK = """
wrk.method = {method}
wrk.body = {body}
{headers}
function done(summary, latency, requests)
  local failed = summary.errors.status + summary.errors.connect + summary.errors.read + summary.errors.write
  print(string.format('{{"rate": %f, "p50": %f, "p99": %f, "failed": %d}}', summary.requests * 1e6 / summary.duration,
    latency:percentile(50) / 1000, latency:percentile(99) / 1000, failed + summary.errors.timeout))
end
"""


class Load(NamedTuple):
    """Holds requests a second, milliseconds, and the number of requests without a 2xx."""

    rate: float
    p50: float
    p99: float
    failed: int


class Request(NamedTuple):
    url: str
    method: str = "GET"
    body: str = ""
    headers: Mapping[str, str] = {}


def put_load(request: Request, *, seconds: float, connections: int, directory: Path) -> Load:
    program = shutil.which("wrk")
    if program:
        return _wrk(program, request, seconds, connections, directory)
    return asyncio.run(_own(request, seconds, connections))


def generator() -> str:
    return "wrk" if shutil.which("wrk") else "bench/load.py"


def _wrk(program: str, request: Request, seconds: float, connections: int, directory: Path) -> Load:
    headers = "\n".join(f"wrk.headers[{json.dumps(k)}] = {json.dumps(v)}" for k, v in request.headers.items())
    script = directory / "load.lua"
    script.write_text(WRK.format(method=json.dumps(request.method), body=json.dumps(request.body), headers=headers))
    command = [program, "-t1", f"-c{connections}", f"-d{max(1, round(seconds))}s", "--timeout", "10s"]
    ran = subprocess.run([*command, "-s", str(script), request.url], capture_output=True, text=True, check=True)
    return Load(**json.loads(ran.stdout.splitlines()[-1]))


async def _own(request: Request, seconds: float, connections: int) -> Load:
    url = urlsplit(request.url)
    head = {"Host": url.netloc, "Content-Length": str(len(request.body)), **request.headers}
    lines = [f"{request.method} {url.path} HTTP/1.1", *(f"{name}: {value}" for name, value in head.items())]
    packet = ("\r\n".join(lines) + "\r\n\r\n" + request.body).encode()
    began, times, statuses = time.monotonic(), list[float](), list[bytes]()

    async def connection() -> None:
        reader, writer = await asyncio.open_connection(url.hostname, url.port)
        while (sent := time.monotonic()) < began + seconds:
            writer.write(packet)
            answer = await reader.readuntil(b"\r\n\r\n")
            await reader.readexactly(_length(answer))
            times.append(1000 * (time.monotonic() - sent))
            statuses.append(answer[9:10])
        writer.close()

    await asyncio.gather(*(connection() for _ in range(connections)))
    percentiles = quantiles(times, n=100, method="inclusive")
    failed = sum(status != b"2" for status in statuses)
    return Load(len(times) / (time.monotonic() - began), percentiles[49], percentiles[98], failed)


def _length(answer: bytes) -> int:
    return next(int(line[15:]) for line in answer.split(b"\r\n") if line[:15].lower() == b"content-length:")
