"""Makes this machine an async-email server, or brings one up to date: `sudo bin/install`.

It is a list of steps (INSTALL and ROLLBACK, at the end), each a function whose first line says what it does and is
printed when it runs. Each looks first and does what is still missing: a second run changes nothing, and goes on where
one has failed half-way. What runs is left running until the new release is complete.

Never overwritten: what you may have edited (/etc/async-email, Redis' configuration but for `appendonly yes`, the nginx
site). Never touched: the queue. Secrets are made here, stored in files that only root reads, and printed nowhere, but
for the new API key, once. `--dry-run` says what would be done and changes nothing. Nothing but the standard library:
there is no .venv yet.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import os
import platform
import re
import secrets
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from urllib.parse import unquote, urlsplit

KNOWN = {"debian 12", "ubuntu 22.04", "ubuntu 24.04"}
LEFT_OUT = {".git", ".venv", ".env", "var", "__pycache__", ".mypy_cache", ".ruff_cache", ".pytest_cache", ".hypothesis"}
KEPT = 3  # releases
MARK = Path(".venv", "complete")  # in a release that is whole; says for which Python
WORKERS = ("async-email-worker@email.service", "async-email-worker@jobs.service")
API = "async-email-api.service"
DASHBOARD = "async-email-dashboard.service"
SOCKET = "async-email-api.socket"
TARGET = "async-email.target"
RUNNING = "running"
REDIS = "redis-server@async-email.service"
REDIS_SOCKET = "/run/redis-async-email/redis.sock"
GIT_ENVIRONMENT = {
    **{"PATH": "/usr/local/bin:/usr/bin:/bin", "HOME": "/nonexistent", "LC_ALL": "C"},
    "GIT_OPTIONAL_LOCKS": "0",  # `git status` would write what it has seen into the clone
}


class Fault(Exception):
    """The installation ends here. The text says what is wrong and what mends it."""


class Server:
    """This machine: where our things are on it, and the few ways to change it. A dry run only says what they would do.

    `under` is / but in tests; `source` the clone that is installed from; `tree` where units and configuration are taken
    from, which is the clone, or for a rollback the release before.
    """

    def __init__(self, source: Path, *, dry: bool = False, under: Path = Path("/")) -> None:
        self.source = self.tree = source
        self.dry = dry
        self.etc = under / "etc/async-email"
        self.env = self.etc / "async-email.env"
        self.credentials = self.etc / "credentials"
        self.opt = under / "opt/async-email"
        self.releases = self.opt / "releases"
        self.current = self.opt / "current"
        self.previous = self.opt / "previous"
        self.units = under / "etc/systemd/system"
        self.redis_conf = under / "etc/redis/redis-async-email.conf"
        self.redis_data = under / "var/lib/redis-async-email"
        self.nginx = under / "etc/nginx"
        self.release = Path()  # known once `make_release` or `find_release_before` has run
        self.going_back = False
        self.changed_units: set[str] = set()
        self.new_key: str | None = None

    def do(self, what: str, action: Callable[[], object]) -> None:
        say(what)
        if not self.dry:
            action()

    def run(self, *command: str | Path, may_fail: bool = False) -> bool:
        """Runs a command that changes something. Raises `Fault` with its last words if it fails."""
        words = [str(word) for word in command]
        say(f"$ {shlex.join(words)}")
        if self.dry:
            return True
        ran = subprocess.run(
            words, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        if ran.returncode and not may_fail:
            raise Fault("\n".join([f"`{shlex.join(words)}` failed:", *ran.stdout.splitlines()[-20:]]))
        return ran.returncode == 0

    def write(self, path: Path, text: str, mode: int, group: str | None = None) -> None:
        """The whole file or nothing, never readable by more than `mode` says."""

        def action() -> None:
            path.parent.mkdir(parents=True, exist_ok=True)
            new = path.with_name(f".{path.name}.new")
            new.unlink(missing_ok=True)
            with os.fdopen(os.open(new, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600), "w") as file:
                file.write(text)
            if group:
                shutil.chown(new, group=group)
            new.chmod(mode)
            new.replace(path)

        self.do(f"write {path}", action)

    def folder(self, path: Path, mode: int, owner: str | None = None) -> None:
        def action() -> None:
            path.mkdir(mode=mode, parents=True)
            path.chmod(mode)
            if owner:
                shutil.chown(path, owner, owner)

        if not os.path.isdir(path):
            self.do(f"make the folder {path}", action)

    def link(self, path: Path, to: str | Path) -> None:
        """Points a symbolic link elsewhere, in one step: whoever looks finds the old one or the new one."""

        def action() -> None:
            new = path.with_name(f".{path.name}.new")
            new.unlink(missing_ok=True)
            new.symlink_to(to)
            new.replace(path)

        if not (path.is_symlink() and os.readlink(path) == str(to)):
            self.do(f"link {path} to {to}", action)

    def stop_here(self, why: str) -> None:
        """Raises `Fault`; a dry run goes on, to show the rest."""
        if not self.dry:
            raise Fault(why)
        say(f"would stop here: {why}")


_said: list[str] = []  # by the step that runs


def say(text: str) -> None:
    _said.append(text)
    print(f"    {text}", flush=True)


def ask(*command: str | Path, **options: object) -> str:
    """What a command that only looks prints; nothing if it fails or is not there."""
    try:
        ran = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL, **options)  # type: ignore[call-overload]
    except OSError:
        return ""
    return str(ran.stdout).strip() if ran.returncode == 0 else ""


def text_of(path: Path) -> str | None:
    try:
        return path.read_text(errors="replace")
    except OSError:
        return None


def is_set(server: Server, name: str) -> bool:
    """Whether the operator's file says something about this setting, or names a file for it."""
    return bool(re.search(rf"^\s*(export\s+)?{name}(_FILE)?\s*=\s*\S", text_of(server.env) or "", re.MULTILINE))


