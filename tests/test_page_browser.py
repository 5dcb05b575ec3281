"""The pages at /mail/ in Chromium, by one who has never seen them: who follows the words, by mouse or by keyboard; who
cannot see well; and what a mail may not do to the browser.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import pytest
from redis import Redis
from selenium.webdriver import Chrome, Keys
from selenium.webdriver.common.by import By
from selenium.webdriver.remote.webelement import WebElement

from tests import programs
from tests.browser import wait_for
from tests.dashboards import Running, running
from tests.pages import Pages
from tests.servers import RedisServer, eventually
from tests.test_email_page import HELD, HOSTILE, LATER, REFUSED, SENT, attempt

pytestmark = pytest.mark.browser
TAGS = [{"name": "kind", "value": "invoice"}]
PATHS: tuple[str, ...] = ("", "?span=3d", "activity", "activity?q=state:failed", "scheduled", "failures", "system")
PATHS += (
    "templates",
    "templates/welcome",
    "actions",
    "emails/{failed}",
    "emails/{sent}",
    "emails/{failed}/requeue",
    "system/pause",
)


@pytest.fixture(scope="module")
def site(redis_server: RedisServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with running(tmp_path_factory.mktemp("pages"), redis_server.url, "--no-login") as site:
        yield site


@pytest.fixture
def mails(client: Redis, redis_server: RedisServer) -> dict[str, str]:
    """What is there to be asked about; by name."""
    pages = Pages.of(redis_server.url)
    tomorrow = (datetime.now(timezone.utc).astimezone() + timedelta(days=1)).replace(hour=9, minute=0)
    made = {
        "sent": pages.accept(to=["ada@example.com"], subject="Reset your password"),
        "failed": pages.accept(to=["bob@example.com"], subject="Invoice 17", tags=TAGS),
        "failed too": pages.accept(to=["eve@example.com"], subject="Invoice 18"),
        "doubt": pages.accept(to=["carol@example.com"], subject="Your ticket", on_doubt="hold"),
        "later": pages.accept(to=["dan@example.com"], subject="Your order"),
        "waits": pages.accept(to=["fay@example.com"], subject="Welcome, Fay"),
        "scheduled": pages.accept(subject="The news of the week", scheduled_at=tomorrow.isoformat()),
    }
    for name, told in (("sent", SENT), ("failed", REFUSED), ("failed too", REFUSED), ("doubt", HELD), ("later", LATER)):
        attempt(pages.outbox, made[name], told)
    return made


class Person:
    """Finds things by the words on the screen, and knows no address and no class."""

    def __init__(self, browser: Chrome, site: Running) -> None:
        self.browser = browser
        self.root = f"http://127.0.0.1:{site.port}/mail/"
        browser.get(self.root)

    def click(self, words: str) -> None:
        path = f"//main//a[contains(., '{words}')]|//main//button[contains(., '{words}')]|//nav//a[. = '{words}']"
        self._does(path, lambda found: found.click())

    def sees(self, *words: str) -> None:
        wait_for(self.browser, lambda page: all(one in page.find_element(By.TAG_NAME, "main").text for one in words))

    def searches(self, text: str) -> None:
        self.click("Activity")
        self._does("//input[@name='q']", lambda found: found.send_keys(text + Keys.ENTER))

    def _does(self, path: str, what: Callable[[WebElement], object]) -> None:
        """Again, if the page renews itself between finding and doing."""

        def done(page: Chrome) -> bool:
            what(page.find_element(By.XPATH, path))
            return True

        wait_for(self.browser, done)


def test_a_stranger_answers_five_questions(browser: Chrome, site: Running, mails: dict[str, str]) -> None:
    person = Person(browser, site)
    # Did Ada get her password reset?
    person.searches("ada@example.com")
    person.click("Reset your password")
    person.sees("Sent: the relay accepted it", "ada@example.com", "250", "queued as 7")
    # Why did Bob not get his invoice?
    person.searches("to:bob@example.com")
    person.click("Invoice 17")
    person.sees("Failed: the relay refused it (550 at rcpt)", "the relay knows no such address", "What fixes it:")
    # What waits, and since when?
    person.click("Overview")
    person.sees("No worker runs")
    person.click("waiting now")
    person.sees("Welcome, Fay", "queued")
    person.click("Your order")
    person.sees("It waits: the relay put it off (451 at rcpt). The next attempt is in", "Accepted")
    # Two invoices have failed for one cause: send them again.
    person.click("Failures")
    person.sees("550 at rcpt", "2 mails")
    person.click("Requeue all 2")
    person.click("Requeue")
    person.sees("queued again")
    # What is scheduled for tomorrow?
    person.click("Scheduled")
    person.sees("Tomorrow", "The news of the week", "09:00")


def by_keyboard(browser: Chrome, words: str) -> None:
    """Goes on with Tab until what has these words has the focus, which must be seen, and presses Enter."""
    for _ in range(80):
        browser.switch_to.active_element.send_keys(Keys.TAB)
        here = browser.switch_to.active_element
        if here.tag_name in ("a", "button") and words in here.text:
            break
    else:
        raise AssertionError(f"no Tab leads to {words}")
    assert here.value_of_css_property("outline-style") != "none", words
    before, stays = browser.find_element(By.TAG_NAME, "html"), here.get_attribute("class") == "skip"
    here.send_keys(Keys.ENTER)
    eventually(lambda: stays or browser.find_element(By.TAG_NAME, "html") != before)


def test_a_keyboard_alone_finds_a_mail_and_sends_it_again(
    browser: Chrome, site: Running, mails: dict[str, str]
) -> None:
    person = Person(browser, site)
    by_keyboard(browser, "Skip to content")
    assert browser.switch_to.active_element.tag_name == "main"
    browser.refresh()
    by_keyboard(browser, "Activity")
    by_keyboard(browser, "Invoice 17")
    by_keyboard(browser, "Requeue it")
    by_keyboard(browser, "Requeue it")
    person.sees("It is queued again")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_nothing_on_any_page(browser: Chrome, site: Running, mails: dict[str, str], scheme: str) -> None:
    modules = os.environ.get("CLIENTS_NODE_MODULES") or programs.missing("REQUIRE_CLIENTS", "axe-core is not installed")
    axe = (Path(modules) / "axe-core" / "axe.min.js").read_text()
    browser.execute_cdp_cmd(
        "Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    )
    found = {}
    for path in PATHS:
        browser.get(f"http://127.0.0.1:{site.port}/mail/{path.format(**mails)}")
        browser.execute_script(axe)
        ran = browser.execute_async_script("axe.run().then(arguments[0])")
        assert ran["passes"]
        if ran["violations"]:
            found[path] = [(one["id"], [node["html"] for node in one["nodes"]]) for one in ran["violations"]]
    assert found == {}


@pytest.mark.parametrize("width", [390, 1280])
def test_no_page_is_wider_than_the_screen(browser: Chrome, site: Running, mails: dict[str, str], width: int) -> None:
    metrics = {"width": width, "height": 844, "deviceScaleFactor": 1, "mobile": width < 500}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    for path in PATHS:
        browser.get(f"http://127.0.0.1:{site.port}/mail/{path.format(**mails)}")
        assert browser.execute_script("return document.documentElement.scrollWidth") <= width, path


def log_of(browser: Chrome, kind: str) -> list[dict[str, Any]]:
    entries: list[dict[str, Any]] = browser.get_log(kind)  # type: ignore[no-untyped-call]
    return entries


def test_nothing_that_a_mail_holds_runs_or_loads(
    browser: Chrome, site: Running, client: Redis, redis_server: RedisServer
) -> None:
    """The corpus that the mail catcher's page stands, in each field that comes to these pages."""
    pages, run = Pages.of(redis_server.url), "document.title='ran'"
    corpus = [
        line.partition("\t")[2].replace("RUN", run).replace("URL", "http://127.0.0.1:1")[:900] for line in HOSTILE
    ]
    for subject, name, words in zip(*[iter([*corpus, *corpus[:3]])] * 3, strict=False):
        quoted = re.sub(r'["\\]', "'", name)[:60]
        mail_id = pages.accept(subject=subject[:300].replace("\n", " "), to=[f'"{quoted}" <b@example.com>'])
        attempt(pages.outbox, mail_id, REFUSED._replace(text=words))
        browser.get(f"http://127.0.0.1:{site.port}/mail/emails/{mail_id}")
        assert "async-email" in browser.title
    for path in ("", "activity", "failures", f"activity?q={corpus[0]}"):
        browser.get(f"http://127.0.0.1:{site.port}/mail/{path}")
        assert "async-email" in browser.title
    said = [one["message"] for one in log_of(browser, "browser")]
    assert [one for one in said if "favicon" not in one and "400" not in one] == []
    asked = [json.loads(one["message"])["message"] for one in log_of(browser, "performance")]
    urls = [one["params"]["request"]["url"] for one in asked if one["method"] == "Network.requestWillBeSent"]
    assert {url.split("/")[2] for url in urls if url.startswith("http")} == {f"127.0.0.1:{site.port}"}


def test_a_page_that_is_open_shows_a_new_mail_by_itself(
    browser: Chrome, site: Running, mails: dict[str, str], redis_server: RedisServer
) -> None:
    person = Person(browser, site)
    person.click("Activity")
    person.sees("Reset your password")
    browser.execute_script("window.same = true")
    Pages.of(redis_server.url).accept(subject="Just now")
    person.sees("Just now")
    assert browser.execute_script("return window.same")
