"""The mails in Redis: the names of their keys, and how the scripts that change them are run.

`mail:<id>` is a mail (hash) and `mail:<id>:claim` the token of the attempt that holds it (expires); no other key of
ours begins with `mail:` but those named here.
"""

from __future__ import annotations

import re
import time
from contextlib import suppress
from typing import Any, NamedTuple

from mail.states import FINAL, State, transition
from queues import keys
from queues.connection import SOMETHING_ELSE, Script, Unavailable, fail_fast, translating_errors
from queues.heartbeat import LEASE_SECONDS
from queues.jobs import Jobs
from queues.keys import TAG
from queues.replication import Unconfirmed
from queues.table import EMAIL
from settings import Settings
from smtp.pacing import BREAKER, key_prefix

MAIL = f"{TAG}mail:"
OPEN = f"{TAG}mail:open"  # sorted set: every mail that is not final, by the moment at which mail.sweep looks at it
LAST_SENT = f"{TAG}mail:last_sent"  # seconds since 1970
TOTALS = f"{TAG}mail:totals"  # hash: what mail.counters counts
ACTIONS = f"{TAG}mail:actions"  # list: what people did, the latest first, as JSON: ops.page.audit
SWEPT = f"{TAG}mail:swept"  # hash: what mail.sweep has done so far
WATCH = f"{TAG}mail:watch"  # hash: what the dashboard's watch has seen, and told people (ops.watch, ops.alerts)
INDEX = f"{TAG}mail:index"  # sorted set: mail.index
KEY_NAMES = f"{TAG}mail:keys"  # set: the names of all API keys that have submitted a mail
SECRET = f"{TAG}mail:secret"  # string: the key of the digests of addresses in the index
MAILBOX = f"{TAG}mail:mailbox"  # hash: up to which mail the mailbox of reports was read: mail.mailboxes
SUPPRESSED = f"{TAG}mail:suppressed"  # hash: the addresses that are not served, as digests: mail.suppression
SUPPRESSIONS = f"{TAG}mail:suppressions"  # sorted set: the same by time
MARKS = f"{TAG}mail:marks"  # sorted set: what happened when, mail.figures
WEBHOOK_WANTED = f"{TAG}webhook:wanted"  # hash: each endpoint's host, when it was last seen, the events that it wants
WEBHOOK_TOTALS = f"{TAG}webhook:totals"  # hash: what became of the events of each endpoint
WEBHOOK_WAITING = f"{TAG}webhook:waiting:"  # and the endpoint's name. Hash: the events of each mail that wait
WEBHOOK_DUE = f"{TAG}webhook:due:"  # and the same. Sorted set: the mails, by when their first event is to be posted
WEBHOOKS = {
    "WEBHOOK_WANTED": WEBHOOK_WANTED,
    "WEBHOOK_TOTALS": WEBHOOK_TOTALS,
    "WEBHOOK_WAITING": WEBHOOK_WAITING,
    "WEBHOOK_DUE": WEBHOOK_DUE,
}
LOOK_AFTER = 2 * LEASE_SECONDS  # seconds after which a mail should have moved on, and mail.sweep looks at it


class Period(NamedTuple):
    """Has a hash with figures of each such span of time: the name of its key is `prefix` and a number, counted from
    1970. `seconds` is how long it is, `kept` for how many its hash is kept."""

    prefix: str
    seconds: int
    kept: int


MINUTE = Period(f"{TAG}mail:minute:", 60, 3 * 3600)
HOUR = Period(f"{TAG}mail:hour:", 3600, 74 * 3600)
PERIODS = (MINUTE, HOUR)
# KEYS: mail, claim. ARGV: token, lease in ms.
RENEW = """
if redis.call('GET', KEYS[2]) == ARGV[1] then redis.call('PEXPIRE', KEYS[2], ARGV[2]) end
"""


def mail_key(mail_id: str) -> str:
    return MAIL + mail_id


def claim_key(mail_id: str) -> str:
    return f"{MAIL}{mail_id}:claim"


def look_at(moment: float, expires_at: float) -> float:
    """Returns when the sweep should look at a mail that waits: at `moment`, or sooner if it expires (0: never)."""
    return min(moment, expires_at or moment)


class Store:
    def __init__(self, jobs: Jobs, settings: Settings) -> None:
        self.redis = redis = jobs.redis
        self.replication = jobs.replication
        self.renew = Script(fail_fast(redis), RENEW)
        # A mail outlives its job: by a day where that may be queued again in its last minute, and then wait.
        kept = dict.fromkeys(FINAL, settings.retain_failed + 86400) | {State.SENT: settings.retain_sent + 3600}
        breakers = tuple(f"{key_prefix(one.name)}:breaker" for one in settings.relays) or (BREAKER,)
        shared: dict[str, object] = {"OPEN": OPEN, "LAST_SENT": LAST_SENT, "TOTALS": TOTALS, "SWEPT": SWEPT}
        shared |= WEBHOOKS | {"INDEX": INDEX, "FAILED_JOBS": keys.failed(EMAIL), "BREAKERS": breakers}
        shared |= {"SUPPRESSED": SUPPRESSED, "SUPPRESSIONS": SUPPRESSIONS}
        self._become = transition(MAIL=MAIL, KEPT=kept, PERIODS=PERIODS, **shared)
        self._scripts: dict[str, Script] = {}

    def script(self, body: str) -> Script:
        """Returns the script that is BECOME and `body`, or `body` alone if that names nothing of it."""
        if body not in self._scripts:
            names = set(re.findall(r"^local (?:function )?(\w+)", self._become, re.MULTILINE))
            named = names & set(re.findall(r"\w+", body))
            self._scripts[body] = Script(self.redis, self._become + body if named else body)
        return self._scripts[body]

    def run(self, body: str, keys: list[str], args: list[Any]) -> Any:
        return self.script(body)(keys=keys, args=args)

    def has_job(self, mail_id: str) -> bool:
        """Returns whether the mail's job is in Redis. Raises redis-py's errors."""
        return bool(self.redis.exists(keys.job(mail_id)))

    def confirmed(self, body: str, keys: list[str], args: list[Any], patience: float = 0) -> Any:
        """Runs a script, and once more until its replicas have what it wrote or `patience` is over, in seconds. Raises
        `Unconfirmed`."""
        if not self.replication.replicas:
            return self.run(body, keys, args)
        until = time.monotonic() + patience
        while True:
            try:
                return self.replication.call(self.script(body), keys, args)
            except Unconfirmed:
                if time.monotonic() >= until:
                    raise
            time.sleep(0.1)

    def insist(self, body: str, keys: list[str], args: list[Any]) -> Any:
        """Runs a script until it is confirmed, however long Redis is away or refuses writes."""
        while True:
            try:
                with translating_errors(), suppress(Unconfirmed):  # which is no silence: others may ask as well
                    return self.confirmed(body, keys, args)
            except Unavailable as error:
                if str(error) == SOMETHING_ELSE:
                    raise
            time.sleep(1)