# --- the steps --------------------------------------------------------------------------------------------------------


def check_machine(server: Server) -> None:
    """This machine: Debian or Ubuntu, run by systemd, and you are root"""
    release = platform.freedesktop_os_release()
    name = f"{release.get('ID', '?')} {release.get('VERSION_ID', '?')}"
    say(name if name in KNOWN else f"{name}: not one that this was tried on ({', '.join(sorted(KNOWN))}); going on")
    if os.geteuid() != 0:
        server.stop_here("it needs root: sudo bin/install")
        say("without root some of what is there cannot be seen; sudo bin/install --dry-run sees all")
    if not shutil.which("apt-get"):
        server.stop_here("there is no apt-get here; the steps in ops/install.py can be done by hand")
    if not os.path.isdir("/run/systemd/system"):
        server.stop_here("this machine is not run by systemd, and the units in systemd/ need it")


def install_packages(server: Server) -> None:
    """The system's packages: Redis, nginx, Python's venv and the certificate authorities, where they are missing"""
    own_redis = not is_set(server, "REDIS_URL")
    there = {
        "redis-server": bool(shutil.which("redis-server")) or not own_redis,
        "nginx": bool(shutil.which("nginx")),
        "python3-venv": importlib.util.find_spec("ensurepip") is not None,
        "ca-certificates": os.path.exists("/etc/ssl/certs/ca-certificates.crt"),
    }
    missing = [package for package, is_there in there.items() if not is_there]
    if missing:
        apt_get_install(server, *missing)
    if "redis-server" in missing:  # nobody uses the instance that the package brings; ours has no port
        server.run("systemctl", "disable", "--now", "redis-server.service")
    if own_redis and not server.dry:
        check_redis_version()


