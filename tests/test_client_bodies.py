"""The bodies that real clients send, as they come over the wire, and what is made of each.

Taken from the packages themselves where they install (resend for Python 2.52 and Node 6.38, anymail 15.2), else from
their sources.
"""

from __future__ import annotations

import json
from operator import attrgetter
from typing import Any

import pytest

from tests.sample_mails import accepted, refusal

ACME = '"from":"Acme <hello@acme.example>","to":["ada@example.com"],"subject":"Hello"'
BODY = f'{ACME},"html":"<p>Hi"'
HELLO = {"filename": "a.txt", "content": "aGVsbG8=", "content_type": "text/plain"}
# fmt: off
TAKEN: list[tuple[str, str, dict[str, Any]]] = [  # client and form, its body, what is in the mail
    ("python list(bytes), ruby .bytes, go []int, rust Vec<u8>",
     f'{{{BODY},"attachments":[{{"filename":"a.txt","content":[104,101,108,108,111]}}]}}', {"attachments": [HELLO]}),
    ("node Buffer before 6.3x", f'{{{BODY},"attachments":[{{"filename":"a.txt",'
     '"content":{"type":"Buffer","data":[104,101,108,108,111]}}]}', {"attachments": [HELLO]}),
    ("node filename false", f'{{{BODY},"attachments":[{{"content":"aGVsbG8=","filename":false,'
     '"content_type":"text/plain"}]}', {"attachments": [HELLO | {"filename": "attachment.txt"}]}),
    ("java, .NET null in a file", f'{{{BODY},"attachments":[{{"filename":null,"content":"aGVsbG8=","path":null,'
     '"content_type":null,"content_id":null}]}',
     {"attachments": [HELLO | {"filename": "attachment.bin", "content_type": "application/octet-stream"}]}),
    ("python both names of an id", f'{{{BODY},"attachments":[{{"filename":"a.txt","content":"aGVsbG8=",'
     '"content_id":"logo","inline_content_id":"logo"}]}', {"attachments": [HELLO | {"content_id": "logo"}]}),
    ("python, go inline_content_id", f'{{{BODY},"attachments":[{{"filename":"a.txt","content":"aGVsbG8=",'
     '"inline_content_id":"logo"}]}', {"attachments": [HELLO | {"content_id": "logo"}]}),
    ("laravel content_id is the file's name", f'{{{ACME},"html":"<img src=\\"cid:my logo.png\\"><i cid:my%20logo.png>",'
     '"attachments":[{"filename":"a.txt","content":"aGVsbG8=","content_id":"<my logo.png>"}]}',
     {"attachments": [HELLO | {"content_id": "my_logo.png"}],
      "html": '<img src="cid:my_logo.png"><i cid:my_logo.png>'}),
    ("anymail a type with a quoted charset", f'{{{BODY},"attachments":[{{"content":"aGVsbG8=","filename":"a.txt",'
     '"content_type":"text/plain; charset=\\"utf-8\\""}]}',
     {"attachments": [HELLO | {"content_type": "text/plain; charset=utf-8"}]}),
    ("php, laravel headers []", f'{{{BODY},"headers":[],"cc":[],"bcc":[],"reply_to":[],"text":null}}', {"headers": {}}),
    ("swoosh headers as a list", f'{{{BODY},"headers":[{{"name":"X-A","value":"1"}},{{"name":"X-B","value":"é"}}]}}',
     {"headers": {"X-A": "1", "X-B": "é"}}),
    ("anymail X-Tag, rails numbers and lists",
     f'{{{BODY},"headers":{{"X-Tag":["a","b"],"X-N":7,"X-F":[1.5,2],"References":["<1@b.co>","<2@b.co>"]}}}}',
     {"headers": {"X-Tag": "a, b", "X-N": "7", "X-F": "1.5, 2", "References": "<1@b.co> <2@b.co>"}}),
    ("anymail, rails what we write anyway", f'{{{BODY},"headers":{{"Message-ID":"<1@acme.example>",'
     '"date":"Fri, 27 Nov 2026 01:53:04 +0000","MIME-Version":"1.0","Content-Transfer-Encoding":"7bit",'
     '"X-Tags":"[\\"a b\\"]"}}', {"headers": {"X-Tags": '["a b"]'}}),
    ("symfony headers repeat", f'{{{BODY},"reply_to":"R <r@acme.example>","headers":{{"Sender":"a@b.example",'
     '"Reply-To":"R <R@acme.example>","X-A":"1"}}',
     {"headers": {"X-A": "1"}, "reply_to": [("R", "r@acme.example")]}),
    ("symfony the others to reply to are in the header alone", f'{{{BODY},"reply_to":"R <r@acme.example>","headers":{{'
     '"Reply-To":"R <r@Acme.example>, \\"S, T\\" <s@b.co>, =?utf-8?q?=C3=9C?= <u@b.co>, s@b.co"}}',
     {"headers": {}, "reply_to": [("R", "r@acme.example"), ("S, T", "s@b.co"), ("Ü", "u@b.co")]}),
    ("php variables []", f'{{{ACME},"template":{{"id":"welcome","variables":[]}}}}', {"subject": "Hello"}),
    ("go a template", '{"from":"","to":["ada@example.com"],"subject":"","template":{"id":"welcome"}}',
     {"sender": ("Acme", "hello@example.com"), "subject": "Of the template"}),
    ("go a subject of one's own", '{"from":"","to":["ada@example.com"],"subject":"","text":"Hi"}', {"subject": ""}),
    *((f"symfony, swoosh, anymail: {written}", json.dumps(
        {"from": f"{written} <a@acme.example>", "to": f"{written}<b@b.co>", "subject": "", "text": "Hi"}),
       {"sender": (name, "a@acme.example"), "to": [(name, "b@b.co")]}) for written, name in (
        ("Acme, Inc.", "Acme, Inc."), ("Müller & Co. (GmbH)", "Müller & Co. (GmbH)"), ("a: b; [c]", "a: b; [c]"),
        ('Ada "Bo" \\ L.', 'Ada "Bo" \\ L.'), ("hello@acme.example", "hello@acme.example"),
        ('"Lovelace, Ada"', "Lovelace, Ada"), ('"=?utf-8?q?x?="', "=?utf-8?q?x?="),
        ("=?utf-8?q?M=C3=BCller=2C_Ada?=", "Müller, Ada"), ("=?UTF-8?B?w4l0w6k=?= B.", "Été B."),
        ("=?utf-8?q?=C3?= =?utf-8?q?=A9?=  x", "é  x"), ("=?iso-8859-1*de?q?=FC?=", "ü"),
        *((same, same) for same in ("=?rot13?q?a?=", "=?iso-8859-99?q?a?=", "=?utf-8?q?=FF?=", "a=?utf-8?q?b?=")),
    )),
    ("symfony tags", f'{{{BODY},"tags":[{{"X-Tag":"welcome"}},{{"name":"a","value":"b"}}]}}',
     {"tags": [{"name": "X-Tag", "value": "welcome"}, {"name": "a", "value": "b"}]}),
    ("python, node topic_id", f'{{{BODY},"topic_id":"t1"}}', {"tags": []}),
    ("anymail 15.2, whole", r"""{"from": "\"Acme, Inc. (M\u00fcller)\" <hello@acme.example>",
      "to": ["\"Lovelace, Ada\" <ada@b.co>", "\"M\u00fcller & Co. (GmbH)\" <m@b.co>"],
      "cc": ["bob@b.co"], "subject": "Hello", "reply_to": ["\"R, \u00dc\" <r@b.co>"],
      "headers": {"X-Custom": "7", "Message-ID": "<1@acme.example>", "X-Metadata": "{\"note\": \"\\u00fc\"}"},
      "text": "Hi", "html": "<img src=\"cid:179.49.128.img@inline\">", "attachments": [
      {"content": "aGVsbG8=", "filename": "a.txt", "content_type": "text/plain; charset=\"utf-8\"",
      "content_id": "179.49.128.img@inline"}]}""",
     {"sender": ("Acme, Inc. (Müller)", "hello@acme.example"), "recipients": ["ada@b.co", "m@b.co", "bob@b.co"],
      "reply_to": [("R, Ü", "r@b.co")], "headers": {"X-Custom": "7", "X-Metadata": '{"note": "\\u00fc"}'},
      "html": '<img src="cid:179.49.128.img@inline">'}),
    ("node 6.38, whole", '{"attachments":[{"content":"aGVsbG8=","filename":"a.txt","content_type":"text/plain"}],'
     '"from":"Acme <hello@acme.example>","html":"<p>Hi","reply_to":"x@acme.example","subject":"Hello",'
     '"tags":[{"name":"a","value":"b"}],"to":["ada@example.com"],"topic_id":null}',
     {"attachments": [HELLO], "reply_to": [("", "x@acme.example")], "tags": [{"name": "a", "value": "b"}]}),
]
REFUSED: list[tuple[str, str, str, str]] = [  # client and form, its body, the field that is named, what is said of it
    ("node path", f'{{{BODY},"attachments":[{{"path":"https://a.example/x.png"}}]}}',
     "attachments[0].path", "no file is fetched"),
    ("two ids", f'{{{BODY},"attachments":[{{"content":"","content_id":"a","inline_content_id":"b"}}]}}',
     "attachments[0].inline_content_id", "leave one of the two out"),
    ("Buffer of other numbers", f'{{{BODY},"attachments":[{{"content":{{"type":"Buffer","data":[256]}}}}]}}',
     "attachments[0].content", "from 0 to 255"),
    ("an id that ends a line", f'{{{BODY},"attachments":[{{"content":"","content_id":"a\\r\\nBcc: x"}}]}}',
     "attachments[0].content_id", "line break"),
    ("headers one name twice", f'{{{BODY},"headers":[{{"name":"X-A","value":"1"}},{{"name":"X-A","value":"2"}}]}}',
     "headers", "a list of values"),
    ("symfony another Reply-To", f'{{{BODY},"reply_to":"r@acme.example","headers":{{"Reply-To":"xr@acme.example"}}}}',
     "headers.Reply-To", "the field reply_to"),
    *(("symfony a Reply-To that cannot be read",
       f'{{{BODY},"reply_to":"r@b.co","headers":{{"Reply-To":"r@b.co, {other}"}}}}', "headers.Reply-To", told)
      for other, told in (("S", "left out"), ('\\"S <s@b.co>', "left out"), ("a@b.co c@d.co", "left out"),
                          (", ".join(f"p{number}@b.co" for number in range(50)), "at most 50"))),
    ("a value that ends a line", f'{{{BODY},"headers":{{"X-A":["1","2\\r\\nBcc: x@b.co"]}}}}',
     "headers.X-A", "line break"),
    ("node react", f'{{{BODY},"react":{{}}}}', "react", "render it to html"),
    ("symfony a tag of other characters", f'{{{BODY},"tags":[{{"X-Tag":"a b"}}]}}', "tags[0].value", "must match"),
]
# fmt: on


@pytest.mark.parametrize(("body", "expected"), [row[1:] for row in TAKEN], ids=[row[0] for row in TAKEN])
def test_what_a_client_means_is_what_is_sent(body: str, expected: dict[str, Any]) -> None:
    asked = json.loads(body)
    message = accepted(asked, ("Of the template", "Hi", None) if "template" in asked else None)
    assert {name: attrgetter(name)(message) for name in expected} == expected


@pytest.mark.parametrize(("body", "field", "told"), [row[1:] for row in REFUSED], ids=[row[0] for row in REFUSED])
def test_what_would_be_another_mail_is_refused(body: str, field: str, told: str) -> None:
    assert told in refusal(json.loads(body))[field]
