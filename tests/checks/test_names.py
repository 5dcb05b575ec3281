"""What the DNS says of MAIL_FROM's domain: what is missing is named with the record to write."""

from __future__ import annotations

import subprocess

import pytest

from mail.dkim import Signer
from ops.checks import names
from ops.checks.findings import FAULT, NOTE, OK, WARN, Finding
from ops.checks.target import Target
from tests.checks.support import GMAIL, SES, assert_finds, listed, of
from tests.name_server import NameServer, Zone

GOOD: Zone = {
    ("acme.shop", "MX"): ["10 mx.acme.shop."],
    ("acme.shop", "TXT"): ['"v=spf1 include:spf.relay.shop ~all"', '"something else"'],
    ("spf.relay.shop", "TXT"): ['"v=spf1 a mx ip4:192.0.2.1 -all"'],
    ("_dmarc.acme.shop", "TXT"): ['"v=DMARC1; p=quarantine"'],
}


def about(target: Target, **changes: list[str] | None) -> list[Finding]:
    """What is said of acme.shop with another record; `dmarc`, `spf`, `mx`."""
    keys = {"mx": ("acme.shop", "MX"), "spf": ("acme.shop", "TXT"), "dmarc": ("_dmarc.acme.shop", "TXT")}
    zone = GOOD | {keys[name]: records or [] for name, records in changes.items()}
    zone |= {(f"s{number}.shop", "TXT"): [f'"v=spf1 include:s{number + 1}.shop -all"'] for number in range(20)}
    with NameServer({key: records for key, records in zone.items() if records}) as there:
        target.name_server = there.address
        return listed(names.sender(target, of(mail_from="Acme <hello@acme.shop>", smtp_host=SES)))


def test_a_domain_with_spf_and_dmarc_is_fine(target: Target) -> None:
    said = about(target, spf=['"v=spf1 include:amazonses.com ~all"'])
    assert [one.level for one in said] == [OK, OK, OK]


@pytest.mark.parametrize(
    ("changes", "found", "fix"),
    [
        ({"spf": ['"something else"']}, "has no SPF record", "v=spf1 include:amazonses.com ~all"),
        ({"spf": ['"v=spf1 a -all"', '"v=spf1 mx -all"']}, "has 2 SPF records", "merge"),
        ({"spf": ['"v=spf1 include:s0.shop -all"']}, "takes 21 lookups", "take out the includes"),
        ({"spf": ['"v=spf1 +all"']}, "lets every server send", "~all"),
        ({"spf": ['"v=spf1 all"']}, "lets every server send", "~all"),
        ({"dmarc": None}, "has no DMARC record", "v=DMARC1; p=none"),
        ({"dmarc": ['"v=DMARC1; p=none"', '"v=DMARC1; p=reject"']}, "has 2 DMARC records", "keep one"),
        ({"dmarc": ['"v=DMARC1"']}, "without a policy", "p=none"),
        ({"mx": ["0 ."]}, "accepts no mail", "MX"),
        ({"mx": None}, "has neither MX nor address", "MX"),
    ],
)
def test_what_the_dns_lacks_is_named_with_the_record_to_write(
    target: Target, changes: dict[str, list[str] | None], found: str, fix: str
) -> None:
    said = [one for one in about(target, **changes) if one.level == WARN]
    assert [one for one in said if found in one.found and fix in one.fix], said
    assert len(said) == 1


def test_the_dmarc_record_of_the_parent_holds_where_a_domain_has_none() -> None:
    def ask(name: str, kind: str) -> list[str]:
        return ["v=DMARC1; p=none"] if name == "_dmarc.acme.shop" else []

    assert_finds(names.dmarc("news.mail.acme.shop", ask), OK, "_dmarc.acme.shop has a DMARC record, p=none")


def test_an_spf_record_that_does_not_name_the_relay_is_a_note(target: Target) -> None:
    assert any(one.level == NOTE and "does not name this relay" in one.found for one in about(target))
    record, hosts = ["v=spf1 include:amazonses.com ~all"], [SES, GMAIL]
    assert_finds(names.spf("a.shop", lambda *_: record, hosts), NOTE, "not name each", "add include:_spf.google.com")


