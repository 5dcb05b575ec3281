"""The mail catcher: what it keeps, what it shows, and what a hostile mail or page cannot do to it.

Asked of the WSGI application; test_catcher_process.py asks a real `python -m ops.catcher`.
"""

from __future__ import annotations

import re
import time
from base64 import b64decode
from concurrent.futures import ThreadPoolExecutor
from email.message import EmailMessage
from typing import Any

import pytest
from werkzeug.test import Client, TestResponse

from ops import catcher
from ops.catcher import Inbox, Mail, make_app
from ops.failing import Failures

PIXEL = b64decode("iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg==")
SCRIPT = "<script>alert(1)</script>"
FAILURES = Failures()


def ask(inbox: Inbox, path: str, method: str = "GET", data: Any = None, **environ: str) -> TestResponse:
    """One request to the application. Headers are written as in WSGI: `HTTP_ORIGIN`."""
    environ = {"HTTP_HOST": "127.0.0.1:8025", **environ}
    app = make_app(inbox, FAILURES, "http://127.0.0.1:8000")
    return Client(app).open(path, method=method, data=data, environ_overrides=environ)


def compose(subject: str = "Hello", text: str = "Hi.\n", html: str | None = None) -> EmailMessage:
    message = EmailMessage()
    message["From"], message["To"], message["Subject"] = "Ada <ada@example.com>", "bob@example.com", subject
    message.set_content(text)
    if html is not None:
        message.add_alternative(html, subtype="html")
    return message


def illustrated(html: str = '<img src="cid:dot@b.c">', data: bytes = PIXEL, kind: str = "image/png") -> EmailMessage:
    message = compose(html=html)
    body = message.get_body(["html"])
    assert body
    body.add_related(data, *kind.split("/"), cid="<dot@b.c>", filename="dot.png", disposition="inline")
    return message


def catch(inbox: Inbox, mail: EmailMessage | bytes, to: tuple[str, ...] = ("bob@example.com",)) -> Mail:
    return inbox.catch("ada@example.com", to, mail if isinstance(mail, bytes) else mail.as_bytes())


@pytest.fixture
def inbox() -> Inbox:
    return Inbox()


# What it keeps


def test_a_mail_is_listed_with_its_envelope_its_headers_and_its_bodies(inbox: Inbox) -> None:
    message = compose("Grüße", html="<p>Hi.</p>")
    message["Cc"], message["Message-ID"] = "carol@example.com", "<1@example.com>"
    message.add_attachment(b"%PDF", maintype="application", subtype="pdf", filename="Rechnung März.pdf")
    size = len(catch(inbox, message, to=("bob@example.com", "hidden@example.com")).raw)
    (listed,) = ask(inbox, "/messages").get_json()["messages"]
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}\+00:00", listed.pop("received_at"))
    assert listed == {
        "n": 1,
        "id": None,
        "envelope_from": "ada@example.com",
        "envelope_to": ["bob@example.com", "hidden@example.com"],
        "from": "Ada <ada@example.com>",
        "to": "bob@example.com",
        "cc": "carol@example.com",
        "subject": "Grüße",
        "message_id": "<1@example.com>",
        "size": size,
        "attachments": ["Rechnung März.pdf"],
        "text": "Hi.\n",
        "html": "<p>Hi.</p>\n",
    }


def test_mails_are_listed_in_the_order_they_came_and_shown_the_newest_first(inbox: Inbox) -> None:
    for subject in ("Mail A", "Mail B"):
        catch(inbox, compose(subject))
    assert [mail["subject"] for mail in ask(inbox, "/messages").get_json()["messages"]] == ["Mail A", "Mail B"]
    assert re.findall(r"Mail [AB]", ask(inbox, "/").text) == ["Mail B", "Mail A"]


def test_the_last_500_mails_are_kept(inbox: Inbox) -> None:
    for _ in range(502):
        catch(inbox, b"\r\n")
    assert [inbox.mails[0].n, inbox.mails[-1].n] == [3, 502]
    assert ask(inbox, "/messages/2").status_code == 404
    assert "last 500 mails" in ask(inbox, "/").text


