"""What a relay's reply means: one table, from which the workers and bin/doctor judge. Pure; smtp.verdict reads it.

The first row that matches decides: where in the conversation, the code ("none": no reply came), the enhanced code at
the very beginning of the text (RFC 2034; "-": none), and words anywhere behind it, which are asked for only where the
codes leave it open. Addresses are taken out of the text before: anybody may choose one. The words are a relay's own for
its limits ("per hour", "account ... suspended"); no row reads a time out of them.

  accepted   the relay has taken responsibility (250 after the final dot)
  try again  this mail or recipient was put off; it has cost an attempt
  refused    this mail or recipient is refused permanently
  in doubt   the body went out whole and no answer came: it may have been accepted (RFC 1047)
  trouble    the account, the login, a rate, the relay: no mail can be blamed, so none loses an attempt
"""

from __future__ import annotations

import re
from enum import Enum
from functools import lru_cache
from typing import NamedTuple


class Verdict(str, Enum):
    ACCEPTED = "accepted"
    TRY_AGAIN = "try again"
    REFUSED = "refused"
    IN_DOUBT = "in doubt"
    TROUBLE = "trouble"


class Phase(str, Enum):
    """Names where in the conversation a reply came, or did not."""

    CONNECT = "connect"  # DNS, TCP and implicit TLS
    GREETING = "greeting"
    HELLO = "hello"
    STARTTLS = "starttls"
    AUTH = "auth"
    MAIL = "mail"
    RCPT = "rcpt"
    DATA = "data"  # the command; 354 invites the body
    TRANSFER = "transfer"  # the body is going out; without its final dot the relay must drop it (RFC 5321 4.1.1.4)
    DOT = "dot"  # the final dot is out
    HTTP = "http"  # the answer of an upstream that is spoken to by HTTP, or that there was none


class Row(NamedTuple):
    """Four patterns and what they mean. `codes` and `enhanced` match whole, `words` anywhere, without case."""

    phases: tuple[Phase, ...]
    codes: str
    enhanced: str
    words: str
    verdict: Verdict
    meaning: str
    source: str


