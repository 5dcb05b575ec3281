"""Posts what becomes of mails to the endpoints of WEBHOOKS or WEBHOOK_URL: `python -m webhooks`.

Several may run, on several machines; each event is taken by one of them. SIGTERM ends it: posts in hand are finished.
"""

from __future__ import annotations

import argparse
import os
import sys
import threading
import time
from contextlib import suppress

from mail.reader import Reader
from mail.states import EVENTS
from process import sd_daemon
from process.log import emit, say_why_not, set_up
from process.memory import return_large_blocks, use_one_arena
from process.version import VERSION
from process.webhooks import EndpointSettings
from queues.connection import RedisError, Unavailable, announcements, connect, reach, translating_errors
from queues.jobs import Jobs
from queues.quarantine import put_aside
from settings import Settings, SettingsError, load
from webhooks.endpoint import Endpoint, drain
from webhooks.queue import KINDS, TEST, want

BEAT = 5  # seconds between signs of life
WANT_EVERY = 60  # seconds
NICE = 10  # where the processor is short, mail goes first
DRAIN = 25  # seconds: longer than a post takes


def main() -> int:
    argparse.ArgumentParser(prog="python -m webhooks", description="Posts what becomes of mails.").parse_args()
    try:
        settings = load("webhook_url")
        wanted = {one.name: wants(one) for one in settings.all_webhooks}
        redis = connect(settings.redis)
    except SettingsError as error:
        say_why_not(error)
        return 2
    with suppress(OSError):  # the unit has done it, and forbids it here
        os.nice(max(0, NICE - os.nice(0)))
    set_up(settings.log_level, settings.log_format)
    use_one_arena()
    return_large_blocks()
    announcements.begin(redis)
    with suppress(Unavailable):  # it is said now, and may come up after us
        reach(settings.redis)
    stopping = threading.Event()
    sd_daemon.on_stop(lambda *_: stopping.set())
    reader = Reader(Jobs(redis), settings)
    endpoints = [Endpoint(one, redis, reader) for one in settings.all_webhooks]
    threads = [thread for one in endpoints for thread in one.start()]
    emit("webhooks_started", endpoints=" ".join(wanted), version=VERSION)
    watch(settings, reader, wanted, stopping)
    sd_daemon.tell("STOPPING=1")
    drain(endpoints, threads, DRAIN)
    return 0


def wants(one: EndpointSettings) -> str:
    """Returns the endpoint's host and the types of events that it wants. Raises `SettingsError`."""
    known = [*EVENTS.values(), TEST]
    if unknown := [event for event in one.events if event not in known]:
        names = ", ".join(EVENTS.values())
        raise SettingsError([f"WEBHOOKS: {one.name}: events must be some of {names}, and one is {unknown[0][:40]!r}"])
    return " ".join([one.host, *(one.events or EVENTS.values())])


def watch(settings: Settings, reader: Reader, wanted: dict[str, str], stopping: threading.Event) -> None:
    """Says that this process lives, and what it wants, until it is told to stop."""
    said = -float(WANT_EVERY)
    redis = reader.jobs.redis
    while not stopping.is_set():
        if time.monotonic() - said >= WANT_EVERY:
            with suppress(Unavailable, RedisError), translating_errors():
                put_aside(redis, {prefix + name: kind for name in wanted for prefix, kind in KINDS.items()})
                want(redis, wanted, time.time())
                said = time.monotonic()
        sd_daemon.tell("READY=1\nWATCHDOG=1")
        stopping.wait(BEAT)


if __name__ == "__main__":
    sys.exit(main())
