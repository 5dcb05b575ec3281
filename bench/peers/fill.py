"""Queues mails for one peer: `fill.py celery|dramatiq|rq|taskiq|postfix N`.

Their recipients are m0@example.com, m1@example.com, and so on, so that the relay can tell them apart.
"""

import asyncio
import os
import smtplib
import sys
from functools import partial

MAILS = [("Ada", f"m{number}@example.com") for number in range(int(sys.argv[2]))]


async def fill_taskiq() -> None:
    from taskiq_app import broker, send_welcome

    await broker.startup()
    for name, email in MAILS:
        await send_welcome.kiq(name, email)
    await broker.shutdown()


def fill_postfix() -> None:
    import welcome

    with smtplib.SMTP("127.0.0.1", int(os.environ["SUBMISSION_PORT"])) as postfix:
        for name, email in MAILS:
            postfix.send_message(welcome.message(name, email))


def fill(peer: str) -> None:
    if peer == "celery":
        from celery_app import send_welcome

        submit = send_welcome.delay
    elif peer == "dramatiq":
        from dramatiq_app import send_welcome

        submit = send_welcome.send
    else:
        from redis import Redis
        from rq import Queue

        submit = partial(Queue(connection=Redis.from_url(os.environ["REDIS_URL"])).enqueue, "welcome.send")
    for name, email in MAILS:
        submit(name, email)


if __name__ == "__main__":
    if sys.argv[1] == "taskiq":
        asyncio.run(fill_taskiq())
    elif sys.argv[1] == "postfix":
        fill_postfix()
    else:
        fill(sys.argv[1])
