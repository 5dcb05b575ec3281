"""The Celery peer: Redis is its broker and keeps its results.

Everything else is as it comes.
"""

import os

import welcome
from celery import Celery

app = Celery("celery_app", broker=os.environ["REDIS_URL"], backend=os.environ["REDIS_URL"])


@app.task
def send_welcome(name: str, email: str) -> None:
    welcome.send(name, email)
