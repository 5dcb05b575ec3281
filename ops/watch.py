"""Looks at the service every fifteen seconds, in a thread of the dashboard, which needs neither workers nor API.

Each look notes how long the queue is (mail.figures), marks what happened since the last one (a release, the breaker, a
restart of Redis, a clock that was set), and tells people what they should know (alerts.py). A look that fails is
logged, and the next one comes.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

from mail import figures
from mail.outbox import Outbox
from mail.store import WATCH
from ops.alerts import Alerts
from ops.checks.store import program
from ops.condition import judge
from ops.facts import CLOCK, ROOT, Facts, gather
from ops.push import News, Outlet, ways
from process.log import emit, where
from process.version import VERSION
from queues.connection import RedisError, Script, Unavailable, connect
from queues.jobs import Jobs
from queues.table import EMAIL
from settings import Settings

EVERY = 15.0  # seconds
# KEYS: watch. ARGV: field, value, ... Returns each field that has changed, and what it was.
CHANGES = """
local changed = {}
for at = 1, #ARGV, 2 do
  local was = redis.call('HGET', KEYS[1], ARGV[at]) or ''
  if was ~= ARGV[at + 1] then
    redis.call('HSET', KEYS[1], ARGV[at], ARGV[at + 1])
    changed[#changed + 1] = ARGV[at]
    changed[#changed + 1] = was
  end
end
return changed
"""


class Watch:
    def __init__(self, settings: Settings) -> None:
        redis = connect(settings.redis)
        self.outbox = Outbox(Jobs(redis, settings.redis_replicas), settings)
        self.outlets = [Outlet(name, push) for name, push in ways(settings).items()]
        self.alerts = Alerts(redis, self.say) if self.outlets else None
        self.changes = Script(redis, CHANGES)
        self.has_started, self.clock_set = False, CLOCK.look()[1]

    def say(self, news: News) -> None:
        for outlet in self.outlets:
            outlet.put(news)

    def start(self) -> None:
        threading.Thread(target=self.run, name="watch", daemon=True).start()

    def run(self) -> None:
        while True:
            try:
                self.look()
            except Exception as error:
                emit("crashed", logging.ERROR, where=where(error))
            time.sleep(EVERY)

    def look(self) -> None:
        facts = gather(self.outbox)
        if not facts.unavailable:
            with suppress(RedisError, Unavailable):  # it may take no writes
                self.note(facts)
        if self.alerts:
            self.alerts.look(judge(facts), facts.now, blind=bool(facts.unavailable))

    def note(self, facts: Facts) -> None:
        redis, queue = self.outbox.jobs.redis, facts.queues[EMAIL]
        bulk = queue.jobs["bulk"]  # may wait for hours, and what of it was let in is as old
        figures.sample(redis, queue.jobs["queued"] + bulk, 0 if bulk else queue.oldest_queued or 0)
        for kind, text, at in self.events(facts):
            figures.mark(redis, kind, text, at)
        self.has_started = True

    def events(self, facts: Facts) -> Iterator[tuple[str, str, float]]:
        """Yields what has happened since some dashboard looked last: kind, text, moment."""
        is_open, reply = bool(facts.standing and facts.standing.open_until), facts.standing and facts.standing.reply
        now = {"breaker": "open" if is_open else "", "redis": str(facts.info.get("run_id", ""))}
        if not self.has_started:  # later, dashboards of two releases would take turns
            now["release"] = release()
        answer: Any = self.changes([WATCH], [word for pair in now.items() for word in pair])
        words = [word.decode(errors="replace") for word in answer]
        changed = dict(zip(words[::2], words[1::2], strict=True))
        if "breaker" in changed:
            why = reply.summary if is_open and reply else ""
            yield "breaker_opened" if is_open else "breaker_closed", why, facts.now
        if changed.get("redis") and now["redis"]:
            yield "redis_restarted", program(dict(facts.info)), facts.now - facts.info.get("uptime_in_seconds", 0)
        if "release" in changed:
            yield "release", now["release"], facts.now
        by, at = facts.clock_set
        if at > self.clock_set:
            self.clock_set = at
            yield "clock", f"{by:+.0f} s", at


def release() -> str:
    """Returns the release that this is: the name of its folder on a server, the version elsewhere."""
    return ROOT.name if ROOT.parent.name == "releases" else VERSION
