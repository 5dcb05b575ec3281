"""Whether somebody would be told."""

from __future__ import annotations

from typing import Any

import pytest

from ops.checks import alerts
from ops.checks.findings import FAULT, NOTE, OK, WARN
from ops.checks.target import Target
from tests.checks.support import assert_finds, listed, of
from tests.conversations import served

SECRET = "planted-topic"


def test_it_is_noted_that_nobody_would_be_told_or_not_always(target: Target) -> None:
    assert_finds(alerts.configured(target, of()), NOTE, "nobody is told", "ALERT_URL or ALERT_TO")
    assert_finds(alerts.configured(target, of(alert_to="a@b.example")), WARN, "SMTP_HOST is not", ".env")
    both = of(alert_to="a@b.example", smtp_host="relay.example")
    assert_finds(alerts.configured(target, both), NOTE, "not while the relay is in trouble", "ALERT_URL; bin/dev")


def test_the_host_and_its_certificate_are_tried_and_the_rest_of_the_url_is_not_shown(
    target: Target, certified: dict[str, Any]
) -> None:
    with served() as (_, to):
        plain = of(alert_url=f"http://127.0.0.1:{to.port}/{SECRET}")
        assert_finds(alerts.configured(target, plain), OK, "127.0.0.1 can be told")
    assert_finds(alerts.configured(target, plain), FAULT, "127.0.0.1 cannot be reached: Connection refused", ".env")
    with served(tls=certified["tls"], security="tls") as (_, to):
        foreign = of(alert_url=f"https://127.0.0.1:{to.port}/{SECRET}")
        assert_finds(alerts.configured(target, foreign), FAULT, "the certificate of 127.0.0.1 is not valid: ", ".env")
        assert SECRET not in repr(listed(alerts.configured(target, foreign)))


def test_a_test_goes_both_ways_and_what_came_back_is_said(target: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    target.test_alert = True
    with served() as (there, to):
        relay = {"smtp_host": "127.0.0.1", "smtp_port": to.port, "smtp_security": "none"}
        both = of(alert_url=f"http://127.0.0.1:1/{SECRET}", alert_to="ops@acme.example", **relay)
        found = listed(alerts.configured(target, both))
    assert [(one.level, one.found) for one in found] == [
        (FAULT, "ALERT_URL: the test was not taken: Connection refused"),
        (OK, "ALERT_TO: the test was taken; see whether it is there"),
    ]
    [body] = there.accepted
    assert alerts.TEST[:20].encode() in body