def apt_get_install(server: Server, *packages: str) -> None:
    """On a new machine unattended-upgrades is often at work; it takes some minutes, and this waits for it."""
    for _ in range(20):
        if server.run("apt-get", "update", "-qq", may_fail=True):
            break
        time.sleep(15)
    how = ("--yes", "-qq", "--no-install-recommends", "-o", "DPkg::Lock::Timeout=300")
    server.run("env", "DEBIAN_FRONTEND=noninteractive", "apt-get", "install", *how, *packages)


def check_redis_version() -> None:
    found = re.search(r"v=(\d+)\.(\d+)", ask("redis-server", "--version"))
    if found and (int(found[1]), int(found[2])) < (6, 2):
        raise Fault(
            f"Redis {found[1]}.{found[2]} is too old: RQ needs 6.2 to keep the jobs of a worker that is killed. Ubuntu "
            "22.04 has nothing newer.\nFollow 'Install Redis on Linux' at redis.io for Redis' own packages, or set "
            "REDIS_URL in /etc/async-email/async-email.env to a Redis elsewhere; then: sudo bin/install"
        )


def make_user(server: Server) -> None:
    """The user that the service runs as: async-email, who owns nothing and cannot log in"""
    if not ask("id", "-u", "async-email"):
        home = ("--home-dir", "/nonexistent", "--no-create-home")
        server.run("useradd", "--system", "--user-group", *home, "--shell", "/usr/sbin/nologin", "async-email")


def make_release(server: Server) -> None:
    """The release: a copy of this clone under /opt/async-email/releases, with Python packages of its own"""
    server.release = server.releases / release_id(server.source)
    mark = server.release / MARK
    python = f"Python {sys.version_info[0]}.{sys.version_info[1]}"  # the system's next Python needs another .venv
    if text_of(mark) == python:
        say(f"{server.release} is there already")
        return
    if os.path.exists(server.release):
        server.do("what an installation that failed has left of it goes first", lambda: shutil.rmtree(server.release))
    server.do(f"copy this clone to {server.release}", lambda: copy_tree(server.source, server.release))
    server.run(sys.executable, "-m", "venv", server.release / ".venv")
    pip = (server.release / ".venv/bin/pip", "install", "--quiet", "--disable-pip-version-check", "--require-hashes")
    server.run(*pip, "-r", server.release / "requirements.txt")
    server.run(server.release / ".venv/bin/python", "-m", "compileall", "-q", "-x", r"/\.venv/", server.release)
    server.write(mark, python, 0o644)


def git(source: Path, *arguments: str) -> str | None:
    """What git says, run as the owner of the clone: to anybody else, also root, git refuses. None without git."""
    owner = source.stat()
    other = {"user": owner.st_uid, "group": owner.st_gid, "extra_groups": []} if owner.st_uid != os.geteuid() else {}
    if not (source / ".git").exists() or (other and os.geteuid() != 0):
        return None
    command = ["git", "-C", source, *arguments]
    try:
        ran = subprocess.run(command, capture_output=True, text=True, env=GIT_ENVIRONMENT, **other)  # type: ignore[call-overload]
    except OSError:
        return None
    return str(ran.stdout) if ran.returncode == 0 else None


def files_of(source: Path) -> list[Path]:
    """What belongs to the project: what git tracks, as it stands there now; without git, all but what is made here."""
    listed = git(source, "ls-files", "-z", "--cached")
    if listed is not None:
        found = [Path(name) for name in listed.split("\0") if name]
    else:
        found = [path.relative_to(source) for path in source.rglob("*")]
        found = [path for path in found if not LEFT_OUT.intersection(path.parts)]
    return sorted(path for path in found if (source / path).is_file())


