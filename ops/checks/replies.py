"""Explains a relay's refusal and says how to fix it, for the three relays that most people use and for any other.

A table: relay, phase, code, words of the reply -> meaning, fix. The first row that matches applies. The words are
matched and never repeated, since a reply may quote a login or an address. What no row knows is judged by smtp.policy,
as the workers do.
Gmail: https://support.google.com/a/answer/3726730  Microsoft 365: https://learn.microsoft.com/exchange/mail-flow-best-practices/
Amazon SES: https://docs.aws.amazon.com/ses/latest/dg/troubleshoot-smtp.html
"""

from __future__ import annotations

import re

from smtp.policy import MESSAGE, Verdict, row_for
from smtp.published import Published
from smtp.verdict import Reply

GMAIL = r"(gmail|googlemail|google)\.com$"
MICROSOFT = r"(office365|outlook|office)\.com$"
SES = r"amazonaws\.com(\.cn)?$"
ANY = r""
CONNECT, STARTTLS, AUTH = "connect", "starttls", "auth"
TLS = f"{CONNECT}|{STARTTLS}"
LATER = "mail|rcpt|data|transfer|dot"
APP_PASSWORD = "make one at https://myaccount.google.com/apppasswords and put it into SMTP_PASSWORD, without spaces"


# Four patterns, for the host's name, the phase, the code ("none": no reply came) and words; then meaning and fix.
# fmt: off
ROWS = (
    # Google
    (GMAIL, AUTH, "534", "", "Google wants an app password here, not the account's own", APP_PASSWORD),
    (GMAIL, AUTH, "535", "",
     "Google does not accept this login: SMTP_USERNAME must be the whole address, SMTP_PASSWORD an app password",
     APP_PASSWORD),
    (GMAIL, "greeting|auth", "454|421", "",
     "Google has seen too many logins, and refuses them for some minutes to an hour",
     "wait, without trying; correct the password first if it was wrong"),
    (GMAIL, LATER, "550|421", r"5\.4\.5|limit exceeded|quota",
     "Google's limit for the last 24 hours is reached (about 2000 mails, 500 without Workspace); mail waits",
     "wait; SMTP_RATE=2000/d stays below it"),
    # Microsoft 365
    (MICROSOFT, AUTH, "535", r"5\.7\.139|disabled",
     "Microsoft 365 has SMTP AUTH switched off for this mailbox or the whole organisation",
     "Set-CASMailbox -Identity MAILBOX -SmtpClientAuthenticationDisabled $false (Exchange Online PowerShell)"),
    (MICROSOFT, AUTH, "535", "",
     "Microsoft 365 does not accept this login; an account with a second factor cannot log in here",
     "try SMTP_USERNAME and SMTP_PASSWORD at outlook.office.com; make an app password if the account can have one"),
    (MICROSOFT, f"auth|{LATER}", "5..", r"5\.7\.30",
     "Microsoft 365 has ended logins with a password for this organisation",
     "send through another relay (Amazon SES, Azure Communication Services, ...): SMTP_HOST"),
    (MICROSOFT, ".*", "432|421", r"4\.3\.2|concurrent",
     "Microsoft 365 allows a mailbox 3 connections, and there are more", "WORKER_CONCURRENCY=3"),
    (MICROSOFT, LATER, "550|554", r"5\.7\.60|5\.2\.252|SendAsDenied",
     "this login may not send as the sender of MAIL_FROM",
     "put the login's own address into MAIL_FROM, or give it Send As for that mailbox"),
    (MICROSOFT, LATER, "550", r"5\.2\.25[1-5]",
     "Microsoft 365 throttles this sender after too many mails that could not be delivered",
     "remove the dead addresses, then wait; SMTP_RATE=30/m"),
    # Amazon SES
    (SES, AUTH, "535", "",
     "SES does not accept this login; its SMTP login is not an IAM key, and is valid in one region only",
     "SES console of that region > SMTP settings > Create SMTP credentials: SMTP_USERNAME, SMTP_PASSWORD"),
    (SES, ".*", "454", r"rate", "SES limits the mails per second, and accepts no more now; they wait",
     "set SMTP_RATE to the rate that the SES console shows, such as 14/s"),
    (SES, ".*", "454", r"quota", "the daily quota of SES is used up; mail waits",
     "SES console > Account dashboard > Request a limit increase; SMTP_RATE=200/d is the sandbox's quota"),
    (SES, LATER, "554", r"not verified", "SES knows neither this sender nor, in its sandbox, this recipient",
     "SES console > Identities: verify MAIL_FROM's domain; > Account dashboard: request production access"),
    # Any relay
    (ANY, CONNECT, "none", r"WRONG_VERSION_NUMBER|wrong version", "the relay does not begin with TLS on this port",
     "SMTP_SECURITY=starttls (and SMTP_PORT=587)"),
    (ANY, TLS, "none", r"certificate is not valid: .*(expired|not yet valid)",
     "the relay's certificate is not valid at this moment; the relay's fault, or this machine's clock is wrong",
     "timedatectl shows the clock; if that is right, tell the relay's operator"),
    (ANY, TLS, "none", r"certificate is not valid: .*([Mm]ismatch|doesn't match)",
     "the relay's certificate is for another name than SMTP_HOST",
     "write the name that the relay's operator gives, not an address or an alias, into SMTP_HOST"),
    (ANY, TLS, "none", r"certificate is not valid",
     "the relay's certificate comes from an authority that this machine does not know",
     "sudo apt install ca-certificates; for a relay of your own: SMTP_CA_FILE=its authority in PEM"),
    (ANY, CONNECT, "none", "", "the relay cannot be reached",
     "nothing, if the relay is down; else check SMTP_HOST and SMTP_PORT, and whether a firewall is between"),
    (ANY, STARTTLS, "none|5..", r"not supported|STARTTLS", "the relay offers no STARTTLS on this port",
     "SMTP_SECURITY=tls and SMTP_PORT=465, or another port; for a relay of your own network without a login: "
     "SMTP_SECURITY=none"),
    (ANY, STARTTLS, ".*", "", "the relay cannot do TLS now", "ask its operator; see also SMTP_PORT, SMTP_SECURITY"),
    (ANY, AUTH, "none", r"offers no AUTH", "the relay offers no login here: it wants TLS first, or no login at all",
     "SMTP_SECURITY=starttls; or take SMTP_USERNAME and SMTP_PASSWORD out"),
    (ANY, f"auth|{LATER}", "535", "", "the relay does not accept this login",
     "check SMTP_USERNAME and SMTP_PASSWORD; some relays want an API key as the password"),
    (ANY, f"auth|{LATER}", "534", "", "the relay wants another kind of password or login",
     "ask the relay for an app password or SMTP credentials"),
    (ANY, f"hello|auth|{LATER}", "530|538", "", "the relay wants TLS or a login first",
     "SMTP_SECURITY=starttls or tls, and SMTP_USERNAME with SMTP_PASSWORD"),
    (ANY, AUTH, "454|421|4..", "", "the relay cannot check logins now, or has seen too many",
     "wait some minutes without trying; mail waits meanwhile, and loses no attempt"),
    (ANY, "greeting", "none", "timed out",
     "the relay takes the connection and says nothing, as it does where it waits for TLS",
     "on port 465: SMTP_SECURITY=tls; elsewhere ask the relay's operator"),
    (ANY, "hello", "4..|5..", "",
     "the relay refuses what this machine calls itself in EHLO, its address, or one more connection",
     "EHLO_NAME=its full name, as DNS has it for this address; or ask the relay's operator to allow the address"),
    (ANY, "greeting", "4..|5..", "",
     "the relay refuses this machine: too many connections, or its address is blocked",
     "ask the relay's operator to allow this machine's address; lower WORKER_CONCURRENCY"),
)
OTHERWISE = (  # for what smtp.policy does not take for trouble
    (ANY, "mail", "5..", "", "the relay refuses this sender",
     "put an address into MAIL_FROM that this login may send as"),
    (ANY, "rcpt", "5..", r"5\.1\.[0-3]|no such|unknown|not exist", "the relay knows no such address",
     "correct it where the application has it from, and submit the mail anew"),
    (ANY, "rcpt", "5..", "", "the relay refuses this recipient permanently",
     "GET /emails/ID has the relay's own words"),
    (ANY, LATER, "5..", "", "the relay refuses this mail permanently", "GET /emails/ID has the relay's own words"),
    (ANY, LATER, "4..", "", "the relay puts this mail off; it is tried again",
     "wait; GET /emails/ID has the relay's own words"),
)
OF_ONE = re.compile(r"\bSMTP_(HOST|PORT|SECURITY|USERNAME|PASSWORD|CA_FILE|RATE)\b")
NOTHING = ("the relay does not answer as it should", "see the port and SMTP_SECURITY; try again later")
# fmt: on


