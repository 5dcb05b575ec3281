"""The mail catcher of `bin/dev`: SMTP comes in, nothing goes out, and a page shows what would have been sent.

    python -m ops.catcher [--smtp-port 1025] [--mail-port 8025] [--api-port 8000] [--chaos PERCENT]

Accepts every mail, however malformed, but to addresses that fail on purpose (failing.py); keeps the last 500 (256 MiB
at most) in memory with their bytes as they came, and shows each as well as possible. A caught mail is hostile: its text
is escaped, its HTML runs no script and loads nothing from anywhere; no address or subject is logged. `GET /messages`
lists the mails as JSON, the oldest first; `GET /messages/{n}.eml` is one as received. Accepts any login. Refuses TLS,
mails over 64 MiB, every interface except 127.0.0.1, and what a page of another site may send (web/hosts.py). SMTP is
RFC 5321 with SIZE, 8BITMIME (6152) and SMTPUTF8 (6531).
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import re
import secrets
import signal
import socket
import sys
from base64 import b64encode
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from email.utils import getaddresses, parseaddr
from functools import partial
from pathlib import Path
from threading import Lock, Thread
from typing import Any, cast
from urllib.parse import quote, unquote

import aiosmtpd.smtp
import bottle
from aiosmtpd.smtp import SMTP, AuthResult
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from waitress.server import create_server

from ops import failing
from ops.failing import KINDS, Failures, Kind, percentage
from ops.mailparts import CID, MAIL_CSP, Content, framed, readable, take_apart
from web.hosts import ALLOWED, add_flag, is_local, is_same_origin

KEPT = 500
KEPT_BYTES = 256 * 2**20
SIZE_LIMIT = 64 * 2**20

TABS = ("html", "text", "headers", "source")
SHARES = (0, 10, 25, 50, 100)  # percent of all mails, for the page's switch
PAGE_CSP = (
    "default-src 'none'; style-src 'nonce-{0}'; script-src 'nonce-{0}'; connect-src 'self'; frame-src 'self'; "
    "img-src data:; form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
)
HEADERS = {
    "Cache-Control": "no-store",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "same-origin",  # with no-referrer, browsers send our own form with Origin: null
    "X-Content-Type-Options": "nosniff",
    "X-DNS-Prefetch-Control": "off",
}

# Our Message-ID begins with the mail's id.
OUR_MESSAGE_ID = re.compile(r"<([0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12})@[^>]*>")

log = logging.getLogger("ops.catcher")


@dataclass(frozen=True)
class Mail:
    """A caught mail: the envelope as the client gave it, the bytes as they came, and what they hold."""

    n: int
    received_at: datetime
    envelope_from: str
    envelope_to: list[str]
    raw: bytes
    content: Content

    def header(self, name: str) -> str | None:
        return next((value for key, value in self.content.headers if key.lower() == name), None)

    @property
    def id(self) -> str | None:
        """Returns the id by which our API knows the mail."""
        ours = OUR_MESSAGE_ID.fullmatch(self.header("message-id") or "")
        return ours[1] if ours else None

    @property
    def sender(self) -> str:
        """Returns the sender as a person would name it."""
        name, address = parseaddr(self.header("from") or "")
        return name or address or self.header("from") or self.envelope_from or "(no sender)"

    @property
    def clock(self) -> str:
        """Returns the time of day, or the day if that is not today."""
        here, now = self.received_at.astimezone(), datetime.now().astimezone()
        return f"{here:%H:%M:%S}" if here.date() == now.date() else f"{here:%d %b}"

    @property
    def blind(self) -> set[str]:
        """Returns the recipients that no header names: Bcc."""
        named = {address.lower() for _, address in getaddresses([self.header("to") or "", self.header("cc") or ""])}
        return {address for address in self.envelope_to if address.lower() not in named}

    @property
    def framed_html(self) -> str:
        """Returns the HTML with its inline images, for a frame with MAIL_CSP."""

        def inline(match: re.Match[str]) -> str:
            image = self.content.images.get(unquote(match[1]))
            return f"data:{image.content_type};base64,{b64encode(image.data).decode()}" if image else match[0]

        return framed(CID.sub(inline, self.content.html or ""))

    def summary(self) -> dict[str, Any]:
        """Returns the mail as `GET /messages` lists it. A header that it lacks is null."""
        return {
            "n": self.n,
            "id": self.id,
            "received_at": self.received_at.isoformat(timespec="milliseconds"),
            "envelope_from": self.envelope_from,
            "envelope_to": self.envelope_to,
            **{name.replace("-", "_"): self.header(name) for name in ("from", "to", "cc", "subject", "message-id")},
            "size": len(self.raw),
            "attachments": [part.name for part in self.content.attachments],
            "text": self.content.text,
            "html": self.content.html,
        }


class Inbox:
    """The last mails, in the order they came. Thread-safe: `mails` is replaced and never changed."""

    def __init__(self) -> None:
        self.mails: tuple[Mail, ...] = ()
        self._caught = 0
        self._born = secrets.token_hex(4)
        self._lock = Lock()

    def catch(self, envelope_from: str, envelope_to: Sequence[str], raw: bytes) -> Mail:
        content = take_apart(raw)
        sender, recipients = readable(envelope_from), [readable(address) for address in envelope_to]
        with self._lock:
            self._caught += 1
            mail = Mail(self._caught, datetime.now(timezone.utc), sender, recipients, raw, content)
            kept = [*self.mails, mail][-KEPT:]
            while sum(len(one.raw) for one in kept) > KEPT_BYTES:
                del kept[0]
            self.mails = tuple(kept)
        return mail

    def clear(self) -> None:
        """Forgets all mails, but not the last number, so that no link ever shows another mail."""
        with self._lock:
            self.mails = ()

    @property
    def version(self) -> str:
        """Returns an ETag that changes whenever the list does, also by a restart."""
        return f'"{self._born}-{max((mail.n for mail in self.mails), default=0)}"'


TEMPLATES = Environment(
    loader=FileSystemLoader(Path(__file__).parent),
    autoescape=True,
    trim_blocks=True,
    lstrip_blocks=True,
    undefined=StrictUndefined,
)


def render(template: str, **values: Any) -> str:
    nonce = secrets.token_urlsafe(16)
    bottle.response.set_header("Content-Security-Policy", PAGE_CSP.format(nonce))
    return TEMPLATES.get_template(template).render(nonce=nonce, **values)


def guard(names: Collection[str]) -> None:
    """Refuses what a browser sends for another site, whose name may point here and whose forms may be posted here. No
    browser posts without Origin, so without it it is curl."""
    header = bottle.request.get_header
    if not is_local(header("Host", ""), names):
        raise bottle.HTTPError(421, f"{ALLOWED[0].upper()}{ALLOWED[1:]}.")
    from_curl = header("Origin") is None and header("Sec-Fetch-Site") is None
    if bottle.request.method == "POST" and not (from_curl or is_same_origin(header)):
        raise bottle.HTTPError(403, "The request must come from the mail catcher's own page.")


def add_headers() -> None:
    for name, value in HEADERS.items():
        bottle.response.headers.setdefault(name, value)


class Site:
    """Answers the routes of `make_app`."""

    def __init__(self, inbox: Inbox, failures: Failures, api: str) -> None:
        self.inbox, self.failures, self.api = inbox, failures, api

    def find(self, n: int) -> Mail:
        for mail in self.inbox.mails:
            if mail.n == n:
                return mail
        raise bottle.HTTPError(404, f"There is no mail {n} here. It may have been cleared.")

    def page(self, n: int | None = None) -> Any:
        mail = None if n is None else self.find(n)
        version = self.inbox.version  # before the list: what comes in between is seen at the next poll
        if bottle.request.get_header("If-None-Match") == version:
            return bottle.HTTPResponse(status=304)
        mails, tab = self.inbox.mails[::-1], bottle.request.query.tab
        if mail and tab not in TABS:
            tab = "text" if mail.content.html is None else "html"
        shown = {"version": version, "mails": mails, "mail": mail, "tab": tab, "tabs": TABS, "kept": KEPT}
        return render(
            "catcher_page.html", **shown, kinds=KINDS.values(), chaos=self.failures.chaos, shares=SHARES, api=self.api
        )

    def html(self, n: int) -> str:
        mail = self.find(n)
        if mail.content.html is None:
            raise bottle.HTTPError(404, f"Mail {n} has no HTML.")
        bottle.response.set_header("Content-Security-Policy", MAIL_CSP)
        bottle.response.set_header("Referrer-Policy", "no-referrer")
        return mail.framed_html

    def eml(self, n: int) -> bytes:
        return download(f"message-{n}.eml", "message/rfc822", self.find(n).raw)

    def attachment(self, n: int, number: int) -> bytes:
        attachments = self.find(n).content.attachments
        if not 0 < number <= len(attachments):
            raise bottle.HTTPError(404, f"Mail {n} has no attachment {number}.")
        part = attachments[number - 1]
        return download(part.name, "application/octet-stream", part.data)

    def clear(self) -> None:
        self.inbox.clear()
        self.failures.forget()
        bottle.redirect("/", 303)

    def set_chaos(self) -> None:
        try:
            self.failures.chaos = percentage(bottle.request.forms.get("percent", ""))
        except argparse.ArgumentTypeError as error:
            raise bottle.HTTPError(400, f"percent {error}.") from None
        log.info("chaos percent=%d", self.failures.chaos)
        bottle.redirect("/", 303)


def download(name: str, content_type: str, data: bytes) -> bytes:
    plain = re.sub(r"[^A-Za-z0-9._-]", "_", name)
    disposition = f"attachment; filename=\"{plain}\"; filename*=UTF-8''{quote(name, safe='')}"
    bottle.response.headers.update({"Content-Type": content_type, "Content-Disposition": disposition})
    return data


def make_app(inbox: Inbox, failures: Failures, api: str, names: Collection[str] = ()) -> Any:
    site, app = Site(inbox, failures, api), bottle.Bottle()
    app.route(["/", "/messages/<n:int>"], callback=site.page)
    app.route("/healthz", callback=lambda: "ok\n")
    app.route("/messages", callback=lambda: {"messages": [mail.summary() for mail in inbox.mails]})
    app.route("/messages/<n:int>.eml", callback=site.eml)
    app.route("/messages/<n:int>/html", callback=site.html)
    app.route("/messages/<n:int>/attachments/<number:int>", callback=site.attachment)
    app.route("/clear", "POST", site.clear)
    app.route("/chaos", "POST", site.set_chaos)
    app.add_hook("before_request", partial(guard, names))
    app.add_hook("after_request", add_headers)
    app.default_error_handler = lambda error: render(
        "catcher_error.html", status=error.status_line, sentence=error.body
    )
    return app


class Envelope(aiosmtpd.smtp.Envelope):
    """aiosmtpd's, and how the mail fails on purpose."""

    def __init__(self) -> None:
        super().__init__()
        self.drawn: Kind | None = None
        self.at_dot: set[Kind] = set()


