"""The pages at /mail/ as a test asks them: in this process, before a real Redis, without a browser."""

from __future__ import annotations

import html
import re
from typing import Any, NamedTuple

from flask.testing import FlaskClient
from werkzeug.test import TestResponse

from mail.draft import prepare
from mail.outbox import Outbox
from ops import dashboard
from queues.connection import connect
from queues.jobs import Jobs
from settings import Settings, load

FORM = {"Sec-Fetch-Site": "same-origin"}
MAIL = {"from": "a@example.com", "to": ["b@example.com"], "subject": "s", "text": "t"}


class Pages(NamedTuple):
    settings: Settings
    outbox: Outbox
    browser: FlaskClient

    @classmethod
    def of(cls, redis_url: str, **settings: Any) -> Pages:
        chosen = load(from_file={}, redis_url=redis_url, **settings)
        outbox = Outbox(Jobs(connect(redis_url)), chosen)
        return cls(chosen, outbox, dashboard.make_app(chosen, login=False).test_client())

    def accept(self, key: str = "", **fields: Any) -> str:
        """Accepts a mail as the API does, with these fields of POST /emails in place of MAIL's."""
        made = prepare(MAIL | fields, default_sender=None, max_recipients=50)
        return self.outbox.accept([made._replace(key=key)]).id

    def get(self, path: str, status: int = 200) -> str:
        """Returns a page's HTML."""
        answer = self.browser.get(path)
        assert answer.status_code == status, answer.text
        return answer.text

    def text(self, path: str, status: int = 200) -> str:
        """Returns a page's words, without its tags."""
        return words(self.get(path, status))

    def post(self, path: str, **form: str) -> TestResponse:
        return self.browser.post(path, data=form, headers=FORM)


def words(page: str) -> str:
    main = page.partition("<main")[2].partition(">")[2].partition("</main>")[0]
    return re.sub(r"\s+", " ", html.unescape(re.sub(r"<[^>]*>", " ", main))).strip()
