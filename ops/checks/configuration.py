"""Checks the settings as the services see them: from the files that their units pass them, and nothing in this shell.

On a server each unit's own `LoadCredential=` lines say which files it gets; they are copied into a private folder in
memory and read by the function with which the process starts. In a checkout it is `.env` and the environment. Values
are never shown; a fault is reported in settings.py's own sentences.
systemd.exec(5): LoadCredential=
"""

from __future__ import annotations

import os
import re
import shutil
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path

import settings
from mail.address import default_sender
from ops import lock
from ops.checks.findings import Findings, fault, note, ok, warn
from ops.checks.system import denied_at, find_user, run
from ops.checks.target import Target
from ops.services import role_of
from process import env_file
from queues.offer import load_file
from queues.table import QUEUES
from settings import Settings, SettingsError

SERVICES = {  # unit -> the settings that its process cannot run without, as it passes them to `settings.load`
    "async-email-api.service": ("api_keys", "mail_from"),
    **{f"async-email-worker@{row.name}.service": row.needs for row in QUEUES.values()},
    "async-email-dashboard.service": ("dashboard_password",),
}
PASSES = re.compile(r"^LoadCredential=([^:\s]+):(\S+)", re.MULTILINE)
MISSING = "what its unit passes it,"
HIDDEN = ("/home", "/root", "/run/user")  # from a unit, by ProtectHome=


def is_readable(target: Target) -> bool:
    return not target.installed or os.geteuid() == 0 or os.access(target.file, os.R_OK)


def load(target: Target) -> Settings | None:
    """Returns the settings of all services together, for the other checks; None if they cannot be read."""
    try:
        with as_a_unit(every_file(target)) if target.installed else nullcontext():
            current = settings.load()
            return current if target.installed else with_redis_of_dev(current, target)
    except (SettingsError, OSError):
        return None


def load_for(target: Target, program: str) -> Settings | None:
    """Returns what `load` does, and says on standard error why a program cannot have it."""
    current = load(target)
    if not current:
        why = "the settings cannot be read" if is_readable(target) else f"it needs root: sudo {program}"
        print(f"{why}; bin/doctor says more", file=sys.stderr)
    return current


def with_redis_of_dev(current: Settings, target: Target) -> Settings:
    """Names the Redis of the bin/dev that runs in this checkout, unless REDIS_URL names one."""
    ports = [one.port for one in lock.holders("relay" if current.all_relays else "catcher", target.code) if one.port]
    if not ports or "redis_url" in current.model_fields_set:
        return current
    return settings.load(redis_url=f"redis://127.0.0.1:{ports[0]}/0", redis_replicas=0)


def every_file(target: Target) -> dict[str, Path]:
    """Returns the operator's file and the secrets that have files of their own, by their names as credentials."""
    folder = target.etc / "credentials"
    secrets = sorted(folder.iterdir()) if folder.is_dir() else []
    tables = {path.stem: path for path in sorted(target.etc.glob("*.toml"))}
    return {path.name: path for path in (target.file, *secrets)} | tables


def passed_to(unit: str, target: Target) -> dict[str, Path]:
    """Returns the files that the unit passes to its process; all of them if there is no unit yet."""
    lines = PASSES.findall(run("systemctl", "cat", unit).stdout)
    instance = unit.partition("@")[2].removesuffix(".service")
    return {name: Path(path.replace("%i", instance)) for name, path in lines} or every_file(target)


@contextmanager
def as_a_unit(credentials: dict[str, Path]) -> Iterator[None]:
    memory = "/dev/shm" if Path("/dev/shm").is_dir() else None  # no secret is written to a disk
    with tempfile.TemporaryDirectory(prefix="doctor-", dir=memory) as folder:
        for name, path in credentials.items():
            shutil.copyfile(path, Path(folder, name))
        with credentials_directory(Path(folder)):
            yield


