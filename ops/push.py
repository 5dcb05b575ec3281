"""Pushes a message about the service to people: to ALERT_URL over HTTP, and to ALERT_TO by mail.

ALERT_URL is an incoming webhook of Slack, a topic of ntfy, or anything that takes JSON. The mail goes straight to the
relay and not through the queue, since the queue may be what stands. Each way has a thread and tries again by itself: no
other waits for it. Nothing is logged of the URL, the address and the words.
Slack: https://docs.slack.dev/messaging/sending-messages-using-incoming-webhooks/  ntfy: https://docs.ntfy.sh/publish/
"""

from __future__ import annotations

import base64
import json
import logging
import re
import ssl
import threading
import time
import urllib.request
from collections.abc import Callable
from contextlib import suppress
from datetime import datetime, timezone
from http.client import HTTPException
from typing import Any, Literal, NamedTuple
from urllib.error import HTTPError, URLError
from urllib.parse import SplitResult, unquote, urlsplit

from mail.address import Mailbox
from mail.index import new_id
from mail.message import Message, message_id
from process.log import emit
from process.relays import RelaySettings
from settings import Settings, SettingsError
from smtp.policy import Verdict
from smtp.verdict import Outcome, Reply

SERVICE = "async-email"
TIMEOUT = 8.0  # seconds for one answer of ALERT_URL, or of the relay
BACKOFF = (5, 30, 60, 300)  # seconds until the next try; the last one again and again
WORTH = 86400  # seconds for which a message is tried

Status = Literal["begins", "ended", "test"]


class News(NamedTuple):
    """A message: that something begins, or that it has ended. `since` is in seconds since 1970."""

    status: Status
    kind: str
    level: str
    text: str
    since: float
    host: str

    def fields(self) -> dict[str, str]:
        since = datetime.fromtimestamp(self.since, timezone.utc).isoformat(timespec="seconds")
        return self._asdict() | {"since": since, "service": SERVICE}


class NotPushed(Exception):
    """It did not arrive. The text is why, without URL, address or words."""


class NoRedirect(urllib.request.HTTPRedirectHandler):
    """Follows no redirect: the message is for the host that ALERT_URL names."""

    def redirect_request(self, *_: Any) -> None:
        return None


def to_url(url: str, news: News) -> None:
    """Posts the message. Raises `NotPushed`."""
    try:
        with urllib.request.build_opener(NoRedirect).open(request(url, news), timeout=TIMEOUT):
            return
    except HTTPError as error:
        error.close()
        raise NotPushed(f"HTTP {error.code}") from None
    except (OSError, HTTPException, ValueError) as error:
        raise NotPushed(_reason(error)) from None


def _reason(error: Exception) -> str:
    cause = error.reason if isinstance(error, URLError) else error
    if isinstance(cause, ssl.SSLCertVerificationError):
        return "its certificate is not valid"
    if isinstance(cause, TimeoutError):
        return "timed out"
    return getattr(cause, "strerror", None) or type(cause).__name__


def request(url: str, news: News) -> urllib.request.Request:
    """Returns the message as the host that the URL names understands it."""
    at = urlsplit(url)
    place = at._replace(netloc=at.netloc.rpartition("@")[2]).geturl()
    login = _login(at)
    if (at.hostname or "").endswith("slack.com"):
        escaped = news.text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
        return _json(place, {"text": escaped}, login)
    if re.match(r"ntfy\b", at.hostname or "") or at.path.startswith("/ntfy/"):
        urgent, sign = (news.status == "begins" and news.level == "bad"), "rotating_light"
        headers = {"Title": title(news), "Priority": "high" if urgent else "default"}
        headers["Tags"] = sign if news.status == "begins" else "white_check_mark"
        return urllib.request.Request(place, news.text.encode(), login | headers)
    return _json(place, news.fields(), login)


def _login(at: SplitResult) -> dict[str, str]:
    if not at.username:
        return {}
    login = f"{unquote(at.username)}:{unquote(at.password or '')}".encode()
    return {"Authorization": f"Basic {base64.b64encode(login).decode()}"}


def _json(place: str, body: dict[str, str], headers: dict[str, str]) -> urllib.request.Request:
    return urllib.request.Request(place, json.dumps(body).encode(), headers | {"Content-Type": "application/json"})


def title(news: News) -> str:
    what = {"begins": "needs attention", "ended": "is over", "test": "test"}[news.status]
    host = news.host.encode("ascii", "replace").decode()
    return f"{SERVICE} on {host}: {'' if news.status == 'test' else f'{news.kind} '}{what}"


