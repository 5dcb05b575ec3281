"""A server to deploy on: a bare Debian 12 or 13, made by debootstrap and booted with systemd by systemd-nspawn.

It is what a hoster gives: ssh, sudo, git, curl, Python and no more, a user `admin` who may use sudo, and a network of
its own (network.py). `admin` does a command as that user would, `run` as root; `reboot` does what it says; `clone` puts
this commit there as `git clone` does. Two things come from the host, or nothing could be installed: apt's sources, if
it is a Debian too, and pip's settings with the certificates that they name. Nothing is left behind: it ends what it
started by process id.
"""

from __future__ import annotations

import os
import platform
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from urllib.parse import urlsplit

from tests.deploy.network import Network, network, sh
from tests.servers import ROOT, eventually

PROGRAMS = ("debootstrap", "systemd-nspawn", "nsenter", "ip", "nft", "git")
PACKAGES = (
    *("systemd", "systemd-sysv", "dbus", "python3", "python3-venv", "ca-certificates", "curl"),
    *("git", "iproute2", "procps", "openssh-server", "sudo"),
)
SUITES = {"debian-12": "bookworm", "debian-13": "trixie"}
PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

Ran = subprocess.CompletedProcess[str]


def missing() -> str:
    """Why no machine can be booted here, or nothing."""
    if os.geteuid() != 0:
        return "booting a machine needs root"
    absent = [program for program in PROGRAMS if not shutil.which(program)]
    return f"booting a machine needs {', '.join(absent)}" if absent else ""


class Machine:
    def __init__(self, network: Network, directory: Path, groups: list[str]) -> None:
        self.network = network
        self.address = network.address
        self.directory = directory
        self.root = directory / "root"
        self.groups = groups

    # power

    def boot(self) -> None:
        with (self.directory / "console.log").open("ab") as console:
            self.nspawn = subprocess.Popen(
                [
                    *("sh", "-c", 'for g in $0; do echo $$ > $g/cgroup.procs; done; exec "$@"', " ".join(self.groups)),
                    *("systemd-nspawn", "-q", "--boot", "-D", str(self.root), f"--machine={self.network.name}"),
                    *("--register=no", "--keep-unit", "--console=pipe", "--resolv-conf=off", "--link-journal=no"),
                    *(f"--network-namespace-path=/run/netns/{self.network.name}",),
                ],
                stdin=subprocess.DEVNULL,
                stdout=console,
                stderr=console,
            )
        self.init = int(eventually(self._find_init))
        eventually(self._has_booted, 60)

    def _find_init(self) -> str:
        """The child that is number 1 in a namespace of its own: for a moment there is another one, which makes it."""
        assert self.nspawn.poll() is None, (self.directory / "console.log").read_text()
        children = subprocess.run(["pgrep", "-P", str(self.nspawn.pid)], capture_output=True, text=True).stdout.split()
        for child in children:
            with suppress(OSError):
                numbers = re.findall(r"^NSpid:(.*)", Path(f"/proc/{child}/status").read_text(), re.MULTILINE)
                if numbers[0].split()[1:] == ["1"]:
                    return child
        return ""

    def _has_booted(self) -> bool:
        state = self.run("systemctl is-system-running", check=False).stdout.strip()
        return state in ("running", "degraded")

    def reboot(self) -> None:
        """As an administrator does it: units are stopped in order, with all the time that they ask for."""
        self.run("systemctl poweroff")
        self.nspawn.wait(240)
        self.boot()

    def kill(self) -> None:
        """The plug pulled. Everything in it ends with its PID 1."""
        if hasattr(self, "nspawn"):
            if self.nspawn.poll() is None:
                with suppress(ProcessLookupError, AttributeError):
                    os.kill(self.init, signal.SIGKILL)
            try:
                self.nspawn.wait(30)
            except subprocess.TimeoutExpired:  # it has not come as far as having a PID 1
                self.nspawn.kill()
                self.nspawn.wait()
        shutil.rmtree(f"/run/systemd/nspawn/propagate/{self.network.name}", ignore_errors=True)

    # at its console

    def admin(self, command: str, *, check: bool = True) -> Ran:
        """Runs a shell command as the administrator, in his home."""
        return self.run(f"exec runuser -l admin -c {shlex.quote(command)}", check=check)

    def run(self, command: str, *, check: bool = True, given: str = "") -> Ran:
        """Runs a shell command as root, with the environment of a login and nothing of ours."""
        clean = ("env", "-i", "-C", "/root", f"PATH={PATH}", "HOME=/root", "USER=root", "LANG=C.UTF-8")
        ran: Ran = subprocess.run(
            ["nsenter", "-t", str(self.init), "-a", "--", *clean, "bash", "-c", command],
            input=given,
            capture_output=True,
            text=True,
            timeout=600,
        )
        if check and ran.returncode:
            raise AssertionError(f"{command}: exit {ran.returncode}\n{ran.stdout}{ran.stderr}")
        return ran

    def says(self, command: str) -> str:
        """What a command prints, without its last line's end."""
        return self.run(command).stdout.strip()

    def write(self, path: str, text: str) -> None:
        """Over what is there, which keeps its owner and mode."""
        self.run(f"cat > {shlex.quote(path)}", given=text)

    def clone(self, path: str) -> None:
        """`git clone` of this commit by the administrator, an ordinary folder there."""
        sh("git", "-C", str(ROOT), "bundle", "create", str(self.root / "srv/async-email.bundle"), "HEAD")
        self.admin(f"git clone -q /srv/async-email.bundle {path}")
        self.run("rm /srv/async-email.bundle")

    def files(self) -> set[str]:
        """All that a command may have changed: each file's path, owner and mode, and how it was last changed. Left out
        is what changes by itself."""
        by_itself = " -o ".join(f"-path {path}" for path in ("/var/log", "/var/lib/systemd", "/var/lib/sudo"))
        every = "-type d -printf '%p %u %m\\n' -o -printf '%p %u %m %s %T@ %l\\n'"
        return set(self.says(f"find / -xdev \\( {by_itself} \\) -prune -o {every}").splitlines())


