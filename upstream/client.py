"""One upstream: posts a mail's fields under a key until it is answered, so that it is never in doubt.

An Idempotency-Key makes a request safe to repeat: what was asked under it before is answered as it was then. So a lost
answer costs another request, here at once, or in the mail's next attempt.
Resend: https://resend.com/docs/dashboard/emails/idempotency-keys
"""

from __future__ import annotations

import hashlib
import json
import random
import threading
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from process.relays import RelaySettings
from process.version import VERSION
from smtp.policy import Phase, Verdict
from smtp.verdict import Reply
from upstream.answer import reply_of

if TYPE_CHECKING:
    from upstream.wire import Wire

KEY_LIFE = 20 * 3600  # seconds for which a key is surely known: 24 h at Resend, IDEMPOTENCY_TTL at another async-email
AT_ONCE = 4  # requests in one attempt
SHORT = 2  # seconds; a pause that is waited for here, since most upstreams' rates are so many a second
SOON = 0.1  # seconds; a connection may be cut that had been kept, or an earlier request not be answered yet


class Upstream:
    """Says where an upstream is, and keeps the connections there."""

    def __init__(self, one: RelaySettings, timeout: float) -> None:
        self.name = one.name
        self.url = one.url or ""
        self.timeout = timeout  # seconds for a connection
        self._secret = one.api_key.get_secret_value() if one.api_key else ""
        self._wire: Wire | None = None
        self._lock = threading.Lock()

    def __str__(self) -> str:
        at = urlsplit(self.url)
        return f"{at.hostname}:{at.port}" if at.port else str(at.hostname)

    @property
    def identity(self) -> str:
        """Returns what is another for another upstream or account, also of the same name: what was asked under an
        Idempotency-Key is known there alone."""
        account = f"{self.url.rstrip('/')}\n{self._secret}"
        return f"{self.name} {hashlib.sha256(account.encode()).hexdigest()[:16]}"

    def post(self, key: str, body: bytes, deadline: float) -> Reply:
        """Asks the upstream to send a mail, for `deadline` seconds at most. The same key must come with the same
        body. Where one request of several was not answered, only an answer that is about the mail says more."""
        ends, unanswered = time.monotonic() + deadline, None
        for left in reversed(range(AT_ONCE)):
            reply = self._ask("POST", "/emails", ends, body, {"Idempotency-Key": key})
            unanswered = reply if reply.may_have_been_taken else unanswered
            pause = _again_in(reply) * random.uniform(1, 2)  # or all threads would come back at the same moment
            if not (left and pause) or time.monotonic() + pause > ends:
                break
            time.sleep(pause)
        return reply if reply.verdict in (Verdict.ACCEPTED, Verdict.REFUSED) else unanswered or reply

    def check(self, deadline: float) -> Reply:
        """Asks for what needs the key and changes nothing."""
        return self._ask("GET", "/emails?limit=1", time.monotonic() + deadline, wanted="object")

    def _ask(
        self,
        method: str,
        path: str,
        ends: float,
        body: bytes | None = None,
        more: Mapping[str, str] | None = None,
        wanted: str = "id",
    ) -> Reply:
        from upstream.wire import Silent

        headers = {
            "Authorization": f"Bearer {self._secret}",
            "User-Agent": f"async-email/{VERSION}",
            "Accept": "application/json",
            "Accept-Encoding": "identity",
            **({"Content-Type": "application/json"} if body else {}),
            **(more or {}),
        }
        try:
            return reply_of(*self.wire().ask(method, path, headers, body, self.timeout, ends), wanted)
        except Silent as silent:
            phase = Phase.HTTP if silent.connected else Phase.CONNECT
            return Reply(phase, None, str(silent))

    def wire(self) -> Wire:
        from upstream.wire import Wire

        with self._lock:
            self._wire = self._wire or Wire(self.url)
            return self._wire

    def close(self) -> None:
        """Closes the connections that no mail is using."""
        if self._wire:
            self._wire.close()
            self._wire = None


def as_json(fields: Mapping[str, Any]) -> bytes:
    """Returns the body of a request, the same for the same fields."""
    return json.dumps(fields, ensure_ascii=False, separators=(",", ":")).encode()


def _again_in(reply: Reply) -> float:
    """Returns after how many seconds it is worth asking again in this attempt; 0: it is not."""
    if reply.is_being_answered or (reply.may_have_been_taken and (reply.code or 200) < 300):  # or half an answer
        return SOON
    return reply.pause if reply.code == 429 and reply.pause <= SHORT else 0
