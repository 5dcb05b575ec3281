"""DKIM: what goes out is what was signed, as a receiver checks it against DNS; and what is not signed."""

from __future__ import annotations

import base64
import subprocess
from functools import lru_cache
from typing import Any

import dkim
import pytest
from hypothesis import given

from mail import delivery
from mail.dkim import FORM, Signer
from mail.mime import to_mime
from mail.outbox import Outbox
from mail.raw import NotAMail, check
from settings import Settings, SettingsError
from tests.conversations import POOL, attempt, served
from tests.mails import accept
from tests.sample_mails import DATE, ID, WHOLE, accepted, mail, requests, with_file

DOMAIN = "example.com"


@lru_cache(maxsize=4)
def a_key(*how: str) -> str:
    return subprocess.run(["openssl", *how], capture_output=True, text=True, check=True).stdout


def rsa(bits: int = 1024) -> str:
    return a_key("genrsa", str(bits))


SIGNER = Signer(DOMAIN, "s1", rsa())


def is_signed(mime: bytes) -> bool:
    """Whether a receiver finds a good signature, with the record that the doctor tells to publish."""

    def ask(name: bytes, timeout: float = 5) -> bytes:
        assert name == b"s1._domainkey.example.com."
        return SIGNER.record.encode()

    return bool(dkim.verify(mime, dnsfunc=ask))


def written(body: Any) -> bytes:
    return to_mime(accepted(body), ID, DATE)


BODIES = {
    "text": mail(),
    "a file, html and copies": with_file()
    | {"html": "<p>Grüße</p>", "cc": ["c@example.com"], "reply_to": "r@example.com"},
    "one-click": mail(unsubscribe_url="https://example.com/u?x=1"),
    "dots and blanks": mail(text=".\n..\n \t \n\n.x  y\n\n\n"),
    "a long subject": mail(subject="Überraschung " * 20),
    "below the domain": mail(**{"from": "Ada <ada@news.example.com>"}),
}


@pytest.mark.parametrize("kind", BODIES)
def test_a_receiver_finds_the_signature_good_over_what_the_relay_got(kind: str) -> None:
    with served() as (there, to):
        attempt(to, mime=SIGNER.signed(written(BODIES[kind])))
    got = there.accepted[0].replace(b"\r\n..", b"\r\n.")
    assert is_signed(got)
    signed = {name.strip() for name in dkim.DKIM(got).headers[0][1].split(b"h=")[1].split(b";")[0].split(b":")}
    assert signed >= {b"from", b"to", b"subject", b"date", b"message-id", b"content-type"}
    assert (b"list-unsubscribe-post" in signed and b"list-unsubscribe" in signed) == (kind == "one-click")
    for forged in (b"From: eve@example.com\r\n", b"Subject: Pay\r\n", b"Reply-To: eve@example.net\r\n"):
        assert not is_signed(forged + got)
    assert not is_signed(got + b"more\r\n")


@WHOLE
@given(requests())
def test_any_mail_is_signed_as_it_goes_out(given_to: Any) -> None:
    body, _ = given_to
    mime = written(body)
    assert Signer("other.example", "s1", rsa()).signed(mime) == mime
    domain = accepted(body).sender.address.rpartition("@")[2].lower()
    signed = Signer(domain, "s1", rsa()).signed(mime)
    assert signed.endswith(mime)
    assert dkim.verify(signed, dnsfunc=lambda *_, **__: SIGNER.record.encode())


RAW = b"From: Ada <ada@example.com>\r\nTo: b@example.net\r\nSubject: Hi\r\n\r\nGr\xc3\xbc\xc3\x9fe\r\n"
# fmt: off
AS_THEY_CAME = {  # a mail that came by SMTP -> whether it is signed
    "8-bit": (RAW, True),
    "an address in UTF-8": (RAW.replace(b"To: b@", "To: ä@".encode()), True),
    "signed by another": (b"DKIM-Signature: v=1; d=esp.example; s=x\r\n" + RAW, True),
    "signed by the domain": (b"DKIM-Signature: v=1;\r\n\tD=x; d=Example.com ; s=x\r\n" + RAW, False),
    "of another domain": (RAW.replace(b"ada@example.com", b"ada@notexample.com"), False),
    "of two senders": (RAW.replace(b"Ada <ada@example.com>", b"a@example.com, e@example.net"), False),
    "with two From": (b"From: a@example.com\r\n" + RAW, False),
    "without From": (RAW[RAW.index(b"To:"):], False),
    "a field that is none to the library": (b"X-A : b\r\n" + RAW, False),
    "fields without end": (b"Subject: s\r\n" * 5000 + RAW, False),
    "no header": (b"\r\nbody\r\n", False),
    "nothing": (b"", False),
}
# fmt: on


@pytest.mark.parametrize("kind", AS_THEY_CAME)
def test_a_mail_that_came_by_smtp_gets_one_signature_or_goes_out_as_it_came(kind: str) -> None:
    came, is_to_be = AS_THEY_CAME[kind]
    signed = SIGNER.signed(came)
    assert (signed != came) == is_to_be
    assert signed.endswith(came)
    assert is_signed(signed) if is_to_be else not signed.startswith(b"DKIM-Signature: v=1; a=")
    try:
        check(signed)
    except NotAMail:
        assert not is_to_be


KEYS = {
    "nothing": "",
    "no key": "hunter2",
    "an Ed25519 key": lambda: a_key("genpkey", "-algorithm", "ed25519"),
    "a key with a passphrase": lambda: a_key("genrsa", "-aes128", "-passout", "pass:hunter2", "1024"),
    "a short key": lambda: rsa(768),
    "a certificate's text": "-----BEGIN CERTIFICATE-----\naHVudGVyMg==\n-----END CERTIFICATE-----",
}


@pytest.mark.parametrize("kind", KEYS)
def test_a_key_that_cannot_sign_stops_the_worker_and_is_not_shown(kind: str) -> None:
    text: Any = KEYS[kind]
    given_key = {"dkim_key": text() if callable(text) else text} if text else {}
    with pytest.raises(SettingsError) as caught:
        Signer.of(Settings(dkim_domain=DOMAIN, dkim_selector="s1", **given_key))
    assert caught.value.faults == [FORM] if given_key else "DKIM_KEY is not set" in str(caught.value)


def test_a_key_may_come_in_any_of_its_forms() -> None:
    traditional = subprocess.run(
        ["openssl", "rsa", "-traditional"], input=rsa(), capture_output=True, text=True, check=True
    ).stdout
    one_line = "".join(rsa().splitlines()[1:-1])
    for text in (traditional, one_line, rsa().replace("\n", "\r\n")):
        assert Signer(DOMAIN, "s1", text).modulus == SIGNER.modulus
    public = subprocess.run(["openssl", "rsa", "-pubout", "-outform", "DER"], input=rsa().encode(), capture_output=True)
    assert SIGNER.record == f"v=DKIM1; k=rsa; p={base64.b64encode(public.stdout).decode()}"


def test_an_attempt_signs_and_without_the_settings_nothing_is_loaded_or_added(
    outbox: Outbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert delivery.Delivery(outbox).signer is None
    given_to = {"dkim_domain": DOMAIN, "dkim_selector": "s1", "dkim_key": rsa()}
    with served() as (there, to):
        outbox.settings = Settings(**given_to)
        made = delivery.Delivery(outbox)
        made.routes.ways[0].relay, made.pool = to, POOL
        assert made.deliver(accept(outbox)) == "sent"
    assert is_signed(there.accepted[0])