@contextmanager
def image(suite: str) -> Iterator[Path]:
    """A system as a hoster's, not booted yet."""
    directory = Path(tempfile.mkdtemp(prefix="async-email-deploy-", dir="/var/tmp"))
    try:
        root = directory / "root"
        sh("debootstrap", "--variant=minbase", f"--include={','.join(PACKAGES)}", suite, str(root))
        furnish(root, suite)
        sh("chroot", str(root), "useradd", "--create-home", "--shell=/bin/bash", "--groups=sudo", "admin")
        yield root
    finally:
        shutil.rmtree(directory)


@contextmanager
def booted(system: Path, part: str = "") -> Iterator[Machine]:
    """A machine with a copy of the image, on a network of its own; `part` tells several of one process apart."""
    with ExitStack() as undo:
        laid = undo.enter_context(network(part))
        directory = Path(tempfile.mkdtemp(prefix="async-email-deploy-", dir="/var/tmp"))
        undo.callback(shutil.rmtree, directory)
        sh("cp", "-a", "--reflink=auto", str(system), str(directory))
        (directory / "root/etc/resolv.conf").write_text(f"nameserver {laid.host}\n")
        machine = Machine(laid, directory, undo.enter_context(control_groups(laid.name)))
        undo.callback(machine.kill)
        machine.boot()
        yield machine


@contextmanager
def control_groups(name: str) -> Iterator[list[str]]:
    """Groups of the machine's own, in each hierarchy that systemd keeps: two machines in one would end each other's
    processes."""
    ours = (line.split(":", 2)[1:] for line in Path("/proc/self/cgroup").read_text().splitlines())
    tops = {"name=systemd": "/sys/fs/cgroup/systemd", "": "/sys/fs/cgroup/unified"}
    if not Path(tops["name=systemd"]).exists():
        tops = {"": "/sys/fs/cgroup"}
    groups = [Path(f"{tops[kind]}{path.rstrip('/')}/{name}") for kind, path in ours if kind in tops]
    for group in groups:
        group.mkdir()
    try:
        yield [str(group) for group in groups]
    finally:
        for group in groups:
            for folder, _, _ in os.walk(group, topdown=False):
                eventually(lambda empty=folder: removed(empty))  # type: ignore[misc]


def removed(group: str) -> bool:
    """A process that was killed is in its group for a moment longer."""
    try:
        os.rmdir(group)
    except OSError:
        return False
    return True


def furnish(root: Path, suite: str) -> None:
    """What a hoster's image has besides packages."""
    (root / "etc/hostname").write_text("mailhost\n")
    (root / "etc/hosts").write_text("127.0.0.1 localhost mailhost\n::1 localhost\n")
    (root / "etc/sudoers.d/admin").write_text("admin ALL=(ALL) NOPASSWD:ALL\n")
    (root / "etc/resolv.conf").unlink(missing_ok=True)
    host = platform.freedesktop_os_release()
    if host["ID"] == "debian":
        shutil.rmtree(root / "etc/apt")
        shutil.copytree("/etc/apt", root / "etc/apt")
        for sources in (root / "etc/apt").glob("sources.list*/*.sources"):
            sources.write_text(sources.read_text().replace(host["VERSION_CODENAME"], suite))
    settings = pip_settings()
    (root / "etc/pip.conf").write_text("[global]\n" + "".join(f"{key} = {value}\n" for key, value in settings.items()))
    for file in (Path(value) for value in settings.values() if Path(value).is_file()):  # certificate authorities
        (root / str(file.parent).lstrip("/")).mkdir(parents=True, exist_ok=True)
        shutil.copy(file, root / str(file).lstrip("/"))


def pip_settings() -> dict[str, str]:
    """The host's, from its files and its environment; what the environment says comes last and wins. Folders with
    packages are left out: the registry has them all."""
    listed = sh(sys.executable, "-m", "pip", "config", "list").splitlines()
    pairs = [line.split("=", 1) for line in listed if line.startswith(("global.", ":env:."))]
    ordered = sorted(pairs, key=lambda pair: pair[0].startswith(":env:"))
    settings = {key.rsplit(".", 1)[1]: value.strip("'\"") for key, value in ordered}
    return {key: value for key, value in settings.items() if not any(map(is_folder, value.split()))}


def is_folder(word: str) -> bool:
    path = urlsplit(word).path
    return path.startswith("/") and Path(path).is_dir()