SESSION = (Phase.CONNECT, Phase.GREETING, Phase.HELLO, Phase.STARTTLS, Phase.AUTH)
MESSAGE = (Phase.MAIL, Phase.RCPT, Phase.DATA, Phase.TRANSFER, Phase.DOT)
WITHOUT_RCPT = tuple(phase for phase in MESSAGE if phase is not Phase.RCPT)
ACCEPTED, TRY_AGAIN, REFUSED, IN_DOUBT, TROUBLE = Verdict
ANY = ".*"
TOO_MANY = "the relay takes fewer recipients at once"
TAKEN = "accepted as"  # how the text begins of an upstream's good answer; the mail's id there follows
NO_API = "the answer is none of the API"  # the text of what somebody else has answered, on the way
ASKED_TWICE = "the upstream is still at this mail"
LIMIT = (  # how relays say that the account or this client has sent too much; not that one mail is too large
    r"^(?!.*\b(size|large|big|bytes)\b).*(ratelimit|transmit rate|throttl|permitted limits|messages was exceeded"
    r"|\b(rate|sending|send|mail|relay|submission|hour|recipient) ?-?(limit|quota)|unusual sending|too frequent"
    r"|exceed(s|ed|ing)? (\S+ ){0,3}(limit|quota|rate)|(sending|message) (rate|quota) exceeded|thread limit"
    r"|(per|this|an) (hour|day|session|connection)\b|messages? per (minute|day)|per 24 hours"
    r"|too (much mail|many ((e-?)?mails|messages|recipients from|connections|sessions|concurrent)))"
)
ONE_MAIL = (  # how they say that it is about one recipient, or one mail
    r"\bthis (message|email) (is|was|exceeded)|rejected message|same message-id|rcpt domain|recipient thread"
    r"|\bresolver\.|(user|mailbox|inbox|recipient)('s)?\b.* (receiving|received) "
    r"|(mailbox|recipient) (has|is|have) (exceed|over|full)"
)
ACCOUNT = (  # how they say that the account or its login may not send now
    r"\byour (\w+ )?account|(outgoing mail|outbound|sending) .*(suspended|paused|disabled|activated|blocked|locked)"
    r"|disabled for this account|permissions to submit|(smtp auth|authentication) .*mail client"
    r"|requires? (smtp )?authentication|(?<!proper )authentication (is )?required|(failed to|not) authenticated?\b"
)
ACCOUNT_BLOCKED = r"\baccount (\S+ ){0,4}(suspended|paused|disabled|activated|blocked|locked)"  # at RCPT: another's
CLIENT = (  # how they say that this machine is not welcome
    r"client host (?!.*customer block)|helo command|messages from [\[\d]|connections will not be accepted"
    r"|temporarily blacklisted|untrusted ip|\bip( address)? (\S+ )?(is|has been) (temporarily )?(block|black|deny|list)"
)
# fmt: off
TABLE = (
    # No reply. Before the final dot nothing was handed over; after it nobody knows.
    Row((Phase.DOT,), "none", ANY, "", IN_DOUBT, "the relay may have accepted the mail", "RFC 1047"),
    Row((Phase.TRANSFER,), "none", ANY, "", TRY_AGAIN, "the relay hung up in the body", "RFC 5321 3.8"),
    Row((*SESSION, *MESSAGE), "none", ANY, "", TROUBLE, "the relay does not answer", "RFC 5321 3.8"),
    # Good replies. Another 2xx to STARTTLS or AUTH has neither encrypted nor logged in.
    Row((Phase.STARTTLS,), "220", ANY, "", ACCEPTED, "TLS can begin", "RFC 3207 4"),
    Row((Phase.AUTH,), "235", ANY, "", ACCEPTED, "the login is accepted", "RFC 4954 6"),
    Row((Phase.DATA,), "354", ANY, "", ACCEPTED, "the body may go out", "RFC 5321 3.3"),
    Row(
        (Phase.GREETING, Phase.HELLO, Phase.MAIL, Phase.RCPT, Phase.DOT),
        "2..", ANY, "", ACCEPTED, "the relay agrees", "RFC 5321 4.2.1",
    ),
    # A session that does not come about is never a mail's fault: 421 and 554 greetings, 454 and 535 to AUTH.
    Row(SESSION, ANY, ANY, "", TROUBLE, "the relay does not let this machine in", "RFC 5321 3.1, RFC 4954 6"),
    # What answers something else (a 250 to DATA) or is not SMTP (1xx, -1). After the dot it tells us nothing.
    Row((Phase.DOT,), "(?![45]..$).*", ANY, "", IN_DOUBT, "the reply to the mail is none", "RFC 5321 4.3.2"),
    Row(MESSAGE, "(?![45]..$).*", ANY, "", TROUBLE, "the relay does not speak SMTP here", "RFC 5321 4.3.2"),
    # The account and its login, by code.
    Row(
        MESSAGE, "530|534|535|538", r"(?!5\.3\.).*", "", TROUBLE, "the relay wants TLS or a login first",
        "RFC 3207, RFC 4954 6; Exchange says 530 5.3.1 of one mail",
    ),
    Row(
        WITHOUT_RCPT, "454", ANY, "", TROUBLE, "the account's rate or quota is used up",
        "Amazon SES, SMTP response codes; at RCPT it is Postfix' defer_unauth_destination, about one recipient",
    ),
    Row(
        MESSAGE, "5..", r"5\.4\.5|5\.1\.9[02]|5\.2\.25[1345]|5\.7\.(50[12368]|511|6[0-4]\d|70[058])", "", TROUBLE,
        "the account or its address range has sent too much, or is blocked",
        "Google, SMTP error messages; Microsoft, NDRs in Exchange Online",
    ),
    Row(
        MESSAGE, "5..", r"5\.1\.8|5\.7\.30|5\.2\.[02]",
        r"^(access denied|email outgoing blocked|basic auth|submission quota)|\.exception:(\w*quota|outbound)",
        TROUBLE, "the account is blocked, over its quota, or may not log in like this",
        "Microsoft, NDRs in Exchange Online; Zoho. Each code has a second meaning, about one mail",
    ),
    # Too many recipients for one mail: those refused get their turn in the next transaction.
    Row(
        (Phase.RCPT,), "45[0-2]|552", r"[45]\.5\.3|4\.3\.0|-",
        r"too many recipients(?! (from|received))|limit of \d+ recipients|(separate|domains per) transaction",
        TRY_AGAIN, TOO_MANY, "RFC 5321 4.5.3.1.10; Google; Exim",
    ),
    # About one recipient or one mail, though the words are those of a limit.
    Row(
        MESSAGE, "4..", ANY, ONE_MAIL, TRY_AGAIN, "this mail or this recipient is put off",
        "Google, 421 4.7.0, 450 4.2.1; Microsoft, 432 STOREDRV.Deliver",
    ),
    Row(MESSAGE, "5..", r"5\.2\.12[12]", "", TRY_AGAIN, "this recipient has had too much mail", "Microsoft, NDRs"),
    Row(MESSAGE, "5..", ANY, ONE_MAIL, REFUSED, "this recipient takes no mail from us", "Microsoft, RESOLVER.RST"),
    # The relay as a whole, by code.
    Row(MESSAGE, "421|432", r"(?!4\.[126]\.).*", "", TROUBLE, "the relay has no room for us now", "RFC 5321 3.8"),
    Row(
        MESSAGE, "4..", r"4\.3\.\d+|4\.4\.[25]|4\.7\.(3|[56]\d\d)", "", TROUBLE,
        "the relay is busy, full or out of order", "RFC 3463 3.4; Microsoft, 451 4.7.500 to 4.7.699",
    ),
    # Limits, accounts and machines that only words tell from a mail or a recipient that is refused.
    Row(
        MESSAGE, "[45]..", r"(?![45]\.1\.|[45]\.2\.[23](?!\d)|[45]\.3\.4|5\.6\.|[45]\.5\.3).*", LIMIT, TROUBLE,
        "the account's limit is reached", "cPanel, Plesk, Postfix anvil, Google relay, IONOS, Strato, GoDaddy",
    ),
    Row(
        MESSAGE, "452", r"4\.5\.3", r"rate|throttl", TROUBLE, "the account's limit is reached", "Brevo, SparkPost",
    ),
    Row(
        MESSAGE, "[45]..", r"(?![45]\.[12]\.).*", ACCOUNT, TROUBLE, "the account or its login may not send now",
        "Amazon SES, sending paused; cPanel; Exchange; MailEnable; SMTP2GO",
    ),
    Row(
        WITHOUT_RCPT, "[45]..", r"(?![45]\.[12]\.).*", ACCOUNT_BLOCKED, TROUBLE,
        "the account or its login may not send now", "Brevo; Rackspace; Zoho",
    ),
    Row(
        MESSAGE, "[45]..", ANY, CLIENT, TROUBLE, "the relay refuses this machine",
        "Postfix smtpd; Microsoft; Yahoo; Rackspace",
    ),
    Row(
        MESSAGE, "4..", r"-|4\.4\.5|4\.7\.[03]", r"disk|space shortage|memory|#4\.3\.\d\)|queue quota|^try again in \d",
        TROUBLE, "the relay is busy, full or out of order", "Exim, sendmail, qmail, Exchange",
    ),
    # HTTP. Without an answer it is asked again under the same key, so nothing is in doubt. What is no answer of the API
    # (a proxy's, a captive portal's, a redirect) says nothing of the mail.
    Row((Phase.HTTP,), "none", ANY, "", TROUBLE, "the upstream does not answer", "RFC 9110 9.2.2"),
    Row((Phase.HTTP,), "2..", ANY, f"^{TAKEN} ", ACCEPTED, "the upstream has the mail", "Resend, POST /emails"),
    Row(
        (Phase.HTTP,), "409", ANY, "^invalid_idempotent_request", ACCEPTED,
        "the upstream has this mail, which another version has written otherwise", "Resend; a key is one mail's id",
    ),
    Row((Phase.HTTP,), "409", ANY, "^concurrent_idempotent_requests", TROUBLE, ASKED_TWICE, "Resend"),
    Row(
        (Phase.HTTP,), "403", ANY, "^validation_error", TRY_AGAIN,
        "the account may not send from this domain, or to this recipient", "Resend, 403: a domain is not verified yet",
    ),
    Row((Phase.HTTP,), "40[1237]", ANY, "", TROUBLE, "the upstream refuses the API key or the account", "Resend"),
    Row((Phase.HTTP,), "429", ANY, "", TROUBLE, "the account's rate or quota is used up", "Resend; RFC 6585 4"),
    Row((Phase.HTTP,), "40[45]|410|421", ANY, "", TROUBLE, "there is no such API at this URL", "RFC 9110 15.5"),
    Row((Phase.HTTP,), "413", ANY, "", REFUSED, "this mail is too large", "RFC 9110 15.5.14; of a proxy as well"),
    Row((Phase.HTTP,), "40[89]|425", ANY, "", TRY_AGAIN, "this request is put off", "RFC 9110 15.5.9, RFC 8470 5.2"),
    Row((Phase.HTTP,), "4..", ANY, f"^{NO_API}", TROUBLE, "what answers here is no API for mail", "RFC 9110 15.5"),
    Row((Phase.HTTP,), "4..", ANY, "", REFUSED, "this mail is refused", "Resend, 400, 413, 422, 451"),
    Row((Phase.HTTP,), "5..", ANY, "", TROUBLE, "the upstream is out of order", "RFC 9110 15.6"),
    Row((Phase.HTTP,), ANY, ANY, "", TROUBLE, "what answers here is no API for mail", "RFC 9110 15"),
    # One mail, one recipient.
    Row((Phase.RCPT,), "552", "-", "", TRY_AGAIN, TOO_MANY, "RFC 5321 4.5.3.1.10, its old form"),
    Row(MESSAGE, "503", ANY, "", TRY_AGAIN, "the two sides have lost step", "RFC 5321 4.2.2"),
    Row(MESSAGE, "4..", ANY, "", TRY_AGAIN, "this mail or this recipient is put off", "RFC 5321 4.2.1"),
    Row(MESSAGE, "5..", ANY, "", REFUSED, "this mail or this recipient is refused", "RFC 5321 4.2.1"),
)
class NoAddress(NamedTuple):
    """Two patterns as in a row, of a refusal that says that there is no such address, for anybody, today or tomorrow.
    A mailbox that is full, closed to us, or disabled (5.2.1: it may come back) is one all the same."""

    enhanced: str
    words: str
    source: str


