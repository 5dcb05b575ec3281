"""Makes, lists and revokes API keys: `bin/key new NAME [--scope send|test|full] [--rate 50/s] [--from DOMAIN]`,
`list`, `rotate NAME`, `revoke NAME [--old]`.

On a server (where there is /etc/async-email) it works on the service's credential file, in a checkout on API_KEYS in
`.env`; `--file` names another of either kind. A new key is printed once, alone on standard output; only its SHA-256 is
written. The file is replaced whole or not at all, and keeps its owner and mode; a new one is its owner's alone.

Refuses a name that is taken, and a file that it cannot read. To rotate a key, make a second one of its name, let its
users change over, and revoke the old one: a caller is known by the name, so it still reads what it submitted.
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import os
import re
import secrets
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from mail.address import strict_address
from process import env_file
from process.api_keys import ApiKey, parse_api_keys
from process.values import Rate

SERVER = Path("/etc/async-email")
LINE = re.compile(r"^#?[ \t]*API_KEYS[ \t]*=.*$", re.MULTILINE)


class Refused(Exception):
    """Raised before anything is changed. The text says why, and what to do."""


class KeyFile:
    """A credential file, which holds the keys and nothing else, or an env file."""

    def __init__(self, path: Path) -> None:
        self.path = path.resolve()
        self.is_env = path.name.endswith(".env")

    def read(self) -> tuple[ApiKey, ...]:
        text = self._text()
        if self.is_env:
            values = self._assigned()
            if values.get("API_KEYS_FILE"):
                raise Refused(
                    f"{self.path} names another file for the keys (API_KEYS_FILE): name that file with --file"
                )
            text = values.get("API_KEYS", "")
        try:
            return parse_api_keys(text.strip())
        except ValueError as error:
            raise Refused(f"{self.path} cannot be read as API keys: {error}") from None

    def _assigned(self) -> dict[str, str]:
        try:
            return {one.name: one.value for one in env_file.read(self.path)}
        except env_file.Unreadable as error:
            raise Refused(f"{self.path} cannot be read: {'; '.join(error.faults)}") from None

    def write(self, keys: Sequence[ApiKey]) -> None:
        text = ",".join(map(str, keys))
        if self.is_env:
            text = with_line(self._text(), f"API_KEYS={text}")
        replace(self.path, text if text.endswith("\n") or not text else text + "\n")

    def _text(self) -> str:
        try:
            return self.path.read_text()
        except FileNotFoundError:
            return ""

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Holds an exclusive lock, so that two runs cannot overwrite each other's key."""
        directory = os.open(self.path.parent, os.O_RDONLY)
        try:
            fcntl.flock(directory, fcntl.LOCK_EX)
            yield
        finally:
            os.close(directory)


def with_line(text: str, line: str) -> str:
    """Returns an env file with this line in place of the last that sets API_KEYS, or of the commented example."""
    found = list(LINE.finditer(text))
    active = [one for one in found if not one[0].startswith("#")] or found
    if not active:
        return text + ("" if text.endswith("\n") or not text else "\n") + line
    return text[: active[-1].start()] + line + text[active[-1].end() :]


def replace(path: Path, text: str) -> None:
    """Replaces the file atomically: a reader, also after a power cut, finds all of the old text or of the new."""
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "w") as file:
            file.write(text)
            with suppress(FileNotFoundError):
                before = path.stat()
                os.fchmod(file.fileno(), before.st_mode & 0o777)
                if (before.st_uid, before.st_gid) != (os.geteuid(), os.getegid()):
                    os.fchown(file.fileno(), before.st_uid, before.st_gid)
            file.flush()
            os.fsync(file.fileno())
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise
    directory = os.open(path.parent, os.O_RDONLY)
    os.fsync(directory)
    os.close(directory)


def new(file: KeyFile, name: str, scope: str, rate: Rate | None, domains: Sequence[str]) -> None:
    if not re.fullmatch(r"[A-Za-z0-9_.-]{1,64}", name):
        raise Refused("a name must be 1 to 64 letters, digits, '_', '.' or '-'")
    keys = file.read()
    if any(key.name == name for key in keys):
        raise Refused(f"there is a key {name} already; take another name, and revoke the old one when nobody uses it")
    add(file, keys, ApiKey(name, "", scope, rate, tuple(domains)))


def add(file: KeyFile, keys: Sequence[ApiKey], one: ApiKey) -> None:
    key = f"ae_{secrets.token_urlsafe(24)}"
    file.write([*keys, one._replace(sha256=hashlib.sha256(key.encode()).hexdigest())])
    say(f"The key {one.name} (scope {one.scope}); it is shown this once:")
    print(key, flush=True)
    changed(file)


