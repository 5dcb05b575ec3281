"""Explains a relay's refusal and says how to fix it, for the three relays that most people use and for any other.

A table: relay, phase, code, words of the reply -> meaning, fix. The first row that matches applies. The words are
matched and never repeated, since a reply may quote a login or an address. What no row knows is judged by smtp.policy,
as the workers do.
Gmail: https://support.google.com/a/answer/3726730  Microsoft 365: https://learn.microsoft.com/exchange/mail-flow-best-practices/
Amazon SES: https://docs.aws.amazon.com/ses/latest/dg/troubleshoot-smtp.html
"""

from __future__ import annotations

import re

from smtp.policy import MESSAGE, Phase, Verdict, row_for
from smtp.published import Published
from smtp.verdict import Reply

GMAIL = r"(gmail|googlemail|google)\.com$"
MICROSOFT = r"(office365|outlook|office)\.com$"
SES = r"amazonaws\.com(\.cn)?$"
ANY = r""
CONNECT, STARTTLS, AUTH, HTTP = "connect", "starttls", "auth", "http"
TLS = f"{CONNECT}|{STARTTLS}"
LATER = "mail|rcpt|data|transfer|dot"
BY_TOKEN = r"\[(XOAUTH2|OAUTHBEARER)"  # smtp.auth writes it behind what the relay says
APP_PASSWORD = "make one at https://myaccount.google.com/apppasswords and put it into SMTP_PASSWORD, without spaces"


