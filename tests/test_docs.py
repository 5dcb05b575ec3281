"""The page /docs, in a browser: it is whole without any other host, and what it sends is what its reader typed."""

from __future__ import annotations

import json
from typing import Any

import pytest
from selenium.webdriver import Chrome
from selenium.webdriver.common.by import By

from tests.browser import browser as browser
from tests.browser import wait_for
from tests.servers import Api
from web.docs import CSP, FILES

OF_THE_PAGE = {f"/docs/{name}": (media_type, "max-age=86400") for name, media_type in FILES.items()}
OF_THE_PAGE["/docs"] = ("text/html", "no-store")


@pytest.mark.parametrize("path", OF_THE_PAGE)
def test_each_file_has_its_type_and_how_long_it_is_kept(api: Api, path: str) -> None:
    head = api.call("HEAD", path, headers={"Authorization": ""}).headers
    assert (head["Content-Type"].partition(";")[0], head["Cache-Control"]) == OF_THE_PAGE[path]
    assert head.get("Content-Security-Policy") == (CSP if path == "/docs" else None)
    again = api.call("HEAD", path, headers={"If-None-Match": head["Etag"]})
    assert (again.status, again.headers["Cache-Control"]) == (304, head["Cache-Control"])


@pytest.mark.parametrize("path", ["/docs/index.html", "/docs/LICENSE", "/docs/..%2fdocs.py", "/docs/", "/docs/x/y"])
def test_no_other_file_is_sent(api: Api, path: str) -> None:
    assert (api.get(path).status, api.get(path).body["type"]) == (404, "not_found")


def test_the_reserve_is_strict() -> None:
    assert "unsafe" not in CSP
    assert "default-src 'none'" in CSP


def asked(browser: Chrome) -> set[str]:
    """The addresses that the page has asked for."""
    lines: list[Any] = browser.get_log("performance")  # type: ignore[no-untyped-call]
    seen = [json.loads(line["message"])["message"] for line in lines]
    sent = (one["params"]["request"]["url"] for one in seen if one["method"] == "Network.requestWillBeSent")
    return {url for url in sent if not url.startswith(("chrome", "data:"))}


@pytest.mark.browser
def test_a_mail_is_sent_from_the_page_which_asks_no_other_host(api: Api, browser: Chrome) -> None:
    def press(selector: str) -> None:
        browser.execute_script("arguments[0].click()", browser.find_element(By.CSS_SELECTOR, selector))

    here = f"http://127.0.0.1:{api.port}"
    browser.get(f"{here}/docs")
    post = "#operations-emails-post_email"
    for selector in (f"{post} .opblock-summary-control", "button.authorize"):
        press(selector)
    browser.find_element(By.CSS_SELECTOR, ".auth-container input").send_keys("full-key")
    for selector in (".modal-ux button.authorize", ".btn-done", f"{post} .try-out__btn", f"{post} .execute"):
        press(selector)
    answer = (By.CSS_SELECTOR, f"{post} .live-responses-table")
    wait_for(browser, lambda page: '"queued"' in page.find_element(*answer).text)
    assert browser.get_log("browser") == []  # type: ignore[no-untyped-call]
    assert asked(browser) == {f"{here}{path}" for path in (*OF_THE_PAGE, "/openapi.json", "/emails")}
