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
from base64 import b64decode, b64encode
from collections.abc import Iterator
from contextlib import suppress
from email.message import EmailMessage
from pathlib import Path
from threading import Thread

import pytest
from selenium.common import WebDriverException
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


RAN = "document.title='ran';parent.document.title='ran';location='URL/ran'"
SVG = b64encode(
    b"<svg xmlns='http://www.w3.org/2000/svg' onload=\"location='//x'\"><script>document.title='ran'</script></svg>"
)
HOSTILE = [line.partition("\t")[2] for line in Path(__file__).with_name("hostile_html.tsv").read_text().splitlines()]
CHARSETS = {  # a charset and a body in which bytes, or the mail's own word for them, would be a script elsewhere
    "utf-7": b"+ADw-script+AD4-document.title+AD0AJw-ran+ACc-+ADw-/script+AD4-",
    "utf-7 in a meta": b"<meta charset=utf-7>+ADw-script+AD4-document.title+AD0AJw-ran+ACc-+ADw-/script+AD4-",
    "utf-16": "\ufeff<script>document.title='ran'</script>".encode("utf-16-le"),
    "iso-2022-jp": b"<img alt='\x1b$B'><img title='\x1b(B' onerror=document.title='ran' src=x>",
    "hz-gb-2312": b"<script>document.title='~{\x1b'</script>",
    "x-user-defined": b"\xbcscript\xbedocument.title='ran'\xbc/script\xbe",
}


def hostile_mails(url: str) -> list[bytes]:
    words = {"&NEWLINE;": "\n", "SVG": SVG.decode(), "RUN": RAN, "URL": url}
    bodies = [re.sub("|".join(words), lambda word: words[word[0]], html).replace("URL", url) for html in HOSTILE]
    mails = [("utf-8", body.encode()) for body in bodies] + [(name.split()[0], body) for name, body in CHARSETS.items()]
    head = "Content-Type: text/html; charset={}\r\n\r\n<title>before</title>"
    raw = [head.format(charset).encode() + body for charset, body in mails]
    return [*raw, illustrated(data=b64decode(SVG), kind="image/svg+xml").as_bytes()]


@pytest.mark.browser
def test_a_mail_runs_and_reaches_nothing_also_if_all_of_it_is_clicked(
    browser: Chrome, running: Catcher, stranger: Stranger
) -> None:
    """Forms of the HTML5 Security Cheatsheet, PortSwigger's cheat sheet, and tests of mail clients' remote content."""
    url, heard = stranger
    browser.implicitly_wait(0)
    page = browser.current_window_handle
    mails = hostile_mails(url)
    for mail in mails:
        running.send(mail)
    for n in range(1, len(mails) + 1):
        for path in (f"/messages/{n}", f"/messages/{n}/html"):
            browser.get(running.page + path)
            if not path.endswith("html"):
                browser.switch_to.frame(browser.find_element(By.TAG_NAME, "iframe"))
            for control in browser.find_elements(By.CSS_SELECTOR, "a, button, input, summary, text, math"):
                with suppress(WebDriverException):
                    control.click()
            browser.switch_to.default_content()
            for target in browser.execute_cdp_cmd("Target.getTargets", {})["targetInfos"]:
                assert target["title"] != "ran", mails[n - 1]
                if target["type"] == "page" and target["targetId"] != page:  # a tab that a click has opened
                    browser.execute_cdp_cmd("Target.closeTarget", {"targetId": target["targetId"]})
            assert browser.current_url.partition("#")[0] == running.page + path, mails[n - 1]
        assert heard == [], mails[n - 1]
    time.sleep(1.5)  # a refresh, a preconnect or a font takes a moment
    assert heard == []
    assert len(running.get("/messages").body["messages"]) == len(mails)


@pytest.mark.browser
def test_what_headers_say_is_seen_as_text(browser: Chrome, running: Catcher) -> None:
    """In the list, in each view of the mail, and as the open page draws itself anew."""
    browser.implicitly_wait(0)
    bad = "</title></script></pre><script>document.title='ran'</script><img src=x onerror=\"document.title='ran'\">"
    message = compose(bad, text=f"{bad} javascript:alert(1) http://a.example/\"onclick='document.title=1'", html="<p>")
    message.replace_header("From", f'"{bad}" <a@example.com>')
    message["Cc"] = message["Reply-To"] = message["X-Evil"] = message["X-<b>"] = bad
    message.add_attachment(b"x", maintype="application", subtype="x", filename=f"{bad}.txt")
    browser.get(running.page)
    running.send(message)
    wait_for(browser, lambda page: page.find_elements(By.CSS_SELECTOR, "#list li"))
    for path in ("", *(f"/messages/1?tab={tab}" for tab in ("html", "text", "headers", "source"))):
        browser.get(running.page + path)
        assert bad in browser.find_element(By.TAG_NAME, "body").text
        assert browser.title in ("(1) Mail catcher", f"{bad} · Mail catcher")
        assert (
            browser.find_elements(By.CSS_SELECTOR, "img, body script:not([nonce]), [onclick], a[href^='javascript']")
            == []
        )


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
