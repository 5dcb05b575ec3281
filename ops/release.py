"""A release: what of a clone belongs to it, under which name it is installed, the copying of its files, the switch to
it and the way back.

Everything that git tracks belongs to it, as it stands in the clone now; without git, every file but what is made here.
Standard library only: bin/install runs before there is a .venv.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from ops.server import Fault, Server, text_of

LEFT_OUT = {".git", ".venv", ".env", "var", "__pycache__", ".mypy_cache", ".ruff_cache", ".pytest_cache", ".hypothesis"}
LEFT_OUT |= {
    "machines.json",
    "async-email.env",
}  # copied from the first of several machines; a release can be read by all
KEPT = 3  # releases
MARK = Path(".venv", "complete")  # in a release that is complete; says for which Python
CLEAN_ENVIRONMENT = {
    "PATH": "/usr/local/bin:/usr/bin:/bin",
    "HOME": "/nonexistent",
    "LC_ALL": "C",
    "GIT_OPTIONAL_LOCKS": "0",  # without it `git status` writes into the clone
}


def git(source: Path, *arguments: str) -> str | None:
    """Runs git as the owner of the clone, since it refuses anybody else, even root. Returns None without git."""
    owner, us = source.stat(), os.geteuid()
    if not (source / ".git").exists() or us not in (0, owner.st_uid):
        return None
    other = owner.st_uid != us
    try:
        ran = subprocess.run(
            ["git", "-C", str(source), *arguments],
            capture_output=True,
            text=True,
            env=CLEAN_ENVIRONMENT,
            user=owner.st_uid if other else None,
            group=owner.st_gid if other else None,
            extra_groups=[] if other else None,
        )
    except OSError:
        return None
    return ran.stdout if ran.returncode == 0 else None


def files_of(source: Path) -> list[Path]:
    listed = git(source, "ls-files", "-z", "--cached")
    if listed is not None:
        found = [Path(name) for name in listed.split("\0") if name]
    else:
        found = [path.relative_to(source) for path in source.rglob("*")]
        found = [path for path in found if not LEFT_OUT.intersection(path.parts)]
    return sorted(path for path in found if (source / path).is_file())


def release_id(source: Path, say: Callable[[str], None] = print) -> str:
    """Returns `0.1.0-1a2b3c4`: the version and git's short hash; without git, or with changes, a hash of the content.

    Calls `say` with what may surprise the operator.
    """
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


def copy_files(source: Path, to: Path) -> None:
    """Makes copies that belong to the user who runs this (root) and that everybody may read."""
    for path in files_of(source):
        copy = to / path
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source / path, copy)
        copy.chmod(0o755 if (source / path).stat().st_mode & 0o111 else 0o644)


def make_release(server: Server) -> None:
    release = server.releases / release_id(server.source, server.say)
    python = f"Python {sys.version_info[0]}.{sys.version_info[1]}"
    if text_of(release / MARK) not in (None, python):  # what runs may run from it, so it stays as it is
        release = release.with_name(f"{release.name}-{python.lower().replace(' ', '')}")
    server.release = release
    if text_of(release / MARK) == python:
        server.say(f"{release} is there already")
        return
    if os.path.exists(release) and server.announce("remove what a failed installation has left of it"):
        shutil.rmtree(release)
    if server.announce(f"copy this clone to {release}"):
        copy_files(server.source, release)
    server.run(sys.executable, "-m", "venv", release / ".venv")
    pip = (release / ".venv/bin/pip", "install", "--quiet", "--disable-pip-version-check", "--require-hashes")
    server.run(*pip, "-r", release / "requirements.txt")
    server.run(release / ".venv/bin/python", "-m", "compileall", "-q", "-x", r"/\.venv/", release)
    server.write(release / MARK, python, 0o644)


def switch(server: Server) -> None:
    now = os.readlink(server.current) if server.current.is_symlink() else ""
    to = f"releases/{server.release.name}"
    if now not in ("", to):
        server.link(server.previous, now)
    server.link(server.current, to)


def remove_old_releases(server: Server) -> None:
    made = sorted(server.releases.glob("*"), key=lambda path: path.stat().st_mtime, reverse=True)
    used = {link.resolve() for link in (server.current, server.previous) if link.exists()}
    others = [path for path in made if path.resolve() not in used]
    for release in others[max(0, KEPT - len(used)) :]:
        if server.announce(f"remove {release}"):
            shutil.rmtree(release)


def find_previous_release(server: Server) -> None:
    if not server.previous.is_symlink():
        raise Fault(f"there is none: {server.previous} does not exist")
    server.release = server.tree = server.previous.resolve()
    if text_of(server.release / MARK) is None:
        raise Fault(f"{server.release} is incomplete; install the commit you want: git checkout, sudo bin/install")
    server.going_back = True
    server.say(str(server.release))
