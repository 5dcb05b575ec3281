"""Takes mail by SMTP: `python -m submission`.

Listens on the sockets that systemd has opened, else on SUBMISSION_LISTEN; port 465 speaks TLS from the first byte, any
other after STARTTLS, if there is a certificate. SIGHUP reads that again. SIGTERM ends: mails in hand are answered.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import signal
import socket
import ssl
import sys
import time
from contextlib import suppress
from functools import partial
from typing import Any

from mail.address import default_sender
from process import sd_daemon
from process.log import emit, say_why_not, set_up, where
from process.memory import return_large_blocks, use_one_arena
from process.sockets import listen_on
from process.version import VERSION
from queues.connection import Unavailable, announcements, connect, reach
from queues.jobs import Jobs
from settings import Settings, SettingsError, load
from submission.conversation import MOST, TLS_PORT, Conversation, Conversations, hostname
from submission.handler import Handler

BACKLOG = 512
DRAIN = 40  # seconds: longer than a mail waits for Redis
BEAT = 5  # seconds between signs of life


def main() -> int:
    argparse.ArgumentParser(prog="python -m submission", description="Takes mail by SMTP.").parse_args()
    try:
        settings = load("api_keys", "mail_from")
        default_sender_of(settings)
        tls = context_of(settings)
        sockets = listening(settings)
        if not tls and any(port_of(one) == TLS_PORT for one in sockets):
            raise SettingsError(["SUBMISSION_TLS_CERT and SUBMISSION_TLS_KEY must be set for port 465"])
        redis = connect(settings.redis)
    except SettingsError as error:
        say_why_not(error)
        return 2
    set_up(settings.log_level, settings.log_format)
    logging.getLogger("mail.log").disabled = True  # aiosmtpd's, with addresses, bodies and passwords in it
    use_one_arena()
    return_large_blocks()
    announcements.begin(redis)
    with suppress(Unavailable):  # it is said now, and may come up after us
        reach(settings.redis)
    asyncio.run(serve(settings, Jobs(redis, settings.redis_replicas), sockets, tls))
    return 0


def default_sender_of(settings: Settings) -> None:
    try:
        default_sender(settings.mail_from, settings.allow_local_domains)
    except ValueError as error:
        raise SettingsError([f"MAIL_FROM: {error}"]) from None


def listening(settings: Settings) -> list[socket.socket]:
    """Returns the sockets that systemd has opened, else those of SUBMISSION_LISTEN. Raises `SettingsError`."""
    if given := sd_daemon.sockets():
        return given
    if not settings.submission_listen:
        raise SettingsError(["SUBMISSION_LISTEN is not set: name where to take mail, such as 127.0.0.1:2525"])
    sockets = []
    for one in settings.submission_listen:
        try:
            sockets += listen_on(one)
        except OSError as error:
            raise SettingsError([f"SUBMISSION_LISTEN: cannot listen on {one}: {error.strerror}"]) from None
    return sockets


def port_of(listening: socket.socket) -> int:
    name = listening.getsockname()
    return int(name[1]) if isinstance(name, tuple) else 0  # a socket file


def context_of(settings: Settings) -> ssl.SSLContext | None:
    """Returns what a server needs for TLS, None without a certificate. Raises `SettingsError`."""
    if not settings.submission_tls_cert:
        return None
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    read_certificate(context, settings)
    return context


def read_certificate(context: ssl.SSLContext, settings: Settings) -> None:
    try:
        context.load_cert_chain(str(settings.submission_tls_cert), str(settings.submission_tls_key))
    except OSError as error:  # ssl's own are, too
        reason = error.strerror if not isinstance(error, ssl.SSLError) else error.reason
        raise SettingsError([f"SUBMISSION_TLS_CERT, SUBMISSION_TLS_KEY: cannot be used: {reason}"]) from None


async def serve(settings: Settings, jobs: Jobs, sockets: list[socket.socket], tls: ssl.SSLContext | None) -> None:
    loop, stopping = asyncio.get_running_loop(), asyncio.Event()
    loop.set_exception_handler(note)
    handler = Handler(jobs, settings)
    all_of_them = Conversations(handler, tls, hostname(settings.ehlo_name))
    sd_daemon.on_stop(lambda *_: loop.call_soon_threadsafe(stopping.set))
    if tls:
        loop.add_signal_handler(signal.SIGHUP, partial(renew, tls, settings))
    servers = []
    for one in sockets:
        implicit = port_of(one) == TLS_PORT
        factory = partial(Conversation, all_of_them, implicit)
        context: dict[str, Any] = {"ssl": tls} if implicit else {}
        servers.append(await loop.create_server(factory, sock=one, backlog=BACKLOG, **context))
    if all_of_them.most < MOST:
        emit("few_descriptors", logging.WARNING, connections=all_of_them.most)
    about = {"listen": " ".join(map(str, settings.submission_listen)), "version": VERSION}
    emit("submission_started", **about, recipients=settings.staging)
    with handler.accepting.handed_over():
        while not stopping.is_set():
            sd_daemon.tell("READY=1\nWATCHDOG=1")
            with suppress(asyncio.TimeoutError):
                await asyncio.wait_for(stopping.wait(), BEAT)
        sd_daemon.tell("STOPPING=1")
        for server in servers:
            server.close()
        await drain(all_of_them)
    handler.threads.shutdown(wait=False)


async def drain(all_of_them: Conversations) -> None:
    """Waits until the mails in hand are answered; not for ever."""
    deadline = time.monotonic() + DRAIN
    all_of_them.stop()
    while all_of_them.open and time.monotonic() < deadline:
        await asyncio.sleep(0.05)
        sd_daemon.tell("WATCHDOG=1")


def renew(tls: ssl.SSLContext, settings: Settings) -> None:
    try:
        read_certificate(tls, settings)
    except SettingsError as error:
        say_why_not(error)


def note(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    """Logs where something went wrong that is no client's hanging up, and never what."""
    error = context.get("exception")
    if isinstance(error, Exception) and not isinstance(error, (ConnectionError, TimeoutError, ssl.SSLError)):
        emit("crashed", logging.ERROR, where=where(error))


if __name__ == "__main__":
    sys.exit(main())