def by_mail(settings: Settings, news: News) -> None:
    """Hands the message to the relay. Raises `NotPushed`."""
    to = Mailbox("", settings.alert_to or "")
    sender = Mailbox.parse(settings.mail_from) if settings.mail_from else to
    headers = {"Auto-Submitted": "auto-generated"}  # RFC 3834
    mail, why = (
        Message(sender, [to], [], [], [], title(news), text=f"{news.text}\n", headers=headers),
        "no relay is set",
    )
    mail_id = new_id()
    for one in settings.all_relays:
        reply = (_posted if one.kind == "resend" else _sent)(settings, one, mail, mail_id)
        if reply.verdict in (Verdict.ACCEPTED, Verdict.IN_DOUBT):  # rather none than two
            return
        why = reply.summary
        if reply.verdict is not Verdict.TROUBLE or reply.may_have_been_taken:
            break
    raise NotPushed(why)


def _sent(settings: Settings, one: RelaySettings, mail: Message, mail_id: str) -> Reply:
    # Here, since few dashboards have mail to send, and none has it often.
    from mail.dkim import Signer
    from mail.mime import to_mime
    from smtp.envelope import Envelope
    from smtp.pool import SessionPool
    from smtp.relay import Relay

    mime = to_mime(mail, message_id(mail_id, mail.sender), datetime.now(timezone.utc))
    with suppress(SettingsError):  # a key that is none stops the workers, which is news itself
        mime = signer.signed(mime) if (signer := Signer.of(settings)) else mime
    envelope, pool = Envelope(mail.sender.address, mail.recipients, mail.needs_smtputf8), SessionPool()
    relay = Relay.of(settings, one)._replace(timeout=TIMEOUT, deadline=4 * TIMEOUT)
    try:
        with pool.conversation(relay) as talk:
            said = talk.begin(envelope, mime)
            while not isinstance(said, Outcome):
                said = talk.finish()
    finally:
        pool.close_all()
    return said.reply


def _posted(_: Settings, one: RelaySettings, mail: Message, mail_id: str) -> Reply:
    from mail.posted import fields_of
    from upstream.client import Upstream, as_json

    upstream, body = Upstream(one, TIMEOUT), as_json(fields_of(mail, message_id(mail_id, mail.sender), mail.recipients))
    try:
        return upstream.post(mail_id, body, 4 * TIMEOUT)
    finally:
        upstream.close()


def ways(settings: Settings) -> dict[str, Callable[[News], None]]:
    """Returns how people are told: what pushes a message, by the name of its setting."""
    found: dict[str, Callable[[News], None]] = {}
    if settings.alert_url:
        url = settings.alert_url.get_secret_value()
        found["ALERT_URL"] = lambda news: to_url(url, news)
    if settings.alert_to:
        found["ALERT_TO"] = lambda news: by_mail(settings, news)
    return found


class Outlet:
    """Pushes messages one way, in order, each until it has arrived or is a day old. What has ended before anybody was
    told that it begins is one message."""

    def __init__(self, name: str, push: Callable[[News], None]) -> None:
        self.name, self.push = name, push
        self.waiting: list[tuple[News, float]] = []  # and until when it is worth a try, of time.monotonic()
        self.changed = threading.Condition()
        self.thread: threading.Thread | None = None
        self.pushing: News | None = None

    def put(self, news: News) -> None:
        with self.changed:
            if news.status == "ended":
                stale = (news.kind, "begins")
                self.waiting = [
                    one for one in self.waiting if (one[0].kind, one[0].status) != stale or one[0] is self.pushing
                ]
            self.waiting.append((news, time.monotonic() + WORTH))
            if not self.thread or not self.thread.is_alive():
                self.thread = threading.Thread(target=self._run, name=f"alerts by {self.name}", daemon=True)
                self.thread.start()

    def _run(self) -> None:
        failures = 0
        while True:
            with self.changed:
                if not self.waiting:
                    self.thread = None
                    return
                news, until = self.waiting[0]
                self.pushing = news
            why = self._try(news)
            with self.changed:
                self.pushing = None
                pause = BACKOFF[min(failures, len(BACKOFF) - 1)]
                over = not why or time.monotonic() + pause > until
                if over:
                    self.waiting = [one for one in self.waiting if one[0] is not news]
            if not why:
                failures = 0
                emit("alert_sent", to=self.name, kind=news.kind, status=news.status)
                continue
            again = None if over else f"{pause}s"
            emit("alert_failed", logging.WARNING, to=self.name, kind=news.kind, reason=why, next_in=again)
            failures += 1
            time.sleep(pause)

    def _try(self, news: News) -> str:
        """Returns why it was not pushed, or "" if it was."""
        try:
            self.push(news)
        except NotPushed as error:
            return str(error)
        except Exception as error:  # whatever it was, it holds words of the message, perhaps
            return type(error).__name__
        return ""
