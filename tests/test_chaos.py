"""When things die: a dozen faults of chaos/scenes.py at once, in real time and with the default settings.

Among what each scene promises: every mail that was accepted is sent once, or again only where the relay's answer
was lost; nothing is lost; the API says what the relay's log says; and what a killed worker held is sent within two
minutes. Nothing is put forward (but in the poison's scene, which says so), so the scenes wait; they run side by side,
each on a stage of its own, and take as long as the slowest. `python -m chaos` plays all of them, longer.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest

from chaos.__main__ import perform
from chaos.ledger import Row
from chaos.scenes import SCENES

CHOSEN = [  # scene and ON_DOUBT
    ("workers killed", "retry"),
    ("killed after pop, before RQ's registry", "retry"),
    ("killed before the final dot", "retry"),
    ("killed after 250, before the marker", "hold"),
    ("killed in maintenance", "retry"),
    ("poison mail", "retry"),
    ("power cut", "retry"),
    ("API killed before its answer", "retry"),
    ("submission killed before its answer", "retry"),
    ("Redis full", "retry"),
    ("reply to accept lost", "retry"),
    ("reply to settle lost", "hold"),
    ("relay away", "retry"),
    ("quota used up", "retry"),
    ("drained", "retry"),
]


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Row]:
    """All of them played at once."""
    with ThreadPoolExecutor(len(CHOSEN)) as stages:
        playing = {
            name: stages.submit(
                perform, SCENES[name], tmp_path_factory.mktemp("stage"), seed=1, mails=12, on_doubt=on_doubt
            )
            for name, on_doubt in CHOSEN
        }
        return {name: one.result() for name, one in playing.items()}


@pytest.mark.parametrize(("name", "on_doubt"), CHOSEN)
def test_the_promise_is_kept_when(rows: dict[str, Row], name: str, on_doubt: str) -> None:
    assert not rows[name].broken, str(rows[name])
