"""Queues mails for one peer: `fill.py celery|dramatiq N`.

Their recipients are m0@example.com, m1@example.com, and so on, so that the relay can tell them apart.
"""

import sys

if __name__ == "__main__":
    if sys.argv[1] == "celery":
        from celery_app import send_welcome

        submit = send_welcome.delay
    else:
        from dramatiq_app import send_welcome

        submit = send_welcome.send
    for number in range(int(sys.argv[2])):
        submit("Ada", f"m{number}@example.com")
