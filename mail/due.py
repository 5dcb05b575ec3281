"""When a mail is to be sent, and until when: what was asked for, held against the clock."""

from __future__ import annotations

from datetime import datetime, timedelta, timezone

from mail.moments import LONGEST_DELAY
from mail.request import FieldError, Invalid


class Expired(Invalid):
    """Nothing is wrong with the request except that its `expires_at` or `scheduled_at` has passed."""


def timed(scheduled_at: datetime | timedelta | None, expires_at: datetime | None) -> datetime | None:
    """Returns when the mail is to be sent, if not now. Raises `Invalid`, or `Expired`."""
    at = scheduled(scheduled_at) if scheduled_at is not None else None
    if expires_at and expires_at <= datetime.now(timezone.utc):
        raise Expired(FieldError("expires_at", "must be in the future"))
    if expires_at and at and expires_at <= at:
        raise Invalid(FieldError("expires_at", "must be after scheduled_at"))
    return at


def scheduled(asked: datetime | timedelta) -> datetime:
    """Returns the moment that was asked for. Raises `Invalid`, or `Expired` if it has passed."""
    now = datetime.now(timezone.utc)
    moment = now + asked if isinstance(asked, timedelta) else asked
    if moment <= now:
        raise Expired(FieldError("scheduled_at", "must be in the future"))
    if moment > now + LONGEST_DELAY:
        raise Invalid(FieldError("scheduled_at", f"must be within {LONGEST_DELAY.days} days"))
    return moment
