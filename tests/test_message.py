"""Facts about `mail.message` and `mail.draft`: how a request, and what its template renders, becomes a mail."""

from __future__ import annotations

import pytest

from mail.address import Mailbox
from mail.draft import compose, prepare
from mail.due import Expired
from mail.message import Message, message_id
from mail.request import parse
from tests.sample_mails import CONTROLS, Rendered, accepted, mail, refusal


@pytest.mark.parametrize("rendered", [("s", None, None), ("s", "", None), ("s", "", "")])
def test_a_template_that_renders_neither_text_nor_html_is_refused(rendered: Rendered) -> None:
    assert list(refusal(mail(text=None, template={"id": "x"}), rendered)) == ["template"]


@pytest.mark.parametrize("html", [None, ""])
def test_a_template_without_html_is_refused_beside_an_inline_file(html: str | None) -> None:
    body = mail(text=None, template={"id": "x"}, attachments=[{"filename": "a", "content": "", "content_id": "logo"}])
    assert list(refusal(body, ("Hello", "Hi", html))) == ["attachments[0].content_id"]


def test_a_template_brings_the_subject_unless_the_request_does() -> None:
    body = mail(text=None, template={"id": "x"})
    assert accepted(body, ("Rendered", "t", "<p>")).subject == "Hello"
    del body["subject"]
    message = accepted(body, ("Rendered", "t", "<p>"))
    assert (message.subject, message.text, message.html) == ("Rendered", "t", "<p>")


@pytest.mark.parametrize("control", CONTROLS)
def test_a_variable_cannot_bring_a_header_into_the_mail(control: str) -> None:
    body = mail(text=None, subject=None, template={"id": "welcome"})
    assert list(refusal(body, (f"Welcome, Ada{control}Bcc: eve@example.com", "Hi", None))) == ["template.subject"]


def test_a_mail_whose_time_has_passed_is_late_and_nothing_else() -> None:
    body = mail(expires_at="2020-01-01T00:00:00Z")
    with pytest.raises(Expired) as caught:
        prepare(body, default_sender=None, max_recipients=1)
    assert [error.field for error in caught.value.errors] == ["expires_at"]


def test_a_message_id_is_in_the_domain_of_the_sender() -> None:
    assert message_id("0b9c", Mailbox.parse("Ada <ada@Bücher.example>")) == "<0b9c@xn--bcher-kva.example>"


def test_an_outline_without_content_is_still_a_message() -> None:
    request = parse(mail(tags=[{"name": "a", "value": "b"}]), default_sender=None, max_recipients=1)
    outline, _ = compose(request).to_json()
    message = Message.from_json(outline)
    assert (message.subject, message.text, message.tags) == ("Hello", None, [{"name": "a", "value": "b"}])
    assert str(message.to[0]) == "bob@example.com"
