"""The settings as the services see them: from the files that their units pass them, and from nothing in this shell.

On a server each unit's own `LoadCredential=` lines say which files it gets; they are laid out in a private folder
in memory, for the length of a look, and read by the very function with which the process starts. In a checkout it is
`.env` and the environment. Values are never shown; what is wrong is said in settings.py's own sentences.
systemd.exec(5): LoadCredential=
"""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from dotenv import dotenv_values

import settings
from mail.address import Mailbox
from ops.checks.findings import Findings, Place, fault, is_root, may, note, ok, run, warn, who_is
from settings import Settings, SettingsError

SERVICES = {  # unit -> what its process cannot do without, as it asks `settings.load` for it
    "async-email-api.service": ("api_keys", "mail_from"),
    "async-email-worker@email.service": ("smtp_host",),
    "async-email-worker@jobs.service": (),
    "async-email-dashboard.service": ("dashboard_password",),
}
PASSES = re.compile(r"^LoadCredential=([^:\s]+):(\S+)", re.MULTILINE)
NOT_THERE = "what its unit passes it,"
HIDDEN = ("/home", "/root", "/run/user")  # from a unit with ProtectHome=


def open_to_us(place: Place) -> bool:
    return not place.installed or (is_root() or may_read(place.file))


def may_read(path: Path) -> bool:
    try:
        path.open("rb").close()
    except OSError:
        return False
    return True


def load(place: Place) -> Settings | None:
    """All that the services know together, for the checks to come; None if that cannot be read."""
    try:
        if not place.installed:
            return settings.load()
        with as_a_unit(every_file(place)):
            return settings.load()
    except (SettingsError, OSError):
        return None


def every_file(place: Place) -> list[tuple[str, Path]]:
    folder = place.etc / "credentials"
    secrets = sorted(folder.iterdir()) if folder.is_dir() else []
    return [(place.file.name, place.file), *((one.name, one) for one in secrets)]


def passed_to(unit: str, place: Place) -> list[tuple[str, Path]]:
    """What the unit passes to its process. Where there is no unit yet: everything."""
    shown = run("systemctl", "cat", unit)
    lines = PASSES.findall(shown.stdout) if shown else []
    instance = unit.partition("@")[2].removesuffix(".service")
    return [(name, Path(path.replace("%i", instance))) for name, path in lines] or every_file(place)


@contextmanager
def as_a_unit(credentials: Iterable[tuple[str, Path]]) -> Iterator[None]:
    memory = "/dev/shm" if Path("/dev/shm").is_dir() else None  # no secret of ours comes to lie on a disk
    with tempfile.TemporaryDirectory(prefix="doctor-", dir=memory) as folder:
        for name, path in credentials:
            shutil.copyfile(path, Path(folder, name))
        with settings.environment_of_a_unit(Path(folder)):
            yield


def values(place: Place) -> Findings:
    if not place.installed:
        yield from in_a_checkout(place)
    elif not open_to_us(place):
        yield warn(f"{place.etc} is for root only, so most cannot be looked at", "sudo bin/doctor")
    else:
        yield from on_a_server(place)


def on_a_server(place: Place) -> Findings:
    told: dict[str, list[str]] = defaultdict(list)  # one file for all, so most faults are everybody's
    for unit, needed in SERVICES.items():
        for sentence in faults_of(passed_to(unit, place), needed):
            told[sentence].append(unit.removeprefix("async-email-").removesuffix(".service"))
    for sentence, parts in told.items():
        mend = "sudo bin/install, in your clone, makes it" if sentence.startswith(NOT_THERE) else place.edit
        yield fault(f"{' and '.join(parts)} will not start: {sentence}", mend)
    if not told:
        yield ok(f"{place.file} is complete and right for each service")


def faults_of(credentials: list[tuple[str, Path]], needed: tuple[str, ...]) -> list[str]:
    missing = [f"{NOT_THERE} {path}, is missing" for _, path in credentials if not path.is_file()]
    if missing:
        return missing
    try:
        with as_a_unit(credentials):
            return sender_faults(settings.load(*needed))
    except SettingsError as error:
        return error.faults


def in_a_checkout(place: Place) -> Findings:
    try:
        wrong = sender_faults(current := settings.load())
    except SettingsError as error:
        wrong = error.faults
    yield from (fault(sentence, place.edit) for sentence in wrong)
    if wrong:
        return
    yield ok("the environment and .env can be read, and no value is wrong")
    missing = [name.upper() for names in SERVICES.values() for name in names if not getattr(current, name)]
    if missing:
        yield note(f"not set: {', '.join(missing)}; bin/dev does without, a server does not", place.edit)


def sender_faults(current: Settings) -> list[str]:
    """service.py asks this, too, before it starts."""
    try:
        if current.mail_from:
            Mailbox.parse(current.mail_from)
    except ValueError as error:
        return [f"MAIL_FROM: {error}"]
    return []


