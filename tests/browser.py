"""Chromium for the tests that claim something about a page: one headless browser per test, in a profile of its own.

It takes `chromium` and `chromedriver` from PATH; tests/programs.py says what happens where they are missing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from selenium.common import TimeoutException, WebDriverException
from selenium.webdriver import Chrome, ChromeOptions
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By
from selenium.webdriver.support.wait import WebDriverWait

from tests.programs import program

FLAGS = (
    *("--headless", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync", "--window-size=1280,900"),
    *("--disable-background-networking", "--disable-component-update"),
    "--host-resolver-rules=MAP *.rebound.example 127.0.0.1",  # a page of another site, as DNS rebinding has it
    "--no-sandbox",  # CI runs as root, where Chromium has no sandbox
)


@pytest.fixture
def browser(tmp_path: Path) -> Iterator[Chrome]:
    options = ChromeOptions()
    options.binary_location = program("REQUIRE_BROWSER", "chromium", "chromium-browser", "google-chrome")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    for flag in (*FLAGS, f"--user-data-dir={tmp_path / 'profile'}"):
        options.add_argument(flag)
    with Chrome(options, Service(program("REQUIRE_BROWSER", "chromedriver"))) as chrome:
        chrome.implicitly_wait(5)  # seconds; the pages fill themselves in after they load
        yield chrome


def wait_for(browser: Chrome, condition: Callable[[Chrome], object]) -> None:
    """Waits until `condition` is true, and over what Selenium raises meanwhile: a page that draws itself anew."""
    try:
        WebDriverWait(browser, 60, 0.05, [WebDriverException]).until(condition)
    except TimeoutException:
        shown = browser.find_element(By.TAG_NAME, "body").text
        raise AssertionError(f"after 60 seconds {browser.current_url} shows:\n{shown}") from None
