"""What the tests of the doctor's checks share: settings, findings looked for, and a machine with an installation."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import pytest

from ops.checks import configuration, units
from ops.checks.findings import FAULT, NOTE, OK, WARN, Finding, Findings
from ops.checks.target import Target
from settings import Settings
from tests.servers import ROOT

Said = tuple[str, str, str]  # a finding's level, and words of what is found and of its fix
PASSWORD = "planted-Pa55word"
GMAIL, M365, SES = "smtp.gmail.com", "smtp.office365.com", "email-smtp.eu-west-1.amazonaws.com"
ENV = "SMTP_HOST=127.0.0.1\nMAIL_FROM=Acme <hello@acme.example>\n"
SECRETS = {
    "redis_url": f"redis://:{PASSWORD}@127.0.0.1:1/0\n",
    "api_keys": f"shop:{'ab' * 32}\n",
    "dashboard_password": PASSWORD,
    "smtp_password": "",
    "smtp_oauth": "",
    "bounce_imap_url": "",
    "doubt_imap_url": "",
    "dkim_key": "",
    "alert_url": "",
}
HEALTHY = {
    "LoadState": "loaded",
    "ActiveState": "active",
    "SubState": "running",
    "UnitFileState": "enabled",
    "Result": "success",
    "NRestarts": "0",
    "ExecMainStatus": "0",
    "KillMode": "mixed",
    "MainPID": "0",
    "NeedDaemonReload": "no",
}


def of(**given: Any) -> Settings:
    return Settings(**given)


def listed(findings: Findings) -> list[Finding]:
    found = list(findings)
    assert found, "a check always says something"
    for one in found:
        assert one.level in (OK, NOTE) or one.fix, one
        assert "\n" not in one.found + one.fix
    return found


def worst(findings: Findings) -> Finding:
    return min(listed(findings), key=lambda one: (FAULT, WARN, NOTE, OK).index(one.level))


def assert_finds(findings: Findings, level: str, found: str, fix: str = "") -> None:
    """Among the findings is one that names this and this fix."""
    every = listed(findings)
    assert [one for one in every if one.level == level and found in one.found and fix in one.fix], every


def fake(directory: Path, name: str, script: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Puts a program first on PATH."""
    programs = directory / "programs"
    programs.mkdir(exist_ok=True)
    (programs / name).write_text(f"#!/bin/sh\n{script}\n")
    (programs / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}:/usr/bin:/bin")


class Server:
    """A machine on which bin/install has run, in a folder that others may enter, and with a systemctl of ours."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder = folder
        folder.chmod(0o755)
        self.env = self.write("etc/async-email.env", ENV, 0o600)
        for name, value in SECRETS.items():
            self.write(f"etc/credentials/{name}", value, 0o600)
        self.write("etc/relays.toml", "", 0o600)
        for name in ("etc", "etc/credentials"):
            (folder / name).chmod(0o700)
        for release in ("1.0", "2.0"):
            self.write(f"opt/releases/{release}/worker.py", "")
        self.write("opt/releases/2.0/.venv/bin/python", "", 0o755)
        (folder / "opt/current").symlink_to(folder / "opt/releases/2.0")
        (folder / "systemd").mkdir()
        fake(folder, "systemctl", f'case $1 in show) cat {folder}/show;; cat) cat "{folder}/$2";; esac', monkeypatch)
        for unit in configuration.SERVICES:
            installed = ROOT / "systemd" / re.sub(r"@\w+", "@", unit)
            self.write(unit, installed.read_text().replace("/etc/async-email", f"{folder}/etc"))
        self.units(*units.UNITS)
        self.target = Target(
            folder / "opt/current",
            etc=folder / "etc",
            opt=folder / "opt",
            nginx=folder / "nginx",
            redis_data=folder,
            systemd=folder / "systemd",
            credentials=folder / "run",
            logs=folder,
            selinux=folder / "enforce",
            user="nobody",
            owner=os.getuid(),
            timeout=1,
        )

    def write(self, name: str, text: str, mode: int = 0o644) -> Path:
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        path.chmod(mode)
        return path

    def units(self, *names: str, **changes: str) -> None:
        """Says what `systemctl show` says."""
        blocks = [{"Id": name} | HEALTHY | changes for name in names]
        self.write("show", "\n\n".join("\n".join(f"{k}={v}" for k, v in block.items()) for block in blocks) + "\n")