def release_id(source: Path) -> str:
    """`0.1.0-1a2b3c4`: the version and git's short hash. Without git, or with changes, a hash of the content."""
    heading = re.search(r"^## (\S+)", text_of(source / "CHANGELOG.md") or "", re.MULTILINE)
    if not heading:
        raise Fault(f"{source} is not async-email: it has no CHANGELOG.md with a version")
    commit = git(source, "rev-parse", "--short", "HEAD")
    if commit is None:
        return f"{heading[1]}-{content_hash(source)}"
    strays = git(source, "ls-files", "--others", "--exclude-standard") or ""
    if strays:
        say(f"not in git, and so not installed (git add what belongs to it): {', '.join(strays.split())}")
    if not git(source, "status", "--porcelain", "--untracked-files=no"):
        return f"{heading[1]}-{commit.strip()}"
    say("the clone has changes that are not committed; they are installed too")
    return f"{heading[1]}-{commit.strip()}-changed-{content_hash(source)}"


def content_hash(source: Path) -> str:
    digest = hashlib.sha256()
    for path in files_of(source):
        digest.update(f"{path}\0".encode() + hashlib.sha256((source / path).read_bytes()).digest())
    return digest.hexdigest()[:8]


def copy_tree(source: Path, to: Path) -> None:
    """Copies that belong to whoever runs this (root), and that everybody may read."""
    for path in files_of(source):
        copy = to / path
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source / path, copy)
        copy.chmod(0o755 if os.access(source / path, os.X_OK) and (source / path).stat().st_mode & 0o111 else 0o644)


def configure(server: Server) -> None:
    """Configuration and secrets, in /etc/async-email: what is there stays"""
    server.folder(server.etc, 0o700)
    server.folder(server.credentials, 0o700)
    if text_of(server.env) is None:
        server.write(server.env, (server.source / ".env.example").read_text(), 0o600)
    made: dict[str, Callable[[], str]] = {
        "redis_url": lambda: f"unix://async-email:{secrets.token_urlsafe(32)}@{REDIS_SOCKET}",
        "api_keys": lambda: make_key(server),
        "dashboard_password": lambda: secrets.token_urlsafe(16),
        "smtp_password": lambda: "",  # the operator's, here or in async-email.env
    }
    for name, make in made.items():
        if text_of(server.credentials / name) is None:  # empty counts as not set, but systemd wants the file
            value = "" if is_set(server, name.upper()) else make()
            server.write(server.credentials / name, f"{value}\n" if value else "", 0o600)


def make_key(server: Server) -> str:
    server.new_key = secrets.token_urlsafe(32)
    return f"default:{hashlib.sha256(server.new_key.encode()).hexdigest()}"


def start_redis(server: Server) -> None:
    """Redis: an instance of its own, with an append-only file, without a port"""
    if is_set(server, "REDIS_URL"):
        say("REDIS_URL is set in async-email.env, so none is needed here")
        return
    is_new = text_of(server.redis_conf) is None
    if is_new:
        server.write(server.redis_conf, redis_configuration(server), 0o640, group="redis")
    server.folder(server.redis_data, 0o750, owner="redis")
    copy_redis_unit(server)
    if is_new or not is_on(REDIS):
        server.run("systemctl", "enable", REDIS)
        server.run("systemctl", "restart", REDIS)
    if not server.dry and "aof_enabled:0" in ask_redis(server, "info", "persistence"):
        switch_on_file(server)
    if not server.dry:
        check_redis(server)


def copy_redis_unit(server: Server) -> None:
    """And what it runs first, beside the releases: there may be none yet, or after a rollback one without it."""
    copy(server, "ops/aof.py", server.opt / "aof.py")
    copy_units(server, "redis-server@async-email.service.d/async-email.conf")


def switch_on_file(server: Server) -> None:
    """Somebody has switched the append-only file off. A Redis that is started with the file on reads the file and
    nothing else, so it begins as a copy of the snapshot that Redis writes when it is stopped."""
    if len(ask_redis(server, "config", "get", "save").splitlines()) < 2:
        raise Fault(
            f"{REDIS} keeps neither an append-only file nor snapshots: a restart would lose the queue.\nWait until it "
            f"is empty (bin/doctor), put `appendonly yes` and `save 3600 1` into {server.redis_conf}, and restart it."
        )
    server.run("systemctl", "stop", REDIS)
    for old in ("appendonlydir", "appendonly.aof"):
        if (server.redis_data / old).exists():
            (server.redis_data / old).rename(server.redis_data / f"{old}.{time.strftime('%Y%m%d-%H%M%S')}")
    server.do("begin the append-only file with what is there", lambda: copy_snapshot(server.redis_data))
    text = re.sub(r"^appendonly .*\n", "", text_of(server.redis_conf) or "", flags=re.MULTILINE)
    server.write(server.redis_conf, f"{text}appendonly yes\n", 0o640, group="redis")
    server.run("systemctl", "start", REDIS)