def shell(place: Place) -> Findings:
    """What worked by hand and does not as a service: a variable that only this shell has."""
    written = {name for name, value in dotenv_values(place.file).items() if value} if may_read(place.file) else set()
    only_here = sorted(exported() - written - stored(place))
    if only_here and not open_to_us(place):
        yield note(f"set in this shell, which the services do not see: {', '.join(only_here)}", "sudo bin/doctor")
    elif only_here and place.installed:
        for name in only_here:
            yield warn(f"{name} is set in this shell and not in {place.file}: the services do not see it", place.edit)
    elif only_here:
        yield note(f"only in this shell, not in .env: {', '.join(only_here)}", "write them into .env to keep them")
    else:
        yield ok("no setting is in this shell alone")


def exported() -> set[str]:
    here = {name for name, value in settings.child_environment().items() if value}
    return (here | before_sudo()) & {name.upper() for name in Settings.model_fields}


def before_sudo() -> set[str]:
    """sudo drops a shell's variables; root may ask the kernel what the programs above this one were started with."""
    names, pid = set(), os.getpid()
    with suppress(OSError, StopIteration):
        while pid > 1:
            variables = Path(f"/proc/{pid}/environ").read_text(errors="replace").split("\0")
            names |= {name for name, _, value in (one.partition("=") for one in variables) if value}
            status = Path(f"/proc/{pid}/status").read_text().splitlines()
            pid = next(int(line.split()[1]) for line in status if line.startswith("PPid:"))
    return names


def stored(place: Place) -> set[str]:
    """Settings that have a file of their own among the credentials."""
    with_files = every_file(place)[1:] if place.installed and may_read(place.file) else []
    return {name.upper() for name, path in with_files if path.stat().st_size}


def modes(place: Place) -> Findings:
    """Secrets are root's alone, code is nobody's to write but root's, and the service can read what it must."""
    if not place.installed:
        if place.file.exists() and place.file.stat().st_mode & 0o077:
            yield warn(f"{place.file} can be read by other users of this machine", f"chmod 600 {place.file}")
        else:
            yield ok(".env is nobody else's to read" if place.file.exists() else "there is no .env to protect")
        return
    wrong = [*secrets_are_roots(place), *code_is_roots(place), *files_named_in_settings(place)]
    secret = f"{place.etc} is root's alone, and " if open_to_us(place) else ""
    yield from wrong or [ok(f"{secret}{place.opt} is not the service's to change")]


def secrets_are_roots(place: Place) -> Findings:
    if not open_to_us(place):
        return
    for path in (place.etc, place.etc / "credentials", *(path for _, path in every_file(place))):
        if not path.exists():
            yield fault(f"{path} is missing", "sudo bin/install, in your clone: it makes what is missing")
            continue
        seen, mode = path.stat(), "700" if path.is_dir() else "600"
        if seen.st_mode & 0o077:
            yield fault(f"{path} is open to other users (mode {seen.st_mode & 0o777:o})", f"sudo chmod {mode} {path}")
        if seen.st_uid != place.owner:
            yield fault(f"{path} does not belong to root", f"sudo chown root:root {path}")


def code_is_roots(place: Place) -> Findings:
    user, current = who_is(place.user), place.opt / "current"
    if user is None:
        yield fault(f"there is no user {place.user} for the services to run as", "sudo bin/install, in your clone")
        return
    for path in (current, current / "worker.py", current / ".venv/bin/python"):
        closed = may(user, path, 4)
        if closed:
            found = f"{path} cannot be read by the user {place.user}: {closed} keeps it out or is missing"
            yield fault(found, f"sudo chmod o+rX {closed}" if closed.exists() else "sudo bin/install, in your clone")
            return
    if not may(user, current / "worker.py", 2) or not may(user, current, 2):
        yield fault(f"the user {place.user} may change the code it runs", f"sudo chown -R root:root {place.opt}/")


def files_named_in_settings(place: Place) -> Findings:
    """root can read them all; the service may not."""
    user = who_is(place.user)
    for name in Settings.model_fields:
        path: Path | None = getattr(place.settings, name, None) if name.endswith("_file") else None
        if not path or user is None:
            continue
        if may(user, path, 4) or str(path.resolve()).startswith(HIDDEN):
            yield fault(f"{name.upper()}: the user {place.user} cannot read {path}", elsewhere(name, path, place))


def elsewhere(name: str, path: Path, place: Place) -> str:
    if name == "smtp_ca_file":  # not a secret
        return f"sudo install -m 644 {path} /etc/ssl/async-email-relay.pem, and name that"
    kept = place.etc / "credentials" / name.removesuffix("_file")
    return f"sudo install -m 600 {path} {kept}, and take {name.upper()} out of {place.file}"
