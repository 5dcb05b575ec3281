"""README's commands, run as they stand there: whoever copies them gets what it says."""

from __future__ import annotations

import hashlib
import json
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from chaos.ha.scenes import SCENES as OF_HOSTS
from chaos.scenes import SCENES
from tests.relay import Relay
from tests.servers import ROOT, Api, House, RedisServer, eventually, project_with

README = (ROOT / "README.md").read_text()
DEV_KEY = f"dev:{hashlib.sha256(b'dev').hexdigest()}"


def block(language: str, marker: str) -> str:
    """The one fenced block of this language that holds the marker."""
    found = [text for text in re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL) if marker in text]
    assert len(found) == 1, (marker, len(found))
    return str(found[0])


@pytest.fixture
def house(redis_server: RedisServer, tmp_path: Path) -> Iterator[House]:
    with Relay() as relay, House(tmp_path, redis_server.url, API_KEYS=DEV_KEY, **relay.environment(tmp_path)) as house:
        yield house


def run(curl: str, api: Api) -> dict[str, str]:
    here = curl.replace("http://127.0.0.1:8000", f"http://127.0.0.1:{api.port}").replace("curl", "curl -sSf")
    ran = subprocess.run(["bash", "-c", here], capture_output=True, text=True, check=True)
    return dict(json.loads(ran.stdout))


def test_the_first_curl_gives_the_answer_that_stands_below_it(house: House) -> None:
    api = Api(house.api().port, "dev")
    said = run(block("sh", "/start-job"), api)
    written = json.loads(block("json", "job_id"))
    assert said.keys() == written.keys()
    assert said["status"] == written["status"]


def test_the_curl_for_a_whole_mail_sends_it(house: House) -> None:
    api = Api(house.api().port, "dev")
    house.worker()
    api.wait_for(run(block("sh", "Idempotency-Key: invoice"), api)["id"], "sent")


def test_no_two_examples_share_an_idempotency_key() -> None:
    pages = [README, *((ROOT / "docs" / f"{name}.md").read_text() for name in ("api", "clients", "operations"))]
    keys = re.findall(r"(?:Idempotency-Key: |idempotency_?[kK]ey\"?: \")([\w/-]+)", "".join(pages))
    assert sorted(keys) == ["invoice-2026-0042", "invoice-2026-0043", "welcome/1", "welcome/2"]


def test_a_task_added_as_the_readme_says_runs(house: House, tmp_path: Path) -> None:
    added = block("python", "@task")
    assert len(added.strip().splitlines()) <= 5
    house.root = project_with(tmp_path, added)
    api = Api(house.api().port, "dev")
    house.worker("jobs")
    job_id = run(block("sh", '"task": "word_count"'), api)["job_id"]
    eventually(lambda: api.get(f"/jobs/{job_id}").body["status"] == "finished")
    assert api.get(f"/jobs/{job_id}").body["result"] == 3
    wrong = api.post("/jobs", {"task": "word_count", "args": {"text": "a", "shortest": "4"}})
    assert (wrong.status, wrong.body["errors"][0]["field"]) == (422, "args.shortest")


def test_the_commands_for_an_api_key_make_show_and_revoke_one(tmp_path: Path) -> None:
    commands = block("sh", "bin/key new").replace("bin/key ", f"{ROOT}/bin/key --file {tmp_path}/.env ")
    made, listed, _ = commands.strip().splitlines()
    key = subprocess.run(["bash", "-c", made], capture_output=True, text=True, check=True).stdout.strip()
    written = (tmp_path / ".env").read_text().strip().removeprefix("API_KEYS=")
    assert written == f"shop:{hashlib.sha256(key.encode()).hexdigest()}:send"
    ran = subprocess.run(["bash", "-c", listed], capture_output=True, text=True, check=True)
    assert ran.stdout.split() == ["shop", "send"]
    subprocess.run(["bash", "-ec", commands.replace("new shop", "new other")], capture_output=True, check=True)
    assert (tmp_path / ".env").read_text().startswith("API_KEYS=other:")


@pytest.mark.parametrize("page", [ROOT / "README.md", *ROOT.glob("docs/*.md")], ids=lambda page: page.name)
def test_every_local_link_leads_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\((?!https?://)([^)#]+)\)", page.read_text()):
        assert (page.parent / target).exists(), target


def test_what_the_guarantees_say_is_shown_by_something_that_there_is() -> None:
    page = (ROOT / "docs" / "guarantees.md").read_text()
    code = "".join(path.read_text() for path in (ROOT / "tests").glob("*.py"))
    for name in re.findall(r"`(test_\w+)`", page):
        assert f"def {name}(" in code, name
    rows = [line for line in page.splitlines() if line.startswith("| ")]
    assert rows
    scenes = {name for row in rows for name in re.findall(r"(?<!\*)\*([^*]+)\*(?!\*)", row)}
    assert set(OF_HOSTS) <= scenes <= {*SCENES, *OF_HOSTS}
    assert set(SCENES) - scenes <= {
        "workers killed",
        *(name for name in SCENES if name.startswith(("clock", "first "))),
    }
