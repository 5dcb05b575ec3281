"""Tokens that end while mail goes out: real processes, a token server and a relay that refuses what has ended."""

from __future__ import annotations

import os
import re
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from mail.outbox import Outbox
from smtp.policy import Phase, Verdict
from smtp.relay import Relay as Way
from smtp.tokens import Tokens
from tests.conversations import at, attempt, fate
from tests.mails import draft
from tests.relay import Relay
from tests.servers import House, RedisServer, eventually
from tests.token_server import EXPIRED, TokenServer

MAILS = int(os.environ.get("TOKEN_RUN_MAILS", "400"))


def way(client: Any, server: TokenServer, there: Relay, **changes: Any) -> Way:
    return at(there.port, username="ada@acme.example", tokens=Tokens(client, server.grant()), **changes)


def test_a_login_takes_the_token_and_one_that_has_ended_is_replaced_in_the_same_attempt(client: Any) -> None:
    with TokenServer() as server, Relay(takes_token=server.takes) as there:
        to = way(client, server, there)
        assert attempt(to).reply.code == 250
        server.revoke_all()
        assert attempt(to).reply.code == 250
    assert (len(server.asked), there.refused_logins, len(there.accepted)) == (2, 1, 2)


def test_a_login_that_no_token_helps_is_trouble_and_no_storm_of_renewals(client: Any) -> None:
    with TokenServer() as server, Relay(takes_token=lambda token: False) as there:
        outcomes = [attempt(way(client, server, there)) for _ in range(5)]
    assert {fate(one) for one in outcomes} == {(Phase.AUTH, 535, Verdict.TROUBLE)}
    assert {one.reply.text for one in outcomes} == {"5.7.3 Authentication unsuccessful [XOAUTH2 401]"}
    assert len(server.asked) == 1


def test_a_token_server_that_refuses_is_trouble_before_the_relay_is_spoken_to(client: Any) -> None:
    with TokenServer() as server, Relay(takes_token=server.takes) as there:
        server.answers = [(400, EXPIRED, {})]
        outcome = attempt(way(client, server, there))
    assert fate(outcome) == (Phase.AUTH, None, Verdict.TROUBLE)
    assert outcome.reply.text == "no token: invalid_grant AADSTS700082"
    assert there.connections == 0


@pytest.mark.parametrize("ends", ["revoked", "soon"])
def test_a_token_that_ends_in_the_middle_costs_no_mail_an_attempt(
    redis_server: RedisServer, client: Any, outbox: Outbox, tmp_path: Path, ends: str
) -> None:
    ids = [outbox.accept([draft()]).id for _ in range(MAILS)]
    with TokenServer(life=1 if ends == "soon" else 3600, rotates=True) as server:
        revocations = [MAILS // 3, 2 * MAILS // 3] if ends == "revoked" else []

        def on_data() -> None:
            time.sleep(0.1 if ends == "soon" else 0)  # or all is over before a token ends
            if revocations and len(there.accepted) >= revocations[0]:
                revocations.pop(0)
                server.revoke_all()

        with Relay(takes_token=server.takes, on_data=on_data) as there:
            settings = there.environment(tmp_path) | {
                "SMTP_USERNAME": "ada@acme.example",
                "SMTP_OAUTH": server.grant().written(),
                "WORKER_PROCESSES": "2",
            }
            with House(tmp_path, redis_server.url, **settings) as house:
                for _ in range(2):
                    house.worker()
                eventually(lambda: int(client.hget("mail:totals", "sent") or 0) == MAILS, 240)
                assert not re.search("token-|refresh-", house.log("worker-email"))  # at LOG_LEVEL=DEBUG
    assert sorted(one.message_id.split("@")[0] for one in there.accepted) == sorted(f"<{one}" for one in ids)
    totals = {name.decode(): int(value) for name, value in client.hgetall("mail:totals").items() if value.isdigit()}
    attempts = {name: value for name, value in totals.items() if name.startswith("attempt:")}
    print(f"{MAILS} mails, {attempts}; tokens: {len(server.asked)}; logins refused: {there.refused_logins}")
    assert {client.hget(f"mail:{one}", "counted") for one in ids} <= {b"0", None}
    assert not {"failed", "attempt:try_again", "attempt:refused", "attempt:in_doubt"} & set(totals)
    if ends == "revoked":
        assert len(server.asked) == 3  # the first, and one for each end
    else:
        issued = list(server.issued.values())
        assert len(issued) > 1
        pauses = [later - earlier for earlier, later in pairwise(issued)]
        assert min(pauses) >= 0.9 * server.life - 0.01  # no sooner than in the last tenth of the one before
