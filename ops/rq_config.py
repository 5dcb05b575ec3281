"""Gives the `rq` command the Redis of this installation: `rq info -c ops.rq_config`, in the folder of the code.

The settings of the services are read, for which a server wants root. Where REDIS_URL names Sentinels, most of them say
where the primary is as the command starts, and in a cluster any server does; after a failover, start it again. rq's own
way to Sentinels (SENTINEL) takes the word of the first that answers, which may be cut off together with an old primary.
RQ: https://python-rq.org/docs/workers/#using-a-config-file
"""

from __future__ import annotations

import sys
from pathlib import Path
from urllib.parse import urlsplit, urlunsplit

from ops.checks import configuration
from ops.checks.target import Target
from process.redis_url import Place, RedisUrl
from queues.connection import Unavailable, connect, translating_errors
from queues.keys import TAG


def redis_url() -> str:
    """Returns REDIS_URL as redis-py takes it. Ends the command, and says why, where there is none to be had."""
    settings = configuration.load_for(Target(Path(__file__).parent.parent), "rq")
    if not settings:
        sys.exit(1)
    plain, sentinels = RedisUrl.parse(settings.redis)
    if not sentinels and not TAG:
        return plain
    try:
        with translating_errors():
            primary = connect(settings.redis).connection_pool.get_connection()
    except Unavailable as error:
        sys.exit(f"{error}; bin/doctor says more")
    parts = urlsplit(plain)
    login, mark, _ = parts.netloc.rpartition("@")
    return urlunsplit(parts._replace(netloc=f"{login}{mark}{Place(primary.host, primary.port)}"))


REDIS_URL = redis_url()
