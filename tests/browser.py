"""Chromium for the tests that claim something about a page: one headless browser per test, in a profile of its own.

It takes `chromium` and `chromedriver` from PATH and downloads nothing. Where they are missing the test is skipped, but
with REQUIRE_BROWSER=1 (as in CI) it fails, so that these tests cannot vanish unnoticed.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from selenium.webdriver import Chrome, ChromeOptions
from selenium.webdriver.chrome.service import Service

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
    chromium, driver = find("chromium", "chromium-browser", "google-chrome"), find("chromedriver")
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


def find(*names: str) -> str:
    """The first of these programs on PATH. Skips the test, or fails it if a browser is required."""
    for name in names:
        if path := shutil.which(name):
            return path
    reason = f"there is no {names[0]} on PATH"
    if os.environ.get("REQUIRE_BROWSER") == "1":
        pytest.fail(reason)
    pytest.skip(reason)