class Handler:
    """aiosmtpd's handler. Logs one line per mail, which says where to look and nothing of what is in it."""

    def __init__(self, inbox: Inbox, failures: Failures, page: str) -> None:
        self.inbox, self.failures, self.page = inbox, failures, page

    async def handle_MAIL(
        self, _server: object, _session: object, envelope: Envelope, address: str, options: list[str]
    ) -> str:
        envelope.mail_from, envelope.drawn = address, self.failures.draw()
        envelope.mail_options.extend(options)
        return "250 OK"

    async def handle_RCPT(
        self, _server: object, _session: object, envelope: Envelope, address: str, options: list[str]
    ) -> str:
        for kind in filter(None, (envelope.drawn, self.failures.of_address(address))):
            if not kind.at_dot:
                log.info("refused a recipient as %s: %s", kind.name, kind.reply)
                return kind.reply
            envelope.at_dot.add(kind)
        envelope.rcpt_tos.append(address)
        envelope.rcpt_options.extend(options)
        return "250 OK"

    async def handle_DATA(self, server: SMTP, _session: object, envelope: Envelope) -> str:
        raw = envelope.original_content or b""
        for kind in envelope.at_dot:
            if kind.reply:
                log.info("refused a mail as %s: %s", kind.name, kind.reply)
                return kind.reply
        if KINDS["slow"] in envelope.at_dot:
            await asyncio.sleep(failing.SLOWNESS)
        seen = {mail.header("message-id") for mail in self.inbox.mails}
        mail = self.inbox.catch(envelope.mail_from or "", envelope.rcpt_tos, raw)
        log.info("caught message n=%d size=%d %s/messages/%d", mail.n, len(raw), self.page, mail.n)
        if KINDS["doubt"] in envelope.at_dot and mail.header("message-id") not in seen:
            log.info("left it in doubt: hung up instead of an answer")
            cast(asyncio.WriteTransport, server.transport).abort()
            await asyncio.sleep(60)  # until aiosmtpd cancels it
        return f"250 OK caught as {mail.n}"