def copy_snapshot(data: Path) -> None:
    """Redis 7 makes its folder of files from this one of earlier versions."""
    shutil.copyfile(data / "dump.rdb", data / "appendonly.aof")
    shutil.chown(data / "appendonly.aof", "redis", "redis")
    (data / "appendonly.aof").chmod(0o640)


def is_on(unit: str) -> bool:
    """Whether it runs, and will after a reboot."""
    return (ask("systemctl", "is-enabled", unit), ask("systemctl", "is-active", unit)) == ("enabled", "active")


def redis_password(server: Server) -> str:
    return unquote(urlsplit((text_of(server.credentials / "redis_url") or "").strip()).password or "")


def redis_configuration(server: Server) -> str:
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    text = (server.tree / "deploy/redis/async-email.conf").read_text()
    digest = hashlib.sha256(redis_password(server).encode()).hexdigest()
    return text.replace("#SHA256", f"#{digest}").replace("maxmemory MAXMEMORY", f"maxmemory {memory * 2 // 5 >> 20}mb")


def ask_redis(server: Server, *words: str) -> str:
    command = ("redis-cli", "-s", REDIS_SOCKET, "--user", "async-email", *words)
    return ask(*command, env={**GIT_ENVIRONMENT, "REDISCLI_AUTH": redis_password(server)})


def check_redis(server: Server) -> None:
    if "aof_enabled:1" not in ask_redis(server, "info", "persistence"):
        raise Fault(
            f"{REDIS} does not answer as it should: it is not running (journalctl -u {REDIS}), has no append-only "
            f"file, or knows another password than the one in {server.credentials / 'redis_url'}.\nIf you changed "
            f"{server.redis_conf}, put it right; or move it away, and the next run makes a new one. The queue stays."
        )


def set_up_nginx(server: Server) -> None:
    """nginx: the one site of this machine, in front of the API"""
    site, enabled = server.nginx / "sites-available/async-email", server.nginx / "sites-enabled"
    ours, before = (server.tree / "nginx/async-email.conf").read_text(), text_of(site)
    copy_units(server, "nginx.service.d/async-email.conf")
    if before is None:
        replaced = remove_welcome_page(server)
        server.link(enabled / "async-email", site)  # before the site: without that, a next run begins here again
        put_site(server, site, ours, undo=lambda: take_out(site, replaced))
    elif before != ours and any(before == text_of(old) for old in server.releases.glob("*/nginx/async-email.conf")):
        put_site(server, site, ours, undo=lambda: site.write_text(before))
    elif before != ours:
        say(f"{site} has been edited, so it stays as it is; this release's is nginx/async-email.conf")
    if not is_on("nginx.service"):
        server.run("systemctl", "enable", "--now", "nginx.service")


def put_site(server: Server, site: Path, text: str, undo: Callable[[], object]) -> None:
    server.write(site, text, 0o644)
    try:
        server.run("nginx", "-t")
    except Fault as fault:
        undo()
        raise Fault(
            f"{fault}\nnginx does not take the site, so all is as it was. If another site is the default server of "
            f"port 80, take `default_server` out of that one, or out of ours: {server.tree}/nginx/async-email.conf"
        ) from None
    server.run("systemctl", "reload-or-restart", "nginx.service")


