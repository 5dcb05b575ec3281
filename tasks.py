"""The functions that RQ calls by name: `deliver`, and your own tasks for `POST /jobs`.

A function's name is a wire format: a job queued before an upgrade names it after.

To offer a task, write a function with type hints at the end of this file and decorate it with `@task`. Its arguments
are checked against the hints at the door (422 with the field) and again here. It must bear being run twice: a worker
that is killed leaves a job that RQ starts again. What it returns must be JSON; all who may read jobs see it. With
`@task(cron="0 7 * * *")` it is also queued by itself.
"""

from __future__ import annotations

from collections import Counter
from datetime import datetime, timezone
from typing import Annotated, Any

from pydantic import Field

from queues.offer import OFFERED as OFFERED  # all of this file that carries @task, for service.py and worker.py
from queues.offer import each_minute, task


def deliver(mail_id: str) -> object:
    """Makes one attempt at one mail; mail.delivery does it. Every job of the queue `email` names this function."""
    from mail import delivery  # here, since neither the API nor the worker for `jobs` sends mail

    return delivery.current().deliver(mail_id)


@task(timeout=60)
def why_failed(hours: Annotated[int, Field(ge=1, le=24 * 14)] = 24) -> dict[str, int]:
    """Counts the mails that failed in the last `hours`, by reason: `{"550 at rcpt": 3}`."""
    from mail import delivery  # see `deliver`

    since = datetime.now(timezone.utc).timestamp() - hours * 3600
    return dict(Counter(delivery.current().outbox.failures(since)).most_common())


@each_minute(needs="bounce_imap_url")
def read_reports() -> dict[str, Any]:
    """Reads the bounces and complaints that are new in the mailbox of BOUNCE_IMAP_URL."""
    from mail import delivery, mailboxes  # see `deliver`

    return mailboxes.read_reports(delivery.current().outbox)


@each_minute(needs="doubt_imap_url")
def resolve_doubt() -> dict[str, Any]:
    """Settles mail in doubt that is in the folder of DOUBT_IMAP_URL."""
    from mail import delivery, mailboxes  # see `deliver`

    return mailboxes.resolve_doubt(delivery.current().outbox)
