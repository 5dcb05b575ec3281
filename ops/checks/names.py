"""What the DNS says about the domain of MAIL_FROM: whether receivers have a reason to believe our mail.

A relay such as SES signs and vouches with a domain of its own, too, so what is missing here is a warning: mail goes
out, and some receivers take it for spam. A DKIM key cannot be looked up without its selector, which is in the mail.
RFC 7208 (SPF), 6376 (DKIM), 7489 (DMARC), 7505 (null MX), 2606 (names for examples)
"""

from __future__ import annotations

import re
from collections.abc import Callable

from dns.exception import DNSException, Timeout
from dns.resolver import NXDOMAIN, NoAnswer, NoResolverConfiguration, Resolver

from mail.address import Mailbox
from ops.checks.findings import Findings, Place, fault, note, ok, warn

MOST_LOOKUPS = 10  # RFC 7208 4.6.4; a receiver stops there with an error
EXAMPLES = re.compile(r"(^|\.)(example|test|invalid|localhost)$|(^|\.)example\.(com|net|org)$")
VOUCHERS = {  # a pattern in the relay's name -> what its customers include
    r"google(mail)?\.com$|gmail\.com$": "_spf.google.com",
    r"(office365|outlook)\.com$": "spf.protection.outlook.com",
    r"amazonaws\.com$": "amazonses.com",
    r"sendgrid\.net$": "sendgrid.net",
    r"mailgun\.org$": "mailgun.org",
    r"postmarkapp\.com$": "spf.mtasv.net",
}
Ask = Callable[[str, str], list[str]]


def sender(place: Place) -> Findings:
    assert place.settings
    if not place.settings.mail_from:
        yield note("MAIL_FROM is not set: skipped")
        return
    domain = Mailbox.parse(place.settings.mail_from).address.rpartition("@")[2].lower().rstrip(".")
    if EXAMPLES.search(domain):
        yield warn(f"{domain}, of MAIL_FROM, is a name for examples: no receiver will believe it", place.edit)
        return
    try:
        ask = asker(place)
        yield from about(domain.encode("idna").decode(), ask, place)
    except NXDOMAIN:
        yield fault(f"{domain}, of MAIL_FROM, does not exist: receivers refuse such mail", place.edit)
    except (Timeout, NoResolverConfiguration):
        yield warn("the name server does not answer", "resolvectl status, or cat /etc/resolv.conf")
    except (DNSException, UnicodeError):
        yield warn(f"the name server has no proper answer about {domain}", f"dig TXT {domain}")


def asker(place: Place) -> Ask:
    """`ask(name, kind)` gives the records, none where there are none. Raises NXDOMAIN, and what else DNS may do."""
    resolver = Resolver(configure=place.name_server is None)
    if place.name_server:
        resolver.nameservers, resolver.port = [place.name_server[0]], place.name_server[1]
    resolver.lifetime = place.patience

    def ask(name: str, kind: str) -> list[str]:
        try:
            answer = resolver.resolve(name, kind)
        except NoAnswer:
            return []
        if kind == "TXT":
            return [b"".join(record.strings).decode("utf-8", "replace") for record in answer]
        return [record.to_text() for record in answer]

    return ask


def or_none(ask: Ask, name: str, kind: str) -> list[str]:
    """For a name that need not exist."""
    try:
        return ask(name, kind)
    except NXDOMAIN:
        return []


def about(domain: str, ask: Ask, place: Place) -> Findings:
    mx = ask(domain, "MX")
    if mx and all(record.split()[1] == "." for record in mx):
        yield warn(f"{domain} says that it takes no mail: replies and bounces are lost", "give it an MX record")
    elif not mx and not ask(domain, "A") and not ask(domain, "AAAA"):
        yield warn(f"{domain} has neither MX nor address: replies and bounces are lost", "give it an MX record")
    else:
        yield ok(f"{domain} can take replies and bounces")
    yield from spf(domain, ask, place)
    yield from dmarc(domain, ask)
    found = f"DKIM of {domain} cannot be looked up from here: its key's name is in the mail"
    yield note(found, "switch it on at the relay; bin/doctor --send-to YOU shows dkim=pass in the mail's source")


