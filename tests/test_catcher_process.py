"""The mail catcher as a process: sockets, signals, and Chromium before mails that want to run or reach something."""

from __future__ import annotations

import re
import signal
import smtplib
import socket
import socketserver
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from email.message import EmailMessage
from pathlib import Path
from threading import Thread

import pytest
from selenium.webdriver import Chrome
from selenium.webdriver.common.by import By

from mail.templates import render
from tests.browser import wait_for
from tests.servers import ROOT, Api
from tests.test_catcher import MALFORMED, compose, illustrated

Stranger = tuple[str, list[str]]  # its URL, and what it hears: '' where a browser connects and says nothing


class Catcher(Api):
    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process
        said = re.fullmatch(r"catching mail on 127\.0\.0\.1:(\d+), to be seen on (\S+:(\d+))/\n", self.log())
        assert said
        self.smtp_port, self.page = int(said[1]), said[2]
        super().__init__(int(said[3]))

    def send(self, mail: EmailMessage | bytes, to: str = "bob@example.com") -> None:
        with smtplib.SMTP("127.0.0.1", self.smtp_port, timeout=60) as relay:
            raw = mail if isinstance(mail, bytes) else mail.as_bytes()
            relay.sendmail("ada@example.com", [to], raw, ["BODY=8BITMIME"])

    def log(self) -> str:
        assert self.process.stdout
        return self.process.stdout.readline()