def rotate(file: KeyFile, name: str) -> None:
    keys = file.read()
    old, *newer = of_name(keys, name)
    if newer:
        raise Refused(
            f"there are an old and a new key {name} already; revoke {name} --old when nobody uses the old one"
        )
    add(file, keys, old)
    say(f"The old one works, too, until: key revoke {name} --old")


def of_name(keys: Sequence[ApiKey], name: str) -> list[ApiKey]:
    """Returns the keys of this name: one, or an old and a new one."""
    found = [key for key in keys if key.name == name]
    if not found:
        known = ", ".join(dict.fromkeys(key.name for key in keys))
        raise Refused(f"there is no key {name}; there are: {known or 'none'}")
    return found


def revoke(file: KeyFile, name: str, *, old: bool) -> None:
    keys = file.read()
    gone = of_name(keys, name)
    if old and len(gone) == 1:
        raise Refused(f"there is one key {name}, and no older one")
    left = [key for key in keys if key not in (gone[:1] if old else gone)]
    file.write(left)
    say(f"The {'old ' if old else ''}key {name} is revoked.")
    if not left:
        say("WARNING: it was the last one. The API does not start without a key; make one with: key new NAME")
    changed(file)


def listed(keys: Sequence[ApiKey]) -> None:
    for key in keys:
        sender = f"from {' '.join(key.domains)}" if key.domains else ""
        words = [f"{key.name:<24} {key.scope}", str(key.rate or ""), sender, "old" if key.old else ""]
        print("  ".join(filter(None, words)))


def changed(file: KeyFile) -> None:
    """Says how to make API and SMTP read their keys, which they do when they start."""
    restart = "restart the API (Ctrl-C, and bin/dev again)"
    if SERVER in file.path.parents:
        restart = "systemctl try-restart async-email-api async-email-submission    # drops no request"
    say(f"Written to {file.path}. API and SMTP use it after: {restart}")


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    where = argparse.ArgumentParser(add_help=False, argument_default=argparse.SUPPRESS)
    where.add_argument("--file", type=Path, help="a credential file, or an env file (its name ends in .env)")
    about = "Makes, lists and revokes the API keys of async-email."
    parser = argparse.ArgumentParser(prog="key", description=about, parents=[where])
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("new", help="make a key and print it, once", parents=[where])
    one.add_argument("name", metavar="NAME", help="who uses it; stands in the log")
    scopes = (
        "send (the default): submits mail, reads, moves and cancels it; test: the same, and nothing is sent; "
        "full: reads all mail, requeues, cancels, runs jobs"
    )
    one.add_argument("--scope", choices=["send", "test", "full"], default="send", help=scopes)
    one.add_argument("--rate", type=rate_of, help="how many requests it may make, such as 50/s; without, any number")
    domains = "a domain that it may send from, not its subdomains; may be repeated; without, from any"
    one.add_argument(
        "--from", dest="domains", metavar="DOMAIN", type=domain_of, action="append", default=[], help=domains
    )
    commands.add_parser("list", help="names, scopes, rates and domains", parents=[where])
    new_one = commands.add_parser("rotate", help="make a second key of a name, and print it, once", parents=[where])
    new_one.add_argument("name", metavar="NAME")
    old = commands.add_parser("revoke", help="refuse a key from now on", parents=[where])
    old.add_argument("name", metavar="NAME")
    old.add_argument("--old", action="store_true", help="only the older one of two, after rotate")
    return parser.parse_args(arguments)


def rate_of(text: str) -> Rate:
    try:
        return Rate.parse(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def domain_of(text: str) -> str:
    """Returns a domain as mail has it: in small letters and A-labels."""
    try:
        return strict_address(f"somebody@{text}").rpartition("@")[2]
    except ValueError:
        raise argparse.ArgumentTypeError("must be a domain, such as acme.example") from None


def main(arguments: Sequence[str] | None = None) -> int:
    given = parse(arguments)
    file = KeyFile(getattr(given, "file", None) or default_file())
    try:
        with file.locked():
            if given.command == "new":
                new(file, given.name, given.scope, given.rate, given.domains)
            elif given.command == "revoke":
                revoke(file, given.name, old=given.old)
            elif given.command == "rotate":
                rotate(file, given.name)
            else:
                listed(file.read())
    except Refused as error:
        say(f"{error}.")
        return 1
    except PermissionError:
        say(f"{file.path} is not yours to read or write; run this with sudo.")
        return 1
    except OSError as error:
        say(f"{file.path}: {error.strerror}.")
        return 1
    return 0


def default_file() -> Path:
    if SERVER.is_dir():
        return SERVER / "credentials" / "api_keys"
    return Path(__file__).resolve().parent.parent / ".env"