def spf(domain: str, ask: Ask, place: Place) -> Findings:
    assert place.settings
    records = spf_of(domain, ask)
    host = place.settings.smtp_host or ""
    voucher = next((name for pattern, name in VOUCHERS.items() if re.search(pattern, host)), "NAME-THE-RELAY-GIVES")
    if not records:
        mend = f'DNS: {domain} TXT "v=spf1 include:{voucher} ~all"'
        yield warn(f"{domain} has no SPF record: nobody is named who may send for it", mend)
        return
    if len(records) > 1:
        yield warn(f"{domain} has {len(records)} SPF records, so receivers obey none", "DNS: merge them into one")
        return
    lookups = count_lookups(records[0], ask, {domain})
    if lookups > MOST_LOOKUPS:
        found = f"the SPF record of {domain} takes {lookups} lookups; receivers stop at {MOST_LOOKUPS}"
        yield warn(found, "DNS: take out the includes that you no longer need")
    elif re.search(r"(^|\s)\+?all\b", records[0]):
        yield warn(f"the SPF record of {domain} lets everybody send for it", "DNS: write ~all instead of +all")
    elif voucher in VOUCHERS.values() and voucher not in records[0]:
        found = f"the SPF record of {domain} does not name this relay"
        yield note(found, f"DNS: add include:{voucher}, unless the relay uses a bounce domain of its own")
    else:
        yield ok(f"{domain} has one SPF record, {lookups} lookups")


def spf_of(name: str, ask: Ask) -> list[str]:
    return [text for text in or_none(ask, name, "TXT") if re.match(r"v=spf1(\s|$)", text, re.IGNORECASE)]


def count_lookups(record: str, ask: Ask, seen: set[str]) -> int:
    """RFC 7208 4.6.4: include, redirect, a, mx, ptr and exists cost one each, and what is included counts along."""
    count = 0
    for term in record.lower().split()[1:]:
        found = re.match(r"[+?~-]?(include:|redirect=|a|mx|ptr|exists)(?=[:/\s]|$|(?<=[:=]))(.*)", term)
        if not found:
            continue
        count += 1
        name = found[2]
        if found[1] in ("include:", "redirect=") and name not in seen and "%" not in name and len(seen) < 30:
            seen.add(name)
            count += sum(count_lookups(one, ask, seen) for one in spf_of(name, ask)[:1])
    return count


def dmarc(domain: str, ask: Ask) -> Findings:
    """A domain without a record of its own goes by its parent's."""
    labels = domain.split(".")
    for start in range(max(1, len(labels) - 1)):
        name = "_dmarc." + ".".join(labels[start:])
        records = [text for text in or_none(ask, name, "TXT") if re.match(r"v=DMARC1\s*(;|$)", text)]
        if records:
            yield from policy(name, records)
            return
    mend = f'DNS: _dmarc.{domain} TXT "v=DMARC1; p=none; rua=mailto:dmarc@{domain}"'
    yield warn(f"{domain} has no DMARC record: Google, Yahoo and Microsoft want one from whoever sends much", mend)


def policy(name: str, records: list[str]) -> Findings:
    found = re.search(r";\s*p\s*=\s*(none|quarantine|reject)\b", records[0])
    if len(records) > 1:
        yield warn(f"{name} has {len(records)} DMARC records, so receivers obey none", "DNS: keep one")
    elif not found:
        yield warn(f"{name} has a DMARC record without a policy", f'DNS: {name} TXT "v=DMARC1; p=none; ..."')
    else:
        advice = "; when SPF and DKIM pass, p=quarantine protects the name" if found[1] == "none" else ""
        yield ok(f"{name} has a DMARC record, p={found[1]}{advice}")
