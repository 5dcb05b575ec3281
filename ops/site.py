"""The nginx site: put in front of the API, brought up to date, and taken out again if nginx refuses it.

A site that was edited (certbot does it) stays as it is: only one that equals a release's own is replaced. Standard
library only: bin/install runs before there is a .venv.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable
from pathlib import Path

from ops.server import Fault, Server, text_of


def set_up_nginx(server: Server) -> None:
    if not server.has_role("api"):
        return
    site, enabled = server.nginx / "sites-available/async-email", server.nginx / "sites-enabled"
    ours, before = (server.tree / "nginx/async-email.conf").read_text(), text_of(site)
    server.copy_units("nginx.service.d/async-email.conf")
    if before is None:
        welcome_page = remove_welcome_page(server)

        def take_out() -> None:
            site.unlink()
            (enabled / "async-email").unlink()
            if welcome_page:
                (enabled / "default").symlink_to(welcome_page)

        server.link(enabled / "async-email", site)  # before the site: a run that fails in between begins here again
        put_site(server, site, ours, undo=take_out)
    elif before != ours and any(before == text_of(old) for old in server.releases.glob("*/nginx/async-email.conf")):
        put_site(server, site, ours, undo=lambda: site.write_text(before))
    elif before != ours:
        server.say(f"{site} has been edited, so it stays as it is; this release's is nginx/async-email.conf")
    if not server.is_on("nginx.service"):
        server.run("systemctl", "enable", "--now", "nginx.service")


def put_site(server: Server, site: Path, text: str, undo: Callable[[], object]) -> None:
    server.write(site, text, 0o644)
    try:
        server.run("nginx", "-t")
    except Fault as fault:
        undo()
        raise Fault(
            f"{fault}\nnginx refuses the site, so all is as it was. If another site is the default server of "
            f"port 80, take `default_server` out of that one, or out of ours: {server.tree}/nginx/async-email.conf"
        ) from None
    server.run("systemctl", "reload-or-restart", "nginx.service")


def remove_welcome_page(server: Server) -> str:
    """Disables the system's own default site, unless it was edited. Returns what its link pointed to."""
    default, packaged = server.nginx / "sites-enabled/default", server.nginx / "sites-available/default"
    known = server.ask("dpkg-query", "-W", "-f=${Conffiles}", "nginx-common")
    digest = hashlib.md5((text_of(packaged) or "").encode()).hexdigest()
    if not (default.is_symlink() and re.search(rf"^ *{re.escape(str(packaged))} {digest}", known, re.MULTILINE)):
        return ""
    to = os.readlink(default)
    if server.announce(f"remove the link {default}: it is the system's welcome page"):
        default.unlink()
    return to