def start(*flags: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "ops.catcher", *flags]
    return subprocess.Popen(command, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


@pytest.fixture
def running() -> Iterator[Catcher]:
    with start("--smtp-port", "0", "--mail-port", "0") as process:
        try:
            yield Catcher(process)
        finally:
            process.kill()


def test_a_mail_sent_by_smtp_is_on_the_page_and_its_log_line_tells_nothing_of_it(running: Catcher) -> None:
    running.send(compose("A secret subject"))
    size = running.get("/messages").body["messages"][0]["size"]
    assert running.log() == f"caught message n=1 size={size} {running.page}/messages/1\n"
    assert "A secret subject" in running.get("/").body
    assert running.get("/healthz").body == "ok\n"
    running.process.terminate()
    assert running.process.communicate(timeout=10) == ("", "")


def test_no_mail_is_refused_for_being_malformed(running: Catcher) -> None:
    for n, raw in enumerate(MALFORMED.values(), 1):
        running.send(raw)
        assert running.get(f"/messages/{n}").status == 200


def test_lines_of_any_length_and_addresses_in_any_script_are_taken(running: Catcher) -> None:
    raw = b"\r\n" + b"x" * 300_000 + b"\r\n"
    with smtplib.SMTP("127.0.0.1", running.smtp_port, timeout=10) as relay:
        relay.sendmail("jürgen@example.com", ["用户@example.com"], raw, ["SMTPUTF8", "BODY=8BITMIME"])
        assert relay.esmtp_features["size"] == str(64 * 2**20)
        assert "starttls" not in relay.esmtp_features
        relay.login("anybody", "any password")
    (mail,) = running.get("/messages").body["messages"]
    assert (mail["envelope_from"], mail["envelope_to"]) == ("jürgen@example.com", ["用户@example.com"])
    assert mail["text"] == "x" * 300_000 + "\r\n"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it_with_status_0_even_with_a_client_connected(running: Catcher, number: int) -> None:
    with smtplib.SMTP("127.0.0.1", running.smtp_port, timeout=10):
        running.process.send_signal(number)
        out, err = running.process.communicate(timeout=30)
        assert (running.process.returncode, out, err) == (0, "", "")


@pytest.mark.parametrize("flag", ["--smtp-port", "--mail-port"])
def test_a_port_that_is_taken_is_told_in_one_sentence_that_names_the_flag(flag: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        with start("--smtp-port", "0", "--mail-port", "0", flag, port) as process:
            out, err = process.communicate(timeout=10)
    assert (process.returncode, out) == (2, "")
    assert re.fullmatch(rf"[^\n]* 127\.0\.0\.1:{port} [^\n]*{flag}\.\n", err)


def test_it_listens_on_127_0_0_1_and_nowhere_else(running: Catcher) -> None:
    for port in (running.smtp_port, running.port):
        with pytest.raises(ConnectionRefusedError):  # another loopback address: open if it listened on all of them
            socket.create_connection(("127.0.0.2", port), timeout=5).close()


# In a browser


@pytest.fixture
def stranger() -> Iterator[Stranger]:
    """A server that no mail may reach."""
    heard: list[str] = []

    class Handler(socketserver.StreamRequestHandler):
        timeout = 0.5

        def handle(self) -> None:
            heard.append("")
            with suppress(OSError):
                heard[-1] = self.rfile.readline().decode("latin-1").strip()
                self.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/html\r\n\r\n<p>hi")

    with socketserver.TCPServer(("127.0.0.1", 0), Handler) as server:
        Thread(target=server.serve_forever).start()
        yield f"http://127.0.0.1:{server.server_address[1]}", heard
        server.shutdown()


def loaded_frame(browser: Chrome) -> None:
    browser.switch_to.frame(browser.find_element(By.TAG_NAME, "iframe"))
    wait_for(browser, lambda frame: frame.find_elements(By.ID, "end"))


@pytest.mark.browser
def test_a_mails_html_and_its_inline_image_are_seen_in_the_frame(browser: Chrome, running: Catcher) -> None:
    running.send(illustrated('<p id="hi">Look:</p><img src="cid:dot@b.c"><p id="end">'))
    browser.get(running.page + "/messages/1")
    loaded_frame(browser)
    assert browser.find_element(By.ID, "hi").text == "Look:"
    assert browser.find_element(By.TAG_NAME, "img").get_property("naturalWidth") == 1


HOSTILE = """<!doctype html><title>before</title>
<script>document.title = "ran"; new Image().src = "{0}/script"; parent.document.title = "ran"</script>
<meta http-equiv="refresh" content="0; url={0}/refresh">
<link rel="stylesheet" href="{0}/sheet"><link rel="preconnect" href="{0}"><LINK rel="prefetch" href="{0}/prefetch">
<style>@import url("{0}/import"); @font-face {{ font-family: F; src: url("{0}/font") }} p {{ font-family: F }}</style>
<img src="{0}/image" onerror="document.title = 'ran'"><img srcset="{0}/srcset 1x"><p background="{0}/background">x
<table background="{0}/table"><tr><td style="background: url({0}/style)">x</table>
<iframe src="{0}/frame"></iframe><IFRAME
src="{0}/frame"></IFRAME><iframe srcdoc="<img src='{0}/srcdoc'>"></iframe><object data="{0}/object"></object>
<embed src="{0}/embed"><video src="{0}/video" poster="{0}/poster" autoplay></video>
<audio src="{0}/audio" autoplay></audio>
<svg><image href="{0}/svg"/><script>document.title = "ran"</script></svg>
<form action="{0}/form"><input name="a" autofocus onfocus="document.title = 'ran'"><button id="submit">b</button></form>
<a id="js" href="javascript:document.title = 'ran'" target="_self">x</a><p id="end">end"""


@pytest.mark.browser
@pytest.mark.parametrize("path", ["/messages/1", "/messages/1/html"])
def test_a_mail_runs_and_reaches_nothing(browser: Chrome, running: Catcher, stranger: Stranger, path: str) -> None:
    url, heard = stranger
    running.send(compose(html=HOSTILE.format(url)))
    browser.get(running.page + path)
    if path == "/messages/1":
        loaded_frame(browser)
    for control in ("submit", "js"):
        browser.find_element(By.ID, control).click()
    time.sleep(1.5)  # a refresh, a preconnect or a font takes a moment
    assert browser.find_element(By.ID, "end").text == "end"
    browser.switch_to.default_content()
    assert browser.title in ("before", "Hello · Mail catcher")
    assert heard == []


@pytest.mark.browser
def test_a_link_in_a_mail_opens_in_a_tab_of_its_own(browser: Chrome, running: Catcher, stranger: Stranger) -> None:
    url, heard = stranger
    running.send(compose(html=f'<a href="{url}/confirm">Confirm</a><p id="end">'))
    browser.get(running.page + "/messages/1")
    loaded_frame(browser)
    first = browser.current_window_handle
    browser.find_element(By.TAG_NAME, "a").click()
    wait_for(browser, lambda _: "GET /confirm HTTP/1.1" in heard)
    wait_for(browser, lambda page: len(page.window_handles) == 2)
    browser.switch_to.window(next(handle for handle in browser.window_handles if handle != first))
    browser.close()
    browser.switch_to.window(first)


@pytest.mark.browser
@pytest.mark.parametrize("path", ["/", "/messages/1"])
def test_a_new_mail_appears_on_the_open_page_without_a_reload(browser: Chrome, running: Catcher, path: str) -> None:
    running.send(compose("The first"))
    browser.get(running.page + path)
    browser.execute_script("window.sameDocument = true; document.querySelector('#list a').focus()")
    running.send(compose("The second"))
    wait_for(browser, lambda page: len(page.find_elements(By.CSS_SELECTOR, "#list li")) == 2)
    assert [row.text for row in browser.find_elements(By.CSS_SELECTOR, "#list .subject")] == ["The second", "The first"]
    assert browser.find_element(By.ID, "count").text == "2 mails"
    assert browser.execute_script("return window.sameDocument")
    assert browser.switch_to.active_element.get_property("href") == running.page + "/messages/1"
    assert browser.get_log("browser") == []  # type: ignore[no-untyped-call]


@pytest.mark.browser
def test_the_welcome_mail_fits_a_phone(browser: Chrome, tmp_path: Path) -> None:
    mail = tmp_path / "mail.html"
    mail.write_text(render("welcome", {"name": "Ada"})[2] or "")
    phone = {"width": 360, "height": 800, "deviceScaleFactor": 2, "mobile": True}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", phone)
    browser.get(mail.as_uri())
    assert browser.execute_script("return document.documentElement.scrollWidth") == 360


@pytest.mark.browser
def test_the_empty_page_becomes_a_list_and_clear_empties_it_again(browser: Chrome, running: Catcher) -> None:
    browser.get(running.page)
    assert "No mail yet" in browser.find_element(By.ID, "mail").text
    running.send(compose())
    wait_for(browser, lambda page: "Choose a mail" in page.find_element(By.ID, "mail").text)
    browser.find_element(By.ID, "clear").click()
    wait_for(browser, lambda page: "No mail yet" in page.find_element(By.ID, "mail").text)
    assert running.get("/messages").body == {"messages": []}


@pytest.mark.browser
def test_a_page_left_open_says_so_when_the_catcher_has_stopped(browser: Chrome, running: Catcher) -> None:
    browser.get(running.page)
    assert browser.find_element(By.CSS_SELECTOR, "[role=status]").text == "listening"
    running.process.terminate()
    wait_for(browser, lambda page: page.find_element(By.CSS_SELECTOR, "[role=status]").text == "not running")
