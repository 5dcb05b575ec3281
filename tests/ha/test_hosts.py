"""When a host of several dies or is cut off: three faults of chaos/ha/scenes.py side by side, and one without its
remedy, to show that a loss is seen. `python -m chaos --ha` plays all of them, longer and with more mail."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace

import pytest

from chaos.ha.__main__ import lacking, perform_all
from chaos.ha.account import Row
from chaos.ha.network import Network
from chaos.ha.scenes import SCENES
from chaos.ha.stage import Choice
from tests.programs import missing
from tests.servers import REDIS_SERVER

pytestmark = pytest.mark.ha
CHOSEN = ("kill -9", "between", "paused 3.8 s")
UNCONFIRMED = "lag"  # with REDIS_REPLICAS=0


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Row]:
    """All of them played at once."""
    if lack := lacking():
        missing("REQUIRE_HA", lack)
    usual = Choice(str(REDIS_SERVER), rate=20, tail=4)
    played = [(replace(SCENES[name], lasts=12), usual) for name in CHOSEN]
    slow = replace(SCENES[UNCONFIRMED], lasts=12, slow_relay=4)  # so that mail waits in the queue
    played.append((slow, usual._replace(replicas=0)))
    found = perform_all(played, tmp_path_factory.mktemp("hosts"), len(played))
    return {row.scene: row for row in found}


@pytest.mark.parametrize("name", CHOSEN)
def test_no_acknowledged_mail_is_lost_or_doubled_in_silence_when(rows: dict[str, Row], name: str) -> None:
    assert not rows[name].broken, str(rows[name])
    assert rows[name].acknowledged > 100


def test_what_no_replica_confirms_is_lost_or_doubled_and_that_is_seen(rows: dict[str, Row]) -> None:
    row = rows[UNCONFIRMED]
    assert row.lost or row.silent or row.forgotten, str(row)  # which of them depends on how far each worker had come


def test_hosts_are_taken_away_also_after_an_exception() -> None:
    if lack := lacking():
        missing("REQUIRE_HA", lack)
    network = Network(["one", "two"])
    with suppress(ZeroDivisionError), network:
        assert len(network.there()) == 3, "two hosts and the switch"
        raise ZeroDivisionError
    assert network.there() == []
