"""Shows on a terminal, over ssh too, whether all is well and what became of the last mails: `bin/top`.

It renews itself every two seconds. Up and down choose a mail; `r` requeues it if it has failed, and `p` pauses the
workers or lets them go on: both ask first, and are written to the log of actions. `f` shows failed mail only, `q` ends.
It is drawn with curses, which every Python has. What a relay or a sender wrote is shown without what a terminal would
take for a command. Bodies are never shown; SHOW_ADDRESSES=no masks addresses.
"""

from __future__ import annotations

import argparse
import curses
import getpass
import os
import sys
import unicodedata
from collections.abc import Iterator, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from mail.listing import Wanted, page
from mail.outbox import Outbox
from mail.states import RETURNED, State
from ops.checks import configuration
from ops.checks.store import client
from ops.checks.target import Target
from ops.condition import Condition, look
from ops.page import audit
from ops.page.words import mailbox, masked, time_of_day
from queues import overview
from queues.connection import Unavailable, translating_errors
from queues.jobs import Jobs, NotFound, NotPossible

EVERY = 2.0  # seconds
LEVELS = {"well": 1, "warn": 2, "bad": 3}  # the numbers of curses' pairs of colours
STATES = {State.SENT.value: 1, State.DELAYED.value: 2, State.UNKNOWN.value: 2, State.FAILED.value: 3}
STATES |= dict.fromkeys(RETURNED, 3)
KEYS = "up/down choose   r requeue   p pause or resume   f failed only   q end"


class Line(NamedTuple):
    text: str
    colour: int = 0
    chosen: bool = False


def printable(text: str) -> str:
    """Returns a text without what a terminal would obey, or what would make a line look like another."""
    return "".join("·" if unicodedata.category(one)[0] == "C" else one for one in text)


def row(mail: dict[str, Any], show: bool) -> str:
    """Returns a mail in one line."""
    said = mail["attempts"][-1] if mail["attempts"] else {}
    words = mail["reason"] or (f"{said['code']} {said['text']}" if said.get("code") else "")
    if mail["next_attempt_at"]:
        words = f"again at {time_of_day(mail['next_attempt_at'])}: {words}"
    to = mailbox((mail["to"] + mail["cc"] + mail["bcc"])[0], show)
    state = "in doubt" if mail["status"] == State.UNKNOWN else mail["status"]
    subject, words = (text if show else masked(text) for text in (mail["subject"], words))
    shown = [f"{state:<9}", f"{time_of_day(mail['created_at']):<8}", f"{to[:32]:<32}", f"{subject[:36]:<36}"]
    return printable("  ".join([*shown, words]))


