"""Serves the HTTP API: `python service.py`.

Reads the settings, looks at the templates, opens the sockets, and runs API_PROCESSES processes that serve web.app on
them.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Callable
from contextlib import suppress

import tasks
from mail.address import default_sender
from mail.templates import read_again_when_changed
from mail.templates import use as use_templates
from process import prefork
from process.log import emit, say_why_not, set_up
from process.memory import collect_seldom, return_large_blocks, use_one_arena
from process.sd_daemon import on_stop
from process.sockets import listen_on
from process.version import VERSION
from queues.connection import Unavailable, announcements, connect, reach
from queues.jobs import Jobs
from queues.offer import load_file
from settings import Settings, SettingsError, load
from web import hosts
from web.app import make_app
from web.octets import ON_THE_WIRE
from web.server import MOST_CONNECTIONS, Server, room_for


def main() -> int:
    parser = argparse.ArgumentParser(prog="service.py", description="Serves the HTTP API.")
    parser.add_argument("--reload-templates", action="store_true", help="use an edited template at once")
    hosts.add_flag(parser)
    given = parser.parse_args()
    try:
        settings = load("api_keys", "mail_from")
        check_sender(settings)
        if settings.tasks_file:
            load_file(settings.tasks_file)
        if settings.templates_dir:
            use_templates(settings.templates_dir)
        if given.reload_templates:
            read_again_when_changed()
        redis = connect(settings.redis)
        app = make_app(settings, Jobs(redis, settings.redis_replicas), tasks.OFFERED, given.allow_host)
        sockets = listen_on(settings.listen)
    except SettingsError as error:
        say_why_not(error)
        return 2
    except OSError as error:
        say_why_not(f"LISTEN: cannot listen on {settings.listen}: {error.strerror}")
        return 2
    set_up(settings.log_level, settings.log_format)
    use_one_arena()
    return_large_blocks()
    announcements.begin(redis)
    with suppress(Unavailable):  # it is said now, and may come up after us
        reach(settings.redis)

    def serve(alive: Callable[[], None], _: int) -> None:
        collect_seldom()
        server = Server(app, ON_THE_WIRE * settings.max_message_bytes, sockets)
        on_stop(server.stop)
        with app.accepting.handed_over():
            server.run(alive)

    announce(settings, room_for(len(sockets)))
    prefork.run(settings.api_processes, serve)
    return 0


def announce(settings: Settings, room: int) -> None:
    if room < MOST_CONNECTIONS:
        emit("few_descriptors", logging.WARNING, connections=room)
    about = {"listen": settings.listen, "processes": settings.api_processes, "version": VERSION}
    emit("api_started", **about, recipients=settings.staging)


def check_sender(settings: Settings) -> None:
    try:
        default_sender(settings.mail_from, settings.allow_local_domains)
    except ValueError as error:
        raise SettingsError([f"MAIL_FROM: {error}"]) from None


if __name__ == "__main__":
    sys.exit(main())
