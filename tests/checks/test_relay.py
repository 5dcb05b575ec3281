"""The relay: each way in which name, port, TLS or login can fail is told from the others."""

from __future__ import annotations

import socket
from datetime import datetime, timedelta, timezone
from typing import Any
from unittest.mock import Mock

import pytest
import trustme

from ops.checks import relay, replies
from ops.checks.findings import FAULT, NOTE, OK, WARN
from ops.checks.target import Target
from settings import Settings, load
from smtp.policy import Phase
from smtp.relay import Relay
from smtp.verdict import Reply
from tests import relay as test_relay
from tests.checks.support import GMAIL, M365, PASSWORD, SES, Said, Server, assert_finds, listed, of, worst
from tests.conversations import server_context
from tests.scripted_relay import ScriptedRelay, Step, drip
from tests.servers import free_port
from tests.token_server import EXPIRED, TokenServer

NO_REDIS = "redis://127.0.0.1:1/0"


def at(port: int, **given: Any) -> Settings:
    return of(**{"smtp_host": "127.0.0.1", "smtp_port": port, "smtp_security": "none", **given})


LOGIN = {"smtp_username": "ada@acme.example", "smtp_password": PASSWORD}


def test_a_relay_that_lets_us_in_is_fine_and_after_the_login_hears_nothing_but_quit(
    target: Target, authority: trustme.CA, ca_file: str
) -> None:
    with ScriptedRelay(offers=["STARTTLS", "AUTH PLAIN"], tls=server_context(authority)) as there:
        settings = at(there.port, smtp_security="starttls", smtp_ca_file=ca_file, **LOGIN)
        said = listed(relay.login(target, settings))
    assert [one.level for one in said] == [OK, OK, OK]
    assert "accepts our login" in said[-1].found
    assert [command.split()[0].upper() for command in there.commands] == ["EHLO", "STARTTLS", "EHLO", "AUTH", "QUIT"]


def test_a_port_that_refuses_is_named_with_one_that_answers(target: Target) -> None:
    settings = at(free_port())
    with ScriptedRelay() as there:
        target.smtp_ports = (there.port,)
        assert_finds(relay.login(target, settings), FAULT, ": refused", f"SMTP_PORT={there.port} and")
    assert_finds(relay.login(target, settings), FAULT, ": refused", "or a firewall rejects it: correct SMTP_HOST")


def test_a_port_that_a_firewall_closes_is_told_from_one_that_refuses(target: Target) -> None:
    with socket.socket() as deaf, socket.socket() as first, socket.socket() as second:
        deaf.bind(("127.0.0.1", 0))
        deaf.listen(0)
        for caller in (first, second):  # these fill its queue: the next one is neither accepted nor refused
            caller.setblocking(False)
            caller.connect_ex(deaf.getsockname())
        assert_finds(relay.login(target, at(deaf.getsockname()[1])), FAULT, "silent, as behind a firewall", "firewall)")


