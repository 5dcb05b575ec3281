"""Chromium for the tests that claim something about a page: one headless browser per test, in a profile of its own.

It takes `chromium` and `chromedriver` from PATH; tests/programs.py says what happens where they are missing.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from selenium.webdriver import Chrome, ChromeOptions
from selenium.webdriver.chrome.service import Service

from tests.programs import program

FLAGS = (
    "--headless",
    "--no-sandbox",  # CI runs as root, where Chromium has no sandbox
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--window-size=1280,900",
)


@pytest.fixture
def browser(tmp_path: Path) -> Iterator[Chrome]:
    chromium = program("REQUIRE_BROWSER", "chromium", "chromium-browser", "google-chrome")
    driver = program("REQUIRE_BROWSER", "chromedriver")
    options = ChromeOptions()
    options.binary_location = chromium
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    for flag in (*FLAGS, f"--user-data-dir={tmp_path / 'profile'}"):
        options.add_argument(flag)
    chrome = Chrome(options, Service(driver))
    try:
        chrome.implicitly_wait(5)  # seconds; the pages fill themselves in after they load
        yield chrome
    finally:
        chrome.quit()