@contextmanager
def credentials_directory(folder: Path) -> Iterator[None]:
    """Makes `settings.load` read what a service of systemd with these credentials reads: no variable of this shell."""
    shell = dict(os.environ)
    for name in Settings.model_fields:
        os.environ.pop(name.upper(), None)
    os.environ["CREDENTIALS_DIRECTORY"] = str(folder)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(shell)


def values(target: Target) -> Findings:
    if not target.installed:
        yield from in_a_checkout(target)
    elif not is_readable(target):
        yield warn(f"{target.etc} is for root only, so most cannot be checked", "sudo bin/doctor")
    else:
        yield from on_a_server(target)


def services_of(target: Target) -> dict[str, tuple[str, ...]]:
    """Returns the services that run on this machine, of several."""
    return {unit: needed for unit, needed in SERVICES.items() if target.has_role(role_of(unit))}


def on_a_server(target: Target) -> Findings:
    stopped: dict[str, list[str]] = defaultdict(list)  # one file for all, so most faults stop several services
    for unit, needed in services_of(target).items():
        for sentence in faults_of(passed_to(unit, target), needed):
            stopped[sentence].append(unit.removeprefix("async-email-").removesuffix(".service"))
    for sentence, parts in stopped.items():
        fix = "sudo bin/install, in your clone, makes it" if sentence.startswith(MISSING) else target.edit
        yield fault(f"{' and '.join(parts)} will not start: {sentence}", fix)
    if not stopped:
        yield ok(f"{target.file} is complete and correct for each service")


def faults_of(credentials: dict[str, Path], needed: tuple[str, ...]) -> list[str]:
    missing = [f"{MISSING} {path}, is missing" for path in credentials.values() if not path.is_file()]
    if missing:
        return missing
    try:
        with as_a_unit(credentials):
            current = settings.load(*needed)
            if "api_keys" in needed:
                check_what_the_api_reads(current)
    except SettingsError as error:
        return error.faults
    return []


def in_a_checkout(target: Target) -> Findings:
    try:
        current = settings.load()
        check_what_the_api_reads(current)
        needed = ("smtp_host", "mail_from") if current.all_relays else ("smtp_host",)
        settings.load(*needed, **({} if current.all_relays else {"smtp_host": "127.0.0.1"}))  # the catcher
        if current.tasks_file:
            load_file(current.tasks_file)
    except SettingsError as error:
        yield from (fault(sentence, target.edit) for sentence in error.faults)
        return
    yield ok("the environment and .env can be read, and no value is wrong")
    missing = [name.upper() for names in SERVICES.values() for name in names if not current.has(name)]
    if missing:
        yield note(f"not set: {', '.join(missing)}; bin/dev does without, a server does not", target.edit)


def check_what_the_api_reads(current: Settings) -> None:
    """Looks at sender and templates as the API does before it starts. Raises SettingsError."""
    from mail import templates  # here, as bin/top and others read the settings alone

    before, faults = templates.FOLDER, []
    try:
        if current.mail_from:
            default_sender(current.mail_from, current.allow_local_domains)
    except ValueError as error:
        faults.append(f"MAIL_FROM: {error}")
    try:
        templates.use(current.templates_dir or before)
        faults += templates.faults()
    finally:
        templates.use(before)
    if faults:
        raise SettingsError(faults)


def shell(target: Target) -> Findings:
    """Finds what works by hand and not as a service: a variable that only this shell has."""
    readable = os.access(target.file, os.R_OK)
    files = every_file(target) if readable else {}
    written = {name.upper() for name, path in files.items() if path.stat().st_size}
    with suppress(env_file.Unreadable, OSError):
        written |= {one.name for one in env_file.read(target.file) if one.value}
    only_here = sorted(exported() - written)
    if only_here and not is_readable(target):
        yield note(f"set in this shell, which the services do not see: {', '.join(only_here)}", "sudo bin/doctor")
    elif only_here and target.installed:
        for name in only_here:
            yield warn(f"{name} is set in this shell and not in {target.file}: the services do not see it", target.edit)
    elif only_here:
        yield note(f"only in this shell, not in .env: {', '.join(only_here)}", "write them into .env to keep them")
    else:
        yield ok("no setting is in this shell alone")


