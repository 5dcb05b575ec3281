"""Facts about `mail.address`: an address is what every parser finds in it, or it is refused."""

from __future__ import annotations

import re
from email.utils import parseaddr

import pytest
from hypothesis import given

from mail import address
from mail.address import Mailbox
from mail.request import parse
from tests.sample_mails import PROPERTY, Box, accepted, boxes, mail, refusal


@PROPERTY
@given(boxes())
def test_an_address_is_what_every_parser_of_addresses_finds(box: Box) -> None:
    assert Mailbox.parse(box.written) == (box.name, box.address)
    assert parseaddr(box.address) == ("", box.address)
    assert Mailbox.parse(str(Mailbox.parse(box.written))) == (box.name, box.address)


# fmt: off
NO_ADDRESS = [
    "", " ", "@", "ada", "ada@", "@example.com", "ada@@example.com", "ada@example", "ada@.com", "ada@example..com",
    "ada@example.com.", "ada@-example.com", "ada@example.com-", "ada@exa_mple.com", "ada@localhost",
    ".ada@example.com", "ada.@example.com", "a..da@example.com", "a da@example.com", "ada @example.com",
    "alice@example.org)bob@b.co", "(comment)ada@example.com", "ada@example.com (Ada)", "ada(x)@example.com",
    "ada@example.com SIZE=1", "ada@example.com> SIZE=1", "<ada@example.com> SIZE=1", "ada@example.com,",
    '"ada"@example.com', '"a b"@example.com', '"a@b"@example.com', '"a\\"b"@example.com',
    "<@relay.example,@b.example:ada@example.com>", "@relay.example:ada@example.com", "group: ada@example.com;",
    "ada@[192.0.2.1]", "ada@[IPv6:2001:db8::1]", "ada@192.0.2.1", "<>", "Ada <>", "mailto:ada@example.com",
    "<ada@example.com", "ada@example.com>", "<<ada@example.com>>", "<ada@example.com><", "Ada ada@example.com",
    "\xa0ada@example.com", "ada@example.com\u200b", "e\u0301@example.com", "=?utf-8?q?x?=@example.com",
    "ada@xn--a.com", "ada@e\u202excample.com", "a\u202eda@example.com", f"{'a' * 250}@example.com",
]
# fmt: on


@pytest.mark.parametrize("address", NO_ADDRESS)
def test_what_a_parser_could_read_in_two_ways_is_no_address(address: str) -> None:
    assert list(refusal(mail(to=address))) == ["to[0]"]
    assert list(refusal(mail(**{"from": address or "@"}))) == ["from"]  # an empty one is absent


@pytest.mark.parametrize("glue", [", ", ",", ";", "; ", " ", "> <"])
@pytest.mark.parametrize("form", ["{}", "<{}>", "Ada <{}>", '"Ada" <{}>'])
def test_two_addresses_in_one_are_refused(form: str, glue: str) -> None:
    assert list(refusal(mail(to=[form.format(f"ada@example.com{glue}bob@example.com")]))) == ["to[0]"]
    two = glue.join([form.format("ada@example.com"), form.format("bob@example.com")])
    assert list(refusal(mail(to=["ok@example.com", two]))) == ["to[1]"]


@pytest.mark.parametrize(
    "name", ['"a", "b"', '"a\\"', "a<b", "a@b.example, c", "c; a@b.example", '"', "=?utf-8?q?a=0D=0ABcc:_x?="]
)
def test_a_name_that_could_be_more_than_a_name_is_refused(name: str) -> None:
    assert list(refusal(mail(to=f"{name} <ada@example.com>"))) == ["to[0]"]


LOCALS = ["Ada.B_c+d-e", "a" * 64, "a" * 65, ".a", "a.", "a..b", "ada@b", "a'b", "a b", "a\n", ""]
DOMAINS = [
    "example.com",
    "a-b.c2.example",
    f"{'a' * 63}.com",
    "a" + ".bc" * 62,
    "Example.com",
    f"{'a' * 64}.com",
    "a.com\n",
]
DOMAINS += ["-a.com", "a-.com", "xn--a.com", "ab--c.com", "a..com", "a.com.", "a.c-m", "a.4", "a", "127.0.0.1", "ü.com"]


@pytest.mark.parametrize("local", LOCALS)
@pytest.mark.parametrize("domain", DOMAINS)
def test_what_is_plain_is_what_the_validator_would_return(
    monkeypatch: pytest.MonkeyPatch, local: str, domain: str
) -> None:
    text = f"{local}@{domain}"
    is_plain = bool(address.PLAIN.fullmatch(text))
    assert is_plain == (len(text) < 255 and local in LOCALS[:2] and domain in DOMAINS[:4])
    monkeypatch.setattr(address, "PLAIN", re.compile("(?!)"))
    if is_plain:
        assert address.strict_address(text) == text


def test_the_case_of_a_local_part_is_kept() -> None:
    message = accepted(mail(to=["Info@EXAMPLE.com", "POSTMASTER@Example.com", "McAda@example.com"]))
    assert message.recipients == ["Info@example.com", "POSTMASTER@example.com", "McAda@example.com"]


def test_what_is_too_long_is_refused_before_it_is_looked_at() -> None:
    assert refusal(mail(to=["nobody"] * 1001)) == {"to": "must have at most 1000 entries"}
    assert refusal(mail(to="bob@example.com" + " " * 984)) == {"to[0]": "must be at most 998 characters long"}


@pytest.mark.parametrize("domain", ["corp.local", "mail.home.arpa", "corp.internal", "intra.lan", "x.test", "a.onion"])
def test_whether_a_domain_takes_mail_is_the_relays_to_know(domain: str) -> None:
    """pgadmin4#6222, Mailu#2783, python-email-validator#122, scrob#293."""
    assert accepted(mail(to=f"ada@{domain}")).recipients == [f"ada@{domain}"]


@pytest.mark.parametrize("address", ["root@localhost", "ops@mailhost", "Ada <ada@intranet>"])
def test_a_domain_of_one_word_is_admitted_where_the_operator_says_so(address: str) -> None:
    for field in ("from", "to", "cc", "bcc", "reply_to"):
        body = mail(**{field: address})
        assert [one.split("[")[0] for one in refusal(body)] == [field]
        parse(body, default_sender=None, max_recipients=2, local_domains=True)
