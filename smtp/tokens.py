"""The token with which all workers log in at a relay: made once, kept in Redis, renewed by one of them in good time.

`<relay>:token` (hash) has it, until when it is good, from when it is to be renewed, a digest of its grant, the refresh
token that has taken the place of the grant's own, and for some seconds why there is none.
`<relay>:renewing` is who renews it. Moments are of Redis' clock, in ms. Like mail, both are in Redis in clear.
"""

from __future__ import annotations

import secrets
import time
from contextlib import suppress
from typing import Any

from process.grants import Grant
from queues.connection import Redis, RedisError, Script
from smtp import oauth
from smtp.oauth import NoToken, Refused, Token

EARLY = 300  # seconds before its end that a token is renewed, but no more than a tenth of its life
HELD = 2 * oauth.LIMIT + 5  # seconds after which a worker that renews is given up; it asks twice at most
WAIT = HELD + 5  # seconds for which another waits for it
UNPROVEN = 60  # seconds for which a token that no login has proven is not replaced: the next would fare no better
AGAIN = 5  # seconds after a failure in which the token server is not asked again
KEPT = 100 * 86400  # seconds; the providers keep a refresh token that nobody uses for 90 days

HEAD = """
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local function field(name) return redis.call('HGET', KEYS[1], name) end
local function moment(name) return tonumber(field(name) or 0) or 0 end
local function begin()  -- what is there of another grant is of no use
  if field('grant') ~= ARGV[1] then
    redis.call('DEL', KEYS[1])
    redis.call('HSET', KEYS[1], 'grant', ARGV[1])
  end
end
local function let_go() if redis.call('GET', KEYS[2]) == ARGV[2] then redis.call('DEL', KEYS[2]) end end
"""  # KEYS: token, renewing. ARGV: the grant, then what each script says.
# ARGV: whose turn, for how long in ms. Returns what to do: `use` the token (and whether it is proven), `renew` it (with
# this refresh token; the token may do meanwhile), `wait` for who does, or that it has `failed` a moment ago.
TAKE = """
local ours = field('grant') == ARGV[1]
local token = ours and moment('ends') > now and field('token') or ''
local use = {'use', token, field('proven') or ''}
if token ~= '' and moment('renews') > now then return use end
if ours and moment('why_until') > now then return token ~= '' and use or {'failed', field('why') or ''} end
if redis.call('SET', KEYS[2], ARGV[2], 'NX', 'PX', ARGV[3]) then
  return {'renew', token, ours and field('refresh') or ''}
end
return token ~= '' and use or {'wait'}
"""
# ARGV: whose turn, token, its life and how early to renew it in ms, refresh token or "", for how long to keep it in ms.
STORE = """
begin()
redis.call('HSET', KEYS[1], 'token', ARGV[3], 'issued', now, 'ends', now + ARGV[4], 'renews', now + ARGV[4] - ARGV[5])
redis.call('HDEL', KEYS[1], 'proven', 'why', 'why_until')
if ARGV[6] ~= '' then redis.call('HSET', KEYS[1], 'refresh', ARGV[6]) end
redis.call('PEXPIRE', KEYS[1], ARGV[7])
let_go()
"""
FAILED = """
begin()
redis.call('HSET', KEYS[1], 'why', ARGV[3], 'why_until', now + ARGV[4])
let_go()
"""  # ARGV: whose turn, why, for how long nobody asks again in ms
# ARGV: the token. Returns whether it is worth asking for another.
DROP = """
if field('grant') ~= ARGV[1] or field('token') ~= ARGV[2] then return 1 end
if not field('proven') and moment('issued') + ARGV[3] > now then return 0 end
redis.call('HDEL', KEYS[1], 'token', 'ends', 'renews', 'issued', 'proven')
return 1
"""
PROVEN = "if field('token') == ARGV[2] then redis.call('HSET', KEYS[1], 'proven', '1') end"


class Tokens:
    """Gets tokens of one grant, together with all other processes. Raises `NoToken`, and redis-py's errors unless
    `even_alone`: then it asks for one of its own where Redis is away."""

    def __init__(self, redis: Redis, grant: Grant, relay: str = "relay", even_alone: bool = False) -> None:
        self.grant = grant
        self.even_alone = even_alone
        self.keys = [f"{relay}:token", f"{relay}:renewing"]
        self._take, self._store, self._failed, self._drop, self._prove = (
            Script(redis, HEAD + one) for one in (TAKE, STORE, FAILED, DROP, PROVEN)
        )
        self._unproven = ""

    def take(self) -> str:
        """Returns a token that is good now, as far as anybody knows."""
        try:
            return self._shared()
        except RedisError:
            if self.even_alone:
                return self._ask("").text
            raise

    def refused(self, token: str) -> bool:
        """Forgets a token that the relay has not taken though it has not ended, so that it is renewed, once. Returns
        whether another is worth a try."""
        return bool(self._run(self._drop, token, int(UNPROVEN * 1000)))

    def accepted(self, token: str) -> None:
        """Takes note that the relay takes this token: once for each."""
        if self._unproven == token:
            with suppress(RedisError):
                self._run(self._prove, token)
            self._unproven = ""

    def _run(self, script: Script, *args: Any) -> Any:
        try:
            return script(self.keys, [self.grant.digest, *args])
        except RedisError:
            if self.even_alone:
                return None
            raise

    def _shared(self) -> str:
        turn, until = secrets.token_hex(8), time.monotonic() + WAIT
        said: list[str]
        while time.monotonic() < until:
            said = [one.decode() for one in self._take(self.keys, [self.grant.digest, turn, int(HELD * 1000)])]
            if said[0] == "use":
                self._unproven = said[1] if not said[2] else ""
                return said[1]
            if said[0] == "renew":
                return self._renew(turn, said[1], said[2])
            if said[0] == "failed":
                raise NoToken(said[1])
            time.sleep(0.1)
        raise NoToken("no token: another worker has not come by one")

    def _renew(self, turn: str, good_meanwhile: str, refresh: str) -> str:
        try:
            new = self._ask(refresh)
        except NoToken as why:
            self._failed(self.keys, [self.grant.digest, turn, str(why), int(AGAIN * 1000)])
            if good_meanwhile:
                return good_meanwhile
            raise
        life, early = int(new.life * 1000), int(min(EARLY, new.life / 10) * 1000)
        args = [self.grant.digest, turn, new.text, life, early, new.refresh_token, int(KEPT * 1000)]
        self._store(self.keys, args)
        self._unproven = new.text
        return new.text

    def _ask(self, refresh: str) -> Token:
        """Asks with the refresh token that is in Redis; if it is refused, with the grant's own, which may be newer than
        a Redis that was restored."""
        try:
            return oauth.token_from(self.grant.url, self.grant.request(refresh))
        except Refused as error:
            if error.code != "invalid_grant" or refresh in ("", self.grant.own_refresh_token):
                raise
            return oauth.token_from(self.grant.url, self.grant.request())
