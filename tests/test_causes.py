"""The mails that the same reason keeps: found by it, counted, and gone from it whichever way they go on."""

from __future__ import annotations

import time
import uuid
from typing import Any

import pytest

from mail import causes, index
from mail.causes import of_cause
from mail.index import made_at
from mail.outbox import Outbox
from mail.states import State
from tests.mails import accept, claim
from tests.redis_troubles import configured
from tests.servers import RedisServer


def settled(outbox: Outbox, state: State, reason: str) -> str:
    mail_id = accept(outbox)
    claim(outbox, mail_id).settle(state, reason=reason, next_in=60 if state == State.DELAYED else 0)
    return mail_id


def found(outbox: Outbox) -> dict[tuple[str, str], int]:
    return {(one.state, one.reason): one.mails for one in causes.causes(outbox)}


def test_a_cause_has_its_mails_and_the_one_of_most_comes_first(outbox: Outbox, client: Any) -> None:
    assert causes.causes(outbox) == []
    refused = [settled(outbox, State.FAILED, "550 at rcpt") for _ in range(3)]
    later = [settled(outbox, State.DELAYED, "550 at rcpt") for _ in range(2)]
    [doubt] = [settled(outbox, State.UNKNOWN, "no reply at connect (Zeitüberschreitung)")]
    most, *others = causes.causes(outbox)
    assert most == ("failed", "550 at rcpt", 3, made_at(refused[0]), made_at(refused[-1]))
    assert [one.state for one in others] == ["delayed", "unknown"]
    assert list(causes.ids(outbox, "failed", "550 at rcpt")) == refused[::-1]
    assert list(causes.ids(outbox, "delayed", "550 at rcpt")) == later[::-1]
    assert list(causes.ids(outbox, others[1].state, others[1].reason)) == [doubt]
    assert list(causes.ids(outbox, "failed", "551 at rcpt")) == []
    index.trim(outbox.store, 0)
    assert causes.causes(outbox) == [most, *others]


def test_every_page_of_a_cause_is_read(outbox: Outbox, client: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(causes, "AT_ONCE", 2)
    ids = [settled(outbox, State.FAILED, "x") for _ in range(5)]
    assert list(causes.ids(outbox, "failed", "x")) == ids[::-1]


def test_what_an_earlier_version_did_is_set_right_by_the_sweep(outbox: Outbox, client: Any) -> None:
    unnoted, moved, sent, gone = (settled(outbox, State.FAILED, "550 at rcpt") for _ in range(4))
    client.zrem("mail:index", of_cause("failed", "550 at rcpt") + uuid.UUID(unnoted).bytes)
    client.hset(f"mail:{moved}", "reason", "554 at the final dot")
    client.hset(f"mail:{sent}", "state", "sent")
    client.delete(f"mail:{gone}")
    client.set(f"mail:{gone}", "no mail")
    index.trim(outbox.store, time.time() - 3600)
    assert list(causes.ids(outbox, "failed", "550 at rcpt")) == [unnoted]
    assert found(outbox) == {("failed", "550 at rcpt"): 1, ("failed", "554 at the final dot"): 1}


def test_what_is_no_member_is_dropped_and_hides_no_cause(outbox: Outbox, client: Any) -> None:
    settled(outbox, State.FAILED, "550 at rcpt")
    client.zadd("mail:index", dict.fromkeys((b"", b"rf", b"sf", b"\xff"), 0))
    assert found(outbox) == {("failed", "550 at rcpt"): 1}
    index.trim(outbox.store, 0)
    assert not {b"", b"rf", b"sf", b"\xff"} & {*client.zrange("mail:index", 0, -1)}
    assert found(outbox) == {("failed", "550 at rcpt"): 1}


def test_a_cause_none_of_whose_mails_is_kept_is_not_shown(outbox: Outbox, client: Any) -> None:
    first, last = (settled(outbox, State.FAILED, "550 at rcpt") for _ in range(2))
    client.delete(f"mail:{last}")
    assert found(outbox) == {("failed", "550 at rcpt"): 2}  # until the sweep comes by
    client.delete(f"mail:{first}")
    assert found(outbox) == {}


def test_there_is_an_end_to_causes(outbox: Outbox, client: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(causes, "MOST", 2)
    for number in range(3):
        settled(outbox, State.FAILED, f"no reply at connect ({number})")
    assert len(causes.causes(outbox)) == 2


def test_on_a_full_redis_a_cause_is_noted_all_the_same(redis_server: RedisServer, outbox: Outbox, client: Any) -> None:
    taken = claim(outbox, accept(outbox))
    with configured(redis_server, maxmemory=1):
        taken.settle(State.DELAYED, reason="451 at rcpt", next_in=1)
        assert found(outbox) == {("delayed", "451 at rcpt"): 1}
