"""Limits how often something may be done: by all processes and machines on one Redis together.

A bucket of one period's requests fills up evenly, as in the generic cell rate algorithm (ITU-T I.371): `600/m` lets 600
go at once, and then ten a second. It is one key, `limit:NAME`: the moment, in ms, at which the bucket is full again.
"""

from __future__ import annotations

from process.values import Rate
from queues import keys
from queues.connection import Redis, Script, translating_errors

# KEYS: the bucket. ARGV: how many, in how many ms. Returns for how many ms to wait; 0: it may be done, and is counted.
TAKE = """
local time = redis.call('TIME')
local now = time[1] * 1000 + time[2] / 1000
local full = math.max(now, tonumber(redis.call('GET', KEYS[1]) or '0')) + ARGV[2] / ARGV[1]
local wait = math.ceil(full - now - ARGV[2])
if wait > 0 then return wait end
redis.call('SET', KEYS[1], string.format('%.3f', full), 'PX', math.ceil(full - now))
return 0
"""


class Limits:
    def __init__(self, redis: Redis) -> None:
        self._take = Script(redis, TAKE)

    def take(self, name: str, rate: Rate) -> float:
        """Returns for how many seconds to wait; 0: it may be done now, and is counted. Raises `Unavailable`."""
        with translating_errors():
            return int(self._take([f"{keys.TAG}limit:{name}"], [rate.most, rate.seconds * 1000])) / 1000