def test_large_mails_push_out_the_oldest_before_memory_is_full(inbox: Inbox, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(catcher, "KEPT_BYTES", 1000)
    for _ in range(3):
        catch(inbox, b"x" * 400)
    assert [mail.n for mail in inbox.mails] == [2, 3]


def test_mails_caught_at_once_are_numbered_in_their_order(inbox: Inbox, monkeypatch: pytest.MonkeyPatch) -> None:
    def slow(n: int, *rest: Any) -> Mail:
        time.sleep(0.001 * (n % 3))  # lets another thread in, between the number and the list
        return Mail(n, *rest)

    monkeypatch.setattr(catcher, "Mail", slow)
    with ThreadPoolExecutor(30) as threads:
        list(threads.map(catch, [inbox] * 30, [b"\r\n"] * 30))
    assert [mail.n for mail in inbox.mails] == list(range(1, 31))


@pytest.mark.parametrize("headers", [{"HTTP_ORIGIN": "http://127.0.0.1:8025"}, {}], ids=["browser", "curl"])
def test_clearing_empties_the_inbox_and_numbers_go_on(inbox: Inbox, headers: dict[str, str]) -> None:
    catch(inbox, compose())
    answer = ask(inbox, "/clear", "POST", **headers)
    assert (answer.status_code, answer.headers["Location"]) == (303, "http://127.0.0.1:8025/")
    assert inbox.mails == ()
    assert catch(inbox, compose()).n == 2


def test_the_page_answers_304_until_the_list_changes(inbox: Inbox) -> None:
    def poll(version: str) -> int:
        return ask(inbox, "/", HTTP_IF_NONE_MATCH=version).status_code

    for change in (lambda: catch(inbox, compose()), inbox.clear, lambda: catch(inbox, compose())):
        before = inbox.version
        assert poll(before) == 304
        change()
        assert poll(before) == 200
    assert poll(Inbox().version) == 200  # as a page sees it that was left open over a restart


# What it shows


def test_the_envelope_shows_who_got_a_blind_copy(inbox: Inbox) -> None:
    catch(inbox, compose(), to=("Bob@example.com", "hidden@example.com"))
    recipients = re.findall(r'class="recipient">([^<]+)(<span class="badge")?', ask(inbox, "/messages/1").text)
    assert recipients == [("Bob@example.com", ""), ("hidden@example.com ", '<span class="badge"')]


def test_a_mail_opens_with_its_html_or_else_with_its_text(inbox: Inbox) -> None:
    catch(inbox, compose(html="<p>Hi.</p>"))
    catch(inbox, compose(text="Only text."))
    frame = ' src="/messages/1/html" sandbox="allow-popups allow-popups-to-escape-sandbox"'
    assert f'<iframe title="The mail as HTML"{frame}' in ask(inbox, "/messages/1").text
    assert "Only text." in ask(inbox, "/messages/2").text
    assert "<iframe" not in ask(inbox, "/messages/2").text


def test_headers_are_shown_decoded_and_as_received(inbox: Inbox) -> None:
    catch(inbox, b"Subject: =?utf-8?q?Gr=C3=BC=C3=9Fe?=\r\n\r\nbody\r\n")
    page = ask(inbox, "/messages/1?tab=headers").text
    assert "<td>Grüße</td>" in page
    assert "<pre>Subject: =?utf-8?q?Gr=C3=BC=C3=9Fe?=</pre>" in page


def test_the_source_tab_shows_the_mail_as_it_travelled(inbox: Inbox) -> None:
    catch(inbox, b"Subject: x\r\n\r\n=3Cb=3E <b>\r\n")
    assert "Subject: x\r\n\r\n=3Cb=3E &lt;b&gt;" in ask(inbox, "/messages/1?tab=source").text


def test_an_inline_image_is_put_into_the_html_and_is_no_attachment(inbox: Inbox) -> None:
    mail = catch(inbox, illustrated())
    assert '<img src="data:image/png;base64,iVBOR' in ask(inbox, "/messages/1/html").text
    assert mail.content.attachments == []


def test_an_image_that_the_html_does_not_show_is_an_attachment(inbox: Inbox) -> None:
    mail = catch(inbox, illustrated("<p>No image.</p>"))
    assert [part.name for part in mail.content.attachments] == ["dot.png"]


def test_what_calls_itself_an_image_but_is_html_is_not_put_into_the_html(inbox: Inbox) -> None:
    catch(inbox, illustrated(data=b"<b>", kind="text/html"))
    assert '<img src="cid:dot@b.c">' in ask(inbox, "/messages/1/html").text


def test_an_attachment_is_downloaded_and_never_shown_by_the_browser(inbox: Inbox) -> None:
    message = compose()
    message.add_attachment(SCRIPT.encode(), maintype="text", subtype="html", filename="März.html")
    catch(inbox, message)
    answer = ask(inbox, "/messages/1/attachments/1")
    assert answer.data.strip() == SCRIPT.encode()
    assert answer.headers["Content-Type"] == "application/octet-stream"
    disposition = answer.headers["Content-Disposition"]
    assert disposition == "attachment; filename=\"M_rz.html\"; filename*=UTF-8''M%C3%A4rz.html"
    assert answer.headers["X-Content-Type-Options"] == "nosniff"


def test_a_mail_within_a_mail_is_one_attachment(inbox: Inbox) -> None:
    message = compose()
    message.add_attachment(compose("inner", html="<p>inner</p>"), filename="inner.eml")
    mail = catch(inbox, message)
    assert mail.content.html is None
    assert [part.name for part in mail.content.attachments] == ["inner.eml"]
    assert b"Subject: inner" in ask(inbox, "/messages/1/attachments/1").data


@pytest.mark.parametrize(
    "path",
    ["/messages/7", "/messages/7.eml", "/messages/7/html", "/messages/1/html", "/messages/1/attachments/1", "/x"],
)
def test_what_is_not_there_is_404(inbox: Inbox, path: str) -> None:
    catch(inbox, compose())
    assert ask(inbox, path).status_code == 404


def test_a_mail_of_our_api_shows_the_command_that_shows_its_attempts(inbox: Inbox) -> None:
    message, mail_id = compose(), "6d1f0a52-6f5e-4b57-9d0e-6a2f0b1c8f3d"
    message["Message-ID"] = f"<{mail_id}@example.com>"
    catch(inbox, message)
    assert ask(inbox, "/messages").get_json()["messages"][0]["id"] == mail_id
    command = f"curl http://127.0.0.1:8000/emails/{mail_id} -H 'Authorization: Bearer dev'"
    assert command in ask(inbox, "/messages/1").text


@pytest.mark.parametrize("message_id", ["<1@example.com>", "<'x-y@a.example>", "6d1f0a52-6f5e-4b57-9d0e-6a2f0b1c8f3d"])
def test_another_mail_shows_none(inbox: Inbox, message_id: str) -> None:
    catch(inbox, f"Message-ID: {message_id}\r\n\r\nHi.".encode())
    assert "/emails/" not in ask(inbox, "/messages/1").text


@pytest.mark.parametrize("percent", ["0", "1", "25", "100"])
def test_the_page_has_a_switch_for_chaos(inbox: Inbox, percent: str) -> None:
    answer = ask(inbox, "/chaos", "POST", {"percent": percent}, HTTP_ORIGIN="http://127.0.0.1:8025")
    assert (answer.status_code, answer.headers["Location"]) == (303, "http://127.0.0.1:8025/")
    page = ask(inbox, "/").text
    assert f'<option value="{percent}" selected>' in page
    assert (f"chaos: {percent} % of all mails fail" in page) == (percent != "0")


@pytest.mark.parametrize("percent", ["", "-1", "101", "ten", "1.5", "٣"])
def test_chaos_is_a_percentage(inbox: Inbox, percent: str) -> None:
    FAILURES.chaos = 0
    answer = ask(inbox, "/chaos", "POST", {"percent": percent})
    assert (answer.status_code, FAILURES.chaos) == (400, 0)
    assert "percent must be a number from 0 to 100, and is " in answer.text


def test_an_empty_inbox_says_how_to_send_a_mail(inbox: Inbox) -> None:
    assert "curl" in ask(inbox, "/").text


# What a hostile or broken mail cannot do

NESTED = b"".join(b'Content-Type: multipart/mixed; boundary="%d"\r\n\r\n--%d\r\n' % (n, n) for n in range(1000))
MALFORMED = {
    "nothing": b"",
    "no headers": b"\r\njust a body\r\n",
    "no colon": b"this is no header\r\nSubject: x\r\n\r\nbody",
    "8-bit garbage": bytes(range(256)) * 8,
    "NUL": b"Subject: a\0b\r\nFrom: \0\r\n\r\n\0",
    "raw UTF-8 headers": "Subject: Grüße\r\nFrom: Jürgen <ü@example.com>\r\n\r\nü".encode(),
    "raw Latin-1 headers": "Subject: Grüße\r\nTo: ü\r\nContent-Type: text/plain; name=ü\r\n\r\nü".encode("latin-1"),
    "unknown charset": b"Content-Type: text/plain; charset=klingon\r\n\r\nh\xffi",
    "charset with NUL": b"Content-Type: text/plain; charset*=a%00b'x'u\r\n\r\nhi",
    "charset that is no text": b"Content-Type: text/html; charset=zlib\r\n\r\nhi",
    "surrogate in the body": b"Content-Type: text/html; charset=utf-7\r\n\r\n+2AA-",
    "surrogate in a header": b"Subject: =?utf-7?q?+2AA-?=\r\nFrom: =?unicode-escape?q?=5Cud800?= <a@b>\r\n\r\n",
    "unknown charset in a header": b"Subject: =?klingon?b?AAAA?= =?utf-8?b?!!!?=\r\nTo: =?x?q?\r\n\r\n",
    "broken base64": b"Content-Transfer-Encoding: base64\r\nContent-Type: text/html\r\n\r\n!a\xff=b==c",
    "broken uuencode": b"Content-Transfer-Encoding: uuencode\r\n\r\nbegin 666 x\r\n~~~~\r\n",
    "unknown encoding": b"Content-Transfer-Encoding: \xff\0rot13\r\n\r\nx",
    "broken quoted-printable": b"Content-Transfer-Encoding: quoted-printable\r\n\r\n=ZZ=\r\n=",
    "multipart without boundary": b"Content-Type: multipart/mixed\r\n\r\n--x\r\n\r\nhi",
    "multipart without end": b"Content-Type: multipart/mixed; boundary=x\r\n\r\n--x\r\n\r\n<p>",
    "nested too deep": NESTED,
    "content types of nonsense": b'Content-Type: ;;;/="\r\nContent-Disposition: \xff;=\r\nContent-ID: <\r\n\r\n',
    "addresses of nonsense": b'From: <<>>,;:@@"\r\nTo: =?utf-8?q?=00?= <\r\nCc: group:;,"\\\r\nReply-To: (((\r\n\r\n',
    "message-id of nonsense": b"Message-ID: <\r\nDate: 99 Foo 99999 25:61\r\n\r\n",
    "header parser that raises": b'Content-Type: text/plain; x*1*="\r\nTo: a@[\r\nFrom: @\r\nMessage-ID: <@\r\n\r\n',
    "filename with newline": b"Content-Type: application/x; name*=utf-8''a%0D%0AX-Evil:%201%00%22\r\n\r\nx",
    "broken attached mail": b"Content-Type: message/rfc822\r\n\r\n\xff\xfe: x\r\n\r\n\0",
    "folding, bare newline, dot": b"Subject:  odd \r\n\tfolding\r\nX: \xff\r\n\r\n\x00 bare\nnewline \xfe\r\n.dot\r\n",
    "delivery status": b"Content-Type: message/delivery-status\r\n\r\nA: b\r\n\r\nC: \xff\r\n",
}


@pytest.mark.parametrize("raw", MALFORMED.values(), ids=MALFORMED)
def test_a_malformed_mail_is_shown_as_well_as_can_be_and_its_bytes_come_back(inbox: Inbox, raw: bytes) -> None:
    mail = inbox.catch("\udcff@example.com", ["\ud800", "<x>"], raw)
    paths = ["/", "/messages", "/messages/1", *(f"/messages/1?tab={tab}" for tab in catcher.TABS)]
    paths += [f"/messages/1/attachments/{number}" for number, _ in enumerate(mail.content.attachments, 1)]
    paths += ["/messages/1/html"] if mail.content.html is not None else []
    for path in paths:
        answer = ask(inbox, path)
        assert answer.status_code == 200, path
        assert not any(re.search(r"[\r\n\0]", value) for value in answer.headers.values()), path
    eml = ask(inbox, "/messages/1.eml")
    assert (eml.data, eml.headers["Content-Type"]) == (raw, "message/rfc822")


def test_what_can_be_read_of_a_malformed_mail_is_read(inbox: Inbox) -> None:
    for name in ("unknown charset", "raw UTF-8 headers", "multipart without boundary", "nested too deep"):
        catch(inbox, MALFORMED[name])
    unknown, unencoded, boundless, nested = inbox.mails
    assert unknown.content.text == "h�i"
    assert (unencoded.header("subject"), unencoded.sender, unencoded.content.text) == ("Grüße", "Jürgen", "ü")
    assert "hi" in str(boundless.content.text)
    assert 'boundary="999"' in str(nested.content.text)


@pytest.mark.parametrize("header", ["To: a@[", "Reply-To: x<", "Message-ID: <"])
def test_a_header_on_which_pythons_parser_raises_spoils_nothing_but_itself(inbox: Inbox, header: str) -> None:
    content = catch(inbox, f"Subject: =?utf-8?q?Gr=C3=BC=C3=9Fe?=\r\n{header}\r\n\r\nHi.".encode()).content
    assert (content.headers[0], content.text) == (("Subject", "Grüße"), "Hi.")


def test_everything_a_mail_says_is_escaped(inbox: Inbox) -> None:
    message = compose(SCRIPT, text=SCRIPT, html="<p>")
    message.replace_header("From", f'"{SCRIPT}" <a@example.com>')
    message["X-Evil"] = SCRIPT
    message.add_attachment(b"x", maintype="application", subtype="x", filename=f'"{SCRIPT}.txt')
    inbox.catch(SCRIPT, [SCRIPT, '" autofocus onfocus="alert(1)'], message.as_bytes())
    for path in ("/", *(f"/messages/1?tab={tab}" for tab in (*catcher.TABS, SCRIPT, '"><b>'))):
        page = ask(inbox, path).text
        assert "alert(1)" in page
        assert SCRIPT not in page
        assert 'onfocus="alert' not in page


def test_a_mails_html_is_served_in_a_sandbox_that_loads_nothing(inbox: Inbox) -> None:
    catch(inbox, compose(html="<!DOCTYPE html>\n<p>Hi.</p>"))
    answer = ask(inbox, "/messages/1/html")
    policy = dict(rule.partition(" ")[::2] for rule in answer.headers["Content-Security-Policy"].split("; "))
    assert policy["sandbox"] == "allow-popups allow-popups-to-escape-sandbox"
    assert policy["default-src"] == policy["form-action"] == policy["base-uri"] == "'none'"
    assert policy["img-src"] == "data:"
    assert not {"script-src", "frame-src", "connect-src", "object-src"} & set(policy)
    assert answer.headers["Content-Type"] == "text/html; charset=UTF-8"
    assert answer.headers["X-Content-Type-Options"] == "nosniff"
    assert answer.text.startswith('<!DOCTYPE html><base target="_blank">')  # before it, quirks mode would set in


def test_the_pages_own_policy_allows_only_its_own_script(inbox: Inbox) -> None:
    answers = ask(inbox, "/"), ask(inbox, "/messages/9"), ask(inbox, "/")
    policies = [answer.headers["Content-Security-Policy"] for answer in answers]
    assert len(set(policies)) == 3  # a nonce is used once
    for policy in policies:
        assert policy.startswith("default-src 'none'; ")
        assert re.search(r"script-src 'nonce-[\w-]{20,}';", policy)
        assert "unsafe" not in policy


# What another site cannot do


@pytest.mark.parametrize(
    "origin",
    ["null", "http://evil.example", "http://127.0.0.1:8000", "http://localhost:8025", ""],
)
def test_another_site_cannot_clear_the_inbox_or_make_mail_fail(inbox: Inbox, origin: str) -> None:
    catch(inbox, compose())
    assert ask(inbox, "/clear", "POST", HTTP_ORIGIN=origin).status_code == 403
    assert ask(inbox, "/clear").status_code == 405
    assert len(inbox.mails) == 1
    FAILURES.chaos = 0
    assert ask(inbox, "/chaos", "POST", {"percent": "100"}, HTTP_ORIGIN=origin).status_code == 403
    assert ask(inbox, "/chaos?percent=100").status_code == 405
    assert FAILURES.chaos == 0
