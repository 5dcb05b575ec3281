"""Checks the machine around the service: nginx in front of it, ports that should not be open, and the clock.

Asks `nginx -t`, /proc/net/tcp, `timedatectl`, and nginx for /healthz and /readyz, as a client on this machine would.
"""

from __future__ import annotations

import http.client
import ipaddress
import json
import os
import re
import shutil
import socket
from contextlib import closing
from pathlib import Path

from ops.checks.findings import Findings, fault, lasting, note, ok, sized, warn
from ops.checks.store import address
from ops.checks.system import NOT_RUN, run
from ops.checks.target import Target
from ops.gate import PORT as SENTINEL_PORT
from ops.machines import PORT
from settings import Settings

LISTENING = re.compile(r"^ *\d+: (\w+):(\w+) \S+ 0A ", re.MULTILINE)  # a line of /proc/net/tcp; 0A: tcp_states.h
SOON = 14 * 86400  # seconds; certbot renews 30 days before
LITTLE = 128 * 2**20  # bytes of disk
TLS_PORT = re.compile(r"^\s*listen\s+(?!127\.|\[::1\])(?:\S*:)?(\d+)\s[^;#]*\bssl\b", re.MULTILINE)
LET_IN = re.compile(r"^(?:[\d,]*\b(?:80|443)\b|Nginx|WWW|Anywhere).* (?:ALLOW|LIMIT)", re.MULTILINE)  # `ufw status`
PUBLIC = {22, 80, 443}  # ssh and nginx


def nginx(target: Target) -> Findings:
    if not target.installed:
        yield note("the service is not installed here: skipped")
        return
    if not target.nginx.is_dir():
        yield warn("nginx is not installed, so nobody outside can call the API", "sudo bin/install, in your clone")
        return
    if os.geteuid() == 0 and (ran := run("nginx", "-t")).returncode not in (0, NOT_RUN):
        error = re.search(r"\[emerg\] (?:\d+#\d+: )?(.*)", ran.stderr)
        found = f"nginx refuses its configuration: {error[1] if error else 'nginx -t'}"
        yield fault(found, "fix that line, then: sudo nginx -t")
    site = target.nginx / "sites-enabled" / "async-email"
    if not site.exists():
        fix = f"sudo ln -s ../sites-available/async-email {site} && sudo systemctl reload nginx"
        yield fault("the nginx site is not enabled", fix)
    yield from through_nginx(target)


def through_nginx(target: Target) -> Findings:
    try:
        status, body, onward = get("/healthz", target)
    except TimeoutError:  # the request waits in systemd's socket for an API that does not start
        found = f"nginx takes a request, and the API does not answer it within {lasting(target.timeout)}"
        yield fault(found, f"see the lines about settings and units here; {target.restart('api')}")
        return
    except (OSError, http.client.HTTPException):
        yield fault(f"nothing answers on port {target.http_port}", "sudo systemctl restart nginx; sudo nginx -t")
        return
    if status == 200 and b'"ok"' in body:
        yield from takes_mail(target)
    elif status in (301, 302, 307, 308) and onward.startswith("https://"):
        yield ok(f"nginx redirects port {target.http_port} to https")
    elif status not in (502, 503, 504):
        found = f"another site of nginx answers on port {target.http_port} (/healthz gives {status})"
        yield fault(found, "sudo rm /etc/nginx/sites-enabled/default && sudo systemctl reload nginx")
    elif target.selinux.exists() and target.selinux.read_text().strip() == "1":
        fix = "sudo setsebool -P httpd_can_network_connect 1; if it stays: sudo ausearch -m avc -ts recent"
        yield fault(f"nginx answers {status}: SELinux may keep it from the API", fix)
    else:
        fix = "sudo systemctl restart async-email-api.socket async-email-api; sudo tail /var/log/nginx/error.log"
        yield fault(f"nginx answers {status}: the API does not answer it", fix)


def takes_mail(target: Target) -> Findings:
    """Looks at /readyz: an API that answers /healthz may still refuse every mail, as where it runs with an old password
    of Redis, which the doctor, with the new one, reaches without trouble."""
    try:
        status, body, _ = get("/readyz", target)
        message = str(json.loads(body)["message"]) if status == 503 else ""
    except (OSError, http.client.HTTPException, ValueError, LookupError, TypeError):
        status, message = 0, ""
    if status == 503 and message:
        fix = f"see the line about Redis here; if that is well: {target.restart('api')}"
        yield fault(f"the API answers, and refuses mail with 503: {message.partition('; ')[0]}", fix)
    elif status in (200, 404):  # 404: a site of the operator's own, which keeps /readyz for itself
        yield ok(f"the API answers through nginx on port {target.http_port}")
    else:
        found = f"the API answers /healthz, and not /readyz within {lasting(target.timeout)}"
        yield fault(found, f"sudo journalctl -u async-email-api -p warning -n 20; {target.restart('api')}")


def get(path: str, target: Target) -> tuple[int, bytes, str]:
    """Returns status, body, and where the answer redirects to."""
    with closing(http.client.HTTPConnection("127.0.0.1", target.http_port, timeout=target.timeout)) as connection:
        connection.request("GET", path)
        answer = connection.getresponse()
        return answer.status, answer.read(65536), answer.getheader("Location", "")