def test_port_25_on_a_cloud_is_named(target: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(relay, "connect", lambda *_: relay.SILENT)
    assert_finds(relay.login(target, at(25)), FAULT, "does not answer on port 25", "SMTP_PORT=587: Amazon EC2")


def test_a_server_without_a_relay_is_named(target: Target, server: Server) -> None:
    assert worst(relay.login(target, of())).level == NOTE
    assert_finds(relay.login(server.target, of()), FAULT, "SMTP_HOST is not set", "sudoedit")


@pytest.mark.parametrize(
    ("error", "found", "fix"),
    [
        (
            socket.gaierror(socket.EAI_NONAME, "Name or service not known"),
            "cannot be resolved: there is none",
            "SMTP_HOST",
        ),
        (socket.gaierror(socket.EAI_AGAIN, "Temporary failure"), "no name server answers", "/etc/resolv.conf"),
    ],
)
def test_a_name_that_does_not_exist_is_told_from_a_name_server_that_is_away(
    target: Target, monkeypatch: pytest.MonkeyPatch, error: OSError, found: str, fix: str
) -> None:
    monkeypatch.setattr(socket, "getaddrinfo", Mock(side_effect=error))
    assert_finds(relay.login(target, at(587, smtp_host="smtp.acme.example")), FAULT, found, fix)


def day(days: int) -> datetime:
    return datetime.now(timezone.utc) + timedelta(days=days)


@pytest.mark.parametrize(
    ("certificate", "said"),
    [
        ({"name": "other.example"}, (FAULT, "for another name than SMTP_HOST", "into SMTP_HOST")),
        ({"not_before": day(-9), "not_after": day(-1)}, (FAULT, "this machine's clock is wrong", "timedatectl")),
        ({"not_after": day(3)}, (WARN, "expires in 2 days", "tell the relay's operator")),
    ],
)
@pytest.mark.parametrize("security", ["starttls", "tls"])
def test_a_certificate_that_is_not_right_is_named(
    target: Target, authority: trustme.CA, ca_file: str, security: str, certificate: dict[str, Any], said: Said
) -> None:
    tls = server_context(authority, **certificate)
    with ScriptedRelay(offers=["STARTTLS"], implicit=security == "tls", tls=tls) as there:
        settings = at(there.port, smtp_security=security, smtp_ca_file=ca_file)
        assert_finds(relay.login(target, settings), *said)
        unknown = relay.login(target, at(there.port, smtp_security=security))
        assert_finds(unknown, FAULT, "from an authority that this machine", "SMTP_CA_FILE")


def test_tls_where_the_relay_does_not_begin_with_it_and_the_reverse_are_named(
    target: Target, authority: trustme.CA
) -> None:
    with ScriptedRelay() as there:
        settings = at(there.port, smtp_security="tls")
        assert_finds(relay.login(target, settings), FAULT, "does not begin with TLS on this port", "=starttls")
        settings = at(there.port, smtp_security="starttls")
        assert_finds(relay.login(target, settings), FAULT, "offers no STARTTLS", "SMTP_SECURITY=tls and SMTP_PORT=465")
    with ScriptedRelay(implicit=True, tls=server_context(authority)) as there:
        settings = at(there.port, smtp_security="starttls")
        assert_finds(relay.login(target, settings), FAULT, "says nothing, as it does where it waits for TLS", "=tls")


def test_a_relay_that_drips_does_not_hold_the_doctor(target: Target) -> None:
    target.timeout = 0.2
    with ScriptedRelay({"GREETING": drip(b"2" * 1000)}) as there:
        assert worst(relay.login(target, at(there.port))).level == FAULT


# fmt: off
REFUSED_LOGINS = [
    (GMAIL, "534 5.7.9 Application-specific password required.", "an app password", "apppasswords"),
    (GMAIL, "535 5.7.8 Username and Password not accepted.", "the whole address", "apppasswords"),
    (GMAIL, "454 4.7.0 Too many login attempts", "too many logins", "wait"),
    (M365, "535 5.7.139 Authentication unsuccessful, SmtpClientAuthentication is disabled for the Tenant.",
     "SMTP AUTH switched off", "Set-CASMailbox"),
    (M365, "535 5.7.139 Authentication unsuccessful, SmtpClientAuthentication is disabled for the Mailbox.",
     "for this mailbox or the whole", "Set-CASMailbox"),
    (M365, "535 5.7.139 Authentication unsuccessful, the user credentials were incorrect.",
     "does not accept this login", "bin/oauth"),
    (M365, "535 5.7.139 Authentication unsuccessful, the request did not meet the criteria to be authenticated "
     "successfully. Contact your administrator.", "security defaults", "bin/oauth microsoft"),
    (M365, "535 5.7.139 Authentication unsuccessful, basic authentication is disabled.", "has ended", "bin/oauth"),
    (M365, "535 5.7.3 Authentication unsuccessful", "second factor", "SMTP_PASSWORD"),
    (M365, "550 5.7.30 Basic authentication is not supported", "has ended logins", "bin/oauth microsoft"),
    (M365, "432 4.3.2 Concurrent connections limit exceeded", "3 connections", "WORKER_CONCURRENCY=3"),
    (SES, "535 Authentication Credentials Invalid", "not an IAM key", "SMTP settings"),
    (SES, "454 Throttling failure: Maximum sending rate", "per second", "SMTP_RATE"),
    (SES, "454 Throttling failure: Daily message quota", "daily quota", "limit incr"),
    ("smtp.acme.example", "535 5.7.8 no", "does not accept this login", "SMTP_USERNAME and SMTP_PASSWORD"),
    ("smtp.acme.example", "530 5.7.0 Must issue a STARTTLS command first", "wants TLS", "SMTP_SECURITY"),
    ("smtp.acme.example", "454 4.7.0 Temporary authentication failure", "cannot check logins now", "wait"),
]
# fmt: on


# fmt: off
TOKENS = [  # the relay, what it says to a token, or why there is none -> what is found, and the fix
    (M365, "535 5.7.3 Authentication unsuccessful [XOAUTH2]", "must be the mailbox that has consented", "SendAsApp"),
    (M365, "535 5.7.139 Authentication unsuccessful, the request did not meet the criteria [XOAUTH2]",
     "Conditional Access", "sign-in logs"),
    (M365, "535 5.7.139 Authentication unsuccessful, SmtpClientAuthentication is disabled for the Tenant. [XOAUTH2]",
     "by token as by password", "Set-TransportConfig"),
    (GMAIL, "535 5.7.8 Username and Password not accepted. [XOAUTH2 400]", "has consented", "bin/oauth google"),
    ("mx.acme.example", "535 5.7.8 no [OAUTHBEARER invalid_token]", "does not take the token", "bin/oauth"),
    (M365, "the relay offers no AUTH XOAUTH2 or OAUTHBEARER", "takes no tokens", "SMTP_PASSWORD"),
    *((M365, f"no token: {code}", found, fix) for code, found, fix in (
        ("invalid_client AADSTS7000215", "client secret", "Certificates & secrets"),
        ("invalid_client AADSTS7000222", "it has ended", "Certificates & secrets"),
        ("invalid_client AADSTS7000218", "public client", "Allow public client flows"),
        ("unauthorized_client AADSTS700016", "client ID or tenant is wrong", "--tenant"),
        ("invalid_grant AADSTS65001", "nobody has consented", "Grant admin consent"),
        ("invalid_grant AADSTS50126", "does not let the account in", "outlook.office.com"),
        ("invalid_grant AADSTS50076", "second factor", "--client-credentials"),
        ("invalid_resource AADSTS500011", "does not know Exchange Online", "--tenant"),
        ("invalid_grant AADSTS700082", "for 90 days", "again"),
        ("invalid_grant", "in testing ends after 7 days", "In production"),
        ("invalid_client", "client ID or secret is wrong", "console"),
        ("invalid_scope", "right to send mail", "SMTP.Send"),
        ("the token server does not answer (NewConnectionError)", "cannot be reached", "let HTTPS out"),
        ("the token server answers 503; retry after 120s", "out of order", "waits"),
        ("consent_required", "gives no token", "bin/oauth"),
    )),
]
# fmt: on


@pytest.mark.parametrize(("host", "said", "found", "fix"), TOKENS)
def test_a_login_by_token_that_fails_is_explained(host: str, said: str, found: str, fix: str) -> None:
    code = int(said[:3]) if said[:3].isdigit() else None
    meaning, remedy = replies.explain(host, Reply(Phase.AUTH, code, said[4:] if code else said))
    assert found in meaning
    assert fix in remedy


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every name means this machine."""
    resolve = socket.getaddrinfo
    monkeypatch.setattr(socket, "getaddrinfo", lambda _, *rest, **more: resolve("127.0.0.1", *rest, **more))


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize(("host", "reply", "found", "fix"), REFUSED_LOGINS)
def test_a_refused_login_is_explained_for_the_relay_that_refused_it(
    target: Target, authority: trustme.CA, ca_file: str, host: str, reply: str, found: str, fix: str
) -> None:
    script: dict[str, Step] = {"AUTH": f"{reply} ada@acme.example {PASSWORD}"}
    with ScriptedRelay(script, offers=["STARTTLS", "AUTH LOGIN PLAIN"], tls=server_context(authority, host)) as there:
        settings = at(there.port, smtp_host=host, smtp_security="starttls", smtp_ca_file=ca_file, **LOGIN)
        assert_finds(relay.login(target, settings), FAULT, found, fix)
        said = repr(listed(relay.login(target, settings)))
    assert reply[:3] in said
    assert "acme.example" not in said.replace("smtp.acme.example", "")
    assert PASSWORD not in said


def test_the_doctor_logs_in_by_token_and_says_why_there_is_none(target: Target) -> None:
    with TokenServer() as server, test_relay.Relay(takes_token=server.takes) as there:
        settings = at(there.port, smtp_username="ada@acme.example", smtp_oauth=server.grant(), redis_url=NO_REDIS)
        assert_finds(relay.login(target, settings), OK, "accepts our login by token")
        server.answers = [(400, EXPIRED, {})]
        assert_finds(
            relay.login(target, settings), FAULT, "no token: invalid_grant AADSTS700082): the refresh", "again"
        )


def test_each_of_several_relays_is_tried_and_what_is_wrong_with_one_has_its_name(target: Target) -> None:
    with ScriptedRelay() as there:
        lines = (
            f'[{name}]\nhost = "127.0.0.1"\nport = {port}\nsecurity = "none"\n'
            for name, port in (("first", free_port()), ("second", there.port))
        )
        found = listed(relay.login(target, load(from_file={}, relays="".join(lines))))
    assert [(one.level, one.found[:14]) for one in found] == [(FAULT, "relay first: 1"), *[(OK, "relay second: ")] * 2]
    assert "correct host and port (edit RELAYS" in found[0].fix


def test_what_can_be_seen_of_a_wrong_password_is_said_without_it() -> None:
    spaces = at(587, smtp_host=GMAIL, smtp_security="starttls", smtp_username="a", smtp_password="abcd efgh")
    assert_finds(relay.likely_mistakes(Relay.of(spaces)), NOTE, "has spaces in it")
    iam = at(587, smtp_host=SES, smtp_security="tls", smtp_username="AKIA", smtp_password="x" * 40)
    assert_finds(relay.likely_mistakes(Relay.of(iam)), NOTE, "looks like an IAM key")


@pytest.mark.usefixtures("here")
def test_what_works_and_is_not_right_is_a_warning(target: Target, authority: trustme.CA, ca_file: str) -> None:
    with ScriptedRelay(offers=["STARTTLS"], tls=server_context(authority, M365)) as there:
        settings = at(there.port, smtp_host=M365, smtp_security="starttls", smtp_ca_file=ca_file)
        assert_finds(relay.login(target, settings), WARN, "allows a mailbox 3 connections", "WORKER_CONCURRENCY=3")
        settings = at(there.port, smtp_host=M365, smtp_security="none")
        assert_finds(relay.login(target, settings), WARN, "mail goes to the relay unencrypted", "=starttls")
    with ScriptedRelay(offers=["AUTH PLAIN"]) as there:
        settings = at(there.port, smtp_host=M365, smtp_security="none")
        assert_finds(relay.login(target, settings), WARN, "SMTP_USERNAME is not set", "SMTP_USERNAME and SMTP_PASSWORD")


def test_the_sandbox_of_ses_and_a_sender_that_may_not_are_explained() -> None:
    refused = Reply(Phase.DOT, 554, "Message rejected: Email address is not verified.")
    assert "sandbox" in replies.explain("email-smtp.us-east-1.amazonaws.com", refused)[0]
    assert "MAIL_FROM" in replies.explain("smtp.acme.example", Reply(Phase.MAIL, 553, "5.7.1 not owned"))[1]


@pytest.mark.parametrize("phase", Phase)
@pytest.mark.parametrize("code", [None, -1, 421, 450, 454, 500, 530, 535, 550, 554])
def test_every_refusal_has_a_meaning_and_a_remedy(phase: Phase, code: int | None) -> None:
    for host in (GMAIL, M365, SES, "mx.acme.example"):
        assert all(replies.explain(host, Reply(phase, code, "")))
