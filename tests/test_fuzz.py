"""What strangers write, at random: it is refused, or read as another reader reads it.

The search is bounded and begins from the same seed each time. Coverage-guided fuzzing needs atheris, which has wheels
for few machines and versions of Python; REQUIRE_FUZZ=1 makes its absence a failure.
"""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

import settings
from mail.draft import prepare
from mail.mime import to_mime
from mail.request import Invalid
from process.env_file import Unreadable, read
from tests.fuzz_targets import TARGETS, corpus
from tests.http_api import JOB, UNKNOWN_ID, app_with, ask, held_to_the_shape
from tests.sample_mails import DATE, HELLO, ID, Json, mail
from tests.servers import ROOT
from tests.test_http_grammar import assert_linear

SAME = hypothesis_settings(derandomize=True, database=None, deadline=None, suppress_health_check=list(HealthCheck))
WITHOUT = "atheris is not installed: requirements-test.in has it for CPython 3.11 on x86-64 Linux, where it has a wheel"
each_target = pytest.mark.parametrize("target", TARGETS)


@st.composite
def spoilt(draw: st.DrawFn, target: str) -> bytes:
    """A sample of the corpus with a part of another in the place of some bytes."""
    one, other = (draw(st.sampled_from(corpus(target))) for _ in range(2))
    at, end = sorted(draw(st.integers(0, len(one))) for _ in range(2))
    start, stop = sorted(draw(st.integers(0, len(other))) for _ in range(2))
    return one[:at] + draw(st.binary(max_size=2)) + other[start:stop] + one[end:]


@each_target
def test_what_is_spoilt_is_read_as_another_reader_reads_it(target: str) -> None:
    for sample in corpus(target):
        TARGETS[target](sample)
    hypothesis_settings(SAME, max_examples=300)(given(spoilt(target))(TARGETS[target]))()


@each_target
def test_no_bytes_that_reach_new_code_are_read_otherwise(target: str, tmp_path: Path) -> None:
    if not importlib.util.find_spec("atheris"):
        assert not os.environ.get("REQUIRE_FUZZ"), WITHOUT
        pytest.skip(WITHOUT)
    for number, sample in enumerate(corpus(target)):
        (tmp_path / str(number)).write_bytes(sample)
    bounds = ["-seed=1", "-runs=5000", "-max_total_time=10", "-max_len=2048", "-timeout=20", "-rss_limit_mb=1024"]
    command = [sys.executable, "-m", "tests.fuzz", target, str(tmp_path), *bounds, f"-artifact_prefix={tmp_path}/"]
    fuzzed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, errors="replace", timeout=120)
    assert re.search(r"Done \d{3,} runs", fuzzed.stderr), fuzzed.stderr[-4000:]


WORDS = [*"'\"\\# x\t\r\r\0\n", "A=", "\nA=", "B='", "export ", "# A=1", "C", "$é"]
EMPTY = r"\s*(export\s+)?(#|$)"
SHOWN = r"\.env line \d+: ([A-Z][A-Z0-9_]*|it) must (be|have) [^'é$]*"