class Top:
    """What is shown, and what a key does to it."""

    def __init__(self, outbox: Outbox, who: str) -> None:
        self.outbox = outbox
        self.who = who
        self.mails: list[dict[str, Any]] = []
        self.at = 0  # which line is chosen
        self.chosen: dict[str, Any] = {}  # the mail that a key has chosen, wherever its line is by now
        self.failed_only = False
        self.asks = ""  # what a "y" would do: "requeue" or "pause" or "resume"
        self.said = ""

    def lines(self, height: int) -> Iterator[Line]:
        """Yields what is to be seen, read anew. Raises `Unavailable`."""
        yield from self._verdict(look(self.outbox))
        yield Line("")
        states = frozenset({State.FAILED.value} if self.failed_only else ())
        self.mails = page(self.outbox, Wanted(states=states, limit=max(1, height - 8))).mails
        places = [place for place, mail in enumerate(self.mails) if mail["id"] == self.chosen.get("id")]
        self.at = places[0] if places else max(0, min(self.at, len(self.mails) - 1))
        for number, mail in enumerate(self.mails):
            text = row(mail, self.outbox.settings.show_addresses)
            yield Line(text, STATES.get(mail["status"], 0), number == self.at)
        if not self.mails:
            yield Line("no mail has failed" if self.failed_only else "no mail was accepted yet")

    def _verdict(self, condition: Condition) -> Iterator[Line]:
        yield Line(printable(condition.sentence), LEVELS.get(condition.level, 0))
        if condition.fix:
            yield Line(printable(f"Next: {condition.fix}."))
        for also in condition.also[:2]:
            yield Line(f"also: {printable(also.sentence)}")

    def last_line(self) -> str:
        if self.asks == "requeue":
            subject = self.chosen["subject"][:36] or "this mail"
            return printable(f"requeue {subject if self.outbox.settings.show_addresses else masked(subject)}? y/n")
        if self.asks:
            return f"{self.asks} all workers? y/n"
        return self.said or KEYS

    def press(self, key: int) -> bool:
        """Does what a key asks for. Returns whether to go on. Raises `Unavailable`."""
        asked, self.asks, self.said = self.asks, "", ""
        if asked:
            if key == ord("y"):
                self._do(asked)
            return True
        if key in (curses.KEY_UP, curses.KEY_DOWN, ord("k"), ord("j")):
            self._choose(self.at + (1 if key in (curses.KEY_DOWN, ord("j")) else -1))
        elif key == ord("f"):
            self.failed_only, self.at, self.chosen = not self.failed_only, 0, {}
        elif key == ord("p"):
            self.asks = "resume" if overview.is_paused(self.outbox.jobs.redis) else "pause"
        elif key == ord("r") and self.mails:
            self._choose(self.at)
            if self.chosen["status"] == State.UNKNOWN:
                self.said = f"in doubt: decide at /mail/emails/{self.chosen['id']} whether it arrived"
            else:
                self.asks = "requeue"
        return key not in (ord("q"), 27)

    def _choose(self, line: int) -> None:
        self.at = max(0, min(line, len(self.mails) - 1))
        self.chosen = self.mails[self.at] if self.mails else {}

    def _do(self, what: str) -> None:
        redis, mail_id = self.outbox.jobs.redis, self.chosen["id"] if what == "requeue" else ""
        try:
            if what == "requeue":
                self.outbox.requeue(mail_id, in_doubt=False)  # nothing here says that it may arrive twice
            else:
                (overview.pause if what == "pause" else overview.resume)(redis)
        except (NotFound, NotPossible) as why:
            self.said = f"not done: {why or 'the mail is gone'}"
            return
        audit.note(redis, self.who, what, mail_id)
        self.said = f"done: {what}"


def draw(window: Any, lines: Sequence[Line], last: str) -> None:
    height, width = window.getmaxyx()
    window.erase()
    for number, line in enumerate(lines[: height - 1]):
        colour = curses.color_pair(line.colour) if curses.has_colors() else 0
        look = colour | (curses.A_REVERSE if line.chosen else 0)
        window.addnstr(number, 0, line.text, width - 1, look)
    window.addnstr(height - 1, 0, last, width - 1, curses.A_DIM)
    window.refresh()


def run(top: Top, window: Any) -> None:
    with suppress(curses.error):  # a serial console has neither
        curses.curs_set(0)
    if curses.has_colors():
        curses.use_default_colors()
        for pair, colour in ((1, curses.COLOR_GREEN), (2, curses.COLOR_YELLOW), (3, curses.COLOR_RED)):
            curses.init_pair(pair, colour, -1)
    window.timeout(int(EVERY * 1000))
    goes_on = True
    while goes_on:
        try:
            with translating_errors():
                draw(window, list(top.lines(window.getmaxyx()[0])), top.last_line())
                goes_on = top.press(window.getch())
        except Unavailable as why:
            draw(window, [Line(f"{why}", LEVELS["bad"])], "q ends")
            goes_on = window.getch() not in (ord("q"), 27)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="bin/top", description="Shows whether all is well, and the last mails.")
    parser.parse_args(arguments)
    target = Target(Path(__file__).parent.parent)
    settings = configuration.load_for(target, "bin/top")
    if not settings:
        return 1
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        print("bin/top draws on a terminal, and this is none", file=sys.stderr)
        return 2
    try:
        curses.setupterm()
    except curses.error:  # a terminal newer than this machine's list of them
        os.environ["TERM"] = "xterm"
    who = os.environ.get("SUDO_USER") or getpass.getuser()
    with client(settings) as redis:
        try:
            curses.wrapper(partial(run, Top(Outbox(Jobs(redis, settings.redis_replicas), settings), who)))
        except curses.error as why:
            print(f"bin/top cannot draw on this terminal ({why}); TERM must name one that is known", file=sys.stderr)
            return 2
    return 0
