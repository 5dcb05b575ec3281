"""From a bare system to a delivered mail: `git clone`, `sudo bin/install`, one file edited, done."""

from __future__ import annotations

import email
import re
import smtplib
import ssl

import pytest
import trustme

from tests.deploy.server import COMMANDS, ENV, OURS, Installed, Server
from tests.servers import Api, eventually

pytestmark = pytest.mark.deploy


def test_a_dry_run_says_what_would_be_done_and_does_nothing(installed: Installed) -> None:
    assert {path.split()[0] for path in installed.touched_by_dry_run} == set()
    for step in ("redis-server", "nginx", "async-email-api", "/etc/async-email", "/opt/async-email"):
        assert step in installed.dry_run.stdout, step


def test_before_the_first_edit_the_doctor_names_what_is_missing(installed: Installed) -> None:
    assert installed.doctor.exit == 2
    faults = [finding for finding in installed.doctor.findings if finding.level == "fault"]
    for name in ("SMTP_HOST", "MAIL_FROM"):
        named = [finding for finding in faults if f"{name} is not set" in finding.found]
        assert named
        assert all(ENV in finding.fix for finding in named)


def test_a_mail_posted_on_port_80_is_delivered(server: Server) -> None:
    recipient, mail_id = server.post()
    server.arrives(recipient)
    (mail,) = server.relay.accepted
    assert mail.sender == "hello@shop.internal"
    assert email.message_from_bytes(mail.content)["Subject"] == "Welcome, Ada"
    eventually(lambda: server.api.email(mail_id)["status"] == "sent")


def test_the_curl_that_the_installation_shows_works_as_it_stands(server: Server, installed: Installed) -> None:
    found = re.search(r"curl(?:[^\n]*\\\n)*[^\n]*", installed.install.stdout)
    assert found
    assert '"queued"' in server.machine.admin(found[0]).stdout
    eventually(lambda: server.relay.accepted)


def test_a_second_installation_changes_nothing(server: Server) -> None:
    before, running = server.machine.files(), server.main_pids()
    again = server.install()
    changed = before ^ server.machine.files()
    assert {line for line in changed if line.startswith(("/etc/", "/opt/", "/usr/"))} == set()
    assert server.main_pids() == running
    assert server.key not in again.stdout


def test_only_ssh_and_http_listen_to_the_world(server: Server) -> None:
    addresses = [line.split()[4].rsplit(":", 1) for line in server.machine.says("ss -ltunH").splitlines()]
    assert {int(port) for host, port in addresses if not host.startswith(("127.", "[::1]"))} <= {22, 80, 443}


@pytest.mark.parametrize("path", ["/rq/", "/rq/queues", "/metrics", "/readyz", "/", "/.env", "/nothing"])
def test_what_is_not_the_apis_is_nobodys_from_outside(server: Server, path: str) -> None:
    assert server.api.get(path).status in (403, 404)


def test_the_dashboard_and_the_metrics_are_there_for_the_machine_itself(server: Server) -> None:
    password = "$(sudo cat /etc/async-email/credentials/dashboard_password)"
    page = server.machine.admin(f"curl -sSf -u admin:{password} http://127.0.0.1/rq/").stdout
    assert "<html" in page
    assert server.machine.admin("curl -sSf http://127.0.0.1/readyz").returncode == 0
    assert "async_email_" in server.machine.admin("curl -sSf http://127.0.0.1/metrics").stdout


def test_the_commands_that_people_know_show_what_they_expect(server: Server) -> None:
    server.delivers()
    journal = server.machine.admin("sudo journalctl -u async-email-api -n 50 --no-pager").stdout
    assert re.search(r"request .*method=POST .*route=/start-job .*status=202", journal)
    status = server.machine.admin("systemctl status async-email-worker@email --no-pager").stdout
    assert "active (running)" in status
    journal = server.machine.admin("sudo journalctl -u async-email-worker@email -n 50 --no-pager").stdout
    assert re.search(r"\bsent id=", journal)


