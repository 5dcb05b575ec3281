"""The house: which room may import which, where each outside thing lives, and that every file says what it is for."""

from __future__ import annotations

import ast
import hashlib
import inspect
import pkgutil
import re
import subprocess
import sys
from functools import lru_cache

import pytest

from tests.servers import ROOT, project_files

TOP = {"service", "worker", "tasks", "settings"}
ANYTHING = {"ops", "chaos", "bench", "tests"}  # what people run beside it; nobody imports them
MAY_IMPORT = {  # room -> the rooms, or single files, of ours that it may import beside itself
    "settings": {
        "process.env_file",
        "process.values",
        "process.api_keys",
        "process.redis_url",
        "process.relays",
        "process.grants",
        "process.webhooks",
    },
    "process": set[str](),
    "queues": {"settings", "process"},
    "smtp": {"queues.connection", "queues.keys", "settings", "process.values", "process.relays", "process.grants"},
    "upstream": {"smtp.policy", "smtp.verdict", "process.relays", "process.version"},
    "mail": {"smtp", "upstream", "queues", "settings", "process.log", "process.relays", "process.values"},
    "tasks": {"mail.delivery", "mail.mailboxes", "queues.offer", "settings"},
    "web": {"mail", "queues", "settings", "process", "webhooks.queue"},
    "submission": {"mail", "queues", "settings", "process"},
    "webhooks": {"mail", "queues", "settings", "process"},
    "service": {"web", "tasks", "mail.address", "mail.templates", "queues", "settings", "process"},
    "worker": {"tasks", "mail.delivery", "mail.dkim", "queues", "settings", "process"},
}
HOMES = {  # an outside thing -> the only rooms or files that may import it
    "dkim": {"mail.dkim"},
    "smtplib": {"smtp.session", "ops.sendmail"},
    "urllib3": {"upstream.wire", "smtp.oauth", "webhooks.post"},
    "dotenv": {"process.env_file"},
    "email": {"mail.mime", "mail.parsed", "mail.raw", "ops.catcher", "ops.mailparts", "ops.page.words", "ops.sendmail"},
    "jinja2": {"mail.templates", "ops.catcher", "ops.dashboard", "ops.page.view"},
    "imap_tools": {"mail.imap"},
    "imaplib": {"mail.imap"},
    "redis": {"queues", "ops.dashboard", "ops.dev", "ops.checks.flow", "ops.checks.replication", "ops.checks.store"},
    "rq": {"queues", "ops.dashboard"},
    "bottle": {"web", "ops.catcher"},
    "aiosmtpd": {"submission", "ops.catcher"},
    "prometheus_client": {"web.metrics"},
    "mail.draft": {"web", "ops"},  # with pydantic's models and Jinja: two megabytes that no worker needs
    "waitress": {"web.server", "web.grammar", "ops.catcher", "ops.dashboard"},
}
WITHOUT = {  # what a process imports -> what is of no use to it: megabytes, and a slower start
    "service": "ops flask urllib3 imaplib smtplib mail.delivery croniter prometheus_client pydantic_settings",
    "submission.__main__": "ops web bottle waitress jinja2 smtplib mail.delivery croniter pydantic_settings",
    "webhooks.__main__": "ops web bottle waitress jinja2 smtplib mail.delivery mail.request croniter pydantic_settings",
    "worker": "ops web bottle jinja2 smtplib imaplib mail.delivery mail.request email_validator html croniter urllib3",
    "worker, mail.delivery": "ops web bottle waitress jinja2 mail.request email_validator html croniter difflib "
    "urllib3",
    "ops.dashboard": "web.handlers web.server bottle mail.request mail.delivery smtplib email.policy",
    "ops.top": "web flask jinja2 mail.request mail.delivery smtplib croniter",
    "ops.doctor": "redis rq pydantic",  # it says whether they are there
}
LONGEST_FUNCTION = 40  # lines
LONGEST_FILE = 450  # lines


def digest_of(name: str) -> str:
    """Returns what the source of a piece of a library is recognised by."""
    return hashlib.sha256(inspect.getsource(pkgutil.resolve_name(name)).encode()).hexdigest()[:16]


