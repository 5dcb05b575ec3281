"""Checks what the DNS says about the domain of MAIL_FROM: whether receivers have a reason to trust our mail.

A relay such as SES also signs with a domain of its own, so what is missing here is a warning: mail goes out, and some
receivers treat it as spam. A DKIM key cannot be looked up without its selector, which is known where we sign ourselves.
RFC 7208 (SPF), 6376 (DKIM), 7489 (DMARC), 7505 (null MX), 2606 (names for examples)
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from contextlib import suppress

from dns.exception import DNSException, Timeout
from dns.resolver import NXDOMAIN, NoResolverConfiguration, Resolver

from mail.address import Mailbox
from mail.dkim import Signer
from ops.checks.findings import Findings, fault, note, ok, warn
from ops.checks.target import Target
from settings import Settings, SettingsError

MOST_LOOKUPS = 10  # RFC 7208 4.6.4; a receiver stops there with an error
EXAMPLES = re.compile(r"(^|\.)(example|test|invalid|localhost)$|(^|\.)example\.(com|net|org)$")
INCLUDES = {  # a pattern in the relay's name -> what its customers include in their SPF record
    r"google(mail)?\.com$|gmail\.com$": "_spf.google.com",
    r"(office365|outlook)\.com$": "spf.protection.outlook.com",
    r"amazonaws\.com$": "amazonses.com",
    r"sendgrid\.net$": "sendgrid.net",
    r"mailgun\.org$": "mailgun.org",
    r"postmarkapp\.com$": "spf.mtasv.net",
}
SPF, DMARC = r"(?i)v=spf1(\s|$)", r"v=DMARC1\s*(;|$)"  # how their records begin
Ask = Callable[[str, str], list[str]]


def sender(target: Target, settings: Settings) -> Findings:
    if not settings.mail_from:
        yield note("MAIL_FROM is not set: skipped")
        return
    domain = Mailbox.parse(settings.mail_from).address.rpartition("@")[2].lower().rstrip(".")
    if EXAMPLES.search(domain):
        yield warn(f"{domain}, of MAIL_FROM, is a name for examples: no receiver will trust it", target.edit)
        return
    try:
        yield from about(domain.encode("idna").decode(), asker(target), [one.host or "" for one in settings.all_relays])
    except NXDOMAIN:
        yield fault(f"{domain}, of MAIL_FROM, does not exist: receivers refuse such mail", target.edit)
    except (Timeout, NoResolverConfiguration):
        yield warn("the name server does not answer", "resolvectl status, or cat /etc/resolv.conf")
    except (DNSException, UnicodeError):
        yield warn(f"the name server has no valid answer about {domain}", f"dig TXT {domain}")


def asker(target: Target) -> Ask:
    """Returns a function from name and kind to records, of which there may be none. It raises DNSException."""
    resolver = Resolver(configure=target.name_server is None)
    if target.name_server:
        resolver.nameservers, resolver.port = [target.name_server[0]], target.name_server[1]
    resolver.lifetime = target.timeout

    def ask(name: str, kind: str) -> list[str]:
        answer = resolver.resolve(name, kind, raise_on_no_answer=False)
        if kind == "TXT":
            return [b"".join(record.strings).decode("utf-8", "replace") for record in answer]
        return [record.to_text() for record in answer]

    return ask


def texts(name: str, ask: Ask, pattern: str) -> list[str]:
    """Returns the TXT records that begin so; none, too, for a name that does not exist."""
    with suppress(NXDOMAIN):
        return [text for text in ask(name, "TXT") if re.match(pattern, text)]
    return []


def about(domain: str, ask: Ask, relays: Sequence[str]) -> Findings:
    mx = ask(domain, "MX")
    if mx and all(record.split()[1] == "." for record in mx):
        yield warn(f"{domain} says that it accepts no mail: replies and bounces are lost", "give it an MX record")
    elif not (mx or ask(domain, "A") or ask(domain, "AAAA")):
        yield warn(f"{domain} has neither MX nor address: replies and bounces are lost", "give it an MX record")
    else:
        yield ok(f"{domain} can receive replies and bounces")
    yield from spf(domain, ask, relays)
    yield from dmarc(domain, ask)


def spf(domain: str, ask: Ask, relays: Sequence[str]) -> Findings:
    records = texts(domain, ask, SPF)
    includes = [name for relay in relays for pattern, name in INCLUDES.items() if re.search(pattern, relay)]
    missing = [name for name in includes if not records or name not in records[0]]
    lookups = count_lookups(records[0], ask, {domain}) if len(records) == 1 else 0
    if not records:
        include = " ".join(f"include:{name}" for name in dict.fromkeys(includes or ["NAME-THE-RELAY-GIVES"]))
        fix = f'DNS: {domain} TXT "v=spf1 {include} ~all"'
        yield warn(f"{domain} has no SPF record: it does not say which servers may send for it", fix)
    elif len(records) > 1:
        yield warn(f"{domain} has {len(records)} SPF records: receivers ignore all of them", "DNS: merge them into one")
    elif lookups > MOST_LOOKUPS:
        found = f"the SPF record of {domain} takes {lookups} lookups; receivers stop at {MOST_LOOKUPS}"
        yield warn(found, "DNS: take out the includes that you no longer need")
    elif re.search(r"(^|\s)\+?all\b", records[0]):
        yield warn(f"the SPF record of {domain} lets every server send for it", "DNS: write ~all instead of +all")
    elif missing:
        found = f"the SPF record of {domain} does not name {'this relay' if len(relays) == 1 else 'each relay'}"
        yield note(found, f"DNS: add include:{missing[0]}, unless the relay uses a bounce domain of its own")
    else:
        yield ok(f"{domain} has one SPF record, {lookups} lookups")


def count_lookups(record: str, ask: Ask, seen: set[str]) -> int:
    """Counts as RFC 7208 4.6.4 does: include, redirect, a, mx, ptr and exists, also in what is included."""
    count = 0
    for term in record.lower().split()[1:]:
        found = re.match(r"[+?~-]?(include:|redirect=|a|mx|ptr|exists)(?=[:/\s]|$|(?<=[:=]))(.*)", term)
        if not found:
            continue
        count += 1
        name = found[2]
        if found[1] in ("include:", "redirect=") and name not in seen and "%" not in name and len(seen) < 30:
            seen.add(name)
            count += sum(count_lookups(one, ask, seen) for one in texts(name, ask, SPF)[:1])
    return count


def dmarc(domain: str, ask: Ask) -> Findings:
    """Checks the domain's record or, if it has none, its parent's, which then applies."""
    for labels_dropped in range(max(1, domain.count("."))):
        name = "_dmarc." + domain.split(".", labels_dropped)[-1]
        records = texts(name, ask, DMARC)
        if records:
            break
    found = re.search(r";\s*p\s*=\s*(none|quarantine|reject)\b", records[0]) if records else None
    if not records:
        fix = f'DNS: _dmarc.{domain} TXT "v=DMARC1; p=none; rua=mailto:dmarc@{domain}"'
        yield warn(f"{domain} has no DMARC record: Google, Yahoo and Microsoft require one of large senders", fix)
    elif len(records) > 1:
        yield warn(f"{name} has {len(records)} DMARC records, so receivers ignore them all", "DNS: keep one")
    elif not found:
        yield warn(f"{name} has a DMARC record without a policy", f'DNS: {name} TXT "v=DMARC1; p=none; ..."')
    else:
        advice = "; when SPF and DKIM pass, p=quarantine protects the name" if found[1] == "none" else ""
        yield ok(f"{name} has a DMARC record, p={found[1]}{advice}")


def signature(target: Target, settings: Settings) -> Findings:
    """Compares the key that signs with the one that DNS has, by which receivers check it."""
    if not settings.dkim_domain:
        found = "DKIM is the relay's to sign (DKIM_DOMAIN is not set): where DNS has its key stands in a mail only"
        yield note(found, "switch it on at the relay; bin/doctor --send-to YOU shows dkim=pass in the mail's source")
        return
    try:
        signer = Signer.of(settings)
        name = f"{settings.dkim_selector}._domainkey.{settings.dkim_domain}"
        if signer:
            yield from published(signer, name, texts(name, asker(target), ""))
    except SettingsError as error:
        yield fault(str(error), target.edit)
    except (Timeout, NoResolverConfiguration):
        yield warn("the name server does not answer", "resolvectl status, or cat /etc/resolv.conf")
    except (DNSException, UnicodeError):
        yield warn(f"the name server has no valid answer about {name}", f"dig TXT {name}")
    sender = Mailbox.parse(settings.mail_from).address.rpartition("@")[2].lower() if settings.mail_from else ""
    if sender and not f".{sender}".endswith(f".{settings.dkim_domain}"):
        found = f"mail of {sender}, of MAIL_FROM, is not signed: it is not in {settings.dkim_domain}"
        yield warn(found, f"DKIM_DOMAIN must be the domain of the senders; {target.edit}")
    if re.search(r"amazonaws\.com$", settings.smtp_host or ""):
        found = "SES writes Date and Message-ID anew, which breaks our signature"
        yield warn(found, "switch Easy DKIM on in the SES console, and unset DKIM_DOMAIN")


def published(signer: Signer, name: str, records: list[str]) -> Findings:
    write = f'DNS: {name} TXT "{signer.record}"'
    tags = [dict(re.findall(r"(?:^|;)\s*([a-z]+)\s*=\s*([^;]*?)\s*(?=;|$)", record)) for record in records]
    keys = [one for one in tags if "p" in one]
    if not keys:
        yield fault(f"DNS has no key at {name}, so that no receiver can check a signature", write)
    elif len(keys) > 1:
        yield fault(f"DNS has {len(keys)} keys at {name}: receivers take one of them, or none", "DNS: keep one")
    elif not keys[0]["p"]:
        yield fault(f"the key at {name} is revoked (p= is empty), so that each signature is broken", write)
    elif keys[0].get("k", "rsa") != "rsa" or not signer.is_in(keys[0]["p"]):
        yield fault(f"DNS has another key at {name} than DKIM_KEY, so that each signature is broken", write)
    elif "y" in re.split(r"\s*:\s*", keys[0].get("t", "")):
        yield warn(f"the key at {name} is marked as a test (t=y): receivers may act as if nothing was signed", write)
    else:
        yield ok(f"mail is signed with DKIM, and DNS has its key at {name}")
