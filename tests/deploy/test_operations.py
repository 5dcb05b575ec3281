"""docs/operations.md, done on a server as it stands there: backup and restore, new passwords, a Redis for two machines,
a queue looked into and repaired, removal. What is done is undone, by the page's own commands where it has any."""

from __future__ import annotations

import shlex
from datetime import datetime, timedelta, timezone

import pytest
import trustme

from tests.deploy.server import ENV, REDIS, Server
from tests.operations import block, line
from tests.servers import eventually

pytestmark = pytest.mark.deploy

CONF = "/etc/redis/redis-async-email.conf"
SITE = "/etc/nginx/sites-available/async-email"


def bash(server: Server, commands: str) -> str:
    return server.machine.admin(f"bash -euo pipefail -c {shlex.quote(commands)}").stdout


def test_a_backup_brings_the_queue_back_and_what_was_sent_since_is_not_sent_again(server: Server) -> None:
    late = server.somebody()
    server.relay.rcpt[late] = ["451 4.7.1 later"]
    _, late_id = server.post(late)
    eventually(lambda: server.api.email(late_id)["status"] == "delayed")
    with server.relay_away():
        before = dict(server.post() for _ in range(3))
        bash(server, line("bin/backup /var/backups"))
    server.arrives(*before, seconds=90)
    after, after_id = server.post()
    server.arrives(after)
    eventually(lambda: {server.api.email(one)["status"] for one in (*before.values(), after_id)} == {"sent"})

    bash(server, line("bin/restore /var/backups"))
    eventually(lambda: server.api.get("/healthz").status == 200)
    eventually(lambda: server.api.get(f"/emails/{late_id}").status == 200)
    assert server.api.get(f"/emails/{after_id}").status == 404
    assert {server.api.email(one)["status"] for one in before.values()} == {"canceled"}
    bash(server, "sudo systemctl start async-email.target")
    eventually(server.is_up, 60)
    server.arrives(late, *before, seconds=150)
    assert server.copies() == dict.fromkeys((late, *before, after), 1)


def test_the_configuration_in_a_backup_is_the_one_that_was_there(server: Server) -> None:
    kept = server.machine.says(f"cat {ENV} {CONF}; stat -c '%a %U %G' {ENV} {CONF} /etc/async-email")
    server.machine.run(f"echo nonsense > {ENV}; chmod 644 {ENV}; rm {CONF}")
    bash(server, f"{line('bin/restore /var/backups').replace('restore', 'restore --settings')}")
    bash(server, "sudo systemctl start async-email.target")
    eventually(server.is_up, 60)
    assert server.machine.says(f"cat {ENV} {CONF}; stat -c '%a %U %G' {ENV} {CONF} /etc/async-email") == kept


def test_new_passwords(server: Server) -> None:
    before = server.machine.says("cat /etc/async-email/credentials/redis_url")
    bash(server, block("/etc/async-email/credentials/dashboard_password'"))
    bash(server, block("sudo sh -eu <<'END'\nnew="))
    assert server.machine.says("cat /etc/async-email/credentials/redis_url") != before
    assert server.machine.says(f"stat -c '%a %U %G' {CONF}") == "640 root redis"
    eventually(server.is_up, 60)
    server.delivers()
    password = "$(sudo cat /etc/async-email/credentials/dashboard_password)"
    for page in ("/rq/", "/mail/", "/mail/system"):
        assert "<html" in bash(server, f"curl -sSf -u admin:{password} http://127.0.0.1{page}")
    top = line("bin/top").partition(" #")[0].strip()
    assert "sent today" in bash(server, f"printf q | TERM=xterm timeout 30 script -qec '{top}' /dev/null")
    assert [one for one in server.doctor().troubles() if "Redis" in one.found] == []


def test_a_redis_that_another_machine_can_use(server: Server) -> None:
    """The same machine plays both."""
    files = f"{CONF} {ENV}"
    server.machine.run(f"mkdir -p /var/tmp/kept-files && cp -p {files} /var/tmp/kept-files")
    try:
        bash(server, block("tls-port 6380").replace("10.0.0.5", server.machine.address))
        bash(server, "sudo cp /etc/redis/async-email.crt . && " + line("sudo install -m 644 async-email.crt"))
        password = server.machine.says("cut -d: -f3 /etc/async-email/credentials/redis_url | cut -d@ -f1")
        url = line("REDIS_URL=rediss").replace("10.0.0.5", server.machine.address).replace("PASSWORD", password)
        server.machine.run(f"echo {shlex.quote(url)} >> {ENV}")
        server.machine.run("mv /etc/async-email/credentials/redis_url /var/tmp/kept-files")
        assert "REDIS_URL is set in async-email.env, so none is needed here" in server.install().stdout
        server.restart()
        assert "6380" in server.machine.says("ss -tnH state established")
        server.delivers()
        assert f"answers at {server.machine.address}:6380" in server.doctor().text
    finally:
        server.machine.run("cd /var/tmp/kept-files && mv redis_url /etc/async-email/credentials/ || true")
        server.machine.run(f"cp -p /var/tmp/kept-files/async-email.env {ENV}")
        server.machine.run(f"cp -p /var/tmp/kept-files/redis-async-email.conf {CONF} && systemctl restart {REDIS}")
        server.restart()


