"""monitoring/: the rules and the dashboard speak of metrics that there are, and each alert speaks up when it should.

What "there is" comes from a scrape of the real service. The rules are run by Prometheus' own promtool: first over a day
in which all is well, then over days that differ in one thing each. Without promtool these tests are skipped, but with
REQUIRE_PROMTOOL=1 (as in CI) they fail.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from process.relays import parse_relays
from smtp.published import publish
from tests.http_api import MAIL
from tests.operations import PAGE
from tests.programs import program
from tests.relay import Relay
from tests.servers import ROOT, House, RedisServer, eventually
from tests.test_metrics import figures, names, scrape

# What a replicated Redis alone has; tests/test_replicated.py scrapes it.
REPLICATED = {
    "async_email_redis_replicas_in_step": 2,
    "async_email_redis_replicas_known": 2,
    "async_email_redis_confirms": 1,
    "async_email_redis_sentinels_answering": 3,
    "async_email_redis_sentinels": 3,
}
ALERTS = ROOT / "monitoring" / "alerts.yml"
DASHBOARD = ROOT / "monitoring" / "dashboard.json"


@pytest.fixture(scope="module")
def scraped(redis_server: RedisServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """What the service shows when it has sent a mail and all its processes run."""
    directory = tmp_path_factory.mktemp("scraped")
    with Relay() as relay, House(directory, redis_server.url, **relay.environment(directory)) as house:
        api = house.api()
        house.worker()
        house.worker("jobs")
        api.wait_for(api.submit(MAIL), "sent")
        eventually(lambda: figures(api)["workers jobs"] and figures(api)["workers email"])
        with redis_server.client() as client:  # as a worker with two relays would
            publish(client, parse_relays('[first]\nhost = "a.example"\nrate = "9/h"\n[second]\nhost = "b.example"'))
        yield scrape(api)


@pytest.fixture(scope="module")
def promtool() -> str:
    return program("REQUIRE_PROMTOOL", "promtool")  # Debian has it in the package prometheus


def expressions() -> list[str]:
    """Of the dashboard."""
    panels = json.loads(DASHBOARD.read_text().replace("$__rate_interval", "5m"))["panels"]
    return [target["expr"] for panel in panels for target in panel.get("targets", [])]


def test_the_rules_and_the_dashboard_speak_of_what_there_is_and_leave_nothing_out(scraped: str) -> None:
    there_is = names(scraped) | {*REPLICATED}
    assert names(ALERTS.read_text()) <= there_is
    assert names(" ".join(expressions())) == there_is


def test_every_label_they_ask_for_is_there(scraped: str) -> None:
    samples = [one for family in text_string_to_metric_families(scraped) for one in family.samples]
    there_are = {(label, value) for sample in samples for label, value in sample.labels.items()}
    asked = re.findall(r'[{,] ?(\w+)(?:=|!=)"([^"]+)"', ALERTS.read_text() + " ".join(expressions()))
    assert len(asked) > 10
    assert set(asked) - {("job", "async-email")} <= there_are  # Prometheus gives that one itself


def test_each_alert_says_what_is_the_matter_and_where_to_read_on() -> None:
    rules = ALERTS.read_text().split("- alert: ")[1:]
    names = list(dict.fromkeys(case.partition(",")[0] for case in BROKEN))
    assert [rule.split()[0] for rule in rules] == names
    for name, rule in zip(names, rules, strict=True):
        assert re.search(r"^ +summary: \S", rule, re.MULTILINE), name
        assert re.search(r"labels: \{severity: (page|ticket)\}", rule), name
        assert f"see: docs/operations.md#{name.lower()}" in rule
        assert re.search(f"^### {name}$", PAGE, re.MULTILINE), name


def test_the_panels_lie_side_by_side_and_each_says_what_it_shows() -> None:
    dashboard = json.loads(DASHBOARD.read_text())
    taken: set[tuple[int, int]] = set()
    for panel in dashboard["panels"]:
        at = panel["gridPos"]
        cells = {(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])}
        assert not cells & taken, panel["title"]
        assert at["x"] + at["w"] <= 24
        assert panel["type"] == "row" or panel["description"], panel["title"]
        taken |= cells
    assert len({panel["id"] for panel in dashboard["panels"]}) == len(dashboard["panels"])


def test_the_dashboards_expressions_are_promql(promtool: str, tmp_path: Path) -> None:
    rules = [{"record": f"panel:{number}", "expr": one} for number, one in enumerate(expressions())]
    file = tmp_path / "rules.yml"
    file.write_text(json.dumps({"groups": [{"name": "dashboard", "rules": rules}]}))
    ran = subprocess.run([promtool, "check", "rules", file], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout + ran.stderr


# --- days: a series -> its values minute by minute, as promtool writes them: `7+0x90` stays, `0+7x90` grows -----------

MINUTES = 90
GONE = "gone"
ALWAYS_WELL = {
    'up{job="async-email"}': 1,
    "async_email_redis_memory_max_bytes": 1000,
    "async_email_redis_memory_bytes": 700,
    **REPLICATED,
}
ACCEPTED, TRY_AGAIN, TROUBLE = (
    f'async_email_attempts_total{{verdict="{one}"}}' for one in ("accepted", "try_again", "trouble")
)
SENT, FAILED, EXPIRED = (f'async_email_mails_total{{result="{one}"}}' for one in ("sent", "failed", "expired"))
GROW = {  # a minute
    SENT: 100,
    "async_email_mails_accepted_total": 100,
    ACCEPTED: 100,
    TRY_AGAIN: 5,
    FAILED: 1,
    "async_email_last_sent_timestamp_seconds": 60,
}


def stays(value: float) -> str:
    return f"{value:f}+0x{MINUTES}"


def grows(a_minute: float) -> str:
    return f"0+{a_minute:f}x{MINUTES}"


HAPPENS_ONCE = f"0+0x{MINUTES - 20} 1+0x19"


def a_day_when_all_is_well(scraped: str) -> dict[str, str]:
    day = {series: stays(value) for series, value in ALWAYS_WELL.items()}
    for family in text_string_to_metric_families(scraped):
        for sample in family.samples:
            labels = ", ".join(f'{name}="{value}"' for name, value in sorted(sample.labels.items()))
            series = sample.name + (f"{{{labels}}}" if labels else "")
            day.setdefault(series, stays(sample.value))
    assert set(GROW) <= set(day)
    quick = {one for one in day if one.startswith("async_email_accept_duration_seconds") and one not in SLOW}
    return day | {series: grows(number) for series, number in GROW.items()} | dict.fromkeys(quick, grows(100))


BOUNDS = ("0.001", "0.0025", "0.005", "0.01", "0.025", "0.05", "0.1", "0.25", "0.5", "1.0")
BUCKETS = [f'async_email_accept_duration_seconds_bucket{{le="{bound}"}}' for bound in BOUNDS]
SLOW, TO_A_SECOND = BUCKETS[:4], BUCKETS[4:]
OLDEST = 'async_email_oldest_queued_seconds{queue="email"}'
QUEUED, SCHEDULED, BULK = (
    f'async_email_queue_jobs{{queue="email", state="{one}"}}' for one in ("queued", "scheduled", "bulk")
)
# alert, perhaps a comma and which case -> what is different on that day; "" is for all series of ours
BROKEN: dict[str, dict[str, str]] = {
    "MailIsNotGoingOut": {OLDEST: stays(301)},
    "MailIsNotGoingOut, nor bulk mail": {OLDEST: stays(301), BULK: stays(9), SENT: stays(7), FAILED: stays(7)},
    "DelayedMailIsOverdue": {'async_email_overdue_seconds{queue="email"}': stays(301)},
    "NoMailSentForAnHour": {"async_email_last_sent_timestamp_seconds": stays(0), QUEUED: stays(1)},
    "RelayPutsAllMailOff": {TRY_AGAIN: grows(1), ACCEPTED: stays(7)},
    "RelayPutsAllMailOff, in words that open no breaker": {TROUBLE: grows(1), ACCEPTED: stays(7)},
    "RelayInTrouble": {"async_email_breaker_open": stays(1), TROUBLE: grows(2), ACCEPTED: stays(7)},
    "OneRelayInTrouble": {'async_email_relay_breaker_open{relay="first"}': stays(1)},
    "NoWorker": {'async_email_workers{queue="jobs"}': stays(0)},
    "RedisDown": {"": GONE, "async_email_redis_up": stays(0)},
    "ApiDown": {"": GONE, 'up{job="async-email"}': stays(0)},
    "RedisKeepsNothing": {"async_email_redis_append_only": stays(0)},
    "NothingIsConfirmed": {"async_email_redis_confirms": stays(0)},
    "RedisLacksSpares": {"async_email_redis_replicas_in_step": stays(1)},
    "RedisLacksSpares, of Sentinels": {"async_email_redis_sentinels_answering": stays(2)},
    "RedisNearlyFull": {"async_email_redis_memory_bytes": stays(701)},
    "ManyMailsFail": {FAILED: grows(6)},
    "MailsInDoubt": {"async_email_in_doubt_total": HAPPENS_ONCE},
    "MailsExpire": {EXPIRED: HAPPENS_ONCE},
    "MailsGivenUp": {'async_email_swept_total{outcome="given_up"}': HAPPENS_ONCE},
    "AcceptingIsSlow": dict.fromkeys(TO_A_SECOND, grows(98)),
}
QUIET = dict.fromkeys(GROW, stays(7))
STILL_WELL: dict[str, dict[str, str]] = {  # what looks like trouble and is none
    "nothing has ever happened": {series: stays(0) for series in GROW},
    "a quiet night, one mail put off": QUIET | {SCHEDULED: stays(1), TRY_AGAIN: HAPPENS_ONCE},
    "a newsletter goes out": {OLDEST: stays(3000), BULK: stays(50_000)},
    "no maxmemory": {"async_email_redis_memory_max_bytes": stays(0)},
    "the only two mails of the day were refused": QUIET | {FAILED: f"0+0x{MINUTES - 20} 2+0x19"},
    "a worker is restarted": {'async_email_workers{queue="email"}': f"16+0x{MINUTES - 4} 0+0x3"},
    "a short trouble": {"async_email_breaker_open": f"0+0x{MINUTES - 9} 1+0x8"},
    "Redis was emptied": {series: f"0+{number}x{MINUTES - 20} 0+{number}x19" for series, number in GROW.items()},
}
DAYS = BROKEN | STILL_WELL


def firing(promtool: str, directory: Path, day: dict[str, str], different: dict[str, str]) -> set[str]:
    """The alerts that fire at the end of the day."""
    if different.get("") == GONE:
        day = {}
    series = [{"series": one, "values": values} for one, values in (day | different).items() if one]
    shutil.copy(ALERTS, directory)
    never = [{"labels": "x", "value": 0}]  # what promtool then says that it "got" is what is asked for
    asked = {"expr": 'ALERTS{alertstate="firing"}', "eval_time": f"{MINUTES}m", "exp_samples": never}
    test = {"interval": "1m", "input_series": series, "promql_expr_test": [asked]}
    file = directory / "test.yml"
    file.write_text(json.dumps({"rule_files": [ALERTS.name], "evaluation_interval": "1m", "tests": [test]}))
    ran = subprocess.run([promtool, "test", "rules", str(file)], capture_output=True, text=True)
    got = re.search(r"got:(.*)", ran.stdout + ran.stderr, re.DOTALL)
    assert got, ran.stdout + ran.stderr
    return set(re.findall(r'alertname=\\?"(\w+)', got[1]))


@pytest.mark.parametrize("what", DAYS)
def test_each_alert_and_no_other_fires_for_its_reason(promtool: str, scraped: str, tmp_path: Path, what: str) -> None:
    day = a_day_when_all_is_well(scraped)
    assert not DAYS[what].keys() - day.keys() - {""}
    assert firing(promtool, tmp_path, day, DAYS[what]) == ({what.partition(",")[0]} if what in BROKEN else set())
