"""The server that bin/install works on: where our things are on it, and the few ways to look at it and to change it.

A file is replaced whole or not at all, and is never readable by more users than its mode says. In a dry run every
change is printed and none is made. Standard library only: bin/install runs before there is a .venv.
"""

from __future__ import annotations

import hashlib
import os
import re
import secrets
import shlex
import shutil
import subprocess
from pathlib import Path


class Fault(Exception):
    """Ends the installation. The text says what is wrong and what fixes it."""


class Server:
    """This machine.

    `under` is / except in tests; `source` is the clone that is installed from; units and configuration come from
    `tree`, which is the clone or, in a rollback, the previous release.
    """

    def __init__(self, source: Path, *, dry: bool = False, under: Path = Path("/")) -> None:
        self.source = self.tree = source
        self.dry = dry
        self.etc = under / "etc/async-email"
        self.env = self.etc / "async-email.env"
        self.credentials = self.etc / "credentials"
        self.relays = self.etc / "relays.toml"
        self.webhooks = self.etc / "webhooks.toml"
        self.opt = under / "opt/async-email"
        self.releases = self.opt / "releases"
        self.current = self.opt / "current"
        self.previous = self.opt / "previous"
        self.units = under / "etc/systemd/system"
        self.redis_conf = under / "etc/redis/redis-async-email.conf"
        self.redis_data = under / "var/lib/redis-async-email"
        self.sentinel_conf = under / "etc/redis/sentinel-async-email.conf"
        self.redis_ca = under / "etc/ssl/async-email-redis.pem"  # no secret, and the services must be able to read it
        self.nginx = under / "etc/nginx"
        self.release = Path()  # known once `make_release` or `find_previous_release` has run
        self.going_back = False
        self.changed_units: set[str] = set()
        self.written: set[Path] = set()
        self.new_key: str | None = None
        self.roles = frozenset((text_of(self.etc / "roles") or "").split())  # none: everything on this one machine
        self.hosts: list[str] = []  # of --hosts
        self.bundle = self.etc / "machines.json"  # what several machines share; or that of --join
        self.joins = False
        self.operator = self.etc / "operator"  # the password of Redis' and Sentinel's user of that name
        self.lines_said = 0

    def say(self, text: str) -> None:
        self.lines_said += 1
        print(f"    {text}", flush=True)

    # looking

    def ask(self, *command: str | Path, env: dict[str, str] | None = None) -> str:
        """Returns what a command prints that changes nothing; "" if it fails or does not exist."""
        try:
            ran = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL, env=env)
        except OSError:
            return ""
        return ran.stdout.strip() if ran.returncode == 0 else ""

    def is_set(self, name: str) -> bool:
        """Returns whether the operator's file has a value for this setting, or names a file with one."""
        return bool(re.search(rf"^\s*(export\s+)?{name}(_FILE)?\s*=\s*\S", text_of(self.env) or "", re.MULTILINE))

    def value(self, name: str) -> str:
        """Returns what the operator's file sets a plain setting to; "" if it does not."""
        text = text_of(self.env) or ""
        found = re.findall(rf"^[ \t]*(?:export[ \t]+)?{name}[ \t]*=[ \t]*([^#\n]*)", text, re.MULTILINE)
        return found[-1].strip().strip("'\"") if found else ""

    def has_role(self, role: str) -> bool:
        """Returns whether this machine is that; without roles it is everything."""
        return role in self.roles or not self.roles

    def is_on(self, unit: str) -> bool:
        """Returns whether it runs, and will after a reboot."""
        return [self.ask("systemctl", word, unit) for word in ("is-enabled", "is-active")] == ["enabled", "active"]

    # changing

    def announce(self, what: str) -> bool:
        """Says what is done next. Returns whether to do it, which a dry run does not."""
        self.say(what)
        return not self.dry

    def run(self, *command: str | Path, may_fail: bool = False) -> bool:
        """Runs a command that changes something. Raises `Fault` with the last lines of its output if it fails."""
        words = [str(word) for word in command]
        if not self.announce(f"$ {shlex.join(words)}"):
            return True
        ran = subprocess.run(
            words, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        if ran.returncode and not may_fail:
            raise Fault("\n".join([f"`{shlex.join(words)}` failed:", *ran.stdout.splitlines()[-20:]]))
        return ran.returncode == 0

    def write(self, path: Path, text: str, mode: int, group: str | None = None, owner: str | None = None) -> None:
        if not self.announce(f"write {path}"):
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        new = path.with_name(f".{path.name}.new")
        new.unlink(missing_ok=True)
        with os.fdopen(os.open(new, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600), "w") as file:
            file.write(text)
        if group:
            shutil.chown(new, owner, group)
        new.chmod(mode)
        new.replace(path)
        self.written.add(path)

    def make_key(self) -> str:
        """Makes an API key, which is shown at the end. Returns what is stored of it."""
        self.new_key = secrets.token_urlsafe(32)
        return f"default:{hashlib.sha256(self.new_key.encode()).hexdigest()}"

    def folder(self, path: Path, mode: int, owner: str | None = None) -> None:
        if not os.path.isdir(path) and self.announce(f"make the folder {path}"):
            path.mkdir(mode=mode, parents=True)
            path.chmod(mode)
            if owner:
                shutil.chown(path, owner, owner)

    def link(self, path: Path, to: str | Path) -> None:
        """Points a symbolic link elsewhere, in one step: there is no moment without it."""
        is_so = path.is_symlink() and os.readlink(path) == str(to)
        if not is_so and self.announce(f"link {path} to {to}"):
            new = path.with_name(f".{path.name}.new")
            new.unlink(missing_ok=True)
            new.symlink_to(to)
            new.replace(path)

    def copy(self, name: str, to: Path) -> bool:
        """Copies a file of the release if it is new or differs. Returns whether it did."""
        text = (self.tree / name).read_text()
        if text_of(to) == text:
            return False
        self.write(to, text, 0o644)
        return True

    def copy_units(self, *names: str) -> None:
        self.changed_units |= {name for name in names if self.copy(f"systemd/{name}", self.units / name)}
        if self.changed_units.intersection(names):
            self.run("systemctl", "daemon-reload")

    def stop_here(self, why: str) -> None:
        """Raises `Fault`; a dry run goes on, to show the rest."""
        if not self.dry:
            raise Fault(why)
        self.say(f"would stop here: {why}")


def text_of(path: Path) -> str | None:
    try:
        return path.read_text(errors="replace")
    except OSError:
        return None
