"""Queues mails for one peer: `fill.py celery|dramatiq|rq N`.

Their recipients are m0@example.com, m1@example.com, and so on, so that the relay can tell them apart.
"""

import os
import sys
from functools import partial

if __name__ == "__main__":
    if sys.argv[1] == "celery":
        from celery_app import send_welcome

        submit = send_welcome.delay
    elif sys.argv[1] == "dramatiq":
        from dramatiq_app import send_welcome

        submit = send_welcome.send
    else:
        from redis import Redis
        from rq import Queue

        submit = partial(Queue(connection=Redis.from_url(os.environ["REDIS_URL"])).enqueue, "welcome.send")
    for number in range(int(sys.argv[2])):
        submit("Ada", f"m{number}@example.com")
