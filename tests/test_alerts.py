"""What people are told, when, and how it reaches them."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any, ClassVar

import pytest
from redis import Redis

from ops import push
from ops.alerts import LOOKS, MOST, QUIET, Alerts
from ops.condition import Condition
from ops.push import News, NotPushed, Outlet, by_mail, request, to_url
from queues.connection import connect
from settings import Settings, load
from tests.http_upstream import TAKEN, Scripted, answer
from tests.relay import Relay
from tests.servers import RedisServer, eventually, free_port

NOW = 1_800_000_000.0
WELL = Condition("well", "well", "All is well: 9 sent today.")
NEWS = News("begins", "relay", "bad", "It refuses <us>.", NOW, "mx1")


def bad(kind: str = "worker", also: tuple[Condition, ...] = (), push: bool = True) -> Condition:
    return Condition("bad", kind, f"No {kind}. 2 mails wait.", "start it", None, also, push)


class People:
    """Hears what one dashboard says, which looks every 15 seconds."""

    def __init__(self, redis: Redis) -> None:
        self.heard: list[News] = []
        self.alerts = Alerts(redis, self.heard.append)
        self.now = NOW

    def sees(self, *looks: Condition, blind: bool = False) -> list[str]:
        """Returns what is said at each of these looks, and forgets it."""
        for one in looks:
            self.alerts.look(one, self.now, blind)
            self.now += 15
        said = [f"{one.status} {one.kind}" for one in self.heard]
        self.heard.clear()
        return said


@pytest.fixture
def people(client: Redis) -> People:
    return People(client)


def test_people_are_told_once_when_it_begins_and_once_when_it_is_over(people: People) -> None:
    assert people.sees(WELL, bad(), WELL, bad(push=False), bad(push=False)) == []  # a restart, and what is no alert
    people.alerts.look(bad(), NOW)
    people.alerts.look(bad(), NOW + 15)
    [news] = people.heard
    assert news[:5] == ("begins", "worker", "bad", "No worker. 2 mails wait. Next: start it.", NOW)
    people.heard.clear()
    people.now = NOW + 30
    assert people.sees(*[bad()] * 100, WELL) == []
    people.alerts.look(WELL, NOW + 3600)
    [news] = people.heard
    assert news.status == "ended"
    assert news.text == "Over after 60 min: No worker. All is well: 9 sent today."
    people.heard.clear()
    assert people.sees(*[WELL] * 100) == []


def test_what_comes_and_goes_is_told_to_begin_once_in_ten_minutes(people: People) -> None:
    on, off = [bad()] * LOOKS, [WELL] * LOOKS
    said = [people.sees(*(on if number % 2 == 0 else off)) for number in range(120)]  # an hour
    told = [one for each in said for one in each]
    assert told[:2] == ["begins worker", "ended worker"]
    assert told == ["begins worker", "ended worker"] * 6
    assert people.sees(*[WELL] * 50) in ([], ["ended worker"])


def test_twenty_messages_in_an_hour_are_the_most_and_the_others_are_counted(people: People) -> None:
    kinds = [f"kind{number}" for number in range(MOST + 3)]
    storm = bad(kinds[0], tuple(bad(one) for one in kinds[1:]))
    assert len(people.sees(*[storm] * 9)) == MOST
    people.now += 3600
    people.sees()
    people.alerts.look(storm, people.now)
    assert [one.text[-70:] for one in people.heard][:1] == [
        "Next: start it. (2 more messages held back, since there were 20 in an hour.)"[-70:]
    ]
    assert len(people.heard) == 3


def test_what_cannot_be_seen_has_not_ended(people: People) -> None:
    assert people.sees(bad("relay"), bad("relay")) == ["begins relay"]
    people.now += QUIET
    assert people.sees(*[bad("redis")] * 2, blind=True) == ["begins redis"]
    people.now += QUIET
    assert people.sees(bad("relay"), bad("relay")) == ["ended redis"]
    assert people.sees(*[bad("quiet")] * 2) == ["begins quiet", "ended relay"]
    people.now += QUIET
    assert people.sees(*[bad("suspended", push=False)] * 9) == []  # and so nobody is surprised that it is quiet


def test_dashboards_that_share_a_redis_say_it_once_and_one_that_starts_anew_not_again(people: People) -> None:
    other = People(people.alerts.redis)
    assert (people.sees(bad(), bad()), other.sees(bad(), bad(), bad())) == (["begins worker"], [])
    anew = People(people.alerts.redis)
    people.now = other.now = anew.now = NOW + QUIET
    assert anew.sees(bad(), bad()) == []
    assert (anew.sees(WELL, WELL), other.sees(WELL, WELL), people.sees(WELL, WELL)) == (["ended worker"], [], [])
    people.now += QUIET
    assert people.sees(bad(), bad()) == ["begins worker"]
    late = People(people.alerts.redis)
    late.now = people.now + QUIET
    assert late.sees(WELL, WELL) == ["ended worker"]  # which it has not seen begin


def test_without_redis_each_dashboard_decides_by_itself_and_afterwards_they_agree_again(
    redis_server: RedisServer, people: People
) -> None:
    gone = connect("redis://127.0.0.1:1")
    alone = [People(gone), People(gone)]
    assert [one.sees(*[bad("redis")] * 9, blind=True) for one in alone] == [["begins redis"]] * 2
    for one in alone:
        one.alerts.redis = one.alerts.claim.redis = people.alerts.redis
    assert [one.sees(WELL, WELL) for one in alone] == [["ended redis"], []]
    assert [one.sees(*[bad("redis")] * 2) for one in alone] == [[], []]  # too soon


class Hook(BaseHTTPRequestHandler):
    """Receives pushes, and answers as the test says."""

    got: ClassVar[list[tuple[str, dict[str, str], bytes]]] = []
    answers: ClassVar[list[int]] = []

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.got.append((self.path, {name.lower(): value for name, value in self.headers.items()}, body))
        status = self.answers.pop(0) if self.answers else 200
        self.send_response(status)
        if status == 302:
            self.send_header("Location", "/elsewhere")
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def hook() -> Iterator[str]:
    Hook.got, Hook.answers = [], []
    with HTTPServer(("127.0.0.1", 0), Hook) as server:
        thread = threading.Thread(target=server.serve_forever, args=[0.01])
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def test_each_kind_of_receiver_gets_what_it_understands(hook: str) -> None:
    to_url(f"{hook.replace('//', '//ada:p%40ss@')}/secret", NEWS)
    to_url(f"{hook}/ntfy/topic", NEWS)
    slack = request("https://hooks.slack.com/services/T/B/x", NEWS)
    ntfy = request("https://ntfy.sh/topic", NEWS._replace(status="ended"))
    (path, headers, body), (_, titled, words) = Hook.got
    assert (path, headers["authorization"]) == ("/secret", "Basic YWRhOnBAc3M=")
    assert json.loads(body) == {
        **{"status": "begins", "kind": "relay", "level": "bad", "text": "It refuses <us>.", "host": "mx1"},
        **{"since": "2027-01-15T08:00:00+00:00", "service": "async-email"},
    }
    assert (titled["title"], titled["priority"], words) == (
        "async-email on mx1: relay needs attention",
        "high",
        b"It refuses <us>.",
    )
    assert slack.data == b'{"text": "It refuses &lt;us&gt;."}'
    assert (ntfy.get_header("Priority"), ntfy.get_header("Tags")) == ("default", "white_check_mark")


def test_a_push_that_fails_says_why_without_the_url_and_follows_no_redirect(hook: str) -> None:
    Hook.answers = [302, 404]
    for why in ("HTTP 302", "HTTP 404"):
        with pytest.raises(NotPushed, match=f"^{why}$"):
            to_url(f"{hook}/secret", NEWS)
    assert [path for path, _, _ in Hook.got] == ["/secret"] * 2
    with pytest.raises(NotPushed, match=r"^Connection refused$"):
        to_url("http://127.0.0.1:1/secret", NEWS)


def test_a_push_is_tried_again_and_blocks_nobody(
    hook: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(push, "BACKOFF", (0.05,))
    Hook.answers = [500, 500]
    outlet = Outlet("ALERT_URL", lambda news: to_url(f"{hook}/secret", news))
    with caplog.at_level(0):
        began = time.monotonic()
        outlet.put(NEWS)
        assert time.monotonic() - began < 0.04
        eventually(lambda: "alert_sent to=ALERT_URL kind=relay status=begins" in caplog.text)
    assert len(Hook.got) == 3
    assert 'alert_failed to=ALERT_URL kind=relay reason="HTTP 500" next_in=0.05s' in caplog.text
    assert "secret" not in caplog.text
    assert "refuses" not in caplog.text


def test_what_is_over_before_anybody_could_be_told_is_one_message() -> None:
    outlet = Outlet("ALERT_TO", lambda news: None)
    outlet.thread = threading.current_thread()  # so that none begins
    for status, kind in (("begins", "relay"), ("begins", "doubt"), ("ended", "relay")):
        outlet.put(NEWS._replace(status=status, kind=kind))  # type: ignore[arg-type]
    assert [(one.status, one.kind) for one, _ in outlet.waiting] == [("begins", "doubt"), ("ended", "relay")]


def test_a_mail_is_posted_where_the_relay_is_one_by_http() -> None:
    with Scripted([TAKEN, answer(401, "{}")]) as upstream:
        relays = f'[up]\nkind = "resend"\nurl = "{upstream.url}"\napi_key = "k"\n'
        settings = load(from_file={}, relays=relays, alert_to="ops@acme.example")
        by_mail(settings, NEWS)
        with pytest.raises(NotPushed, match=r"^401 at http$"):
            by_mail(settings, NEWS)
    assert json.loads(upstream.asked[0].body)["to"] == ["ops@acme.example"]


def test_a_mail_goes_straight_to_the_relay(tmp_path: Path, client: Redis, redis_server: RedisServer) -> None:
    with Relay(login=("ada", "pass"), tls="starttls") as relay:
        given: Any = {name.lower(): value for name, value in relay.environment(tmp_path).items()}
        settings = Settings(alert_to="ops@acme.example", mail_from="Acme <hi@acme.example>", **given)
        by_mail(settings, NEWS)
        several = (
            f'[first]\nhost = "127.0.0.1"\nport = {free_port()}\n[second]\nhost = "127.0.0.1"\nport = {relay.port}\n'
        )
        several += f'username = "ada"\npassword = "pass"\nca_file = "{given["smtp_ca_file"]}"'
        by_mail(load(from_file={}, relays=several, alert_to="ops@acme.example"), NEWS)
        with pytest.raises(NotPushed, match=r"^535 at auth$"):
            by_mail(settings.model_copy(update={"smtp_username": "eve"}), NEWS)
    [mail, _] = relay.accepted
    assert (mail.sender, mail.recipients) == ("hi@acme.example", ["ops@acme.example"])
    assert b"Subject: async-email on mx1: relay needs attention\r\n" in mail.content
    assert b"Auto-Submitted: auto-generated\r\n" in mail.content
    assert b"It refuses <us>." in mail.content
    assert client.keys() == []