def test_lookups_are_counted_as_rfc_7208_does() -> None:
    def ask(name: str, kind: str) -> list[str]:
        return ["v=spf1 a:x.example mx/24 ip4:192.0.2.0/24 redirect=loop.example"] if name == "loop.example" else []

    count = names.count_lookups("v=spf1 ip6:2001:db8::/32 -a ?ptr exists:%{i}.x include:loop.example -all", ask, set())
    assert count == 4 + 3
    assert names.count_lookups("v=spf1 include:all.example amx.example ~all", ask, set()) == 1


def test_a_domain_that_does_not_exist_or_cannot_be_asked_about_is_named(target: Target) -> None:
    settings = of(mail_from="hello@acme.shop")
    with NameServer({}) as there:
        target.name_server = there.address
        assert_finds(names.sender(target, settings), FAULT, "acme.shop, of MAIL_FROM, does not exist", "edit")
    with NameServer({}, silent=True) as there:
        target.name_server = there.address
        assert_finds(names.sender(target, settings), WARN, "the name server does not answer", "resolv")
    with NameServer({}, fails=True) as there:
        target.name_server = there.address
        assert_finds(names.sender(target, settings), WARN, "has no valid answer about acme.shop", "dig")
    assert_finds(names.sender(target, of(mail_from="hello@example.com")), WARN, "a name for examples", "edit")


KEY = subprocess.run(["openssl", "genrsa", "1024"], capture_output=True, text=True, check=True).stdout
RECORD = Signer("acme.shop", "s1", KEY).record
OTHER = "v=DKIM1; k=rsa; p=MFwwDQYJKoZIhvcNAQEBBQADSwAwSAJBALc="
# fmt: off
PUBLISHED = {  # what is found -> its level, the records that DNS has, the fix
    "DNS has its key at s1._domainkey.acme.shop": (OK, [RECORD], ""),
    "DNS has its key": (OK, [RECORD.replace("v=DKIM1; k=rsa; ", " ") + " ; t=s", "something else"], ""),
    "DNS has no key at s1._domainkey.acme.shop": (FAULT, [], RECORD),
    "DNS has 2 keys": (FAULT, [RECORD, OTHER], "keep one"),
    "is revoked": (FAULT, ["v=DKIM1; p="], RECORD),
    "DNS has another key": (FAULT, [OTHER], RECORD),
    "another key at": (FAULT, [RECORD.replace("k=rsa", "k=ed25519")], RECORD),
    "than DKIM_KEY": (FAULT, ["v=DKIM1; p=!garbage!"], RECORD),
    "marked as a test (t=y)": (WARN, [RECORD + "; t=s:y"], RECORD),
}
# fmt: on


@pytest.mark.parametrize("found", PUBLISHED)
def test_the_key_that_signs_is_compared_with_the_one_in_dns(target: Target, found: str) -> None:
    level, records, fix = PUBLISHED[found]
    quoted = [" ".join(f'"{one[start : start + 200]}"' for start in range(0, len(one), 200)) for one in records]
    zone = GOOD | ({("s1._domainkey.acme.shop", "TXT"): quoted} if quoted else {})
    with NameServer(zone) as there:
        target.name_server = there.address
        of_ours = {"dkim_domain": "acme.shop", "dkim_selector": "s1", "dkim_key": KEY}
        assert_finds(names.signature(target, of(mail_from="a@news.acme.shop", **of_ours)), level, found, fix)
        elsewhere = names.signature(target, of(mail_from="a@acme.example", smtp_host=SES, **of_ours))
        said = [one.found for one in elsewhere if one.level == WARN and "t=y" not in one.found]
    assert ["is not signed" in said[0], "SES writes Date" in said[1], len(said)] == [True, True, 2]


def test_a_key_that_is_none_or_a_dns_that_is_silent_is_said(target: Target) -> None:
    half = {"dkim_domain": "acme.shop", "dkim_selector": "s1"}
    assert_finds(names.signature(target, of(**half)), FAULT, "DKIM_KEY is not set")
    assert_finds(names.signature(target, of(**half, dkim_key="x")), FAULT, "must be an RSA private key")
    assert_finds(names.signature(target, of()), NOTE, "DKIM_DOMAIN is not set")
    with NameServer({}, silent=True) as there:
        target.name_server, target.timeout = there.address, 0.2
        assert_finds(names.signature(target, of(**half, dkim_key=KEY)), WARN, "does not answer")
