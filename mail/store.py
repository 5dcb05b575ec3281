"""The mails in Redis: the names of their keys, and how their scripts are run.

`mail:<id>` is a mail (hash), `mail:<id>:claim` the token of the attempt that holds it (expires).
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import Any

from redis import Redis

from queues.connection import Script, Unavailable, impatient, unavailable
from queues.heartbeat import LOST_AFTER
from settings import Settings

FINAL = ("sent", "failed", "unknown", "canceled")
LAST_SENT = "mail:last_sent"
OPEN = "mail:open"  # sorted set: every mail that is not final, by the moment at which mail.sweep looks at it
LOOK_AFTER = 2 * LOST_AFTER  # seconds after which a mail should have moved on, and mail.sweep looks at it
EXPIRED = "expired"  # the reason of a mail whose `expires_at` has passed
# KEYS: mail, claim. ARGV: token, lease in ms.
RENEW = """
if redis.call('GET', KEYS[2]) == ARGV[1] then return redis.call('PEXPIRE', KEYS[2], ARGV[2]) end
return 0
"""


class Store:
    def __init__(self, redis: Redis, settings: Settings, sources: Iterable[str]) -> None:
        self.redis = redis
        self.settings = settings
        self.renew = Script(impatient(redis), RENEW)
        self._scripts = {source: Script(redis, source) for source in sources}

    def run(self, script: str, keys: list[str], args: list[Any]) -> Any:
        return self._scripts[script](keys=keys, args=args)

    def insist(self, script: str, keys: list[str], args: list[Any]) -> Any:
        """Runs a script, however long Redis is away or refuses writes."""
        while True:
            try:
                with unavailable():
                    return self.run(script, keys, args)
            except Unavailable:
                time.sleep(1)

    def kept_for(self, state: str) -> int:
        """Seconds; 0 while the mail is on its way. Longer than its job, which must not outlive it: by a day where that
        may be queued again in its last minute and then wait for a worker."""
        if state not in FINAL:
            return 0
        return self.settings.retain_sent + 3600 if state == "sent" else self.settings.retain_failed + 86400