def test_the_workers_answer_to_the_name_of_the_guide(server: Server) -> None:
    status = server.machine.admin("systemctl status async-email-worker --no-pager").stdout
    assert "active (exited)" in status
    assert "async-email-worker@email" in status
    before = server.main_pids()
    server.machine.run("systemctl restart async-email-worker")
    eventually(server.is_up, 60)
    changed = {unit for unit, pid in server.main_pids().items() if pid != before[unit]}
    assert {unit.partition("@")[0] for unit in changed} == {"async-email-worker"}
    server.machine.run("systemctl stop async-email-worker && systemctl start async-email-worker")
    eventually(server.is_up, 60)
    server.delivers()


def test_no_secret_and_no_address_is_in_the_journal_or_a_process_title(server: Server) -> None:
    recipient = server.delivers()
    looks = ("journalctl --no-pager -o cat", "ps -eo args", f"systemctl show {' '.join(OURS)}")
    told = "".join(map(server.machine.says, looks))
    assert server.relay.login
    stored = server.machine.admin("sudo sh -c 'cat /etc/async-email/credentials/*'").stdout
    redis_password = re.search(r":([^:@/]{16,})@|password=([^&\s]{16,})", stored)
    assert redis_password
    for secret in (recipient, server.relay.login[1], server.key, redis_password[1] or redis_password[2], "hello@shop"):
        assert secret not in told


def test_a_new_key_works_until_it_is_revoked(server: Server) -> None:
    made = server.machine.admin(f"sudo {COMMANDS}/key new billing --scope send").stdout
    billing = Api(80, made.strip(), server.machine.address)
    mail = {"name": "Ada", "email": server.somebody()}
    restart = "sudo systemctl restart async-email-api"
    server.machine.admin(restart)
    assert billing.post("/start-job", mail).status == 202
    assert "billing" in server.machine.admin(f"sudo {COMMANDS}/key list").stdout
    server.machine.admin(f"sudo {COMMANDS}/key revoke billing && {restart}")
    assert billing.post("/start-job", mail).status == 403


def test_mail_comes_by_smtp_from_other_machines_and_from_its_own_programs(server: Server) -> None:
    authority, (there, own) = trustme.CA(), (server.somebody(), server.somebody())
    made = authority.issue_cert(server.machine.address)
    server.machine.write("/etc/ssl/smtp.crt", "".join(blob.bytes().decode() for blob in made.cert_chain_pems))
    server.machine.write("/etc/ssl/smtp.key", made.private_key_pem.bytes().decode())
    settings = ("SUBMISSION_LISTEN", "SUBMISSION_TLS_CERT", "SUBMISSION_TLS_KEY")
    server.edit(
        **dict(zip(settings, ("127.0.0.1:2525,0.0.0.0:465", "/etc/ssl/smtp.crt", "/etc/ssl/smtp.key"), strict=True))
    )
    try:
        assert "is taken by SMTP on port 465" in server.install().stdout  # the doctor says so
        context = ssl.create_default_context()
        authority.configure_trust(context)
        with smtplib.SMTP_SSL(server.machine.address, 465, context=context, timeout=60) as client:
            client.login("any", server.key)
            client.sendmail("hello@shop.internal", [there], "Subject: Hello\r\n\r\nHello\r\n")
        conf = f"SUBMISSION_URL=smtp://any:{server.key}@127.0.0.1:2525\nMAIL_FROM=hello@shop.internal\n"
        server.machine.write("/home/admin/sendmail.conf", conf)
        server.machine.admin(f"echo Hello | {COMMANDS}/sendmail -C sendmail.conf {own} && rm -f sendmail.conf")
        server.arrives(there, own)
    finally:
        server.edit(**dict.fromkeys(settings, ""))
        server.install()
        server.restart()
    assert server.machine.says("systemctl is-active async-email-submission.socket || true") == "inactive"