def explain(host: str, reply: Reply) -> tuple[str, str]:
    """Returns what the reply means, and how to fix it."""
    policy = row_for(reply.phase, reply.code, reply.text)
    waits = (
        f"{policy.meaning}; mail waits, and loses no attempt",
        "GET /emails/ID has the relay's own words; for a limit, set SMTP_RATE",
    )
    judged = waits if policy.verdict is Verdict.TROUBLE and reply.phase in MESSAGE and reply.code else None
    return _first(ROWS, host, reply) or judged or _first(OTHERWISE, host, reply) or NOTHING


def explain_at(relay: Published, reply: Reply) -> tuple[str, str]:
    """Returns what `explain` does of one of several relays: with the names that its fields have in RELAYS."""
    meaning, fix = explain(relay.host, reply)
    return (meaning, fix) if relay.is_only else (of_one(meaning), of_one(fix))


def of_one(text: str) -> str:
    """Returns a text with the names that settings of a relay have in RELAYS."""
    return OF_ONE.sub(lambda found: found[1].lower(), text)


def _first(rows: tuple[tuple[str, ...], ...], host: str, reply: Reply) -> tuple[str, str] | None:
    code = "none" if reply.code is None else str(reply.code)
    for relay, phases, codes, words, meaning, fix in rows:
        fits = re.fullmatch(phases, reply.phase.value) and re.fullmatch(codes, code)
        if fits and re.search(relay, host.lower()) and re.search(words, reply.text, re.IGNORECASE):
            return meaning, fix
    return None
