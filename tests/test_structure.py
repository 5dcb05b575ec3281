"""The house: who may import whom, where each outside thing lives, and that every room says what it is for."""

from __future__ import annotations

import ast
from functools import lru_cache

import pytest

from tests.servers import ROOT, project_files

MAY_IMPORT = {  # module -> what it may import of ours. tests and bench may import anything.
    "settings": set(),
    "events": set(),
    "supervisor": set(),
    "prefork": {"events", "supervisor"},
    "server": {"jobs", "mail.message", "settings", "supervisor"},
    "jobs": {"events"},
    "sieve": {"events", "jobs"},
    "mail.message": set(),
    "mail.templates": {"mail.message"},
    "mail.relay": set(),
    "mail.warm": {"mail.relay"},
    "mail.totals": {"jobs"},
    "mail.outbox": {"jobs", "mail.message", "mail.totals", "settings"},
    "mail.pacing": {"jobs", "settings"},
    "mail.sweep": {"jobs", "mail.outbox", "mail.totals"},
    "tasks": {
        *("events", "jobs", "settings"),
        *("mail.message", "mail.outbox", "mail.pacing", "mail.relay", "mail.sweep", "mail.warm"),
    },
    "service": {
        *("events", "jobs", "prefork", "server", "settings", "supervisor", "tasks"),
        *("mail.message", "mail.outbox", "mail.pacing", "mail.sweep", "mail.templates", "mail.totals"),
        "ops.metrics",
    },
    "worker": {"events", "jobs", "settings", "sieve", "supervisor", "tasks"},
    "ops.dashboard": {"events", "jobs", "settings", "supervisor"},
    "ops.catcher": {"settings"},
    "ops.dev": {"ops.aof", "settings"},
    "ops.aof": set(),
    "ops.install": set(),
    "ops.doctor": {"ops.checks.findings", "ops.checks.packages", "ops.checks.table"},
    "ops.checks.findings": {"settings"},  # for its types alone
    "ops.checks.packages": {"ops.checks.findings"},
    "ops.checks.configuration": {"mail.message", "ops.checks.findings", "settings"},
    "ops.checks.store": {"jobs", "ops.checks.findings", "settings"},
    "ops.checks.replies": {"mail.relay"},
    "ops.checks.relay": {"mail.relay", "ops.checks.findings", "ops.checks.replies", "settings", "tasks"},
    "ops.checks.flow": {
        *("jobs", "mail.message", "mail.outbox", "mail.relay"),
        *("ops.checks.findings", "ops.checks.replies", "ops.checks.store"),
    },
    "ops.checks.units": {"ops.checks.findings", "ops.checks.store"},
    "ops.checks.machine": {"ops.checks.findings", "ops.checks.store"},
    "ops.checks.names": {"mail.message", "ops.checks.findings"},
    "ops.checks.table": {
        *("events", "jobs", "ops.checks.findings"),
        *(f"ops.checks.{room}" for room in ("configuration", "flow", "machine", "names", "relay", "store", "units")),
    },
    "ops.key": {"settings"},
    "ops.metrics": {"jobs", "mail.outbox", "mail.pacing", "mail.sweep", "mail.totals"},
}
HOMES = {  # an outside thing -> the only modules that may import it
    "smtplib": {"mail.relay"},
    "email": {"mail.message", "ops.catcher"},
    "jinja2": {"mail.templates", "ops.catcher", "ops.dashboard"},
    "redis": {
        *("jobs", "mail.outbox", "mail.pacing", "mail.sweep", "mail.totals", "sieve", "worker"),
        *("ops.dashboard", "ops.dev", "ops.checks.flow", "ops.checks.store"),
    },
    "rq": {"jobs", "mail.sweep", "sieve", "tasks", "worker", "ops.dashboard"},
    "bottle": {"service", "ops.catcher"},
    "prometheus_client": {"ops.metrics"},
    "waitress": {"server", "ops.catcher", "ops.dashboard"},
}


@lru_cache(maxsize=1)
def modules() -> dict[str, ast.Module]:
    files = [file for file in project_files() if file.suffix == ".py" and file.parts[0] not in ("tests", "bench")]
    names = {".".join(file.with_suffix("").parts): file for file in files if file.name != "__init__.py"}
    return {name: ast.parse((ROOT / file).read_text()) for name, file in names.items()}


def imports(tree: ast.Module, known: set[str]) -> set[str]:
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            parts = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= (parts & known) or {node.module or ""}
    return found


@pytest.mark.parametrize("name", sorted(MAY_IMPORT))
def test_a_module_imports_only_what_its_place_in_the_house_allows(name: str) -> None:
    known = set(modules())
    assert imports(modules()[name], known) & known <= MAY_IMPORT[name]


def test_every_module_has_its_place_in_the_table() -> None:
    assert set(modules()) == set(MAY_IMPORT)


@pytest.mark.parametrize("outside", sorted(HOMES))
def test_each_outside_thing_has_its_home(outside: str) -> None:
    users = {n for n, tree in modules().items() if outside in {i.split(".")[0] for i in imports(tree, set(modules()))}}
    assert users <= HOMES[outside]


def test_only_settings_reads_the_environment_but_for_what_systemd_says() -> None:
    users = {
        n for n, t in modules().items() for node in ast.walk(t) if ast.unparse(node) in ("os.environ", "os.getenv")
    }
    assert users == {"settings", "supervisor"}


def test_every_file_opens_with_its_purpose() -> None:
    for name, tree in modules().items():
        purpose = ast.get_docstring(tree) or ""
        assert 3 <= len(purpose.splitlines()) <= 16, name


def test_the_readme_names_every_file() -> None:
    readme = (ROOT / "README.md").read_text()
    for name in modules():
        assert f"`{name.replace('.', '/')}.py`" in readme, name
