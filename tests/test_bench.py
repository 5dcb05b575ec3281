"""The measuring instruments: the relay that counts speaks SMTP, and what is written of a run says what was measured.

What they measure is `bench/run`'s business, and takes an hour or two.
"""

from __future__ import annotations

import importlib.util
import re
import shutil
import smtplib
import socket
import ssl
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, nullcontext
from dataclasses import asdict
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from types import ModuleType
from unittest.mock import Mock

import pytest

from bench import install, side
from bench.kept import Kept, Turn
from bench.load import Request, put_load
from bench.measure import sides_of
from bench.plot import LEFT, plot
from bench.relay import RelayProcess
from bench.report import Rounds, document
from bench.rig import NotMeasured
from bench.sides import SIDES
from bench.targets import MEASUREMENTS
from bench.trials import QUICK, TRIALS, Size

MAIL = b"Message-ID: <%d@example.com>\r\nSubject: dots\r\n\r\n.\r\n..\r\nend\r\n"


@pytest.fixture
def relay(tmp_path: Path) -> Iterator[RelayProcess]:
    with RelayProcess(tmp_path) as relay:
        yield relay


@pytest.fixture
def clear_relay(tmp_path: Path) -> Iterator[RelayProcess]:
    with RelayProcess(tmp_path, secure=False) as relay:
        yield relay


def test_a_mail_with_starttls_and_login_is_counted_once(relay: RelayProcess) -> None:
    with smtplib.SMTP("127.0.0.1", relay.port) as client:
        client.starttls(context=ssl.create_default_context(cafile=relay.ca_file))
        client.login("mailer", "password")
        client.sendmail("a@example.com", ["b@example.com", "c@example.com"], MAIL % 1)
        client.sendmail("a@example.com", ["b@example.com"], MAIL % 1)
    seen = relay.ask("report")
    assert (seen["accepted"], seen["message_ids"], seen["recipients"], seen["doubled"]) == (2, 1, 2, 1)
    assert seen["size"] == 2 * len(MAIL % 1)
    assert 0 < seen["first"] <= seen["last"] <= time.monotonic()


@pytest.mark.parametrize("mechanism", ["PLAIN", "LOGIN"])
def test_a_wrong_login_is_refused_and_sends_nothing(relay: RelayProcess, mechanism: str) -> None:
    with smtplib.SMTP("127.0.0.1", relay.port) as client:
        assert client.docmd("MAIL", "FROM:<a@example.com>")[0] == 530
        client.starttls(context=ssl.create_default_context(cafile=relay.ca_file))
        client.ehlo()
        client.user, client.password = "mailer", "wrong"
        with pytest.raises(smtplib.SMTPAuthenticationError):
            client.auth(mechanism, getattr(client, f"auth_{mechanism.lower()}"))
        assert client.docmd("MAIL", "FROM:<a@example.com>")[0] == 530
    assert relay.ask("report")["accepted"] == 0


def codes(port: int, *parts: bytes) -> list[int]:
    """What comes back to these bytes, until the relay hangs up."""
    with socket.create_connection(("127.0.0.1", port), timeout=5) as line, line.makefile("rb") as replies:
        for part in parts:
            line.sendall(part)
            time.sleep(0.05)  # so that it arrives by itself
        return [int(reply[:3]) for reply in replies if reply[3:4] == b" "]


ENVELOPE = b"EHLO me\r\nMAIL FROM:<a@example.com> BODY=8BITMIME SIZE=60\r\nRCPT TO:<b@example.com>\r\n"


def test_pipelined_commands_are_answered_in_their_order(clear_relay: RelayProcess) -> None:
    stuffed = (MAIL % 2).replace(b"\r\n.", b"\r\n..")
    said = codes(clear_relay.port, ENVELOPE + b"DATA\r\n", stuffed + b".\r\nRSET\r\nQUIT\r\n")
    assert said == [220, 250, 250, 250, 354, 250, 250, 221]
    seen = clear_relay.ask("report")
    assert (seen["accepted"], seen["size"]) == (1, len(MAIL % 2))


