"""The charts: what is drawn of which figures, and that it is SVG that a strict policy allows."""

from __future__ import annotations

import re
from xml.etree import ElementTree

import pytest

from ops.page.charts import Series, chart, of_counts, of_times

TIMES = [1_800_000_000 + 60 * n for n in range(5)]


def drawn(figure: str, kind: str) -> list[str]:
    """The commands of each path of this class."""
    tree = ElementTree.fromstring(figure.replace("tabindex", "data-t"))
    return [path.attrib["d"] for path in tree.iter("path") if kind in path.attrib["class"].split()]


def test_a_line_has_a_gap_where_there_is_no_figure_and_bars_none_at_zero() -> None:
    figure = chart("t", TIMES, [Series("sent", [1, 2, None, 2, None]), Series("failed", [0, 2, 0, None, 1], True)])
    assert re.findall("[ML]", drawn(figure, "line")[0]) == ["M", "L"]
    assert drawn(figure, "dots")[0].count("M") == 1  # the 2 between two gaps
    assert drawn(figure, "failed")[0].count("M") == 2
    assert "style" not in figure
    assert "t; at the end sent 2, failed 1" in figure


@pytest.mark.parametrize(("most", "top"), [(0, "1"), (3, "4"), (7, "10"), (41, "50"), (1201, "2,000")])
def test_the_scale_of_counts_ends_at_a_round_number(most: float, top: str) -> None:
    scale = of_counts(most)
    assert scale.ticks[-1][1] == top
    assert 0 <= scale.place(most) <= 1


@pytest.mark.parametrize(("most", "top"), [(0, "0.1 s"), (0.3, "1 s"), (61, "10 min"), (200_000, "1 day")])
def test_the_scale_of_times_shows_tenths_of_seconds_and_hours(most: float, top: str) -> None:
    scale = of_times(most)
    assert scale.ticks[-1][1] == top
    assert [scale.place(value) for value in (0, most)] == [0, pytest.approx(scale.place(most))]
    assert 0 <= scale.place(most) <= 1


def test_marks_are_drawn_where_they_were_and_their_text_is_text() -> None:
    figure = chart("t", TIMES, [], marks=[(TIMES[2], "<b>0.2.0</b>"), (TIMES[0] - 9, "before")])
    assert "&lt;b&gt;0.2.0" in figure
    assert "before" not in figure
    assert 'x1="385.0"' in figure
    assert "no figures yet" in figure
