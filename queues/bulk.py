"""Lets bulk mail into the queue `email` as far as that is short, so that other mail finds a short queue.

A mail of priority `bulk` is accepted into a list of its own, `rq:queue:bulk`, from which no worker takes: RQ's workers
have one queue each, and with two RQ loses the job that a killed worker had just taken. Every worker pool feeds it over
once a second.
"""

from __future__ import annotations

import math

from queues import keys
from queues.connection import Redis, Script
from queues.table import BULK, EMAIL

# KEYS: the queue, bulk. ARGV: how many jobs the queue may have, how many to move at most.
FEED = """
for _ = 1, math.min(ARGV[1] - redis.call('LLEN', KEYS[1]), ARGV[2]) do
  if not redis.call('LMOVE', KEYS[2], KEYS[1], 'LEFT', 'RIGHT') then return end
end
"""


class Bulk:
    def __init__(self, redis: Redis, most: int) -> None:
        self._feed = Script(redis, FEED)
        self.most = most

    def feed(self, at_most: float = math.inf) -> None:
        """Moves the oldest bulk mails to the end of the queue until `most` jobs wait there, or so many are moved.
        Raises redis-py's errors."""
        self._feed([keys.queue(EMAIL), keys.queue(BULK)], [self.most, min(at_most, self.most)])