NO_SUCH_USER = (
    r"\b(no such|unknown|invalid|non-?existent|unrouteable|bad destination) (local )?(user|mailbox|recipient|address)"
    r"|\b(user|mailbox|recipient|account|address(ee)?|local part|alias)\b.{0,60}?"
    r"(unknown|not (found|known|exist|a valid)|n.t exist|no longer exists|invalid\b|unrouteable)"
    r"|no mailbox (here )?by that name|no (one|such person) at this address|user doesn.t have an? |not our customer"
)
NO_ADDRESS = (
    NoAddress(r"5\.1\.[1236]", "", "RFC 3463 3.2: bad mailbox, system or syntax, moved; Gmail, Postfix, Exchange"),
    NoAddress(r"5\.1\.10", "", "RFC 7505: its domain takes no mail; Microsoft, RecipientNotFound"),
    NoAddress(r"-|5\.[01]\.0|5\.5\.[01]", NO_SUCH_USER, "Exim, qmail, sendmail, Yahoo, cPanel: words alone"),
    NoAddress(r"5\.5\.0", r"mailbox unavailable", "Outlook.com, for a mailbox that is none"),
)
NOT_THE_ADDRESS = (  # words of a refusal that is about who sends, or what, whatever its code
    r"\b(spam\w*|polic(y|ies)|(black|block|deny) ?-?list\w*|blocked|rbl|dnsbl|reputation|sender|authenticat\w+"
    r"|relay(ing)? (access )?(denied|not|prohibited|refused)|to relay|as a relay"
    r"|not (allowed|permitted)|access denied|quota|full|limit|rate|temporar\w+|try again|gr[ea]y-?list\w*|verif\w+)\b"
)
# fmt: on
ENHANCED = re.compile(r"([245]\.\d{1,3}\.\d{1,3})(?!\S)\s*")
# Anybody may choose an address or a domain, and whoever sends a mail its subject.
CHOSEN = re.compile(
    r"subject of \([^)]*\)|<[^<>\s]*>|\[[^\[\]\s]*@[^\[\]\s]*\]|\S+@\S+"
    r"|(?<![:.\w-])(?!storedrv\.|resolver\.)(?:[\w-]+\.)+[a-z][\w-]*",
    re.IGNORECASE,
)