class Session(SMTP):
    line_length_limit = SIZE_LIMIT  # a relay refuses lines over 998 bytes; here they are shown

    def _create_envelope(self) -> Envelope:
        return Envelope()


def serve_smtp(listener: socket.socket, handler: Handler) -> None:
    """Runs forever. Not aiosmtpd's Controller, which takes 5 s to notice that a port is taken."""
    loop = asyncio.new_event_loop()
    session = partial(
        Session,
        handler,
        data_size_limit=SIZE_LIMIT,
        enable_SMTPUTF8=True,
        hostname="localhost",  # without it, aiosmtpd asks the DNS at every connection
        authenticator=lambda *_: AuthResult(success=True),  # for settings with a relay's user and not its host
        auth_require_tls=False,
        loop=loop,
    )
    loop.run_until_complete(loop.create_server(session, sock=listener))
    loop.run_forever()


def listen(port: int, flag: str) -> socket.socket:
    try:
        return socket.create_server(("127.0.0.1", port))
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        print(f"The mail catcher cannot listen on 127.0.0.1:{port} ({reason}); choose another {flag}.", file=sys.stderr)
        raise SystemExit(2) from None


def main() -> None:
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: sys.exit(0))
    parser = argparse.ArgumentParser(prog="python -m ops.catcher", description=str(__doc__).partition("\n")[0])
    parser.add_argument("--smtp-port", type=int, default=1025)
    parser.add_argument("--mail-port", type=int, default=8025)
    parser.add_argument("--api-port", type=int, default=8000, help="where a caught mail's attempts can be read")
    parser.add_argument("--chaos", type=percentage, default=0, metavar="PERCENT", help="mails that fail at random")
    add_flag(parser)
    given = parser.parse_args()
    logging.basicConfig(stream=sys.stdout, format="%(message)s", level=logging.ERROR)
    log.setLevel(logging.INFO)

    inbox, failures = Inbox(), Failures(given.chaos)
    smtp, http = listen(given.smtp_port, "--smtp-port"), listen(given.mail_port, "--mail-port")
    page = "http://{}:{}".format(*http.getsockname())
    Thread(target=serve_smtp, args=(smtp, Handler(inbox, failures, page)), daemon=True).start()
    log.info("catching mail on %s:%d, to be seen on %s/", *smtp.getsockname(), page)
    app = make_app(inbox, failures, f"http://127.0.0.1:{given.api_port}", given.allow_host)
    create_server(app, sockets=[http], ident=None).run()


if __name__ == "__main__":
    main()