def test_an_address_beyond_ascii_needs_smtputf8(clear_relay: RelayProcess) -> None:
    without, with_it = "MAIL FROM:<ä@example.com>\r\n", "MAIL FROM:<ä@example.com> SMTPUTF8\r\n"
    said = codes(clear_relay.port, b"EHLO me\r\n", (without + with_it).encode(), b"DATA\r\nQUIT\r\n")
    assert said == [220, 250, 553, 250, 503, 221]


def test_a_round_trip_takes_its_time(tmp_path: Path) -> None:
    with RelayProcess(tmp_path, latency=0.02, secure=False) as relay:
        began = time.monotonic()
        with smtplib.SMTP("127.0.0.1", relay.port) as client:  # two, with TCP's own
            client.sendmail("a@example.com", ["b@example.com"], MAIL % 4)  # EHLO, MAIL, RCPT, DATA, the dot; then QUIT
        assert 0.16 < time.monotonic() - began < 1
        assert relay.ask("wait 1")["accepted"] == 1
        assert list(relay.ask("moments")) == ["b@example.com"]


@pytest.fixture
def welcome(relay: RelayProcess, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """What the peers send with, as those do that keep a session."""
    for name, value in {**relay.environment(), **side.COMMON, "KEEP_SESSION": "1"}.items():
        monkeypatch.setenv(name, value)
    spec = importlib.util.spec_from_file_location("welcome", install.PEERS / "welcome.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    with ExitStack() as sessions:
        monkeypatch.setattr(module, "session", lambda make=module.session: sessions.enter_context(closing(make())))
        yield module


def test_a_warm_peer_keeps_a_session_per_thread(relay: RelayProcess, welcome: ModuleType) -> None:
    for number in range(3):
        welcome.send("Ada", f"m{number}@example.com")
    with ThreadPoolExecutor(1) as other:
        other.submit(welcome.send, "Ada", "m3@example.com").result()
    seen = relay.ask("report")
    assert (seen["accepted"], seen["recipients"], seen["sessions"]) == (4, 4, 2)


@pytest.mark.parametrize("reply", [0, 421, 550])
def test_a_warm_peer_sends_again_where_its_session_turns_out_dead(
    reply: int, relay: RelayProcess, welcome: ModuleType
) -> None:
    welcome.send("Ada", "m0@example.com")
    if reply:
        welcome.KEPT.relay.data = Mock(side_effect=smtplib.SMTPDataError(reply, b"no"))
    else:
        welcome.KEPT.relay.sock.shutdown(socket.SHUT_RDWR)
    with pytest.raises(smtplib.SMTPDataError) if reply == 550 else nullcontext():
        welcome.send("Ada", "m1@example.com")
    seen, times = relay.ask("report"), 1 if reply == 550 else 2
    assert (seen["accepted"], seen["recipients"], seen["sessions"]) == (times, times, times)


RESULTS: dict[str, dict[str, Rounds]] = {
    "accept": {
        "ours": [{"rate": 300, "p99": 5}, {"rate": 900, "p99": 5}, {"rate": 800, "p99": 9}],
        "celery": [{"rate": 100, "p99": 10}, {}, {"rate": 400, "p99": 10}],
    },
    "send0": {
        "ours": [{"rate": 200, "cpu": 1.0}, {"rate": 300, "cpu": 1.2}],
        "dramatiq": [{"rate": 100}, {"rate": 900}],
        "celery_threads_warm": [{"rate": 400}, {}],
        "celery16_warm": [{"rate": 500}, {"rate": 600}],
        "postfix": [{"rate": 1000}, {"rate": 1000}],
    },
    "idle": {"ours": [{"p50": 20, "p99": 10}]},
    "queue": {"ours": [{"accept_short": 1.0, "accept_long": 1.1, "send_short": 2.0, "bytes": 2000}]},
}


def keep(kept: Kept, server: str, results: dict[str, dict[str, Rounds]]) -> None:
    facts = ["2 cores", f"{server}, persistent", f"{len(results)} a second"]
    kept.begin(server, asdict(QUICK), facts, ["RQ: left out."])
    for name, sides in results.items():
        for one, rounds in sides.items():
            for number, figures in enumerate(rounds, 1):
                kept.add(Turn(server, number, name, one), dict(figures), "" if figures else "it did not start")


@pytest.fixture
def kept(tmp_path: Path) -> Kept:
    keep(Kept(tmp_path / "kept.jsonl"), "Redis 7", RESULTS)
    return Kept(tmp_path / "kept.jsonl")  # as the next run finds it


def test_the_page_has_medians_with_their_spread_and_each_ratio_beside_its_target(kept: Kept) -> None:
    page = document(kept.parts())
    assert "| async-email (Waitress, 2 processes) | 800 (300–900) | – | 5.0 (5.0–9.0) | – | – |" in page
    assert "| Flask + Celery (Gunicorn, 2 workers) | 250 (100–400) |" in page
    assert "| requests/s | 2.50 (2.00–3.00) | ≥ 2 | met |" in page  # the second round has no peer
    assert "| p99 | 0.70 (0.50–0.90) | ≤ 1 | met |" in page
    assert "| memory | – | ≤ 0.5 | not measured |" in page
    assert "| p50, ms | 20.0 | < 5 | **missed** |" in page
    assert "| accept, long to short | 1.10 | ≤ 1.1 | met |" in page
    assert "| **mails/s, 1 process, to the best peer** (Celery, 16 processes, warm) | 0.45 (0.40–0.50) | – |  |" in page
    assert "2 processes, to the best peer** (Celery, 16 processes, warm) | – | ≥ 2 | not measured |" in page
    assert "| CPU ms a mail, 1 process | 1.10 (1.00–1.20) | ≤ 1.2 | met |" in page
    assert "| RQ, forking |" not in page  # a side that took no part
    assert len(re.findall(r"^- \*\*", page.partition("\n| ")[0], re.MULTILINE)) <= 5  # what is compared with what
    assert "- RQ: left out.\n- Round 2, Redis 7, Accepting a mail: Flask + Celery" in page
    assert page.endswith("Sending, a relay without latency: Celery, 16 threads, warm: it did not start\n")


def test_rounds_are_kept_until_a_new_run_replaces_them(kept: Kept) -> None:
    keep(kept, "Valkey 9", {"send0": RESULTS["send0"], "idle": {"ours": [{"p50": 3, "p99": 10}]}})
    failed = Turn("Redis 7", 2, "accept", "celery")
    assert not kept.has(failed)  # so that --continue tries it again
    kept.add(failed, {"rate": 300}, "")
    assert kept.has(failed)
    page = document(Kept(kept.path).parts())
    assert "| Flask + Celery (Gunicorn, 2 workers) | 300 (100–400) |" in page
    assert re.findall(r"\n### (.*)", page) == ["Redis 7", "Redis 7", "Valkey 9", "Redis 7", "Valkey 9", "Redis 7"]
    facts = ["2 cores", "Redis 7, persistent", "Redis 7: 4 a second", "Valkey 9, persistent", "Valkey 9: 2 a second"]
    assert "\n- ".join(facts) in page
    assert "(img/benchmarks.svg)" in page
    assert "(img/benchmarks2.svg)" in page
    kept.forget("Redis 7", asdict(QUICK), ["accept", "send0", "idle"])
    assert [(part.server, *part.results) for part in Kept(kept.path).parts()] == [
        ("Valkey 9", "send0", "idle"),
        ("Redis 7", "queue"),
    ]
    with pytest.raises(NotMeasured, match="another size on Redis 7"):
        kept.begin("Redis 7", asdict(Size()), [], [])
    kept.forget("Redis 7", asdict(Size()), ["idle"])
    assert [part.server for part in kept.parts()] == ["Valkey 9"]
    kept.forget("Valkey 9", asdict(QUICK), ["send0", "idle"])
    assert not Kept(kept.path).lines


def test_the_plot_has_a_bar_for_every_side_that_was_measured_and_the_limit_as_a_line() -> None:
    send20: dict[str, Rounds] = {"ours": [{"rate": 600}], "ours2": []}
    root = ElementTree.fromstring(plot({**RESULTS, "send20": send20}))
    bars = [float(bar.attrib["width"]) for bar in root.iter("{http://www.w3.org/2000/svg}rect")]
    assert len(bars) == 2 + 5 + 1
    assert bars[0] / bars[1] == pytest.approx(800 / 250, rel=0.01)
    [limit] = [line for line in root.iter("{http://www.w3.org/2000/svg}line") if line.get("class") == "limit"]
    assert limit.attrib["x1"] == limit.attrib["x2"]
    assert (float(limit.attrib["x1"]) - LEFT) / bars[-1] == pytest.approx(800 / 600, rel=0.01)


def test_every_measurement_has_a_trial() -> None:
    assert MEASUREMENTS.keys() == TRIALS.keys()
    assert {side for measurement in MEASUREMENTS.values() for side in measurement.sides} == SIDES.keys()


@pytest.mark.parametrize(("name", "senders", "started"), [
    ("ours", 64, [("64", "1")]), ("ours2", 16, [("16", "2")]), ("bullmq", 64, [("32", "2")] * 2),
])  # fmt: skip
def test_the_senders_are_divided_among_the_processes(name: str, senders: int, started: list[tuple[str, str]]) -> None:
    rig = Mock()
    SIDES[name].start_workers(rig, {}, senders)
    environments = [call.args[2] for call in rig.start.call_args_list]
    assert [(one["WORKER_CONCURRENCY"], one["WORKER_PROCESSES"]) for one in environments] == started


def test_a_peer_that_cannot_be_set_up_is_said_and_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(install, "VENV", tmp_path)
    monkeypatch.setattr(install, "BULLMQ", tmp_path)
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr("os.geteuid", lambda: 1000)
    install.missing.cache_clear()
    taking_part, left_out = sides_of(["send20", "send0"])
    assert taking_part == {"send20": ["ours", "ours2"], "send0": ["ours", "ours2"]}
    assert len(left_out) == len(MEASUREMENTS["send20"].sides) - 2
    assert left_out[-4].startswith("RQ, forking: left out, since it could not be set up ([Errno 2]")
    install.missing.cache_clear()


class Answering(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        good = self.rfile.read(int(self.headers["Content-Length"])) == b"{}" and self.headers["X-Key"] == "secret"
        self.send_response(202 if good else 400)
        self.send_header("Content-Length", "2")
        self.end_headers()
        self.wfile.write(b"{}")

    def log_message(self, *_: object) -> None:
        """Says nothing."""


@pytest.mark.parametrize("generator", ["wrk", "ours"])
def test_the_load_is_counted(generator: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if generator == "ours":
        monkeypatch.setenv("PATH", "")
    elif not shutil.which("wrk"):
        pytest.skip("wrk is not installed")
    with ThreadingHTTPServer(("127.0.0.1", 0), Answering) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_address[1]}/start-job"
        good, bad = (Request(url, "POST", "{}", {"X-Key": key}) for key in ("secret", "wrong"))
        load = put_load(good, seconds=1, connections=2, directory=tmp_path)
        refused = put_load(bad, seconds=1, connections=2, directory=tmp_path)
        server.shutdown()
    assert load.failed == 0
    assert 0 < load.p50 <= load.p99 < 1000
    assert load.rate > 10
    assert refused.failed > 10