@hypothesis_settings(SAME, max_examples=500)
@given(text=st.lists(st.sampled_from(WORDS), max_size=12).map("".join), more=st.binary(max_size=2))
def test_a_line_of_settings_is_read_to_the_letter_or_named(tmp_path_factory: Any, text: str, more: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / ".env"
    path.write_bytes(text.encode() + more)
    faults, found, lines = [], [], []
    try:
        found = read(path)
        lines = re.split("\r\n|\n|\r", path.read_bytes().decode("utf-8-sig"))
    except Unreadable as unreadable:
        faults = unreadable.faults
    assert [fault for fault in faults if not re.fullmatch(SHOWN, fault)] == []
    written = [(number, line) for number, line in enumerate(lines, 1) if not re.match(EMPTY, line)]
    for one, (number, line) in zip(found, written, strict=True):
        name, value = re.escape(one.name), re.escape(one.value)
        assert re.fullmatch(rf"\s*(export\s+)?'?{name}'?\s*=\s*(['\"]?){value}\2\s*(#.*)?", line)
        assert one.line == number


TEXTS = ["smtp_host", "ehlo_name", "listen", "smtp_rate", "retry_schedule", "api_keys", "redis_url"]
BEGUN = st.sampled_from(["", "14/s", "5m", "::1%e", "a.example", "[::1]:8000", "redis://", "x:" + "a" * 64])
SPELLINGS = st.text(st.sampled_from("%0 9sm/,.:-_[]aé٣\n"), max_size=8)


@hypothesis_settings(SAME, max_examples=800)
@given(st.sampled_from(TEXTS), BEGUN, SPELLINGS)
def test_a_setting_is_understood_or_named(name: str, begun: str, rest: str) -> None:
    found, told, value = "", "", begun + rest
    try:
        found = str(getattr(settings.load(from_file={}, **{name: value}), name))
    except settings.SettingsError as error:
        told = str(error)
    assert [line for line in told.splitlines() if name.upper() not in line] == []
    assert name not in settings.SECRETS or len(value) < 9 or value not in told
    assert name not in TEXTS[:3] or not re.search(r"[\s\x00-\x1f\x7f]", found)


HEADERS = ["IDEMPOTENCY_KEY", "CONTENT_ENCODING", "X_REQUEST_ID", "X_BATCH_VALIDATION", "COOKIE", "ACCEPT"]
VALUE = st.text(st.characters(max_codepoint=255, exclude_categories=["Cc"]), max_size=9)
BEARER = st.lists(st.sampled_from(["Bearer", "bEARER", "full-key", "dev", " "]) | VALUE, max_size=4).map("".join)


@SAME
@given(st.dictionaries(st.sampled_from(HEADERS), VALUE), BEARER)
def test_whatever_its_headers_are_a_request_is_let_in_by_its_key_alone(headers: dict[str, str], bearer: str) -> None:
    app = app_with("redis://127.0.0.1:1")  # nobody is there: who is let in gets a 503
    asked = {f"HTTP_{name}": value for name, value in headers.items()} | {"HTTP_AUTHORIZATION": bearer}
    answer = ask(app, "GET", f"/jobs/{UNKNOWN_ID}", **asked)
    held_to_the_shape(answer, 503 if re.fullmatch("(?i:bearer) +full-key *", bearer) else answer.status)
    answer = ask(app, "POST", "/jobs", JOB, **asked | {"HTTP_AUTHORIZATION": "Bearer full-key"})
    held_to_the_shape(answer, 503 if not {*HEADERS[:2]} & set(headers) else answer.status)
    assert answer.status in (400, 415, 503)


GROWN: dict[str, Callable[[str], Json]] = {  # a mail with a part that is as long as the text
    "to": lambda text: mail(to=[f'"{text[:200]}" <a@b.example>'] * (len(text) // 200)),
    "cc": lambda text: mail(cc=[f"{text[:60]}{number}@b.example" for number in range(len(text) // 400)]),
    "subject, text, html": lambda text: mail(subject=f"é{text[:900]}", text=text, html=text),
    "folded header": lambda text: mail(headers={"X-A": re.sub("(.{60})", r"\1 ", text)[:15_999]}),
    "encoded header": lambda text: mail(headers={"X-A": f"é{text[:8_000]}"}),
    "headers": lambda text: mail(headers={f"X-{number}": text[:400] for number in range(min(50, len(text) // 400))}),
    "names": lambda text: mail(headers={text: "a"}, **{text: text}),
    "files": lambda text: mail(attachments=[{"filename": text[:199], "content": HELLO}] * (len(text) // 650)),
    "file": lambda text: mail(attachments=[{"filename": "a", "content": text, "content_type": f"a/b{text}"}]),
    "variable": lambda text: mail(text=None, subject=None, template={"id": "welcome", "variables": {"name": text}}),
    "tags": lambda text: mail(tags=[{"name": text[:256], "value": text}] * 50),
}


@pytest.mark.parametrize("body_of", GROWN.values(), ids=GROWN)
def test_four_times_as_much_in_a_mail_takes_at_most_about_four_times_as_long(body_of: Callable[[str], Json]) -> None:
    def seconds(filling: str, size: int) -> float:
        body = body_of((filling * size)[:size])
        started = time.thread_time()
        with suppress(Invalid):
            to_mime(prepare(body, default_sender=None, max_recipients=1000).message, ID, DATE)
        return time.thread_time() - started

    for filling in ("x", " ", '"', "é", "=?utf-8?q?x?= ", "; a=b"):
        assert_linear(partial(seconds, filling))