# Four patterns, for the host's name, the phase, the code ("none": no reply came) and words; then meaning and fix.
# fmt: off
ROWS = (
    # Google
    (GMAIL, AUTH, "534", "", "Google wants an app password here, not the account's own", APP_PASSWORD),
    (GMAIL, AUTH, "535", BY_TOKEN,
     "Google does not take the token for this mailbox: SMTP_USERNAME must be the account that has consented",
     "bin/oauth google, logged in as SMTP_USERNAME"),
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
    (MICROSOFT, f"auth|{LATER}", "5..", r"5\.7\.30|basic auth",
     "Microsoft 365 has ended logins with a password for this organisation",
     "log in by token: bin/oauth microsoft (docs/operations.md, Microsoft 365 and Google)"),
    (MICROSOFT, AUTH, "535", rf"criteria.*{BY_TOKEN}",
     "a policy of the organisation (Conditional Access) refuses this login, though the token is good",
     "let its administrator look at the sign-in logs of Microsoft Entra, and except this mailbox or address"),
    (MICROSOFT, AUTH, "535", "criteria",
     "security defaults, or a policy of the organisation, forbid a login with a password",
     "log in by token: bin/oauth microsoft (docs/operations.md, Microsoft 365 and Google)"),
    (MICROSOFT, AUTH, "535", "disabled for the tenant",
     "Microsoft 365 has SMTP AUTH switched off for the whole organisation, by token as by password",
     "Set-CASMailbox -Identity MAILBOX -SmtpClientAuthenticationDisabled $false, which wins for this mailbox, or "
     "Set-TransportConfig -SmtpClientAuthenticationDisabled $false (Exchange Online PowerShell)"),
    (MICROSOFT, AUTH, "535", r"(?!.*incorrect).*(5\.7\.139|disabled)",
     "Microsoft 365 has SMTP AUTH switched off for this mailbox or the whole organisation",
     "Set-CASMailbox -Identity MAILBOX -SmtpClientAuthenticationDisabled $false (Exchange Online PowerShell)"),
    (MICROSOFT, AUTH, "535", BY_TOKEN,
     "Microsoft 365 does not take the token for this mailbox: SMTP_USERNAME must be the mailbox that has consented, or "
     "one that the application was given",
     "bin/oauth microsoft, logged in as SMTP_USERNAME; for client credentials: SMTP.SendAsApp with the consent of an "
     "administrator, New-ServicePrincipal, Add-MailboxPermission -AccessRights FullAccess"),
    (MICROSOFT, AUTH, "535", "",
     "Microsoft 365 does not accept this login: it takes few passwords, and none of an account with a second factor",
     "log in by token: bin/oauth microsoft; or try SMTP_USERNAME and SMTP_PASSWORD at outlook.office.com"),
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
    # A token server
    (ANY, AUTH, "none", r"AADSTS70002(15|22)",
     "Microsoft does not accept the application's client secret: it has ended, or it is the secret's ID, not its value",
     "Entra admin center > App registrations > Certificates & secrets: make one; then bin/oauth microsoft"),
    (ANY, AUTH, "none", r"AADSTS7000218",
     "Microsoft wants a client secret of this application, or to be told that it is a public client",
     "App registrations > Authentication > Allow public client flows; or bin/oauth microsoft --client-secret-file"),
    (ANY, AUTH, "none", r"AADSTS(700016|90002|900023)",
     "Microsoft knows no such application in this directory: client ID or tenant is wrong",
     "compare both with the application's overview in the Entra admin center; then bin/oauth microsoft --tenant"),
    (ANY, AUTH, "none", r"AADSTS6500[14]",
     "nobody has consented that this application sends mail",
     "bin/oauth microsoft; or App registrations > API permissions > Grant admin consent"),
    (ANY, AUTH, "none", r"AADSTS500011",
     "this directory does not know Exchange Online, for which the token is to be: a wrong tenant, or no licence",
     "name the directory that has the mailbox: bin/oauth microsoft --tenant"),
    (ANY, AUTH, "none", r"AADSTS(700082|70008|700084|70043|50173|50089)",
     "the refresh token has ended: nobody used it for 90 days, or the account's password was changed",
     "bin/oauth microsoft, again"),
    (ANY, AUTH, "none", r"AADSTS(5007[2469]|50158|5300[0-4]|530003)",
     "Microsoft wants a second factor, or a policy of the organisation (Conditional Access) forbids this login",
     "bin/oauth microsoft, again; if that does not last, an exception for this account, or --client-credentials"),
    (ANY, AUTH, "none", r"AADSTS(50126|50034|50053|50055|50057)",
     "Microsoft does not let the account in: unknown, locked, disabled, or its password is wrong or has ended",
     "log in as it at outlook.office.com; then bin/oauth microsoft"),
    (ANY, AUTH, "none", r"no token: (invalid_client|unauthorized_client|deleted_client)",
     "the token server does not accept the application: its client ID or secret is wrong, or it was deleted",
     "compare them with what the provider's console shows; then bin/oauth"),
    (ANY, AUTH, "none", r"no token: invalid_scope", "the application may not ask for the right to send mail",
     "give it that right at the provider (SMTP.Send, https://mail.google.com/); then bin/oauth"),
    (ANY, AUTH, "none", r"no token: invalid_grant",
     "the refresh token is good no more: revoked, or the account's password was changed; that of a Google application "
     "in testing ends after 7 days",
     "bin/oauth, again; at Google with the application's publishing status In production, or its user type Internal"),
    (ANY, AUTH, "none", r"no token: .*(does not answer|answers \d)",
     "the token server cannot be reached, or is out of order",
     "let HTTPS out to login.microsoftonline.com or oauth2.googleapis.com; mail waits meanwhile"),
    (ANY, AUTH, "none", r"no token: ", "the token server gives no token", "bin/oauth, again; mail waits meanwhile"),
    # An upstream by HTTP
    (ANY, HTTP, "403", r"^validation_error", "the upstream's account may not send from this domain, or to this address",
     "verify the domain of the mail's `from` there, and that the account may send to everybody"),
    (ANY, HTTP, "40[123]", "", "the upstream does not accept the API key, or its account may not send",
     "make a key there that may send, and put it into api_key"),
    (ANY, HTTP, "429", r"quota", "the quota of the upstream's account is used up; mail waits",
     "wait, or raise it there"),
    (ANY, HTTP, "429", "", "the upstream takes fewer mails at a time; mail waits, and loses no attempt",
     "set rate to what it allows, such as 2/s"),
    (ANY, HTTP, "40[45]|410|421|[123]..", "", "no API for mail answers at this URL",
     "url must be the API's, without /emails, such as https://api.resend.com"),
    (ANY, HTTP, "none|5..", "", "the upstream does not answer, or is out of order; mail waits, and is asked for again",
     "nothing, if it is down; else look there"),
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
    (ANY, AUTH, "none", r"offers no AUTH XOAUTH2", "the relay takes no tokens here",
     "SMTP_HOST and SMTP_PORT must be those of the provider; or SMTP_PASSWORD in place of SMTP_OAUTH"),
    (ANY, AUTH, "none", r"offers no AUTH", "the relay offers no login here: it wants TLS first, or no login at all",
     "SMTP_SECURITY=starttls; or take SMTP_USERNAME and SMTP_PASSWORD out"),
    (ANY, AUTH, "535", BY_TOKEN, "the relay does not take the token for this SMTP_USERNAME",
     "bin/oauth, logged in as SMTP_USERNAME; the provider of the token must be the relay's own"),
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
    (ANY, HTTP, "4(?!08|09|25)..", "", "the upstream refuses this mail permanently",
     "GET /emails/ID has its own words"),
    (ANY, f"{LATER}|{HTTP}", "4..", "", "the relay puts this mail off; it is tried again",
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
    judged = (
        waits if policy.verdict is Verdict.TROUBLE and reply.phase in (*MESSAGE, Phase.HTTP) and reply.code else None
    )
    return _first(ROWS, host, reply) or judged or _first(OTHERWISE, host, reply) or NOTHING


def explain_at(relay: Published, reply: Reply) -> tuple[str, str]:
    """Returns what `explain` does of one of several relays: with the names that its fields have in RELAYS."""
    meaning, fix = explain(relay.host, reply)
    if relay.is_only:
        return meaning, fix
    return of_one(meaning), of_one(fix) if relay.kind == "smtp" else of_one(fix).replace("host and port", "url")


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
