"""The dramatiq peer: the same function as an actor.

Redis is its broker; everything else is as it comes.
"""

import os

import dramatiq
import welcome
from dramatiq.brokers.redis import RedisBroker

dramatiq.set_broker(RedisBroker(url=os.environ["REDIS_URL"]))


@dramatiq.actor
def send_welcome(name: str, email: str) -> None:
    welcome.send(name, email)
