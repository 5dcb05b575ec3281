"""What the doctor examines: the service that bin/install has put on this machine or, without one, a checkout."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ops.server import text_of


@dataclass
class Target:
    code: Path
    etc: Path = Path("/etc/async-email")
    opt: Path = Path("/opt/async-email")
    nginx: Path = Path("/etc/nginx")
    redis_data: Path = Path("/var/lib/redis-async-email")
    redis_certificates: tuple[Path, ...] = (Path("/etc/redis/async-email.crt"), Path("/etc/ssl/async-email-redis.pem"))
    systemd: Path = Path("/run/systemd/system")
    credentials: Path = Path("/run/credentials")  # what systemd has passed to each unit
    logs: Path = Path("/var/log")
    selinux: Path = Path("/sys/fs/selinux/enforce")
    user: str = "async-email"
    owner: int = 0  # the user that the configuration must belong to: root
    http_port: int = 80
    smtp_ports: tuple[int, ...] = (25, 465, 587, 2525, 2587, 2465)
    name_server: tuple[str, int] | None = None  # instead of the system's
    timeout: float = 5  # seconds for one thing on the network to answer
    send_to: str = ""  # the recipient of the test mail
    test_alert: bool = False  # whether those who are told what is wrong get a test

    @property
    def installed(self) -> bool:
        return self.etc.is_dir()

    @property
    def roles(self) -> frozenset[str]:
        """Returns what this machine is, of several; none where it is everything."""
        return frozenset((text_of(self.etc / "roles") or "").split())

    def has_role(self, role: str) -> bool:
        return role in self.roles or not self.roles

    @property
    def file(self) -> Path:
        """Returns the file that the operator edits."""
        return self.etc / "async-email.env" if self.installed else self.code / ".env"

    @property
    def edit(self) -> str:
        if self.installed:
            return f"sudoedit {self.file}, then: sudo systemctl restart async-email.target"
        return f"edit {self.file} (.env.example shows the names)"

    @property
    def edit_relays(self) -> str:
        if self.installed:
            return f"sudoedit {self.etc / 'relays.toml'}, then: sudo systemctl restart async-email.target"
        return f"edit RELAYS in {self.file}, or the file that RELAYS_FILE names"

    def command(self, name: str) -> str:
        """Returns how to run what is in bin/."""
        return f"sudo {self.opt}/current/bin/{name}" if self.installed else f"bin/{name}"

    def restart(self, part: str) -> str:
        """Returns the command for `api`, `worker@email`, `worker@jobs`, `dashboard` or `submission`."""
        if self.installed:
            return f"sudo systemctl restart async-email-{part}"
        by_hand = {"api": "service.py", "dashboard": "-m ops.dashboard", "submission": "-m submission"}
        return f"bin/dev, or .venv/bin/python {by_hand.get(part, part.replace('worker@', 'worker.py '))}"