def remove_welcome_page(server: Server) -> str:
    """The system's own default site; one that somebody has changed stays. Returns what the link pointed to."""
    default = server.nginx / "sites-enabled/default"
    if not (default.is_symlink() and is_as_packaged(server.nginx / "sites-available/default")):
        return ""
    to = os.readlink(default)
    server.do(f"remove the link {default}: it is the system's welcome page", default.unlink)
    return to


def take_out(site: Path, welcome_page: str) -> None:
    enabled = site.parent.parent / "sites-enabled"
    site.unlink()
    (enabled / "async-email").unlink()
    if welcome_page:
        (enabled / "default").symlink_to(welcome_page)


def is_as_packaged(path: Path) -> bool:
    """Whether dpkg knows this configuration file by exactly this content."""
    known = ask("dpkg-query", "-W", "-f=${Conffiles}", "nginx-common")
    digest = hashlib.md5((text_of(path) or "").encode()).hexdigest()
    return bool(re.search(rf"^ *{re.escape(str(path))} {digest}", known, re.MULTILINE))


def install_units(server: Server) -> None:
    """The systemd units"""
    copy_units(server, *(path.name for path in sorted((server.tree / "systemd").glob("async-email*"))))


def copy_units(server: Server, *names: str) -> None:
    for name in names:
        if copy(server, f"systemd/{name}", server.units / name):
            server.changed_units.add(name)
    if server.changed_units.intersection(names):
        server.run("systemctl", "daemon-reload")


def copy(server: Server, name: str, to: Path) -> bool:
    """Copies a file of the release where it is new or differs. Returns whether it did."""
    text = (server.tree / name).read_text()
    if text_of(to) == text:
        return False
    server.write(to, text, 0o644)
    return True


def switch(server: Server) -> None:
    """The switch: /opt/async-email/current is this release from now on"""
    now = os.readlink(server.current) if server.current.is_symlink() else ""
    to = f"releases/{server.release.name}"
    if now not in ("", to):
        server.link(server.previous, now)
    server.link(server.current, to)


def start_services(server: Server) -> None:
    """The services: those that run another release are restarted, one after the other; no request is refused"""
    if ask("systemctl", "is-enabled", TARGET) != "enabled":
        server.run("systemctl", "enable", TARGET, SOCKET, *WORKERS, API, DASHBOARD)
    if SOCKET in server.changed_units and ask("systemctl", "is-active", SOCKET) == "active":
        say("its unit has changed, so the API's socket is opened anew; for a moment requests are refused")
        server.run("systemctl", "restart", SOCKET)
    # Whoever reads the queue must understand what is written to it: new workers know the old jobs, not the reverse.
    order = (API, *WORKERS, DASHBOARD) if server.going_back else (*WORKERS, API, DASHBOARD)
    for unit in order:
        if runs_something_else(server, unit):
            server.run("systemctl", "restart", unit, may_fail=True)
    server.run("systemctl", "start", TARGET)
    if not server.dry:
        states = {unit: state_of(unit) for unit in order}
        for unit, state in states.items():
            say(f"{unit}: {state}")
        if set(states.values()) != {RUNNING} and server.previous.is_symlink() and not server.going_back:
            say("the release before this one is still there: sudo bin/install --rollback")


def runs_something_else(server: Server, unit: str) -> bool:
    """Whether it runs, but not this release or not as this release's unit says."""
    pid = ask("systemctl", "show", "--property=MainPID", "--value", unit)
    if pid in ("", "0"):
        return False
    template = re.sub("@.*", "@.service", unit)
    try:
        return template in server.changed_units or os.readlink(f"/proc/{pid}/cwd") != str(server.release)
    except OSError:
        return True


def state_of(unit: str) -> str:
    """`RUNNING`, or its own last word."""
    if ask("systemctl", "is-active", unit) == "active":
        return RUNNING
    name = unit.removesuffix(".service").replace("@", "-")
    last = ask("journalctl", "--identifier", name, "--lines=1", "--output=cat")
    return f"not running yet. {last}"


