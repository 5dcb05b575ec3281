"""What the DNS says of MAIL_FROM's domain: what is missing is named with the record to write."""

from __future__ import annotations

import pytest

from ops.checks import names
from ops.checks.findings import FAULT, NOTE, OK, WARN, Finding
from ops.checks.target import Target
from tests.checks.support import SES, assert_finds, listed, of
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


def test_a_domain_with_spf_and_dmarc_is_fine_and_dkim_is_said_to_be_unseen(target: Target) -> None:
    said = about(target, spf=['"v=spf1 include:amazonses.com ~all"'])
    assert [one.level for one in said] == [OK, OK, OK, NOTE]
    assert "DKIM" in said[-1].found


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
