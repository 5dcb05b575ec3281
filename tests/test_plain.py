"""The text that is made from a mail's html."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mail.mime import to_mime
from mail.plain import LONGEST, text_of
from mail.request import body_text
from tests.sample_mails import DATE, ID, ODD_IN_A_BODY, PROPERTY, accepted, mail

# fmt: off
CASES = [
    ("<p>Hello,\n  Ada</p><p>Bye<br>Bob<br><br>PS", "Hello, Ada\n\nBye\nBob\n\nPS"),
    ("<div><div>a</div></div><div>b", "a\nb"),
    ("a <b>b</b>c<i> d</i>", "a bc d"),
    ("10&nbsp;&euro; &lt;b&gt; &amp;amp; &#x41;&#65; &#0; &#99999999999; &nosuch; AT&T &",
     "10 € <b> &amp; AA \ufffd &#99999999999; &nosuch; AT&T &"),
    ("1 < 2 <3 a<b", "1 < 2 <3 a"),
    ('<a href="https://a.example/?b=1&amp;c">go</a>.', "go <https://a.example/?b=1&c>."),
    ("<A HREF=https://a.example/b>go</A><a href='https://a.example'>https://a.example/</a>",
     "go <https://a.example/b>https://a.example/"),
    ('<a href="mailto:a@b.co">a@b.co</a> <a href="mailto:a@b.co">us</a>', "a@b.co us <mailto:a@b.co>"),
    ('<a href="#x">a</a><a href="javascript:b">b</a><a href="https://a.b/ c">c</a><a>d</a>', "abcd"),
    ('<a href="https://a.b"><a href="https://c.d">x', "<https://a.b>x <https://c.d>"),
    ('<a href="https://a.b"><img src="x>y" alt="Our \'logo\'"></a>', "Our 'logo' <https://a.b>"),
    ("<ul><li>a<li><p>b</p><ol><li>c<li>d</ol><li>e</ul>f", "- a\n- b\n\n  1. c\n  2. d\n- e\n\nf"),
    ("<ol><li>a</li>\n<li>b</li></ol></ol></ul><li>c", "1. a\n2. b\n\n- c"),
    ("<table><tr><th>Book</th><td>9</td></tr>\n<tr><td>Pen<td>1</table>x", "Book  9\nPen 1\n\nx"),
    ("<pre>a  b\n  c</pre> d  e", "a  b\n  c\n\nd e"),
    ("a<hr>b<blockquote>c</blockquote>", f"a\n\n{'-' * 20}\n\nb\n\nc"),
    ("<!DOCTYPE html><head><title>t</title><STYLE>s</STYLE ></head>a<script>b('<p>')</script>c<!-- d --><!-->", "ac"),
    ("a<!-- b", "a"), ("a<style>b", "a"), ("a<b c='d>e", "ae"), ("a<?php b ?>c", "ac"),
    ("it<i title=it's>x</i>", "itx"),
    ("&nbsp;&zwnj;" * 50 + "a\u200cb 👨\u200d👩", "a\u200cb 👨\u200d👩"),
    ("<img src='cid:x'>", ""), ("x" * (LONGEST + 1), ""),
]
PIECES = [
    "<", ">", "<a href=", "https://a.b", "</a>", "<p>", "</p", "<br>", "<li>", "<ul>", "</ol>", "<ol>", "<pre>", "<td>",
    "'", "&#13;", "&#x1b;", "&#12;", "&#127;", "&nbsp;", "=", "/", "<!--", "-->", "<script>", "x", *ODD_IN_A_BODY,
]
AGAIN = [
    "<a ", '<a b="', "<a b='", "<!--", "<b>", "<ul><li>", "<br> ", "<td>", "\u200b", "&#", "<script>",
    "<a href=https://a.b>x",
]
# fmt: on
HOSTILE = [line.partition("\t")[2] for line in Path(__file__).with_name("hostile_html.tsv").read_text().splitlines()]


@pytest.mark.parametrize(("html", "text"), CASES)
def test_it_reads_as_the_html_is_seen(html: str, text: str) -> None:
    assert text_of(html) == text


@PROPERTY
@given(st.lists(st.sampled_from(PIECES), max_size=20).map("".join))
def test_whatever_the_html_is_the_text_can_be_sent(html: str) -> None:
    text = text_of(body_text(html))
    assert body_text(text) == text == text.strip("\n")


@pytest.mark.parametrize("html", HOSTILE)
def test_no_script_and_no_address_of_hostile_html_is_shown(html: str) -> None:
    assert not {"RUN", "URL"} & set(text_of(html).replace("/", " ").split())


@pytest.mark.parametrize("again", AGAIN)
def test_hostile_html_takes_no_longer_than_its_length(again: str) -> None:
    """In quadratic time, each would take hours."""
    text_of(again * (LONGEST // 4 // len(again)))


@pytest.mark.parametrize(("given", "sent"), [(None, b"\r\n\r\nHi\r\n"), ("Own", b"\r\n\r\nOwn\r\n"), ("", None)])
def test_a_mail_has_it_unless_it_brings_a_text_or_an_empty_one(given: str | None, sent: bytes | None) -> None:
    mime = to_mime(accepted(mail(text=None, html="<p>Hi") | ({} if given is None else {"text": given})), ID, DATE)
    assert (b"text/plain" in mime) is bool(sent)
    assert (sent or b"<p>Hi") in mime