def exported() -> set[str]:
    here = {name for name, value in os.environ.items() if value}
    return (here | before_sudo()) & {name.upper() for name in Settings.model_fields}


def before_sudo() -> set[str]:
    """Returns the variables of the programs above this one, which root may ask the kernel for: sudo drops them."""
    names, pid = set(), os.getpid()
    with suppress(OSError):
        while pid > 1:
            names |= set(re.findall(r"([^=\0]+)=[^\0]+", Path(f"/proc/{pid}/environ").read_text(errors="replace")))
            pid = int(re.findall(r"^PPid:\s*(\d+)", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)[0])
    return names


def modes(target: Target) -> Findings:
    """Checks that only root reads secrets, that only root may change code, and that the service can read its files."""
    if target.installed:
        wrong = [*secrets_are_roots(target), *code_is_roots(target), *files_named_in_settings(target)]
        secret = f"only root can read {target.etc}, and " if is_readable(target) else ""
        yield from wrong or [ok(f"{secret}the service cannot change {target.opt}")]
    elif not target.file.exists():
        yield ok("there is no .env to protect")
    elif target.file.stat().st_mode & 0o077:
        yield warn(f"{target.file} can be read by other users of this machine", f"chmod 600 {target.file}")
    else:
        yield ok("no other user can read .env")


def secrets_are_roots(target: Target) -> Findings:
    if not is_readable(target):
        return
    for path in (target.etc, target.etc / "credentials", *every_file(target).values()):
        if not path.exists():
            yield fault(f"{path} is missing", "sudo bin/install, in your clone: it makes what is missing")
            continue
        seen, mode = path.stat(), "700" if path.is_dir() else "600"
        if seen.st_mode & 0o077:
            yield fault(f"{path} is open to other users (mode {seen.st_mode & 0o777:o})", f"sudo chmod {mode} {path}")
        if seen.st_uid != target.owner:
            yield fault(f"{path} does not belong to root", f"sudo chown root:root {path}")


def code_is_roots(target: Target) -> Findings:
    user, current = find_user(target.user), target.opt / "current"
    if user is None:
        yield fault(f"there is no user {target.user} for the services to run as", "sudo bin/install, in your clone")
        return
    for path in (current, current / "worker.py", current / ".venv/bin/python"):
        closed = denied_at(user, path, 4)
        if closed:
            found = f"{path} cannot be read by the user {target.user}: {closed} denies it or is missing"
            yield fault(found, f"sudo chmod o+rX {closed}" if closed.exists() else "sudo bin/install, in your clone")
            return
    if not denied_at(user, current / "worker.py", 2) or not denied_at(user, current, 2):
        yield fault(f"the user {target.user} may change the code it runs", f"sudo chown -R root:root {target.opt}/")


def files_named_in_settings(target: Target) -> Findings:
    """Finds those that root can read and the service cannot."""
    user, current = find_user(target.user), load(target)
    for name in Settings.model_fields:
        path: Path | None = getattr(current, name, None) if name.endswith(("_file", "_dir")) else None
        if not path or user is None:
            continue
        if denied_at(user, path, 4) or str(path.resolve()).startswith(HIDDEN):
            yield fault(f"{name.upper()}: the user {target.user} cannot read {path}", make_readable(name, path, target))


def make_readable(name: str, path: Path, target: Target) -> str:
    if name == "smtp_ca_file":  # not a secret
        return f"sudo install -m 644 {path} /etc/ssl/async-email-relay.pem, and name that"
    if name in ("tasks_file", "templates_dir"):
        return f"sudo chmod -R go+rX {path}, in a folder that all may enter, outside of /home and /root"
    kept = target.etc / "credentials" / name.removesuffix("_file")
    return f"sudo install -m 600 {path} {kept}, and take {name.upper()} out of {target.file}"
