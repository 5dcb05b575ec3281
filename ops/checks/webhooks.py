"""Checks that what becomes of mails is delivered to the endpoints of WEBHOOKS or WEBHOOK_URL."""

from __future__ import annotations

import time

from ops.checks.findings import Findings, counted, fault, lasting, note, ok, warn
from ops.checks.store import client
from ops.checks.target import Target
from settings import Settings
from webhooks.queue import Standing, standings


def delivered(target: Target, settings: Settings) -> Findings:
    if not settings.all_webhooks:
        yield note("WEBHOOK_URL is not set: no application is told what becomes of its mails")
        return
    with client(settings) as redis:
        known = {one.name: one for one in standings(redis)}
    for endpoint in settings.all_webhooks:
        seen = known.get(endpoint.name)
        if not seen or seen.is_silent(time.time()):
            fix = "sudo bin/install, in your clone, turns it on" if target.installed else target.restart("webhooks")
            fix += "; sudo journalctl -u async-email-webhooks -n 20"
            yield fault(f"no process posts to the endpoint {endpoint.name} at {endpoint.host}", fix)
        else:
            yield from about(seen)


def about(seen: Standing) -> Findings:
    waiting = f"{counted(seen.waiting, 'mail')} with events that wait"
    if seen.is_down:
        found = f"the endpoint {seen.name} at {seen.host} has failed for {lasting(time.time() - seen.since)}"
        yield warn(f"{found}: {seen.reply}; {waiting}", "see why; what waits goes out by itself once it answers")
    else:
        yield ok(f"the endpoint {seen.name} at {seen.host} is told what becomes of mails; {waiting}")
    if seen.given_up:
        found = f"{counted(seen.given_up, 'event')} for {seen.name} {'was' if seen.given_up == 1 else 'were'} given up"
        yield warn(found, "/mail/webhooks replays them")