@lru_cache(maxsize=1)
def everything() -> dict[str, ast.Module]:
    """Every Python file of the project, by its name in an import."""
    files = [file for file in project_files() if file.suffix == ".py" and "peers" not in file.parts]
    names = {".".join(file.with_suffix("").parts).removesuffix(".__init__"): file for file in files}
    return {name: ast.parse((ROOT / file).read_text()) for name, file in names.items()}


def modules() -> dict[str, ast.Module]:
    """Those of the product."""
    return {name: tree for name, tree in everything().items() if name.split(".")[0] not in ANYTHING - {"ops"}}


def imported(tree: ast.Module) -> set[str]:
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def within(name: str, places: set[str]) -> bool:
    return any(name == place or name.startswith(f"{place}.") for place in places)


@pytest.mark.parametrize("room", sorted(MAY_IMPORT))
def test_a_room_imports_only_what_the_table_allows(room: str) -> None:
    ours = {name.split(".")[0] for name in modules()} | ANYTHING
    for name, tree in modules().items():
        if within(name, {room}):
            of_ours = {one for one in imported(tree) if one.split(".")[0] in ours}
            assert {one for one in of_ours if not within(one, MAY_IMPORT[room] | {room})} == set(), name


def test_every_file_has_a_room_and_on_top_are_four() -> None:
    assert {name.split(".")[0] for name in modules()} == set(MAY_IMPORT) | {"ops"}
    assert {name for name, tree in modules().items() if "." not in name and len(tree.body) > 1} == TOP


def test_no_file_imports_in_a_circle() -> None:
    known = set(everything())
    uses = {
        name: {one.rpartition(".")[0] if one not in known else one for one in imported(tree)} & known
        for name, tree in everything().items()
    }
    while free := {name for name, used in uses.items() if not used & set(uses) - {name}}:
        uses = {name: used for name, used in uses.items() if name not in free}
    assert uses == {}


@pytest.mark.parametrize("outside", sorted(HOMES))
def test_each_outside_thing_has_its_home(outside: str) -> None:
    users = {name for name, tree in modules().items() if any(within(one, {outside}) for one in imported(tree))}
    assert {name for name in users if not within(name, HOMES[outside])} == set()


@pytest.mark.parametrize("process", WITHOUT)
def test_a_process_imports_only_its_own_side(process: str) -> None:
    listing = [sys.executable, "-c", f"import sys, {process}; print(*sys.modules)"]
    loaded = subprocess.run(listing, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    assert {name for name in WITHOUT[process].split() if name in loaded} == set()


def test_in_the_service_only_settings_reads_the_environment_except_what_systemd_puts_there() -> None:
    service = {name: tree for name, tree in modules().items() if not within(name, {"ops"})}
    users = {n for n, t in service.items() for node in ast.walk(t) if ast.unparse(node) in ("os.environ", "os.getenv")}
    assert users == {"settings", "process.sd_daemon"}


def test_every_file_opens_with_its_purpose() -> None:
    for name, tree in modules().items():
        purpose = ast.get_docstring(tree) or ""
        assert len(purpose.splitlines()) <= 20, name
        assert len(purpose) > 60, name


def test_no_function_and_no_file_is_long() -> None:
    for name, tree in modules().items():
        assert (tree.body[-1].end_lineno or 0) <= LONGEST_FILE, name
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef):
                assert (node.end_lineno or 0) - node.lineno < LONGEST_FUNCTION, f"{name}.{node.name}"


def test_the_readme_and_each_rooms_own_map_name_every_file() -> None:
    readme = (ROOT / "README.md").read_text()
    rooms = {file.parts[0] for file in project_files() if file.suffix == ".py" and len(file.parts) > 1}
    for name in {f"{room}/" for room in rooms} | {f"{name}.py" for name in TOP}:
        assert f"`{name}`" in readme, name
    for name in modules():
        room, _, file = name.rpartition(".")
        if room and name not in ("ops.checks", "ops.page"):
            assert re.search(rf"\b{file}\.py\b", ast.get_docstring(modules()[room]) or ""), name
            assert f"`{file}`" in readme or room.startswith("ops"), name
