"""The machine around the service: nginx in front of it, ports that are open and should not be, and the clock.

Asks `nginx -t`, /proc/net/tcp, `timedatectl` and one GET /healthz through nginx, as anybody from outside would.
"""

from __future__ import annotations

import http.client
import ipaddress
import re
import socket
from pathlib import Path

from ops.checks.findings import Finding, Findings, Place, fault, is_root, note, ok, run, warn
from ops.checks.store import where

LISTENING = "0A"  # tcp_states.h
PUBLIC = {22, 80, 443}  # ssh and nginx


def nginx(place: Place) -> Findings:
    if not place.nginx.is_dir():
        if place.installed:
            yield warn("nginx is not installed, so nobody outside can call the API", "sudo bin/install, in your clone")
        else:
            yield note("no nginx here, skipped")
        return
    if not place.installed:
        yield note("nginx is here, and the service is not installed: skipped")
        return
    yield from tested()
    site = place.nginx / "sites-enabled" / "async-email"
    if not site.exists():
        mend = f"sudo ln -s ../sites-available/async-email {site} && sudo systemctl reload nginx"
        yield fault("the nginx site is not enabled", mend)
    yield from through_nginx(place)


def tested() -> Findings:
    tested = run("nginx", "-t") if is_root() else None
    if tested and tested.returncode:
        said = re.search(r"\[emerg\] (?:\d+#\d+: )?(.*)", tested.stderr)
        yield fault(
            f"nginx refuses its configuration: {said[1] if said else 'nginx -t'}", "mend that line, then: sudo nginx -t"
        )


def through_nginx(place: Place) -> Findings:
    connection = http.client.HTTPConnection("127.0.0.1", place.http_port, timeout=place.patience)
    try:
        connection.request("GET", "/healthz")
        answer = connection.getresponse()
        status, body, onward = answer.status, answer.read(4096), answer.getheader("Location", "")
    except (OSError, http.client.HTTPException):
        yield fault(f"nothing answers on port {place.http_port}", "sudo systemctl restart nginx; sudo nginx -t")
        return
    finally:
        connection.close()
    if status == 200 and b'"ok"' in body:
        yield ok(f"the API answers through nginx on port {place.http_port}")
    elif status in (301, 302, 307, 308) and onward.startswith("https://"):
        yield ok(f"nginx sends port {place.http_port} on to https")
    elif status in (502, 503, 504):
        yield bad_gateway(status, place)
    else:
        found = f"another site of nginx answers on port {place.http_port} (/healthz gives {status})"
        yield fault(found, "sudo rm /etc/nginx/sites-enabled/default && sudo systemctl reload nginx")


def bad_gateway(status: int, place: Place) -> Finding:
    enforcing = place.selinux.exists() and place.selinux.read_text().strip() == "1"
    if enforcing:
        mend = "sudo setsebool -P httpd_can_network_connect 1; if it stays: sudo ausearch -m avc -ts recent"
        return fault(f"nginx answers {status}: SELinux may keep it from the API", mend)
    mend = "sudo systemctl restart async-email-api.socket async-email-api; sudo tail /var/log/nginx/error.log"
    return fault(f"nginx answers {status}: the API does not answer it", mend)


def ports(place: Place) -> Findings:
    """Who listens on more than loopback: 22, 80 and 443 may; what is ours must not."""
    assert place.settings
    open_ones = listeners(Path("/proc/net"))
    redis = where(place)
    ours = {
        place.settings.listen.port: ("the API", "LISTEN=127.0.0.1:8000"),
        place.settings.dashboard_listen.port: ("the dashboard", "DASHBOARD_LISTEN=127.0.0.1:9181"),
    }
    if redis.is_here and not redis.path:
        ours[redis.port] = ("Redis", "bind 127.0.0.1 -::1 in its configuration, and restart it")
    for port in sorted(open_ones & ours.keys()):
        what, mend = ours[port]
        yield fault(f"{what} listens on port {port} for everybody, not only for this machine", mend)
    others = sorted(open_ones - PUBLIC - ours.keys())
    if others:
        found = f"other programs listen for everybody, on {', '.join(map(str, others))}"
        yield note(found, "sudo ss -ltnp shows whose they are; close them in the security group or firewall")
    if not open_ones & ours.keys():
        yield ok("nothing of ours listens for more than this machine")


def listeners(net: Path) -> set[int]:
    """TCP ports that take connections on an address that is not loopback."""
    found = set()
    for table in (net / "tcp", net / "tcp6"):
        for line in table.read_text().splitlines()[1:] if table.exists() else []:
            _, local, _, state, *_ = line.split()
            host, port = local.split(":")
            if state == LISTENING and not is_local(host):
                found.add(int(port, 16))
    return found


def is_local(host: str) -> bool:
    """The kernel writes an address as 32-bit words in the machine's order of bytes."""
    words = [socket.ntohl(int(host[start : start + 8], 16)) for start in range(0, len(host), 8)]
    address = ipaddress.ip_address(b"".join(word.to_bytes(4, "big") for word in words))
    mapped = getattr(address, "ipv4_mapped", None)
    return bool((mapped or address).is_loopback)


def clock(place: Place) -> Findings:
    """A wrong clock makes certificates invalid and retries late."""
    asked = run("timedatectl", "show", "-p", "NTPSynchronized", "--value")
    said = asked.stdout.strip() if asked and not asked.returncode else ""
    if said == "yes":
        yield ok("the clock is synchronised")
    elif said == "no":
        mend = "sudo timedatectl set-ntp true (sudo apt install systemd-timesyncd, if that is refused)"
        yield warn("the clock is not synchronised", mend)
    else:
        yield note("no timedatectl here, skipped")