def run_doctor(server: Server) -> None:
    """The doctor: what is still wrong or missing"""
    if server.dry or (server.current / "bin/doctor").exists():
        say(f"$ {server.current}/bin/doctor")
    if not server.dry and (server.current / "bin/doctor").exists():
        subprocess.run([server.current / "bin/doctor"], stdin=subprocess.DEVNULL)


def remove_old_releases(server: Server) -> None:
    """Old releases: the last three stay"""
    made = sorted(server.releases.glob("*"), key=lambda path: path.stat().st_mtime, reverse=True)
    used = [link.resolve() for link in (server.current, server.previous)]
    others = [path for path in made if path.resolve() not in used]
    for release in others[max(0, KEPT - len({path for path in used if path.exists()})) :]:
        server.do(f"remove {release}", lambda gone=release: shutil.rmtree(gone))  # type: ignore[misc]


def find_release_before(server: Server) -> None:
    """The release before this one"""
    if not server.previous.is_symlink():
        raise Fault(f"there is none: {server.previous} does not exist")
    server.release = server.tree = server.previous.resolve()
    if text_of(server.release / MARK) is None:
        raise Fault(f"{server.release} is not whole; install the commit that you want: git checkout, sudo bin/install")
    server.going_back = True
    say(str(server.release))


INSTALL: tuple[Callable[[Server], None], ...] = (
    check_machine,
    install_packages,
    make_user,
    make_release,
    configure,
    start_redis,
    set_up_nginx,
    install_units,
    switch,
    start_services,
    run_doctor,
    remove_old_releases,
)
ROLLBACK: tuple[Callable[[Server], None], ...] = (
    check_machine,
    find_release_before,
    install_units,
    switch,
    start_services,
)


def farewell(server: Server) -> str:
    missing = [name for name in ("SMTP_HOST", "MAIL_FROM") if not is_set(server, name)]
    lines = [f"\n{server.release.name} is installed."]
    if server.new_key:
        lines += [f"\nThe API key, which is shown only this once:\n\n    {server.new_key}"]
    if missing:
        lines += [
            f"\nStill missing: {' and '.join(missing)}. Write them, and your relay's login, into\n\n    {server.env}\n",
            "The services are tried every few seconds and come up by themselves once you have saved it. After any",
            f"later change: sudo systemctl restart {TARGET}",
            f"What may be wrong, and what mends it: sudo {server.current}/bin/doctor",
        ]
    lines += [
        "\nTry it:\n",
        f"    curl -X POST http://127.0.0.1/start-job -H 'Authorization: Bearer {server.new_key or 'YOUR-API-KEY'}' \\",
        '         -H \'Content-Type: application/json\' -d \'{"name": "Ada", "email": "you@example.com"}\'',
        f"\nTLS, backup, and what to do at night: {server.current}/docs/operations.md",
    ]
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="sudo bin/install", description="Installs async-email here, or upgrades it.")
    parser.add_argument("--dry-run", action="store_true", help="say what would be done, and change nothing")
    parser.add_argument("--rollback", action="store_true", help="go back to the release before, and restart")
    asked = parser.parse_args(arguments)
    os.umask(0o022)
    server = Server(Path(__file__).resolve().parent.parent, dry=asked.dry_run)
    try:
        for step in ROLLBACK if asked.rollback else INSTALL:
            print(f"==> {step.__doc__}", flush=True)
            _said.clear()
            step(server)
            if not _said:
                say("nothing to do")
    except (Fault, OSError, KeyboardInterrupt) as fault:  # OSError: the disk is full, a program is not there
        print(f"\nStopped: {str(fault) or 'as you wished; the next run goes on from here.'}", file=sys.stderr)
        if server.new_key and not server.dry:
            print(f"\nThe API key, which is shown only this once: {server.new_key}")
        return 1
    if asked.dry_run:
        print("\nNothing was changed.")
    elif not asked.rollback:
        print(farewell(server))
    return 0


if __name__ == "__main__":
    sys.exit(main())