def test_redis_looked_into_and_the_breaker_closed_by_hand(server: Server) -> None:
    queue = block("queue() {")
    assert "used_memory" in bash(server, queue)
    far = "$(( ($(date +%s) + 18000) * 1000 ))"
    bash(server, f"{queue}\nqueue HSET relay:breaker open_until {far}")
    recipient, mail_id = server.post()
    eventually(lambda: server.api.email(mail_id)["status"] == "delayed")
    assert "all mail waits" in bash(server, block("bin/breaker close").splitlines()[0])
    bash(server, line("bin/breaker close"))
    bash(server, f"{queue}\nqueue ZADD rq:scheduled:email XX 0 {mail_id}")
    server.arrives(recipient)


def test_suspended_workers_are_resumed(server: Server) -> None:
    resume = block("/rq resume")
    bash(server, resume.replace("rq resume", "rq suspend"))
    assert any("workers are suspended" in one.found for one in server.doctor().troubles())
    bash(server, resume)
    server.delivers()


def test_a_damaged_file_is_cut_off_where_it_cannot_be_read(server: Server) -> None:
    with server.relay_away():
        recipient, mail_id = server.post()
        data = "/var/lib/redis-async-email/appendonlydir"
        server.machine.run(f"systemctl stop {REDIS} && echo nonsense >> $(ls -t {data}/*.incr.aof | head -1)")
        server.machine.run(f"systemctl start {REDIS}", check=False)
        eventually(lambda: "Bad file format" in server.machine.says(f"journalctl --no-pager -u {REDIS} -n 50"))
        check = "sudo -u redis redis-check-aof"
        bash(server, block("redis-check-aof").replace(check, f"echo y | {check}"))
        eventually(server.is_up, 120)
        eventually(lambda: server.api.email(mail_id)["status"] in ("queued", "delayed"))
    server.arrives(recipient, seconds=120)
    assert server.copies() == {recipient: 1}


def test_the_site_takes_a_name(server: Server) -> None:
    server.machine.run(f"cp -p {SITE} /var/tmp/kept-site")
    bash(server, line("sudo sed -i 's/server_name"))
    assert server.machine.says(f"grep -c 'server_name mail.example.com;' {SITE}") == "1"
    server.machine.run(f"nginx -t && mv /var/tmp/kept-site {SITE}")


def test_a_certificate_of_ones_own_and_its_end(server: Server) -> None:
    server.machine.run(f"cp -p {SITE} /var/tmp/kept-site")
    name = "mail.example.com"
    authority = trustme.CA()

    def bring(until: datetime | None = None) -> None:
        certificate = authority.issue_cert(name, not_after=until)
        chain = "".join(blob.bytes().decode() for blob in certificate.cert_chain_pems)
        server.machine.run(f"cat > ~admin/{name}.crt", given=chain)
        server.machine.run(f"cat > ~admin/{name}.key", given=certificate.private_key_pem.bytes().decode())
        bash(server, block("sudo install -m 644 mail.example.com.crt"))

    try:
        server.machine.run("cat > ~admin/authority.crt", given=authority.cert_pem.bytes().decode())
        bring()
        curl = f"curl -sS --cacert authority.crt --resolve {name}:443:{server.machine.address} https://{name}/healthz"
        eventually(lambda: '"ok"' in server.machine.admin(curl, check=False).stdout)
        with pytest.raises(OSError, match="refused"):
            server.api.get("/healthz")  # port 80, from outside
        assert [one for one in server.doctor().findings if one.level == "ok" and "is valid for more than" in one.found]
        bring(datetime.now(timezone.utc) - timedelta(days=1))
        [found] = [one for one in server.doctor().findings if "has expired" in one.found]
        assert found.level == "fault"
        assert "systemctl reload nginx" in found.fix
        eventually(lambda: "expired" in server.machine.admin(curl, check=False).stderr)
    finally:
        server.machine.run(f"cp -p /var/tmp/kept-site {SITE} && systemctl restart nginx; rm /var/tmp/kept-site")
        server.machine.run(f"rm -f ~admin/{name}.* ~admin/authority.crt /etc/ssl/async-email.crt")


def test_it_is_removed_and_comes_back_with_queue_and_secrets(server: Server) -> None:
    with server.relay_away():
        recipient, mail_id = server.post()
        bash(server, block("sudo userdel async-email"))
        left = server.machine.says("ls -d /etc/systemd/system/async-email* /opt/async-email /run/async-email || true")
        assert left == ""
        assert server.machine.run("nginx -t", check=False).returncode == 0
        server.install()
        eventually(server.is_up, 60)
        eventually(lambda: server.api.email(mail_id)["status"] in ("queued", "delayed"))
    server.arrives(recipient, seconds=120)
    assert server.copies() == {recipient: 1}