def tls(target: Target) -> Findings:
    """Checks that keys do not cross the network in the clear, and that no certificate of our site or Redis runs out."""
    for one in filter(Path.exists, target.redis_certificates):
        fix = f"a new one: {target.opt}/current/docs/scale.md, TLS and logins"
        yield from lasts(str(one), "nobody reaches Redis and the Sentinels", fix)
    try:
        site = (target.nginx / "sites-enabled" / "async-email").read_text()
    except OSError:
        yield note("the nginx site is not here: skipped")
        return
    certificates = sorted(set(re.findall(r"^\s*ssl_certificate\s+(\S+);", site, re.MULTILINE)))
    if not certificates:
        found = "nginx takes API keys without TLS; who shares the network can read them"
        yield note(found, f"{target.opt}/current/docs/operations.md, TLS: certbot, or a certificate of your own")
    missing = {int(port) for port in TLS_PORT.findall(site)} - listeners()
    if missing:
        found = f"nothing listens on port {min(missing)}, which the nginx site names: nginx runs on an older file"
        yield fault(found, "sudo nginx -t && sudo systemctl restart nginx; sudo tail /var/log/nginx/error.log")
    for path in certificates:
        fix = f"renew {path} (certbot: sudo certbot renew), then: sudo systemctl reload nginx"
        yield from lasts(path, "clients refuse this server", fix)


def lasts(path: str, consequence: str, fix: str) -> Findings:
    if not runs_out(path, SOON):
        yield ok(f"{path} is valid for more than {lasting(SOON)}")
    elif runs_out(path, 0):
        yield fault(f"{path} has expired: {consequence}", fix)
    else:
        yield warn(f"{path} expires within {lasting(SOON)}", fix)


def runs_out(certificate: str, seconds: int) -> bool:
    return "will expire" in run("openssl", "x509", "-noout", "-checkend", str(seconds), "-in", certificate).stdout


def logs(target: Target) -> Findings:
    """Checks that there is room for the log files of nginx and the system, and that somebody rotates them."""
    if not target.installed or not target.logs.is_dir():
        yield note("the service is not installed here: skipped")
        return
    free = shutil.disk_usage(target.logs).free
    if free < LITTLE:
        fix = "sudo journalctl --vacuum-size=200M; sudo du -xh /var/log | sort -h | tail"
        yield warn(f"{sized(free)} free for logs in {target.logs}: what happens next may not be written down", fix)
    else:
        yield ok(f"{sized(free)} free for logs")
    if target.nginx.is_dir() and run("logrotate", "--version").returncode == NOT_RUN:
        yield warn("no logrotate: nginx' log files grow for ever", "sudo apt install logrotate")


def ports(target: Target, settings: Settings) -> Findings:
    """Checks what listens on more than loopback: 22, 80 and 443 may; what is ours must not."""
    open_ones = listeners()
    redis = address(settings)
    ours = {
        settings.listen.port: ("the API", "LISTEN=127.0.0.1:8000"),
        settings.dashboard_listen.port: ("the dashboard", "DASHBOARD_LISTEN=127.0.0.1:9181"),
    }
    if redis.is_here and not redis.path:
        ours[redis.port] = ("Redis", "bind 127.0.0.1 -::1 in its configuration, and restart it")
    for port in sorted(open_ones & ours.keys()):
        what, fix = ours[port]
        yield fault(f"{what} listens on port {port} for everybody, not only for this machine", fix)
    meant = {one.port for one in settings.submission_listen}
    meant |= {PORT, SENTINEL_PORT} if target.roles & {"redis", "sentinel"} else set()
    others = sorted(open_ones - PUBLIC - ours.keys() - meant)
    if others:
        found = f"other programs listen for everybody, on {', '.join(map(str, others))}"
        yield note(found, "sudo ss -ltnp shows whose they are; close them in the security group or firewall")
    if not open_ones & ours.keys():
        yield ok("nothing of ours listens for other machines")
    firewall = run("ufw", "status").stdout
    if target.installed and "Status: active" in firewall and not LET_IN.search(firewall):
        yield warn("ufw, this machine's firewall, lets nobody in to ports 80 and 443", "sudo ufw allow 80,443/tcp")


def listeners() -> set[int]:
    """Returns the TCP ports that take connections on an address that is not loopback."""
    tables = [table.read_text() for table in (Path("/proc/net/tcp"), Path("/proc/net/tcp6")) if table.exists()]
    return {int(port, 16) for host, port in LISTENING.findall("".join(tables)) if not is_local(host)}


def is_local(host: str) -> bool:
    """Reads an address as the kernel writes it: 32-bit words in the machine's byte order."""
    words = [socket.ntohl(int(host[start : start + 8], 16)) for start in range(0, len(host), 8)]
    local = ipaddress.ip_address(b"".join(word.to_bytes(4, "big") for word in words))
    mapped = getattr(local, "ipv4_mapped", None)
    return bool((mapped or local).is_loopback)


def clock(target: Target) -> Findings:
    """Checks that it is synchronised: a wrong clock makes certificates invalid and retries late."""
    answer = run("timedatectl", "show", "-p", "NTPSynchronized", "--value").stdout.strip()
    if answer == "yes":
        yield ok("the clock is synchronised")
    elif answer == "no":
        fix = "sudo timedatectl set-ntp true (sudo apt install systemd-timesyncd, if that is refused)"
        yield warn("the clock is not synchronised", fix)
    else:
        yield note("no timedatectl here, skipped")