def may_be_the_mails(phase: object, code: int | None) -> bool:
    """Returns whether what was said may be for this mail's sake, though it is no fault that could be named."""
    return phase in MESSAGE or (phase == Phase.HTTP and code == 500)


@lru_cache(maxsize=256)  # nearly all replies say the same
def row_for(phase: Phase, code: int | None, text: str = "") -> Row:
    """Returns the row that decides. `code` is None where no reply came."""
    written = "none" if code is None else str(code)
    found = ENHANCED.match(text)
    enhanced = found[1] if found else "-"
    words = None
    for row in TABLE:
        if phase in row.phases and re.fullmatch(row.codes, written) and re.fullmatch(row.enhanced, enhanced):
            if row.words and words is None:
                words = CHOSEN.sub(" ", text[found.end() if found else 0 :]).strip()
            if not row.words or re.search(row.words, words or "", re.IGNORECASE):
                return row
    raise LookupError("the last rows must match every reply")


@lru_cache(maxsize=256)
def names_no_address(code: int | None, text: str) -> bool:
    """Returns whether what refuses a recipient says that there is no such address."""
    found = ENHANCED.match(text)
    words = CHOSEN.sub(" ", text[found.end() if found else 0 :])
    if not code or code // 100 != 5 or re.search(NOT_THE_ADDRESS, words, re.IGNORECASE):
        return False
    enhanced = found[1] if found else "-"
    return any(
        re.fullmatch(one.enhanced, enhanced) and re.search(one.words, words, re.IGNORECASE) for one in NO_ADDRESS
    )
