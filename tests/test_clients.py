"""docs/clients.md, run as it stands there, with the packages of tests/clients. A language or package that is not here
is skipped, but with REQUIRE_CLIENTS=1 (as in CI) it fails."""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from mail import request
from tests import programs
from tests.redis_troubles import stopped
from tests.servers import ROOT, Api, House, RedisServer
from tests.test_nginx import serving
from tests.test_readme import DEV_KEY
from web import errors

PAGE = (ROOT / "docs" / "clients.md").read_text()
SLOW = "a key that may make one request an hour"
UUID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")
RUN = {  # a language of the page -> what runs a file of it
    "python": [os.environ.get("CLIENTS_PYTHON", sys.executable), "x.py"],
    "js": ["node", "x.mjs"],
    "php": ["php", "x.php"],
}
DJANGO = """
from django.conf import settings
settings.configure(EMAIL_BACKEND=EMAIL_BACKEND, ANYMAIL=ANYMAIL, DEFAULT_FROM_EMAIL=DEFAULT_FROM_EMAIL)
from django.core.mail import EmailMessage
message = EmailMessage("Hello", "Hello, Ada.", to=["ada@example.com"])
message.send()
print(message.anymail_status.message_id)
"""


SUPPRESSIONS = {  # adds, lists, finds by address, removes by address, and finds it gone
    "python": """
import os, resend
resend.api_url, resend.api_key, listed = os.environ["MAIL_URL"], "dev", resend.Suppressions
made = listed.add({"email": "Bob+x@example.com"})["id"]
assert [one["id"] for one in listed.list({"limit": 1, "origin": "manual"})["data"]] == [made]
print(listed.get("bob+x@example.com")["email"], listed.remove("bob+x@example.com")["deleted"])
assert listed.Batch.remove({"emails": ["bob+x@example.com"]})["data"] == []
""",
    "js": """
import { Resend } from "resend";
const listed = new Resend("dev", { baseUrl: process.env.MAIL_URL }).suppressions;
const made = (await listed.add({ email: "Bob+x@example.com" })).data.id;
if ((await listed.list({ limit: 1, origin: "manual" })).data.data[0].id !== made) throw "list";
const seen = [(await listed.get("bob+x@example.com")).data.email];
seen.push((await listed.remove("bob+x@example.com")).data.deleted);
if ((await listed.get("bob+x@example.com")).error.name !== "not_found") throw "get";
console.log(...seen);
""",
}


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", PAGE, re.DOTALL)


@pytest.fixture
def here(redis_server: RedisServer, tmp_path: Path) -> Iterator[Api]:
    redis_server.reset()
    slow = f"slow:{hashlib.sha256(SLOW.encode()).hexdigest()}:send:1/h"
    with House(tmp_path, redis_server.url, API_KEYS=f"{DEV_KEY}:full,{slow}") as house:
        yield Api(house.api().port, "dev")


def environment(api: Api) -> dict[str, str]:
    return {**os.environ, "MAIL_URL": f"http://127.0.0.1:{api.port}"}


