"""The taskiq peer: the same mail from a coroutine, by aiosmtplib; with KEEP_SESSION through a small pool of sessions.

Its broker is a stream in Redis, which is what taskiq-redis recommends to those who want no task lost.
"""

import os

import welcome
from aiosmtplib import SMTP, SMTPException
from taskiq_redis import RedisStreamBroker

broker = RedisStreamBroker(url=os.environ["REDIS_URL"])
POOL: list[SMTP] = []  # sessions that nobody uses just now; never more than tasks run at once


@broker.task
async def send_welcome(name: str, email: str) -> None:
    mail = welcome.message(name, email)
    if os.environ.get("KEEP_SESSION"):
        await send_in_kept_session(mail)
    else:
        async with session() as relay:
            await relay.send_message(mail)


def session() -> SMTP:
    return SMTP(
        hostname=os.environ["SMTP_HOST"],
        port=int(os.environ["SMTP_PORT"]),
        username=os.environ["SMTP_USERNAME"],
        password=os.environ["SMTP_PASSWORD"],
        start_tls=True,
        tls_context=welcome.TLS,
        local_hostname="localhost",
    )


async def send_in_kept_session(mail: welcome.EmailMessage) -> None:
    if POOL:
        relay = POOL.pop()
        try:
            await relay.send_message(mail)
            POOL.append(relay)
            return
        except SMTPException as error:
            is_dead = not relay.is_connected or getattr(error, "code", 0) == 421
            relay.close()
            if not is_dead:
                raise
    relay = session()
    await relay.connect()
    await relay.send_message(mail)
    POOL.append(relay)
