"""The final dots of this process that wait for their answer, and how it ends at once without a doubt about any mail."""

from __future__ import annotations

import os
import threading
import time
from typing import NoReturn


class Aborted(Exception):
    """The process is to end at once; the mail was not sent."""


class Dots:
    def __init__(self) -> None:
        self._pending: set[str] = set()
        self._lock = threading.Lock()
        self._aborting = False

    def expect(self, mail_id: str) -> None:
        """Notes that the mail's final dot may go out now, so that its answer is waited for. Raises `Aborted`."""
        with self._lock:
            if self._aborting:
                raise Aborted
            self._pending.add(mail_id)

    def settled(self, mail_id: str) -> None:
        """Forgets a mail whose answer is written down, or that has had no dot."""
        self._pending.discard(mail_id)

    def abort_unsent(self) -> NoReturn:
        """Ends the process as soon as no final dot is unanswered, and lets no other go out. The other mails in hand are
        found like those of a killed worker, and sent by another."""
        with self._lock:
            self._aborting = True
        while self._pending:
            time.sleep(0.05)
        os._exit(0)