def run(language: str, text: str, directory: Path, environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """Runs a program, or skips the test where its language or a package of it is not installed."""
    wanted, name = RUN[language]
    program = programs.program("REQUIRE_CLIENTS", wanted)
    (directory / name).write_text(text)
    modules, link = os.environ.get("CLIENTS_NODE_MODULES"), directory / "node_modules"
    if modules and not link.exists():
        link.symlink_to(modules)
    command = [program, name]
    ran = subprocess.run(command, cwd=directory, env=environment, capture_output=True, text=True, timeout=60)
    if re.search(r"No module named|ERR_MODULE_NOT_FOUND", ran.stderr) and os.environ.get("REQUIRE_CLIENTS") != "1":
        pytest.skip("a package of it is not installed")
    return ran


EXAMPLES = {f"{language} {n}": (language, text) for language in RUN for n, text in enumerate(blocks(language), 1)}


@pytest.mark.parametrize(("language", "text"), EXAMPLES.values(), ids=EXAMPLES)
def test_an_example_sends_a_mail(here: Api, tmp_path: Path, language: str, text: str) -> None:
    if "anymail" in text:
        text = text.replace("8000", str(here.port)) + DJANGO
    ran = run(language, text, tmp_path, environment(here))
    assert UUID.fullmatch(ran.stdout.strip()), ran.stderr
    seen = here.email(ran.stdout.strip())
    assert (seen["to"], seen["subject"]) == (["ada@example.com"], "Hello")


@pytest.mark.parametrize(("language", "text"), EXAMPLES.values(), ids=EXAMPLES)
def test_an_example_fails_aloud_where_it_sends_nothing(here: Api, tmp_path: Path, language: str, text: str) -> None:
    if "anymail" in text:
        text = text.replace("8000", str(here.port)).replace('KEY": "dev"', 'KEY": "wrong"') + DJANGO
    ran = run(language, text, tmp_path, environment(here) | {"MAIL_KEY": "wrong"})
    assert (ran.returncode != 0, ran.stdout) == (True, "")
    assert re.search("403|this API key is not known", ran.stderr)


@pytest.mark.parametrize("language", SUPPRESSIONS)
def test_the_suppression_list_is_kept_by_the_official_package(here: Api, tmp_path: Path, language: str) -> None:
    ran = run(language, SUPPRESSIONS[language], tmp_path, environment(here))
    assert ran.stdout.lower() == "bob+x@example.com true\n", ran.stderr


@pytest.mark.parametrize(
    ("said", "sent"),
    [(b"done: 3 files\n", 1), (b"", 0), (b"\x1b[32mok\x1b[0m\r\n", 1), (b"Gr\xfc\xdfe '\"$(id)\"'\\\n", 1), (b"\0", 0)],
)
def test_what_a_program_says_is_mailed(here: Api, tmp_path: Path, said: bytes, sent: int) -> None:
    (script,) = blocks("sh")
    (tmp_path / "mail-output").write_text(script)
    command = ["sh", "mail-output", 'Backup of "web 1"']
    ran = subprocess.run(command, cwd=tmp_path, env=environment(here), input=said, capture_output=True, check=True)
    assert (b'"status": "queued"' in ran.stdout, ran.stderr) == (bool(sent), b"")


def test_what_a_program_says_is_not_lost_in_silence(here: Api, tmp_path: Path) -> None:
    (script,) = blocks("sh")
    (tmp_path / "mail-output").write_text(script)
    wrong = environment(here) | {"MAIL_KEY": "wrong"}
    ran = subprocess.run(["sh", "mail-output", "x"], cwd=tmp_path, env=wrong, input=b"done", capture_output=True)
    assert ran.returncode != 0
    assert b"403" in ran.stderr


def test_what_is_not_here_is_listed_as_it_is_answered() -> None:
    listed = PAGE.partition("## Not here")[2]
    routes = (re.sub(r"\[\^/\]\+", "{id}", route) for route in errors.NOT_HERE)
    assert [name for name in (*request.NOT_HERE, *routes) if f"`{name}`" not in listed] == []


def test_every_example_of_the_page_is_run() -> None:
    assert set(re.findall(r"^```(\w+)$", PAGE, re.MULTILINE)) == {*RUN, "sh"}


# --- what the SDKs call -----------------------------------------------------------------------------------------------

CALLS = {  # each program prints, call by call, what became of it
    "python": """
import json, os, resend
resend.api_url, resend.api_key = os.environ["MAIL_URL"], "dev"
mail = json.loads(os.environ["MAIL"])
wrong, once = {**mail, "to": "x"}, {"idempotency_key": "python"}
files = [{"filename": "a.txt", "content": one} for one in (list(b"Hi"), "SGk=")]
sent = resend.Emails.send({**mail, "attachments": files}, once)["id"]
some = resend.Batch.send([mail, wrong], {"batch_validation": "permissive"})
later = resend.Emails.send({**mail, "scheduled_at": "in 3 days"})["id"]
print(json.dumps({
    "moved": resend.Emails.update({"id": later, "scheduled_at": "in 4 days"})["id"] == later,
    "canceled": resend.Emails.cancel(later)["id"] == later,
    "last": resend.Emails.get(later)["last_event"],
    "list": [one["id"] == later for one in resend.Emails.list({"limit": 1})["data"]],
    "next": len(resend.Emails.list({"after": later, "limit": 1})["data"]),
    "again": resend.Emails.send({**mail, "attachments": files}, once)["id"] == sent,
    "get": resend.Emails.get(sent)["subject"],
    "batch": len(resend.Batch.send([mail, mail])["data"]),
    "permissive": [len(some["data"]), some["errors"][0]["index"]],
    "templates": [one["id"] for one in resend.Templates.list({"limit": 1})["data"]],
    "template": resend.Templates.get("welcome")["variables"][0]["key"],
    "domains": [one["name"] for one in resend.Domains.list()["data"]],
    "keys": [one["name"] for one in resend.ApiKeys.list()["data"]],
}))
""",
    "js": """
import { Resend } from "resend";
const { emails, batch, templates, domains, apiKeys } = new Resend("dev", { baseUrl: process.env.MAIL_URL });
const did = async (call) => { const { data, error } = await call; if (error) throw error; return data; };
const mail = JSON.parse(process.env.MAIL), wrong = { ...mail, to: "x" }, once = { idempotencyKey: "node" };
const attachments = [Buffer.from("Hi"), "SGk="].map((content) => ({ filename: "a.txt", content }));
const sent = await did(emails.send({ ...mail, attachments }, once));
const some = await did(batch.send([mail, wrong], { batchValidation: "permissive" }));
const { id } = await did(emails.send({ ...mail, scheduledAt: "in 3 days" }));
console.log(JSON.stringify({
  moved: (await did(emails.update({ id, scheduledAt: "in 4 days" }))).id === id,
  canceled: (await did(emails.cancel(id))).id === id,
  last: (await did(emails.get(id))).last_event,
  list: (await did(emails.list({ limit: 1 }))).data.map((one) => one.id === id),
  next: (await did(emails.list({ after: id, limit: 1 }))).data.length,
  again: (await did(emails.send({ ...mail, attachments }, once))).id === sent.id,
  get: (await did(emails.get(sent.id))).subject,
  batch: (await did(batch.send([mail, mail]))).data.length,
  permissive: [some.data.length, some.errors[0].index],
  templates: (await did(templates.list({ limit: 1 }))).data.map((one) => one.id),
  template: (await did(templates.get("welcome"))).variables[0].key,
  domains: (await did(domains.list())).data.map((one) => one.name),
  keys: (await did(apiKeys.list())).data.map((one) => one.name),
}));
""",
}
DONE = {
    **{"moved": True, "canceled": True, "last": "canceled", "list": [True], "next": 1},
    **{"again": True, "get": "Hello", "batch": 2, "permissive": [1, 1], "templates": ["welcome"], "template": "name"},
    **{"domains": ["example.com"], "keys": ["dev", "slow"]},
}


@pytest.mark.parametrize("language", CALLS)
def test_each_call_of_the_sdk_is_answered_as_it_expects(here: Api, tmp_path: Path, language: str) -> None:
    ran = run(language, CALLS[language], tmp_path, environment(here) | {"MAIL": json.dumps(GOOD)})
    assert json.loads(ran.stdout or "null") == DONE, ran.stderr


# --- what is refused is an error of each client -----------------------------------------------------------------------

# Each program sends the mail in mail.json with the idempotency key ONCE, and prints what it makes of the answer.
CLIENTS = {
    "resend for Python": (
        "python",
        """
import json, os
import resend
resend.api_url, resend.api_key = os.environ["MAIL_URL"], os.environ["MAIL_KEY"]
try:
    resend.Emails.send(json.load(open("mail.json")), {"idempotency_key": os.environ["ONCE"]})
    print("sent")
except resend.exceptions.ResendError as error:
    print(type(error).__name__, error.code, error.error_type)
""",
    ),
    "resend for Node": (
        "js",
        """
import { readFileSync } from "node:fs";
import { Resend } from "resend";
const resend = new Resend(process.env.MAIL_KEY, { baseUrl: process.env.MAIL_URL });
const mail = JSON.parse(readFileSync("mail.json"));
const { data, error } = await resend.emails.send(mail, { idempotencyKey: process.env.ONCE });
console.log(error ? `error ${error.statusCode} ${error.name}` : data.id && "sent");
""",
    ),
    "django-anymail": (
        "python",
        """
import json, os
from django.conf import settings
url, key = os.environ["MAIL_URL"] + "/", os.environ["MAIL_KEY"]
settings.configure(ANYMAIL={"RESEND_API_KEY": key, "RESEND_API_URL": url})
from anymail.exceptions import AnymailRequestsAPIError
from django.core.mail import EmailMessage, get_connection
mail = json.load(open("mail.json"))
backend = get_connection("anymail.backends.resend.EmailBackend")
backend.open()
backend.session.headers["Idempotency-Key"] = os.environ["ONCE"]
try:
    sent = EmailMessage(mail["subject"], mail["text"], mail["from"], [mail["to"]], connection=backend).send()
    print("sent" if sent else "nothing")
except AnymailRequestsAPIError as error:
    print(type(error).__name__, error.status_code, error.response.json()["name"])
""",
    ),
}
GOOD = {"from": "Acme <hello@acme.example>", "to": "ada@example.com", "subject": "Hello", "text": "Hello, Ada."}
PYTHONS = {422: "ValidationError", 429: "RateLimitError"}


@pytest.mark.parametrize("client", CLIENTS)
def test_a_refusal_is_an_error_of_the_client(here: Api, redis_server: RedisServer, tmp_path: Path, client: str) -> None:
    language, text = CLIENTS[client]
    error = {"resend for Node": "error", "django-anymail": "AnymailRequestsAPIError"}

    def told(mail: dict[str, str], once: str, key: str = "dev", api: Api = here) -> str:
        (tmp_path / "mail.json").write_text(json.dumps(mail))
        words = {"MAIL_URL": f"http://{api.host}:{api.port}", "MAIL_KEY": key, "ONCE": f"{client} {once}"}
        return run(language, text, tmp_path, os.environ | words).stdout.strip()

    def refused(status: int, name: str) -> str:
        return f"{error.get(client) or PYTHONS.get(status, 'ResendError')} {status} {name}"

    assert told(GOOD, "one") == "sent"
    assert told(GOOD | {"to": "ada@-.example"}, "two") == refused(422, "validation_error")
    assert told(GOOD | {"subject": "Other"}, "one") == refused(409, "invalid_idempotent_request")
    assert told(GOOD, "four", SLOW) == "sent"
    assert told(GOOD, "five", SLOW) == refused(429, "rate_limit_exceeded")
    with serving(tmp_path / "nginx", api=f"127.0.0.1:{here.port}") as front:
        assert told(GOOD | {"text": "x" * 11_000_000}, "six", api=front) == refused(413, "validation_error")
    with stopped(redis_server):
        assert told(GOOD, "three") == refused(503, "application_error")
